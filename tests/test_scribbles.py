"""Scribbles: common/strokes.py, data/prepare_scribbles.py, and ScribbleView.

Held here: strokes are read, drawn, weakened (PFA, B.1, Fig. 8) and invented as worked out by hand; the
command writes what the functions return, or nothing; a sample equals Sec. 4.2 done on the whole image.
"""
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from common import datasets as ds
from common import figures, loaders, toy_scenes, transforms
from common import strokes as st
from data import prepare_scribbles as prepare
from trees import draw, message, write


def canvas(height, width, *boxes):
    """255 with boxes (class id, y0, y1, x0, x1) of labels."""
    mask = np.full((height, width), 255, np.uint8)
    for class_id, y0, y1, x0, x1 in boxes:
        mask[y0:y1, x0:x1] = class_id
    return mask


def ring(side, radius, half, class_id):
    y, x = np.indices((side, side)) - side // 2
    return np.where(np.abs(np.hypot(y, x) - radius) < half, class_id, 255).astype(np.uint8)


def wavy(seed):
    """A smooth curve (60,2) inside a picture of 150 x 110, in whole pixels."""
    rng, t = np.random.default_rng(seed), np.linspace(0, 1, 60)
    return np.rint(np.stack([10 + t * 130, 55 + 38 * np.sin(t * rng.uniform(3, 6) + rng.uniform(0, 6))], 1))


FIVE = [(0, np.array([(5.0, 5), (140, 8)])), (7, wavy(1)[:25]), (7, wavy(1)[35:]),
        (2, np.array([(74.0, 90), (74, 50), (78, 30)])), (9, np.array([(30.0, 90), (40, 100), (25, 104)]))]
DRAWN = st.draw_strokes(FIVE, 150, 110)


def blobs(seed, height=160, width=230):
    """A full mask of smooth areas of four classes with an unlabelled border between them."""
    noise = torch.randn((1, 4, 3, 4), generator=torch.Generator().manual_seed(seed))
    best = F.interpolate(noise, (height, width), mode="bicubic")[0].topk(2, dim=0)
    return torch.where(best.values[0] - best.values[1] < 0.05, 255, best.indices[0]).to(torch.uint8).numpy()


def xml(width, height, drawn):
    text = f"<annotation><size><width>{width}</width><height>{height}</height></size>"
    for tag, points in drawn:
        text += f"<polygon><tag>{tag}</tag>"
        orders = "<X>{0}</X><Y>{1}</Y>", "<Y>{1}</Y><X>{0}</X>", "<x>{0}</x><y>{1}</y>"
        points = (orders[k % 3].format(*point) for k, point in enumerate(points))
        text += "".join(f"<point>{point}</point>" for point in points) + "</polygon>"
    return text + "</annotation>"


def test_strokes_are_read_drawn_and_cut_by_the_border(tmp_path):
    drawn = [("cow", [(-40, 2), (4, 2)]), ("Monitor", [(9, 4)]), ("background", [(8, 0)]), ("cow", [])]
    size, lines = st.read_strokes(write(tmp_path, {"a.xml": xml(9, 5, drawn)}) / "a.xml")
    assert size == (9, 5) and [class_id for class_id, _ in lines] == [10, 20, 0]
    picture = st.draw_strokes(lines, *size)                             # 3 rows and a round end
    assert picture.dtype == np.uint8 and picture.tolist() == [
        [255] * 7 + [0, 0], [10] * 5 + [255] * 3 + [0], [10] * 6 + [255] * 3, [10] * 5 + [255] * 4,
        [255] * 8 + [20]]
    crossed = st.draw_strokes([(3, [(0, 2), (9, 2)]), (4, [(5, 0), (5, 4)])], 10, 5)
    assert crossed[2].tolist() == [3] * 4 + [4] * 3 + [3] * 3           # the later one covers
    assert all(st.CLASS_ID[name] == i for i, name in enumerate(ds.CLASSES["voc"]))
    assert [st.CLASS_ID[name] for name in st.XML_NAMES] == list(range(21))


