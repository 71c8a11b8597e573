"""common/images.py against numpy and Pillow; tiny data sets are written to tmp_path."""
import collections
import functools
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common import images as im
from common import toy_birds
from common.classification import clean_loader
from common.loaders import train_loader
from common.run import UserError

BIRDS = {7: "001.Black_footed_Albatross", 3: "002.St._Gull", 12: "Jay"}         # ids out of order, with gaps
BOX = (4.9, 3.2, 20.6, 10.9)                             # x 4..25 (25.5), y 3..14 (14.1), ends exclusive


def message(call, *args, **kwargs):
    """The sentence of the UserError that call(...) must raise: one line."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and text.endswith((".", "(see data/README.md)."))
    return text


def picture(height=20, width=30):
    """uint8 (H,W,3): red = column, green = row, so that every pixel says where it comes from."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, np.full_like(rows, 9)], 2).astype(np.uint8)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(" ".join(str(value) for value in row) + "\n" for row in rows))


def make_cub(root, train=4, test=2, parts=True):
    """A CUB_200_2011 of three classes, PNG images 30 x 20, image ids 101, 103, ...; lists in any order."""
    rows = [(name, k, key) for key, name in BIRDS.items() for k in range(train + test)]
    ids = [101 + 2 * n for n in range(len(rows))]
    for name, k, _ in rows:
        save(root / "images" / name / f"{name}_{k}.png", picture())
    write_lines(root / "images.txt", [(i, f"{name}/{name}_{k}.png") for i, (name, k, _) in zip(ids, rows)])
    write_lines(root / "classes.txt", BIRDS.items())
    write_lines(root / "image_class_labels.txt", [(i, key) for i, (_, _, key) in zip(ids, rows)][::-1])
    marks = [(i, int(k < train)) for i, (_, k, _) in zip(ids, rows)]
    write_lines(root / "train_test_split.txt", marks[::-1])
    write_lines(root / "bounding_boxes.txt", [(i, *BOX) for i in ids][::-1])
    if parts:
        write_lines(root / "parts" / "parts.txt", [(1, "back"), (2, "left eye"), (5, "tail")])
        places = [(1, 10.0, 8.0, 1), (2, 4.0, 14.5, 1), (5, 0.0, 0.0, 0)]
        write_lines(root / "parts" / "part_locs.txt", [(i, *place) for i in ids for place in places][::-1])
    return root


def make_folders(root, parts=("train", "test"), classes=("ant", "bee"), count=5):
    for part in parts:
        for name in classes:
            for k in range(count):
                save(root / part / name / f"{k}.png", picture(6, 8) + 10 * k)
    return root


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# ---- CUB -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("below", ["", "CUB_200_2011"])
def test_cub_by_its_ids(tmp_path, below):
    make_cub(tmp_path / below)
    train, test = (im.open_images("cub", str(tmp_path), s, val_fraction=0) for s in ("train", "test"))
    assert train.classes == ["Black footed Albatross", "St. Gull", "Jay"] and train.num_classes == 3
    assert train.labels == [0] * 4 + [1] * 4 + [2] * 4 and test.labels == [0, 0, 1, 1, 2, 2]
    assert [path.name for path in test.paths[:3]] == [f"{BIRDS[7]}_4.png", f"{BIRDS[7]}_5.png",
                                                      f"{BIRDS[3]}_4.png"]
    assert test.name == "cub" and test.split == "test" and test.variants is None
    assert test.name_of(5) == "Jay_Jay_5" and "/" not in test.name_of(0) and len(test) == 6


