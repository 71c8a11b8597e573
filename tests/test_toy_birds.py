"""Facts about toy birds and the files of them, each computed here by other means than in the generator."""
import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import toy_birds
from common.toy_birds import PARTS, SPECIES, SPECIES_VARIANTS, SPLITS, VARIANTS, bird_index, make_bird
from data.toy_birds import main

MANY = 480                                                     # birds for the statistics
HEAD, BEAK, WING, TAIL, BELLY = range(5)


@pytest.fixture(scope="module")
def birds():
    return [make_bird(0, i) for i in range(MANY)]


@pytest.fixture(scope="module")
def centres(birds):
    return np.array([bird["centres"] for bird in birds if bird["visible"].all()])  # (N,5,2)


# ---- the table of species ---------------------------------------------------------------------------------

def test_table_of_species():
    assert PARTS == ("head", "beak", "wing", "tail", "belly") == tuple(VARIANTS)
    assert len(SPECIES) == len(set(SPECIES)) == 12 and SPECIES == sorted(SPECIES)  # as folders are sorted
    assert SPECIES_VARIANTS.shape == (12, 5) and SPECIES_VARIANTS.dtype.kind == "i"
    for p, part in enumerate(PARTS):
        assert 3 <= len(set(VARIANTS[part])) == len(VARIANTS[part]) <= 5
        species_with = [int((SPECIES_VARIANTS[:, p] == v).sum()) for v in range(len(VARIANTS[part]))]
        assert min(species_with) >= 2 and sum(species_with) == 12


def test_two_species_differ_in_two_parts_or_more():
    shared = [int((SPECIES_VARIANTS[a] == SPECIES_VARIANTS[b]).sum()) for a in range(12) for b in range(a)]
    assert max(shared) == 3                                    # there are look-alikes


def test_no_two_variants_always_occur_together():
    """Otherwise nobody could say which of the two a prototype stands for."""
    owners = [tuple(np.flatnonzero(SPECIES_VARIANTS[:, p] == v))
              for p, part in enumerate(PARTS) for v in range(len(VARIANTS[part]))]
    assert len(set(owners)) == len(owners)


# ---- determinism and splits -------------------------------------------------------------------------------

def test_seed_and_index_alone_decide(birds):
    np.random.seed(7)                                          # neither the global generator ...
    for i in (5, 3, 3):                                        # ... nor the order of the calls matters
        again = make_bird(0, i)
        assert all(np.array_equal(again[key], birds[i][key]) for key in again)


def test_all_pictures_differ(birds):
    others = [make_bird(1, i) for i in range(20)] + [make_bird(0, bird_index("test", i)) for i in range(20)]
    assert len({bird["image"].tobytes() for bird in birds + others}) == MANY + 40


def test_splits_share_no_picture_and_have_all_species_equally():
    assert SPLITS == {"train": 720, "test": 240}
    indices = [bird_index(split, i) for split in SPLITS for i in range(SPLITS[split])]
    assert len(set(indices)) == 960
    assert (bird_index("train", 99_999), bird_index("test", 3)) == (99_999, 120_003)
    for split in SPLITS:
        assert [make_bird(0, bird_index(split, i))["label"] for i in range(14)] == [*range(12), 0, 1]


@pytest.mark.parametrize("split, i", [("val", 0), ("train", -1), ("test", 100_000)])
def test_bird_index_refuses(split, i):
    with pytest.raises(ValueError, match=f"{i} in split '{split}'"):
        bird_index(split, i)


# ---- what a picture holds ---------------------------------------------------------------------------------

def test_shapes_types_and_ranges(birds):
    for i, bird in enumerate(birds):
        assert list(bird) == ["image", "label", "centres", "visible", "variants"]
        assert bird["image"].shape == (96, 96, 3) and bird["image"].dtype == np.uint8
        assert bird["image"].std() > 10
        assert type(bird["label"]) is int and bird["label"] == i % 12
        assert bird["variants"].tolist() == SPECIES_VARIANTS[i % 12].tolist()
        assert bird["centres"].shape == (5, 2) and bird["centres"].dtype == np.float64
        assert bird["visible"].shape == (5,) and bird["visible"].dtype == bool
        assert (bird["centres"] >= 0).all() and (bird["centres"] <= 95).all()
        assert (bird["centres"][~bird["visible"]] == 0).all()


def test_the_returned_variants_are_a_copy():
    make_bird(0, 0)["variants"][:] = 9
    assert SPECIES_VARIANTS.max() < 5


@pytest.mark.parametrize("size", [48, 96, 160])
def test_size(size, birds):
    for i in range(24):
        bird, usual = make_bird(0, i, size), birds[i]
        assert bird["image"].shape == (size, size, 3)
        both = bird["visible"] & usual["visible"]
        scaled = (usual["centres"][both] + 0.5) * size / 96 - 0.5  # the middle of pixel 0 is half a pixel in
        np.testing.assert_allclose(bird["centres"][both], scaled, atol=0.35 * max(1, size / 96))