@pytest.mark.parametrize("text, words", [
    ("<annotation><size>", "damaged"), (None, "does not exist"),
    (xml(30, 20, [("cow", [("nan", 1)])]), "proper number"),
    (xml(1, 1, [])[:-13] + "<object/></annotation>", "boxes"),
    (xml(30, 20, [("zebra", [(1, 1)])]), "'zebra'.* sheep"),
    (xml(30, 20, [("dog", [(60, 5), (70, 9)])]), r"dog, .*\(60, 5\), .* 30 x 20"),
    (xml(30, 20, [("dog", [(5, 19)] + [(8, 25)] * 3)]), "3 of 4 points .* 30 x 20 .* change places")])
def test_faulty_xml_files_are_named(tmp_path, text, words):
    write(tmp_path, {"a.xml": text} if text else {})
    assert re.search(f"^{tmp_path}/a.xml.*{words}", message(st.read_strokes, tmp_path / "a.xml"))


@pytest.mark.parametrize("drop", [0.1, 0.5, 0.8])
def test_whole_strokes_are_dropped_with_the_given_probability(drop):
    number, kept = st.strokes_of_mask(DRAWN), []
    for seed in range(300):
        left = st.weaken(DRAWN, drop, seed=seed)
        share = np.bincount(number.ravel(), left.ravel() != 255)[1:] / np.bincount(number.ravel())[1:]
        assert set(share.tolist()) <= {0.0, 1.0} and (left[left != 255] == DRAWN[left != 255]).all()
        assert len(st.weaken_strokes(FIVE, drop, seed=seed)) == share.sum()
        kept.append(share)
    assert np.abs(np.mean(kept, 0) - (1 - drop)).max() < 0.11           # 4 standard deviations
    mask = canvas(6, 8, (0, 0, 2, 0, 3), (4, 0, 2, 3, 5), (4, 2, 4, 5, 7), (0, 4, 6, 0, 8))
    assert st.strokes_of_mask(mask).tolist() == [                       # what touches with the same class
        *[[1, 1, 1, 2, 2, 0, 0, 0]] * 2, *[[0, 0, 0, 0, 0, 2, 2, 0]] * 2, *[[3] * 8] * 2]


def test_shrinking_by_hand():
    mask = canvas(9, 111, (5, 3, 6, 5, 106))                            # 101 x 3, its middle at x = 55
    for shrink, half in ((0.2, 40), (0.5, 25), (0.9, 5)):
        columns = np.flatnonzero((st.weaken(mask, shrink=shrink)[4] == 5))
        assert abs(columns.min() - (55 - half)) <= 1 and abs(columns.max() - (55 + half)) <= 1
        assert len(columns) == columns.max() - columns.min() + 1
    assert (st.weaken(mask, shrink=1) == canvas(9, 111, (5, 3, 6, 54, 57))).all()       # a dot of 3 x 3
    corner = np.array([(0, 0), (10, 0), (10, 30)], float)               # 40 pixels long
    for shrink, left in ((0.25, [[5, 0], [10, 0], [10, 25]]), (0.75, [[10, 5], [10, 15]]), (1, [[10, 10]])):
        assert st.central_part(corner, shrink).tolist() == left


BY_HAND = {1: (12, 18, 110, 26), 7: (30, 8, 24, 90), 0: (50, 112, 112, 100), 12: (60, 50, 99, 80)}
SCENE, WHITE, BLACK = toy_scenes.make_scene(0, 5)["image"], (255, 255, 255), (0, 0, 0)
HARD, SMOOTH, SOFT = 1, 4, 12                                           # brushes, in quarters of a pixel


def painting(paper, brush):
    """Strokes {class: x0, y0, x1, y1}, 6 pixels wide, on a paper -> RGB (H,W,3), and how much of each class
    a pixel shows, {class: (H,W)}."""
    large, pad = Image.new("L", (512, 512), 255), 4 * (brush == SOFT)
    for c, line in BY_HAND.items():
        ImageDraw.Draw(large).line([4 * place for place in line], fill=c, width=24)
    drawn = torch.from_numpy(np.array(large))[None]
    shares = {c: F.avg_pool2d((drawn == c).double(), brush, 4, pad)[0].numpy() for c in BY_HAND}
    colours = figures.palette(toy_scenes.CLASSES).numpy()
    paint = sum(share[..., None] * colours[c] for c, share in shares.items())
    return paint + (1 - sum(shares.values())[..., None]) * np.array(paper), shares