def test_cub_images_are_cut_as_pillow_would_cut_them(tmp_path):
    make_cub(tmp_path)
    x, y, w, h = BOX
    expected = Image.fromarray(picture()).crop((int(x), int(y), int(x + w), int(y + h)))
    for split in ("train", "val", "test"):                              # test images too
        image, label = im.open_images("cub", tmp_path, split).read(1)
        assert image.dtype == torch.uint8 and image.is_contiguous() and isinstance(label, int)
        assert (image.permute(1, 2, 0).numpy() == np.array(expected)).all()
    whole = im.open_images("cub", tmp_path, "test", full_images=True)
    assert (whole.read(0)[0].permute(1, 2, 0).numpy() == picture()).all()
    (tmp_path / "bounding_boxes.txt").unlink()
    assert len(im.open_images("cub", tmp_path, "test", full_images=True)) == 6       # not needed then
    assert "bounding_boxes.txt is missing" in message(im.open_images, "cub", tmp_path, "test")


@pytest.mark.parametrize("box, columns, rows", [((-3.5, -2, 10, 8), (0, 6), (0, 6)),   # -3.5 + 10 = 6.5
                                                ((25, 15, 90, 90), (25, 30), (15, 20)),
                                                ((0, 0, 30, 20), (0, 30), (0, 20))])
def test_boxes_are_clipped_to_the_image(tmp_path, box, columns, rows):
    make_cub(tmp_path)
    edit(tmp_path / "bounding_boxes.txt", "101 4.9 3.2 20.6 10.9", "101 " + " ".join(map(str, box)))
    image, _ = im.open_images("cub", tmp_path, "train", val_fraction=0).read(0)
    assert image[0].unique().tolist() == list(range(*columns))
    assert image[1].unique().tolist() == list(range(*rows))


@pytest.mark.parametrize("box", ["30 3 5 5", "3 20 5 5", "-9 3 9 5", "5 5 0 4", "5 5 4 -2", "40 40 -20 -20"])
def test_a_box_outside_its_image_is_named(tmp_path, box):
    make_cub(tmp_path)
    edit(tmp_path / "bounding_boxes.txt", "101 4.9 3.2 20.6 10.9", f"101 {box}")
    data = im.open_images("cub", tmp_path, "train", val_fraction=0)
    text = message(data.read, 0)
    assert str(data.paths[0]) in text and "outside" in text and "bounding_boxes.txt" in text
    data.read(1)


def test_part_locations_point_at_the_same_pixels_in_the_crop(tmp_path):
    make_cub(tmp_path)
    cut = im.open_images("cub", tmp_path, "test")
    whole = im.open_images("cub", tmp_path, "test", full_images=True)
    assert cut.part_names == ("back", "left eye", "tail")
    places = cut.part_locations(0)
    assert places.dtype == torch.float32 and places.shape == (3, 3)
    assert places[0].tolist() == [10 - 4, 8 - 3, 1]
    x, y = places[0, :2].int().tolist()
    assert cut.read(0)[0][:2, y, x].tolist() == [10, 8]                 # red = column, green = row
    assert places[:, 2].tolist() == [1, 0, 0]                           # y 14.5 is below the box
    assert whole.part_locations(0).tolist() == [[10, 8, 1], [4, 14.5, 1], [0, 0, 0]]


@pytest.mark.parametrize("x, y, visible", [(4, 3, 1), (24.9, 13.9, 1), (3.9, 8, 0), (10, 2.9, 0), (25, 8, 0),
                                           (10, 14, 0)])
def test_visible_means_inside_the_box(tmp_path, x, y, visible):
    make_cub(tmp_path)
    edit(tmp_path / "parts" / "part_locs.txt", "101 1 10.0 8.0 1", f"101 1 {x} {y} 1")
    data = im.open_images("cub", tmp_path, "train", val_fraction=0)
    assert data.part_locations(0)[0, 2] == visible
    assert data.part_locations(1)[0, 2] == 1


def test_cub_without_parts_and_with_surplus_lines(tmp_path):
    make_cub(tmp_path, parts=False)
    data = im.open_images("cub", tmp_path, "test")
    assert data.part_names == () and data.part_locations(0).shape == (0, 3)
    shutil.rmtree(tmp_path)
    make_cub(tmp_path)
    edit(tmp_path / "images.txt", f"101 {BIRDS[7]}/{BIRDS[7]}_0.png\n", "")         # a subset: one line less
    data = im.open_images("cub", tmp_path, "train", val_fraction=0)
    assert len(data) == 11 and data.labels[:4] == [0, 0, 0, 1]
    assert data.part_locations(0)[0].tolist() == [6, 5, 1]
    (tmp_path / "parts" / "part_locs.txt").unlink()
    assert "parts/part_locs.txt is missing" in message(im.open_images, "cub", tmp_path, "train")


