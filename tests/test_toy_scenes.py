"""Facts about toy scenes and the files of them, each computed here by other means than in the generator."""
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import toy_scenes
from common.toy_scenes import CLASSES, LOOKALIKES, PARTS, SPLITS, make_scene, scene_index
from data.toy_scenes import MASK_COLOURS, main

MANY = 160                                                     # scenes for the statistics


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(0, i) for i in range(MANY)]


def same(a, b):
    return all(np.array_equal(a[key], b[key]) for key in a)


def components(where):
    """Number of 8-connected components of a boolean map, by flood fill."""
    left, count = set(zip(*np.nonzero(where))), 0
    while left:
        count, todo = count + 1, [left.pop()]
        while todo:
            y, x = todo.pop()
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            todo += near
    return count


# ---- determinism and splits -------------------------------------------------------------------------------

def test_seed_and_index_alone_decide(scenes):
    np.random.seed(7)                                          # neither the global generator ...
    again = [make_scene(0, i) for i in (5, 3, 3)]              # ... nor the order of the calls matters
    assert same(again[0], scenes[5]) and same(again[1], scenes[3]) and same(again[2], scenes[3])


def test_other_seed_or_index_is_another_scene(scenes):
    masks = {scene["mask"].tobytes() for scene in scenes + [make_scene(1, i) for i in range(20)]}
    assert len(masks) == MANY + 20


def test_splits_share_no_scene():
    assert SPLITS == {"train": 400, "val": 100, "test": 100}
    indices = [scene_index(split, i) for split in SPLITS for i in range(SPLITS[split])]
    assert len(set(indices)) == 600
    assert (scene_index("train", 3), scene_index("val", 3), scene_index("test", 3)) == (3, 100_003, 200_003)


@pytest.mark.parametrize("split, i", [("trainval", 0), ("train", -1), ("train", 100_000)])
def test_scene_index_refuses(split, i):
    with pytest.raises(ValueError, match=f"{i} in split '{split}'"):
        scene_index(split, i)


# ---- what a scene holds -----------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [64, 128])
def test_shapes_types_and_ranges(size):
    for i in range(8):
        scene = make_scene(3, i, size)
        assert scene["image"].shape == (size, size, 3) and scene["image"].std() > 5
        assert all(scene[key].shape == (size, size) for key in ("mask", "parts", "objects", "scribbles"))
        assert all(v.dtype == np.uint8 for key, v in scene.items() if key != "part_centres")
        assert scene["mask"].max() < len(CLASSES) and scene["parts"].max() < len(PARTS)
        assert set(np.unique(scene["scribbles"])) <= set(range(len(CLASSES))) | {255}
        centres = scene["part_centres"]
        assert centres.dtype == np.float64 and centres.shape[1] == 4
        assert (centres[:, 2:] >= 0).all() and (centres[:, 2:] <= size - 1).all()


def test_names():
    assert len(CLASSES) == len(set(CLASSES)) >= 10 and CLASSES[0] == "background"
    assert len(PARTS) == len(set(PARTS)) and PARTS[0] == "none"
    owners = [part.split(":")[0] for part in PARTS[1:]]
    assert set(owners) <= set(CLASSES) and len(MASK_COLOURS) == len(CLASSES)
    assert all(2 <= owners.count(name) <= 4 for name in set(owners))


def test_every_part_lies_in_its_class_and_every_object_has_one_class(scenes):
    owner = np.array([0] + [CLASSES.index(part.split(":")[0]) for part in PARTS[1:]])
    with_parts = np.isin(np.arange(len(CLASSES)), owner[1:])
    for scene in scenes:
        part, mask, objects = scene["parts"], scene["mask"], scene["objects"]
        assert (owner[part][part > 0] == mask[part > 0]).all()
        assert ((part > 0) == with_parts[mask]).all() and ((part > 0) == (objects > 0)).all()
        pairs = {(int(o), int(c)) for o, c in zip(objects[objects > 0], mask[objects > 0])}
        assert len(pairs) == len({o for o, _ in pairs})
    assert set(np.unique([scene["parts"] for scene in scenes])) == set(range(len(PARTS)))  # all occur


def test_centres_are_means_of_visible_pixels(scenes):
    """Parts that occur once in an object: from its pixels. (Wheels and windows: next test.)"""
    single = [p for p, name in enumerate(PARTS) if p > 0 and name.split(":")[1] not in ("wheel", "window")]
    for scene in scenes[:40]:
        expected = []
        for number in range(1, 256):
            for p in single if (scene["objects"] == number).any() else []:
                points = np.argwhere((scene["objects"] == number) & (scene["parts"] == p))       # (n,2) y, x
                if len(points) >= 4:
                    y, x = points.mean(0)
                    expected.append((p, scene["mask"][tuple(points[0])], x, y))
        got = [tuple(row) for row in scene["part_centres"] if int(row[0]) in single]
        np.testing.assert_allclose(sorted(got), sorted(expected), atol=1e-9)