@pytest.mark.parametrize("p", range(5), ids=PARTS)
def test_centre_is_the_mean_of_the_pixels_that_change_with_the_part(monkeypatch, p):
    """Every picture twice, with the part dark and light; the difference is the part as it is seen."""
    pictures = []
    for shade in (40, 140):
        drawings = {name: [((shade,) * 3, corners) for _, corners in shapes]
                    for name, shapes in toy_birds.DRAWINGS[PARTS[p]].items()}
        with monkeypatch.context() as patch:
            patch.setitem(toy_birds.DRAWINGS, PARTS[p], drawings)
            pictures.append([make_bird(4, i) for i in range(60)])
    hidden = 0
    for dark, light in zip(*pictures):
        change = light["image"].astype(float).sum(2) - dark["image"].astype(float).sum(2)  # (H,W)
        assert np.array_equal(dark["visible"], light["visible"])
        pixels = (change > 20).sum()
        if dark["visible"][p]:
            y, x = ((change * grid).sum() / change.sum() for grid in np.indices(change.shape))
            np.testing.assert_allclose(dark["centres"][p], (x, y), atol=0.3)
            assert pixels >= 6
        else:
            hidden += 1
            assert pixels < 20                                 # 6 full ones, others at the edge
    assert hidden <= 6


def test_visible_by_hand():
    """24 pixels of the map of twice the size are 6 of the picture, and 23 are too few."""
    seen = np.zeros((16, 16), np.uint8)
    seen[0:4, 0:6], seen[8:12, 8:14] = 1, 2
    seen[8, 8] = 3                                             # something before the tail
    centres, visible = toy_birds.part_centres(np.array([-1, WING, TAIL, -1]), seen)
    assert visible.tolist() == [False, False, True, False, False]
    assert centres[WING].tolist() == [1.0, 0.5] and not centres[[HEAD, BEAK, TAIL, BELLY]].any()


def test_later_shapes_hide_earlier_ones():
    shapes = [(np.array([(a, a), (b, a), (b, b), (a, b)], float), None, -1) for a, b in ((20, 60), (40, 90))]
    seen = np.asarray(toy_birds.paint(shapes, 96, 96, first=1))[::2, ::2]
    assert (seen[5, 5], seen[30, 30], seen[50, 50], seen[80, 80], seen[30, 80]) == (0, 1, 2, 2, 0)


# ---- how birds vary ---------------------------------------------------------------------------------------

def test_birds_face_both_sides_and_stand_upright(centres):
    side = np.sign(centres[:, BEAK, 0] - centres[:, TAIL, 0])
    assert 0.4 < (side == 1).mean() < 0.6
    order = side[:, None] * centres[:, [TAIL, WING, BELLY, BEAK], 0]
    assert (np.diff(order, axis=1) > 0).mean() > 0.97          # from the tail to the beak, also when mirrored
    assert (centres[:, HEAD, 1] < centres[:, BELLY, 1]).all()  # y points down


def test_tilt_and_size_vary(centres):
    across = centres[:, HEAD] - centres[:, TAIL]
    angle = np.rad2deg(np.arctan2(-across[:, 1], np.abs(across[:, 0])))
    length = np.hypot(*across.T)
    assert 25 < np.ptp(angle) < 65 and 1.35 < length.max() / length.min() < 1.9
    assert centres.mean(1).std(0).min() > 5                    # and so does the place


def test_parts_are_apart_and_inside(centres):
    for a in range(5):
        for b in range(a):
            distance = np.hypot(*(centres[:, a] - centres[:, b]).T)
            assert distance.mean() > (10 if {a, b} == {HEAD, BEAK} else 18)
    outside = np.zeros(5, int)
    for i in range(MANY):
        for corners, _, part in toy_birds.compose(np.random.default_rng((0, i)), SPECIES_VARIANTS[i % 12]):
            outside[part] += part >= 0 and bool((corners < -3).any() or (corners > 99).any())
    assert not outside[[HEAD, BEAK, WING, BELLY]].any() and outside[TAIL] > 0


def test_a_part_is_hidden_in_some_pictures_one_at_a_time(birds):
    hidden = ~np.array([bird["visible"] for bird in birds])
    assert 0.03 < hidden.any(1).mean() < 0.11 and hidden.sum(1).max() == 1
    assert hidden.any(0).all()                                 # each part somewhere