@pytest.mark.parametrize("file, old, new, wanted", [
    ("images.txt", "103 001", "001", "line 2"), ("images.txt", "101 ", "x101 ", "line 1"),
    ("classes.txt", "12 Jay", "12", "line 3"), ("image_class_labels.txt", "133 12", "133 twelve", "line 2"),
    ("train_test_split.txt", "131 1", "131", "line 3"), ("parts/parts.txt", "5 tail", "tail", "line 3"),
    ("bounding_boxes.txt", "135 4.9", "135 nan", "line 1"),
    ("bounding_boxes.txt", "135 4.9", "135 4.9 1", "line 1"),
    ("parts/part_locs.txt", "135 1 10.0 8.0 1", "135 1 10.0", "line 3"),
])
def test_malformed_lines_are_named(tmp_path, file, old, new, wanted):
    make_cub(tmp_path)
    edit(tmp_path / file, old, new)
    text = message(im.open_images, "cub", tmp_path, "train")
    assert f"{tmp_path / file}, {wanted} " in text and "expected" in text


@pytest.mark.parametrize("file, old, new, wanted", [
    ("bounding_boxes.txt", "103 4.9", "999 4.9", "1 of 18 images of images.txt, such as 103"),
    ("image_class_labels.txt", "101 7\n", "", "such as 101"),
    ("image_class_labels.txt", "105 7", "105 8", "image 105"),
    ("train_test_split.txt", "101 1", "101 2", "mark 2"),
    ("classes.txt", "12 Jay", "12 Jay\n13 004.Blue_Jay", "Blue Jay, have no train image"),
])
def test_lists_that_do_not_fit_each_other(tmp_path, file, old, new, wanted):
    make_cub(tmp_path)
    edit(tmp_path / file, old, new)
    assert wanted in message(im.open_images, "cub", tmp_path, "train")


def test_images_of_the_list_must_exist_and_are_not_opened(tmp_path):
    make_cub(tmp_path)
    path = tmp_path / "images" / "Jay" / "Jay_3.png"
    path.write_bytes(path.read_bytes()[:60])
    data = im.open_images("cub", tmp_path, "train", val_fraction=0)     # a damaged image does not matter yet
    assert str(path) in message(data.read, 11)
    path.unlink()
    text = message(im.open_images, "cub", tmp_path, "test")             # checked for all splits at once
    assert "lacks 1 of 18 images of images.txt, such as Jay/Jay_3.png" in text and "65de6-vp158" in text
    shutil.rmtree(tmp_path / "images")
    assert "lacks 18 of 18" in message(im.open_images, "cub", tmp_path, "train")


def test_a_class_without_test_images(tmp_path):
    make_cub(tmp_path, test=0)
    assert "3 classes" in message(im.open_images, "cub", tmp_path, "train")
    assert "no test image" in message(im.open_images, "cub", tmp_path, "train")


# ---- one folder for each class ---------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["cars", "imagefolder"])
def test_class_folders(tmp_path, name):
    make_folders(tmp_path, classes=("bee", "ant", "Cow 2"))
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "notes.txt").write_text("no class")
    data = im.open_images(name, tmp_path, "test")
    assert data.classes == ["Cow 2", "ant", "bee"] and data.labels == [0] * 5 + [1] * 5 + [2] * 5
    assert data.paths[6] == tmp_path / "test" / "ant" / "1.png" and data.name_of(6) == "ant_1"
    image, label = data.read(6)
    assert (image.permute(1, 2, 0).numpy() == picture(6, 8) + 10).all() and label == 1
    assert data.part_names == () and data.part_locations(0).shape == (0, 3) and data.variants is None


