"""Scribbles: common/strokes.py, data/prepare_scribbles.py and what common/datasets.py does with them, against
hand values, brute force and a pipeline for whole images in numpy; files are written to tmp_path."""
import heapq
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from common import datasets as ds
from common import loaders, regions, transforms
from common import strokes as st
from common.run import UserError
from data import prepare_scribbles as prepare
from pixels import denormalise

REPO = Path(__file__).parent.parent


def message(call, *args, **kwargs):
    """The sentence of the UserError that call(...) must raise: one line."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and "Traceback" not in text and text.endswith(".")
    return text


def save(path, array):
    """Write an array (H,W) or (H,W,3) as an image file; makes the folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path)


def load(path):
    return np.array(Image.open(path))


def canvas(height, width, *boxes):
    """255 with boxes (class id, y0, y1, x0, x1) of labels."""
    mask = np.full((height, width), 255, np.uint8)
    for class_id, y0, y1, x0, x1 in boxes:
        mask[y0:y1, x0:x1] = class_id
    return mask


def wavy(seed, count=60, width=150, height=110):
    """A smooth curve (count,2) inside the picture, in whole pixels."""
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 1, count)
    y = height / 2 + height * 0.35 * np.sin(t * rng.uniform(3, 6) + rng.uniform(0, 6))
    return np.rint(np.stack([10 + t * (width - 20), y], 1))


def xml_text(width, height, drawn):
    points = ["".join(f"<point><X>{x}</X><Y>{y}</Y></point>" for x, y in line) for _, line in drawn]
    body = "".join(f"<polygon><tag>{tag}</tag>{p}</polygon>" for (tag, _), p in zip(drawn, points))
    return (f"<annotation><filename>a.jpg</filename><size><width>{width}</width><height>{height}</height>"
            f"<depth>3</depth></size>{body}</annotation>")


# ---- distances along pixels (common/regions.py) ----------------------------------------------------------