def histogram(image, x, y):
    """Colours (216,) of the 20x20 pixels around a place."""
    x, y = np.rint((x, y)).astype(int) + 10
    window = np.pad(image, ((10, 10), (10, 10), (0, 0)), mode="edge")[y - 10:y + 10, x - 10:x + 10]
    return np.sqrt(np.bincount((window // 43).reshape(-1, 3).astype(int) @ (36, 6, 1), minlength=216) / 400)


def nearest_mean(features, labels, new):
    """The label of the nearest class mean, for each of the new ones."""
    means = np.stack([features[labels == label].mean(0) for label in range(labels.max() + 1)])
    return ((new[:, None] - means) ** 2).sum(2).argmin(1)


@pytest.mark.parametrize("p", range(5), ids=PARTS)
def test_a_small_window_tells_the_variant(birds, p):
    """Even the colours alone nearly do."""
    seen = [bird for bird in birds if bird["visible"][p]]
    x = np.array([histogram(bird["image"], *bird["centres"][p]) for bird in seen])
    y, half = np.array([bird["variants"][p] for bird in seen]), len(seen) // 2
    assert (nearest_mean(x[:half], y[:half], x[half:]) == y[half:]).mean() > 0.82


def test_body_and_background_tell_nothing(monkeypatch):
    """Without the five parts, species cannot be told apart."""
    monkeypatch.setattr(toy_birds, "HIDDEN", 0)
    nothing = {part: dict.fromkeys(names, ()) for part, names in VARIANTS.items()}
    monkeypatch.setattr(toy_birds, "DRAWINGS", nothing)
    x = np.array([make_bird(0, i)["image"][::8, ::8].ravel() for i in range(MANY)], float)
    y = np.arange(MANY) % 12
    assert (nearest_mean(x[:300], y[:300], x[300:]) == y[300:]).mean() < 0.2  # 1/12 by chance


# ---- the command line -------------------------------------------------------------------------------------

def test_command_writes_what_make_bird_returns(tmp_path, capsys):
    out = tmp_path / "new" / "birds"
    assert main(["--out", str(out), "--count", "14", "--seed", "5"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and str(out) in printed and "28 birds" in printed
    assert {p.name for p in out.iterdir()} == {"classes.txt", "overview.png", "parts.csv", "test", "train"}
    assert (out / "classes.txt").read_text() == "".join(f"{i} {name}\n" for i, name in enumerate(SPECIES))
    with open(out / "parts.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["split", "file", "species", "part", "variant", "variant_number", "x", "y", "visible"]
    expected = []
    for split in SPLITS:
        assert sorted(p.name for p in (out / split).iterdir()) == SPECIES
        assert len(list((out / split).glob("*/*"))) == 14
        for i in range(14):
            bird, name = make_bird(5, bird_index(split, i)), SPECIES[i % 12]
            with Image.open(out / split / name / f"{i:04d}.png") as picture:
                assert picture.mode == "RGB" and np.array_equal(np.asarray(picture), bird["image"])
            for p, part in enumerate(PARTS):
                v, (x, y) = SPECIES_VARIANTS[i % 12, p], bird["centres"][p]
                expected.append([split, f"{i:04d}.png", name, part, VARIANTS[part][v], str(v),
                                 f"{x:.2f}", f"{y:.2f}", str(int(bird["visible"][p]))])
    assert rows[1:] == expected
    with Image.open(out / "overview.png") as sheet:
        assert sheet.width > 1000 and sheet.height > 1000
        first = np.asarray(sheet.convert("L"), float)[:160, 160:320]  # the first picture of the first species
    assert first.std() > 10


def test_command_refuses_a_folder_that_is_not_empty(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    run = subprocess.run([sys.executable, "-m", "data.toy_birds", "--out", str(tmp_path)], text=True,
                         capture_output=True, cwd=Path(__file__).resolve().parent.parent)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.count("\n") == 1 and str(tmp_path) in run.stderr and "not an empty folder" in run.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("flags, word", [(["--count", "0"], "--count"), (["--count", "100000"], "--count"),
                                         (["--seed", "-1"], "--seed")])
def test_command_refuses_bad_numbers(tmp_path, capsys, flags, word):
    assert main(["--out", str(tmp_path / "birds")] + flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and word in error and not (tmp_path / "birds").exists()


@pytest.mark.parametrize("out", ["file", "file/birds"])
def test_command_says_when_it_cannot_write(tmp_path, capsys, out):
    (tmp_path / "file").write_text("mine")
    assert main(["--out", str(tmp_path / out)]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and (tmp_path / "file").read_text() == "mine"


def test_an_interrupted_run_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    out, made = tmp_path / "birds", []

    def interrupted(seed, index):
        made.append(index)
        if len(made) == 4:
            assert [p.name for p in out.iterdir()] == ["unfinished"]                # even after kill -9
            raise KeyboardInterrupt
        return make_bird(seed, index)

    monkeypatch.setattr("data.toy_birds.make_bird", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(["--out", str(out), "--count", "2"])
    assert not out.exists()
    monkeypatch.undo()
    assert main(["--out", str(out), "--count", "2"]) == 0      # so it can be repeated