def test_grey_and_transparent_images_become_rgb(tmp_path):
    make_folders(tmp_path, count=2)
    grey, alpha = picture(6, 8)[..., 0], np.dstack([picture(6, 8), np.full((6, 8), 128, np.uint8)])
    save(tmp_path / "test" / "ant" / "0.png", grey)
    save(tmp_path / "test" / "ant" / "1.png", alpha)
    data = im.open_images("imagefolder", tmp_path, "test")
    assert (data.read(0)[0].numpy() == grey).all() and data.read(0)[0].shape == (3, 6, 8)
    assert (data.read(1)[0].permute(1, 2, 0).numpy() == picture(6, 8)).all()


def test_an_own_val_folder_is_used_by_imagefolder_alone(tmp_path):
    make_folders(tmp_path, ("train", "val", "test"), count=4)
    train, val = (im.open_images("imagefolder", tmp_path, s, val_fraction=0) for s in ("train", "val"))
    assert len(train) == len(val) == 8 and {path.parts[-3] for path in val.paths} == {"val"}
    assert {path.parts[-3] for path in train.paths} == {"train"} and val.split == "val"
    cars = [im.open_images("cars", tmp_path, s) for s in ("train", "val")]
    assert [len(data) for data in cars] == [6, 2] and {path.parts[-3] for path in cars[1].paths} == {"train"}


def test_class_folders_that_do_not_fit(tmp_path):
    opened = functools.partial(message, im.open_images, "imagefolder", tmp_path, "train")
    make_folders(tmp_path, ("train", "val", "test"))
    (tmp_path / "val" / "ant").rename(tmp_path / "val" / "aunt")
    text = opened()
    assert "train/ and val/" in text and "class ant (2" in text
    shutil.rmtree(tmp_path / "val")
    (tmp_path / "test" / "cow").mkdir()
    assert "class cow (1" in opened()
    (tmp_path / "train" / "cow").mkdir()
    text = opened()
    assert str(tmp_path / "train" / "cow") in text and "no image" in text
    for part in ("train", "test"):
        save(tmp_path / part / "cow" / "0.png", picture(6, 8))
    assert "class cow has a single training image" in opened()
    assert len(im.open_images("imagefolder", tmp_path, "train", val_fraction=0)) == 11
    assert len(im.open_images("imagefolder", tmp_path, "test")) == 11
    shutil.rmtree(tmp_path / "test")
    assert "the folder test/ is missing" in opened()
    (tmp_path / "test").mkdir()
    assert "test/ must hold a folder for each class" in opened()


# ---- splits and options ----------------------------------------------------------------------------------

@pytest.mark.parametrize("fraction, share", [(0.1, 1), (0.25, 3), (0.5, 5), (0.01, 1)])      # of 10 a class
def test_train_and_val_share_the_training_images(tmp_path, fraction, share):
    make_folders(tmp_path, count=10)
    train, val = (im.open_images("cars", tmp_path, s, 3, fraction) for s in ("train", "val"))
    everything = im.open_images("cars", tmp_path, "train", val_fraction=0)
    assert len(everything) == 20 and not set(train.paths) & set(val.paths)
    assert set(train.paths) | set(val.paths) == set(everything.paths) and len(train) + len(val) == 20
    assert collections.Counter(val.labels) == {0: share, 1: share}
    assert train.paths == sorted(train.paths)                           # the order of the files stays
    label_of = dict(zip(everything.paths, everything.labels))
    assert [label_of[path] for path in val.paths] == val.labels


