"""common/{datasets,files,transforms,loaders}.py against numpy, colorsys and brute force.

Tiny data sets are written to tmp_path.
"""
import colorsys
import itertools
import math
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import Cityscapes
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from common import datasets as ds
from common import files, loaders, toy_scenes, transforms
from common.run import UserError
from data import prepare_cocostuff10k as prepare
from pixels import denormalise

REPO = Path(__file__).parent.parent


def random_image(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def random_mask(height, width, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = height // 8 + 1, width // 8 + 1
    coarse = torch.randint(0, classes, size, dtype=torch.uint8, generator=generator)
    return coarse.repeat_interleave(8, 0).repeat_interleave(8, 1)[:height, :width].contiguous()


def save(path, array):
    """Write an array (H,W) or (H,W,3) as an image file; makes the folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path)


def save_pair(image_path, mask_path, mask=None, size=(6, 8)):
    mask = np.zeros(size) if mask is None else np.asarray(mask)
    save(image_path, np.full((*mask.shape, 3), 100))
    save(mask_path, mask)


def folder_set(root, splits=("train", "val"), count=3, classes=4, height=40, width=56):
    """The `folder` layout with random images and masks."""
    for split in splits:
        for i in range(count):
            seed = 100 * splits.index(split) + i
            save(root / "images" / split / f"p{i}.png", random_image(height, width, seed).permute(1, 2, 0))
            save(root / "masks" / split / f"p{i}.png", random_mask(height, width, classes, seed))
    (root / "classes.txt").write_text("".join(f"{c} class{c}\n" for c in range(classes)))
    return root


def message(call, *args, **kwargs):
    """The sentence of the UserError that call(...) must raise: one line."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and "Traceback" not in text
    return text


# ---- sizes, crops, padding -------------------------------------------------------------------------------

def test_fitted_size_by_hand():
    assert transforms.fitted_size(480, 640, 512) == (512, 683)  # short side 512; 640 * 512/480 = 682.67
    assert transforms.fitted_size(640, 480, 512) == (683, 512)
    assert transforms.fitted_size(100, 1000, 512) == (205, 2048)           # the long side stops at 4 * 512
    assert transforms.fitted_size(480, 640, 512, 0.5) == (256, 341)
    assert transforms.fitted_size(333, 500, 512, 1.999) == (1023, 1536)        # int(512 * 1.999) = 1023
    assert transforms.fitted_size(33, 57, 0) == (33, 57)
    assert transforms.fitted_size(33, 57, 0, 2.0) == (66, 114)
    assert transforms.fitted_size(1, 900, 64, 0.5) == (1, 128)
    assert transforms.fitted_size(900, 1, 64, 0.5) == (128, 1)


def test_fitted_size_is_the_largest_that_fits():
    rng = np.random.default_rng(0)
    for _ in range(300):
        h, w = rng.integers(20, 1500, 2).tolist()
        size, ratio = int(rng.integers(64, 600)), float(rng.uniform(0.5, 2))
        long_limit, short_limit = math.floor(4 * size * ratio), math.floor(size * ratio)
        new_h, new_w = transforms.fitted_size(h, w, size, ratio)
        assert max(new_h, new_w) <= long_limit and min(new_h, new_w) <= short_limit
        assert max(new_h, new_w) == long_limit or min(new_h, new_w) == short_limit
        assert abs(new_h - new_w * h / w) <= 0.5 + 0.5 * h / w + 1e-6  # aspect kept up to the rounding


def test_resizing_is_bilinear_without_antialiasing_and_nearest_for_masks():
    h, w, image, mask = 37, 50, random_image(37, 50), random_mask(37, 50)
    out, labels = transforms.augment(image, mask, size=20, crop=64, scale=(1.0, 1.0), photometric=False)
    new_h, new_w = 20, 27
    ys, xs = ((np.arange(n) + 0.5) * old / n - 0.5 for n, old in ((new_h, h), (new_w, w)))
    expected = np.zeros((3, new_h, new_w))
    for i, j in itertools.product(range(new_h), range(new_w)):
        y0, x0 = math.floor(max(ys[i], 0)), math.floor(max(xs[j], 0))
        dy, dx = max(ys[i], 0) - y0, max(xs[j], 0) - x0
        y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
        a = image.numpy().astype(float)
        expected[:, i, j] = ((1 - dy) * ((1 - dx) * a[:, y0, x0] + dx * a[:, y0, x1])
                             + dy * ((1 - dx) * a[:, y1, x0] + dx * a[:, y1, x1]))
    nearest = mask.numpy()[(np.arange(new_h) * h // new_h)[:, None], np.arange(new_w) * w // new_w]
    got = denormalise(out)[:, :new_h, :new_w].numpy().astype(float)
    got_labels = labels[:new_h, :new_w].numpy()
    if (got_labels != nearest).any():                                   # this sample was flipped
        got, got_labels = got[:, :, ::-1], got_labels[:, ::-1]
    assert (got_labels == nearest).all()
    assert abs(got - expected).max() <= 1.0  # fixed-point rounding of the uint8 kernel


def rule_holds(window):
    values, counts = np.unique(window[window != 255], return_counts=True)
    return len(values) >= 2 and counts.max() / counts.sum() < 0.75


def test_crop_rule_equals_brute_force():
    mask = torch.zeros(90, 120, dtype=torch.uint8)
    mask[60:, 80:] = 1  # only crops at the lower right are mixed
    mask[:10] = 255
    kept = 0
    for seed in range(200):
        torch.manual_seed(seed)
        draws = [(torch.randint(61, ()).item(), torch.randint(91, ()).item()) for _ in range(11)]
        good = [(y, x) for y, x in draws if rule_holds(mask[y:y + 30, x:x + 30].numpy())]
        torch.manual_seed(seed)
        assert transforms.crop_corner(mask, 30) == (good or draws[-1:])[0]
        kept += bool(good)
    assert 20 < kept < 200                                              # both outcomes were seen


@pytest.mark.parametrize("mask, draws", [
    (torch.zeros(9, 9), 11),  # one class: 10 retries, then taken as it is
    (torch.full((9, 9), 255), 11),
    (torch.tensor([0] * 75 + [1] * 25).view(10, 10), 11),               # exactly 75 % is too much
    (torch.tensor([0] * 74 + [1] * 26).view(10, 10), 1),
    (torch.tensor([255] * 90 + [0] * 5 + [1] * 5).view(10, 10), 1),     # 255 is no class
    (torch.tensor([255] * 90 + [0] * 10).view(10, 10), 11),
])
def test_number_of_crop_tries(mask, draws):
    torch.manual_seed(3)
    transforms.crop_corner(mask.to(torch.uint8), 10)                      # the whole mask is the only window
    after = torch.get_rng_state()
    torch.manual_seed(3)
    for _ in range(2 * draws):
        torch.randint(1, ())
    assert torch.equal(after, torch.get_rng_state())


def test_image_smaller_than_the_crop_is_padded_right_and_below():
    image, mask = random_image(21, 34), random_mask(21, 34)
    x, y = transforms.augment(image, mask, size=0, crop=50, scale=(1.0, 1.0), photometric=False)
    assert x.shape == (3, 50, 50) and x.dtype == torch.float32 and y.shape == (50, 50)
    assert (x[:, 21:] == 0).all() and (x[:, :, 34:] == 0).all()
    assert (y[21:] == 255).all() and (y[:, 34:] == 255).all()
    flipped = not torch.equal(y[:21, :34], mask)
    inside = x[:, :21, :34].flip(2) if flipped else x[:, :21, :34]
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    expected = (image.numpy() - mean[:, None, None]) / std[:, None, None]
    assert abs(inside.numpy() - expected).max() < 1e-5


def test_image_and_mask_stay_together_and_half_are_flipped():
    mask = torch.arange(60 * 90).view(60, 90).remainder(251).to(torch.uint8)
    mask[:, ::2] = 7  # an odd pattern, never its own mirror image
    image = mask.expand(3, -1, -1)
    flips = 0
    for seed in range(100):
        torch.manual_seed(seed)
        x, y = transforms.augment(image, mask, size=0, crop=32, scale=(1.0, 1.0), photometric=False)
        assert torch.equal(denormalise(x)[0], y)
        windows = mask.unfold(0, 32, 1).unfold(1, 32, 1)                # every upright crop
        flips += not (windows == y).flatten(2).all(2).any()
    assert 30 < flips < 70


@pytest.mark.parametrize("height, width, size, crop",
                         [(33, 57, 64, 48), (1, 40, 16, 8), (300, 20, 32, 65), (64, 64, 0, 64)])
def test_odd_sizes_work(height, width, size, crop):
    for seed in range(8):
        torch.manual_seed(seed)
        x, y = transforms.augment(random_image(height, width), random_mask(height, width), size, crop)
        assert x.shape == (3, crop, crop) and y.shape == (crop, crop) and torch.isfinite(x).all()


# ---- colours ---------------------------------------------------------------------------------------------

def hsv_reference(pixels, change):
    """Pixels (3,n) uint8 through colorsys; change(h, s, v) gives the new triple. Not rounded."""
    rows = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*(p / 255.0)))) for p in pixels.T]
    return 255 * np.array(rows).T


