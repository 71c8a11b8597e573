"""Data for segmentation: common/{datasets,files,transforms,loaders}.py and data/prepare_cocostuff10k.py.

Held here: mmsegmentation's training pipeline equals a written-out one, draw by draw; a sample depends on
its key alone, whatever the workers; batches resume and ranks share them; every reader reads its layout, and
what is missing or broken is named in one sentence.
"""
import colorsys
import itertools
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common import datasets as ds
from common import files, loaders, run, survey, transforms
from data import prepare_cocostuff10k as prepare
from trees import draw, message, write

MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]))
SIZES = [(40, 56), (40, 56), (33, 57), (1, 40), (100, 20)]


def pairs(image, mask, values, *names):
    """A tree of images of colour 100, and masks of these values."""
    tree = {image.format(name): np.full((*np.shape(values), 3), 100) for name in names}
    return tree | {mask.format(name): values for name in names}


def test_fitted_size_by_hand():
    for arguments, size in (((480, 640, 512), (512, 683)), ((100, 1000, 512), (205, 2048)),     # 4 * 512
                            ((333, 500, 512, 1.999), (1023, 1536)),     # int(512 * 1.999) = 1023
                            ((33, 57, 0, 2.0), (66, 114)), ((1, 900, 64, 0.5), (1, 128))):
        assert transforms.fitted_size(*arguments) == size


def in_hsv(image, change):
    """uint8 (3,H,W) through colorsys; change(h, s, v) gives the new triple. Not rounded, 0..255."""
    pixels = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*p))) for p in image.reshape(3, -1).T / 255]
    return 255 * np.array(pixels).T.reshape(image.shape)


def test_hue_and_saturation_are_rounded_from_colorsys_whatever_the_colour():
    colours = np.array([*itertools.product((0, 1, 2, 90, 97, 254, 255), repeat=3)]).T.reshape(3, 7, 49)
    for steps, factor in itertools.product((-30, -17, -1, 0, 5, 15, 30), (0.5, 1.0, 1.3)):
        turned, scaled = torch.tensor(np.stack([colours, colours]), dtype=torch.float32)
        transforms.shift_hue(turned, steps)
        transforms.scale_saturation(scaled, factor)
        exact = in_hsv(colours, lambda h, s, v: ((h + steps / 180) % 1, s, v))
        assert np.abs(turned.numpy() - exact).max() < 0.5 + 1e-6 and (turned == turned.round()).all()
        exact = in_hsv(colours, lambda h, s, v: (h, min(s * factor, 1), v))
        assert np.abs(scaled.numpy() - exact).max() < 0.5 + 1e-4 and (scaled == scaled.round()).all()


def test_nearest_takes_the_pixels_that_torch_takes():
    for length, resized in np.random.default_rng(0).integers(1, 2048, (200, 2)).tolist():
        expected = F.interpolate(torch.arange(length).float()[None, None], resized)[0, 0]
        assert transforms.nearest(length, resized).tolist() == expected.tolist()


def distorted(x):
    """PhotoMetricDistortion in numpy with the same draws: each step at 1/2, contrast first or last."""
    if draw() < 0.5:
        x = np.floor(np.clip(x + draw(-32, 32), 0, 255))
    contrast, first = draw() < 0.5, draw() < 0.5
    if contrast and first:
        x = np.floor(np.clip(x * draw(0.5, 1.5), 0, 255))
    if draw() < 0.5:
        factor = draw(0.5, 1.5)
        x = np.rint(in_hsv(x, lambda h, s, v: (h, min(s * factor, 1), v)))
    if draw() < 0.5:
        steps = torch.randint(-18, 18, ()).item()
        x = np.rint(in_hsv(x, lambda h, s, v: ((h + steps / 180) % 1, s, v)))
    if contrast and not first:
        x = np.floor(np.clip(x * draw(0.5, 1.5), 0, 255))
    return x


