"""Toy birds and toy scenes: what their pictures hold, what makes them hard, and the files written of them.

Each fact is computed here by other means than in the generator.
"""
import numpy as np
import pytest
from PIL import Image

from common import toy_birds, toy_scenes
from common.regions import connected_components
from common.toy_birds import PARTS, SPECIES, SPECIES_VARIANTS, VARIANTS, bird_index, make_bird
from common.toy_scenes import CLASSES, LOOKALIKES, make_scene, scene_index
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
    others = [make(1, i) for i in range(20)]
    assert len({picture["image"].tobytes() for picture in first + others}) == 60
    for split, i in [("trainval", 0), ("train", -1), ("test", 100_000)]:
        with pytest.raises(ValueError, match=f"{i} in split '{split}'"):
            index(split, i)


# ---- birds ----

def test_species_share_variants_but_at_most_three_of_five():
    assert PARTS == ("head", "beak", "wing", "tail", "belly") == tuple(VARIANTS)
    assert len(SPECIES) == len(set(SPECIES)) == 12 and SPECIES == sorted(SPECIES)           # as folders are
    owners = [tuple(np.flatnonzero(SPECIES_VARIANTS[:, p] == v))
              for p, part in enumerate(PARTS) for v in range(len(VARIANTS[part]))]
    assert min(map(len, owners)) >= 2 and sum(map(len, owners)) == 60
    assert len(set(owners)) == len(owners)                     # no two variants always occur together
    shared = [(SPECIES_VARIANTS[a] == SPECIES_VARIANTS[b]).sum() for a in range(12) for b in range(a)]
    assert max(shared) == 3 and all(3 <= len(set(names)) <= 5 for names in VARIANTS.values())


def test_a_bird_has_the_variants_of_its_species_and_centres_at_any_size(birds):
    for i, bird in enumerate(birds):
        assert bird["image"].shape == (96, 96, 3) and bird["image"].std() > 10
        assert bird["label"] == i % 12 and bird["variants"].tolist() == SPECIES_VARIANTS[i % 12].tolist()
        assert ((bird["centres"] >= 0) & (bird["centres"] <= 95)).all()
        assert (bird["centres"][~bird["visible"]] == 0).all()
    make_bird(0, 0)["variants"][:] = 9                         # a copy
    assert SPECIES_VARIANTS.max() < 5 and make_bird(0, bird_index("test", 13))["label"] == 1
    for size, i in [(size, i) for size in (48, 160) for i in range(24)]:
        bird = make_bird(0, i, size)
        seen = bird["visible"] & birds[i]["visible"]
        scaled = (birds[i]["centres"][seen] + 0.5) * size / 96 - 0.5                      # of pixels' middles
        np.testing.assert_allclose(bird["centres"][seen], scaled, atol=0.35 * max(1, size / 96))


def test_birds_face_both_sides_stand_upright_anywhere_and_seldom_hide_a_part(birds):
    visible = np.array([bird["visible"] for bird in birds])
    assert 0.03 < 1 - visible.all(1).mean() < 0.11 and visible.sum(1).min() == 4 and not visible.all(0).any()
    centres = np.array([bird["centres"] for bird in birds])[visible.all(1)]                 # (N,5,2)
    side = np.sign(centres[:, BEAK, 0] - centres[:, TAIL, 0])
    assert 0.4 < (side == 1).mean() < 0.6 and (centres[:, HEAD, 1] < centres[:, BELLY, 1]).all()
    assert (side * (centres[:, BEAK, 0] - centres[:, WING, 0]) > 0).all() and centres.mean(1).std(0).min() > 5


def share_right(features, labels, count):
    """How often the nearest class mean of the first `count` is right for the others."""
    means = np.stack([features[:count][labels[:count] == c].mean(0) for c in range(labels.max() + 1)])
    return (((features[count:, None] - means) ** 2).sum(2).argmin(1) == labels[count:]).mean()