def random_regions(seed, height=13, width=17):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 3, (height // 3 + 1, width // 3 + 1))
    return coarse.repeat(3, 0).repeat(3, 1)[:height, :width]


@pytest.mark.parametrize("seed", range(4))
def test_depth_inside_equals_brute_force(seed):
    ids = random_regions(seed)
    framed = np.pad(ids, 1, constant_values=-1)
    height, width = ids.shape
    for y, x in np.ndindex(ids.shape):
        other = [abs(v - 1 - y) + abs(u - 1 - x) for v, u in np.ndindex(framed.shape)
                 if framed[v, u] != ids[y, x] and (0 < v <= height or 0 < u <= width)]
        assert regions.depth_inside(ids)[y, x] == min(other)


def dijkstra(ids, sources, price):
    """Shortest ways over the 8 neighbours of equal value, one pixel after the other."""
    distance = np.full(ids.shape, np.inf)
    queue = [(0.0, divmod(int(s), ids.shape[1])) for s in sources]
    while queue:
        way, (y, x) = heapq.heappop(queue)
        if way >= distance[y, x]:
            continue
        distance[y, x] = way
        for dy, dx in ((a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b):
            v, u = y + dy, x + dx
            if 0 <= v < ids.shape[0] and 0 <= u < ids.shape[1] and ids[v, u] == ids[y, x]:
                step = math.hypot(dy, dx) * (price[y, x] + price[v, u]) / 2
                heapq.heappush(queue, (way + step, (v, u)))
    return distance


@pytest.mark.parametrize("seed", range(4))
def test_geodesic_distance_equals_dijkstra(seed):
    ids, rng = random_regions(seed), np.random.default_rng(seed)
    sources = rng.choice(np.flatnonzero(ids), 3, replace=False)
    for price in (np.ones(ids.shape), rng.uniform(0.1, 3, ids.shape)):
        assert np.allclose(regions.geodesic_distance(ids, sources, price), dijkstra(ids, sources, price))
    assert np.isinf(regions.geodesic_distance(np.array([[1, 0, 1]]), [0])).tolist() == [[False, True, True]]


# ---- strokes as lines ------------------------------------------------------------------------------------

def test_read_strokes(tmp_path):
    drawn = [("cow", [(1, 2), (3, 4)]), ("background", [(7, 8)]), ("cow", []), ("Monitor", [(5, 5), (40, 9)])]
    (tmp_path / "a.xml").write_text(xml_text(30, 20, drawn))
    size, lines = st.read_strokes(tmp_path / "a.xml")
    assert size == (30, 20) and [class_id for class_id, _ in lines] == [10, 0, 20]
    assert lines[0][1].tolist() == [[1, 2], [3, 4]] and lines[1][1].tolist() == [[7, 8]]


def test_names_in_the_xml_files_are_the_21_classes_of_voc():
    short = {"plane": "aeroplane", "bike": "bicycle", "table": "diningtable", "plant": "pottedplant",
             "monitor": "tvmonitor"}
    assert [short.get(name, name) for name in st.XML_NAMES] == ds.CLASSES["voc"]
    assert all(st.CLASS_ID[name] == i for i, name in enumerate(ds.CLASSES["voc"]))


@pytest.mark.parametrize("text, words", [
    ("<annotation><size>", ["damaged"]), ("", ["damaged"]), ("hello", ["damaged"]),
    ("<annotation></annotation>", ["no <size>"]),
    (xml_text("", 20, []), ["damaged"]), (xml_text(0, 20, []), ["proper number"]),
    (xml_text(30, 20, [("cow", [("x", 1)])]), ["damaged"]),
    (xml_text(30, 20, [("cow", [("nan", 1)])]), ["proper number"]),
    (xml_text(30, 20, []).replace("</annotation>", "<object/></annotation>"), ["boxes"]),
    (xml_text(30, 20, [("zebra", [(1, 1)])]), ["'zebra'", "sheep"]),
    (xml_text(30, 20, [("cow", [(1, 1)]), ("dog", [(60, 5), (70, 9)])]), ["dog", "(60, 5)", "30 x 20"])])
def test_faulty_xml_files_are_named(tmp_path, text, words):
    (tmp_path / "a.xml").write_text(text)
    said = message(st.read_strokes, tmp_path / "a.xml")
    assert str(tmp_path / "a.xml") in said and all(word in said for word in words), said
    assert "does not exist" in message(st.read_strokes, tmp_path / "b.xml")


def test_strokes_that_leave_the_image_are_cut(tmp_path):
    (tmp_path / "a.xml").write_text(xml_text(9, 5, [("cow", [(-40, 2), (4, 2)]), ("dog", [(9, 4)])]))
    (width, height), lines = st.read_strokes(tmp_path / "a.xml")
    assert st.draw_strokes(lines, width, height).tolist() == [
        [255] * 9, [10] * 5 + [255] * 4, [10] * 6 + [255] * 3, [10] * 5 + [255] * 4, [255] * 8 + [12]]


def test_drawing_by_hand():
    line = st.draw_strokes([(3, [(2, 2), (6, 2)])], 10, 5)                  # 3 rows, and a round end
    assert line.tolist() == [[255] * 10, [255, 255] + [3] * 5 + [255] * 3, [255] + [3] * 7 + [255, 255],
                             [255, 255] + [3] * 5 + [255] * 3, [255] * 10]
    assert line.dtype == np.uint8
    crossed = st.draw_strokes([(3, [(0, 2), (9, 2)]), (4, [(5, 0), (5, 4)])], 10, 5)
    assert crossed[2].tolist() == [3] * 4 + [4] * 3 + [3] * 3               # the later one covers
    assert (st.draw_strokes([], 4, 3) == 255).all()


@pytest.mark.parametrize("thickness", [1, 3, 7])
@pytest.mark.parametrize("seed", range(3))
def test_lines_are_as_wide_as_they_should_be(seed, thickness):
    points = wavy(seed)
    drawn = st.draw_strokes([(1, points)], 150, 110, thickness) != 255
    y, x = np.indices(drawn.shape)
    nearest = np.full(drawn.shape, np.inf)
    for (x0, y0), (x1, y1) in zip(points, points[1:]):                      # distance to every segment
        dx, dy = x1 - x0, y1 - y0
        t = np.clip(((x - x0) * dx + (y - y0) * dy) / (dx ** 2 + dy ** 2), 0, 1)
        nearest = np.minimum(nearest, np.hypot(x - x0 - t * dx, y - y0 - t * dy))
    assert drawn[nearest < thickness / 2 - 0.71].all() and not drawn[nearest > thickness / 2 + 0.71].any()
    assert drawn[points[:, 1].astype(int), points[:, 0].astype(int)].all()


def test_central_part_by_hand():
    corner = np.array([(0, 0), (10, 0), (10, 30)], float)                   # 40 pixels long
    assert st.central_part(corner, 0).tolist() == corner.tolist()
    assert st.central_part(corner, 0.25).tolist() == [[5, 0], [10, 0], [10, 25]]
    assert st.central_part(corner, 0.75).tolist() == [[10, 5], [10, 15]]
    assert st.central_part(corner, 1).tolist() == [[10, 10]]
    for point in (corner[:1], corner[[0, 0]]):
        assert st.central_part(point, 0.5).tolist() == point.tolist()       # has no length


# ---- scribble-drop and scribble-shrink -------------------------------------------------------------------

def five_strokes():
    lines = [(0, [(5, 5), (140, 8)]), (7, wavy(1)[:25]), (7, wavy(1)[35:]),
             (2, [(74, 90), (74, 50), (78, 30)]),
             (9, [(30, 90), (40, 100), (25, 104)])]
    return [(class_id, np.array(points, float)) for class_id, points in lines]


def five_drawn():
    return st.draw_strokes(five_strokes(), 150, 110)


def test_strokes_are_what_touches_with_the_same_class():
    mask = canvas(6, 8, (0, 0, 2, 0, 3), (4, 0, 2, 3, 5), (4, 2, 4, 5, 7), (0, 4, 6, 0, 8))
    assert st.strokes_of_mask(mask).tolist() == [
        *[[1, 1, 1, 2, 2, 0, 0, 0]] * 2, *[[0, 0, 0, 0, 0, 2, 2, 0]] * 2, *[[3] * 8] * 2]


def test_ratio_0_changes_nothing_and_drop_1_removes_all():
    mask = five_drawn()
    before = mask.copy()
    assert (st.weaken(mask) == mask).all() and (st.weaken(mask, 1.0) == 255).all()
    assert (mask == before).all()                                           # and never the argument
    assert [c for c, _ in st.weaken_strokes(five_strokes())] == [0, 7, 7, 2, 9]
    assert st.weaken_strokes(five_strokes(), drop=1) == []
    empty = canvas(5, 7)
    assert (st.weaken(empty, 0.5, 0.5) == 255).all()
    full = np.zeros((5, 7), np.uint8)
    assert (st.weaken(full, 0, 0) == 0).all() and 0 < (st.weaken(full, 0, 1) == 0).sum() < 35


@pytest.mark.parametrize("drop", [0.1, 0.5, 0.8])
def test_whole_strokes_are_dropped_with_the_given_probability(drop):
    mask, kept = five_drawn(), []
    number = st.strokes_of_mask(mask)
    for seed in range(300):
        left = st.weaken(mask, drop, seed=seed)
        share = np.bincount(number.ravel(), left.ravel() != 255)[1:] / np.bincount(number.ravel())[1:]
        assert set(share.tolist()) <= {0.0, 1.0}
        assert (left[left != 255] == mask[left != 255]).all()
        kept.append(share)
        assert len(st.weaken_strokes(five_strokes(), drop, seed=seed)) == share.sum()
    kept = np.array(kept)                                                   # (300,5)
    assert np.abs(kept.mean(0) - (1 - drop)).max() < 0.11                   # 4 standard deviations
    assert abs(kept.mean() - (1 - drop)) < 0.05
    assert np.abs(np.corrcoef(kept.T) - np.eye(5)).max() < 0.25             # each on its own


def test_larger_ratios_leave_part_of_what_smaller_ones_leave():
    ratios = (0, 0.1, 0.3, 0.5, 0.8, 1)
    ring = np.full((110, 150), 255, np.uint8)
    y, x = np.indices(ring.shape)
    ring[np.abs(np.hypot(y - 50, x - 70) - 40) < 2] = 6
    for mask, seed in ((five_drawn(), 0), (five_drawn(), 1), (ring, 2)):
        left = {(d, s): st.weaken(mask, d, s, seed) != 255 for d in ratios for s in ratios}
        for (d, s), few in left.items():
            assert all(many[few].all() for (e, t), many in left.items() if e <= d and t <= s)
        assert len({few.sum() for few in left.values()}) > 5


def test_the_seed_decides_alone():
    mask = five_drawn()
    results = [st.weaken(mask, 0.5, 0.3, seed).tobytes() for seed in range(20)]
    assert results == [st.weaken(mask, 0.5, 0.3, seed).tobytes() for seed in range(20)]
    assert len(set(results)) > 8


def test_shrinking_a_straight_stroke_by_hand():
    mask = canvas(9, 111, (5, 3, 6, 5, 106))                                # 101 x 3, its middle at x = 55
    for shrink, half in ((0.2, 40), (0.5, 25), (0.9, 5)):
        columns = np.flatnonzero((st.weaken(mask, shrink=shrink)[4] == 5))
        assert abs(columns.min() - (55 - half)) <= 1 and abs(columns.max() - (55 + half)) <= 1
        assert len(columns) == columns.max() - columns.min() + 1
    assert (st.weaken(mask, shrink=1) == canvas(9, 111, (5, 3, 6, 54, 57))).all()       # a dot of 3 x 3


def test_a_stroke_of_one_pixel_width_shrinks_to_one_pixel():
    mask = canvas(40, 40)
    mask[np.arange(31), np.arange(31)] = 8
    left = st.weaken(mask, shrink=1)
    assert (left != 255).sum() == 1 and left[15, 15] == 8
    steps = np.flatnonzero((st.weaken(mask, shrink=0.5) == 8).any(0))
    assert abs(steps.min() - 7.5) <= 1 and abs(steps.max() - 22.5) <= 1


@pytest.mark.parametrize("seed", range(4))
def test_pixels_and_lines_shrink_alike(seed):
    lines = [(4, wavy(seed))]
    whole = st.draw_strokes(lines, 150, 110)
    for shrink in (0.2, 0.5, 0.8, 1):
        pixels = st.weaken(whole, shrink=shrink) == 4
        by_line = st.weaken_strokes(lines, shrink=shrink)[0][1]
        y, x = np.nonzero(pixels)
        apart = np.hypot(x[:, None] - by_line[:, 0], y[:, None] - by_line[:, 1])        # (pixels,points)
        assert apart.min(1).max() < 6 and apart.min(0).max() < 4            # points are about 3 pixels apart
        drawn = st.draw_strokes([(4, by_line)], 150, 110) == 4
        if shrink < 1:
            assert (pixels & drawn).sum() / (pixels | drawn).sum() > 0.85
        else:
            assert pixels.sum() <= 16


def test_rings_and_forks_keep_one_piece():
    y, x = np.indices((90, 90))
    ring = np.where(np.abs(np.hypot(y - 45, x - 45) - 35) < 2, 3, 255).astype(np.uint8)
    fork = canvas(90, 90, (3, 10, 80, 44, 47), (3, 44, 47, 10, 80), (3, 20, 23, 44, 70))
    for mask in (ring, fork):
        area = (mask == 3).sum()
        for shrink in (0.3, 0.6, 1):
            left = st.weaken(mask, shrink=shrink)
            assert st.strokes_of_mask(left).max() == 1
            assert (left == 3).sum() <= (1 - shrink) * area * 1.35 + 30


@pytest.mark.parametrize("name", ["drop", "shrink"])
@pytest.mark.parametrize("ratio", [-0.1, 1.01, float("nan")])
def test_ratios_outside_0_to_1_are_refused(name, ratio):
    for call, what in ((st.weaken, five_drawn()), (st.weaken_strokes, five_strokes()),
                       (ds.WeakerScribbles, ds.open_dataset("toy_scenes", "", "train"))):
        text = message(call, what, **{name: ratio})
        assert text.startswith(f"{name} {ratio}")


# ---- scribbles from full masks ---------------------------------------------------------------------------

def blobs(seed, height=160, width=230, classes=5):
    """A full mask of smooth areas with an unlabelled border between them."""
    noise = torch.randn((classes, 3, 4), generator=torch.Generator().manual_seed(seed))
    field = torch.nn.functional.interpolate(noise[None], (height, width), mode="bicubic")[0]
    best = field.topk(2, dim=0)
    mask = best.indices[0].to(torch.uint8)
    mask[best.values[0] - best.values[1] < 0.05] = 255
    return mask.numpy()


@pytest.mark.parametrize("seed", range(4))
def test_scribbles_agree_with_the_mask_and_every_large_region_has_one(seed):
    mask = blobs(seed, 375, 500)
    before = mask.copy()
    scribbles = st.scribbles_from_mask(mask, seed)
    assert (mask == before).all() and scribbles.dtype == np.uint8
    drawn = scribbles != 255
    assert (scribbles[drawn] == mask[drawn]).all() and not (drawn & (mask == 255)).any()
    region = st.strokes_of_mask(mask)
    area, labelled = np.bincount(region.ravel())[1:], np.bincount(region.ravel(), drawn.ravel())[1:]
    assert ((labelled > 0) == (area >= max(st.MIN_PIXELS, st.MIN_SHARE * mask.size))).all()
    assert 0.01 < drawn.mean() < 0.035                                      # people draw 2 to 3 %
    assert (st.scribbles_from_mask(mask, seed) == scribbles).all()
    assert (st.scribbles_from_mask(mask, seed + 1) != scribbles).any()


def test_a_stroke_runs_along_the_middle_of_its_region():
    mask = canvas(120, 300, (3, 30, 70, 20, 280))                           # 40 rows, 260 columns
    scribbles = st.scribbles_from_mask(mask, 5)
    y, x = np.nonzero(scribbles != 255)
    assert np.abs(y - 49.5).mean() < 10 and np.abs(y - 49.5).max() < 17     # far from both long edges
    assert x.max() - x.min() > 130 and st.strokes_of_mask(scribbles).max() == 1
    ring = np.full((200, 200), 0, np.uint8)
    v, u = np.indices(ring.shape)
    ring[np.abs(np.hypot(v - 100, u - 100) - 60) < 15] = 1
    on_ring = np.nonzero(st.scribbles_from_mask(ring, 1) == 1)
    radius = np.hypot(on_ring[0] - 100, on_ring[1] - 100)
    assert np.abs(radius - 60).max() < 15 and np.abs(radius - 60).mean() < 6 and len(radius) > 200


def test_thickness_of_the_strokes():
    mask = np.zeros((100, 200), np.uint8)
    thin, thick = ((st.scribbles_from_mask(mask, 0, t) == 0).sum() for t in (1, 5))
    assert 3.5 < thick / thin < 6.5


def test_regions_of_any_kind():
    assert (st.scribbles_from_mask(canvas(30, 40)) == 255).all()
    thin = canvas(500, 500, (4, 10, 490, 250, 251), (2, 3, 5, 3, 493))      # between the pixels of the grid
    scribbles = st.scribbles_from_mask(thin)
    assert (scribbles == 4).any() and (scribbles == 2).any() and (scribbles[thin == 255] == 255).all()
    only = canvas(500, 500, (4, 10, 490, 251, 252))
    assert (st.scribbles_from_mask(only) == 4).any()
    small = canvas(300, 300, (0, 0, 300, 0, 300), (1, 100, 103, 100, 103))
    assert 1 not in st.scribbles_from_mask(small)                           # 9 of 90,000 pixels
    assert (st.scribbles_from_mask(np.full((1, 50), 7, np.uint8)) == 7).any()
    assert (st.scribbles_from_mask(np.full((4, 4), 254, np.uint8)) == 254).any()


# ---- data/prepare_scribbles.py ---------------------------------------------------------------------------

def fails(argv, capsys):
    """The sentence that the command prints before it ends with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        prepare.main([str(a) for a in argv])
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert caught.value.code == 2
    return text


def test_command_xml(tmp_path, capsys):
    drawn = [("cow", [(3, 3), (20, 9)]), ("background", [(1, 18), (28, 15)])]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "2007_1.xml").write_text(xml_text(30, 20, drawn))
    prepare.main(["xml", str(tmp_path / "in"), str(tmp_path / "out")])
    picture = Image.open(tmp_path / "out" / "2007_1.png")
    assert picture.mode == "P" and picture.convert("RGB").getpixel((29, 0)) == (255, 255, 255)
    expected = st.draw_strokes([(10, drawn[0][1]), (0, drawn[1][1])], 30, 20)
    assert (np.array(picture) == expected).all()
    said = capsys.readouterr().out
    assert "wrote 1 masks" in said and "class ids 0 10" in said
    assert f"{100 * (expected != 255).mean():.2f} %" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_command_masks_keeps_the_sub_folders(tmp_path):
    for split, seed in (("train", 0), ("val", 1)):
        save(tmp_path / "in" / split / "a.png", blobs(seed))
    (tmp_path / "out").mkdir()                                              # empty is fine
    prepare.main(["masks", str(tmp_path / "in"), str(tmp_path / "out"), "--unlabelled", "3", "--seed", "4"])
    for split, seed in (("train", 0), ("val", 1)):
        mask = blobs(seed)
        mask[mask == 3] = 255
        scribbles = load(tmp_path / "out" / split / "a.png")
        assert (scribbles[scribbles != 255] == mask[scribbles != 255]).all() and 3 not in scribbles
        assert 0.001 < (scribbles != 255).mean() < 0.05
    prepare.main(["masks", str(tmp_path / "in"), str(tmp_path / "other"), "--unlabelled", "3", "--seed", "5"])
    assert (load(tmp_path / "other" / "val" / "a.png") != scribbles).any()


def test_command_points(tmp_path):
    save(tmp_path / "images" / "a.jpg", np.zeros((20, 30, 3)))
    save(tmp_path / "images" / "b.jpg", np.zeros((20, 30, 3)))
    points = {"a": [{"x": 10.4, "y": 8.0, "cls": 5}, {"x": 29, "y": 19.2, "cls": 0}], "gone": []}
    (tmp_path / "points.json").write_text(json.dumps(points))
    argv = ["points", tmp_path / "points.json", tmp_path / "out", "--images", tmp_path / "images"]
    prepare.main([str(a) for a in (*argv, "--radius", 2)])
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.png"]
    mask = load(tmp_path / "out" / "a.png")
    y, x = np.indices(mask.shape)
    for class_id, px, py in ((5, 10, 8), (0, 29, 19)):
        way = np.hypot(y - py, x - px)
        assert (mask[way <= 2] == class_id).all() and not (mask[way > 2.9] == class_id).any()
    assert set(np.unique(mask)) == {0, 5, 255}


def test_command_keeps_only_the_classes_asked_for(tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(np.array([[0, 3, 3, 255, 7, 7]], np.uint8).repeat(4, 0)).save(tmp_path / "in" / "a.png")
    prepare.main(["weaken", str(tmp_path / "in"), str(tmp_path / "out"), "--classes", "0", "7"])
    assert np.array(Image.open(tmp_path / "out" / "a.png")).tolist() == [[0, 255, 255, 255, 7, 7]] * 4


def test_command_weaken_on_masks_is_what_weaker_scribbles_are(tmp_path):
    (tmp_path / "data" / "images").mkdir(parents=True)
    names = ["b", "a", "c"]
    for i, name in enumerate(names):
        save(tmp_path / "data" / "images" / f"{name}.png", np.full((110, 150, 3), i))
        save(tmp_path / "data" / "masks" / f"{name}.png", np.roll(five_drawn(), 3 * i, 1))
    (tmp_path / "data" / "train.txt").write_text("\n".join(names))
    (tmp_path / "data" / "classes.txt").write_text("\n".join(f"class {i}" for i in range(10)))
    argv = ["weaken", str(tmp_path / "data" / "masks"), str(tmp_path / "out")]
    prepare.main([*argv, "--drop", "0.4", "--shrink", "0.3", "--seed", "2"])
    data = ds.open_dataset("folder", tmp_path / "data", "train")
    weaker = ds.WeakerScribbles(data, 0.4, 0.3, seed=2)
    for i, name in enumerate(names):
        assert (load(tmp_path / "out" / f"{name}.png") == weaker.read_mask(i).numpy()).all()
    again = ds.open_dataset("folder", tmp_path / "data", "train", mask_dir=str(tmp_path / "out"))
    assert all(torch.equal(again.read(i)[1], weaker.read(i)[1]) for i in range(3))


def test_command_weaken_on_lines(tmp_path):
    drawn = [(st.XML_NAMES[class_id], points.tolist()) for class_id, points in five_strokes()]
    for name in "abcdefgh":
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{name}.xml").write_text(xml_text(150, 110, drawn))
    prepare.main(["weaken", str(tmp_path / "in"), str(tmp_path / "out"), "--shrink", "0.5"])
    expected = st.draw_strokes(st.weaken_strokes(five_strokes(), 0, 0.5), 150, 110)
    assert all((load(tmp_path / "out" / f"{name}.png") == expected).all() for name in "abcdefgh")
    prepare.main(["weaken", str(tmp_path / "in"), str(tmp_path / "half"), "--drop", "0.5"])
    left = [np.unique(load(tmp_path / "half" / f"{name}.png")).tolist() for name in "abcdefgh"]
    assert len(set(map(str, left))) > 2                                     # each file has its own luck


def test_mistakes_leave_nothing_behind(tmp_path, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    assert "in is no folder" in fails(["xml", source, out], capsys)
    source.mkdir()
    assert "holds no file *.png or *.xml" in fails(["weaken", source, out], capsys)
    save(source / "a.png", five_drawn())
    assert "*.xml" in fails(["xml", source, out], capsys)
    assert "drop 2.0" in fails(["weaken", source, out, "--drop", 2], capsys)
    save(source / "b.png", np.zeros((4, 4, 3)))
    text = fails(["masks", source, out], capsys)
    assert "b.png" in text and "colour picture" in text
    points = ["points", tmp_path / "p.json", out, "--images", source]
    assert "p.json does not exist" in fails(points, capsys)
    for broken in ("[", "[1]", '{"a": [{"x": 1, "y": 2}]}', '{"a": [{"x": 1, "y": 2, "cls": 255}]}',
                   '{"a": [{"x": "left", "y": 2, "cls": 1}]}'):
        (tmp_path / "p.json").write_text(broken)
        assert "p.json cannot be read as a file of points" in fails(points, capsys)
    (tmp_path / "p.json").write_text('{"z": []}')
    text = fails(points, capsys)
    assert "names none of the images" in text and "z" in text
    assert "--radius -1" in fails([*points, "--radius", -1], capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "p.json"]
    out.mkdir()
    (out / "mine.txt").write_text("x")
    assert f"{out} exists and is not an empty folder" in fails(["weaken", source, out], capsys)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    (tmp_path / "new" / "unfinished").mkdir(parents=True)
    assert "cut short" in fails(["weaken", source, tmp_path / "new"], capsys)


def test_the_command_runs_as_a_module(tmp_path):
    save(tmp_path / "in" / "a.png", five_drawn())
    argv = [sys.executable, "-m", "data.prepare_scribbles", "weaken", tmp_path / "in", tmp_path / "out"]
    done = subprocess.run(argv, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and "wrote 1 masks" in done.stdout, done.stderr


# ---- WeakerScribbles, survey_scribbles -------------------------------------------------------------------

def test_weaker_scribbles_look_like_their_data(monkeypatch):
    data = ds.open_dataset("toy_scenes", "", "train", mask_dir="scribbles")
    weaker, calls = ds.WeakerScribbles(data, shrink=0.6), []
    weaken = st.weaken
    monkeypatch.setattr(st, "weaken", lambda *args: calls.append(1) or weaken(*args))
    assert (weaker.name, weaker.split, weaker.num_classes, len(weaker)) == ("toy_scenes", "train", 14, 400)
    assert weaker.classes == data.classes and weaker.paths is None and weaker.name_of(7) == "0007"
    image, mask = weaker.read(7)
    assert torch.equal(image, data.read(7)[0]) and mask.dtype == torch.uint8 and mask.shape == (128, 128)
    drawn, whole = mask != 255, data.read(7)[1]
    assert torch.equal(mask[drawn], whole[drawn]) and 0 < drawn.sum() < 0.7 * (whole != 255).sum()
    assert torch.equal(weaker.read_mask(7), mask) and len(calls) == 1       # worked out once
    mask[:] = 0                                                             # a copy: the next is not spoilt
    assert (weaker.read_mask(7) == 255).any()
    assert torch.equal(ds.WeakerScribbles(data).read(3)[1], data.read(3)[1])


def test_weaker_scribbles_differ_from_image_to_image(tmp_path):
    data = ds.open_dataset("toy_scenes", "", "train", mask_dir="scribbles")
    shares = []
    for seed in (0, 1):
        weaker = ds.WeakerScribbles(data, drop=0.5, seed=seed)
        shares.append([(weaker.read_mask(i) != 255).sum().item() / (data.read_mask(i) != 255).sum().item()
                       for i in range(12)])
    assert shares[0] != shares[1] and len(set(shares[0])) > 8 and 0.25 < np.mean(shares) < 0.75


def folder_of(root, masks, classes=4):
    """The `folder` layout with these masks (H,W) in train; images show 10 times the mask's value."""
    for i, mask in enumerate(masks):
        image = np.repeat(np.where(mask == 255, 0, 20 + 10 * mask)[..., None], 3, 2)
        save(root / "images" / "train" / f"p{i}.png", image)
        save(root / "masks" / "train" / f"p{i}.png", mask)
    (root / "classes.txt").write_text("".join(f"class{c}\n" for c in range(classes)))
    return ds.open_dataset("folder", root, "train")


@pytest.mark.parametrize("workers", [0, 1])
def test_survey_by_hand(tmp_path, workers):
    masks = [canvas(4, 5, (0, 0, 1, 0, 5), (2, 2, 3, 0, 4)), canvas(4, 5), canvas(4, 5, (0, 1, 3, 1, 2)),
             canvas(4, 5, (2, 0, 1, 0, 1), (3, 1, 2, 0, 1))]
    found = loaders.survey_scribbles(folder_of(tmp_path, masks), workers)
    assert found["images"].tolist() == [2, 0, 2, 1] and found["images"].dtype == torch.int64
    assert found["empty"] == ["p1"] and found["background_only"] == ["p2"]
    assert found["labelled"] == pytest.approx(100 * (9 + 0 + 2 + 2) / 80)


def test_scribbles_that_teach_nothing_are_refused(tmp_path):
    text = message(loaders.survey_scribbles, folder_of(tmp_path / "a", [canvas(4, 5)] * 2))
    assert "p0.png" in text and "nothing but 255" in text and "class ids along the strokes" in text
    background = [canvas(4, 5), canvas(4, 5, (0, 0, 4, 0, 5))]
    text = message(loaders.survey_scribbles, folder_of(tmp_path / "b", background))
    assert "p0.png" in text and "only class 0, class0" in text and "write 255" in text
    toys = ds.WeakerScribbles(ds.open_dataset("toy_scenes", "", "val"), drop=1.0)
    assert "toy_scenes val" in message(loaders.survey_scribbles, toys)
    one_class = folder_of(tmp_path / "c", [canvas(4, 5, (0, 0, 1, 0, 5))], classes=1)
    assert loaders.survey_scribbles(one_class)["images"].tolist() == [1]         # there is no other


# ---- ScribbleView ----------------------------------------------------------------------------------------

def random_pair(height, width, seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3)).repeat(4, 0).repeat(4, 1)
    mask = rng.choice([0, 1, 2, 3, 255], (height // 3 + 1, width // 3 + 1)).repeat(3, 0).repeat(3, 1)
    return (torch.from_numpy(image[:height, :width].astype(np.uint8)).permute(2, 0, 1).contiguous(),
            torch.from_numpy(mask[:height, :width].astype(np.uint8)))


def bilinear_at(image, y, x):
    """float (H,W,3) at the positions y, x (h,w); outside the image everything is 0."""
    framed = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    low_y, low_x = np.floor(y).astype(int), np.floor(x).astype(int)
    total = 0
    for v, u in ((0, 0), (0, 1), (1, 0), (1, 1)):
        weight = np.abs(1 - v - (y - low_y)) * np.abs(1 - u - (x - low_x))
        rows, columns = low_y + v + 1, low_x + u + 1
        rows, columns = np.clip(rows, 0, len(framed) - 1), np.clip(columns, 0, framed.shape[1] - 1)
        total = total + weight[..., None] * framed[rows, columns]
    return total


def whole_image_pipeline(image, mask, size, crop, angle, blur, flip, corner):
    """Sec. 4.2 step by step on whole images, in numpy: (crop,crop,3) normalised, (crop,crop)."""
    image = F.resize(image, size, antialias=False).permute(1, 2, 0).numpy().astype(float)
    mask = F.resize(mask[None], size, interpolation=InterpolationMode.NEAREST)[0].numpy()
    image = (image - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    height, width = size
    if angle:
        v, u = np.indices(size) - np.array([(height - 1) / 2, (width - 1) / 2]).reshape(2, 1, 1)
        a = np.deg2rad(angle)
        y = (height - 1) / 2 + np.sin(a) * u + np.cos(a) * v
        x = (width - 1) / 2 + np.cos(a) * u - np.sin(a) * v
        image = bilinear_at(image, y, x)
        framed = np.pad(mask, 1, constant_values=255)
        mask = framed[np.clip(np.rint(y).astype(int) + 1, 0, height + 1),
                      np.clip(np.rint(x).astype(int) + 1, 0, width + 1)]
    if blur:
        sigma = 0.3 * ((5 - 1) * 0.5 - 1) + 0.8                             # as OpenCV takes it for 5 pixels
        kernel = np.exp(-np.arange(-2, 3) ** 2 / (2 * sigma ** 2))
        kernel = np.outer(kernel, kernel) / kernel.sum() ** 2
        framed = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
        image = sum(kernel[i, j] * framed[i:i + height, j:j + width] for i, j in np.ndindex(5, 5))
    lack = [max(crop - side, 0) for side in size]
    space = [(d // 2, d - d // 2) for d in lack]
    y, x = corner
    if flip:                                              # the corner counts from the other side then
        image, mask = image[:, ::-1], mask[:, ::-1]
        x = max(width - crop, 0) - x
    image, mask = np.pad(image, [*space, (0, 0)]), np.pad(mask, space, constant_values=255)
    return image[y:y + crop, x:x + crop], mask[y:y + crop, x:x + crop]


@pytest.mark.parametrize("crop", [24, 40, 70])
@pytest.mark.parametrize("turn, blur, flip", [(t, b, f) for t in (0, 1) for b in (0, 1) for f in (0, 1)])
def test_working_on_the_crop_alone_comes_to_the_same(monkeypatch, crop, turn, blur, flip):
    image, mask = random_pair(40, 56, seed=crop)
    size, angle, corners = (48, 67), 9.0, ((0, 0), (7, 11), (48 - crop, 67 - crop))
    for corner in corners:
        corner = [min(max(c, 0), max(s - crop, 0)) for c, s in zip(corner, size)]
        coins, draws = iter([turn, blur, flip]), iter([1.2, angle])
        numbers = iter(corner)
        monkeypatch.setattr(transforms, "coin", lambda: bool(next(coins)))
        monkeypatch.setattr(transforms, "uniform", lambda low, high: next(draws))
        monkeypatch.setattr(transforms.torch, "randint", lambda high, shape: torch.tensor(next(numbers)))
        got, got_mask = transforms.augment_scribble(image, mask, 0, crop)
        monkeypatch.undo()
        want, want_mask = whole_image_pipeline(image, mask, size, crop, angle * turn, blur, flip, corner)
        assert got.shape == (3, crop, crop) and got.dtype == torch.float32 and got_mask.dtype == torch.uint8
        assert np.abs(got.permute(1, 2, 0).numpy() - want).max() < 2e-4
        assert (got_mask.numpy() != want_mask).mean() < 2e-3                # ties of rounding


def test_what_is_random_about_a_sample(monkeypatch):
    image, mask = random_pair(20, 30, 0)
    angles, blurs, scales = [], [], []
    rotated, blurred, fitted_size = transforms.rotated, transforms.blurred, transforms.fitted_size
    monkeypatch.setattr(transforms, "rotated",
                        lambda i, m, a, *window: angles.append(a) or rotated(i, m, a, *window))
    monkeypatch.setattr(transforms, "blurred", lambda i: blurs.append(1) or blurred(i))
    monkeypatch.setattr(transforms, "fitted_size",
                        lambda h, w, s, r: scales.append(r) or fitted_size(h, w, s, r))
    torch.manual_seed(0)
    for _ in range(600):
        transforms.augment_scribble(image, mask, 0, 16)
    assert 250 < len(angles) < 350 and 250 < len(blurs) < 350
    assert -10 <= min(angles) < -9.5 and 9.5 < max(angles) <= 10 and abs(np.mean(angles)) < 1.5
    assert 0.5 <= min(scales) < 0.52 and 1.98 < max(scales) <= 2 and abs(np.mean(scales) - 1.25) < 0.07
    del angles[:], blurs[:]
    for _ in range(20):
        transforms.augment_scribble(image, mask, 0, 16, rotation=0.0, blur=False)
    assert not blurs and not any(angles)


def test_crops_fall_everywhere_and_half_are_flipped():
    x = torch.arange(0, 250, 25, dtype=torch.uint8).repeat(4, 1)            # 10 columns, all different
    flips, lefts = 0, []
    torch.manual_seed(0)
    for _ in range(300):
        image, _ = transforms.augment_scribble(x.expand(3, 4, 10), x, 0, 4, scale=(1, 1), rotation=0,
                                               blur=False)
        row = denormalise(image)[0, 0].tolist()
        flips += row[0] > row[-1]
        lefts.append(min(row) // 25)
    assert 120 < flips < 180
    assert (np.bincount(lefts, minlength=7) > 20).all() and max(lefts) == 6


def test_image_and_mask_stay_together(tmp_path):
    mask = np.random.default_rng(0).integers(0, 4, (4, 5)).repeat(16, 0).repeat(16, 1)
    view = loaders.ScribbleView(folder_of(tmp_path, [mask]), 0, 72, blur=False)
    for seed in range(30):
        sample = view[(0, seed)]
        value, label = denormalise(sample["image"])[0].float(), sample["mask"]
        near = torch.nn.functional.max_pool2d(torch.stack([label, -label]).float()[None], 5, 1)[0]
        alike = torch.nn.functional.pad(near[0] == -near[1], [2, 2, 2, 2])  # no other label within 2 pixels
        inside, outside = alike & (label != 255), alike & (label == 255)
        assert inside.sum() > 300 and (value - (20 + 10 * label))[inside].abs().max() <= 2
        assert not sample["image"][:, outside].any()                        # the mean colour
        assert set(label.unique().tolist()) <= {0, 1, 2, 3, 255}


def test_classes_are_those_of_the_whole_image(tmp_path):
    mask = canvas(60, 60, (0, 0, 2, 0, 60), (3, 58, 60, 0, 60))
    view = loaders.ScribbleView(folder_of(tmp_path, [mask, canvas(60, 60)]), 0, 16)
    samples = [view[(0, seed)] for seed in range(12)]
    assert all(s["classes"].tolist() == [True, False, False, True] for s in samples)
    assert any(not (s["mask"] == 3).any() for s in samples)                 # though the crop shows less
    assert view[(1, 0)]["classes"].tolist() == [False] * 4 and view[(0, 0)]["classes"].dtype == torch.bool


def test_thin_strokes_survive_half_the_size():
    mask = torch.from_numpy(five_drawn())
    black = torch.zeros(3, 110, 150, dtype=torch.uint8)
    half, _ = transforms.augment_scribble(black, mask, 0, 80, scale=(0.5, 0.5),
                                          rotation=0.0, blur=False)[::-1]
    strokes = st.strokes_of_mask(half.numpy())
    assert sorted(half.numpy()[strokes == n][0] for n in range(1, strokes.max() + 1)) == [0, 2, 7, 7, 9]
    assert 0.2 < (half != 255).sum() / (mask != 255).sum() < 0.3


def test_same_key_same_sample(tmp_path):
    data = folder_of(tmp_path, [blobs(i, 40, 50, 4) for i in range(5)])
    view = loaders.ScribbleView(data, 0, 32)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = view[(2, 7)], view[(2, 7)], view[(2, 8)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first["image"], again["image"]) and torch.equal(first["mask"], again["mask"])
    assert not torch.equal(first["image"], other["image"])
    assert first["image"].dtype == torch.float32 and first["mask"].dtype == torch.int64
    assert first["index"] == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_of_scribbles(tmp_path, workers):
    data = folder_of(tmp_path, [blobs(i, 40, 50, 4) for i in range(5)])
    view = loaders.ScribbleView(ds.WeakerScribbles(data, shrink=0.2), 36, 32)
    batches = list(loaders.train_loader(view, 2, 0, 0, 3, workers, "cpu"))
    assert [tuple(batches[0][k].shape) for k in ("image", "mask", "classes", "index")] == [
        (2, 3, 32, 32), (2, 32, 32), (2, 4), (2,)]
    assert len({i for batch in batches for i in batch["index"].tolist()}) == 5
    key = next(iter(loaders.BatchesFrom(5, 2, 0)))[1]
    assert torch.equal(batches[0]["image"][1], view[key]["image"])


@pytest.mark.parametrize("height, width, size, crop",
                         [(1, 1, 0, 8), (2, 7, 0, 5), (3, 300, 0, 9), (33, 9, 4, 1)])
def test_odd_sizes_work(height, width, size, crop):
    image, mask = random_pair(height, width, 1)
    for seed in range(12):
        torch.manual_seed(seed)
        got, labels = transforms.augment_scribble(image, mask, size, crop)
        assert got.shape == (3, crop, crop) and labels.shape == (crop, crop) and got.isfinite().all()