@pytest.mark.parametrize("paper, brush, form", [
    (SCENE, SMOOTH, ""), (SCENE, SOFT, ""), (WHITE, SMOOTH, ""), (BLACK, SMOOTH, ""), (BLACK, SOFT, "layer"),
    (BLACK, SMOOTH, "premultiplied layer"), (BLACK, HARD, "shifted layer"), (WHITE, HARD, "indexed"),
    (BLACK, HARD, "shifted indexed layer")])
def test_strokes_of_a_paint_program_keep_their_classes(tmp_path, capsys, paper, brush, form):
    """What is wholly painted has its class, what is not painted none, a blend none or one it touches."""
    picture, shares = painting(paper, brush)
    alpha = sum(shares.values())[..., None]
    if "layer" in form:
        rgb = picture if "premultiplied" in form else picture / np.maximum(alpha, 1e-9)
        picture = np.dstack([rgb - 12 * ("shifted" in form), 255 * alpha]).clip(0, 255)
    elif not form:
        picture[2:6, 2:22] = 128                                       # a colour of no class
    picture = Image.fromarray(picture.round().astype(np.uint8))
    (picture.quantize(16) if "indexed" in form else picture).save(tmp_path / "a.png")
    ids = st.painted_strokes(tmp_path / "a.png", torch.from_numpy(SCENE).permute(2, 0, 1),
                             toy_scenes.CLASSES).numpy()
    assert set(np.unique(ids)) == {*BY_HAND, 255} and (ids[alpha[..., 0] == 0] == 255).all()
    for c, share in shares.items():
        maybe, touched = (F.max_pool2d(torch.from_numpy(seeds)[None].float(), 3, 1, 1)[0].numpy() == 1
                          for seeds in (share > (0.5 if "layer" in form else 0.98), share == 1))
        assert (ids[touched & (share > 0.6)] == c).all() and maybe[ids == c].all()
    assert ("note: 80 px of" in capsys.readouterr().out) == (form == "")


@pytest.mark.parametrize("seed", [0, 7, 8])                            # in two, a stroke would cross an edge
def test_invented_scribbles_agree_with_the_mask_and_every_large_region_has_one(seed):
    mask = blobs(seed, 375, 500)
    scribbles, other = st.scribbles_from_mask(mask, seed), st.scribbles_from_mask(mask, seed + 1)
    drawn, region = scribbles != 255, st.strokes_of_mask(mask)
    assert (scribbles[drawn] == mask[drawn]).all() and (scribbles != other).any()
    area, labelled = np.bincount(region.ravel())[1:], np.bincount(region.ravel(), drawn.ravel())[1:]
    assert ((labelled > 0) == (area >= max(10, 0.0005 * mask.size))).all()
    assert 0.01 < drawn.mean() < 0.035                                  # people draw 2 to 3 %


def test_invented_strokes_run_along_the_middle_of_their_regions():
    scribbles = st.scribbles_from_mask(canvas(120, 300, (3, 30, 70, 20, 280)), 5)   # 40 rows, 260 columns
    y, x = np.nonzero(scribbles != 255)
    assert np.abs(y - 49.5).mean() < 10 and np.abs(y - 49.5).max() < 17 # far from both long edges
    assert x.max() - x.min() > 130 and st.strokes_of_mask(scribbles).max() == 1
    radius = np.hypot(*(np.argwhere(st.scribbles_from_mask(ring(200, 60, 15, 1), 1) == 1) - 100).T)
    assert np.abs(radius - 60).max() < 15 and np.abs(radius - 60).mean() < 6 and len(radius) > 200
    lines = canvas(500, 500, (4, 10, 490, 250, 251), (2, 3, 5, 3, 493))
    for mask, found in ((canvas(30, 40), set()), (lines, {2, 4}), (0 * canvas(3, 3), set())):   # 9: too few
        assert set(np.unique(st.scribbles_from_mask(mask))) - {255} == found


