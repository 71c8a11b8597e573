"""Data for classification: the readers and views of common/images.py, and clean_loader.

Held here: CUB is read by its ids and cut as Pillow cuts, its part locations too; folders of classes; the
share of val; toy birds; views as Pillow resizes; every fault of a layout is one sentence.
"""
import collections
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common import images as im
from common import toy_birds, transforms
from common.classification import clean_loader
from trees import message, write

BIRDS = {7: "001.Black_footed_Albatross", 3: "002.St._Gull", 12: "Jay"}     # ids out of order, with gaps
FILES = [(name, k, key) for key, name in BIRDS.items() for k in range(6)]
FILES = [(101 + 2 * n, *file) for n, file in enumerate(FILES)]           # 4 train and 2 test images of each
BOX = (4.9, 3.2, 20.6, 10.9)                             # x 4..25 (25.5), y 3..14 (14.1), ends exclusive


def picture(height=20, width=30):
    """uint8 (H,W,3): red = column, green = row, so that every pixel says where it comes from."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, np.full_like(rows, 9)], 2).astype(np.uint8)


def lines(rows):
    return "".join(" ".join(map(str, row)) + "\n" for row in rows)


def cub():
    """The tree of CUB_200_2011 with three classes, images of 30 x 20 and lists in any order."""
    places = [(1, 10.0, 8.0, 1), (2, 4.0, 14.0, 1), (5, 0.0, 0.0, 0), (6, 3.9, 8.0, 1)]
    return {f"images/{name}/{name}_{k}.png": picture() for _, name, k, _ in FILES} | {
        "images.txt": lines((i, f"{name}/{name}_{k}.png") for i, name, k, _ in FILES),
        "classes.txt": lines(BIRDS.items()),
        "image_class_labels.txt": lines((i, key) for i, _, _, key in FILES[::-1]),
        "train_test_split.txt": lines((i, int(k < 4)) for i, _, k, _ in FILES[::-1]),
        "bounding_boxes.txt": lines((i, *BOX) for i, *_ in FILES[::-1]),
        "parts/parts.txt": lines([(1, "back"), (2, "left eye"), (5, "tail"), (6, "wing")]),
        "parts/part_locs.txt": lines([(i, *place) for i, *_ in FILES for place in places][::-1])}


def edited(file, old, new):
    """cub() with one place of a list changed."""
    tree = cub()
    assert old in tree[file]
    return tree | {file: tree[file].replace(old, new, 1)}


def classes(parts=("train", "test"), names=("ant", "bee"), count=5):
    return {f"{part}/{name}/{k}.png": picture(6, 8) + 10 * k
            for part in parts for name in names for k in range(count)}


@pytest.mark.parametrize("below", ["", "CUB_200_2011"])
def test_cub_is_read_by_its_ids_and_cut_to_its_boxes(tmp_path, below):
    write(tmp_path / below, cub())
    train, test = (im.open_images("cub", str(tmp_path), s, val_fraction=0) for s in ("train", "test"))
    assert train.classes == ["Black footed Albatross", "St. Gull", "Jay"] and train.num_classes == 3
    assert train.labels == [0] * 4 + [1] * 4 + [2] * 4 and test.labels == [0, 0, 1, 1, 2, 2]
    assert [path.name for path in test.paths[1:3]] == [f"{BIRDS[7]}_5.png", f"{BIRDS[3]}_4.png"]
    assert (test.name, test.split, test.variants, test.name_of(5)) == ("cub", "test", None, "Jay_Jay_5")
    x, y, w, h = BOX
    cut = np.array(Image.fromarray(picture()).crop((int(x), int(y), int(x + w), int(y + h))))
    whole = im.open_images("cub", tmp_path, "test", full_images=True)
    for data, expected in ((train, cut), (test, cut), (whole, picture())):          # test images too
        image, label = data.read(1)
        assert (image.permute(1, 2, 0).numpy() == expected).all() and label == 0
    places = test.part_locations(0)                                     # y 14 is below the box, x 3.9 left
    assert test.part_names == ("back", "left eye", "tail", "wing") and places.dtype == torch.float32
    assert places[0].tolist() == [6, 5, 1] and test.read(0)[0][:2, 5, 6].tolist() == [10, 8]
    assert places[:, 2].tolist() == [1, 0, 0, 0]
    assert whole.part_locations(0)[:3].tolist() == [[10, 8, 1], [4, 14, 1], [0, 0, 0]]


def test_cub_may_be_a_subset_without_boxes_and_parts(tmp_path):
    tree = edited("images.txt", f"101 {BIRDS[7]}/{BIRDS[7]}_0.png\n", "")      # one less than in other lists
    for file in ("bounding_boxes.txt", "parts/parts.txt", "parts/part_locs.txt"):
        del tree[file]
    data = im.open_images("cub", write(tmp_path, tree), "train", full_images=True)
    assert len(data) == 8 and data.part_names == () and data.part_locations(0).shape == (0, 3)


@pytest.mark.parametrize("name", ["cars", "imagefolder"])
def test_class_folders_are_sorted_and_val_of_imagefolder_may_be_its_own(tmp_path, name):
    write(tmp_path, classes(im.SPLITS, ("bee", "ant", "Cow 2")) | {"train/no.txt": "", "train/.cache/x": ""})
    train, val, data = (im.open_images(name, tmp_path, split) for split in im.SPLITS)
    assert data.classes == ["Cow 2", "ant", "bee"] and data.labels == [0] * 5 + [1] * 5 + [2] * 5
    assert data.paths[6] == tmp_path / "test" / "ant" / "1.png" and data.name_of(6) == "ant_1"
    image, label = data.read(6)
    assert (image.permute(1, 2, 0).numpy() == picture(6, 8) + 10).all() and label == 1
    assert (len(train), len(val)) == ((15, 15) if name == "imagefolder" else (12, 3))
    assert {path.parts[-3] for path in val.paths} == {"val" if name == "imagefolder" else "train"}


@pytest.mark.parametrize("name, tree, words", [
    ("cub", edited("images.txt", "103 001", "001"), "images.txt, line 2 .*: expected an id and a name"),
    ("cub", edited("bounding_boxes.txt", "135 4.9", "135 nan"), "boxes.txt, line 1 .* expected .* 4 num"),
    ("cub", edited("bounding_boxes.txt", "103 4.9", "999 4.9"), "1 of 18 images of images.txt, such as 103"),
    ("cub", edited("images.txt", "Jay_3.png", "Jay_9.png"), "lacks 1 of 18 .*such as Jay/Jay_9.png.*65de6"),
    ("cub", {k: v for k, v in cub().items() if k != "bounding_boxes.txt"}, "bounding_boxes.txt is missing"),
    ("cub", edited("bounding_boxes.txt", "101 4.9", "101 30.1"), r"_0.png .* outside .*bounding_boxes.txt"),
    ("imagefolder", classes(im.SPLITS) | {"val/aunt/0.png": picture()}, "train/ and val/ has the class aun"),
    ("imagefolder", classes(count=1), "class ant has a single training image")])
def test_lists_and_folders_that_are_malformed_or_do_not_fit_are_named(tmp_path, name, tree, words):
    said = message(lambda: im.open_images(name, write(tmp_path, tree), "train", val_fraction=0.2).read(0))
    assert re.search(words, said) and (str(tmp_path) in said or "line" not in words)


@pytest.mark.parametrize("fraction, share", [(0.25, 3), (0.01, 1)])      # of 10 a class
def test_val_is_a_share_of_every_classs_training_images_by_the_seed_alone(tmp_path, fraction, share):
    write(tmp_path, classes(count=10))
    everything = im.open_images("cars", tmp_path, "train", val_fraction=0)
    before, choices = torch.get_rng_state(), set()
    for seed in range(20):
        train, val = (im.open_images("cars", tmp_path, s, seed, fraction) for s in ("train", "val"))
        assert sorted(train.paths + val.paths) == everything.paths and train.paths == sorted(train.paths)
        assert collections.Counter(val.labels) == {0: share, 1: share}
        choices.add(tuple(path.stem for path in val.paths))
    assert torch.equal(torch.get_rng_state(), before) and len(choices) > 12
    assert any(choice[:share] != choice[share:] for choice in choices)  # each class has its own draw


@pytest.mark.parametrize("arguments, words", [
    (("cup", "x", "train"), "toy_birds, cub, cars, imagefolder"), (("cars", "", "train"), "--data ROOT"),
    (("toy_birds", "x", "train"), "do not read x: .*imagefolder"),
    (("toy_birds", "", "val", 0, 0), "val_fraction 0"), (("toy_birds", "", "val", 0, 0.6), "0 and 0.5"),
    *[((name, "gone", "train"), f"^{name}: there is no gone; expected ROOT.*; source: .*README.md")
      for name in im.TREES]])
def test_wrong_names_options_and_folders_are_one_sentence(arguments, words):
    assert re.search(words, message(im.open_images, *arguments))


def test_toy_birds_are_those_of_make_bird_and_stay_as_drawn():
    train, val, test = (im.open_images("toy_birds", "", s, seed=4) for s in im.SPLITS)
    assert collections.Counter(val.labels) == dict.fromkeys(range(12), 6)           # a tenth of 60
    assert train.classes == list(toy_birds.SPECIES) and train.part_names == toy_birds.PARTS
    assert train.variants is toy_birds.SPECIES_VARIANTS and len(test) == toy_birds.SPLITS["test"]
    names = {data.name_of(i) for data in (train, val) for i in range(len(data))}
    assert names == {f"{toy_birds.SPECIES[i % 12]}_{i:04d}" for i in range(720)}
    for data, part in ((val, "train"), (test, "test")):
        bird = toy_birds.make_bird(0, toy_birds.bird_index(part, int(data.name_of(5)[-4:])))
        data.read(5)[0].zero_()                                         # the kept bird is another copy
        image, label = data.read(5)
        assert (image.permute(1, 2, 0).numpy() == bird["image"]).all() and label == bird["label"]
        assert np.allclose(data.part_locations(5), np.column_stack([bird["centres"], bird["visible"]]))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng = np.random.default_rng(0)
    tree = {f"{part}/{name}/{k}.png": rng.integers(0, 256, (40, 60, 3))
            for part in ("train", "test") for name in ("ant", "bee", "cow") for k in range(3)}
    return im.open_images("imagefolder", write(tmp_path_factory.mktemp("folders"), tree), "test")


def test_clean_views_squeeze_the_whole_image_as_pillow_does_and_loaders_keep_the_order(data):
    view, mean, std = im.CleanView(data, 16), [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    for i in range(9):
        with Image.open(data.paths[i]) as file:                         # antialiased
            expected = np.array(file.resize((16, 16), Image.Resampling.BILINEAR), dtype=float)
        x, label = view[i]
        assert abs(x.permute(1, 2, 0).numpy() * std + mean - expected).max() < 1.01     # rounding
        assert torch.equal(im.network_input(data.read(i)[0], 16, "cpu")[0], x) and label == i // 3
    for workers, rank, world, own in ((1, 0, 1, range(9)), (0, 1, 2, [1, 3, 5, 7]), (0, 10, 11, [])):
        cfg = SimpleNamespace(size=16, batch_size=4, workers=workers)
        samples = [pair for batch in clean_loader(data, cfg, "cpu", rank, world) for pair in zip(*batch)]
        assert len(samples) == len(own)
        assert all(torch.equal(x, view[i][0]) and label == i // 3 for (x, label), i in zip(samples, own))


def test_train_views_augment_before_normalising_and_depend_on_their_key_alone(data):
    """The warp is done later, for a batch: here the pixels (x, y) of the output are (y, -x) of the input."""
    turn = torch.tensor([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]])

    def noise(image):
        return (image // 2 + torch.randint(0, 99, image.shape)).to(torch.uint8), turn
    view, before = im.TrainView(data, 16, noise), torch.get_rng_state()
    image, matrix, label = view[(5, 77)]
    assert torch.equal(torch.get_rng_state(), before) and label == 1 and len(view) == 9
    torch.manual_seed(77)
    assert torch.equal(image, noise(view.square(5)[0])[0])
    batch = torch.stack([image, image]), torch.stack([torch.eye(3), matrix]), torch.tensor([1, 1])
    x, _ = im.training_input(batch, "cpu")
    assert torch.equal(x, transforms.normalise(torch.stack([image, image.rot90(-1, (1, 2))])))
    x, _ = im.training_input((batch[0], torch.eye(3).expand(2, 3, 3), batch[2]), "cpu")
    assert torch.equal(x, transforms.normalise(batch[0]))