def test_centres_by_hand():
    """Two wheels are two rows; a shape without part or seen in fewer than 4 pixels has none."""
    seen = np.zeros((4, 8), np.uint8)
    seen[0:2, 0:2], seen[2:4, 4:8], seen[0, 5:8] = 1, 2, 3
    shapes = [(None, class_id, part, 1, None) for class_id, part in ((0, 0), (8, 9), (8, 9), (8, 10))]
    assert toy_scenes.part_centres(shapes, seen).tolist() == [[9, 8, 0.5, 0.5], [9, 8, 5.5, 2.5]]
    assert toy_scenes.part_centres(shapes[:1], np.zeros((4, 8), np.uint8)).shape == (0, 4)


def test_image_and_labels_are_aligned(scenes):
    """Colours are alike inside a labelled part; less so when the labels are moved by three pixels."""
    def spread(image, label):
        n = np.bincount(label.ravel())
        mean = np.bincount(label.ravel(), image.ravel()) / np.maximum(n, 1)
        return ((image - mean[label]) ** 2).mean()
    for scene in scenes[:40]:
        red, label = scene["image"][..., 0].astype(float), scene["objects"] * 32 + scene["parts"].astype(int)
        label = label * 16 + scene["mask"]
        moved = [np.roll(label, shift, axis) for shift in (-3, 3) for axis in (0, 1)]
        assert spread(red, label) < min(spread(red, other) for other in moved)


def test_later_shapes_hide_earlier_ones():
    shapes = [(np.array(corners, float), 0, 0, 1, None) for corners in
              ([(-1, -1), (129, -1), (129, 129), (-1, 129)], [(20, 20), (60, 20), (60, 60), (20, 60)],
               [(40, 40), (90, 40), (90, 90), (40, 90)])]
    seen = np.asarray(toy_scenes.paint(shapes, 128))[::2, ::2]
    assert (seen[5, 5], seen[30, 30], seen[50, 50], seen[80, 80], seen[30, 80]) == (0, 1, 2, 2, 0)


# ---- what makes it hard -----------------------------------------------------------------------------------

def test_long_tail(scenes):
    share = np.bincount(np.concatenate([s["mask"].ravel() for s in scenes]), minlength=len(CLASSES))
    share = np.sort(share / share.sum())
    assert share[-1] > 0.2 and 0 < share[0] < share[1] < 0.005


def test_lookalikes_one_frequent_one_rare(scenes):
    names = [(CLASSES[a], CLASSES[b]) for a, b in LOOKALIKES]
    assert len(names) >= 2 and ("car", "taxi") in names
    car, taxi = ({part.split(":")[1] for part in PARTS if part.split(":")[0] == name} for name in names[0])
    assert taxi - car == {"sign"} and car <= taxi
    pixels = np.bincount(np.concatenate([s["mask"].ravel() for s in scenes]))
    assert all(pixels[a] > 2.5 * pixels[b] > 0 for a, b in LOOKALIKES)


@pytest.mark.parametrize("name", toy_scenes.OBJECTS)
def test_sizes_over_a_factor_of_four(name):
    rng = np.random.default_rng(0)
    heights = []
    for _ in range(150):
        shapes, _ = toy_scenes.place_object(rng, name, 1, {}, 50)
        heights.append(np.ptp(np.concatenate([shape[0] for shape in shapes])[:, 1]))
    assert max(heights) > 4 * min(heights) and min(heights) > 3


def test_colour_alone_does_not_tell_the_class(scenes):
    """The best guess from a pixel's colour (8x8x8 bins, counted on other scenes) is a poor segmentation."""
    def bins(part):
        colour = np.concatenate([s["image"].reshape(-1, 3) for s in part]).astype(int) // 32
        return colour @ (64, 8, 1), np.concatenate([s["mask"].ravel() for s in part])
    bin_id, label = bins(scenes[:120])
    counts = np.bincount(bin_id * 16 + label, minlength=512 * 16).reshape(512, 16)
    bin_id, label = bins(scenes[120:])
    guess = counts.argmax(1)[bin_id]
    both = [((guess == c) & (label == c)).sum() for c in range(len(CLASSES))]
    iou = [both[c] / ((guess == c) | (label == c)).sum() for c in range(len(CLASSES))]
    assert np.mean(iou) < 0.3


# ---- scribbles --------------------------------------------------------------------------------------------

def test_scribbles_agree_with_the_mask_and_label_three_percent(scenes):
    drawn = [s["scribbles"] != 255 for s in scenes]
    assert all((s["scribbles"] == s["mask"])[d].all() for s, d in zip(scenes, drawn))
    share = np.array([d.mean() for d in drawn])
    assert 0.025 < share.mean() < 0.04 and share.min() > 0.01 and share.max() < 0.07