@pytest.mark.parametrize("steps", [-18, -7, 0, 1, 17])
def test_hue_steps_are_two_degrees(steps):
    pixels = random_image(1, 2000)[:, 0]
    pixels[:, :3] = torch.tensor([[0, 255, 77], [0, 255, 77], [0, 255, 77]], dtype=torch.uint8)       # grey
    expected = hsv_reference(pixels.numpy(), lambda h, s, v: ((h + steps / 180) % 1, s, v))
    got = transforms.shift_hue(pixels[:, None], steps)[:, 0].numpy()
    assert abs(got - expected).max() <= 0.5 + 1e-3
    assert (got[:, :3] == pixels[:, :3].numpy()).all()
    assert steps or (got == pixels.numpy()).all()


def test_hue_of_pure_colours():
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1)
    assert transforms.shift_hue(red, 30).flatten().tolist() == [255, 255, 0]    # 60 degrees on: yellow
    assert transforms.shift_hue(red, -30).flatten().tolist() == [255, 0, 255]
    assert transforms.shift_hue(red, 15).flatten().tolist() == [255, 128, 0]


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.0, 1.5])
def test_saturation(factor):
    pixels = random_image(1, 2000)[:, 0]
    expected = hsv_reference(pixels.numpy(), lambda h, s, v: (h, min(s * factor, 1), v))
    got = transforms.scale_saturation(pixels[:, None], factor)[:, 0].numpy()
    assert abs(got - expected).max() <= 0.5 + 1e-3
    assert factor != 1 or (got == pixels.numpy()).all()


def test_brightness_and_contrast_are_clipped_and_cut():
    values = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    for factor, shift in ((1.0, -31.7), (1.0, 20.4), (1.49, 0.0), (0.5, 0.0)):
        expected = np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(shift)
        got = transforms.scale_values(values, factor, shift)
        assert got.dtype == torch.uint8 and (got.numpy() == np.floor(np.clip(expected, 0, 255))).all()


def test_colours_unchanged_if_every_coin_says_no(monkeypatch):
    monkeypatch.setattr(transforms, "coin", lambda: False)
    image = random_image(20, 20)
    assert torch.equal(transforms.distort_colours(image), image)


@pytest.mark.parametrize("contrast_first", [True, False])
def test_order_of_the_colour_steps(monkeypatch, contrast_first):
    coins = iter([True, True, contrast_first, True, True])     # brightness, contrast, first?, saturation, hue
    steps = []
    monkeypatch.setattr(transforms, "coin", lambda: next(coins))
    monkeypatch.setattr(transforms, "scale_values",
                        lambda x, factor=1.0, shift=0.0: steps.append((factor, shift)) or x)
    monkeypatch.setattr(transforms, "scale_saturation", lambda x, factor: steps.append("saturation") or x)
    monkeypatch.setattr(transforms, "shift_hue", lambda x, n: steps.append("hue") or x)
    transforms.distort_colours(random_image(4, 4))
    assert steps.pop(0)[0] == 1.0                                       # brightness: a shift
    factor, shift = steps.pop(0 if contrast_first else -1)
    assert shift == 0.0 and factor != 1.0
    assert steps == ["saturation", "hue"]


def test_colour_ranges_and_probabilities(monkeypatch):
    seen = {"brightness": [], "contrast": [], "saturation": [], "hue": []}

    def scale_values(image, factor=1.0, shift=0.0):
        seen["contrast" if shift == 0 else "brightness"].append(factor if shift == 0 else shift)
        return image
    monkeypatch.setattr(transforms, "scale_values", scale_values)
    monkeypatch.setattr(transforms, "scale_saturation",
                        lambda x, factor: seen["saturation"].append(factor) or x)
    monkeypatch.setattr(transforms, "shift_hue", lambda x, n: seen["hue"].append(n) or x)
    torch.manual_seed(0)
    image = random_image(2, 2)
    for _ in range(2000):
        transforms.distort_colours(image)
    for name, low, high in (("brightness", -32, 32), ("contrast", 0.5, 1.5), ("saturation", 0.5, 1.5)):
        edge = 0.02 * (high - low)
        assert low <= min(seen[name]) < low + edge and high - edge < max(seen[name]) <= high
    assert set(seen["hue"]) == set(range(-18, 18))
    assert all(900 < len(values) < 1100 for values in seen.values())    # each with probability 1/2


def test_normalise_by_hand_and_back():
    image = torch.tensor([0, 124, 255], dtype=torch.uint8).view(3, 1, 1)
    expected = [(0 - 123.675) / 58.395, (124 - 116.28) / 57.12, (255 - 103.53) / 57.375]
    assert transforms.normalise(image).flatten().tolist() == pytest.approx(expected)
    image = random_image(9, 7)
    assert torch.equal(denormalise(transforms.normalise(image)), image)


# ---- views and loaders -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_set(tmp_path_factory.mktemp("folder"), count=5)


def same(a, b):
    return all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in ("image", "mask", "index"))