LINES = {"IN/a.xml": xml(150, 110, [(st.XML_NAMES[class_id], points.tolist()) for class_id, points in FIVE])}
POINTS = {"a": [{"x": 10.4, "y": 8.0, "cls": 5}, {"x": 29, "y": 19.2, "cls": 0}], "gone": []}
BLACK = np.zeros((20, 30, 3))


@pytest.mark.parametrize("argv, tree, name, expected", [
    ("xml IN OUT --classes 0 7", LINES, "a.png", np.where(np.isin(DRAWN, (0, 7)), DRAWN, 255)),
    ("weaken IN OUT --shrink 0.5", LINES, "a.png",
     st.draw_strokes(st.weaken_strokes(FIVE, 0, 0.5), 150, 110)),
    ("weaken IN OUT --drop 1", {"IN/b/a.png": DRAWN}, "b/a.png", canvas(110, 150)),
    ("masks IN OUT --unlabelled 3 --seed 4", {"IN/val/a.png": blobs(1)}, "val/a.png", None),
    ("points IN/p.json OUT --images IN --radius 2",
     {"IN/p.json": json.dumps(POINTS), "IN/a.jpg": BLACK, "IN/b.jpg": BLACK}, "a.png", None)])
def test_commands_write_index_pngs(tmp_path, monkeypatch, capsys, argv, tree, name, expected):
    monkeypatch.chdir(write(tmp_path, tree))
    prepare.main(argv.split())
    picture, said = Image.open(tmp_path / "OUT" / name), capsys.readouterr().out
    mask = np.array(picture)
    assert picture.mode == "P" and "wrote 1 masks" in said and f"{100 * (mask != 255).mean():.2f} %" in said
    assert f"class ids {' '.join(map(str, np.unique(mask[mask < 255]))) or 'none'}" in said
    if expected is not None:
        assert (mask == expected).all()
    elif argv.startswith("masks"):
        full = np.where(blobs(1) == 3, 255, blobs(1))
        assert (mask[mask != 255] == full[mask != 255]).all() and 0.001 < (mask != 255).mean() < 0.05
    else:                                                               # discs
        for class_id, x, y in ((5, 10, 8), (0, 29, 19)):
            way = np.hypot(*(np.indices(mask.shape) - np.array([y, x]).reshape(2, 1, 1)))
            assert (mask[way <= 2] == class_id).all() and not (mask[way > 2.9] == class_id).any()


@pytest.mark.parametrize("argv, tree, words", [
    ("xml NO OUT", {}, "NO is no folder"), ("weaken IN OUT", {}, "holds no file .*png or .*xml"),
    ("weaken IN OUT --drop 2", {"IN/a.png": [[0]]}, "drop 2.0 is no ratio"),
    ("masks IN OUT", {"IN/a.png": [[0]], "IN/b.png": BLACK}, "b.png is a colour picture"),
    ("points p.json OUT --images IN", {"p.json": '{"a": [{"x": 1, "y": 2, "cls": 255}]}'}, "cannot be read"),
    ("points p.json OUT --images IN", {"IN/a.png": [[0]], "p.json": '{"z": []}'}, "names none .* has z"),
    ("weaken IN OUT", {"IN/a.png": [[0]], "OUT/mine.txt": "x"}, "OUT exists and is not an empty folder")])
def test_mistakes_are_one_sentence_and_leave_nothing(tmp_path, monkeypatch, capsys, argv, tree, words):
    monkeypatch.chdir(write(tmp_path, tree | {"IN/x.txt": ""}))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        prepare.main(argv.split())
    text = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prepare_scribbles: ")]
    assert caught.value.code == 2 and re.search(words, *text) and sorted(tmp_path.rglob("*")) == before


def folder_of(root, masks):
    """The `folder` layout with these masks (H,W) in train; images show 20 plus 10 times the mask's value."""
    tree = {f"masks/train/p{i}.png": mask for i, mask in enumerate(masks)}
    tree |= {f"images/train/p{i}.png": np.repeat(np.where(mask == 255, 0, 20 + 10 * mask)[..., None], 3, 2)
             for i, mask in enumerate(masks)}
    write(root, tree | {"classes.txt": "class0\nclass1\nclass2\nclass3"})
    return ds.open_dataset("folder", root, "train")