def test_most_regions_have_one_stroke(scenes):
    """A region: the pixels of one object, or of one class without parts."""
    large, with_stroke, in_one_piece = 0, 0, 0
    for scene in scenes[:60]:
        stuff = [scene["mask"] == c for c in (1, 2, 3, 4)]  # sky, grass, road, water
        things = [scene["objects"] == o for o in np.unique(scene["objects"]) if o > 0]
        for region in stuff + things:
            if region.sum() >= 60:
                stroke = region & (scene["scribbles"] != 255)
                large, with_stroke = large + 1, with_stroke + stroke.any()
                in_one_piece += components(stroke) == 1
    assert large > 300 and with_stroke > 0.95 * large and in_one_piece > 0.9 * large
    background = [(s["scribbles"] == 0).any() for s in scenes if (s["mask"] == 0).sum() > 100]
    assert np.mean(background) > 0.95


def test_a_stroke_does_not_spill_into_other_regions():
    """64 islands of 9 pixels, too small for strokes of their own: only the sea around them is labelled."""
    regions = np.ones((64, 64), np.uint8)
    for number in range(64):
        y, x = number // 8 * 8 + 2, number % 8 * 8 + 2
        regions[y:y + 3, x:x + 3] = 2 + number
    for seed in range(10):
        scribbles = toy_scenes.draw_scribbles(np.random.default_rng(seed), regions, regions)
        assert set(np.unique(scribbles)) == {1, 255}


def test_strokes_are_thin(scenes):
    for scene in scenes:
        for c in range(len(CLASSES)):
            stroke = (scene["scribbles"] == c).astype(int)
            blocks = np.pad(stroke.cumsum(0).cumsum(1), ((1, 0), (1, 0)))  # sums of 6x6 blocks
            assert (blocks[6:, 6:] - blocks[:-6, 6:] - blocks[6:, :-6] + blocks[:-6, :-6]).max() < 36


# ---- speed and files --------------------------------------------------------------------------------------

def test_speed():
    """Loose, for slow machines: 350 a second of processor time are usual."""
    make_scene(0, 0)
    seconds = []
    for run in range(3):
        start = time.process_time()
        for i in range(20):
            make_scene(run, i)
        seconds.append((time.process_time() - start) / 20)
    assert min(seconds) < 1 / 60


def test_command_writes_what_make_scene_returns(tmp_path, capsys):
    out = tmp_path / "new" / "toy"
    assert main(["--out", str(out), "--count", "3", "--seed", "5"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and str(out) in printed and "9 scenes" in printed
    assert sorted(p.name for p in out.iterdir()) == ["classes.txt", "images", "masks", "overview.png",
                                                     "part_centres.csv", "parts", "parts.txt", "scribbles"]
    assert (out / "classes.txt").read_text().split("\n")[:2] == ["0 background", "1 sky"]
    assert len((out / "parts.txt").read_text().splitlines()) == len(PARTS)
    rows = (out / "part_centres.csv").read_text().splitlines()
    assert rows[0] == "split,scene,part_id,part,class_id,x,y"
    found = 0
    for split in SPLITS:
        assert sorted(p.stem for p in (out / "images" / split).iterdir()) == ["0000", "0001", "0002"]
        for i in range(3):
            scene = make_scene(5, scene_index(split, i))
            for folder, key in (("images", "image"), ("masks", "mask"), ("parts", "parts"),
                                ("scribbles", "scribbles")):
                with Image.open(out / folder / split / f"{i:04d}.png") as picture:
                    assert picture.mode == ("RGB" if folder == "images" else "P")
                    assert np.array_equal(np.asarray(picture), scene[key])
            for p, c, x, y in scene["part_centres"]:
                assert f"{split},{i:04d},{p:.0f},{PARTS[int(p)]},{c:.0f},{x:.2f},{y:.2f}" in rows
                found += 1
    assert len(rows) == found + 1
    with Image.open(out / "masks" / "val" / "0000.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) >= 3  # visible


def test_command_refuses_a_folder_that_is_not_empty(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    run = subprocess.run([sys.executable, "-m", "data.toy_scenes", "--out", str(tmp_path)], text=True,
                         capture_output=True, cwd=Path(__file__).resolve().parent.parent)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.count("\n") == 1 and str(tmp_path) in run.stderr and "not an empty folder" in run.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("flags, word", [(["--count", "0"], "--count"), (["--seed", "-1"], "--seed")])
def test_command_refuses_bad_numbers(tmp_path, capsys, flags, word):
    assert main(["--out", str(tmp_path / "toy")] + flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and word in error and not (tmp_path / "toy").exists()


def test_command_says_when_it_cannot_write(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file" / "toy")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_interrupted_run_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    out, made = tmp_path / "toy", []

    def interrupted(seed, index):
        made.append(index)
        if len(made) == 4:
            assert not (out / "images").exists() and not (out / "classes.txt").exists()  # even after kill -9
            raise KeyboardInterrupt
        return make_scene(seed, index)

    monkeypatch.setattr("data.toy_scenes.make_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(["--out", str(out), "--count", "2"])
    assert not out.exists()
    monkeypatch.undo()
    assert main(["--out", str(out), "--count", "2"]) == 0  # so it can be repeated