def test_train_view_depends_on_its_key_alone(folder):
    data = ds.open_dataset("folder", folder, "train")
    view = loaders.TrainView(data, size=32, crop=24)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = view[(2, 77)]
    assert torch.equal(torch.get_rng_state(), before)                   # dropout goes on undisturbed
    torch.manual_seed(2)
    assert same(a, view[(2, 77)])
    assert not same(a, view[(2, 78)])
    assert a["image"].dtype == torch.float32 and a["image"].shape == (3, 24, 24)
    assert a["mask"].dtype == torch.int64 and a["mask"].shape == (24, 24) and a["index"] == 2


def test_train_view_restores_the_generator_after_an_error(tmp_path):
    data = ds.open_dataset("folder", folder_set(tmp_path), "train")
    view = loaders.TrainView(data, size=32, crop=24, scale=("a", "b"))
    before = torch.get_rng_state()
    with pytest.raises(TypeError):
        view[(0, 1)]
    assert torch.equal(torch.get_rng_state(), before)


def test_test_view_keeps_the_mask_at_its_own_size(folder):
    data = ds.open_dataset("folder", folder, "val")
    sample = loaders.TestView(data, 30)[1]
    image, mask = data.read(1)
    assert sample["image"].shape == (3, 30, 42) and sample["index"] == 1
    assert sample["mask"].dtype == torch.int64 and torch.equal(sample["mask"], mask.long())
    assert torch.equal(loaders.TestView(data, 0)[1]["image"], transforms.normalise(image))
    narrow = transforms.resize_whole(random_image(10, 100), 32)
    assert narrow.shape == (3, 13, 128)                                 # long side <= 4 * 32


def test_square_test_view_ignores_the_aspect(folder):
    data = ds.open_dataset("folder", folder, "val")
    sample, (image, mask) = loaders.TestView(data, 33, square=True)[1], data.read(1)
    assert sample["image"].shape == (3, 33, 33) and torch.equal(sample["mask"], mask.long())
    expected = torch.nn.functional.interpolate(image[None].float(), (33, 33), mode="bilinear")[0]
    assert (denormalise(sample["image"]).float() - expected).abs().max() <= 1   # from 40 x 56
    assert "--size 0" in message(loaders.TestView, data, 0, square=True)


@pytest.mark.parametrize("options, draws", [({}, 11), ({"crop_retries": 2}, 3), ({"crop_retries": 0}, 1)])
def test_crop_retries_of_the_train_view(tmp_path, options, draws):
    mask = np.zeros((50, 70))
    mask[30:, 50:] = 1                                                  # few crops have both classes
    mask[0] = np.arange(70)                                             # no two places of row 0 are alike
    save_pair(tmp_path / "images" / "train" / "a.png", tmp_path / "masks" / "train" / "a.png", mask)
    (tmp_path / "classes.txt").write_text("".join(f"c{i}\n" for i in range(70)))
    data = ds.open_dataset("folder", tmp_path, "train")
    view, drawn = loaders.TrainView(data, 0, 20, (1.0, 1.0), photometric=False, **options), set()
    for seed in range(60):
        torch.manual_seed(seed)
        torch.rand(())                                                  # the scale
        for k in range(draws):
            y, x = torch.randint(31, ()).item(), torch.randint(51, ()).item()
            if rule_holds(mask[y:y + 20, x:x + 20]):
                break
        window = mask[y:y + 20, x:x + 20]
        window = window[:, ::-1] if torch.rand(()).item() < 0.5 else window
        assert (view[(0, seed)]["mask"].numpy() == window).all()
        drawn.add(k + 1)
    assert {1, draws} <= drawn


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(folder, workers):
    view = loaders.TrainView(ds.open_dataset("folder", folder, "train"), size=32, crop=24)
    before = torch.get_rng_state()
    alone = list(loaders.train_loader(view, 4, 7, 0, 5, 0, "cpu"))
    helped = list(loaders.train_loader(view, 4, 7, 0, 5, workers, "cpu"))
    assert len(alone) == len(helped) == 5
    assert alone[0]["image"].shape == (4, 3, 24, 24) and alone[0]["mask"].shape == (4, 24, 24)
    assert all(same(a, b) for a, b in zip(alone, helped))
    assert torch.equal(torch.get_rng_state(), before)  # loaders draw from no shared generator


def test_resumed_loader_goes_on_with_the_same_samples(folder):
    view = loaders.TrainView(ds.open_dataset("folder", folder, "train"), size=32, crop=24)
    whole = list(loaders.train_loader(view, 3, 5, 0, 6, 0, torch.device("cpu")))
    rest = list(loaders.train_loader(view, 3, 5, 4, 6, 0, torch.device("cpu")))
    assert len(rest) == 2 and all(same(a, b) for a, b in zip(whole[4:], rest))


def test_batches_resume_and_partition():
    whole = list(loaders.BatchesFrom(10, 4, seed=3, stop=12))
    assert len(loaders.BatchesFrom(10, 4, seed=3, start=5, stop=12)) == 7
    assert list(loaders.BatchesFrom(10, 4, seed=3, start=5, stop=12)) == whole[5:]
    endless = loaders.BatchesFrom(10, 4, seed=3, start=5)
    assert list(itertools.islice(endless, 7)) == whole[5:]
    parts = [list(loaders.BatchesFrom(10, 4, seed=3, stop=12, rank=r, world=2)) for r in range(2)]
    for batch, a, b in zip(whole, *parts):
        assert a == batch[0::2] and b == batch[1::2]