def bilinear_at(image, y, x):
    """float (H,W,3) at the positions y, x (h,w); outside the image everything is 0."""
    framed, total = np.pad(image, ((1, 1), (1, 1), (0, 0))), 0
    low_y, low_x = np.floor(y).astype(int), np.floor(x).astype(int)
    for v, u in np.ndindex(2, 2):
        weight = np.abs(1 - v - (y - low_y)) * np.abs(1 - u - (x - low_x))
        rows = (low_y + v + 1).clip(0, framed.shape[0] - 1)
        columns = (low_x + u + 1).clip(0, framed.shape[1] - 1)
        total = total + weight[..., None] * framed[rows, columns]
    return total


def whole_image_pipeline(image, mask, crop, scale, rotation, blur):
    """Sec. 4.2 with the same draws, step by step on whole images: (crop,crop,3) normalised, (crop,crop)."""
    size = [max(1, int(side * ratio + 0.5)) for ratio in [draw(*scale)] for side in mask.shape]
    turn, angle, blurs, flip = draw() < 0.5, draw(-rotation, rotation), draw() < 0.5, draw() < 0.5
    corner = [torch.randint(max(side - crop, 0) + 1, ()).item() for side in size]
    image = transforms.F.resize(image, size, antialias=False).permute(1, 2, 0).numpy().astype(float)
    mask = F.interpolate(mask[None, None].float(), size, mode="nearest")[0, 0].numpy()
    image = (image - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    if turn:
        middle, a = (np.array(size).reshape(2, 1, 1) - 1) / 2, np.deg2rad(angle)
        v, u = np.indices(size) - middle
        y, x = middle[0] + np.sin(a) * u + np.cos(a) * v, middle[1] + np.cos(a) * u - np.sin(a) * v
        image, framed = bilinear_at(image, y, x), np.pad(mask, 1, constant_values=255)
        rows, columns = ((np.rint(at).astype(int) + 1).clip(0, side + 1) for at, side in zip((y, x), size))
        mask = framed[rows, columns]
    if blur and blurs and min(size) > 2:
        kernel = np.exp(-np.arange(-2, 3) ** 2 / (2 * 1.1 ** 2))        # OpenCV's sigma for 5 pixels
        kernel = np.outer(kernel, kernel) / kernel.sum() ** 2
        framed = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
        image = sum(kernel[i, j] * framed[i:i + size[0], j:j + size[1]] for i, j in np.ndindex(5, 5))
    window = tuple(slice(at, at + crop) for at in corner)
    image, mask = (array[window][:, ::-1 if flip else 1] for array in (image, mask))
    space = [((crop - side) // 2, (crop - side + 1) // 2) for side in mask.shape]
    return np.pad(image, [*space, (0, 0)]), np.pad(mask, space, constant_values=255)


@pytest.mark.parametrize("options", [
    dict(crop=24), dict(crop=70), dict(crop=24, scale=(1, 1), rotation=0.0, blur=False)])
def test_a_sample_equals_the_pipeline_of_the_paper_on_whole_images(tmp_path, options):
    sizes = [(40, 56), (33, 20), (3, 60), (1, 2)]
    data = folder_of(tmp_path, [blobs(i, *size) for i, size in enumerate(sizes)])
    view, before = loaders.ScribbleView(data, 0, **options), torch.get_rng_state()
    samples = {(i, seed): view[(i, seed)] for i in range(4) for seed in range(40)}
    assert torch.equal(torch.get_rng_state(), before)
    options = dict(scale=(0.5, 2.0), rotation=10.0, blur=True) | options
    for (i, seed), sample in samples.items():
        torch.manual_seed(seed)
        image, mask = data.read(i)
        want, want_mask = whole_image_pipeline(image, mask, **options)
        assert np.abs(sample["image"].permute(1, 2, 0).numpy() - want).max() < 2e-4
        assert (sample["mask"].numpy() != want_mask).mean() < 2e-3      # ties of rounding
        assert sample["classes"].tolist() == [c in mask for c in range(4)]  # of the whole image
        assert sample["mask"].dtype == torch.uint8