def test_the_choice_of_val_images_depends_on_the_seed_alone(tmp_path):
    make_folders(tmp_path, classes=("a", "b", "c", "d"), count=10)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = im.open_images("cars", tmp_path, "val", 5).paths
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert im.open_images("cars", tmp_path, "val", 5).paths == first
    assert im.open_images("imagefolder", tmp_path, "val", 5).paths == first
    choices = [[path.stem for path in im.open_images("cars", tmp_path, "val", seed).paths]
               for seed in range(40)]
    assert any(len(set(choice)) > 1 for choice in choices)              # each class has its own draw
    assert {stem for choice in choices for stem in choice} == {str(k) for k in range(10)}
    assert len({tuple(choice) for choice in choices}) > 30
    tests = [im.open_images("cars", tmp_path, "test", seed).paths for seed in (0, 1)]
    assert tests[0] == tests[1] and len(tests[0]) == 40


def test_wrong_names_and_options(tmp_path):
    assert "toy_birds, cub, cars, imagefolder" in message(im.open_images, "cup", tmp_path, "train")
    assert "train, val, test" in message(im.open_images, "cub", tmp_path, "valid")
    assert "--data ROOT" in message(im.open_images, "cars", "", "train")
    assert "imagefolder" in message(im.open_images, "toy_birds", tmp_path, "train")
    assert "val_fraction 0" in message(im.open_images, "toy_birds", "", "val", val_fraction=0)
    for fraction in (-0.1, 0.51, float("nan")):
        assert "between 0 and 0.5" in message(im.open_images, "toy_birds", "", "test", val_fraction=fraction)


@pytest.mark.parametrize("name", ["cub", "cars", "imagefolder"])
def test_missing_layout_shows_the_tree_the_content_and_the_source(tmp_path, name):
    (tmp_path / "something").mkdir()
    text = message(im.open_images, name, tmp_path, "train")
    tree, source = im.TREES[name]
    for part in (name, tree, source, str(tmp_path), "something/", "missing", "see data/README.md"):
        assert part in text
    assert "no such folder" in message(im.open_images, name, tmp_path / "gone", "train")


# ---- toy birds -------------------------------------------------------------------------------------------

def test_toy_birds_are_those_of_make_bird():
    train, val, test = (im.open_images("toy_birds", "", s, seed=4) for s in ("train", "val", "test"))
    assert len(train) + len(val) == toy_birds.SPLITS["train"] and len(test) == toy_birds.SPLITS["test"]
    assert collections.Counter(val.labels) == dict.fromkeys(range(12), 6)            # a tenth of 60
    assert train.classes == list(toy_birds.SPECIES) and train.part_names == toy_birds.PARTS
    assert train.variants is toy_birds.SPECIES_VARIANTS and train.paths is None
    names = {data.name_of(i) for data in (train, val) for i in range(len(data))}
    assert names == {f"{toy_birds.SPECIES[i % 12]}_{i:04d}" for i in range(720)}
    for data, part in ((val, "train"), (test, "test")):
        number = int(data.name_of(5)[-4:])
        bird = toy_birds.make_bird(0, toy_birds.bird_index(part, number))
        image, label = data.read(5)
        assert (image.permute(1, 2, 0).numpy() == bird["image"]).all() and image.is_contiguous()
        assert label == bird["label"] == data.labels[5]
        places = data.part_locations(5)
        assert places.dtype == torch.float32 and places.shape == (5, 3)
        assert np.allclose(places[:, :2], bird["centres"])
        assert (places[:, 2].numpy() == bird["visible"]).all()


def test_toy_birds_are_drawn_once(monkeypatch):
    data, drawn, draw = im.open_images("toy_birds", "", "test"), [], toy_birds.make_bird
    monkeypatch.setattr(toy_birds, "make_bird", lambda seed, i: drawn.append(i) or draw(seed, i))
    image, _ = data.read(3)
    image.zero_()                                                       # the kept bird stays as it is
    assert data.read(3)[0].any() and data.part_locations(3).any()
    assert drawn == [toy_birds.bird_index("test", 3)]


