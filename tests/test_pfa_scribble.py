"""pfa_scribble.py as its users meet it: readings, phases, runs, resuming, scores, strokes, tables, mistakes.

The equations of Sec. 3 are in test_pfa_scribble_equations.py. B images, N classes (0 is the background), n
slots of a class in the memory; 255 is not labelled.
"""
import contextlib
import copy
import csv
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import pfa_scribble as pfa
from commands import call, flags_of
from common import datasets, figures, loaders, pfa_figures, run, speed, toy_scenes, transforms
from common import tables as common_tables
from common.files import read_image
from common.image_classifier import ImageLabels, build_classifier, classify, read_scores
from common.metrics import mean_average_precision
from common.strokes import painted_strokes

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
CLASSES = ("meadow", "house", "tall bird", "ghost", "kite")
N, SLOTS, WARMUP, ITERATIONS = 5, 2, 4, 15


# ---- data and runs ----

@pytest.fixture(scope="module", autouse=True)
def few_toy_scenes():
    """Toy scenes with a handful of pictures a split."""
    with pytest.MonkeyPatch.context() as patch:
        for split, count in dict(train=6, val=2, test=2).items():
            patch.setitem(toy_scenes.SPLITS, split, count)
        yield


def picture(rng, height, width, things):
    """Image (H,W,3), mask and strokes (H,W), uint8: a green meadow, and `things`: (class, colour, side of a
    square). A stroke is two rows high and runs along the middle of a square and through the meadow above."""
    image = rng.integers(0, 40, (height, width, 3), dtype=np.uint8) + np.array([20, 120, 30], np.uint8)
    mask, strokes = np.zeros((height, width), np.uint8), np.full((height, width), 255, np.uint8)
    for c, colour, side in things:
        y, x = rng.integers(4, height - side), rng.integers(0, width - side)
        image[y:y + side, x:x + side], mask[y:y + side, x:x + side] = colour, c
        strokes[y:y + side, x:x + side] = 255
        strokes[y + side // 2:y + side // 2 + 2, x + 1:x + side - 1] = c
    strokes[1:3, 3:-3] = 0
    return image, mask, strokes


def make_pictures(root, classes=CLASSES, change=0):
    """Data set `folder` of 51 x 37 pictures with strokes/train. No train picture has a ghost, two have a
    kite; of the others picture 3 has a stroke of the meadow alone, picture 5 none at all. In `test` p0 is
    void and p1 is 44 x 34. change > 0: other full masks in train and test, all else the same."""
    house, bird = (1, (200, 40, 30), 17), (2, (30, 30, 220), 13)
    ghost, kite = (3, (250, 250, 250), 9), (4, (250, 220, 0), 14)
    for split, count in (("train", 6), ("val", 2), ("test", 5)):
        for kind in ("images", "masks", "strokes")[:3 if split == "train" else 2]:
            (root / kind / split).mkdir(parents=True)
        for k in range(count):
            size, last = (34, 44) if (split, k) == ("test", 1) else (37, 51), kite if k in (2, 4) else bird
            things = [house, bird, ghost] if split == "test" else [house, last]
            image, mask, strokes = picture(np.random.default_rng([k, len(split)]), *size, things)
            if split == "train" and k in (3, 5):
                strokes[(strokes != 0) | (k == 5)] = 255
            if (split, k) == ("test", 0):
                mask[:] = 255
            if change and split != "val":
                mask[mask != 255] = (mask[mask != 255] + change) % len(classes)
            for kind, array in (("images", image), ("masks", mask), ("strokes", strokes)):
                if (root / kind / split).is_dir():
                    Image.fromarray(array).save(root / kind / split / f"p{k}.png")
    (root / "classes.txt").write_text("\n".join(classes))
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("data") / "pictures")


TINY = dict(device="cpu", crop=32, batch_size=3, iterations=ITERATIONS, warmup=WARMUP, slots=SLOTS,
            lr=2e-3, head_lr=1.0, head_channels=16, hidden=8, filter=60, score_threshold=0.5, eval_every=5,
            save_every=2, workers=0, train_classifier=False, classifier_iterations=5, classifier_size=32,
            classifier_lr=2e-3)


def where(data):
    return dict(dataset="folder", data=str(data), scribbles="strokes") if data else {}


def config(out, data="", **flags):
    """The toy preset, a few steps long; with data a `folder`."""
    return run.make_config(pfa.Config, pfa.PRESETS, "toy", out=str(out), **{**TINY, **where(data), **flags})


def on(data, **flags):
    """Command line of a tiny run on a `folder`."""
    return flags_of({**TINY, **where(data), **flags})


def script(*argv):
    """`python pfa_scribble.py ARGV` in this process: returncode, stdout, stderr."""
    return call(pfa, *argv)


def done(*argv):
    """What a call that must succeed prints."""
    ended = script(*argv)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def mistake(*argv):
    """The one sentence that the script must end with, exit code 2."""
    ended = script(*argv)
    assert ended.returncode == 2, ended.stdout + ended.stderr
    said = [line for line in ended.stderr.splitlines() if line.strip() and "it/s]" not in line]   # no tqdm
    assert len(said) == 1 and said[0].startswith("pfa_scribble.py: "), ended.stderr
    return said[0]


def train(cfg):
    """main(cfg) without its prints and figures."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(pfa_figures, "draw_figures", lambda *args: None)
        patch.setattr(speed, "announce", lambda *args: None)
        return pfa.main(cfg)


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(pfa_figures, "draw_figures", lambda *args: None)
    monkeypatch.setattr(speed, "announce", lambda *args: None)  # a test below shows that it changes nothing


def read(path):
    return json.loads(Path(path).read_text())


def rows_of_log(out):
    with open(out / "log.csv") as file:
        return list(csv.DictReader(file))


def files(path):
    return {str(p.relative_to(path)) for p in Path(path).rglob("*") if p.is_file()}


def ids_in(path):
    with Image.open(path) as image:
        return np.array(image)


def numbers(metrics):
    return {k: v for k, v in metrics.items() if k != "seconds"}


def same(a, b):
    """Bit for bit, through dicts, lists and tensors; seconds aside."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[k], b[k]) for k in a if k != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a and b != b                                   # nan equals nan


def load(out):
    """(net, cfg) of a run."""
    cfg = replace(run.read_config(pfa.Config, out), out=str(out))
    return pfa.load_run(cfg, CPU)[0].net, cfg


def evaluated(net, cfg, data, modes=(), scores=None):
    return pfa.evaluate(pfa.Predictor(net, cfg), data, run.Machine(CPU), modes, scores)


def copy_of(out, folder):
    """The run in `out` without its figures, for commands that write into it."""
    made = shutil.ignore_patterns("figures", "predictions", "drawings")
    return Path(shutil.copytree(out, folder, ignore=made))


@contextlib.contextmanager
def watching():
    """.steps: of every training iteration what it was given and what it made of it."""
    found, now = SimpleNamespace(steps=[]), SimpleNamespace(step=None, on=True)
    one, predict, losses = pfa.train_step, pfa.predictions_of, pfa.losses_of
    announce, readings = speed.announce, dict(confidence=pfa.confidence, consistency_loss=pfa.consistency_loss)

    def announcing(*args):
        now.on = False
        announce(*args)
        now.on = True

    def stepping(model, net, optimizer, scheduler, x, scribbles, image_classes, phase, cfg):
        now.step = SimpleNamespace(phase=phase, scribbles=scribbles.clone(), readings=set(),
                                   image_classes=image_classes.clone(),
                                   lr=[group["lr"] for group in optimizer.param_groups])
        terms = one(model, net, optimizer, scheduler, x, scribbles, image_classes, phase, cfg)
        now.step.terms = {name: value.item() for name, value in terms.items()}
        if net.memory is not None:
            now.step.bank, now.step.count = net.memory.bank.clone(), net.memory.count.clone()
            now.step.augmenter = torch.cat([p.detach().flatten() for p in net.augmenter.parameters()])
        if now.on:
            found.steps.append(now.step)
        return terms

    def predicting(model, net, x, present, phase, cfg):
        made = predict(model, net, x, present, phase, cfg)
        now.step.present = present.clone()
        now.step.predictions = {name: logits.detach().clone() for name, logits in made.items()}
        return made

    def losing(predictions, scribbles, phase, cfg):
        now.step.before = {name: logits.detach().clone() for name, logits in predictions.items()}
        return losses(predictions, scribbles, phase, cfg)

    def noting(name):
        def called(first, second, reading="paper"):
            if now.step is not None:
                now.step.readings.add((name, reading))
            return readings[name](first, second, reading)
        return called

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "announce", announcing)
        patch.setattr(pfa, "train_step", stepping)
        patch.setattr(pfa, "predictions_of", predicting)
        patch.setattr(pfa, "losses_of", losing)
        for name in readings:
            patch.setattr(pfa, name, noting(name))
        yield found


def watched(cfg):
    """A run without figures -> its steps, metrics and folder."""
    with watching() as found:
        found.metrics = train(cfg)
    found.out = Path(cfg.out)
    return found


@pytest.fixture(scope="module")
def base(pictures, tmp_path_factory):
    """One run of every phase and of the classifier, from the command line, watched, read by many tests."""
    out = tmp_path_factory.mktemp("base")
    with watching() as found:
        found.stdout = done("--out", out, *on(pictures, train_classifier=True))
    found.out, found.metrics = out, read(out / "metrics.json")
    return found


@pytest.fixture(scope="module")
def local(pictures, tmp_path_factory):
    return watched(config(tmp_path_factory.mktemp("local"), pictures, augment="local"))


@pytest.fixture(scope="module")
def memory_only(pictures, tmp_path_factory):
    return watched(config(tmp_path_factory.mktemp("global"), pictures, augment="global"))


@pytest.fixture(scope="module")
def official(pictures, tmp_path_factory):
    """The other reading on a backbone that has LayerNorms; never scaled down: crops that miss classes."""
    flags = dict(reading="official", backbone="mit_b0", weights="none", iterations=10, warmup=3)
    out = tmp_path_factory.mktemp("official")
    return watched(config(out, pictures, scale_min=1.0, eval_every=10, **flags))


