"""Toy birds and toy scenes: what their pictures hold, what makes them hard, and the files written of them.

Each fact is computed here by other means than in the generator.
"""
import numpy as np
import pytest
from PIL import Image

from common import toy_birds, toy_scenes
from common.regions import connected_components
from common.toy_birds import PARTS, SPECIES, SPECIES_VARIANTS, VARIANTS, bird_index, make_bird
from common.toy_scenes import CLASSES, make_scene, scene_index
from data import toy_birds as bird_files, toy_files, toy_scenes as scene_files

HEAD, BEAK, WING, TAIL, BELLY = range(5)
SPLITS = toy_birds.SPLITS, toy_scenes.SPLITS                              # before conftest.py shortens them


@pytest.fixture(scope="module")
def birds():
    return [make_bird(0, i) for i in range(480)]


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(0, i) for i in range(160)]


@pytest.mark.parametrize("make, index, splits", [
    (make_bird, bird_index, dict(train=720, test=240)),
    (make_scene, scene_index, dict(train=400, val=100, test=100))])
def test_seed_split_and_number_alone_decide_a_picture(make, index, splits):
    places = {(split, i): index(split, i) for split, count in splits.items() for i in range(count)}
    assert splits in SPLITS and len(set(places.values())) == len(places) and places["train", 3] == 3
    first = [make(0, place) for place in (*range(20), *range(places["test", 0], places["test", 20]))]
    np.random.seed(7)                                          # neither the global generator ...
    for i in (5, 3, 3):                                        # ... nor the order of the calls matters
        assert all(np.array_equal(value, first[i][key]) for key, value in make(0, i).items())
    assert len({picture["image"].tobytes() for picture in first + [make(1, i) for i in range(20)]}) == 60


def test_a_bird_has_the_variants_of_its_species_and_centres_at_any_size(birds):
    for i, bird in enumerate(birds):
        assert bird["image"].shape == (96, 96, 3) and bird["image"].std() > 10
        assert bird["label"] == i % 12 and bird["variants"].tolist() == SPECIES_VARIANTS[i % 12].tolist()
        assert ((bird["centres"] >= 0) & (bird["centres"] <= 95)).all()
    for i in range(24):
        large = make_bird(0, i, size=160)
        seen = large["visible"] & birds[i]["visible"]
        scaled = (birds[i]["centres"][seen] + 0.5) * 160 / 96 - 0.5                # of pixels' middles
        np.testing.assert_allclose(large["centres"][seen], scaled, atol=0.6)


def test_every_part_lies_in_its_class_and_every_object_has_one_class(scenes):
    owner = np.array([0] + [CLASSES.index(name.split(":")[0]) for name in toy_scenes.PARTS[1:]])
    for scene in [*scenes, make_scene(3, 0, 64)]:
        part, mask, objects = scene["parts"], scene["mask"], scene["objects"]
        assert scene["image"].shape == (*mask.shape, 3) and scene["image"].std() > 5
        assert part.shape == objects.shape == scene["scribbles"].shape and mask.dtype == np.uint8
        assert (owner[part][part > 0] == mask[part > 0]).all() and ((part > 0) == (objects > 0)).all()
        assert ((part > 0) == np.isin(mask, owner[1:])).all()
        assert all(len(set(mask[objects == number])) == 1 for number in set(objects[objects > 0]))
    assert len({p for scene in scenes for p in np.unique(scene["parts"])}) == len(owner)    # all occur


def test_centres_are_means_of_visible_pixels_if_there_are_enough():
    seen = np.zeros((16, 16), np.uint8)                     # of twice the picture's size: 23, 24, 1 pixels
    seen[0:4, 0:6], seen[8:12, 8:14], seen[0, 0] = 1, 2, 3
    centres, visible = toy_birds.part_centres(np.array([-1, TAIL, WING, -1]), seen)
    assert visible.tolist() == [False, False, True, False, False]
    assert centres[WING].tolist() == [5.0, 4.5] and not centres[[HEAD, BEAK, TAIL, BELLY]].any()
    seen = np.zeros((4, 8), np.uint8)
    seen[0:2, 0:2], seen[2:4, 4:8], seen[0, 5:8] = 1, 2, 3  # two wheels, a row each; 3 pixels are too few
    shapes = [(None, class_id, part, 1, None) for class_id, part in ((0, 0), (8, 9), (8, 9), (8, 10))]
    assert toy_scenes.part_centres(shapes, seen).tolist() == [[9, 8, 0.5, 0.5], [9, 8, 5.5, 2.5]]