# ---- views and loaders -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    for part in ("train", "test"):
        for c, name in enumerate(("ant", "bee", "cow")):
            for k in range(3):
                rng = np.random.default_rng(10 * c + k)
                save(root / part / name / f"{k}.png", rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    return root


def noise(image):
    """An augmentation that draws from torch's generator."""
    return torch.randint(0, 256, image.shape, dtype=torch.uint8)


def flip(image):
    return image.flip(2)


def test_clean_view_squeezes_the_whole_image(folders):
    data = im.open_images("imagefolder", folders, "test")
    x, label = im.CleanView(data, 16)[4]
    assert x.shape == (3, 16, 16) and x.dtype == torch.float32 and label == 1
    with Image.open(folders / "test" / "bee" / "1.png") as file:
        expected = np.array(file.resize((16, 16), Image.Resampling.BILINEAR), dtype=float)   # antialiased
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    got = x.permute(1, 2, 0).numpy() * std + mean
    assert abs(got - expected).max() < 1.01                             # rounding of the uint8 kernels
    assert len(im.CleanView(data, 16)) == 9


def test_train_view_augments_before_normalising(folders):
    data = im.open_images("imagefolder", folders, "train", val_fraction=0)
    clean, view = im.CleanView(data, 16), im.TrainView(data, 16, flip)
    assert len(view) == 9 and view[(5, 1)][1] == 1
    assert torch.equal(view[(5, 1)][0], clean[5][0].flip(2))
    assert torch.equal(im.TrainView(data, 16, lambda image: image)[(5, 1)][0], clean[5][0])
    seen = []
    im.TrainView(data, 16, lambda image: seen.append(image) or image)[(0, 1)]
    assert seen[0].dtype == torch.uint8 and seen[0].shape == (3, 16, 16)


def test_train_view_depends_on_its_key_alone(folders):
    view = im.TrainView(im.open_images("imagefolder", folders, "train"), 16, noise)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = view[(2, 77)][0]
    assert torch.equal(torch.get_rng_state(), state)                    # dropout goes on undisturbed
    torch.manual_seed(2)
    assert torch.equal(view[(2, 77)][0], first) and not torch.equal(view[(2, 78)][0], first)

    def broken(image):
        torch.rand(1)
        raise TypeError
    state = torch.get_rng_state()
    with pytest.raises(TypeError):
        im.TrainView(view.data, 16, broken)[(0, 1)]
    assert torch.equal(torch.get_rng_state(), state)


def test_loaders_give_the_same_batches_with_workers(folders):
    data = im.open_images("imagefolder", folders, "train")
    view = im.TrainView(data, 16, noise)
    alone, helped = (list(train_loader(view, 4, 7, 0, 3, workers, "cpu")) for workers in (0, 1))
    assert len(alone) == 3 and alone[0][0].shape == (4, 3, 16, 16) and alone[0][1].dtype == torch.int64
    assert all(torch.equal(a, b) for pair in zip(alone, helped) for a, b in zip(*pair))


@pytest.mark.parametrize("workers", [0, 1])
def test_clean_loader_keeps_the_order(folders, workers):
    data = im.open_images("imagefolder", folders, "test")
    cfg, view = SimpleNamespace(size=16, batch_size=4, workers=workers), im.CleanView(data, 16)
    batches = list(clean_loader(data, cfg, "cpu"))
    assert [len(x) for x, _ in batches] == [4, 4, 1] and batches[0][1].dtype == torch.int64
    assert torch.equal(torch.cat([x for x, _ in batches]), torch.stack([view[i][0] for i in range(9)]))
    assert torch.cat([label for _, label in batches]).tolist() == data.labels


def test_ranks_partition_the_images(folders):
    data = im.open_images("imagefolder", folders, "test")
    cfg, view = SimpleNamespace(size=16, batch_size=3, workers=0), im.CleanView(data, 16)
    for rank, own in ((0, [0, 2, 4, 6, 8]), (1, [1, 3, 5, 7])):
        batches = list(clean_loader(data, cfg, "cpu", rank, 2))
        assert torch.equal(torch.cat([x for x, _ in batches]), torch.stack([view[i][0] for i in own]))
    assert list(clean_loader(data, cfg, "cpu", 10, 11)) == []           # more ranks than images