def pipeline(image, mask, size, crop, scale, photometric=True, crop_retries=10):
    """mmsegmentation's, written out with the same draws."""
    height, width = transforms.fitted_size(*mask.shape, size, draw(*scale))
    image = F.interpolate(image[None].float(), (height, width), mode="bilinear")[0].numpy()
    mask = F.interpolate(mask[None, None].float(), (height, width), mode="nearest")[0, 0].numpy()
    for _ in range(crop_retries + 1):
        y, x = (torch.randint(max(side - crop, 0) + 1, ()).item() for side in (height, width))
        window = mask[y:y + crop, x:x + crop]
        counts = np.unique(window[window != 255], return_counts=True)[1]
        if len(counts) > 1 and counts.max() / counts.sum() < 0.75:
            break
    image = image[:, y:y + crop, x:x + crop]
    if draw() < 0.5:
        image, window = image[..., ::-1], window[:, ::-1]
    if photometric:
        image = distorted(image)
    x, y = torch.zeros(3, crop, crop), torch.full((crop, crop), 255)                # padded right and below
    x[:, :image.shape[1], :image.shape[2]] = (torch.from_numpy(image.copy()) - MEAN) / STD
    y[:window.shape[0], :window.shape[1]] = torch.from_numpy(window.copy())
    return x, y


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The `folder` layout with five random pairs in train and in val, two of them narrow."""
    tree, rng = {"classes.txt": "".join(f"{c} class{c}\n" for c in range(4))}, np.random.default_rng(0)
    for split, (i, (height, width)) in itertools.product(("train", "val"), enumerate(SIZES)):
        coarse = rng.choice([0, 1, 2, 3, 255], (height // 8 + 1, width // 8 + 1)).repeat(8, 0).repeat(8, 1)
        mask = coarse[:height, :width] if height > 1 else [[0] * 30 + [1] * 10]         # exactly 75 % of one
        tree |= {f"images/{split}/p{i}.png": rng.integers(0, 256, (height, width, 3)),
                 f"masks/{split}/p{i}.png": mask}
    return write(tmp_path_factory.mktemp("folder"), tree)


@pytest.mark.parametrize("options, within", [
    (dict(size=0, crop=9, scale=(1.0, 1.0)), 2.01),
    (dict(size=31, crop=24, scale=(0.5, 2.0), photometric=False), 1.01),
    (dict(size=0, crop=9, scale=(1.0, 1.0), photometric=False, crop_retries=1), 0.01)])
def test_a_sample_equals_the_written_out_pipeline_and_depends_on_its_key_alone(folder, options, within):
    data = ds.open_dataset("folder", folder, "train")
    view, before = loaders.TrainView(data, **options), torch.get_rng_state()
    samples = [view[(seed % 5, seed)] for seed in range(150)]
    assert torch.equal(torch.get_rng_state(), before)                   # dropout goes on undisturbed
    for seed, sample in enumerate(samples):
        torch.manual_seed(seed)
        image, mask = pipeline(*data.read(seed % 5), **options)
        [on_device] = loaders.to_device({"mask": sample["mask"][None]}, "cpu", "mask")
        assert on_device.dtype == torch.int64 and torch.equal(on_device[0], mask)
        assert sample["mask"].dtype == torch.uint8      # until then
        error = ((sample["image"] - image) * STD).abs()
        assert error.max() <= within and sample["index"] == seed % 5
        assert within < 2 or (error < 0.01).float().mean() > 0.9        # ties of rounding


def test_test_views_keep_the_mask_at_its_own_size(folder):
    data = ds.open_dataset("folder", folder, "val")
    image, mask = data.read(1)
    for size, square, shape in ((30, False, (30, 42)), (33, True, (33, 33)), (0, False, (40, 56))):
        sample = loaders.TestView(data, size, square)[1]
        expected = F.interpolate(image[None].float(), shape, mode="bilinear")[0]
        assert sample["image"].shape == (3, *shape) and torch.equal(sample["mask"], mask)
        assert (sample["image"] * STD + MEAN - expected).abs().max() <= 1.01 and sample["index"] == 1
    assert "--size 0" in message(loaders.TestView, data, 0, square=True)


def test_workers_change_neither_samples_nor_counts_nor_the_shared_generator(folder):
    data, before = ds.open_dataset("folder", folder, "train"), torch.get_rng_state()
    view = loaders.TrainView(data, size=32, crop=24)
    alone, helped = (list(loaders.train_loader(view, 4, 7, 0, 5, workers, "cpu")) for workers in (0, 2))
    assert alone[0]["image"].shape == (4, 3, 24, 24) and alone[0]["mask"].shape == (4, 24, 24)
    for a, b in zip(alone, helped, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("image", "mask", "index"))
    counts = torch.tensor([[(data.read(i)[1] == c).sum() for c in range(4)] for i in range(5)])
    found = survey.read_all(data, SimpleNamespace(workers=2), run.Machine(torch.device("cpu")))
    assert torch.equal(found[0][:4], counts.sum(0)) and torch.equal(found[1], counts > 0)
    assert list(map(tuple, found[2].tolist())) == SIZES and torch.equal(torch.get_rng_state(), before)


def test_batches_resume_ranks_partition_them_and_every_epoch_has_every_sample_once():
    whole = list(loaders.BatchesFrom(5, 8, seed=3, stop=12))            # a batch is more than an epoch
    later = loaders.BatchesFrom(5, 8, seed=3, start=5, stop=12)
    assert list(later) == whole[5:] and len(later) == 7
    parts = [list(loaders.BatchesFrom(5, 8, seed=3, stop=12, rank=r, world=2)) for r in range(2)]
    assert all(a == batch[0::2] and b == batch[1::2] for batch, a, b in zip(whole, *parts, strict=True))
    samples, other = sum(whole, []), sum(loaders.BatchesFrom(5, 8, seed=4, stop=12), [])
    epochs = [tuple(index for index, _ in samples[i:i + 5]) for i in range(0, 95, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs) and len(set(epochs)) > 12
    assert len({seed for _, seed in samples + other}) == 2 * 96         # no augmentation twice
    assert [index for index, _ in other] != [index for index, _ in samples]
    assert [batch.item() for batch in loaders.eval_loader(range(5), 0, "cpu", rank=1, world=2)] == [1, 3]


def test_names_of_the_classes():
    assert ds.NUM_CLASSES == {
        "toy_scenes": 14, "ade20k": 150, "cocostuff10k": 171, "cocostuff164k": 182, "voc": 21,
        "voc_scribble": 21, "cityscapes": 19, "camvid": 11, "em": 2}
    assert all(len(set(names)) == len(names) and all(names) for names in ds.CLASSES.values())
    for name, some in (("ade20k", {0: "wall", 64: "coffee table", 149: "flag"}), ("voc", {15: "person"}),
                       ("cocostuff10k", {0: "person", 79: "toothbrush", 80: "banner", 170: "wood"}),
                       ("cocostuff164k", {91: "banner", 148: "road", 181: "wood"}), ("camvid", {8: "car"})):
        assert {i: ds.CLASSES[name][i] for i in some} == some
    coco, ten = ds.CLASSES["cocostuff164k"], ds.CLASSES["cocostuff10k"]
    unused = [i for i, name in enumerate(coco) if name not in ten]      # as data/README.md says
    assert unused == [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90]


# ---- readers: one tree each ------------------------------------------------------------------------------

VALUES, STROKES, LIST = [[0, 1, 20], [255, 15, 0]], [[0, 255, 20], [255, 255, 15]], "ImageSets/Segmentation/"
VOC = pairs("JPEGImages/{}.jpg", "SegmentationClass/{}.png", VALUES, "07_1", "07_2") | {
    LIST + "train.txt": "07_2\n07_1\n", LIST + "val.txt": "07_1\n",
    LIST + "trainaug.txt": "/JPEGImages/07_2.jpg /SegmentationClassAug/07_2.png\n07_1\n"}
CITY, CITY_MASK = "leftImg8bit/val/{0}/{0}_1_leftImg8bit.png", "gtFine/val/{0}/{0}_1_gtFine_labelIds.png"
CITIES = pairs(CITY, CITY_MASK, [[0, 7, 8, 9], [11, 30, 33, 255]], "ulm", "aachen") | {
    "gtFine/val/ulm/ulm_1_gtFine_color.png": [[0]], "leftImg8bit/val/ulm/overview.png": [[0]]}  # not read
ADE = pairs("images/validation/{}.jpg", "annotations/validation/{}.png", [[0, 1], [150, 255]], "b", "a")
COCO10 = pairs("images/test2014/{}.jpg", "annotations/test2014/{}_labelTrainIds.png", [[0, 1, 171]], "C_1")
COCO_MASK = [[0, 11, 90], [91, 181, 255]]
COCO = pairs("images/val2017/{}.jpg", "annotations/val2017/{}.png", COCO_MASK, "0139") | {
    "annotations/val2017/0139_labelTrainIds.png": [[9]]}                # of other projects, not read
CAMVID = pairs("val/{}.png", "valannot/{}.png", [[0, 10, 11, 255]], "a", "b") | {"val/._a.png": [[0]]}
FOLDER = pairs("images/{}.png", "labels/{}.png", [[0, 1]], "my photo 1", "v1.2", "c") | {
    "train.txt": "v1.2\n\nmy photo 1.png\n", "val.txt": "c\n", "classes.txt": "sky\n3D printer\n"}
PLACES = ["", "VOC2012", "VOCdevkit/VOC2012"]
DOT = ("<annotation><size><width>3</width><height>2</height></size><polygon><tag>bike</tag>"
       "<point><X>0</X><Y>-1</Y></point></polygon></annotation>")       # its disc reaches into the image


def own(folder, values, names=("07_1", "07_2")):
    return {f"{folder}/{name}.png": values for name in names}


@pytest.mark.parametrize("name, split, mask_dir, tree, places, names, mask", [
    ("ade20k", "val", "", ADE, ["", "ADEChallengeData2016"], ["a", "b"], [[255, 0], [149, 255]]),
    ("cocostuff10k", "test", "", COCO10, [""], ["C_1"], [[255, 0, 170]]),
    ("cocostuff164k", "val", "", COCO | own("val2017", [[4]], ["0139"]), [""], ["0139"], COCO_MASK),
    ("cocostuff164k", "val", "", {path.replace("annotations/", ""): values for path, values in COCO.items()},
     [""], ["0139"], COCO_MASK),
    ("cityscapes", "val", "", CITIES, ["", "cityscapes"], ["aachen_1_leftImg8bit", "ulm_1_leftImg8bit"],
     [[255, 0, 1, 255], [2, 255, 18, 255]]),                            # road, pavement, building, bicycle
    ("voc", "trainaug", "", VOC | own("SegmentationClassAug", STROKES), PLACES, ["07_2", "07_1"], STROKES),
    ("voc", "val", "Own", VOC, [""], ["07_1"], VALUES),                 # scored on the full masks
    *[("voc_scribble", "trainaug", "", VOC | own(place, STROKES), [""], ["07_2", "07_1"], STROKES)
      for place in ds.SCRIBBLE_FOLDERS],
    ("voc_scribble", "trainaug", "", VOC | {f"pascal_2012/07_{i}.xml": DOT for i in (1, 2)}, [""],
     ["07_2", "07_1"], [[2, 255, 255], [255, 255, 255]]),               # strokes of ScribbleSup
    ("voc_scribble", "val", "", VOC, [""], ["07_1"], VALUES),
    ("camvid", "val", "", CAMVID, ["", "CamVid"], ["a", "b"], [[0, 10, 255, 255]]),
    ("camvid", "val", "", CAMVID | {"val.txt": "/SegNet/CamVid/val/b.png /SegNet/CamVid/valannot/b.png\n"},
     [""], ["b"], [[0, 10, 255, 255]]),
    ("folder", "train", "", FOLDER, [""], ["v1.2", "my photo 1"], [[0, 1]])])
def test_every_reader_reads_its_layout(tmp_path, name, split, mask_dir, tree, places, names, mask):
    for number, below in enumerate(places):
        write(tmp_path / str(number) / below, tree)
        data = ds.open_dataset(name, str(tmp_path / str(number)), split, mask_dir=mask_dir)
        assert [data.name_of(i) for i in range(len(data))] == names and data.split == split
        image, ids = data.read(0)
        assert image.shape == (3, *np.shape(mask)) and image.dtype == ids.dtype == torch.uint8
        assert ids.tolist() == data.read_mask(0).tolist() == mask and (image == 100).all()
        assert data.classes == (["sky", "3D printer"] if name == "folder" else ds.CLASSES[name])


def test_images_become_upright_rgb_and_palette_masks_are_their_indices(tmp_path):
    picture, exif = Image.fromarray(np.array([[0, 1, 20]], dtype=np.uint8)).convert("P"), Image.Exif()
    picture.putpalette([i * 7 % 256 for i in range(768)])
    picture.save(tmp_path / "palette.png")
    exif[0x0112] = 6                                                    # "turn me by 90 degrees"
    Image.new("RGB", (20, 10)).save(tmp_path / "phone.jpg", exif=exif)
    write(tmp_path, {"grey.PNG": [[0, 9, 200]], "a.png": [[[9, 8, 7, 0]]], "a.txt": "x", "b/c.png": [[0]]})
    paths = files.list_images(tmp_path)
    assert [p.name for p in paths] == ["a.png", "grey.PNG", "palette.png", "phone.jpg"]
    alpha, grey, palette, phone = map(files.read_image, paths)
    assert alpha.flatten().tolist() == [9, 8, 7] and grey.tolist() == [[[0, 9, 200]]] * 3
    assert palette[:, 0, 1].tolist() == [21, 28, 35] and phone.shape == (3, 20, 10)
    assert files.read_index_map(paths[2], 21).tolist() == [[0, 1, 20]]
    assert "gone does not exist" in message(files.list_images, tmp_path / "gone")


@pytest.mark.parametrize("below, stacks", [("", True), ("train", False)])
def test_em_is_cut_twice_into_two_thirds_and_one_third(tmp_path, below, stacks):
    """Image i has the value 3 i, its label is membrane (0) or cell (255) in turn."""
    for kind, file, step in (("image", "train-volume.tif", 3), ("label", "train-labels.tif", 255)):
        arrays = [np.full((4, 6), step * (i if kind == "image" else i % 2), np.uint8) for i in range(30)]
        if stacks:
            first, *others = map(Image.fromarray, arrays)
            first.save(tmp_path / file, save_all=True, append_images=others)
        else:
            write(tmp_path / below, {f"{kind}/{i}.png": array for i, array in enumerate(arrays)})
    names = {}
    for split in ds.SPLITS["em"]:
        data = ds.open_dataset("em", tmp_path, split)
        names[split] = [int(data.name_of(i)) for i in range(len(data))]
        for i, number in enumerate(names[split]):
            image, mask = data.read(i)
            assert image.shape == (3, 4, 6) and (image == 3 * number).all() and (mask == number % 2).all()
    for cut in "12":
        assert sorted(names[f"train-{cut}"] + names[f"val-{cut}"]) == list(range(30))
    assert names["val-1"] == [4, 6, 8, 12, 17, 18, 19, 20, 23, 25]      # fixed: scores depend on it
    assert names["val-2"] == [2, 3, 9, 16, 17, 18, 20, 23, 24, 27]
    if stacks:
        (tmp_path / file).unlink()
        assert "train-labels.tif is missing" in message(ds.open_dataset, "em", tmp_path, "train-1")


def test_masks_may_lie_in_a_folder_below_root_or_anywhere_else(tmp_path, monkeypatch):
    root = write(tmp_path / "voc", VOC | own("inside", STROKES))
    write(tmp_path, own("mine", STROKES) | own("inside", VALUES) | own("SegmentationClassAug", VALUES))
    monkeypatch.chdir(tmp_path)
    for name in ("voc", "voc_scribble"):
        for mask_dir in (tmp_path / "mine", "mine", "inside"):
            assert ds.open_dataset(name, root, "train", mask_dir=mask_dir).read_mask(0).tolist() == STROKES
        assert "the folder no/ is missing" in message(ds.open_dataset, name, root, "train", mask_dir="no")
    assert "SBD" in message(ds.open_dataset, "voc", root, "trainaug")   # not of the current folder
    write(tmp_path, PAIRED | own("flat", RAMP % 2, ("p0", "p1")) | own("deep/train", RAMP % 2, ("p0", "p1")))
    for mask_dir in ("flat", "deep"):
        data = ds.open_dataset("folder", tmp_path, "train", mask_dir=mask_dir)
        assert data.read_mask(0).tolist() == (RAMP % 2).tolist()


# ---- readers: what is missing or broken ------------------------------------------------------------------

NOISE, RAMP = np.random.default_rng(0).integers(0, 255, (40, 56, 3)), np.arange(2240).reshape(40, 56)
PAIRED = pairs("images/train/{}.png", "masks/train/{}.png", RAMP % 4, "p0", "p1") | {
    "classes.txt": "0 sky\n1 wet road\n2 sea\n3 tree\n255 ignore\n"}
P0, CITY_0 = "masks/train/p0.png", CITY_MASK.format("aachen")


def gone(tree, path):
    return {p: content for p, content in tree.items() if not p.startswith(path)}


@pytest.mark.parametrize("name, split, tree, words", [
    ("ade20k", "val", ADE | {"annotations/validation/a.png": [[0, 151]] * 2}, r"\[151\].* 0\.\.150 "),
    ("cocostuff10k", "train", {"imageLists/train.txt": ""}, "python -m data.prepare_cocostuff10k /"),
    ("cityscapes", "val", gone(CITIES, "gtFine/val/ulm"), "gtFine/val/ulm/ is missing"),
    ("cityscapes", "val", CITIES | {CITY_0: np.full((2, 4), 263, np.uint16)}, rf"{CITY_0} .*\[263\]"),
    ("voc", "trainaug", VOC, "SegmentationClassAug/ is missing .10,582 names.*SBD"),
    ("voc_scribble", "trainaug", gone(VOC, LIST + "trainaug"), "trainaug.txt is missing .10,582.* train"),
    ("voc_scribble", "train", VOC, "no folder of scribbles .ScribbleLabels, voc_scribbles.*jifengdai.org"),
    ("em", "val-1", pairs("image/{}.png", "label/{}.png", [[254]], *"123"), r"\[254\]"),
    ("folder", "train", gone(PAIRED, "masks/train/p1"), "1 of 2 images .*/p1.png, .*masks/train/p1.png"),
    ("folder", "train", PAIRED | {"images/train/p1.jpg": NOISE}, "both p1.jpg and p1.png"),
    ("folder", "train", PAIRED | {"classes.txt": "1 sky\n2 road\n"}, "classes.txt: the ids .* are 1, 2"),
    ("folder", "train", PAIRED | {P0: RAMP % 40}, r"\[4, 5, 6, 7, 8\] and 31 more, but .* 0..3 .*convert"),
    ("folder", "train", PAIRED | {P0: NOISE}, "p0.png is a colour picture .mode RGB")])
def test_what_is_missing_or_broken_is_named(tmp_path, name, split, tree, words):
    said = message(lambda: ds.open_dataset(name, write(tmp_path, tree), split).read(0))
    assert re.search(words, said) and str(tmp_path) in said


def test_damage_is_named_and_the_sentence_survives_a_worker(tmp_path):
    data, path = ds.open_dataset("folder", write(tmp_path, PAIRED), "train"), tmp_path / P0
    path.write_bytes(path.read_bytes()[:60])
    said = message(list, loaders.eval_loader(loaders.TestView(data, 32), 1, "cpu"))
    assert f"{path} cannot be read" in said and said == message(data.read, 0)
    path.unlink()
    assert f"{path} does not exist" in message(data.read, 0)


@pytest.mark.parametrize("name", list(ds.TREES))
def test_a_missing_layout_shows_the_tree_the_content_and_the_source(tmp_path, name):
    write(tmp_path, {f"thing{i}/x.txt": "" for i in range(10)})
    said = message(ds.open_dataset, name, tmp_path, ds.SPLITS[name][0])
    assert all(part in said for part in (*ds.TREES[name], str(tmp_path), "thing0/", "thing7/ and 2 more"))


@pytest.mark.parametrize("arguments, words", [
    (("ade", "x", "train"), "toy_scenes, ade20k"), (("em", "x", "train"), "train-1, val-1, train-2, val-2"),
    *[((name, "x", "test"), "not public") for name in ("cityscapes", "voc", "voc_scribble")],
    (("camvid", "", "train"), "--data ROOT"), (("toy_scenes", "x", "train"), "read x: .*dataset folder"),
    (("ade20k", "x", "train", 0, "scribbles"), "no masks 'scribbles'")])
def test_wrong_names_and_options_are_one_sentence(arguments, words):
    assert re.search(words, message(ds.open_dataset, *arguments))


# ---- data/prepare_cocostuff10k.py ------------------------------------------------------------------------

@pytest.fixture
def download(tmp_path, monkeypatch):
    """A tiny COCO-Stuff10K as downloaded; scipy is replaced by a reader of text."""
    fake = SimpleNamespace(loadmat=lambda path, variable_names: {"S": np.loadtxt(path, np.uint16, ndmin=2)})
    monkeypatch.setitem(sys.modules, "scipy.io", fake)
    used = [i for i in range(183) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)]
    tree = {f"images/C_{i}.jpg": np.zeros((1, 172, 3)) for i in (1, 2, 3)}
    tree |= {f"annotations/C_{i}.mat": " ".join(map(str, used)) for i in (1, 2, 3)}
    return write(tmp_path, tree | {"imageLists/train.txt": "C_1\nC_3\n", "imageLists/test.txt": "C_2\n"})


def test_prepare_converts_leaves_the_download_and_goes_on_where_it_stopped(download, capsys):
    before = {p: p.read_bytes() for p in download.rglob("*") if p.is_file()}
    prepare.main([str(download)])
    assert "2 training and 1 test" in capsys.readouterr().out
    assert all(p.read_bytes() == content for p, content in before.items())
    train, test = (ds.open_dataset("cocostuff10k", download, split) for split in ("train", "test"))
    assert [train.name_of(i) for i in range(2)] == ["C_1", "C_3"] and len(test) == 1
    assert train.read(0)[1].tolist() == [[255, *range(171)]]
    kept, lost = (mask for _, mask in train.paths)
    kept.write_bytes(b"kept")
    lost.unlink()
    prepare.main([str(download)])
    assert kept.read_bytes() == b"kept" and lost.exists() and not list(download.rglob("*.tmp"))


@pytest.mark.parametrize("tree, words", [
    ({"annotations/C_1.mat": "1 26 200"}, r"C_1.mat: .*\[26, 200\]"),
    ({"annotations/C_1.mat": "no matrix"}, "C_1.mat cannot be read"),
    ({"imageLists/train.txt": "C_1\nC_4\n"}, "C_4"), ({}, "pip install scipy")])
def test_prepare_ends_with_one_sentence(download, capsys, monkeypatch, tree, words):
    write(download, tree)
    if not tree:
        monkeypatch.setitem(sys.modules, "scipy.io", None)              # as if scipy were not installed
    with pytest.raises(SystemExit) as stopped:
        prepare.main([str(download)])
    assert stopped.value.code == 2 and re.search(words, capsys.readouterr().err.splitlines()[-1])