def test_every_epoch_has_every_sample_once():
    samples = [pair for batch in loaders.BatchesFrom(10, 4, seed=3, stop=15) for pair in batch]   # 6 epochs
    epochs = [[index for index, _ in samples[i:i + 10]] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6                 # each in its own order
    assert len({seed for _, seed in samples}) == 60                     # and no augmentation twice
    other = [pair for batch in loaders.BatchesFrom(10, 4, seed=4, stop=15) for pair in batch]
    assert not {seed for _, seed in samples} & {seed for _, seed in other}
    assert [index for index, _ in other] != [index for index, _ in samples]


def test_batch_larger_than_the_data_set():
    batch = next(iter(loaders.BatchesFrom(3, 7, seed=0, stop=1)))
    assert len(batch) == 7
    assert sorted(i for i, _ in batch[:3]) == sorted(i for i, _ in batch[3:6]) == [0, 1, 2]


def test_evaluation_ranks_partition_the_images(folder):
    view = loaders.TestView(ds.open_dataset("folder", folder, "val"), 0)
    seen = [[batch["index"].item() for batch in loaders.eval_loader(view, 0, "cpu", rank, 2)]
            for rank in range(2)]
    assert seen == [[0, 2, 4], [1, 3]]
    batch = next(iter(loaders.eval_loader(view, 2, "cpu")))
    assert batch["image"].shape == (1, 3, 40, 56) and batch["mask"].shape == (1, 40, 56)


def test_pixel_counts(folder):
    data = ds.open_dataset("folder", folder, "train")
    masks = [np.array(Image.open(folder / "masks" / "train" / f"p{i}.png")) for i in range(5)]
    expected = [sum(int((m == c).sum()) for m in masks) for c in range(4)]
    assert loaders.pixel_counts(data).tolist() == loaders.pixel_counts(data, workers=2).tolist() == expected


# ---- readers ---------------------------------------------------------------------------------------------

def test_names_of_the_classes():
    assert ds.NUM_CLASSES == {"toy_scenes": len(toy_scenes.CLASSES), "ade20k": 150, "cocostuff10k": 171,
                              "cocostuff164k": 182, "voc": 21, "voc_scribble": 21, "cityscapes": 19,
                              "camvid": 11, "em": 2}
    assert all(len(set(names)) == len(names) and all(names) for names in ds.CLASSES.values())
    ade, coco = ds.CLASSES["ade20k"], ds.CLASSES["cocostuff10k"]
    assert ade[0] == "wall" and ade[64] == "coffee table" and ade[149] == "flag"
    assert coco[0] == "person" and coco[79] == "toothbrush" and coco[80] == "banner" and coco[170] == "wood"
    assert ds.CLASSES["voc"][15] == "person" and ds.CLASSES["camvid"][8] == "car"


def test_names_of_cocostuff164k_are_those_of_coco():
    names = ds.CLASSES["cocostuff164k"]
    coco = FasterRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"]     # by COCO's id; N/A: not used
    assert all(coco[i] in (names[i - 1], "N/A") for i in range(1, 91)) and len(names) == 182
    unused = {11: "street sign", 25: "hat", 28: "shoe", 29: "eye glasses", 44: "plate", 65: "mirror",
              67: "window", 68: "desk", 70: "door", 82: "blender", 90: "hair brush"}
    assert {i: name for i, name in enumerate(names) if name not in ds.CLASSES["cocostuff10k"]} == unused
    assert [i - 1 for i in range(1, 91) if coco[i] == "N/A"] == [i for i in unused if i < 90]
    stuff = {91: "banner", 123: "grass", 148: "road", 156: "sky-other", 168: "tree", 181: "wood"}
    assert all(names[i] == name for i, name in stuff.items())


@pytest.mark.parametrize("below", ["", "ADEChallengeData2016"])
def test_ade20k(tmp_path, below):
    raw = [[0, 1, 2], [149, 150, 255]]
    root = tmp_path / below
    for part in ("training", "validation"):
        save_pair(root / "images" / part / "ADE_b.jpg", root / "annotations" / part / "ADE_b.png", raw)
        save_pair(root / "images" / part / "ADE_a.jpg", root / "annotations" / part / "ADE_a.png", raw)
    data = ds.open_dataset("ade20k", str(tmp_path), "val")
    assert len(data) == 2 and data.num_classes == 150 and data.name_of(0) == "ADE_a"
    image, mask = data.read(0)
    assert image.shape == (3, 2, 3) and image.dtype == mask.dtype == torch.uint8
    assert mask.tolist() == [[255, 0, 1], [148, 149, 255]]
    assert "choose one of train, val" in message(ds.open_dataset, "ade20k", tmp_path, "test")


def test_cocostuff10k(tmp_path):
    for split in ("train2014", "test2014"):
        save_pair(tmp_path / "images" / split / "COCO_1.jpg",
                  tmp_path / "annotations" / split / "COCO_1_labelTrainIds.png", [[0, 1, 171]])
    data = ds.open_dataset("cocostuff10k", tmp_path, "test")
    assert data.num_classes == 171 and data.read(0)[1].tolist() == [[255, 0, 170]]
    assert "choose one of train, test" in message(ds.open_dataset, "cocostuff10k", tmp_path, "val")


@pytest.mark.parametrize("masks", ["annotations", ""])
def test_cocostuff164k(tmp_path, masks):
    for part in ("train2017", "val2017"):
        save_pair(tmp_path / "images" / part / "000000000139.jpg",
                  tmp_path / masks / part / "000000000139.png", [[0, 11, 90], [91, 181, 255]])
        save(tmp_path / masks / part / "000000000139_labelTrainIds.png", np.zeros((2, 3)))     # not read
    for split in ("train", "val"):
        data = ds.open_dataset("cocostuff164k", tmp_path, split)
        assert len(data) == 1 and data.num_classes == 182 and data.name_of(0) == "000000000139"
        assert data.read(0)[1].tolist() == [[0, 11, 90], [91, 181, 255]]
    if masks:                                                           # COCO's own folder does no harm
        save(tmp_path / "val2017" / "000000000139.png", np.full((2, 3), 4))
        assert ds.open_dataset("cocostuff164k", tmp_path, "val").read(0)[1].tolist()[1] == [91, 181, 255]
    save(tmp_path / masks / "val2017" / "000000000139.png", [[0, 11, 90], [91, 181, 182]])
    text = message(data.read, 0)
    assert "000000000139.png" in text and "[182]" in text


def cityscapes_set(root, labels=((7, 8),), cities=("aachen", "ulm")):
    """Two cities whose images have the same numbers; among the masks lie the other files of the download."""
    for split, city in itertools.product(("train", "val"), cities):
        stem = f"{city}_000001_000019"
        save_pair(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png",
                  root / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png", labels)
        save(root / "gtFine" / split / city / f"{stem}_gtFine_color.png", np.zeros((1, 2, 3)))
        save(root / "gtFine" / split / city / f"{stem}_gtFine_instanceIds.png", np.zeros((1, 2)))
        save(root / "leftImg8bit" / split / city / "overview.png", np.zeros((1, 2)))       # not read
    return root


@pytest.mark.parametrize("below", ["", "cityscapes"])
def test_cityscapes(tmp_path, below):
    labels = [*range(34), 255]
    cityscapes_set(tmp_path / below, np.array(labels).reshape(5, 7))
    data = ds.open_dataset("cityscapes", tmp_path, "val")
    assert data.num_classes == 19
    assert [data.name_of(i) for i in range(len(data))] == [f"{city}_000001_000019_leftImg8bit"
                                                           for city in ("aachen", "ulm")]
    train_id = {c.id: c.train_id if 0 <= c.train_id < 19 else 255 for c in Cityscapes.classes}
    image, mask = data.read(1)
    assert image.shape == (3, 5, 7) and mask.dtype == torch.uint8
    assert mask.flatten().tolist() == [train_id[i] for i in range(34)] + [255]
    assert data.classes == [c.name for c in Cityscapes.classes if 0 <= c.train_id < 19]
    assert "not public" in message(ds.open_dataset, "cityscapes", tmp_path, "test")


@pytest.mark.parametrize("value", [34, 254, 256 + 7])
def test_cityscapes_labels_that_do_not_exist(tmp_path, value):
    path = cityscapes_set(tmp_path) / "gtFine" / "val" / "ulm" / "ulm_000001_000019_gtFine_labelIds.png"
    Image.fromarray(np.array([[7, value]], dtype=np.uint16 if value > 255 else np.uint8)).save(path)
    data = ds.open_dataset("cityscapes", tmp_path, "val")
    data.read(0)
    text = message(data.read, 1)
    assert str(path) in text and f"[{value}]" in text and "cityscapes" in text and "labelIds.png" in text


def test_cityscapes_that_is_incomplete(tmp_path):
    masks = cityscapes_set(tmp_path) / "gtFine"
    (masks / "val" / "ulm" / "ulm_000001_000019_gtFine_labelIds.png").unlink()
    text = message(ds.open_dataset, "cityscapes", tmp_path, "val")
    assert "ulm_000001_000019_leftImg8bit.png" in text and "ulm_000001_000019_gtFine_labelIds.png" in text
    (masks / "train").rename(masks / "elsewhere")
    assert "gtFine/train/aachen/ is missing" in message(ds.open_dataset, "cityscapes", tmp_path, "train")
    (tmp_path / "empty" / "leftImg8bit" / "train").mkdir(parents=True)
    assert "no folder of a city" in message(ds.open_dataset, "cityscapes", tmp_path / "empty", "train")


def em_arrays(count):
    """Image i is (4,6) of value 3 i; its label is membrane (0) in the first i % 4 rows, else cell (255)."""
    images = [np.full((4, 6), 3 * i, dtype=np.uint8) for i in range(count)]
    labels = [np.full((4, 6), 255, dtype=np.uint8) for _ in range(count)]
    for i, label in enumerate(labels):
        label[:i % 4] = 0
    return images, labels


def em_pngs(root, count=30):
    for i, (image, label) in enumerate(zip(*em_arrays(count))):
        save(root / "image" / f"{i}.png", image)
        save(root / "label" / f"{i}.png", label)
    return root


def em_stacks(root, images, labels):
    for name, arrays in (("train-volume.tif", images), ("train-labels.tif", labels)):
        pages = [Image.fromarray(array) for array in arrays]
        pages[0].save(root / name, save_all=True, append_images=pages[1:])
    return root


def check_em(root, count=30, val=10):
    """Both cuts of the root: what is in them, and that train and val are all images, each once."""
    names = {}
    for split in ("train-1", "val-1", "train-2", "val-2"):
        data = ds.open_dataset("em", root, split)
        names[split] = [int(data.name_of(i)) for i in range(len(data))]
        assert names[split] == sorted(names[split]) and data.classes == ["membrane", "cell"]
        for i, number in enumerate(names[split]):
            image, mask = data.read(i)
            assert image.shape == (3, 4, 6) and (image == 3 * number).all()
            assert mask.tolist() == [[int(row >= number % 4)] * 6 for row in range(4)]
            assert torch.equal(data.read_mask(i), mask)
        membrane = sum(6 * (number % 4) for number in names[split])
        assert loaders.pixel_counts(data).tolist() == [membrane, 24 * len(data) - membrane]
    for cut in "12":
        assert len(names[f"val-{cut}"]) == val
        assert sorted(names[f"train-{cut}"] + names[f"val-{cut}"]) == list(range(count))
    assert names["val-1"] != names["val-2"]
    return names


@pytest.mark.parametrize("below", ["", "train"])
def test_em_as_png_files(tmp_path, below):
    em_pngs(tmp_path / below)
    names = check_em(tmp_path)
    assert names["val-1"] == [4, 6, 8, 12, 17, 18, 19, 20, 23, 25]      # fixed: scores depend on it
    assert names["val-2"] == [2, 3, 9, 16, 17, 18, 20, 23, 24, 27]


def test_em_as_tiff_stacks_is_the_same(tmp_path):
    (tmp_path / "stacks").mkdir()
    em_stacks(tmp_path / "stacks", *em_arrays(30))
    assert check_em(tmp_path / "stacks") == check_em(em_pngs(tmp_path / "pngs"))


def test_em_with_another_number_of_images(tmp_path):
    check_em(em_pngs(tmp_path / "a", 11), count=11, val=3)
    text = message(ds.open_dataset, "em", em_pngs(tmp_path / "b", 2), "train-1")
    assert "only 2 of 30" in text
    assert "train-1, val-1, train-2, val-2" in message(ds.open_dataset, "em", tmp_path, "train")


@pytest.mark.parametrize("value", [1, 128, 254])
def test_em_labels_are_0_and_255_alone(tmp_path, value):
    for path in em_pngs(tmp_path).glob("label/*.png"):
        save(path, np.full((4, 6), value))
    text = message(ds.open_dataset("em", tmp_path, "val-1").read, 0)
    assert str(tmp_path / "label" / "4.png") in text and f"[{value}]" in text
    save(tmp_path / "label" / "4.png", np.zeros((4, 6, 3)))
    assert "colour picture" in message(ds.open_dataset("em", tmp_path, "val-1").read, 0)


def test_em_stacks_that_are_incomplete(tmp_path):
    images, labels = em_arrays(30)
    em_stacks(tmp_path, images, labels[:29])
    text = message(ds.open_dataset, "em", tmp_path, "train-1")
    assert "30 pages" in text and "29" in text and str(tmp_path / "train-labels.tif") in text
    (tmp_path / "train-labels.tif").write_text("hello")
    assert "train-labels.tif cannot be read" in message(ds.open_dataset, "em", tmp_path, "train-1")
    (tmp_path / "train-labels.tif").unlink()
    assert "train-labels.tif is missing" in message(ds.open_dataset, "em", tmp_path, "train-1")


@pytest.mark.parametrize("below", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc(tmp_path, below):
    root = tmp_path / below
    for name in ("2007_1", "2007_2", "2008_3"):
        save(root / "JPEGImages" / f"{name}.jpg", np.zeros((2, 3, 3)))
    for name in ("2007_1", "2007_2"):
        mask = Image.fromarray(np.array([[0, 1, 20], [255, 15, 0]], dtype=np.uint8)).convert("P")
        mask.putpalette([i * 7 % 256 for i in range(768)])
        (root / "SegmentationClass").mkdir(parents=True, exist_ok=True)
        mask.save(root / "SegmentationClass" / f"{name}.png")
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_2\n2007_1\n")
    (lists / "val.txt").write_text("2007_1\n")
    data = ds.open_dataset("voc", tmp_path, "train")
    val = ds.open_dataset("voc", tmp_path, "val")
    assert [data.name_of(i) for i in range(2)] == ["2007_2", "2007_1"] and len(val) == 1
    assert data.read(0)[1].tolist() == [[0, 1, 20], [255, 15, 0]]       # indices, not colours

    text = message(ds.open_dataset, "voc", tmp_path, "trainaug")
    assert "SBD" in text and "10,582" in text and "trainaug.txt" in text and "SegmentationClassAug" in text
    assert "not public" in message(ds.open_dataset, "voc", tmp_path, "test")
    save(root / "SegmentationClassAug" / "2008_3.png", np.full((2, 3), 4))
    (lists / "trainaug.txt").write_text("/JPEGImages/2008_3.jpg /SegmentationClassAug/2008_3.png\n")
    assert ds.open_dataset("voc", tmp_path, "trainaug").read(0)[1].unique().tolist() == [4]

    save(root / "Scribbles" / "2007_1.png", np.full((2, 3), 255))
    save(root / "Scribbles" / "2007_2.png", np.full((2, 3), 255))
    train, val = (ds.open_dataset("voc", tmp_path, split, mask_dir="Scribbles") for split in ("train", "val"))
    assert train.read(0)[1].unique().tolist() == [255]
    assert val.read(0)[1].tolist() == [[0, 1, 20], [255, 15, 0]]


def scribble_set(root, scribbles="ScribbleLabels"):
    """VOC with three images of 3 x 2 pixels, scribbles as PNG, full masks of val alone."""
    for name in ("2007_1", "2007_2", "2008_3"):
        save(root / "JPEGImages" / f"{name}.jpg", np.zeros((2, 3, 3)))
        save(root / scribbles / f"{name}.png", [[0, 255, 20], [255, 255, 15]])
    save(root / "SegmentationClass" / "2008_3.png", [[0, 0, 20], [255, 15, 15]])
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_2\n")
    (lists / "trainaug.txt").write_text("/JPEGImages/2007_2.jpg /SegmentationClassAug/2007_2.png\n2007_1\n")
    (lists / "val.txt").write_text("2008_3\n")
    return root


def scribble_xml(path, width=3, height=2, tag="cow"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<annotation><size><width>{width}</width><height>{height}</height></size><polygon>"
                    f"<tag>{tag}</tag><point><X>0</X><Y>-1</Y></point></polygon></annotation>")


@pytest.mark.parametrize("below", ["", "VOC2012", "VOCdevkit/VOC2012"])
@pytest.mark.parametrize("scribbles", ds.SCRIBBLE_FOLDERS)
def test_voc_scribble(tmp_path, below, scribbles):
    scribble_set(tmp_path / below, scribbles)
    splits = ds.SPLITS["voc_scribble"]
    train, trainaug, val = (ds.open_dataset("voc_scribble", tmp_path, split) for split in splits)
    assert [trainaug.name_of(i) for i in range(2)] == ["2007_2", "2007_1"] and len(train) == len(val) == 1
    assert trainaug.read(1)[1].tolist() == [[0, 255, 20], [255, 255, 15]]   # without SegmentationClassAug
    assert val.read(0)[1].tolist() == [[0, 0, 20], [255, 15, 15]]           # scored on the full masks
    assert train.num_classes == 21 and train.classes[10] == "cow"


def test_voc_scribble_reads_the_files_of_scribblesup(tmp_path):
    root = scribble_set(tmp_path / "voc", "elsewhere")
    for name in ("2007_1", "2007_2"):
        scribble_xml(root / "pascal_2012" / f"{name}.xml", tag="bike")
    data = ds.open_dataset("voc_scribble", root, "trainaug")
    assert data.read(1)[1].tolist() == [[2, 255, 255], [255, 255, 255]]     # a dot that the border cuts
    scribble_xml(root / "pascal_2012" / "2007_2.xml", width=4)
    text = message(data.read, 0)
    assert "2007_2.jpg is 3 x 2" in text and "2007_2.xml is 4 x 2" in text
    scribble_xml(root / "pascal_2012" / "2007_2.xml", tag="unicorn")
    assert "2007_2.xml" in message(data.read_mask, 0) and "'unicorn'" in message(data.read_mask, 0)
    (root / "pascal_2012" / "2007_2.xml").unlink()
    assert "pascal_2012/2007_2.xml" in message(ds.open_dataset, "voc_scribble", root, "train")
    save(root / "ScribbleLabels" / "2007_2.png", np.full((2, 3), 21))       # comes first in the list
    text = message(ds.open_dataset("voc_scribble", root, "train").read, 0)
    assert "ScribbleLabels/2007_2.png" in text and "[21]" in text and "0..20 and 255" in text


def test_masks_from_a_folder_elsewhere(tmp_path, monkeypatch):
    root, mine = scribble_set(tmp_path / "voc"), tmp_path / "mine"
    save(mine / "2007_2.png", np.full((2, 3), 7))
    save(root / "inside" / "2007_2.png", np.full((2, 3), 8))
    monkeypatch.chdir(tmp_path)
    for name in ("voc", "voc_scribble"):
        for mask_dir, value in ((str(mine), 7), ("mine", 7), (mine, 7), ("inside", 8)):
            data = ds.open_dataset(name, root, "train", mask_dir=mask_dir)
            assert data.read(0)[1].unique().tolist() == [value]
            assert ds.open_dataset(name, root, "val", mask_dir=mask_dir).read(0)[1].tolist()[0] == [0, 0, 20]
        text = message(ds.open_dataset, name, root, "train", mask_dir="nowhere")
        assert "the folder nowhere/ is missing" in text
    save(tmp_path / "SegmentationClass" / "2007_2.png", np.full((2, 3), 9))     # in the current folder
    assert "no mask" in message(ds.open_dataset, "voc", root, "train")      # is not looked at unasked


@pytest.mark.parametrize("below", ["train", ""])
def test_folder_with_masks_from_elsewhere(tmp_path, below):
    root = folder_set(tmp_path / "data")
    for i in range(3):
        save(tmp_path / "mine" / below / f"p{i}.png", np.full((40, 56), 255))
    data = ds.open_dataset("folder", root, "train", mask_dir=str(tmp_path / "mine"))
    assert data.read(2)[1].unique().tolist() == [255]
    val = ds.open_dataset("folder", root, "val", mask_dir=str(tmp_path / "mine"))
    assert torch.equal(val.read(0)[1], ds.open_dataset("folder", root, "val").read(0)[1])


def test_voc_scribble_that_is_incomplete(tmp_path):
    root = scribble_set(tmp_path, "elsewhere")
    text = message(ds.open_dataset, "voc_scribble", root, "train")
    assert "no folder of scribbles (ScribbleLabels, voc_scribbles" in text and "jifengdai.org" in text
    (root / "voc_scribbles").mkdir()
    (root / "voc_scribbles" / "readme.md").write_text("x")
    text = message(ds.open_dataset, "voc_scribble", root, "train")
    assert "voc_scribbles/ holds neither *.png nor *.xml (has readme.md)" in text
    (root / "ImageSets" / "Segmentation" / "trainaug.txt").unlink()
    text = message(ds.open_dataset, "voc_scribble", root, "trainaug")
    assert "trainaug.txt is missing (10,582 names" in text and "split train" in text
    assert "not public" in message(ds.open_dataset, "voc_scribble", root, "test")


def test_camvid(tmp_path):
    for split in ("train", "val", "test"):
        for name in ("a", "b"):
            save_pair(tmp_path / split / f"{name}.png", tmp_path / f"{split}annot" / f"{name}.png",
                      [[0, 10, 11, 255]])
    save(tmp_path / "test" / "._a.png", [[0]])                          # macOS leaves such files
    data = ds.open_dataset("camvid", tmp_path, "test")
    assert len(data) == 2 and data.num_classes == 11 and data.read(1)[1].tolist() == [[0, 10, 255, 255]]
    (tmp_path / "train.txt").write_text("/SegNet/CamVid/train/b.png /SegNet/CamVid/trainannot/b.png\n")
    (tmp_path / "val.txt").write_text("val/b.png valannot/b.png\nval/a.png valannot/a.png\n")
    train, val = (ds.open_dataset("camvid", tmp_path, split) for split in ("train", "val"))
    assert [train.name_of(0), val.name_of(0), val.name_of(1)] == ["b", "b", "a"] and len(train) == 1


def test_folder_with_a_folder_for_each_split(folder):
    data = ds.open_dataset("folder", folder, "train")
    assert data.classes == ["class0", "class1", "class2", "class3"] and len(data) == 5
    image, mask = data.read(3)
    assert torch.equal(image, random_image(40, 56, 3)) and torch.equal(mask, random_mask(40, 56, 4, 3))


def test_folder_with_lists_labels_and_scribbles(tmp_path):
    for name in ("my photo 1", "v1.2", "c"):
        save_pair(tmp_path / "images" / f"{name}.png", tmp_path / "labels" / f"{name}.png", [[0, 1]])
        save(tmp_path / "scribbles" / f"{name}.png", [[255, 1]])
    (tmp_path / "train.txt").write_text("v1.2\n\nmy photo 1.png\n")
    (tmp_path / "val.txt").write_text("c\n")
    (tmp_path / "classes.txt").write_text("sky\n3D printer\n")
    data = ds.open_dataset("folder", tmp_path, "train", mask_dir="scribbles")
    assert data.classes == ["sky", "3D printer"]
    assert [data.name_of(i) for i in range(2)] == ["v1.2", "my photo 1"]
    assert data.read(0)[1].tolist() == [[255, 1]]
    assert ds.open_dataset("folder", tmp_path, "val", mask_dir="scribbles").read(0)[1].tolist() == [[0, 1]]


def test_folder_classes_with_ids(tmp_path):
    (tmp_path / "classes.txt").write_text("0 sky\n1 wet road\n255 ignore\n")
    assert ds.folder_classes(tmp_path) == ["sky", "wet road"]
    (tmp_path / "classes.txt").write_text("1 sky\n2 road\n")
    text = message(ds.folder_classes, tmp_path)
    assert "classes.txt" in text and "1, 2" in text
    (tmp_path / "classes.txt").write_text("\n")
    assert "0 classes" in message(ds.folder_classes, tmp_path)


def test_toy_scenes():
    data = ds.open_dataset("toy_scenes", "", "val", seed=3)
    scene = toy_scenes.make_scene(3, toy_scenes.scene_index("val", 5))
    image, mask = data.read(5)
    assert len(data) == toy_scenes.SPLITS["val"] and data.paths is None and data.name_of(5) == "0005"
    assert (image.permute(1, 2, 0).numpy() == scene["image"]).all() and (mask.numpy() == scene["mask"]).all()
    assert data.read(5)[0] is image                                     # kept, not drawn again
    loaders.TrainView(data, size=0, crop=128, scale=(1.0, 1.0))[(5, 0)]
    assert (image.permute(1, 2, 0).numpy() == scene["image"]).all()     # and not written to
    assert not torch.equal(ds.open_dataset("toy_scenes", "", "train", seed=3).read(5)[0], image)
    scribbled = ds.open_dataset("toy_scenes", "", "train", mask_dir="scribbles").read(0)[1]
    scene = toy_scenes.make_scene(0, toy_scenes.scene_index("train", 0))
    assert (scribbled.numpy() == scene["scribbles"]).all()


def test_grey_palette_and_rotated_images_are_read_as_upright_rgb(tmp_path):
    save(tmp_path / "grey.png", [[0, 9, 200]])
    assert files.read_image(tmp_path / "grey.png").tolist() == [[[0, 9, 200]]] * 3
    Image.fromarray(np.array([[[9, 8, 7, 0]]], dtype=np.uint8)).save(tmp_path / "alpha.png")
    assert files.read_image(tmp_path / "alpha.png").flatten().tolist() == [9, 8, 7]
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, 1, 2, 3])
    palette.save(tmp_path / "palette.png")
    assert files.read_image(tmp_path / "palette.png")[:, 0, 0].tolist() == [1, 2, 3]
    exif = Image.Exif()
    exif[0x0112] = 6                                                    # "turn me by 90 degrees"
    Image.new("RGB", (20, 10)).save(tmp_path / "phone.jpg", exif=exif)
    assert files.read_image(tmp_path / "phone.jpg").shape == (3, 20, 10)


def test_list_images(tmp_path):
    for name in ("b.jpg", "a.PNG", "c.webp"):
        save(tmp_path / name, np.zeros((2, 2, 3)))
    (tmp_path / "notes.txt").write_text("x")
    assert [p.name for p in files.list_images(tmp_path)] == ["a.PNG", "b.jpg", "c.webp"]
    assert files.list_images(str(tmp_path / "b.jpg")) == [tmp_path / "b.jpg"]
    assert "no such folder" in message(files.list_images, tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "no image" in message(files.list_images, tmp_path / "empty")


# ---- messages --------------------------------------------------------------------------------------------

def test_wrong_names_and_options(tmp_path):
    assert "toy_scenes, ade20k" in message(ds.open_dataset, "ade", tmp_path, "train")
    assert "train, val, test" in message(ds.open_dataset, "camvid", tmp_path, "training")
    text = message(ds.open_dataset, "toy_scenes", tmp_path, "train")
    assert str(tmp_path) in text and "use --dataset folder" in text
    assert "--data ROOT" in message(ds.open_dataset, "camvid", "", "train")
    assert "scribbles" in message(ds.open_dataset, "ade20k", tmp_path, "train", mask_dir="scribbles")
    assert "'x'" in message(ds.open_dataset, "toy_scenes", "", "train", mask_dir="x")
    assert "--batch-size 3" in message(loaders.BatchesFrom, 10, 3, 0, world=2)
    assert "--batch-size 0" in message(loaders.BatchesFrom, 10, 0, 0)


@pytest.mark.parametrize("name", list(ds.TREES))
def test_missing_layout_shows_the_tree_the_content_and_the_source(tmp_path, name):
    for i in range(10):
        (tmp_path / f"thing{i}").mkdir()
    split = ds.SPLITS[name][0]
    text = message(ds.open_dataset, name, tmp_path, split)
    tree, source = ds.TREES[name]
    assert tree in text and source in text and str(tmp_path) in text
    assert "thing0/" in text and "thing7/" in text and "thing8" not in text and "and 2 more" in text
    assert "no such folder" in message(ds.open_dataset, name, tmp_path / "gone", split)


def test_cocostuff10k_as_downloaded(tmp_path):
    (tmp_path / "imageLists").mkdir()
    text = message(ds.open_dataset, "cocostuff10k", tmp_path, "train")
    assert f"python -m data.prepare_cocostuff10k {tmp_path}" in text


def test_incomplete_pairs(tmp_path):
    root = folder_set(tmp_path)
    (root / "masks" / "train" / "p1.png").unlink()
    text = message(ds.open_dataset, "folder", root, "train")
    assert "images/train/p1.png" in text and "masks/train/p1.png" in text and "1 of 3" in text
    (root / "images" / "val" / "p2.jpg").write_bytes(b"")
    text = message(ds.open_dataset, "folder", root, "val")
    assert "p2.jpg" in text and "p2.png" in text
    assert "train, val" in message(ds.open_dataset, "folder", root, "test")
    (root / "images" / "test").mkdir()
    assert "masks/test/ is missing" in message(ds.open_dataset, "folder", root, "test")
    (root / "masks" / "test").mkdir()
    (root / "images" / "test" / "notes.txt").write_text("x")
    text = message(ds.open_dataset, "folder", root, "test")
    assert "no image" in text and "notes.txt" in text
    (root / "classes.txt").unlink()
    save_pair(root / "images" / "test" / "a.png", root / "masks" / "test" / "a.png")
    assert "classes.txt is missing" in message(ds.open_dataset, "folder", root, "test")


def test_lists_that_do_not_fit(tmp_path):
    save_pair(tmp_path / "images" / "a.png", tmp_path / "masks" / "a.png")
    (tmp_path / "classes.txt").write_text("sky\n")
    (tmp_path / "train.txt").write_text("a\nb.png\nc.png\n")
    text = message(ds.open_dataset, "folder", tmp_path, "train")
    assert "2 of 3" in text and "such as b" in text
    (tmp_path / "val.txt").write_text("")
    assert "no image" in message(ds.open_dataset, "folder", tmp_path, "val")


def broken_set(root, fault):
    """One pair with a fault -> (data set, words that its message must have)."""
    image, mask = root / "images" / "train" / "p0.png", root / "masks" / "train" / "p0.png"
    data = ds.open_dataset("folder", folder_set(root, count=1), "train")
    if fault == "truncated":
        image.write_bytes(image.read_bytes()[:2000])
        return data, [str(image), "damaged or cut short"]
    if fault == "truncated mask":
        mask.write_bytes(mask.read_bytes()[:60])
        return data, [str(mask), "damaged or cut short"]
    if fault == "no image":
        image.write_text("hello")
        return data, [str(image), "cannot be read"]
    if fault == "deleted":
        image.unlink()
        return data, [str(image), "does not exist"]
    if fault == "16 bits":
        Image.fromarray(np.full((40, 56), 3000, dtype=np.uint16)).save(image)
        return data, [str(image), "8 bits"]
    if fault == "sizes":
        save(mask, np.zeros((40, 55)))
        return data, [str(image), str(mask), "56 x 40", "55 x 40"]
    if fault == "values":
        save(mask, np.arange(40 * 56).reshape(40, 56) % 8)
        return data, [str(mask), "[4, 5, 6, 7]", "4 classes", "0..3", "convert"]
    if fault == "many values":
        save(mask, np.arange(40 * 56).reshape(40, 56) % 40)
        return data, [str(mask), "[4, 5, 6, 7, 8] and 31 more"]
    if fault == "16-bit values":
        Image.fromarray(np.full((40, 56), 259, dtype=np.uint16)).save(mask)
        return data, [str(mask), "[259]"]
    save(mask, np.zeros((40, 56, 3)))
    return data, [str(mask), "colour picture", "RGB"]


FAULTS = ["truncated", "truncated mask", "no image", "deleted", "16 bits", "sizes", "values", "many values",
          "16-bit values", "colours"]


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_files_are_named(tmp_path, fault):
    data, words = broken_set(tmp_path, fault)
    text = message(data.read, 0)
    assert all(word in text for word in words), text


def test_values_out_of_range_after_the_shift(tmp_path):
    save(tmp_path / "m.png", [[0, 151, 3]])
    text = message(files.read_index_map, tmp_path / "m.png", 150, 0)
    assert "[151]" in text and "0..150" in text                         # as they stand in the file


@pytest.mark.parametrize("workers", [0, 1])
def test_the_sentence_survives_a_worker(tmp_path, workers):
    data, _ = broken_set(tmp_path, "sizes")
    direct = message(data.read, 0)
    for loader in (loaders.train_loader(loaders.TrainView(data, 32, 24), 2, 0, 0, 2, workers, "cpu"),
                   loaders.eval_loader(loaders.TestView(data, 32), workers, "cpu")):
        assert message(list, loader) == direct


# ---- data/prepare_cocostuff10k.py ------------------------------------------------------------------------

@pytest.fixture
def download(tmp_path, monkeypatch):
    """A tiny COCO-Stuff10K as downloaded; scipy is replaced by a reader of .npy files."""
    for folder in ("images", "annotations", "imageLists"):
        (tmp_path / folder).mkdir()
    used = [0] + [i for i in range(1, 183) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)]
    for name in ("COCO_train2014_1", "COCO_train2014_2", "COCO_train2014_3"):
        save(tmp_path / "images" / f"{name}.jpg", np.zeros((4, 43, 3)))
        with open(tmp_path / "annotations" / f"{name}.mat", "wb") as file:
            np.save(file, np.array(used, dtype=np.uint16).reshape(4, 43))
    (tmp_path / "imageLists" / "train.txt").write_text("COCO_train2014_1\nCOCO_train2014_3\n")
    (tmp_path / "imageLists" / "test.txt").write_text("COCO_train2014_2\n")

    def loadmat(path, variable_names):
        assert variable_names == ["S"]
        return {"S": np.load(path)}
    fake = types.ModuleType("scipy.io")
    fake.loadmat = loadmat
    monkeypatch.setitem(sys.modules, "scipy", types.ModuleType("scipy"))
    monkeypatch.setitem(sys.modules, "scipy.io", fake)
    return tmp_path


def test_prepare_cocostuff10k(download, capsys):
    files = {p: p.read_bytes() for p in download.rglob("*") if p.is_file()}
    prepare.main([str(download)])
    assert "2 training and 1 test" in capsys.readouterr().out
    assert all(p.read_bytes() == content for p, content in files.items())       # the download is as it was
    train, test = (ds.open_dataset("cocostuff10k", download, split) for split in ("train", "test"))
    assert [train.name_of(i) for i in range(2)] == ["COCO_train2014_1", "COCO_train2014_3"] and len(test) == 1
    assert np.array(Image.open(train.paths[0][1])).flatten().tolist() == list(range(172))
    assert train.read(0)[1].flatten().tolist() == [255] + list(range(171))
    assert not list(download.rglob("*.tmp"))


def test_prepare_goes_on_where_it_stopped(download):
    prepare.main([str(download)])
    masks = download / "annotations" / "train2014"
    kept, lost = (masks / f"COCO_train2014_{i}_labelTrainIds.png" for i in (1, 3))
    kept.write_bytes(b"kept")
    lost.unlink()
    prepare.main([str(download)])
    assert kept.read_bytes() == b"kept" and lost.exists()


def prepare_fails(root, capsys):
    with pytest.raises(SystemExit) as stopped:
        prepare.main([str(root)])
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1                                        # one sentence
    return text


def test_prepare_messages(download, capsys, monkeypatch):
    assert "imageLists" in prepare_fails(download / "nowhere", capsys)
    with open(download / "annotations" / "COCO_train2014_1.mat", "wb") as file:
        np.save(file, np.array([[1, 26, 200]]))
    text = prepare_fails(download, capsys)
    assert "COCO_train2014_1.mat" in text and "[26, 200]" in text
    (download / "annotations" / "COCO_train2014_1.mat").write_text("not a matrix")
    assert "COCO_train2014_1.mat" in prepare_fails(download, capsys)
    monkeypatch.setitem(sys.modules, "scipy.io", None)                  # as if scipy were not installed
    assert "pip install scipy" in prepare_fails(download, capsys)
    (download / "annotations" / "COCO_train2014_2.mat").unlink()
    assert "COCO_train2014_2.mat" in prepare_fails(download, capsys)


def test_prepare_runs_as_a_module(tmp_path):
    done = subprocess.run([sys.executable, "-m", "data.prepare_cocostuff10k", str(tmp_path)], cwd=REPO,
                          capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "train.txt" in done.stderr