@pytest.fixture(scope="module")
def pce(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("pce")
    found = watched(config(out, pictures, method="pce"))
    found.stdout = done("--out", out, "--eval-only")
    return found


def small_net(seed=0, full=True, **flags):
    """(net, cfg): a new network for five classes, its memory full or empty."""
    cfg = config("unused", **flags)
    torch.manual_seed(seed)
    net = pfa.build_model(cfg, N)
    if full and net.memory is not None:
        net.memory.bank.copy_(F.normalize(torch.rand_like(net.memory.bank), dim=2))
        net.memory.count.fill_(cfg.slots)
    return net, cfg


def small_batch(seed=0, count=3, size=32):
    """x, scribbles, image_classes: strokes of classes 0, 1, 2 in every picture; of 4 outside of the crop."""
    x = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    scribbles = torch.full((count, size, size), 255)
    for c in range(3):
        scribbles[:, 5 + 8 * c, 3:-3] = c
    image_classes = torch.zeros(count, N, dtype=torch.bool)
    image_classes[:, [0, 1, 2, 4]] = True
    return x, scribbles, image_classes


# ---- readings and presets ----

def preset(name, **flags):
    return run.make_config(pfa.Config, pfa.PRESETS, name, out="unused", **flags)


EPOCH = {batch_size: math.ceil(10582 / batch_size) for batch_size in (12, 16)}
PAPER = dict(crop=512, batch_size=16, iterations=200 * EPOCH[16], warmup=30 * EPOCH[16], lr=3e-5,
             lr_policy="multistep", slots=5, top_fraction=0.08, confidence="paper", consistency="paper",
             classes_of="crop", w_local_first=0.01, freeze_norms=False)
CODE = dict(crop=320, batch_size=12, iterations=200 * EPOCH[12], warmup=30 * EPOCH[12], lr=6e-5,
            lr_policy="linear", slots=10, top_fraction=1 / 12, confidence="official",
            consistency="official", classes_of="image", w_local_first=0.02, freeze_norms=True)


@pytest.mark.parametrize("reading, expected", [("paper", PAPER), ("official", CODE)])
def test_a_reading_fills_what_was_not_given(reading, expected):
    cfg = pfa.Config(reading=reading)
    assert {name: getattr(cfg, name) for name in expected} == expected
    assert {f.name for f in fields(cfg) if f.metadata["default"] is None} == set(expected)
    usual = pfa.Config()
    assert all(getattr(cfg, f.name) == getattr(usual, f.name) for f in fields(cfg)
               if f.name not in {*expected, "reading"})


@pytest.mark.parametrize("reading", ["paper", "official"])
@pytest.mark.parametrize("name, value", [
    ("crop", 400), ("slots", 3), ("top_fraction", 0.0), ("freeze_norms", False), ("freeze_norms", True),
    ("warmup", 0), ("classes_of", "image"), ("consistency", "mse"), ("w_local_first", 0.0),
    ("confidence", "paper")])
def test_flags_win_over_the_reading_and_outlive_replace(reading, name, value):
    argv = ["--preset", "voc-b1", "--reading", reading, *flags_of({name: value})]
    cfg = run.parse_config(pfa.Config, pfa.PRESETS, list(map(str, argv)))
    expected = dict(PAPER if reading == "paper" else CODE, **{name: value})
    for now in (cfg, replace(cfg, seed=3), replace(replace(cfg, augment="local"), out="x")):
        assert {key: getattr(now, key) for key in expected} == expected
    assert replace(cfg, reading="official").slots == cfg.slots          # what is filled in stays


def test_a_preset_wins_over_the_reading():
    cfg = preset("toy", reading="official")
    assert (cfg.crop, cfg.batch_size, cfg.lr) == (96, 16, 2e-3)
    assert (cfg.slots, cfg.confidence, cfg.classes_of, cfg.w_local_first) == (10, "official", "image", 0.02)


def test_schedule_shortens_every_number_of_iterations():
    names = "iterations warmup classifier_iterations eval_every".split()
    whole, tenth = preset("toy"), preset("toy", schedule=0.1)
    assert [getattr(tenth, name) for name in names] == [round(getattr(whole, name) / 10) for name in names]
    assert tenth.save_every == whole.save_every and preset("voc-b1", schedule=0.5).iterations == 66200


@pytest.mark.parametrize("name", list(pfa.PRESETS))
def test_every_preset_passes_the_checks_and_vocs_are_the_papers_recipe(name):
    cfg = preset(name)
    pfa.check_config(cfg)
    assert set(pfa.PRESETS[name]) <= {f.name for f in fields(cfg)}
    if not name.startswith("voc"):
        return
    assert {key: getattr(cfg, key) for key in PAPER} == PAPER  # Sec. 4.2; 200 epochs of 10,582 images
    assert (cfg.head_lr, cfg.momentum, cfg.w_local, cfg.w_global) == (10, 0.99, 0.01, 0.01)
    assert (cfg.scale_min, cfg.scale_max, cfg.rotation, cfg.blur) == (0.5, 2.0, 10.0, True)
    assert cfg.weight_decay == 0.01
    assert (cfg.dataset, cfg.train_split) == ("voc_scribble", "trainaug")
    assert (cfg.val_split, cfg.test_split) == ("val", "val")
    assert (cfg.head_channels, cfg.hidden, cfg.filter, cfg.reading) == (256, 128, 500, "paper")
    assert (cfg.backbone, cfg.head) == {
        "voc-b1": ("mit_b1", "mlp"), "voc-b3": ("mit_b3", "mlp"), "voc-b5": ("mit_b5", "mlp"),
        "voc-r101-deeplabv2": ("resnet101", "deeplabv2"),
        "voc-r101-deeplabv3plus": ("resnet101", "deeplabv3plus")}[name]


def test_only_data_with_strokes_can_be_chosen(tmp_path):
    choices = {f.name: f.metadata["choices"] for f in fields(pfa.Config)}
    assert set(choices["dataset"]) == {"toy_scenes", "voc_scribble", "voc", "folder"}
    said = mistake("--dataset", "ade20k", "--out", tmp_path / "out")
    assert "--dataset" in said and "ade20k" in said and "voc_scribble" in said


def test_voc_scribble_is_always_scored_on_full_masks(tmp_path):
    """Whatever the split: it trains on strokes of 7 and scores on masks of 3, trainaug's of 5."""
    names = dict(train=["a"], val=["b"], trainaug=["a", "c"])
    kinds = dict(ScribbleLabels=("abc", 7), SegmentationClass=("ab", 3), SegmentationClassAug=("abc", 5))
    for folder in ("JPEGImages", "ImageSets/Segmentation", *kinds):
        (tmp_path / folder).mkdir(parents=True)
    for split, listed in names.items():
        (tmp_path / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(listed))
    for name in "abc":
        Image.new("RGB", (40, 36)).save(tmp_path / "JPEGImages" / f"{name}.jpg")
    for folder, (there, value) in kinds.items():
        for name in there:
            Image.fromarray(np.full((36, 40), value, np.uint8)).save(tmp_path / folder / f"{name}.png")
    for split, value in dict(train=3, val=3, trainaug=5).items():
        sets = pfa.open_sets(preset("voc-b1", data=str(tmp_path), test_split=split))
        found = {name: [set(data.read_mask(i).unique().tolist()) for i in range(len(data))]
                 for name, data in sets.items()}
        assert found == dict(train=[{7}, {7}], val=[{3}], test=[{value}] * len(names[split]))
    full = pfa.open_sets(preset("voc-b1", data=str(tmp_path), method="full"))["train"]
    assert [full.read_mask(i).unique().tolist() for i in range(2)] == [[5], [5]]


# ---- the network ----

def test_parameters_of_segformer_b1_with_and_without_augmenter():
    methods = ("pce", "full", "pfa")
    nets = {method: pfa.build_model(preset("voc-b1", method=method), 21) for method in methods}
    counts = {method: sum(p.numel() for p in net.parameters()) for method, net in nets.items()}
    assert counts == dict(pce=13_682_645, full=13_682_645, pfa=13_682_645 + 131_712)


@pytest.mark.parametrize("backbone, millions, gigas", [("mit_b1", 13.6, 19.4), ("mit_b3", 44.6, 44.5),
                                                       ("mit_b5", 82.0, 72.9)])
def test_parameters_and_multiply_adds_are_those_of_table_3(backbone, millions, gigas):
    parameters, found = pfa.cost(preset("voc-b1", backbone=backbone, method="pce"), 21)
    assert parameters / 1e6 == pytest.approx(millions, rel=0.01)
    assert found == pytest.approx(gigas, rel=0.015)


def test_the_last_stage_of_mit_keeps_its_size_and_features_are_a_quarter():
    net, _ = small_net(backbone="mit_b0", weights="none")
    levels = net.network.backbone(torch.randn(1, 3, 64, 96))
    assert [tuple(level.shape[2:]) for level in levels] == [(16, 24), (8, 12), (4, 6), (4, 6)]
    features, logits = net.eval()(torch.randn(2, 3, 64, 96))
    assert features.shape == (2, 16, 16, 24) and logits.shape == (2, N, 16, 24)
    expected = F.conv2d(features, net.classifier.weight, net.classifier.bias)
    assert torch.allclose(logits, expected, atol=1e-6) and net.classifier.kernel_size == (1, 1)


@pytest.mark.parametrize("head, stride", [("deeplabv2", 8), ("deeplabv3plus", 4)])
def test_heads_of_the_resnet_rows(head, stride):
    net, _ = small_net(backbone="mobilenet_v2", head=head, weights="none")
    features, logits = net.eval()(torch.randn(2, 3, 64, 64))
    assert features.shape == (2, 16, 64 // stride, 64 // stride)
    assert logits.shape == (2, N, *features.shape[2:])
    if head == "deeplabv2":  # four dilated convolutions, summed [D13]
        convs = [m for m in net.classifier.modules() if isinstance(m, nn.Conv2d)]
        assert [conv.dilation for conv in convs] == [(r, r) for r in (6, 12, 18, 24)]
        expected = sum(F.conv2d(features, c.weight, c.bias, 1, c.padding, c.dilation) for c in convs)
        assert torch.allclose(logits, expected, atol=1e-5)


def test_all_three_predictions_share_one_classifier():
    net, cfg = small_net()
    x, scribbles, _ = small_batch()
    predictions = pfa.predictions_of(net.eval(), net, x, pfa.classes_in(scribbles, N), "global", cfg)
    net.zero_grad()
    for name in ("initial", "local", "global"):
        slope, = torch.autograd.grad(predictions[name].sum(), net.classifier.bias, retain_graph=True)
        assert torch.allclose(slope, torch.full((N,), predictions[name][:, 0].numel() * 1.0))


def test_features_are_dropped_out_in_training_before_anything_reads_them():
    net, _ = small_net()                                                # [D6]
    x = torch.randn(4, 3, 32, 32)
    features, logits = net.train()(x)
    dropped = (features == 0).all(3).all(2)                             # whole channels
    assert 0 < dropped.float().mean() < 0.4
    assert torch.allclose(logits, net.classifier(features), atol=1e-6)


# ---- phases ----

@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("augment", ["both", "local", "global"])
def test_warmup_ends_with_its_last_iteration(augment, full):
    net, cfg = small_net(full=full, augment=augment, warmup=7)
    after = "global" if full and augment != "local" else "local"
    assert [pfa.phase_of(net, i, cfg) for i in (0, 6, 7, 8, 99)] == ["warmup", "warmup", after, after, after]
    assert pfa.phase_of(net, 0, replace(cfg, warmup=0)) == after


@pytest.mark.parametrize("method", ["pce", "full"])
def test_methods_without_prototypes_have_one_phase_their_own(method):
    net, cfg = small_net(method=method)
    assert net.augmenter is None and net.memory is None and net.paths() == []
    assert {pfa.phase_of(net, i, cfg) for i in (0, WARMUP - 1, WARMUP, ITERATIONS - 1)} == {method}


def test_the_global_phase_waits_for_the_last_slot_of_every_class_that_occurs():
    net, cfg = small_net()
    net.occurs.copy_(torch.tensor([True, True, True, False, True]))
    net.memory.count.copy_(torch.tensor([SLOTS, SLOTS, SLOTS - 1, 0, SLOTS]))
    assert pfa.phase_of(net, WARMUP, cfg) == "local"
    net.memory.count[2] += 1
    assert pfa.phase_of(net, WARMUP, cfg) == "global"                   # class 3 never occurs
    net.occurs[3] = True
    assert pfa.phase_of(net, WARMUP, cfg) == "local"


def classes_of_strokes(folder):
    """Classes with a stroke in some picture of a folder, by Pillow."""
    return {c for path in folder.glob("*.png") for c in np.unique(ids_in(path)).tolist()} - {255}


def classes_of_crop(mask):
    return sorted({0, *np.unique(mask).tolist()} - {255})               # the background always counts


def expected_phases(crops, waited_for, warmup=WARMUP, slots=SLOTS, augment="both"):
    """Phase of every iteration from the training masks of the batches: counters in plain Python. Also the
    iterations until all classes waited_for have n prototypes, and the images that counted for each class."""
    count, seen, full_at, phases = [0] * N, [0] * N, None, []
    for iteration, batch in enumerate(crops):
        fills = full_at is None or augment == "local"
        phases.append("warmup" if iteration < warmup else "local" if fills else "global")
        for mask in batch if iteration >= warmup else ():
            for c in classes_of_crop(mask):
                seen[c] += 1
                count[c] = min(slots, count[c] + 1)
        if full_at is None and all(count[c] == slots for c in waited_for):
            full_at = iteration + 1
    return phases, full_at, seen


def crops_of(data, iterations=ITERATIONS, seed=0, crop=32, scale=(0.5, 2.0)):
    """The training masks, batch by batch, as a user's own loader gives them."""
    strokes = datasets.open_dataset("folder", data, "train", mask_dir="strokes")
    view = loaders.ScribbleView(strokes, 0, crop, scale, 10.0, True)
    return [batch["mask"].numpy() for batch in loaders.train_loader(view, 3, seed, 0, iterations, 0, CPU)]


def test_phases_of_a_run_follow_from_its_training_masks(base, pictures):
    waited_for = classes_of_strokes(pictures / "strokes" / "train")
    assert waited_for == {0, 1, 2, 4}                                   # no ghost
    crops = crops_of(pictures)
    phases, full_at, _ = expected_phases(crops, waited_for)
    assert Counter(phases)["local"] >= 3 and Counter(phases)["global"] >= 3     # the case is worth its name
    assert [step.phase for step in base.steps] == phases
    assert base.metrics["iterations_until_bank_full"] == full_at
    assert base.metrics["phases"] == dict(Counter(phases))
    assert all(np.array_equal(step.scribbles, crop) for step, crop in zip(base.steps, crops))
    last = base.steps[-1]
    assert last.count.tolist() == [SLOTS, SLOTS, SLOTS, 0, SLOTS] and not last.bank[3].any()
    assert f"from iteration {WARMUP + 1} on: phase local" in base.stdout
    assert (f"from iteration {full_at + 1} on: phase global (memory full after {full_at} iterations, "
            "warm-up included)" in base.stdout)


@pytest.mark.parametrize("seed, warmup, slots, augment", [
    (1, 0, 1, "both"), (2, 1, 3, "both"), (3, 2, 1, "global"), (4, 3, 2, "local")])
def test_other_runs_fill_their_memory_as_the_masks_say(pictures, tmp_path, seed, warmup, slots, augment):
    flags = dict(warmup=warmup, slots=slots, augment=augment)
    found = watched(config(tmp_path, pictures, seed=seed, iterations=12, eval_every=12, **flags))
    phases, full_at, _ = expected_phases(crops_of(pictures, 12, seed), {0, 1, 2, 4}, **flags)
    assert [step.phase for step in found.steps] == phases
    expected = full_at if augment != "local" else None
    assert found.metrics["iterations_until_bank_full"] == expected and found.steps[-1].augmenter is not None
    if augment == "local":
        assert not found.steps[-1].bank.any() and not found.steps[-1].count.any()


@pytest.mark.parametrize("augment, paths", [("both", ["local"]), ("global", [])])
def test_a_memory_full_with_the_last_iteration_gives_no_global_prediction(
        base, pictures, tmp_path, no_figures, augment, paths):
    """Nothing has ever been trained on it: no scores, no log, no --predict, and no "full after" either."""
    last, image = base.metrics["iterations_until_bank_full"], pictures / "images" / "test" / "p2.png"
    said = done("--out", tmp_path, *on(pictures, iterations=last, eval_every=last, augment=augment))
    (net, _), metrics = load(tmp_path), read(tmp_path / "metrics.json")
    assert net.memory_full() and net.trained.tolist() == ["local" in paths, False]
    assert net.paths() == paths
    assert metrics["iterations_until_bank_full"] is None
    assert metrics["phases"] == dict(warmup=WARMUP, local=last - WARMUP)
    assert all(set(rates) == set(paths) for mode, rates in metrics["miou"].items() if mode != "plain")
    assert "memory never filled in time" in said and "phase global" not in said
    assert [row["val_global"] for row in rows_of_log(tmp_path)] == [""]
    for option in ("--eval-only", "--resume"):
        assert "memory never filled in time" in done("--out", tmp_path, option)
        assert numbers(read(tmp_path / "metrics.json")) == numbers(metrics)
    argv = ["--out", tmp_path, "--predict", image, "--infer", "filter"]
    assert "local prediction" in done(*argv) if paths else "no prototypes" in mistake(*argv)


def test_a_network_knows_the_predictions_that_it_was_trained_for(base, local, memory_only, pce, official):
    expected = {"both": ["local", "global"], "local": ["local"], "global": ["global"]}
    for found in (base, local, memory_only, official):
        assert load(found.out)[0].paths() == expected[found.metrics["augment"]]
    assert load(pce.out)[0].paths() == [] == small_net(full=True)[0].paths()
    assert "never filled" not in base.stdout


def test_prototypes_are_counted_from_the_first_iteration_after_the_warmup(base, pictures):
    for step in base.steps[:WARMUP]:
        assert set(step.predictions) == {"initial"} and not step.bank.any() and not step.count.any()
    for used, step in enumerate(base.steps, 1):
        seen = expected_phases([s.scribbles.numpy() for s in base.steps[:used]], {0})[2]
        assert step.count.tolist() == [min(SLOTS, k) for k in seen]
        assert torch.equal((step.bank != 0).any(2).sum(1), step.count)


def test_each_phase_has_its_predictions(base, local, memory_only, pce):
    expected = {"both": dict(warmup={"initial"}, local={"initial", "local"}),
                "local": dict(warmup={"initial"}, local={"initial", "local"}),
                "global": dict(warmup={"initial"}, local={"initial"})}
    expected["both"]["global"] = {"initial", "local", "global"}
    expected["global"]["global"] = {"initial", "global"}
    for name, found in (("both", base), ("local", local), ("global", memory_only)):
        assert {step.phase for step in found.steps} == set(expected[name])
        assert all(set(step.predictions) == expected[name][step.phase] for step in found.steps)
    assert all(step.phase == "pce" and set(step.terms) == {"pce"} for step in pce.steps)
    assert pce.metrics["phases"] == dict(pce=ITERATIONS)                # only phases that were entered
    assert local.metrics["phases"] == dict(warmup=WARMUP, local=ITERATIONS - WARMUP)
    assert [row["phase"] for row in rows_of_log(pce.out)] == ["pce"] * 3


def test_the_paper_takes_the_classes_of_the_crop_and_the_background(base):
    for step in base.steps[WARMUP:]:
        found = [row.nonzero()[:, 0].tolist() for row in step.present]
        assert found == [classes_of_crop(mask) for mask in step.scribbles]
    missed = [bool((step.image_classes & ~step.present).any()) for step in base.steps[WARMUP:]]
    assert any(missed)                                                  # of the whole image there are more


# ---- losses ----

def log_softmax(x):
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def slow_pce(logits, scribbles):
    large = F.interpolate(logits.double(), scribbles.shape[1:], mode="bilinear", align_corners=True).numpy()
    picked = np.argwhere(np.asarray(scribbles) != 255)
    log_p = log_softmax(large)
    return -np.mean([log_p[b, scribbles[b, i, j], i, j] for b, i, j in picked])


def slow_con(initial, augmented, reading="paper"):
    p, log_q = np.exp(log_softmax(initial.double().numpy())), log_softmax(augmented.double().numpy())
    if reading == "paper":
        return -(p * log_q).sum(1).mean()
    return -(np.exp(log_q) * log_softmax(p)).sum(1).mean()               # softmaxed twice


PHASES = {"both": ("warmup", "local", "global"), "local": ("warmup", "local"),
          "global": ("warmup", "local", "global")}
UNDER_PCE = {  # augment, --pce -> prediction by phase
    ("both", "moves"): ("initial", "local", "global"), ("both", "local"): ("initial", "local", "local"),
    ("both", "initial"): ("initial", "initial", "initial"), ("local", "moves"): ("initial", "local"),
    ("local", "local"): ("initial", "local"), ("local", "initial"): ("initial", "initial"),
    ("global", "moves"): ("initial", "initial", "global"),
    ("global", "local"): ("initial", "initial", "global"),
    ("global", "initial"): ("initial", "initial", "initial")}


@pytest.mark.parametrize("augment, option", list(UNDER_PCE))
def test_terms_of_the_loss_by_phase(augment, option):
    """Sec. 3.4, Fig. 2, [D7]: where L_pce looks, and the weights of both L_con."""
    net, cfg = small_net(augment=augment, pce=option, w_local=0.3, w_local_first=0.7, w_global=0.2)
    x, scribbles, _ = small_batch()
    for phase, under in zip(PHASES[augment], UNDER_PCE[augment, option]):
        made = pfa.predictions_of(net.eval(), net, x, pfa.classes_in(scribbles, N), phase, cfg)
        made = {name: logits.detach().requires_grad_() for name, logits in made.items()}
        losses = pfa.losses_of(made, scribbles, phase, cfg)
        slopes = torch.autograd.grad(losses["pce"], list(made.values()), allow_unused=True)
        assert {name for name, slope in zip(made, slopes) if slope is not None and slope.any()} == {under}
        assert losses["pce"].item() == pytest.approx(slow_pce(made[under].detach(), scribbles), rel=1e-5)
        first = phase == "local" and augment == "both"                  # while the memory fills
        weights = dict(con_local=0.7 if first else 0.3, con_global=0.2)
        assert set(losses) == {"pce"} | {f"con_{name}" for name in made if name != "initial"}
        initial = made.pop("initial").detach()
        for name, logits in made.items():
            expected = weights[f"con_{name}"] * slow_con(initial, logits.detach())
            assert losses[f"con_{name}"].item() == pytest.approx(expected, rel=1e-4)


def test_losses_of_a_run_are_those_of_its_predictions(base, memory_only):
    plain = {"warmup": "initial", "local": "initial", "global": "global"}
    for found, under in ((base, plain | {"local": "local"}), (memory_only, plain)):
        for step in found.steps:
            made = step.before
            expected = slow_pce(made[under[step.phase]], step.scribbles)
            assert step.terms["pce"] == pytest.approx(expected, rel=1e-4)
            for name in set(step.terms) - {"pce"}:
                expected = 0.01 * slow_con(made["initial"], made[name.removeprefix("con_")])
                assert step.terms[name] == pytest.approx(expected, rel=1e-4)
            assert ("local" in made) == (found is base and step.phase != "warmup")


def test_a_batch_without_strokes_costs_nothing_and_still_trains_the_consistency():
    net, cfg = small_net()
    x, scribbles, classes = small_batch()
    optimizer, scheduler = pfa.build_optimizer(net, cfg, CPU)
    empty = x, torch.full_like(scribbles, 255), torch.zeros_like(classes)
    for phase in ("warmup", "local", "global"):
        terms = pfa.train_step(net.train(), net, optimizer, scheduler, *empty, phase, cfg)
        assert terms["pce"] == 0 and all(math.isfinite(value) for value in terms.values())
    assert all(torch.isfinite(p).all() for p in net.parameters())


# ---- what learns, and how fast ----

def moved(net, cfg, phase, steps=2, classes=None):
    """Names of the state that two training steps of a phase change."""
    optimizer, scheduler = pfa.build_optimizer(net, cfg, CPU)
    before = copy.deepcopy(net.state_dict())
    model = pfa.wrap(net, phase, cfg, run.Machine(CPU))
    for k in range(steps):
        x, scribbles, image_classes = small_batch(k)
        pfa.train_step(model, net, optimizer, scheduler, x, scribbles, image_classes, phase, cfg)
    return {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("augment, phase", [(path, phase) for path in PHASES for phase in PHASES[path]])
def test_a_phase_trains_its_parameters_and_nothing_else(augment, phase):
    net, cfg = small_net(augment=augment, full=phase == "global")
    changed = moved(net, cfg, phase)
    names = set(net.state_dict())
    augmenter = {name for name in names if name.startswith("augmenter.")}
    memory = {"memory.bank"} | ({"memory.count"} if phase == "local" else set())
    expected = names - augmenter - {"memory.bank", "memory.count", "occurs", "trained"}
    if phase != "warmup" and (augment, phase) != ("global", "local"):
        expected |= augmenter | {"trained"}
    if phase != "warmup" and augment != "local":
        expected |= memory
    assert augmenter and changed == expected


def test_absent_classes_leave_the_memory_alone_in_a_step():
    for classes_of, expected in (("crop", [0, 1, 2]), ("image", [0, 1, 2, 4])):       # 4: not in the crop
        net, cfg = small_net(classes_of=classes_of)
        before = net.memory.bank.clone()
        moved(net, cfg, "global")
        assert [c for c in range(N) if not torch.equal(net.memory.bank[c], before[c])] == expected


def layer_norms(net):
    return {f"network.backbone.{name}.{key}" for name, module in net.network.backbone.named_modules()
            if isinstance(module, nn.LayerNorm) for key in ("weight", "bias")}


@pytest.mark.parametrize("reading", ["paper", "official"])
def test_the_layer_norms_of_the_backbone_learn_only_in_the_papers_reading(reading):
    net, cfg = small_net(reading=reading, backbone="mit_b0", weights="none")
    for block in net.network.backbone.modules():  # a dropped block would get no gradient
        if hasattr(block, "drop_path"):
            block.drop_path.p = 0.0
    changed, frozen = moved(net, cfg, "global"), layer_norms(net)
    trained = {name for name, _ in net.named_parameters()}
    assert len(frozen) > 40
    assert changed & trained == (trained - frozen if reading == "official" else trained)
    assert cfg.freeze_norms == (reading == "official")


def test_everything_but_the_backbone_learns_ten_times_as_fast():
    net, cfg = small_net(head_lr=10.0, lr=1e-3)
    optimizer, _ = pfa.build_optimizer(net, cfg, CPU)
    assert isinstance(optimizer, torch.optim.AdamW)
    name_of = {id(p): name for name, p in net.named_parameters()}
    found = {name_of[id(p)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups
             for p in group["params"]}
    assert found == {name: (1e-3 if name.startswith("network.backbone.") else 1e-2, 0.01)
                     for name, _ in net.named_parameters()}
    assert {"augmenter.fuse.weight", "classifier.bias"} <= set(found)


@pytest.mark.parametrize("policy, factor", [
    ("multistep", lambda i: 1 if i < 12 else 0.1 if i < 17 else 0.01), ("linear", lambda i: 1 - i / 20)])
def test_learning_rates_fall(policy, factor):
    net, cfg = small_net(lr=1e-3, head_lr=10.0, lr_policy=policy, iterations=20)
    optimizer, scheduler = pfa.build_optimizer(net, cfg, CPU)
    for i in range(20):
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([1e-3 * factor(i), 1e-2 * factor(i)])
        optimizer.step()
        scheduler.step()


def test_learning_rates_of_a_run(base, official):
    for i, step in enumerate(base.steps):                               # 60 and 85 % of 15
        assert step.lr == pytest.approx([2e-3 * (1 if i < 9 else 0.1 if i < 13 else 0.01)] * 2)
    for i, step in enumerate(official.steps):
        assert step.lr == pytest.approx([2e-3 * (1 - i / 10)] * 2)


# ---- the other reading ----

def test_the_official_reading_trains_with_its_own_confidence_loss_and_classes(official):
    assert [step.phase for step in official.steps][:4] == ["warmup"] * 3 + ["local"]
    assert math.isfinite(official.metrics["miou"]["plain"]["plain"])
    assert official.metrics["reading"] == "official"
    outside = 0
    for step in official.steps[3:]:
        assert step.readings == {("confidence", "official"), ("consistency_loss", "official")}
        crop = torch.zeros_like(step.present)
        for b, mask in enumerate(step.scribbles):
            crop[b, classes_of_crop(mask)] = True
        assert torch.equal(step.present, crop | step.image_classes)
        outside += int((step.image_classes & ~crop).sum())
        made, weight = step.before, 0.02 if step.phase == "local" else 0.01
        expected = weight * slow_con(made["initial"], made["local"], "official")
        assert step.terms["con_local"] == pytest.approx(expected, rel=1e-4)
    assert outside > 0
    assert all(math.isfinite(value) for step in official.steps for value in step.terms.values())


def test_the_official_reading_leaves_the_layer_norms_of_a_run_as_they_were(official):
    net, _ = load(official.out)
    state, norms = net.state_dict(), layer_norms(net)
    assert norms and all((state[name] == float(name.endswith("weight"))).all() for name in norms)


def test_the_paper_takes_its_own_confidence_and_loss(base):
    for step in base.steps[WARMUP:]:
        assert step.readings == {("confidence", "paper"), ("consistency_loss", "paper")}


# ---- what a run leaves ----

PROMISED = {"miou", "iou", "macc", "pixel_acc", "absent", "headline", "iterations_until_bank_full", "phases",
            "class_map", "split", "preset", "method", "augment", "reading", "seed", "iterations", "seconds",
            "device", "processes", "parameters"}
FILTER_MODES = ["filter_0", "filter_60", "filter_100", "filter_500", "filter_1000"]


def test_a_run_leaves_its_scores(base):
    metrics = base.metrics
    assert set(metrics) >= PROMISED
    assert list(metrics["miou"]) == ["plain", *FILTER_MODES, "classifier", "oracle"]
    assert set(metrics["miou"]["plain"]) == {"plain"}
    assert set(metrics["miou"]["oracle"]) == {"local", "global"}
    for mode, paths in metrics["iou"].items():
        for path, rates in paths.items():
            known = [rate for rate in rates.values() if rate is not None]
            assert tuple(rates) == CLASSES and 0 <= min(known) <= max(known) <= 100
            assert metrics["miou"][mode][path] == pytest.approx(np.mean(known))
    assert metrics["seconds"] > 0 and metrics["iterations"] == ITERATIONS and metrics["processes"] == 1
    about = dict(split="test", method="pfa", augment="both", reading="paper", seed=0)
    assert {key: metrics[key] for key in about} == about
    assert metrics["absent"] == ["kite"] and 0 <= metrics["class_map"] <= 100
    net, _ = load(base.out)
    assert metrics["parameters"] == sum(p.numel() for p in net.parameters())


def test_runs_of_other_branches_leave_theirs(local, memory_only, pce):
    assert set(local.metrics["miou"]["oracle"]) == {"local"}
    assert set(memory_only.metrics["miou"]["oracle"]) == {"global"}
    assert list(local.metrics["miou"]) == ["plain", *FILTER_MODES, "oracle"]
    assert set(pce.metrics["miou"]) == {"plain"} and pce.metrics["iterations_until_bank_full"] is None
    for found in (local, memory_only, pce):
        assert found.metrics["class_map"] is None and set(found.metrics) >= PROMISED


def test_the_summary_says_which_numbers_were_given_the_true_classes(base, pce):
    lines = [line for line in base.stdout.splitlines() if "TRUE CLASSES GIVEN" in line]
    oracle = base.metrics["miou"]["oracle"]
    assert len(lines) == 1 and f"local {oracle['local']:.1f}, global {oracle['global']:.1f}" in lines[0]
    assert f"test mIoU: plain {base.metrics['miou']['plain']['plain']:.1f}" in base.stdout
    assert "classes from the trained classifier (mAP" in base.stdout
    assert "TRUE CLASSES" not in pce.stdout and "oracle" not in pce.stdout


def test_filters_that_agree_share_a_line(base):
    """Every filter is in one line, with its own numbers."""
    told = {}
    for line in base.stdout.splitlines():
        if found := re.fullmatch(r"  classes with more than ([\d or]+) predicted pixels: (.*)", line):
            assert found[2] not in told.values()                        # equal numbers are said once
            told |= dict.fromkeys(found[1].split(" or "), found[2])
    rates = {mode: base.metrics["miou"][mode] for mode in FILTER_MODES}
    assert told == {mode.removeprefix("filter_"): f"local {r['local']:.1f}, global {r['global']:.1f}"
                    for mode, r in rates.items()}
    metrics = copy.deepcopy(base.metrics)
    for mode in FILTER_MODES[:4]:
        metrics["miou"][mode] = dict(local=50.0, **{"global": 60.0})
    metrics["miou"]["filter_1000"] = dict(local=50.0, **{"global": 60.2})
    said = pfa_figures.summary(metrics, load(base.out)[1])
    assert "more than 0 or 60 or 100 or 500 predicted pixels: local 50.0, global 60.0\n" in said
    assert "more than 1000 predicted pixels: local 50.0, global 60.2\n" in said


def test_the_scores_are_told_and_written_before_anything_is_drawn(local, tmp_path, monkeypatch):
    out = copy_of(local.out, tmp_path / "run")
    (out / "metrics.json").unlink()

    def draw_figures(*args):
        raise run.UserError("the disk is full.")

    monkeypatch.setattr(pfa_figures, "draw_figures", draw_figures)
    ended = script("--out", out, "--eval-only")
    assert ended.returncode == 2 and "the disk is full" in ended.stderr
    assert "test mIoU: plain" in ended.stdout
    assert numbers(read(out / "metrics.json")) == numbers(local.metrics)


def test_the_headline_is_never_told_the_true_classes(base, local, pictures):
    assert base.metrics["headline"] == "classifier" and local.metrics["headline"] == "filter_60"
    cfg, scores = config("unused", pictures), {"p0": torch.zeros(N)}
    for given, now in ((None, cfg), (scores, cfg), (scores, replace(cfg, class_scores="x.npz"))):
        modes = pfa.all_modes(given, now)
        assert modes[-1] == "oracle" and modes.count("oracle") == 1 and len(set(modes)) == len(modes)
        assert pfa.headline_mode(given, now) in modes[:-1]
    assert pfa.headline_mode(scores, replace(cfg, class_scores="x.npz")) == "scores"


def test_training_without_the_true_classes_of_the_val_split(pictures, tmp_path, monkeypatch):
    """Neither log.csv nor anything before the report asks for the oracle."""
    asked, evaluate = [], pfa.evaluate

    def asking(predictor, data, machine, modes=(), scores=None):
        asked.append((data.split, list(modes)))
        return evaluate(predictor, data, machine, modes, scores)

    monkeypatch.setattr(pfa, "evaluate", asking)
    train(config(tmp_path, pictures))
    assert [modes for split, modes in asked if split == "val"] == [["filter_60"]] * 3
    assert asked[-1] == ("test", [*FILTER_MODES, "oracle"])


def test_the_log_has_a_row_for_every_evaluation(base, memory_only):
    rows = rows_of_log(base.out)
    assert list(rows[0]) == ["iteration", "phase", "lr", "pce", "con_local", "con_global", "val_plain",
                             "val_local", "val_global", "seconds"]
    phases = [step.phase for step in base.steps]
    found = [(int(row["iteration"]), row["phase"]) for row in rows]
    assert found == [(i, phases[i - 1]) for i in (5, 10, 15)]
    for row in rows:
        last = int(row["iteration"])
        for name in ("pce", "con_local", "con_global"):                 # means since the row before
            values = [step.terms[name] for step in base.steps[last - 5:last] if name in step.terms]
            if values:
                assert float(row[name]) == pytest.approx(np.mean(values), rel=1e-5)
            else:
                assert row[name] == ""
        assert all(0 <= float(row[f"val_{path}"]) <= 100 for path in ("plain", "local"))
    seconds = [float(row["seconds"]) for row in rows]
    assert rows[-1]["val_global"] and seconds == sorted(seconds)
    assert all(row["val_local"] == "" for row in rows_of_log(memory_only.out))
    first = base.stdout.splitlines()
    assert any(f"{ITERATIONS} steps of 3 images" in line and "GiB" in line for line in first[:6])


def test_the_last_row_of_the_log_is_the_plain_evaluation_of_val(base, pictures):
    (net, cfg), val = load(base.out), datasets.open_dataset("folder", pictures, "val")
    found = evaluated(net, cfg, val, ["filter_60"])
    row = rows_of_log(base.out)[-1]
    assert float(row["val_plain"]) == pytest.approx(found["plain"]["plain"]["miou"])
    for path in ("local", "global"):
        assert float(row[f"val_{path}"]) == pytest.approx(found["filter_60"][path]["miou"])


def test_masks_that_tell_nothing_are_named_before_the_training(base):
    """Pictures 3 and 5 of the strokes; nobody drew a ghost."""
    before = base.stdout[:base.stdout.index(" steps of ")]
    assert "1 of 6 scribble masks label nothing, such as p5" in before
    assert "1 of 6 scribble masks label background alone, such as p3" in before
    assert "no training image has a stroke of ghost" in before
    assert re.search(r"strokes label \d+\.\d % of the pixels of 6 training images", before)


def assert_pictures(folder, names):
    assert files(folder) == set(names)
    for name in names:
        with Image.open(folder / name) as image:
            assert image.format == "PNG" and image.mode == "RGB"
            assert min(image.size) >= 80 and max(image.size) <= 4000
            assert len(np.unique(np.asarray(image)[::7, ::7])) > 5


def test_figures_of_a_run(base, pce):
    every = {"colours.png", "examples.png", "training.png", "miou.png"}
    more = {"confidence.png", "attention.png", "attention_matrix.png"}
    assert_pictures(base.out / "figures", every | more)
    assert_pictures(pce.out / "figures", every)


def test_the_colours_of_the_classes_are_there_to_be_picked(base):
    """A swatch of at least 10 x 10 pixels of every class, in the colour of the overlays."""
    drawn = ids_in(base.out / "figures" / "colours.png")
    for colour in figures.palette(N).numpy():
        assert (drawn == colour).all(2).sum() >= 100


def test_a_last_test_picture_without_labels_is_drawn_too(base, pictures, tmp_path, monkeypatch):
    """attention_matrix.png is of the last of the four pictures drawn that has labels."""
    for name in ("draw_examples", "draw_training", "draw_confidence"):
        monkeypatch.setattr(pfa_figures, name, lambda *args: None)
    drawn, save = [], figures.save_matrix
    monkeypatch.setattr(figures, "save_matrix", lambda *args, **how: drawn.append(args) or save(*args, **how))
    data, out = Path(shutil.copytree(pictures, tmp_path / "data")), copy_of(base.out, tmp_path / "run")
    Image.fromarray(np.full((37, 51), 255, np.uint8)).save(data / "masks" / "test" / "p3.png")
    done("--out", out, "--eval-only", "--data", data)
    (path, values, rows, columns), = drawn
    there = np.unique(ids_in(pictures / "masks" / "test" / "p2.png")).tolist()
    assert rows == [CLASSES[c] for c in there] and path.exists() and values.shape == (len(rows), len(columns))
    trained = [c for c in there if c != 3]                              # nobody drew a ghost: empty slots
    assert columns == [f"{CLASSES[c]} {slot}" for c in trained for slot in (1, 2)]
    assert torch.allclose(values.sum(1), torch.ones(len(rows)), atol=1e-5)
    for k in range(5):
        size = ids_in(data / "images" / "test" / f"p{k}.png").shape[:2]
        if k != 4:                                                      # the fifth is not drawn
            Image.fromarray(np.full(size, 255, np.uint8)).save(data / "masks" / "test" / f"p{k}.png")
    done("--out", out, "--eval-only", "--data", data)
    assert len(drawn) == 1


def test_a_seed_decides_and_announcing_the_time_changes_nothing(base, pictures, tmp_path):
    """`base` announced it; train() of this file does not."""
    train(config(tmp_path / "same", pictures))
    train(config(tmp_path / "other", pictures, seed=1, iterations=5))
    again, other, first = (run.read_checkpoint(p / "last.pt")["model"]
                           for p in (tmp_path / "same", tmp_path / "other", base.out))
    assert same(again, first) and not same(other, first)


# ---- resume ----

@contextlib.contextmanager
def killed(place, call=0):
    """Ctrl-C when iteration `call` of the training or of the classifier begins, or as the report begins."""
    step, sample, now = pfa.train_step, ImageLabels.__getitem__, SimpleNamespace(steps=0, samples=0)

    def train_step(*args):
        now.steps += 1
        if (place, call) == ("train", now.steps):
            raise KeyboardInterrupt
        return step(*args)

    def read_sample(self, key):
        now.samples += 1
        if place == "classifier" and now.samples > TINY["batch_size"] * (call - 1):
            raise KeyboardInterrupt
        return sample(self, key)

    def report(*args):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pfa, "train_step", train_step)
        patch.setattr(ImageLabels, "__getitem__", read_sample)
        if place == "report":
            patch.setattr(pfa, "report", report)
        yield


def interrupt(place, call, *argv):
    with killed(place, call):
        ended = script(*argv)
    assert ended.returncode == 130 and "--resume" in ended.stderr, ended.stdout + ended.stderr


def assert_same_run(a, b):
    """Weights, memory, optimizer, random numbers, scores, log, metrics of two folders: equal bit for bit."""
    for name in sorted({"last.pt", "classifier.pt"} & files(a)):
        assert same(run.read_checkpoint(a / name), run.read_checkpoint(b / name)), name
    assert numbers(read(a / "metrics.json")) == numbers(read(b / "metrics.json"))
    assert [numbers(row) for row in rows_of_log(a)] == [numbers(row) for row in rows_of_log(b)]
    if "class_scores-test.npz" in files(a):
        first, second = (dict(np.load(path / "class_scores-test.npz")) for path in (a, b))
        assert set(first) == set(second) and all(np.array_equal(first[name], second[name]) for name in first)


KILLS = [("train", 2, 2), ("train", 4, 2), ("train", 6, 2), ("train", 11, 3), ("train", 14, 2),
         ("classifier", 1, 2), ("classifier", 4, 2), ("report", 0, 2)]  # place, call, --save-every


def test_the_kills_below_meet_every_phase(base):
    phases = [base.steps[call - 1].phase for place, call, _ in KILLS if place == "train"]
    assert phases == ["warmup"] * 2 + ["local"] + ["global"] * 2
    assert base.metrics["iterations_until_bank_full"] == 9              # 11, 3: full, and nobody has noticed


@pytest.mark.parametrize("place, call, every", KILLS)
def test_resume_in_every_phase_ends_with_the_same_numbers(
        base, pictures, tmp_path, no_figures, place, call, every):
    """Iterations since the last checkpoint are lost, with their row of the log."""
    interrupt(place, call, "--out", tmp_path, *on(pictures, train_classifier=True, save_every=every))
    assert not (tmp_path / "metrics.json").exists() and (tmp_path / "last.pt").exists() == (call != 2)
    if place == "train" and call > 2:
        saved = run.read_checkpoint(tmp_path / "last.pt")["progress"]
        assert saved["iteration"] == (call - 1) // every * every
    if place == "classifier":
        assert (tmp_path / "classifier.pt").exists() == (call == 4)
    done("--out", tmp_path, "--resume")
    assert_same_run(base.out, tmp_path)


@pytest.mark.parametrize("reading", ["paper", "official"])
def test_resume_again_and_again(pictures, tmp_path, no_figures, reading):
    flags = dict(reading=reading, augment="global", train_classifier=True)
    train(config(tmp_path / "whole", pictures, **flags))
    broken = ["--out", tmp_path / "broken"]
    interrupt("train", 4, *broken, *on(pictures, **flags))
    for call in (5, 4, 3):                                              # counted from each start
        interrupt("train", call, *broken, "--resume")
    interrupt("classifier", 4, *broken, "--resume")
    done(*broken, "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_the_checkpoint_holds_the_memory_and_when_it_was_full(base):
    saved, last = run.read_checkpoint(base.out / "last.pt"), base.steps[-1]
    assert torch.equal(saved["model"]["memory.bank"], last.bank) and last.bank.any()
    assert torch.equal(saved["model"]["memory.count"], last.count)
    assert saved["model"]["occurs"].tolist() == [True, True, True, False, True]
    assert saved["progress"]["phases"] == base.metrics["phases"]


def test_resume_of_a_finished_run_repeats_its_report(base, tmp_path, no_figures):
    copy_of(base.out, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    done("--out", tmp_path / "run", "--resume")
    assert_same_run(base.out, tmp_path / "run")


def test_a_new_run_in_the_same_folder_owes_nothing_to_the_earlier_one(base, pictures, tmp_path):
    """Its classifier too is trained anew, and what the earlier run left is moved aside."""
    flags = dict(seed=3, iterations=6, train_classifier=True)
    out = copy_of(base.out, tmp_path / "out")
    train(config(out, pictures, **flags))
    train(config(tmp_path / "fresh", pictures, **flags))
    assert_same_run(tmp_path / "fresh", out)
    moved_away, first = (run.read_checkpoint(p / "classifier.pt") for p in (out / "previous-1", base.out))
    assert same(moved_away, first)


# ---- evaluation ----

def softmax(x):
    return np.exp(log_softmax(x))


def plain_logits(net, image):
    """Image (H,W,3) uint8 -> features (C,h,w), logits (N,h,w), enlarged logits (N,H,W) as an array."""
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    x = torch.from_numpy(((image - mean) / std).astype(np.float32)).permute(2, 0, 1)[None].contiguous()
    with torch.no_grad():
        features, logits = net.eval()(x)
    return features[0], logits[0], enlarged(logits[0], image.shape[:2])


def enlarged(logits, size):
    return F.interpolate(logits[None], size, mode="bilinear", align_corners=True)[0].numpy()


def slow_keys(net, path, features, logits, classes, fraction=0.08):
    """Prototypes of the classes alone, (K,C): those of this image (Eq. 1 to 3), or slots of the memory."""
    if path == "global":
        slots = net.memory.bank[classes].flatten(0, 1)
        return slots[slots.any(1)]
    f, p, rows = features.flatten(1).numpy(), softmax(logits[None].numpy())[0].reshape(N, -1), []
    for c in classes:
        best = np.argsort(-p[c], kind="stable")[:max(1, int(fraction * p.shape[1]))]
        mean = (p[c, best] * f[:, best]).sum(1) / p[c, best].sum()
        rows.append(mean / np.linalg.norm(mean))
    return torch.from_numpy(np.stack(rows)).float()


def slow_augmented(net, path, features, logits, classes, size):
    """Eq. (6) to (8) with no key but those of the classes -> enlarged logits (N,H,W)."""
    a, f, keys = net.augmenter, features.flatten(1).T, slow_keys(net, path, features, logits, classes)
    with torch.no_grad():
        e_f, e_fp = a.project_feature(f), a.project_prototype(keys)
        omega = (e_f @ e_fp.T).softmax(1)
        f_aug = (f + a.expand(a.fuse(torch.cat([omega @ e_fp, e_f], 1)).relu())).relu()
        logits = net.classifier(f_aug.T.reshape(features.shape)[None])[0]
    return enlarged(logits, size)


def slow_rates(pairs):
    """[(labels, ids)] -> IoU of the classes in percent, None where a class occurs in neither."""
    counts = np.zeros((N, N), int)
    for labels, ids in pairs:
        for t, p in zip(labels[labels != 255].tolist(), ids[labels != 255].tolist()):
            counts[t, p] += 1
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    return [100 * counts[c, c] / union[c] if union[c] else None for c in range(N)]


def slow_evaluation(net, pictures, scores, paths=("local", "global"), filters=(0, 60, 100, 500, 1000)):
    """{(mode, path): IoUs} of the test split, every mode, from the files alone."""
    pairs = {}
    for k in range(5):
        image = ids_in(pictures / "images" / "test" / f"p{k}.png")
        labels = ids_in(pictures / "masks" / "test" / f"p{k}.png")
        features, logits, large = plain_logits(net, image)
        plain = large.argmax(0)
        sets = {f"filter_{T}": {c for c in range(N) if (plain == c).sum() > T} for T in filters}
        sets["oracle"] = set(np.unique(labels).tolist()) - {255}
        if scores is not None:
            sets["classifier"] = {c for c in range(1, N) if scores[f"p{k}"][c] > 0.5}
        pairs.setdefault(("plain", "plain"), []).append((labels, plain))
        for mode, classes in sets.items():
            for path in paths:
                found = slow_augmented(net, path, features, logits, sorted(classes | {0}), labels.shape)
                pairs.setdefault((mode, path), []).append((labels, found.argmax(0)))
    return {key: slow_rates(values) for key, values in pairs.items()}


def assert_rates(found, expected, tolerance=0.5):                      # a pixel or two may lie on a border
    for (mode, path), rates in expected.items():
        score = found[mode][path]
        assert [rate is None for rate in score["iou"]] == [rate is None for rate in rates]
        known = [rate for rate in rates if rate is not None]
        assert [rate for rate in score["iou"] if rate is not None] == pytest.approx(known, abs=tolerance)
        assert score["miou"] == pytest.approx(np.mean(known), abs=tolerance)
    assert {(mode, path) for mode, paths in found.items() for path in paths} == set(expected)


def scores_of_run(out, split="test"):
    with np.load(out / f"class_scores-{split}.npz") as file:
        return {name: file[name] for name in file.files}


def telling(net):
    """The network with an augmenter so strong that the choice of the classes decides pixels."""
    with torch.no_grad():
        for layer in (net.augmenter.expand, net.augmenter.project_prototype):
            layer.weight.mul_(6)
    return net


def test_every_mode_is_scored_as_counted_by_hand(base, pictures):
    net, cfg = load(base.out)
    scores = scores_of_run(base.out)
    slow = slow_evaluation(telling(net), pictures, scores)
    assert len({str(rates) for (_, path), rates in slow.items() if path == "global"}) >= 4    # modes differ
    rows = {name: torch.from_numpy(row) for name, row in scores.items()}
    test = datasets.open_dataset("folder", pictures, "test")
    assert_rates(evaluated(net, cfg, test, pfa.all_modes(rows, cfg), rows), slow)


def test_the_scores_of_a_run_are_those_of_its_checkpoint(base, pictures):
    slow = slow_evaluation(load(base.out)[0], pictures, scores_of_run(base.out))
    found = {mode: {path: dict(miou=base.metrics["miou"][mode][path], iou=list(rates.values()))
                    for path, rates in paths.items()} for mode, paths in base.metrics["iou"].items()}
    assert_rates(found, slow)


def test_a_filter_of_all_pixels_leaves_the_background_alone(base, pictures):
    net, cfg = load(base.out)
    telling(net)
    test, modes = datasets.open_dataset("folder", pictures, "test"), ["filter_1887", "filter_99999"]
    found = evaluated(net, cfg, test, modes)
    assert found["filter_1887"] == found["filter_99999"]  # 51 x 37 pixels are not more than 1887
    slow = slow_evaluation(net, pictures, None, filters=(1887,))
    slow.pop(("oracle", "local")), slow.pop(("oracle", "global"))
    assert_rates({mode: found[mode] for mode in ("plain", "filter_1887")}, slow)


def test_modes_that_agree_on_the_classes_are_computed_once_and_score_the_same(base, pictures, monkeypatch):
    net, cfg = load(base.out)
    test, calls, augmented = datasets.open_dataset("folder", pictures, "test"), [], pfa.Predictor.augmented
    monkeypatch.setattr(pfa.Predictor, "augmented", lambda *args: calls.append(args) or augmented(*args))
    rows = {test.name_of(i): torch.zeros(N) for i in range(len(test))}  # no class but the background
    found = evaluated(net, cfg, test, ["filter_1887", "scores", "filter_5000"], rows)
    assert found["filter_1887"] == found["scores"] == found["filter_5000"] and len(calls) == len(test)


def test_class_sets_by_hand():
    plain = torch.tensor([[1, 1, 1, 2], [2, 4, 4, 4]])                  # 3 pixels of 1, 2 of 2, 3 of 4
    labels = torch.tensor([[255, 3, 3, 3], [255, 255, 255, 255]])
    scores = torch.tensor([1.0, 0.5, 0.51, 0.2, 0.9])
    modes = ["filter_0", "filter_1", "filter_2", "filter_3", "scores", "classifier", "oracle"]
    sets = pfa.class_sets(plain, N, modes, labels, scores, 0.5)
    found = {mode: here.nonzero()[:, 0].tolist() for mode, here in sets.items()}
    assert found == dict(filter_0=[0, 1, 2, 4], filter_1=[0, 1, 2, 4], filter_2=[0, 1, 4], filter_3=[0],
                         scores=[0, 2, 4], classifier=[0, 2, 4], oracle=[0, 3])
    strict = pfa.class_sets(plain, N, ["scores"], scores=scores, threshold=0.95)["scores"]
    assert strict.tolist() == [True] + [False] * 4
    assert all(here.dtype == torch.bool and here.shape == (N,) for here in sets.values())


def test_a_threshold_of_the_scores_reaches_the_evaluation(base, pictures, tmp_path, no_figures):
    out = copy_of(base.out, tmp_path / "run")
    done("--out", out, "--eval-only", "--score-threshold", 1)  # no score is above: background alone
    metrics = read(out / "metrics.json")
    done("--out", out, "--eval-only", "--filter", 5000)
    assert metrics["miou"]["classifier"] == read(out / "metrics.json")["miou"]["filter_5000"]
    assert read(out / "metrics.json")["miou"]["plain"] == base.metrics["miou"]["plain"]


def slow_map(scores, truth):
    """Mean over the classes that occur of the mean over their positives of the precision down to there."""
    values = []
    for c in range(scores.shape[1]):
        order = sorted(range(len(scores)), key=lambda m: -scores[m, c])   # sorted() keeps the order of ties
        hits, precisions = 0, []
        for rank, m in enumerate(order, 1):
            if truth[m, c]:
                hits += 1
                precisions.append(hits / rank)
        if precisions:
            values.append(np.mean(precisions))
    return 100 * np.mean(values)


def test_mean_average_precision_by_hand():
    scores = torch.tensor([[0.9, 0.1], [0.5, 0.1], [0.5, 0.7], [0.1, 0.1]])
    truth = torch.tensor([[True, False], [False, True], [True, False], [False, False]])
    # class 0: hits at ranks 1 and 3; class 1: the first of three ties is a miss, so its hit has rank 3
    assert mean_average_precision(scores, truth) == pytest.approx(100 * ((1 + 2 / 3) / 2 + 1 / 3) / 2)
    truth[:, 1] = False
    assert mean_average_precision(scores, truth) == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert math.isnan(mean_average_precision(scores, torch.zeros_like(truth)))
    assert mean_average_precision(truth.float(), truth) == pytest.approx(100)


@pytest.mark.parametrize("seed", range(4))
def test_mean_average_precision_is_the_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(4, (17, 6), generator=generator) / 3         # many ties
    truth = torch.rand(17, 6, generator=generator) < 0.3
    expected = slow_map(scores.numpy(), truth.numpy())
    assert mean_average_precision(scores, truth) == pytest.approx(expected)


def test_the_map_of_a_run_is_that_of_its_scores(base, pictures):
    scores = scores_of_run(base.out)
    truth = np.zeros((5, N), bool)
    for k in range(5):
        labels = ids_in(pictures / "masks" / "test" / f"p{k}.png")
        truth[k, np.unique(labels[labels != 255])] = True
    rows = np.stack([scores[f"p{k}"] for k in range(5)])
    learned = [c for c in sorted(classes_of_strokes(pictures / "strokes" / "train")) if c]
    assert learned == [1, 2, 4] and truth[:, 3].any() and not truth[:, 4].any()       # no stroke of a ghost
    assert base.metrics["class_map"] == pytest.approx(slow_map(rows[:, learned], truth[:, learned]), abs=1e-3)
    assert (rows[:, 0] == 1).all() and (0 <= rows).all() and (rows <= 1).all()


def test_eval_only_repeats_the_metrics(base, local, pce, official, tmp_path, no_figures):
    for found in (base, local, pce, official):
        out = copy_of(found.out, tmp_path / found.out.name)
        before = (out / "last.pt").read_bytes()
        done("--out", out, "--eval-only")
        assert numbers(read(out / "metrics.json")) == numbers(found.metrics)
        assert (out / "last.pt").read_bytes() == before


def test_eval_only_on_another_split(base, pictures, tmp_path, no_figures):
    out = copy_of(base.out, tmp_path / "run")
    done("--out", out, "--eval-only", "--test-split", "val")
    metrics = read(out / "metrics.json")
    assert metrics["split"] == "val" and metrics["absent"] == ["ghost", "kite"]
    assert metrics["miou"]["plain"]["plain"] == pytest.approx(float(rows_of_log(base.out)[-1]["val_plain"]))


def test_evaluation_changes_neither_weights_nor_memory(base, pictures):
    (net, cfg), test = load(base.out), datasets.open_dataset("folder", pictures, "test")
    before = copy.deepcopy(net.state_dict())
    evaluated(net, cfg, test, ["filter_0", "oracle"])
    assert same(net.state_dict(), before)


def test_evaluation_takes_images_at_the_size_that_is_asked_for(base, pictures, tmp_path, no_figures):
    net, cfg = load(base.out)
    test, sizes = datasets.open_dataset("folder", pictures, "test"), []
    hook = net.network.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape[2:])))
    evaluated(net, cfg, test)
    evaluated(net, replace(cfg, test_size=64), test)
    hook.remove()
    assert sizes[:5] == [(37, 51), (34, 44)] + [(37, 51)] * 3           # [D16]: whole images
    assert sizes[5:7] == [(64, 88), (64, 83)]


def test_the_size_of_test_images_may_be_chosen_after_the_training(local, tmp_path, no_figures):
    out = copy_of(local.out, tmp_path / "run")
    done("--out", out, "--eval-only", "--test-size", 64)
    assert read(out / "metrics.json")["miou"] != local.metrics["miou"]
    assert read(out / "config.json")["test_size"] == 0                  # the run is as it was
    done("--out", out, "--eval-only")
    assert numbers(read(out / "metrics.json")) == numbers(local.metrics)


# ---- strokes, full masks and the classifier ----

@contextlib.contextmanager
def reading_masks():
    """Folders of which a mask was read: a set of names such as "strokes/train"."""
    found, reader = set(), datasets.read_index_map

    def reading(path, *args):
        found.add("/".join(Path(path).parent.parts[-2:]))
        return reader(path, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "read_index_map", reading)
        yield found


@pytest.mark.parametrize("method, masks", [
    ("pfa", "strokes/train"), ("pce", "strokes/train"), ("full", "masks/train")])
def test_training_reads_strokes_or_full_masks_and_never_both(pictures, tmp_path, method, masks):
    with reading_masks() as found:
        metrics = train(config(tmp_path, pictures, method=method, train_classifier=True, iterations=5))
    assert found == {masks, "masks/val", "masks/test"} and math.isfinite(metrics["miou"]["plain"]["plain"])
    assert metrics["method"] == method and set(metrics["miou"]["plain"]) == {"plain"}
    assert metrics["phases"] == {"pfa": dict(warmup=4, local=1)}.get(method, {method: 5})
    made = {"classifier.pt", "class_scores-test.npz"} & files(tmp_path)
    assert len(made) == (2 if method == "pfa" else 0)                   # of no use to baselines


def test_a_classifier_may_follow_when_the_run_is_done(base, local, pce, pictures, tmp_path, no_figures):
    """It is the one that a run of the same seed trains at once; the network stays."""
    out, image = copy_of(local.out, tmp_path / "run"), pictures / "images" / "test" / "p2.png"
    before = (out / "last.pt").read_bytes()
    said = done("--out", out, "--eval-only", "--train-classifier")
    mine, theirs = (run.read_checkpoint(folder / "classifier.pt")["model"] for folder in (out, base.out))
    assert same(mine, theirs) and (out / "last.pt").read_bytes() == before
    metrics = read(out / "metrics.json")
    assert metrics["headline"] == "classifier" and metrics["class_map"] == base.metrics["class_map"]
    assert metrics["miou"].pop("classifier") and metrics["miou"] == local.metrics["miou"]
    assert "classes from the trained classifier" in said
    assert "local prediction" in done("--out", out, "--predict", image, "--infer", "classifier")
    made = (out / "classifier.pt").stat().st_mtime_ns
    done("--out", out, "--eval-only", "--train-classifier", "--test-split", "val")  # no second training
    assert {"class_scores-test.npz", "class_scores-val.npz"} <= files(out)
    assert (out / "classifier.pt").stat().st_mtime_ns == made
    assert set(scores_of_run(out, "val")) == {"p0", "p1"}
    baseline = copy_of(pce.out, tmp_path / "pce")
    done("--out", baseline, "--eval-only", "--train-classifier")
    again = read(baseline / "metrics.json")
    assert again["miou"] == pce.metrics["miou"] and again["headline"] == pce.metrics["headline"]
    assert not (baseline / "classifier.pt").exists()


@pytest.fixture(scope="module")
def other_masks(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("other"), change=2)


def test_neither_network_nor_classifier_learns_from_full_masks(base, other_masks, tmp_path):
    """The same strokes under other full masks in train and test: the same weights and scores of classes."""
    metrics = train(config(tmp_path, other_masks, train_classifier=True))
    for name in ("last.pt", "classifier.pt"):
        mine, theirs = (run.read_checkpoint(folder / name)["model"] for folder in (tmp_path, base.out))
        assert same(mine, theirs), name
    mine, theirs = scores_of_run(tmp_path), scores_of_run(base.out)
    assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)
    assert metrics["miou"]["plain"] != base.metrics["miou"]["plain"]     # scored on other labels


def test_the_classifier_is_told_the_classes_of_the_strokes(pictures):
    cfg = config("unused", pictures)
    view = ImageLabels(pfa.open_sets(cfg)["train"], 32, square=True)
    for k in range(6):
        sample, strokes = view[k, 0], ids_in(pictures / "strokes" / "train" / f"p{k}.png")
        assert sample["classes"].nonzero()[:, 0].tolist() == classes_of_crop(strokes)
        assert sample["image"].shape == (3, 32, 32)
        assert torch.equal(view[k, 1]["image"], sample["image"].flip(2))
    assert build_classifier(cfg, N)(torch.randn(2, 3, 32, 32)).shape == (2, N - 1)


def test_scores_of_the_run_are_its_classifiers_on_the_whole_picture(base, pictures):
    net, cfg = build_classifier(config("unused"), N), config("unused")
    run.load_checkpoint(base.out / "classifier.pt", dict(model=net), CPU)
    for name, row in scores_of_run(base.out).items():
        image = read_image(pictures / "images" / "test" / f"{name}.png")
        x = transforms.normalise(transforms.resize_whole(image, 32, square=True))[None]
        with torch.no_grad():
            assert np.allclose(row[1:], net.eval()(x)[0].sigmoid(), atol=1e-6)
        assert np.array_equal(row, classify(net, image, cfg, CPU))


@pytest.mark.parametrize("flags", [dict(scribble_drop=0.6), dict(scribble_shrink=1.0)])
def test_weaker_strokes_reach_the_training_and_not_the_labels_of_the_test(pictures, flags):
    def labelled(data):
        return sum(int((data.read_mask(i) != 255).sum()) for i in range(len(data)))

    usual, weak = (pfa.open_sets(config("unused", pictures, **f)) for f in ({}, flags))
    assert 0 < labelled(weak["train"]) < 0.7 * labelled(usual["train"])
    for split in ("val", "test"):
        assert labelled(weak[split]) == labelled(usual[split])


# ---- scores of a classifier of one's own ----

def write_scores(path, names=("p0", "p1", "p2", "p3", "p4"), **changed):
    rng = np.random.default_rng(0)
    np.savez(path, **{name: rng.random(N) for name in names} | changed)
    return path


def test_a_runs_own_scores_can_be_handed_back(base, tmp_path, no_figures):
    out = copy_of(base.out, tmp_path / "run")
    without = {name: row[1:].astype(np.float64) for name, row in scores_of_run(base.out).items()}
    np.savez(tmp_path / "without_background.npz", **without, unused=np.zeros(3))
    for path in (base.out / "class_scores-test.npz", tmp_path / "without_background.npz"):
        done("--out", out, "--eval-only", "--class-scores", path)
        metrics = read(out / "metrics.json")
        assert metrics["headline"] == "scores" and "classifier" not in metrics["miou"]
        assert metrics["miou"]["scores"] == base.metrics["miou"]["classifier"]
        assert metrics["class_map"] == base.metrics["class_map"]


def test_the_background_is_there_whatever_its_score(pictures, tmp_path):
    test = datasets.open_dataset("folder", pictures, "test")
    path = write_scores(tmp_path / "s.npz", p0=np.zeros(N), p1=np.arange(N), p2=np.arange(1, N))
    cfg = config("unused", pictures, class_scores=str(path))
    scores = pfa.scores_of_file(cfg, test)
    assert same(scores, read_scores(path, [f"p{k}" for k in range(5)], N))
    assert scores["p0"].tolist() == [1, 0, 0, 0, 0] and scores["p1"].tolist() == [1, 1, 2, 3, 4]
    assert scores["p2"].tolist() == [1, 1, 2, 3, 4] and set(scores) == {f"p{k}" for k in range(5)}
    assert pfa.scores_of_file(replace(cfg, class_scores=""), test) is None
    assert all(row.dtype == torch.float32 and row.shape == (N,) for row in scores.values())


@pytest.mark.parametrize("low, high, noted", [(0.0, 1.0, ""), (-0.01, 0.9, "from -0.01 to 1"),
                                              (0.0, 7.25, "from 0 to 7.25")])
def test_scores_that_are_no_probabilities_are_noted(tmp_path, capsys, low, high, noted):
    row = np.array([low, high, 0.5, 0.5])
    scores = read_scores(write_scores(tmp_path / "s.npz", names=("p0",), p1=row), ["p0", "p1"], N)
    said = capsys.readouterr().out
    assert scores["p1"].tolist() == pytest.approx([1, *row])            # taken as they are
    if noted:
        assert said.startswith(f"note: {tmp_path / 's.npz'} ") and said.count("\n") == 1
        assert noted in said and "sigmoid" in said and "--score-threshold" in said
    else:
        assert said == ""


def test_an_image_may_have_any_name(base, pictures, tmp_path, no_figures):
    """numpy.savez has a parameter called "file"."""
    data, out = Path(shutil.copytree(pictures, tmp_path / "data")), copy_of(base.out, tmp_path / "run")
    for kind in ("images", "masks"):
        (data / kind / "test" / "p2.png").rename(data / kind / "test" / "file.png")
    done("--out", out, "--eval-only", "--data", data)
    theirs = scores_of_run(base.out)
    assert {"file" if name == "p2" else name for name in theirs} == set(scores_of_run(out))
    assert np.array_equal(scores_of_run(out)["file"], theirs["p2"])
    done("--out", out, "--eval-only", "--data", data, "--class-scores", out / "class_scores-test.npz")
    assert read(out / "metrics.json")["miou"]["scores"] == base.metrics["miou"]["classifier"]


WRONG_SCORES = {
    "missing": (dict(names=("p0", "p2", "p3")), ["lacks 2 of 5 images", "p1"]),
    "short": (dict(p3=np.zeros(N - 2)), ["p3", "5", "4"]), "long": (dict(p3=np.zeros(N + 1)), ["p3"]),
    "flat": (dict(p3=np.float64(1)), ["p3"]), "table": (dict(p3=np.zeros((1, N))), ["p3"]),
    "nan": (dict(p3=np.array([0, 1, np.nan, 0, 1])), ["p3", "finite"]),
    "inf": (dict(p3=np.array([0, 1, np.inf, 0, 1])), ["p3", "finite"]),
    "text": (dict(p3=np.array(["a"] * N)), ["p3"]),
    "objects": (dict(p3=np.array([None] * N, dtype=object)), ["cannot be read"])}


@pytest.mark.parametrize("name", [*WRONG_SCORES, "png", "npy", "gone", "folder"])
def test_wrong_scores_are_one_sentence_before_anything_is_written(base, pictures, tmp_path, name):
    path, words = tmp_path / f"{name}.npz", ["cannot be read", ".npz"]
    if name in WRONG_SCORES:
        flags, words = WRONG_SCORES[name]
        write_scores(path, **flags)
    elif name == "png":
        path.write_bytes((pictures / "images" / "test" / "p0.png").read_bytes())
    elif name == "npy":
        with open(path, "wb") as file:
            np.save(file, np.zeros((5, N)))
    elif name == "folder":
        path.mkdir()
    out = tmp_path / "out"
    finished = copy_of(base.out, tmp_path / "run")
    for argv in (["--out", out, *on(pictures)], ["--out", finished, "--eval-only"]):
        said = mistake(*argv, "--class-scores", path)
        assert f"--class-scores {path}" in said and all(word in said for word in words), said
    assert not out.exists() and read(tmp_path / "run" / "metrics.json") == base.metrics


# ---- predict ----

def mode_ids(base, pictures, k, infer, filter=60):
    """What --predict must write for test picture k: the last prediction, from files and checkpoint."""
    net, _ = load(base.out)
    features, logits, large = plain_logits(net, ids_in(pictures / "images" / "test" / f"p{k}.png"))
    plain = large.argmax(0)
    if infer == "plain":
        return plain
    row = scores_of_run(base.out)[f"p{k}"]
    there = [(plain == c).sum() > filter if infer == "filter" else row[c] > 0.5 for c in range(N)]
    classes = [c for c in range(N) if c == 0 or there[c]]
    return slow_augmented(net, "global", features, logits, classes, plain.shape).argmax(0)


@pytest.mark.parametrize("infer, flags", [("plain", []), ("filter", []), ("filter", ["--filter", 900]),
                                          ("classifier", []), ("scores", ["--class-scores"])])
def test_predict_writes_the_last_prediction_at_the_pictures_own_size(base, pictures, tmp_path, infer, flags):
    out = copy_of(base.out, tmp_path / "run")
    flags = flags + [base.out / "class_scores-test.npz"] * (infer == "scores")
    before, folder = (out / "last.pt").read_bytes(), pictures / "images" / "test"
    said = done("--out", out, "--predict", folder, "--infer", infer, *flags)
    assert ("plain prediction; --infer filter" if infer == "plain" else
            f"global prediction, classes by the {infer}") in said and "not finished" not in said
    assert files(out / "predictions") == {f"p{k}{end}.png" for k in range(5) for end in ("", "_overlay")}
    for k in range(5):
        expected = mode_ids(base, pictures, k, infer, flags[1] if "--filter" in flags else 60)
        with Image.open(out / "predictions" / f"p{k}.png") as written:
            assert written.mode == "P" and np.asarray(written).shape == expected.shape
            assert (np.asarray(written) != expected).sum() <= 2  # on a border, in another order of summing
        with Image.open(out / "predictions" / f"p{k}_overlay.png") as overlay:
            assert overlay.mode == "RGB" and overlay.size == expected.shape[::-1]
    shutil.rmtree(out / "predictions")
    done("--out", out, "--predict", folder / "p1.png", "--infer", infer, *flags)
    assert files(out / "predictions") == {"p1.png", "p1_overlay.png"}
    assert (out / "last.pt").read_bytes() == before and read(out / "metrics.json") == base.metrics


def test_predict_of_runs_of_other_branches(local, memory_only, pce, pictures, tmp_path):
    image = pictures / "images" / "test" / "p2.png"
    for found, infer, path in ((local, "filter", "local"), (memory_only, "filter", "global"),
                               (pce, "plain", "plain")):
        out = copy_of(found.out, tmp_path / path)
        assert f"{path} prediction" in done("--out", out, "--predict", image, "--infer", infer)
        net, _ = load(found.out)
        features, logits, large = plain_logits(net, ids_in(image))
        expected = large.argmax(0)
        if path != "plain":
            classes = [c for c in range(N) if c == 0 or (expected == c).sum() > 60]
            expected = slow_augmented(net, path, features, logits, classes, expected.shape).argmax(0)
        assert (ids_in(out / "predictions" / "p2.png") != expected).sum() <= 2


def test_predict_asks_for_what_the_run_lacks(base, local, pce, pictures, tmp_path):
    image = pictures / "images" / "test" / "p2.png"
    said = mistake("--out", pce.out, "--predict", image, "--infer", "filter")
    assert "--infer filter" in said and "no prototypes" in said and "--infer plain" in said
    said = mistake("--out", local.out, "--predict", image, "--infer", "classifier")
    assert "--infer classifier" in said and "--train-classifier" in said
    said = mistake("--out", base.out, "--predict", image, "--infer", "scores")
    assert "--infer scores" in said and "--class-scores" in said
    path = write_scores(tmp_path / "s.npz", names=("p0",))
    said = mistake("--out", base.out, "--predict", image, "--infer", "scores", "--class-scores", path)
    assert str(path) in said and "p2" in said
    assert "oracle" in mistake("--out", base.out, "--predict", image, "--infer", "oracle")  # no true classes
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no picture")
    (tmp_path / "empty").mkdir()
    for wrong in (tmp_path / "broken.png", tmp_path / "gone.png", tmp_path / "empty"):
        assert wrong.name in mistake("--out", base.out, "--predict", wrong)
    for found in (base, local, pce):
        assert not (found.out / "predictions").exists()


def test_images_below_32_pixels_a_side_are_one_sentence(local, pictures, tmp_path):
    out, whole = copy_of(local.out, tmp_path / "run"), ids_in(pictures / "images" / "test" / "p2.png")
    for name, width, height in (("low", 51, 31), ("narrow", 31, 37), ("least", 32, 32)):
        image, drawn = tmp_path / f"{name}.png", tmp_path / f"{name}_strokes.png"
        Image.fromarray(whole[:height, :width]).save(image)
        strokes = np.full((height, width), 255, np.uint8)
        strokes[3], strokes[20, 5:25] = 0, 1
        Image.fromarray(strokes).save(drawn)
        predict = ["--out", out, "--predict", image]
        draw = ["--out", out, "--draw", image, drawn, "--draw-steps", 1]
        if name != "least":
            for argv in (predict, draw):
                said = mistake(*argv)
                assert str(image) in said and f"{width} x {height}" in said and "32" in said
    done(*predict)
    assert ids_in(out / "predictions" / "least.png").shape == (32, 32)
    done(*draw)
    assert {path.name for path in (out / "drawings").iterdir()} == {
        "least.png", "least_overlay.png", "least_before_after.png"}


def test_an_unfinished_run_is_told(pictures, photo, tmp_path, no_figures):
    interrupt("train", 8, "--out", tmp_path, *on(pictures))
    note = f"note: the run in {tmp_path} is not finished: iteration 6 of {ITERATIONS}"
    for argv in (["--eval-only"], ["--predict", photo.image],
                 ["--draw", photo.image, photo.strokes, "--draw-steps", 1]):
        assert done("--out", tmp_path, *argv).count(note) == 1
    assert read(tmp_path / "metrics.json")["iterations"] == 6
    assert "not finished" not in done("--out", tmp_path, "--resume") + done("--out", tmp_path, "--eval-only")


# ---- strokes of one's own ----

@pytest.fixture(scope="module")
def photo(pictures, tmp_path_factory):
    """A test picture, and strokes that cross every class of it."""
    folder = tmp_path_factory.mktemp("photo")
    labels = ids_in(pictures / "masks" / "test" / "p2.png")
    strokes = np.where(np.arange(len(labels))[:, None] % 6 < 2, labels, 255).astype(np.uint8)
    Image.fromarray(strokes).save(folder / "strokes.png")
    image = pictures / "images" / "test" / "p2.png"
    return SimpleNamespace(image=image, strokes=folder / "strokes.png", ids=strokes)


@pytest.mark.parametrize("which", ["base", "local", "pce"])
def test_draw_adapts_a_copy_of_the_run_to_the_strokes(which, photo, tmp_path, request):
    found = request.getfixturevalue(which)
    out = copy_of(found.out, tmp_path / "run")
    before = (out / "last.pt").read_bytes()
    said = done("--out", out, "--draw", photo.image, photo.strokes)
    shares = re.search(r"(\d+) % of the stroke pixels .* (\d+) % after 40 steps", said).groups()
    first, after = map(int, shares)
    drawn = photo.ids != 255
    written = ids_in(out / "drawings" / "p2.png")
    assert written.shape == photo.ids.shape and after > first and after >= 60
    assert after == pytest.approx(100 * (written == photo.ids)[drawn].mean(), abs=0.51)
    plain = plain_logits(load(found.out)[0], ids_in(photo.image))[2].argmax(0)
    assert "note: no stroke of" not in said
    if which == "base":  # crop 32: the picture is seen smaller
        assert abs(first - 100 * (plain == photo.ids)[drawn].mean()) < 25
    assert (out / "last.pt").read_bytes() == before and read(out / "metrics.json") == found.metrics
    assert files(out / "drawings") == {"p2.png", "p2_overlay.png", "p2_before_after.png"}
    with Image.open(out / "drawings" / "p2_before_after.png") as image:
        assert image.size[0] >= 3 * 256


def test_drawing_leaves_memory_and_batch_norm_as_they_were(base, photo, tmp_path, monkeypatch):
    runs, load_run = [], pfa.load_run

    def loading(*args):
        runs.append(load_run(*args))
        return runs[-1]

    monkeypatch.setattr(pfa, "load_run", loading)
    out = copy_of(base.out, tmp_path / "run")
    done("--out", out, "--draw", photo.image, photo.strokes, "--draw-steps", 3)
    before, after = load(base.out)[0].state_dict(), runs[0][0].net.state_dict()
    buffers = {name for name, _ in load(base.out)[0].named_buffers()}
    assert {"memory.bank", "memory.count", "occurs", "trained"} < buffers
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not changed & buffers and len(changed) > 40


@pytest.mark.parametrize("paths", [[], ["local"], ["global"]])
def test_drawing_steps_along_the_loss_of_the_strokes_at_the_pictures_own_size(paths, monkeypatch):
    """Logits read at the strokes' pixels have the gradient of L_pce on enlarged ones; step 2 is mirrored."""
    net, cfg = small_net(draw_steps=2, draw_lr=1e-12, lr=0.3, head_lr=7.0)      # the weights stand still
    net.eval()
    generator = torch.Generator().manual_seed(1)
    x, scribbles = torch.randn(1, 3, 32, 44, generator=generator), torch.full((1, 71, 90), 255)
    for c, (row, column) in enumerate([(0, 3), (70, 40), (33, 89), (50, 0)]):
        scribbles[0, row, column:column + 17], scribbles[0, 5 + 9 * c:9 + 11 * c, 60 - c] = c, c
    found, rates = [], {}
    names = {id(p): name for name, p in net.named_parameters()}

    class Watched(torch.optim.AdamW):
        def step(self):
            found.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
            rates.update({names[id(p)]: group["lr"] for group in self.param_groups for p in group["params"]})
            super().step()

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    pfa.adapt(net, x, scribbles, paths, cfg)
    rate = {name: 1e-13 if name.startswith("network.backbone.") else 1e-12 for name in names.values()}
    assert rates == pytest.approx(rate, rel=1e-6, abs=0)                # whatever --lr and --head-lr say
    assert len(found) == 2
    for mirrored, slopes in enumerate(found):
        seen, labels = (x.flip(3), scribbles.flip(2)) if mirrored else (x, scribbles)
        present = pfa.classes_in(labels, N)
        features, logits = net(seen)
        prototypes = pfa.extract_prototypes(features, logits.softmax(1), present)
        loss = pfa.partial_cross_entropy(logits, labels)
        for path in paths:
            augmented = net.augmented(features, prototypes, present, [path])[path]
            loss = loss + pfa.partial_cross_entropy(augmented, labels)
        net.zero_grad()
        loss.backward()
        expected = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        assert set(slopes) == set(expected) and ("augmenter.fuse.weight" in slopes) == bool(paths)
        for name, slope in expected.items():
            size = float(slope.abs().max())
            assert torch.allclose(slopes[name], slope, rtol=1e-3, atol=1e-5 * size + 1e-9), name


COLOURS = figures.palette(N).numpy()


def painted(ids, image, kind):
    """Strokes (H,W), 255 = none, in the colours of the classes: a Pillow image."""
    drawn, colours = ids != 255, COLOURS[np.where(ids == 255, 0, ids)]
    if kind == "transparent":
        layer = np.dstack([np.where(drawn[..., None], colours, 0), 255 * drawn])
        return Image.fromarray(layer.astype(np.uint8))
    ground = np.full_like(image, 255) if kind == "white" else image
    return Image.fromarray(np.where(drawn[..., None], colours, ground))


def test_strokes_may_be_painted_in_the_colours_of_the_classes(photo, tmp_path):
    """On nothing, on white, on the image: as the index PNG, also where the picture has such colours."""
    image = ids_in(photo.image).copy()
    image[6:10, 40:50] = COLOURS[1]                                     # looks like strokes of a house
    ids = photo.ids.copy()
    ids[6:10, 40:50] = 255
    x = torch.from_numpy(image).permute(2, 0, 1)
    Image.fromarray(ids).save(tmp_path / "index.png")
    assert np.array_equal(painted_strokes(tmp_path / "index.png", x, N), ids)
    assert {0, 1, 2, 3} < set(np.unique(ids).tolist())
    for kind in ("transparent", "white", "image"):
        painted(ids, image, kind).save(tmp_path / f"{kind}.png")
        found = painted_strokes(tmp_path / f"{kind}.png", x, N)
        assert found.dtype == torch.uint8 and np.array_equal(found, ids), kind
    painted(ids, image, "image").convert("RGBA").save(tmp_path / "opaque.png")
    assert np.array_equal(painted_strokes(tmp_path / "opaque.png", x, N), ids)


def test_a_painted_pixel_has_the_class_of_a_colour_close_by(tmp_path):
    """At most 40 away in each of R, G, B; what shines through is no stroke."""
    layer, expected = np.zeros((4, 10, 4), np.uint8), np.full((4, 10), 255)
    for c in range(N):
        inwards = np.where(COLOURS[c] > 127, -1, 1)
        for row, (distance, alpha) in enumerate([(0, 255), (40, 255), (41, 255), (0, 127)]):
            layer[row, c] = *(COLOURS[c].astype(int) + distance * inwards), alpha
            colours = np.abs(COLOURS.astype(int) - layer[row, c, :3]).max(1)
            if alpha > 127 and colours.min() <= 40:
                expected[row, c] = colours.argmin()
    assert expected[0, :N].tolist() == expected[1, :N].tolist() == list(range(N))
    assert (expected[3] == 255).all() and 255 in expected[2, :N]
    layer[:, 7] = 255, 255, 255, 255
    layer[:, 8] = 0, 0, 0, 255
    Image.fromarray(layer).save(tmp_path / "painted.png")
    found = painted_strokes(tmp_path / "painted.png", torch.full((3, 4, 10), 90, dtype=torch.uint8), N)
    assert np.array_equal(found, expected)


def test_painted_strokes_adapt_the_run_as_an_index_png_does(local, photo, tmp_path):
    """Without the background: a note."""
    out, ids = copy_of(local.out, tmp_path / "run"), np.where(photo.ids == 0, 255, photo.ids)
    files_ = dict(index=Image.fromarray(ids), painted=painted(ids, ids_in(photo.image), "image"))
    written = []
    for name, strokes in files_.items():
        strokes.save(tmp_path / f"{name}.png")
        said = done("--out", out, "--draw", photo.image, tmp_path / f"{name}.png", "--draw-steps", 3)
        assert f"note: no stroke of {CLASSES[0]}" in said
        written.append(ids_in(out / "drawings" / "p2.png"))
    assert np.array_equal(*written)


@pytest.mark.parametrize("problem, words", [
    ("size", ["51 x 37", "51 x 36", "same size"]), ("empty", ["no stroke", "figures/colours.png"]),
    ("ids", ["7", "5 classes"]), ("colours", ["no stroke", "colours"]), ("gone", ["gone.png"]),
    ("no image", ["gone.png"]),
    ("broken", ["broken.png", "cannot be read"]), ("one file", ["--draw", "two files"]),
    ("three files", ["--draw", "two files"])])
def test_wrong_strokes_are_one_sentence(base, photo, tmp_path, problem, words):
    ids, files_ = photo.ids.copy(), [photo.image, tmp_path / "drawn.png"]
    if problem == "size":
        ids = ids[:-1]
    elif problem == "empty":
        ids[:] = 255
    elif problem == "ids":
        ids[3, 3] = 7
    Image.fromarray(ids).save(files_[1])
    if problem == "colours":
        Image.fromarray(np.zeros((37, 51, 3), np.uint8)).save(files_[1])
    elif problem == "broken":
        files_[1] = tmp_path / "broken.png"
        files_[1].write_bytes(b"\x89PNG no picture")
    files_ = {"gone": [photo.image, tmp_path / "gone.png"], "no image": [tmp_path / "gone.png", files_[1]],
              "one file": files_[:1], "three files": files_ + files_[:1]}.get(problem, files_)
    said = mistake("--out", base.out, "--draw", *files_)
    assert all(word in said for word in words), said
    if problem in ("size", "empty", "ids", "colours"):
        assert "drawn.png" in said
    assert not (base.out / "drawings").exists()


# ---- baseline ----

def width_of(path):
    with Image.open(path) as image:
        return image.size[0]


def test_a_baseline_adds_a_column_to_the_examples(local, pce, tmp_path, monkeypatch):
    for name in ("draw_training", "draw_log", "draw_confidence", "draw_attention"):
        monkeypatch.setattr(pfa_figures, name, lambda *args: None)
    out = copy_of(local.out, tmp_path / "run")
    done("--out", out, "--eval-only")
    alone = width_of(out / "figures" / "examples.png")
    done("--out", out, "--eval-only", "--baseline", pce.out)
    assert width_of(out / "figures" / "examples.png") > alone + 250
    assert numbers(read(out / "metrics.json")) == numbers(local.metrics)


def test_a_wrong_baseline_is_one_sentence_before_anything_is_written(base, pictures, tmp_path):
    more = make_pictures(tmp_path / "more", CLASSES + ("cloud",))
    run.write_json(tmp_path / "other" / "config.json", dict(preset="toy", classifier="cbp"))
    (tmp_path / "unfinished").mkdir()
    shutil.copy(base.out / "config.json", tmp_path / "unfinished")
    out = tmp_path / "out"
    for name, words in (("nowhere", "holds no run"), ("other", "config of this script"),
                        ("unfinished", "no checkpoint")):
        said = mistake("--out", out, *on(pictures), "--baseline", tmp_path / name)
        assert words in said and name in said
    said = mistake("--out", out, *on(more), "--baseline", base.out)
    assert str(base.out) in said and "5 classes" in said and "data have 6;" in said, said
    assert not out.exists()


# ---- tables and figures of the paper ----

SHORT = dict(iterations=5, warmup=1, slots=1, eval_every=5)             # global in the last


def rows_of(text):
    """First cell -> the other cells, of the rows under the header of a markdown table."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines[2:]}


def paper_run(out, data, **flags):
    """--table or --figure -> (rows of its .md, names of the rows that were trained, its text)."""
    trained, one = [], pfa.train

    def training(cfg, *args):
        trained.append(Path(cfg.out).name)
        return one(cfg, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pfa, "train", training)
        train(config(out, data, **{**SHORT, **flags}))
    name = f"table{flags['table']}.md" if "table" in flags else f"figure{flags['figure']}.md"
    text = (out / name).read_text()
    return rows_of(text), trained, text


@pytest.fixture(scope="module")
def tables(pictures, tmp_path_factory):
    """Table 2 and Fig. 6 in one folder."""
    out = tmp_path_factory.mktemp("tables")
    two, six = paper_run(out, pictures, table=2), paper_run(out, pictures, figure=6)
    return SimpleNamespace(out=out, two=two, six=six)


def test_table_2_has_a_run_for_every_row(tables):
    rows, trained, text = tables.two
    names = ["baseline", "local", "global", "both, L_pce on local", "both"]
    assert list(rows) == names
    assert trained == ["method-pce", "augment-local", "augment-global", "pce-local", "pfa"]
    assert {path.name for path in (tables.out / "rows").iterdir()} > set(trained)
    folders = dict(zip(names, trained))
    configs = {name: read(tables.out / "rows" / folders[name] / "config.json") for name in names}
    changed = {name: (c["method"], c["augment"], c["pce"]) for name, c in configs.items()}
    assert changed == {"baseline": ("pce", "both", "moves"), "local": ("pfa", "local", "moves"),
                       "global": ("pfa", "global", "moves"), "both": ("pfa", "both", "moves"),
                       "both, L_pce on local": ("pfa", "both", "local")}
    assert all(c["table"] == 0 and c["iterations"] == 5 for c in configs.values())
    assert rows["both"][2] != "-" and rows["global"][1] == "-"
    for name, folder in zip(names, trained):
        miou = read(tables.out / "rows" / folder / "metrics.json")["miou"]
        own, oracle = miou.get("filter_60", {}), miou.get("oracle", {})
        expected = [miou["plain"]["plain"], own.get("local"), own.get("global"), oracle.get("local"),
                    oracle.get("global")]
        assert rows[name][:5] == ["-" if rate is None else f"{rate:.1f}" for rate in expected]
    printed = {"baseline": "67.5 - -", "local": "75.7 76.9 -", "global": "76.0 - 77.4",
               "both, L_pce on local": "76.4 77.7 77.1", "both": "76.8 77.3 77.9"}
    assert {name: " ".join(row[5:]) for name, row in rows.items()} == printed
    assert "true classes" in text.splitlines()[2] and "5 iterations" in text
    with Image.open(tables.out / "components.png") as drawn:            # Fig. 4 and 11
        assert drawn.mode == "RGB" and drawn.size[0] >= 6 * 256 and drawn.size[1] > 300


def test_figure_6_has_a_run_for_every_share(tables):
    rows, trained, text = tables.six
    assert list(rows) == [f"{p} %" for p in (1, 2, 4, 8, 16, 32)] and "plots no numbers" in text
    shares = {name: f"augment-local_top_fraction-{float(name.removesuffix(' %')) / 100}" for name in rows}
    shares["8 %"] = "augment-local"                                     # the paper's, from Table 2
    assert trained == [folder for name, folder in shares.items() if name != "8 %"]
    for name, folder in shares.items():
        row = tables.out / "rows" / folder
        settings, found = read(row / "config.json"), read(row / "metrics.json")
        assert settings["augment"] == "local"
        assert settings["top_fraction"] == pytest.approx(float(name.removesuffix(" %")) / 100)
        rates = found["miou"]["plain"]["plain"], found["miou"]["filter_60"]["local"]
        assert rows[name][:2] == [f"{rate:.1f}" for rate in rates]
    with Image.open(tables.out / "figure6.png") as drawn:
        assert drawn.mode == "RGB" and min(drawn.size) > 200


def test_finished_rows_are_kept_wherever_the_folder_is(tables, pictures, tmp_path):
    out = Path(shutil.copytree(tables.out, tmp_path / "moved"))
    again = paper_run(out, pictures, table=2)
    assert again[0] == tables.two[0] and again[1] == []
    shutil.move(tables.out, f"{tables.out}-away")                       # as after copying it from a server
    try:
        assert paper_run(out, pictures, table=2)[1] == []
        assert paper_run(out, pictures, figure=6)[:2] == (tables.six[0], [])
    finally:
        shutil.move(f"{tables.out}-away", tables.out)


def test_tables_share_rows_and_table_4_takes_scores_that_come_later(tables, pictures, tmp_path):
    out = Path(shutil.copytree(tables.out, tmp_path / "out"))
    rows, trained, text = paper_run(out, pictures, table=4)
    assert trained == [] and list(rows) == ["plain", *FILTER_MODES, "oracle (true classes given)"]
    row = out / "rows" / "pfa"
    before, settings = (row / "last.pt").read_bytes(), read(row / "config.json")
    miou = read(row / "metrics.json")["miou"]
    assert rows["filter_500"] == ["-", "-", f"{miou['filter_500']['local']:.1f}",
                                  f"{miou['filter_500']['global']:.1f}", "75.7"]
    assert rows["oracle (true classes given)"][-1] == "80.4" and rows["plain"][-1] == "76.8"
    path = write_scores(tmp_path / "s.npz")
    with watching() as found:                                          # evaluated again, not trained
        rows, _, _ = paper_run(out, pictures, table=4, class_scores=str(path))
    assert found.steps == [] and (row / "last.pt").read_bytes() == before
    assert read(row / "config.json") == settings | dict(class_scores=str(path), out=str(row))
    assert rows["scores"][0] != "-" and rows["scores"][-1] == "77.9"
    rows, trained, _ = paper_run(out, pictures, table=4, class_scores=str(path))
    assert trained == [] and rows["scores"][-1] == "77.9"


def test_a_row_gets_its_classifier_later(tables, pictures, tmp_path):
    """Table 4 with --train-classifier after Table 2 without."""
    out = Path(shutil.copytree(tables.out, tmp_path / "out"))
    before = (out / "rows" / "pfa" / "last.pt").read_bytes()
    with watching() as found:
        rows, _, text = paper_run(out, pictures, table=4, train_classifier=True)
    assert found.steps == [] and (out / "rows" / "pfa" / "last.pt").read_bytes() == before
    assert rows["classifier"][-1] == "77.9" and "Q2L" in text
    metrics = read(out / "rows" / "pfa" / "metrics.json")
    rates = metrics["miou"]["classifier"]
    assert rows["classifier"][:4] == [f"{metrics['class_map']:.1f}", "-", f"{rates['local']:.1f}",
                                      f"{rates['global']:.1f}"]


def row_config(cfg, changes):
    usual = replace(cfg, **pfa.USUAL_ROW)
    folder = common_tables.folder_of_changes(changes, usual) or "pfa"
    return replace(usual, out=str(Path(cfg.out) / "rows" / folder), **changes)


@pytest.mark.parametrize("name, flags", [("voc-b1", {}), ("voc-b3", dict(reading="official")), ("toy", {})])
def test_rows_have_one_folder_if_and_only_if_they_have_the_same_settings(name, flags):
    cfg, found = preset(name, **flags), {}
    for number, table in ((2, pfa.TABLES[2]), (5, pfa.TABLES[5]), *pfa.FIGURES.items()):
        found |= {(number, row): changes for row, changes in table.rows.items()}
    found |= {(3, f"{row}, {method}"): changes | dict(method=method, weights="none")
              for row, changes in pfa.TABLES[3].rows.items() if isinstance(changes, dict)
              for method in ("full", "pfa")}
    configs = {key: row_config(cfg, changes) for key, changes in found.items()}
    by_folder, by_settings = {}, {}
    for key, row in configs.items():
        assert Path(row.out).parent == Path(cfg.out) / "rows"
        by_folder.setdefault(row.out, set()).add(key)
        by_settings.setdefault(repr(replace(row, out="", weights="")), set()).add(key)
    assert sorted(map(sorted, by_folder.values())) == sorted(map(sorted, by_settings.values()))
    folders = {key: Path(row.out).name for key, row in configs.items()}
    assert folders[2, "both"] == folders[5, "both"] == "pfa" and folders[2, "baseline"] == "method-pce"
    assert folders[2, "local"] == folders[8, "drop 0, local"] == "augment-local"
    assert folders[2, "global"] == folders[8, "drop 0, global"] == "augment-global"
    if name == "voc-b1":                                                # the paper's own settings
        assert folders[6, "8 %"] == "augment-local" and folders[5, "n = 5"] == "augment-global"
        assert folders[3, "SegFormer MiT-B1, pfa"] == "pfa"
    if flags:
        assert folders[6, "8 %"] == "augment-local_top_fraction-0.08"
        assert folders[3, "SegFormer MiT-B3, full"] == "method-full"


def rows_without_training(monkeypatch, base, *argv, **flags):
    """The configs of the rows that --table or --figure asks for; each run becomes metrics like `base`'s."""
    asked = {}

    def row(train_, cfg, machine):
        asked[Path(cfg.out).name] = cfg
        rate = 10.0 + len(asked)
        m = copy.deepcopy(base.metrics)
        m["miou"]["plain"]["plain"] = rate
        m["miou"][m["headline"]] = {"local": rate + 20, "global": rate + 40}
        return m

    monkeypatch.setattr(common_tables, "finished_row", row)
    done(*argv, *flags_of(flags))
    return asked


def test_table_5_varies_one_weight_at_a_time(base, pictures, tmp_path, monkeypatch):
    asked = rows_without_training(monkeypatch, base, "--out", tmp_path, *on(pictures), table=5)
    rows = rows_of((tmp_path / "table5.md").read_text())
    weights = {name: (c.w_local, c.w_local_first, c.w_global) for name, c in zip(rows, asked.values())}
    expected = {"both": (0.01, 0.01, 0.01)}
    expected |= {f"lambda_l {w}": (w, w, 0.01) for w in (0.005, 0.02, 0.05)}
    expected |= {f"lambda_g {w}": (0.01, 0.01, w) for w in (0.005, 0.02, 0.05)}
    assert weights == expected and all(c.table == 0 and c.method == "pfa" for c in asked.values())
    assert [row[-1] for row in rows.values()] == ["77.9", "77.7", "77.2", "76.8", "77.4", "77.6", "77.1"]
    assert [row[2] for row in rows.values()] == [f"{51 + k}.0" for k in range(7)]


def test_table_3_compares_backbones_in_full_and_with_strokes(base, pictures, tmp_path, monkeypatch):
    counted = []

    def cost(cfg, classes):
        counted.append((cfg.backbone, cfg.head, cfg.method, classes))
        return 13.7e6, 19.4

    monkeypatch.setattr(pfa, "cost", cost)
    for name in ("mit_b1", "mit_b3", "mit_b5"):
        (tmp_path / f"{name}.pth").touch()
    argv = ["--out", tmp_path, *on(pictures), "--weights", tmp_path]
    asked = rows_without_training(monkeypatch, base, *argv, table=3)
    rows = rows_of((tmp_path / "table3.md").read_text())
    networks = [("resnet101", "deeplabv2"), ("resnet101", "deeplabv3plus"),
                *((f"mit_b{k}", "mlp") for k in (1, 3, 5))]
    assert [(c.backbone, c.head, c.method) for c in asked.values()] == [
        (*network, method) for network in networks for method in ("full", "pfa")]
    assert counted == [(*network, "pce", N) for network in networks]
    weights = {c.backbone: c.weights for c in asked.values()}
    mit = {f"mit_b{k}": str(tmp_path / f"mit_b{k}.pth") for k in (1, 3, 5)}
    assert weights == {"resnet101": "imagenet", **mit}
    assert list(rows) == ["DeepLabv2 ResNet-101", "DeepLabv3+ ResNet-101", "LTF ResNet-101",
                          *(f"SegFormer MiT-B{k}" for k in (1, 3, 5))]
    assert rows["SegFormer MiT-B1"] == ["13.7", "19.4", "15.0", "56.0", "13.6", "19.4", "79.2", "77.9"]
    assert rows["LTF ResNet-101"][0].startswith("not run")


@pytest.mark.parametrize("weights, words", [("folder", ["mit_b5.pth"]), ("imagenet", ["mit_b1", "imagenet"]),
                                            ("gone.pth", ["gone.pth"])])
def test_table_3_asks_for_missing_weights_before_the_first_training(
        base, pictures, tmp_path, monkeypatch, weights, words):
    """Rows one and two would be days of training."""
    monkeypatch.setattr(common_tables, "finished_row", lambda *args: pytest.fail("a row was trained"))
    (tmp_path / "folder").mkdir()
    for name in ("mit_b1", "mit_b3"):
        (tmp_path / "folder" / f"{name}.pth").touch()
    weights = tmp_path / "folder" if weights == "folder" else weights
    said = mistake("--out", tmp_path / "out", *on(pictures), "--weights", weights, "--table", 3)
    assert all(word.lower() in said.lower() for word in words) and not (tmp_path / "out").exists(), said


@pytest.mark.parametrize("number, rows", [(5, 4), (8, 16)])
def test_figures_5_and_8_ask_for_their_runs(base, pictures, tmp_path, monkeypatch, number, rows):
    asked = rows_without_training(monkeypatch, base, "--out", tmp_path, *on(pictures), figure=number)
    assert len(asked) == rows and all(c.figure == 0 for c in asked.values())
    if number == 5:
        assert [(c.augment, c.slots) for c in asked.values()] == [("global", n) for n in (1, 2, 5, 10)]
        assert list(asked)[:3] == ["augment-global_slots-1", "augment-global", "augment-global_slots-5"]
    else:
        weak = {(c.augment, c.scribble_drop, c.scribble_shrink) for c in asked.values()}
        ratios = [(d, 0) for d in (0, 0.25, 0.5, 0.75)] + [(0, s) for s in (0.25, 0.5, 0.75, 1)]
        assert weak == {(path, *ratio) for path in ("local", "global") for ratio in ratios}
    assert len(rows_of((tmp_path / f"figure{number}.md").read_text())) == rows
    with Image.open(tmp_path / f"figure{number}.png") as drawn:
        assert drawn.mode == "RGB" and min(drawn.size) > 200


# ---- mistakes ----

BELOW = """batch-size iterations lr head-lr slots hidden head-channels scale-min eval-every save-every
           classifier-iterations classifier-size classifier-lr draw-steps draw-lr""".split()
NEGATIVE = "warmup test-size workers weight-decay w-local w-local-first w-global filter rotation".split()
SHARES = "scribble-shrink momentum top-fraction score-threshold".split()


@pytest.mark.parametrize("argv, words", [
    *[([f"--{name}", 0], [f"--{name} 0", "above 0"]) for name in BELOW],
    (["--lr", -1], ["--lr -1", "above 0"]), (["--crop", 0], ["--crop 0", "32 or more"]),
    *[([f"--{name}", -1], [f"--{name} -1", "0 or more"]) for name in NEGATIVE],
    *[([f"--{name}", value], [f"--{name} {value}", "0 or more and at most 1"]) for name in SHARES
      for value in (-0.1, 1.5)],
    *[(["--scribble-drop", value], [f"--scribble-drop {value}", "below 1"]) for value in (-0.1, 1, 1.5)],
    (["--scale-min", 1.5, "--scale-max", 0.5], ["--scale-max 0.5", "--scale-min 1.5"]),
    (["--warmup", ITERATIONS], [f"--warmup {ITERATIONS}", f"--iterations {ITERATIONS}", "--method pce"]),
    (["--head", "deeplabv2"], ["--head deeplabv2", "--backbone tiny", "mobilenet_v2"]),
    (["--backbone", "resnet101"], ["--head mlp", "--backbone resnet101", "mit_b1"]),
    (["--table", 2, "--figure", 5], ["--table", "--figure"]),
    (["--infer", "filter"], ["--infer filter", "--predict"]),
    (["--scribble-drop", 0.5, "--method", "full"], ["--scribble-drop", "--method full"]),
    (["--scribble-shrink", 0.5, "--method", "full"], ["--scribble-shrink", "--method full"]),
    (["--table", 6], ["--table"]), (["--figure", 7], ["--figure"]), (["--method", "gan"], ["gan"]),
    (["--schedule", 0], ["--schedule"]), (["--reading", "mine"], ["mine"]), (["--crops", 3], ["--crop"]),
    (["--data", ""], ["--data"]), (["--preset", "voc-b1", "--dataset", "voc", "--data", ""], ["--data"]),
    (["--crop", 31], ["--crop 31", "32"]), (["--dataset", "cityscapes"], ["--dataset", "cityscapes"]),
    (["--data", "nowhere"], ["nowhere"]), 
    (["--dataset", "toy_scenes", "--scribbles", "scribbles"], ["toy_scenes", "--dataset folder"]),
    (["--scribbles", ""], ["--dataset folder", "--scribbles", "--method full"]),
    (["--scribbles", "gone"], ["gone"]), (["--test-split", "exam"], ["exam"]),
    (["--val-split", "exam"], ["exam"]), (["--weights", "gone.pth"], ["gone.pth"]),
    (["--backbone", "mit_b1", "--weights", "imagenet"], ["mit_b1"]),
    (["--baseline", "nowhere"], ["nowhere", "holds no run"]), (["--device", "mps"], ["--device mps"]),
    *[([f"--{name}", *value], ["holds no run"]) for name, value in (
        ("eval-only", []), ("resume", []), ("predict", ["x.png"]), ("draw", ["x.png", "y.png"]))],
])
def test_mistakes_are_one_sentence_before_anything_is_written(pictures, tmp_path, argv, words):
    if "mps" in argv and torch.backends.mps.is_available():
        pytest.skip("this machine has it")
    said = mistake("--out", tmp_path / "out", *on(pictures), *argv)
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


def test_options_for_a_run_are_checked_before_it_is_read(base):
    assert "--class-scores" in mistake("--out", base.out, "--predict", "x.png", "--infer", "scores")
    assert "--draw-steps 0" in mistake("--out", base.out, "--draw", "x.png", "y.png", "--draw-steps", 0)
    assert "--slots 8 contradicts" in mistake("--out", base.out, "--resume", "--slots", 8)


def test_a_batch_must_split_over_the_processes(pictures, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = mistake("--out", tmp_path / "out", *on(pictures))
    assert "--batch-size 3" in said and "multiple of 2" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("value, words", [(255, ["nothing but 255"]), (0, ["only class 0"])])
def test_strokes_that_tell_nothing_are_one_sentence(pictures, tmp_path, value, words):
    data = Path(shutil.copytree(pictures, tmp_path / "data"))
    for path in (data / "strokes" / "train").iterdir():
        ids = ids_in(path)
        Image.fromarray(np.where((ids == 0) & (value == 0), 0, 255).astype(np.uint8)).save(path)
    said = mistake("--out", tmp_path / "out", *on(data))
    assert all(word in said for word in words) and str(data / "strokes") in said
    assert not (tmp_path / "out").exists()


def test_a_test_split_without_labels_is_one_sentence(base, pictures, tmp_path, no_figures):
    data, out = Path(shutil.copytree(pictures, tmp_path / "data")), copy_of(base.out, tmp_path / "run")
    for path in (data / "masks" / "test").iterdir():
        Image.fromarray(np.full_like(ids_in(path), 255)).save(path)
    said = mistake("--out", out, "--eval-only", "--data", data)
    assert "test" in said and "labelled" in said and read(out / "metrics.json") == base.metrics


def test_a_run_meets_data_of_other_classes(base, tmp_path, no_figures):
    """Whatever is refused leaves the run as it was."""
    more = make_pictures(tmp_path / "more", ("sky", "sea", "kite", "bird", "boat", "cloud"))
    out = copy_of(base.out, tmp_path / "run")
    settings = read(out / "config.json")
    for option in ("--eval-only", "--resume"):
        said = mistake("--out", out, option, "--data", more)
        assert str(out) in said and "5 classes" in said and "data have 6; class 0 is meadow there and sky here" in said
        assert read(out / "metrics.json") == base.metrics
        assert read(out / "config.json") == settings, option


def test_one_class_alone_is_one_sentence(pictures, tmp_path):
    data = Path(shutil.copytree(pictures, tmp_path / "data"))
    (data / "classes.txt").write_text("meadow")
    said = mistake("--out", tmp_path / "out", *on(data))
    assert str(data) in said and "one class" in said and "background" in said
    assert not (tmp_path / "out").exists()


def test_checkpoints_and_settings_of_other_scripts_are_refused(base, tmp_path):
    for name in ("foreign", "broken"):
        (tmp_path / name).mkdir()
        shutil.copy(base.out / "config.json", tmp_path / name)
    foreign = tmp_path / "foreign" / "last.pt"
    run.save_checkpoint(foreign, dict(model=nn.Linear(2, 2)), dict(iteration=3, log=[]))
    (tmp_path / "broken" / "last.pt").write_bytes(b"half a file")
    run.write_json(tmp_path / "other" / "config.json", dict(preset="toy", classifier="cbp"))
    for name, words in (("foreign", "checkpoint of this script"), ("broken", "cannot be read"),
                        ("other", "config of this script")):
        assert words in mistake("--out", tmp_path / name, "--eval-only")


def test_a_loss_that_is_not_finite_stops_the_run(pictures, tmp_path):
    said = mistake("--out", tmp_path, *on(pictures, lr=1e30))
    assert "not finite" in said and "--lr" in said and not (tmp_path / "metrics.json").exists()


# ---- several processes ----

TWO = """
import torch, torch.distributed as dist
import pfa_scribble as pfa
from common import run
one = pfa.train_step

def same_everywhere(net):
    parts = *net.parameters(), net.memory.bank, net.memory.count
    mine = torch.cat([part.detach().flatten().double() for part in parts])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    assert torch.equal(both[0], both[1]), "weights or memory differ between ranks"

def checked(model, net, optimizer, scheduler, x, scribbles, classes, phase, cfg):
    out = one(model, net, optimizer, scheduler, x, scribbles, classes, phase, cfg)
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        same_everywhere(net)
        open(f"{cfg.out}.steps{dist.get_rank()}", "a").write(phase[0])
    return out

def slopes_of(net, model, cfg, rank=0, world=1):
    # of every labelled batch, in eval mode, in the last phase
    found, net = [], net.eval()
    for x, labels in torch.load(f"{cfg.out}.labelled", weights_only=True):
        x, labels = x[rank::world], labels[rank::world]
        net.zero_grad()
        made = pfa.predictions_of(model, net, x, pfa.classes_in(labels, len(net.occurs)), "global", cfg)
        sum(pfa.losses_of(made, labels, "global", cfg).values()).backward()
        found.append({name: p.grad.clone() for name, p in net.named_parameters()})
    return found

def main(cfg):
    pfa.main(cfg)
    rank, order = dist.get_rank(), torch.arange(6).view(6, 1) * torch.ones(2)
    assert torch.equal(pfa.of_all_ranks(order[rank::2]), order), "not the order of the undivided batch"
    assert torch.equal(pfa.of_all_ranks((order > 2)[rank::2]), order > 2)
    machine = run.Machine(torch.device("cpu"), rank, 2)
    net = pfa.load_run(cfg, machine.device)[0].net
    net.memory.bank.zero_(), net.memory.count.zero_()
    for x, present in torch.load(f"{cfg.out}.batches", weights_only=True):
        pfa.predictions_of(net, net, x[rank::2], present[rank::2], "local", cfg)
    same_everywhere(net)
    memory = net.memory.bank.clone(), net.memory.count.clone()
    slopes = slopes_of(net, run.distribute(net, machine), cfg, rank, 2)
    if rank == 0:
        torch.save((*memory, slopes), f"{cfg.out}.found")

if __name__ == "__main__":
    pfa.train_step = checked
    pfa.pfa_figures.draw_figures = lambda *args: None
    run.run_script(main, pfa.Config, pfa.PRESETS)
"""


def labelled_batches():
    """Two batches of four: rank 0 (pictures 0, 2) has many labels and rank 1 few, then none."""
    x, strokes, _ = small_batch(count=4)
    few, none = strokes.clone(), strokes.clone()
    few[1, :, 8:], few[3], none[1::2] = 255, 255, 255
    return (x, few), (x.flip(0), none)


def test_two_processes_share_weights_and_memory_and_evaluate_as_one(pictures, tmp_path, no_figures):
    (tmp_path / "two.py").write_text(TWO)
    out, generator = tmp_path / "out", torch.Generator().manual_seed(0)
    batches = [(torch.randn(4, 3, 32, 32, generator=generator), torch.rand(4, N, generator=generator) < 0.6)
               for _ in range(4)]
    torch.save(batches, f"{out}.batches")
    torch.save(labelled_batches(), f"{out}.labelled")
    argv = ["--standalone", "--nproc-per-node", 2, tmp_path / "two.py", "--out", out,
            *on(pictures, batch_size=4, iterations=14, eval_every=7, train_classifier=True)]
    ended = subprocess.run([sys.executable, "-m", "torch.distributed.run", *map(str, argv)], cwd=ROOT,
                           capture_output=True, text=True, env=ENV)
    assert ended.returncode == 0, ended.stderr[-2000:]
    steps = [Path(f"{out}.steps{rank}").read_text() for rank in (0, 1)]
    assert steps[0] == steps[1] and re.fullmatch("wwwwl+g+", steps[0]) and len(steps[0]) == 14
    two = read(out / "metrics.json")
    assert two["iterations_until_bank_full"] == steps[0].count("w") + steps[0].count("l")
    assert "classifier" in two["miou"] and len(run.read_checkpoint(out / "last.pt")["rng"]) == 2
    net, cfg = load(out)  # the memory of one process, same batches
    net.memory.bank.zero_(), net.memory.count.zero_()
    for x, present in batches:
        pfa.predictions_of(net, net, x, present, "local", cfg)
    bank, count, slopes = torch.load(f"{out}.found", weights_only=True)
    assert torch.equal(net.memory.count, count) and (count == SLOTS).all()
    assert torch.allclose(net.memory.bank, bank, atol=1e-5)
    exec(TWO, two_py := {})                                             # L_pce: over all labelled pixels
    for mine, theirs in zip(two_py["slopes_of"](net, net, cfg), slopes):
        assert set(mine) == set(theirs)
        for name, slope in mine.items():
            size = float(slope.abs().max())
            assert torch.allclose(theirs[name], slope, rtol=1e-3, atol=1e-4 * size + 1e-8), name
    done("--out", out, "--eval-only")
    one = read(out / "metrics.json")
    assert (two.pop("processes"), one.pop("processes")) == (2, 1) and numbers(one) == numbers(two)


# ---- the file itself ----

HEADER, BODY = (ROOT / "pfa_scribble.py").read_text(encoding="utf-8").split('"""', 2)[1:]


def test_every_name_of_the_symbol_table_is_in_the_body():
    table = HEADER[HEADER.index("symbol "):HEADER.index("Phases:")].strip().splitlines()[1:]
    cells = [re.split(r"  +|(?<=\))(?= )", line)[1] for line in table]  # symbol, here, shape, meaning, paper
    names = {name for cell in cells for name in re.findall(r"\w{3,}", cell)}
    assert len(names) >= 12
    assert [name for name in names if not re.search(rf"\b{name}\b", BODY)] == []


def test_the_toy_preset_runs_as_it_is_but_shorter(tmp_path):
    """`python pfa_scribble.py` with a hundredth of its iterations, on its own pictures."""
    done("--device", "cpu", "--out", tmp_path, "--schedule", 0.01, "--crop", 64, "--batch-size", 4)
    metrics, whole = read(tmp_path / "metrics.json"), pfa.PRESETS["toy"]
    assert list(metrics["iou"]["plain"]["plain"]) == toy_scenes.CLASSES and metrics["preset"] == "toy"
    assert metrics["iterations"] == round(whole["iterations"] / 100) and metrics["headline"] == "classifier"
    assert_pictures(tmp_path / "figures", files(tmp_path / "figures"))


# ---- GPU ----

@pytest.mark.gpu
@pytest.mark.parametrize("phase", ["warmup", "local", "global"])
@pytest.mark.parametrize("reading", ["paper", "official"])
def test_gpu_a_training_step_is_finite_in_bf16_and_never_waits_for_the_device(reading, phase):
    device = torch.device("cuda")
    net, cfg = small_net(reading=reading, device="cuda", amp="bf16", full=phase == "global")
    net = net.to(device, memory_format=torch.channels_last)
    optimizer, scheduler = pfa.build_optimizer(net, cfg, device)
    batch = [t.to(device) for t in small_batch()]
    model = pfa.wrap(net, phase, cfg, run.Machine(device))
    for _ in range(3):                                                  # first calls: kernels load
        pfa.train_step(model, net, optimizer, scheduler, *batch, phase, cfg)
    torch.cuda.set_sync_debug_mode("error")
    try:
        terms = pfa.train_step(model, net, optimizer, scheduler, *batch, phase, cfg)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(value.is_cuda and math.isfinite(value) for value in terms.values())
    assert all(torch.isfinite(p).all() for p in net.parameters()) and torch.isfinite(net.memory.bank).all()


@pytest.mark.gpu
def test_gpu_a_run_passes_through_every_phase_in_bf16(pictures, tmp_path):
    metrics = pfa.main(config(tmp_path, pictures, device="cuda", train_classifier=True))
    assert metrics["device"] == "cuda" and set(metrics["phases"]) == {"warmup", "local", "global"}
    assert all(math.isfinite(rate) for paths in metrics["miou"].values() for rate in paths.values())
    done("--out", tmp_path, "--resume")
    image = pictures / "images" / "test" / "p2.png"
    done("--out", tmp_path, "--predict", image, "--infer", "classifier")
    Image.fromarray(np.where(np.arange(37)[:, None] % 6 < 2, ids_in(pictures / "masks" / "test" / "p2.png"),
                             255).astype(np.uint8)).save(tmp_path / "strokes.png")
    done("--out", tmp_path, "--draw", image, tmp_path / "strokes.png")


@pytest.mark.gpu
@pytest.mark.parametrize("phase", ["warmup", "local", "global"])
def test_gpu_a_step_in_float32_is_that_of_the_cpu(phase, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    found = {}
    for name in ("cpu", "cuda"):
        net, cfg = small_net(amp="off")
        net = net.to(name).train()
        net.dropout.eval()                                              # its random numbers differ
        optimizer, scheduler = pfa.build_optimizer(net, cfg, torch.device(name))
        batch = [tensor.to(name) for tensor in small_batch()]
        terms = pfa.train_step(net, net, optimizer, scheduler, *batch, phase, cfg)
        slopes = {n: p.grad.cpu() for n, p in net.named_parameters() if p.grad is not None}
        found[name] = SimpleNamespace(terms=terms, slopes=slopes, bank=net.memory.bank.cpu())
    cpu, cuda = found["cpu"], found["cuda"]
    for name, value in cpu.terms.items():
        assert cuda.terms[name].item() == pytest.approx(value.item(), rel=1e-4)
    assert set(cpu.slopes) == set(cuda.slopes)
    for name, slope in cpu.slopes.items():
        size = float(slope.abs().max())
        assert torch.allclose(cuda.slopes[name], slope, rtol=1e-3, atol=1e-4 * size + 1e-7), name
    assert torch.allclose(cuda.bank, cpu.bank, atol=1e-4)