def test_a_small_window_tells_the_variant_and_body_and_background_tell_nothing(birds, monkeypatch):
    for p in range(5):                                         # the colours alone of 20 x 20 pixels nearly do
        seen, colours = [bird for bird in birds if bird["visible"][p]], []
        for bird in seen:
            x, y = np.rint(bird["centres"][p]).astype(int)
            window = np.pad(bird["image"] // 43, ((10, 10), (10, 10), (0, 0)), "edge")[y:y + 20, x:x + 20]
            colours.append(np.bincount((window.astype(int) @ (36, 6, 1)).ravel(), minlength=216) ** 0.5)
        variants = np.array([bird["variants"][p] for bird in seen])
        assert share_right(np.array(colours), variants, len(seen) // 2) > 0.82
    monkeypatch.setattr(toy_birds, "HIDDEN", 0)
    monkeypatch.setattr(toy_birds, "DRAWINGS", {part: dict.fromkeys(VARIANTS[part], ()) for part in PARTS})
    bare = np.array([make_bird(0, i)["image"][::8, ::8].ravel() for i in range(480)], float)
    assert share_right(bare, np.arange(480) % 12, 300) < 0.2   # 1/12 by chance


# ---- scenes ----

def test_every_part_lies_in_its_class_and_every_object_has_one_class(scenes):
    owner = np.array([0] + [CLASSES.index(name.split(":")[0]) for name in toy_scenes.PARTS[1:]])
    assert CLASSES[0] == "background" and len(set(CLASSES)) == len(CLASSES) >= 10
    for scene in [*scenes, make_scene(3, 0, 64)]:
        part, mask, objects = scene["parts"], scene["mask"], scene["objects"]
        assert scene["image"].shape == (*mask.shape, 3) and scene["image"].std() > 5
        assert part.shape == objects.shape == scene["scribbles"].shape and mask.dtype == np.uint8
        assert (owner[part][part > 0] == mask[part > 0]).all() and ((part > 0) == (objects > 0)).all()
        assert ((part > 0) == np.isin(mask, owner[1:])).all()
        assert all(len(set(mask[objects == number])) == 1 for number in set(objects[objects > 0]))
    assert mask.shape == (64, 64)
    assert len({p for scene in scenes for p in np.unique(scene["parts"])}) == len(owner)    # all occur


def test_centres_are_means_of_visible_pixels_if_there_are_enough():
    seen = np.zeros((16, 16), np.uint8)                     # of twice the picture's size: 23, 24 and 1 pixels
    seen[0:4, 0:6], seen[8:12, 8:14], seen[0, 0] = 1, 2, 3
    centres, visible = toy_birds.part_centres(np.array([-1, TAIL, WING, -1]), seen)
    assert visible.tolist() == [False, False, True, False, False]
    assert centres[WING].tolist() == [5.0, 4.5] and not centres[[HEAD, BEAK, TAIL, BELLY]].any()
    seen = np.zeros((4, 8), np.uint8)
    seen[0:2, 0:2], seen[2:4, 4:8], seen[0, 5:8] = 1, 2, 3  # two wheels, a row each; three pixels are too few
    shapes = [(None, class_id, part, 1, None) for class_id, part in ((0, 0), (8, 9), (8, 9), (8, 10))]
    assert toy_scenes.part_centres(shapes, seen).tolist() == [[9, 8, 0.5, 0.5], [9, 8, 5.5, 2.5]]


def test_image_and_labels_are_aligned(scenes):
    """Colours are alike inside a labelled part; less so when the labels are moved by three pixels."""
    def spread(image, label):
        mean = np.bincount(label.ravel(), image.ravel()) / np.maximum(np.bincount(label.ravel()), 1)
        return ((image - mean[label]) ** 2).mean()
    for scene in scenes[:40]:
        red = scene["image"][..., 0].astype(float)
        label = (scene["objects"].astype(int) * 32 + scene["parts"]) * 16 + scene["mask"]
        moved = [np.roll(label, k, axis) for k in (-3, 3) for axis in (0, 1)]
        assert spread(red, label) < min(spread(red, other) for other in moved)


def test_classes_have_a_long_tail_lookalikes_and_no_colour_of_their_own(scenes):
    labels = np.stack([scene["mask"] for scene in scenes])
    pixels = np.bincount(labels.ravel(), minlength=len(CLASSES))
    share = np.sort(pixels / pixels.sum())
    assert share[-1] > 0.2 and 0 < share[0] < share[1] < 0.005
    assert [(CLASSES[a], CLASSES[b]) for a, b in LOOKALIKES] == [("car", "taxi"), ("house", "chapel")]
    assert all(pixels[a] > 2.5 * pixels[b] > 0 for a, b in LOOKALIKES)
    bins = np.stack([scene["image"] // 32 for scene in scenes]).astype(int) @ (64, 8, 1)   # 8 x 8 x 8 colours
    counts = np.bincount((bins[:120] * 16 + labels[:120]).ravel(), minlength=512 * 16).reshape(512, 16)
    guess, truth = counts.argmax(1)[bins[120:]], labels[120:]
    iou = [((guess == c) & (truth == c)).sum() / ((guess == c) | (truth == c)).sum() for c in range(14)]
    assert np.mean(iou) < 0.3                                  # the best guess from a pixel's colour is poor


def test_scribbles_are_thin_strokes_one_in_a_region_and_agree_with_the_mask(scenes):
    drawn, pieces = np.array([scene["scribbles"] != 255 for scene in scenes]), []
    share = drawn.mean((1, 2))
    assert 0.025 < share.mean() < 0.04 and share.min() > 0.01 and share.max() < 0.07
    for scene, where in zip(scenes, drawn):
        assert (scene["scribbles"] == scene["mask"])[where].all()
        for c in range(14):                                    # thin: no block of 6 x 6 pixels
            sums = np.pad((scene["scribbles"] == c).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
            assert (sums[6:, 6:] - sums[:-6, 6:] - sums[6:, :-6] + sums[:-6, :-6]).max() < 36
        regions = [scene["mask"] == c for c in (1, 2, 3, 4)]   # sky, grass, road, water, and every object
        regions += [scene["objects"] == number for number in set(scene["objects"][scene["objects"] > 0])]
        strokes = [(region & where).astype(int) for region in regions if region.sum() >= 60]
        pieces += [connected_components(stroke).max() for stroke in strokes]
    assert len(pieces) > 800 and pieces.count(0) < 0.05 * len(pieces) and pieces.count(1) > 0.9 * len(pieces)
    background = [(scene["scribbles"] == 0).any() for scene in scenes if (scene["mask"] == 0).sum() > 100]
    assert np.mean(background) > 0.95


# ---- files ----

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
            row = [split, f"{i:04d}.png", name, part, VARIANTS[part][v], v, f"{x:.2f}", f"{y:.2f}", int(seen)]
            expected.append(",".join(map(str, row)))
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
                assert len(picture.convert("RGB").getcolors(99999)) >= 3            # to be seen in a viewer
        expected += [f"{split},{i:04d},{p:.0f},{toy_scenes.PARTS[int(p)]},{c:.0f},{x:.2f},{y:.2f}"
                     for p, c, x, y in scene["part_centres"]]
    assert table == expected and "9 scenes" in printed
    for file, names in (("classes.txt", CLASSES), ("parts.txt", toy_scenes.PARTS)):
        assert (out / file).read_text() == "".join(f"{i} {name}\n" for i, name in enumerate(names))


@pytest.mark.parametrize("command", [bird_files, scene_files])
def test_the_command_refuses_bad_numbers_and_leaves_what_is_there(tmp_path, capsys, command):
    file, new = tmp_path / "precious.txt", tmp_path / "new"
    file.write_text("mine")
    for words, out, *flags in [("not an empty folder", tmp_path), (file.name, file), (file.name, file / "a"),
                               ("--count", new, "--count=0"), ("--count", new, "--count=100000"),
                               ("--seed", new, "--seed=-1")]:
        assert command.main(["--out", str(out), *flags]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error and list(tmp_path.iterdir()) == [file]
    assert file.read_text() == "mine"


def test_an_interrupted_command_leaves_nothing_that_looks_complete(tmp_path):
    out = tmp_path / "toy"

    def write(folder, seed, counts):
        assert (seed, counts) == (0, {"train": 2, "val": 2})
        (folder / "classes.txt").write_text("half")
        assert [p.name for p in out.iterdir()] == ["unfinished"]                    # even after kill -9
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        toy_files.main("scenes", "", dict(train=9, val=9), "", write, ["--out", str(out), "--count", "2"])
    assert not out.exists()                                    # so it can be repeated