def test_image_and_labels_are_aligned(scenes):
    """Colours jump at the borders of parts, far less one pixel beside them."""
    reds = np.stack([scene["image"][..., 0] for scene in scenes]).astype(int)      # (N,H,W)
    parts = np.stack([scene["parts"] for scene in scenes]).astype(int)
    for axis in (1, 2):
        jumps, borders = abs(np.diff(reds, axis=axis)), np.diff(parts, axis=axis) != 0
        beside = [jumps[np.roll(borders, k, axis)].mean() for k in (-1, 1)]
        assert jumps[borders].mean() > 1.5 * max(beside)


def test_scribbles_are_short_strokes_one_in_a_region_and_agree_with_the_mask(scenes):
    drawn, pieces = np.array([scene["scribbles"] != 255 for scene in scenes]), []
    share = drawn.mean((1, 2))
    assert 0.025 < share.mean() < 0.04 and share.min() > 0.01 and share.max() < 0.07
    for scene, where in zip(scenes, drawn):
        assert (scene["scribbles"] == scene["mask"])[where].all()
        regions = [scene["mask"] == c for c in (1, 2, 3, 4)]   # sky, grass, road, water, and every object
        regions += [scene["objects"] == number for number in set(scene["objects"][scene["objects"] > 0])]
        strokes = [(region & where).astype(int) for region in regions if region.sum() >= 60]
        pieces += [connected_components(stroke).max() for stroke in strokes]
    assert len(pieces) > 800 and pieces.count(0) < 0.05 * len(pieces) and pieces.count(1) > 0.9 * len(pieces)


def written(command, out, capsys, *flags):
    """What the command says in its only line, and the lines of its table."""
    assert command.main(["--out", str(out), "--seed", "5", *flags]) == 0
    printed, (table,) = capsys.readouterr().out, out.glob("*.csv")
    with Image.open(out / "overview.png") as sheet:
        assert min(sheet.size) > 500 and np.asarray(sheet.convert("L"))[40:150, 170:250].std() > 5
    assert printed.count("\n") == 1 and str(out) in printed
    return printed, table.read_text().splitlines()


def test_the_command_writes_birds_into_folders_of_species(tmp_path, capsys):
    out, expected = tmp_path / "new", ["split,file,species,part,variant,variant_number,x,y,visible"]
    printed, table = written(bird_files, out, capsys, "--count", "14")
    for split, i in [(split, i) for split in ("train", "test") for i in range(14)]:
        bird, name = make_bird(5, bird_index(split, i)), SPECIES[i % 12]
        with Image.open(out / split / name / f"{i:04d}.png") as picture:
            assert picture.mode == "RGB" and np.array_equal(np.asarray(picture), bird["image"])
        for part, v, (x, y), seen in zip(PARTS, bird["variants"], bird["centres"], bird["visible"]):
            about = f"{part},{VARIANTS[part][v]},{v},{x:.2f},{y:.2f},{seen:d}"
            expected.append(f"{split},{i:04d}.png,{name},{about}")
    assert table == expected and "28 birds" in printed
    assert (out / "classes.txt").read_text() == "".join(f"{i} {name}\n" for i, name in enumerate(SPECIES))


def test_the_command_writes_scenes_with_masks_parts_and_scribbles(tmp_path, capsys):
    out, expected = tmp_path / "new", ["split,scene,part_id,part,class_id,x,y"]
    printed, table = written(scene_files, out, capsys, "--count", "3")
    for split, i in [(split, i) for split in ("train", "val", "test") for i in range(3)]:
        scene = make_scene(5, scene_index(split, i))
        for folder, key in dict(images="image", masks="mask", parts="parts", scribbles="scribbles").items():
            with Image.open(out / folder / split / f"{i:04d}.png") as picture:
                assert picture.mode == ("RGB" if folder == "images" else "P")
                assert np.array_equal(np.asarray(picture), scene[key])
        expected += [f"{split},{i:04d},{p:.0f},{toy_scenes.PARTS[int(p)]},{c:.0f},{x:.2f},{y:.2f}"
                     for p, c, x, y in scene["part_centres"]]
    assert table == expected and "9 scenes" in printed
    for file, names in (("classes.txt", CLASSES), ("parts.txt", toy_scenes.PARTS)):
        assert (out / file).read_text() == "".join(f"{i} {name}\n" for i, name in enumerate(names))


def test_an_interrupted_command_leaves_nothing_that_looks_complete(tmp_path):
    def write(folder, seed, counts):
        (folder / "classes.txt").write_text("half")
        assert folder == tmp_path / "toy" / "unfinished"                            # even after kill -9
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        toy_files.main("scenes", "", dict(train=9), "", write, ["--out", str(tmp_path / "toy")])
    assert not (tmp_path / "toy").exists()                     # so it can be repeated
