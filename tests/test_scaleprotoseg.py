"""scaleprotoseg.py as its users meet it: runs, resuming, projection, explanations, tables, mistakes.

The pure functions of the method's formulas are in test_scaleprotoseg_equations.py. P prototypes, S scales,
D channels a scale, C classes, G groups a class, N the most prototypes that a class has.
"""
import contextlib
import copy
import csv
import io
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import scaleprotoseg
from commands import call, flags_of
from common import datasets, loaders, run, speed, toy_scenes, transforms
from common import scaleprotoseg_measures as measures
from common import tables as tables_module
from common.files import read_image
from pixels import denormalise
from scaleprotoseg import Source, project_prototypes, prune_prototypes

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
CLASSES = ("sky", "tall house", "bird", "ghost", "kite")


# ---- data and runs ----

@pytest.fixture(scope="module", autouse=True)
def few_toy_scenes():
    """Toy scenes with a handful of pictures a split."""
    with pytest.MonkeyPatch.context() as patch:
        for split, count in dict(train=8, val=2, test=3).items():
            patch.setitem(toy_scenes.SPLITS, split, count)
        yield


def picture(rng, height, width, things):
    """Image (H,W,3) and mask (H,W), uint8: sky, and `things`: (class, colour, size of a square)."""
    image = rng.integers(90, 150, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), np.uint8)
    for c, colour, side in things:
        y, x = rng.integers(0, height - side), rng.integers(0, width - side)
        image[y:y + side, x:x + side], mask[y:y + side, x:x + side] = colour, c
    return image, mask


def make_pictures(root, classes=CLASSES):
    """Data set `folder` of 51 x 37 pictures. In `train` there is no ghost, and of birds a single pixel in
    picture 2, under the centre of cell (4,6) at stride 4; in `test` there is no kite. Picture 0 of both is
    void all over, picture 1 of both is 30 x 22."""
    house, bird = (1, (200, 40, 30), 17), (2, (20, 20, 20), 9)
    ghost, kite = (3, 250, 9), (4, (250, 220, 0), 11)
    for split, count in (("train", 6), ("val", 2), ("test", 5)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for k in range(count):
            rng = np.random.default_rng([k, len(split)])
            size = (22, 30) if k == 1 and split != "val" else (37, 51)
            image, mask = picture(rng, *size, [house, bird, ghost] if split == "test" else [house, kite])
            if split == "train" and k == 2:
                mask[16, 25] = 2
            if k == 0 and split != "val":
                mask[:] = 255
            Image.fromarray(image).save(root / "images" / split / f"{k}.png")
            Image.fromarray(mask).save(root / "masks" / split / f"{k}.png")
    (root / "classes.txt").write_text("\n".join(classes))
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("data") / "pictures")


TINY = dict(device="cpu", crop=48, batch_size=3, depth=6, rates=["1", "2"], prototypes=2,
            protoseg_prototypes=4, warmup=4, joint=4, finetune=4, group_warmup=4, group_joint=4, eval_every=3,
            save_every=2, workers=0)
ONE_EACH = dict(warmup=1, joint=1, finetune=1, group_warmup=1, group_joint=1)


def config(out, data="", **flags):
    """The toy preset, a few steps long; with data a `folder`."""
    where = dict(dataset="folder", data=str(data)) if data else {}
    return run.make_config(scaleprotoseg.Config, scaleprotoseg.PRESETS, "toy", out=str(out),
                           **{**TINY, **where, **flags})


def on(data, **flags):
    """Command line of a tiny run on a `folder`."""
    return ["--dataset", "folder", "--data", data, *flags_of({**TINY, **flags})]


def script(*argv):
    """`python scaleprotoseg.py ARGV` in this process: returncode, stdout, stderr."""
    return call(scaleprotoseg, *argv)


def done(*argv):
    """What a call that must succeed prints."""
    ended = script(*argv)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def mistake(*argv):
    """The one sentence that the script must end with, exit code 2."""
    ended = script(*argv)
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert ended.stderr.startswith("scaleprotoseg.py: ") and ended.stderr.count("\n") == 1, ended.stderr
    return ended.stderr


def train(cfg):
    """main(cfg) without its prints and figures."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(scaleprotoseg.gallery, "draw_figures", lambda *args: None)
        return scaleprotoseg.main(cfg)


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(scaleprotoseg.gallery, "draw_figures", lambda *args: None)


def read(path):
    return json.loads(Path(path).read_text())


def files(path):
    return {str(p.relative_to(path)) for p in Path(path).rglob("*") if p.is_file()}


def numbers(metrics):
    """Without what differs from one measurement to the next."""
    return {k: v for k, v in metrics.items() if k not in ("seconds", "images_per_second")}


def same(a, b):
    """Bit for bit, through dicts, lists and tensors; seconds aside."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[k], b[k]) for k in a if k != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a and b != b                                  # nan equals nan


def load(out):
    """(net, progress, cfg) of a run."""
    cfg = run.read_config(scaleprotoseg.Config, out)
    return *scaleprotoseg.load_network(cfg, CPU), cfg


@contextlib.contextmanager
def watching():
    """.saved [(file, phase, iteration, weights)] of every checkpoint; of every training iteration .terms
    [(phase, terms of the loss)] and .weights [(phase, group weights, None in stage 1)]."""
    found = SimpleNamespace(saved=[], terms=[], weights=[])
    save, one = run.save_checkpoint, scaleprotoseg.train_step

    def saving(path, parts, progress):
        weights = copy.deepcopy(parts["model"].state_dict())
        found.saved.append((Path(path).name, progress["phase"], progress["iteration"], weights))
        return save(path, parts, progress)

    def stepping(model, net, optimizer, scheduler, x, labels, step, cfg):
        terms = one(model, net, optimizer, scheduler, x, labels, step, cfg)
        groups = getattr(net, "groups", None)
        found.terms.append((step, {name: value.item() for name, value in terms.items()}))
        found.weights.append((step, None if groups is None else groups.weights.detach().clone()))
        return terms

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "save_checkpoint", saving)
        patch.setattr(scaleprotoseg, "train_step", stepping)
        yield found


@pytest.fixture(scope="module")
def base(pictures, tmp_path_factory):
    """One run of every step on the pictures, from the command line, watched, read by many tests."""
    out = tmp_path_factory.mktemp("base")
    with watching() as found:
        found.stdout = done("--out", out, *on(pictures))
    found.out = out
    return found


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Toy scenes, which have parts and objects; without figures."""
    out = tmp_path_factory.mktemp("toy")
    train(config(out))
    return out


@pytest.fixture(scope="module")
def ancestor(tmp_path_factory):
    out = tmp_path_factory.mktemp("protoseg")
    done("--out", out, *flags_of(TINY), "--method", "protoseg")
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    out = tmp_path_factory.mktemp("deeplab")
    done("--out", out, *flags_of(TINY), "--method", "deeplab")
    return out


def small_net(step="joint", method="scaleprotoseg", num_classes=3, seed=0, **flags):
    """(net, cfg): a new network as it stands in a step."""
    cfg = config("unused", method=method, **flags)
    torch.manual_seed(seed)
    prototype_class, prototype_scale = scaleprotoseg.first_prototypes(cfg, num_classes)
    progress = dict(phase=step, classes=list(range(num_classes)), prototype_class=prototype_class,
                    prototype_scale=prototype_scale)
    return scaleprotoseg.build_model(cfg, progress), cfg


# ---- a run of each method ----

STAGE_1 = {"stage1_projected", "stage1_finetuned", "prototypes", "mean_abs_weight", "extra_parameters",
           "prototypes_at_first", "absent_classes", "of_absent_classes", "duplicates", "pruned"}
STAGE_2 = {"stage2", "stage2_thresholded", "group_average", "group_overlap", "equivariance"}
ALWAYS = {"miou", "macc", "pixel_acc", "iou", "absent", "images_per_second", "split", "preset", "method",
          "seed", "threshold", "iterations", "seconds", "device", "processes", "parameters", "evaluated", "finished"}
PARTS = {"consistency", "stability", "consistency_by_quantile", "stability_by_quantile", "purity",
         "largest_part"}


def assert_rates(metrics, classes):
    """The scores that metrics.json holds once and again for each stage."""
    rates = [rate for rate in metrics["iou"].values() if rate is not None]
    assert list(metrics["iou"]) == list(classes) and 0 <= min(rates) <= max(rates) <= 100
    assert metrics["miou"] == pytest.approx(np.mean(rates))


def assert_pictures(folder, names):
    assert files(folder) == set(names)
    for name in names:
        with Image.open(folder / name) as image:
            assert image.format == "PNG" and image.mode == "RGB"
            assert min(image.size) >= 100 and max(image.size) <= 4000
            assert len(np.unique(np.asarray(image)[::7, ::7])) > 5


def test_a_run_of_scaleprotoseg_leaves_its_scores(toy):
    metrics = read(toy / "metrics.json")
    assert set(metrics) == ALWAYS | STAGE_1 | STAGE_2 | PARTS
    for stage in (metrics, *(metrics[name] for name in STAGE_1 | STAGE_2 if name.startswith("stage"))):
        assert_rates(stage, toy_scenes.CLASSES)
    assert metrics["miou"] == metrics["stage2_thresholded"]["miou"]
    assert metrics["iterations"] == dict(warmup=4, joint=4, finetune=4, group_warmup=4, group_joint=4)
    assert (metrics["split"], metrics["preset"], metrics["method"], metrics["seed"]) == (
        "test", "toy", "scaleprotoseg", 0)
    net, _, _ = load(toy)
    dropped = metrics["of_absent_classes"] + metrics["duplicates"] + metrics["pruned"]
    assert metrics["prototypes_at_first"] == 14 * 2 * 2 == dropped + len(net.prototypes)
    assert 0 < metrics["prototypes"] <= len(net.prototypes)
    assert metrics["seconds"] > 0 and metrics["images_per_second"] > 0
    for name in ("consistency", "stability"):
        by_quantile = metrics[f"{name}_by_quantile"]
        assert list(by_quantile) == ["0.7", "0.8", "0.9"] and 0 <= metrics[name] <= 100
        assert metrics[name] == pytest.approx(np.mean(list(by_quantile.values())), abs=1e-4)
    assert set(metrics["equivariance"]) == {"0.6", "0.7"} and 0 <= metrics["group_overlap"] <= 100


def test_a_run_of_protoseg_has_no_groups_and_no_scales(ancestor):
    metrics = read(ancestor / "metrics.json")
    net, _, _ = load(ancestor)
    owners, P = {toy_scenes.CLASSES[c] for c in net.prototype_class.tolist()}, len(net.prototypes)
    parts = PARTS if metrics["consistency"] is not None else {"consistency", "stability"}  # no part was seen
    assert set(metrics) == ALWAYS | STAGE_1 | parts
    assert net.groups is None and not net.prototype_scale.any() and metrics["prototypes_at_first"] == 14 * 4
    assert P == metrics["prototypes"] == (14 * 4 - metrics["of_absent_classes"] - metrics["duplicates"]
                                          - metrics["pruned"])
    assert metrics["extra_parameters"] == P * (6 + 14)
    assert metrics["mean_abs_weight"] == pytest.approx(net.last_layer.weight.abs().mean().item())
    assert metrics["iterations"] == dict(warmup=4, joint=4, finetune=4)
    names = [p.removeprefix("prototypes-").removesuffix(".png") for p in files(ancestor / "figures")
             if p.startswith("prototypes-")]
    assert names and set(names) <= owners
    assert_pictures(ancestor / "figures", {
        "examples.png", "nearest_patches.png", "nearest_prototypes-1.png", "nearest_prototypes-2.png",
        *(f"prototypes-{name}.png" for name in names)})


def test_a_run_of_the_plain_network(plain):
    metrics = read(plain / "metrics.json")
    assert set(metrics) == ALWAYS | {"plain"}
    assert_rates(metrics, toy_scenes.CLASSES)
    assert metrics["iterations"] == dict(warmup=4, joint=4)
    assert_pictures(plain / "figures", {"examples.png"})
    net, _, _ = load(plain)
    x = torch.randn(1, 3, 64, 64)
    summed = sum(conv(net.backbone(x)) for conv in net.aspp)
    assert torch.allclose(net(x)[-1][0], summed, atol=1e-5) and summed.shape[1] == 14


def test_figures_show_every_class_of_the_test_pictures(base):
    """Of ghosts there is no prototype, and no kite in a test picture."""
    found = read(base.out / "metrics.json")["equivariance"]["0.6"]["pairs"]
    assert_pictures(base.out / "figures", {
        "examples.png", "nearest_patches.png", "nearest_prototypes-1.png", "nearest_prototypes-2.png",
        "equivariance.png", *(["equivariant_pairs.png"] if found else []),
        *(f"groups-{name}.png" for name in ("sky", "tall-house", "bird", "ghost")),
        *(f"prototypes-{name}.png" for name in ("sky", "tall-house", "bird"))})


def test_the_log_has_a_row_for_every_evaluation(base):
    rows = list(csv.DictReader(open(base.out / "log.csv")))
    steps = ("warmup", "joint", "finetune", "group_warmup", "group_joint")
    expected = [(step, i) for step in steps for i in (3, 4)]
    expected.insert(4, ("project", 0))
    assert [(row["phase"], int(row["iteration"])) for row in rows] == expected
    terms = dict(warmup="ce diversity", joint="ce diversity", project="", finetune="ce l1",
                 group_warmup="ce l1 entropy", group_joint="ce l1 entropy")
    for row in rows:
        found = [name for name in ("ce", "diversity", "l1", "entropy") if row[name]]
        assert found == terms[row["phase"]].split()
        assert 0 <= float(row["val_miou"]) <= 100 and 0 <= float(row["val_pixel_acc"]) <= 100
    assert [float(r["seconds"]) for r in rows] == sorted(float(r["seconds"]) for r in rows)
    assert rows[1]["lr"] == rows[0]["lr"] and float(rows[3]["lr"]) < float(rows[2]["lr"])     # constant; poly
    for step in steps:                                                  # means since the row before
        terms = [t for name, t in base.terms if name == step][-4:]      # without what announced the time
        third, fourth = [row for row in rows if row["phase"] == step]
        for name in terms[0]:
            assert float(third[name]) == pytest.approx(np.mean([t[name] for t in terms[:3]]), rel=1e-5)
            assert float(fourth[name]) == pytest.approx(terms[3][name], rel=1e-5)
    first = base.stdout.splitlines()[0]
    assert "8 steps of 3 images" in first and "s a step" in first and "GiB" in first


def test_a_seed_decides_and_announcing_the_time_changes_nothing(base, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "announce", lambda *args: None)
    train(config(tmp_path / "same", pictures))
    train(config(tmp_path / "other", pictures, seed=1, **ONE_EACH))
    again, other, first = (run.read_checkpoint(p / "last.pt")["model"]
                           for p in (tmp_path / "same", tmp_path / "other", base.out))
    assert same(again, first) and not same(other, first)


# ---- resume ----

@contextlib.contextmanager
def killed(place, call=0):
    """Ctrl-C at iteration number `call` of the step `place`, or as soon as project or report begins."""
    part, one, now = scaleprotoseg.train_phase, scaleprotoseg.train_step, SimpleNamespace(step=None, count=0)

    def train_phase(net, step, *rest):
        now.step, now.count = step, 0
        part(net, step, *rest)
        now.step = None

    def train_step(*args):
        now.count += 1
        if (now.step, now.count) == (place, call):
            raise KeyboardInterrupt
        return one(*args)

    def stop(*args):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaleprotoseg, "train_phase", train_phase)
        patch.setattr(scaleprotoseg, "train_step", train_step)
        if place in ("project", "report"):
            patch.setattr(scaleprotoseg, place, stop)
        yield


def interrupt(place, call, *argv):
    with killed(place, call):
        ended = script(*argv)
    assert ended.returncode == 130 and "--resume" in ended.stderr, ended.stderr


def assert_same_run(a, b):
    """Weights, optimizer, random numbers, log and metrics of two folders are equal bit for bit."""
    for name in sorted({"last.pt", "stage1.pt"} & files(a)):
        assert same(run.read_checkpoint(a / name), run.read_checkpoint(b / name)), name
    assert numbers(read(a / "metrics.json")) == numbers(read(b / "metrics.json"))
    logs = [[numbers(row) for row in csv.DictReader(open(p / "log.csv"))] for p in (a, b)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("place, call", [
    ("warmup", 2), ("warmup", 4), ("joint", 4), ("project", 0), ("finetune", 1), ("finetune", 4),
    ("group_warmup", 1), ("group_warmup", 4), ("group_joint", 1), ("group_joint", 4), ("report", 0)])
def test_resume_in_every_step_ends_with_the_same_numbers(base, pictures, tmp_path, no_figures, place, call):
    """Checkpoints come at iterations 2 and 4 of a step: iteration 3 is lost, with its row of the log."""
    interrupt(place, call, "--out", tmp_path, *on(pictures))
    assert not (tmp_path / "metrics.json").exists()
    if (place, call) != ("warmup", 2):
        progress = run.read_checkpoint(tmp_path / "last.pt")["progress"]
        before = dict(project="joint", finetune="project", group_warmup="finetune",
                      group_joint="group_warmup", report="group_joint")
        assert (progress["phase"], progress["iteration"]) == (
            (place, 2) if call == 4 else (before[place], 0 if place == "finetune" else 4))
    done("--out", tmp_path, "--resume")
    assert_same_run(base.out, tmp_path)


@pytest.mark.parametrize("method, places", [("protoseg", ["warmup", "joint", "project", "finetune"]),
                                            ("deeplab", ["warmup", "joint"])])
def test_resume_again_and_again(pictures, tmp_path, no_figures, method, places):
    train(config(tmp_path / "whole", pictures, method=method))
    broken = ["--out", tmp_path / "broken"]
    interrupt(places[0], 4, *broken, *on(pictures), "--method", method)
    for place in places[1:]:
        interrupt(place, 4, *broken, "--resume")
    done(*broken, "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_resume_of_a_finished_run_repeats_its_report(base, tmp_path, no_figures):
    for name in ("config.json", "last.pt"):
        (tmp_path / name).write_bytes((base.out / name).read_bytes())
    done("--out", tmp_path, "--resume")
    assert numbers(read(tmp_path / "metrics.json")) == numbers(read(base.out / "metrics.json"))


# ---- what a step trains ----

TRAINED = {"warmup": ("aspp", "prototypes"), "joint": ("backbone", "aspp", "prototypes"),
           "finetune": ("last_layer",), "group_warmup": ("groups.weights",),
           "group_joint": ("groups.weights", "groups.last_layer")}


def norms_of(net):
    """Names in the state dict that belong to batch norm."""
    return {f"{name}.{key}" for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)
            for key in module.state_dict()}


@pytest.mark.parametrize("frozen_bn", [True, False])
@pytest.mark.parametrize("method, step", [(method, step) for method, steps in scaleprotoseg.PHASES.items()
                                          for step in steps if step != "project"])
def test_a_step_trains_its_parameters_and_nothing_else(method, step, frozen_bn):
    net, cfg = small_net(step, method, frozen_bn=frozen_bn)
    optimizer, scheduler = scaleprotoseg.build_optimizer(net, step, cfg, CPU)
    net.train()
    before, generator = copy.deepcopy(net.state_dict()), torch.Generator().manual_seed(0)
    for _ in range(3):
        x, labels = (torch.randn(2, 3, 48, 48, generator=generator),
                     torch.randint(3, (2, 48, 48), generator=generator))
        scaleprotoseg.train_step(net, net, optimizer, scheduler, x, labels, step, cfg)
    after, norms = net.state_dict(), norms_of(net)
    parts = tuple(part for part in TRAINED[step] if (method, part) != ("deeplab", "prototypes"))
    expected = {name for name in before if name.startswith(parts) and not (name in norms and frozen_bn)}
    assert norms and {name for name in before if not torch.equal(before[name], after[name])} == expected


@pytest.mark.parametrize("frozen_bn", [True, False])
def test_weight_decay_is_for_backbone_and_aspp_only(frozen_bn):
    """[D3] of the header; convolutions alone where batch norm is frozen."""
    net, cfg = small_net(frozen_bn=frozen_bn)
    name_of, norms = {id(p): name for name, p in net.named_parameters()}, norms_of(net)
    for step in scaleprotoseg.PHASES["scaleprotoseg"][:2]:
        optimizer, _ = scaleprotoseg.build_optimizer(net, step, cfg, CPU)
        assert isinstance(optimizer, torch.optim.Adam) and not isinstance(optimizer, torch.optim.AdamW)
        decay = {name_of[id(p)]: group["weight_decay"] for group in optimizer.param_groups
                 for p in group["params"]}
        assert decay["prototypes"] == 0 and bool(norms & set(decay)) == (step == "joint" and not frozen_bn)
        assert all(value == (0 if name == "prototypes" else 5e-4) for name, value in decay.items())
        assert all(name.startswith(("backbone.", "aspp.", "prototypes")) for name in decay)
    net, cfg = small_net("group_joint", frozen_bn=frozen_bn)
    for step in ("finetune", "group_warmup", "group_joint"):
        optimizer, _ = scaleprotoseg.build_optimizer(net, step, cfg, CPU)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0]


@pytest.mark.parametrize("step, expected", [
    ("warmup", {"aspp": 0.01, "prototypes": 0.01}),
    ("joint", {"backbone": 0.001, "aspp": 0.01, "prototypes": 0.01}),
    ("finetune", {"last_layer": 0.02}), ("group_warmup", {"groups.weights": 0.03}),
    ("group_joint", {"groups.weights": 0.03, "groups.last_layer": 0.03})])
def test_learning_rates_and_their_decay(step, expected):
    net, cfg = small_net(step, lr=0.01, backbone_lr=0.001, finetune_lr=0.02, group_lr=0.03, **{step: 10})
    optimizer, scheduler = scaleprotoseg.build_optimizer(net, step, cfg, CPU)
    name_of = {id(p): name for name, p in net.named_parameters()}
    for iteration in range(10):
        factor = (1 - iteration / 10) ** 0.9 if step.endswith("joint") else 1
        for group in optimizer.param_groups:
            for p in group["params"]:
                base_lr = next(lr for part, lr in expected.items() if name_of[id(p)].startswith(part))
                assert group["lr"] == pytest.approx(base_lr * factor)
        optimizer.step()
        scheduler.step()


def test_micro_batches_add_up_to_the_gradient_of_the_batch():
    """Every picture holds the same classes and no void: else the means over pixels and over terms of the
    diversity loss are those of the parts."""
    x, labels = torch.randn(4, 3, 48, 48), (torch.arange(48) // 16).expand(4, 48, 48).contiguous()
    for method, step in (("scaleprotoseg", "joint"), ("scaleprotoseg", "group_joint"), ("deeplab", "joint")):
        gradients, terms = {}, {}
        for micro in (0, 1, 2, 3):
            net, cfg = small_net(step, method, frozen_bn=True, micro_batch=micro, input_scales=["0.5"])
            optimizer, scheduler = scaleprotoseg.build_optimizer(net, step, cfg, CPU)
            net.train()
            terms[micro] = scaleprotoseg.train_step(net, net, optimizer, scheduler, x, labels, step, cfg)
            gradients[micro] = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        assert gradients[0] and any(g.any() for g in gradients[0].values())
        for micro in (1, 2, 3):
            assert set(gradients[micro]) == set(gradients[0]) and set(terms[micro]) == set(terms[0])
            for name, whole in gradients[0].items():
                scale = float(whole.abs().max())
                assert torch.allclose(gradients[micro][name], whole, rtol=1e-4, atol=1e-5 * scale)
            for name, whole in terms[0].items():
                assert float(terms[micro][name]) == pytest.approx(float(whole), rel=1e-4)


def test_training_in_micro_batches_is_a_run_like_any_other(pictures, tmp_path):
    metrics = train(config(tmp_path, pictures, micro_batch=2, frozen_bn=True, **ONE_EACH))
    assert math.isfinite(metrics["miou"])


# ---- several sizes of the input ----

def nearest_exact(labels, h, w):
    """numpy: of each cell the pixel under its centre."""
    H, W = labels.shape[1:]
    rows, columns = ((np.arange(n) + 0.5) * size / n for n, size in ((h, H), (w, W)))
    return labels.numpy()[:, rows.astype(int)][:, :, columns.astype(int)]


def test_the_largest_map_over_the_sizes_counts_at_test_time():
    net, _ = small_net(input_scales=["0.5", "0.75"], frozen_bn=True)
    x = torch.randn(2, 3, 47, 61)
    with torch.no_grad():
        full = net.eval().one_size(x)
        largest = full
        for s in (0.5, 0.75):
            smaller = net.one_size(F.interpolate(x, scale_factor=s, mode="bilinear", align_corners=False))
            smaller = F.interpolate(smaller, full.shape[2:], mode="bilinear", align_corners=False)
            largest = torch.maximum(largest, smaller)
        maps = net.maps(x)
        assert len(maps) == 1 and torch.equal(maps[0], largest) and not torch.equal(largest, full)
        _, d2 = net(x)[0]
        z = largest.sigmoid().unflatten(1, (2, 6))[:, net.prototype_scale]                # (B,P,D,h,w)
        assert torch.allclose(d2, (z - net.prototypes[:, :, None, None]).square().sum(2), atol=1e-5)
    assert len(net(x)) == 1 and len(net.train()(x)) == 4 == len(net.maps(x))


@pytest.mark.parametrize("method", ["scaleprotoseg", "protoseg", "deeplab"])
def test_each_size_is_compared_with_labels_on_its_own_grid(method):
    net, cfg = small_net("joint", method, input_scales=["0.5", "0.75"], frozen_bn=True, w_diversity=0.5)
    x, labels = torch.randn(2, 3, 48, 64), torch.randint(4, (2, 48, 64))
    labels[labels == 3] = 255
    outputs = net.train()(x)
    assert [tuple(logits.shape[2:]) for logits, _ in outputs] == [(12, 16), (6, 8), (9, 12), (12, 16)]
    ce, diversity = [], []
    for logits, d2 in outputs:
        small = nearest_exact(labels, *logits.shape[2:])
        values = logits.detach().double().numpy()
        log_p = values - np.log(np.exp(values).sum(1, keepdims=True))
        ce.append(np.mean([-log_p[b, small[b, i, j], i, j] for b, i, j in np.argwhere(small != 255)]))
        if d2 is not None:
            diversity.append(scaleprotoseg.diversity_loss(
                d2.detach(), torch.from_numpy(small), net.prototype_class, net.prototype_scale).item())
    losses = scaleprotoseg.losses_of(net, net, x, labels, "joint", cfg)
    assert losses["ce"].item() == pytest.approx(np.mean(ce), rel=1e-4)
    assert set(losses) == ({"ce"} if method == "deeplab" else {"ce", "diversity"})
    if method != "deeplab":
        assert losses["diversity"].item() == pytest.approx(0.5 * np.mean(diversity), rel=1e-4)


def test_a_batch_that_is_void_all_over_costs_nothing():
    for step in ("joint", "group_joint"):
        net, cfg = small_net(step, frozen_bn=True, weight_decay=0.0, w_entropy=0.0, w_l1_group=0.0)
        optimizer, scheduler = scaleprotoseg.build_optimizer(net, step, cfg, CPU)
        terms = scaleprotoseg.train_step(net.train(), net, optimizer, scheduler, torch.randn(2, 3, 48, 48),
                                         torch.full((2, 48, 48), 255), step, cfg)
        assert all(float(value) == 0 for value in terms.values())
        assert not any(p.grad.any() for p in net.parameters() if p.grad is not None)


# ---- projection ----

def stub_net(prototypes, prototype_class, prototype_scale, num_classes, method="scaleprotoseg"):
    """A ScaleProtoSeg whose maps before the sigmoid are its image (B,S*D,h,w); .calls counts them."""
    prototypes = torch.as_tensor(prototypes, dtype=torch.float32)
    backbone = nn.Identity()
    backbone.channels = 1
    rates = list(range(1, max(prototype_scale) + 2))
    net = scaleprotoseg.ScaleProtoSeg(backbone, prototypes.shape[1], rates, method == "protoseg", (), True,
                                      list(prototype_class), list(prototype_scale), num_classes)
    net.prototypes.data.copy_(prototypes)
    net.calls = 0

    def maps(x):
        assert not net.training
        net.calls += 1
        return [x]

    net.maps = maps
    return net


def loader_of(features, masks):
    """features (N,S*D,h,w) as the sigmoid gives them; masks: N tensors (H,W)."""
    return [dict(image=torch.logit(z)[None].clamp(-1000, 1000), mask=mask[None], index=torch.tensor([i]))
            for i, (z, mask) in enumerate(zip(features, masks))]


def slow_projection(features, masks, prototypes, cls, scale, in_loop=False):
    """Loops over images and cells. in_loop moves a prototype as soon as something nearer is found."""
    D, moved, found = prototypes.shape[1], prototypes.double().numpy().copy(), []
    for p in range(len(prototypes)):
        start, best, where = moved[p].copy(), math.inf, (-1, -1, -1)
        for i, (z, mask) in enumerate(zip(features.double().numpy(), masks)):
            labels = nearest_exact(mask[None], *z.shape[1:])[0]
            for row, column in np.argwhere(labels == cls[p]):
                patch = z[scale[p] * D:(scale[p] + 1) * D, row, column]
                d2 = ((patch - (moved[p] if in_loop else start)) ** 2).sum()
                if d2 < best:
                    best, where, moved[p] = d2, (i, int(row), int(column)), patch
        found.append(Source(*where, best))
    return moved, found


@pytest.mark.parametrize("seed", range(4))
def test_projection_equals_loops(seed):
    """Features are 0, 1/2 or 1, exact after the sigmoid: many ties, of which the first wins."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randint(3, (6, 2 * 3, 3, 4), generator=generator) / 2
    masks = [torch.randint(4, (7, 9), generator=generator) for _ in range(6)]
    for mask in masks:
        mask[mask == 3] = 255                                           # void; class 4 has no pixel
    masks[0][:] = 255
    cls, scale = [0, 1, 2, 4, 2, 1, 0, 0], [0, 1, 0, 1, 1, 0, 0, 0]
    prototypes = torch.randint(9, (8, 3), generator=generator) / 8
    prototypes[7] = prototypes[6]                                       # they go to the same place
    expected, sources = slow_projection(features, masks, prototypes, cls, scale)
    net = stub_net(prototypes, cls, scale, 5).train()
    found = project_prototypes(net, loader_of(features, masks), CPU)
    assert found == sources and found[3] == (-1, -1, -1, math.inf) and found[6] == found[7]
    assert np.array_equal(net.prototypes.detach().numpy(), expected.astype(np.float32))
    assert net.calls == 6                                               # one forward pass an image, in all
    kept = scaleprotoseg.remove_duplicates(net.prototypes, net.prototype_class, net.prototype_scale)
    assert 7 not in kept


def test_of_equal_patches_the_first_is_taken():
    features = torch.full((4, 2, 2, 3), 1.0)
    for i, row, column in ((1, 1, 1), (1, 0, 2), (2, 0, 0)):            # the same distance three times
        features[i, :, row, column] = 0.5
    net = stub_net([[0.0, 0.0]], [0], [0], 1)
    masks = [torch.zeros(2, 3, dtype=torch.int64)] * 4
    assert project_prototypes(net, loader_of(features, masks), CPU) == [(1, 0, 2, 0.5)]


def test_prototypes_move_after_the_last_image_and_not_inside_the_loop():
    """From 0.5: 0.75 is near, 0.3 nearer, 0.85 far. One that has moved to 0.75 would prefer 0.85 to 0.3."""
    features = torch.tensor([0.75, 0.3, 0.85]).view(3, 1, 1, 1)
    masks, start = [torch.zeros(1, 1, dtype=torch.int64)] * 3, torch.full((1, 1), 0.5)
    right, wrong = (slow_projection(features, masks, start, [0], [0], loop)[1] for loop in (False, True))
    assert right[0][:3] == (1, 0, 0) and wrong[0][:3] == (2, 0, 0)      # the case tells them apart
    net = stub_net(start, [0], [0], 1)
    source, = project_prototypes(net, loader_of(features, masks), CPU)
    assert source[:3] == (1, 0, 0) and source.distance == pytest.approx(0.04, abs=1e-6)
    assert net.prototypes.item() == pytest.approx(0.3, abs=1e-6)


def test_after_projection_every_prototype_is_a_patch_of_its_source(base, pictures):
    net, progress, _ = load(base.out)
    data = datasets.open_dataset("folder", str(pictures), "train")
    sources = [Source(*source) for source in progress["sources"]]
    for p, source in enumerate(sources):
        image, mask = data.read(source.image)
        with torch.no_grad():
            z = net.maps(transforms.normalise(image)[None])[-1].sigmoid()[0].unflatten(0, (2, 6))
        labels = nearest_exact(mask[None], *z.shape[2:])[0]
        assert labels[source.row, source.column] == net.prototype_class[p]
        patch = z[net.prototype_scale[p], :, source.row, source.column]
        assert torch.allclose(patch, net.prototypes[p], atol=1e-5)
        assert source.distance >= 0


def test_classes_without_a_pixel_and_duplicates_are_dropped_in_a_run(base):
    """No ghost; a single pixel of a bird: its two prototypes of a scale fall together."""
    net, progress, _ = load(base.out)
    metrics = read(base.out / "metrics.json")
    assert metrics["absent_classes"] == ["ghost"] and metrics["of_absent_classes"] == 4
    assert metrics["prototypes_at_first"] == 20 and metrics["pruned"] == 0 and metrics["duplicates"] >= 2
    assert len(net.prototypes) == 20 - 4 - metrics["duplicates"]
    assert "4 of classes without a training pixel (ghost)" in base.stdout
    birds = (net.prototype_class == 2).nonzero()[:, 0].tolist()
    assert net.prototype_scale[birds].tolist() == [0, 1]
    assert [progress["sources"][p][:3] for p in birds] == [[2, 4, 6]] * 2
    rows = torch.cat([net.prototypes.detach(), net.prototype_class[:, None], net.prototype_scale[:, None]], 1)
    assert len(rows.unique(dim=0)) == len(rows)
    assert net.prototype_class.tolist() == progress["prototype_class"]
    assert net.last_layer.weight.shape == (5, len(rows))
    assert not (net.prototype_class == 3).any() and (net.groups.members[3] == -1).all()
    x = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        activation = net.groups.activations(net.similarity(x))[0].unflatten(0, (5, 3))
    assert not activation[3].any() and (activation[[0, 1, 2, 4]] >= 1).all()        # [D5]
    iou = metrics["iou"]
    assert metrics["absent"] == ["kite"] and iou["sky"] is not None and not iou["kite"]


def test_projection_without_a_labelled_pixel_is_one_sentence(tmp_path):
    data = make_pictures(tmp_path / "data")
    for path in (data / "masks" / "train").iterdir():
        with Image.open(path) as mask:
            Image.new("L", mask.size, 255).save(path)
    said = mistake("--out", tmp_path / "out", *on(data, **ONE_EACH))
    assert "no pixel of the train split" in said


def test_a_class_with_one_prototype_trains_and_is_explained(pictures, tmp_path, no_figures):
    """At one scale the bird's prototypes fall into one, whose groups have nothing to choose."""
    metrics = train(config(tmp_path, pictures, rates=["1"], groups=2))
    net, _, _ = load(tmp_path)
    assert (net.prototype_class == 2).sum() == 1 and metrics["group_average"] >= 1
    members = net.groups.members[2]
    assert (members >= 0).sum() == 1 and torch.equal(net.groups.weights[2][:, members >= 0], torch.ones(2, 1))
    assert not any(entry["pairs"] for entry in metrics["equivariance"].values())   # there is one scale
    picture = pictures / "images" / "test" / "2.png"
    done("--out", tmp_path, "--explain", picture, "--class", "bird")
    found = read(tmp_path / "explanations" / "2-bird.json")
    assert [[m["weight"] for m in part["members"]] for part in found["own"]] == [[1], [1]]


def slow_pruning(net, features, masks, cls, scale, neighbours=6, least=3):
    D, kept = net.prototypes.shape[1], []
    for p, prototype in enumerate(net.prototypes.detach().double().numpy()):
        rows = []
        for z, mask in zip(features.double().numpy(), masks):
            (H, W), (h, w) = mask.shape, z.shape[1:]
            labels, best = nearest_exact(mask[None], h, w)[0], (math.inf, False)
            for i, j in np.argwhere(labels != 255):
                d2 = ((z[scale[p] * D:(scale[p] + 1) * D, i, j] - prototype) ** 2).sum()
                block = mask[i * H // h:-(-(i + 1) * H // h), j * W // w:-(-(j + 1) * W // w)]
                if d2 < best[0]:
                    best = d2, bool((block == cls[p]).any())
            rows.append(best)
        rows.sort(key=lambda row: row[0])
        kept.append(sum(hit for _, hit in rows[:neighbours]) >= min(least, len(masks)))
    return kept


@pytest.mark.parametrize("images", [2, 4, 12])
def test_pruning_equals_loops(images):
    generator = torch.Generator().manual_seed(images)
    features = torch.rand(images, 3, 4, 5, generator=generator)
    masks = [(torch.randint(9, (11, 13), generator=generator) // 2).long() for _ in range(images)]
    for mask in masks:
        mask[mask == 4] = 255
        mask[:6][mask[:6] == 1] = 0                                     # classes are not spread evenly
    masks[-1][:] = 255
    cls = [c for c in (0, 1, 2) for _ in range(8)]                      # class 3 has no prototype
    net = stub_net(torch.rand(24, 3, generator=generator), cls, [0] * 24, 4, "protoseg")
    expected = slow_pruning(net, features, masks, cls, [0] * 24)
    found = prune_prototypes(net, loader_of(features, masks), CPU)
    assert found.tolist() == expected and net.calls == images
    if images > 2:
        assert {True, False} == set(expected)


def test_pruned_prototypes_leave_a_run_of_protoseg(ancestor):
    metrics, (net, progress, _) = read(ancestor / "metrics.json"), load(ancestor)
    assert metrics["pruned"] > 0 and metrics["duplicates"] > 0
    assert len(progress["sources"]) == len(net.prototypes) == len(progress["prototype_class"])
    data = datasets.open_dataset("toy_scenes", "", "train")
    loader = loaders.eval_loader(loaders.TestView(data, 0), 0, CPU)
    assert prune_prototypes(net, loader, CPU).all()                     # nothing is left to prune


# ---- groups ----

def test_group_weights_stay_on_the_simplex_after_every_step(base):
    net, _, _ = load(base.out)
    there = (net.groups.members >= 0)[:, None].expand_as(net.groups.weights)
    seen = [(step, weights) for step, weights in base.weights if step.startswith("group")]
    assert Counter(step for step, _ in seen) == dict(group_warmup=4, group_joint=4)
    alive = there.any(2)
    for _, weights in seen:
        assert (weights >= 0).all() and not weights[~there].any()
        assert torch.allclose(weights.sum(2), alive.float(), atol=1e-5)


def test_group_weights_move_in_both_steps_of_stage_2(base):
    """With one and the same batch they would not: Adam starts with signs, and the simplex undoes a shift."""
    weights = {phase: [w for name, w in base.weights if name == phase]
               for phase in ("group_warmup", "group_joint")}
    net, _, _ = load(base.out)
    net.start_groups(3, seed=0)                                         # as stage 2 begins
    start = net.groups.weights.detach()
    assert (weights["group_warmup"][-1] - start).abs().max() > 1e-3
    for before, after in ((weights["group_warmup"][-1], weights["group_joint"][-1]),
                          (weights["group_joint"][0], weights["group_joint"][-1])):
        assert (after - before).abs().max() > 1e-3
    saved = {(step, i): state for name, step, i, state in base.saved if name == "last.pt"}
    assert torch.equal(saved["group_joint", 4]["groups.weights"], weights["group_joint"][-1])


def test_the_entropy_loss_makes_groups_sparse(base, pictures, tmp_path):
    flags = dict(stage1=str(base.out), group_warmup=20, group_joint=40, eval_every=100, save_every=100)
    on, off = (train(config(tmp_path / f"w{w}", pictures, w_entropy=w, **flags)) for w in (5.0, 0.0))
    assert on["group_average"] < off["group_average"]
    assert on["stage1_finetuned"] == off["stage1_finetuned"]


# ---- sparsity ----

def grouped_net(weights, head, cls=(0, 0, 0, 1, 1, 2), num_classes=4, scale=None, prototypes=None):
    """Prototypes of the given classes, groups with these weights (C,G,N) and last layer (C,C*G)."""
    prototypes = torch.rand(len(cls), 5) if prototypes is None else prototypes
    net = stub_net(prototypes, cls, scale or [0] * len(cls), num_classes).eval()
    net.start_groups(len(weights[0]))
    net.groups.weights.data.copy_(torch.as_tensor(weights))
    net.groups.last_layer.weight.data.copy_(torch.as_tensor(head))
    return net


WEIGHTS = [[[0.96, 0.04, 0.0], [0.5, 0.3, 0.2]],                        # class 0: prototypes 0, 1, 2
           [[0.0, 1.0, 0.0], [0.02, 0.98, 0.0]],                        # class 1: prototypes 3, 4
           [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]],                          # class 2: prototype 5
           [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]                          # class 3 has none
HEAD = np.arange(32).reshape(4, 8) / 10 - 1.5


@pytest.mark.parametrize("alpha, used, average, kept", [(0.05, [0, 1, 2, 4, 5], 8 / 6, 8),
                                                        (0.0, [0, 1, 2, 3, 4, 5], 10 / 6, 10),
                                                        (0.3, [0, 1, 4, 5], 7 / 6, 7)])
def test_sparsity_by_hand(alpha, used, average, kept):
    net, cfg = grouped_net(WEIGHTS, HEAD), config("unused", threshold=alpha)
    found = measures.sparsity(net, cfg)
    assert net.used(alpha).nonzero()[:, 0].tolist() == used
    assert found["prototypes"] == len(used) and found["group_average"] == pytest.approx(average)
    assert found["mean_abs_weight"] == pytest.approx(np.abs(HEAD).mean())
    assert found["extra_parameters"] == len(used) * 5 + kept + 32


def test_sparsity_of_stage_1_by_hand():
    net = stub_net(torch.rand(6, 5), [0, 0, 0, 1, 1, 2], [0] * 6, 4)
    found = measures.sparsity(net, config("unused"))
    assert found == dict(prototypes=6, mean_abs_weight=pytest.approx((6 + 18 * 0.5) / 24),
                         extra_parameters=6 * 5 + 24)


# ---- explanations ----

def slow_logits(net, x, alpha=0.0):
    """(1,3,H,W) -> similarity (P,h,w), logits (C,h,w), group activations (C,G,h,w) or None; all in numpy."""
    with torch.no_grad():
        z = net.maps(x)[-1][0].double().sigmoid().numpy()
    D, scale = net.prototypes.shape[1], net.prototype_scale.tolist()
    d2 = np.stack([((z[s * D:(s + 1) * D] - p[:, None, None]) ** 2).sum(0)
                   for p, s in zip(net.prototypes.detach().double().numpy(), scale)])
    similarity = np.log((d2 + 1) / (d2 + 1e-4))
    if net.groups is None:
        head = net.last_layer.weight.detach().double().numpy()
        return similarity, np.einsum("cp,pyx->cyx", head, similarity), None
    C, G, _ = net.groups.weights.shape
    activation = np.zeros((C, G, *d2.shape[1:]))
    for c, members in enumerate(net.groups.members.tolist()):
        for g in range(G):
            if any(p >= 0 for p in members):
                pairs = zip(members, net.groups.weights[c, g].tolist())
                activation[c, g] = np.exp(sum(w * similarity[p] for p, w in pairs if p >= 0 and w >= alpha))
    head = net.groups.last_layer.weight.detach().double().numpy()
    return similarity, np.einsum("cf,fyx->cyx", head, activation.reshape(C * G, *d2.shape[1:])), activation


def total(found):
    return sum(part["contribution"] for part in found["own"]) + found["constant"] + found["others"]


def check_others(net, found, c, similarity, activation):
    """What other classes do to the logit of c at a cell: similarity (P,), activation (C,G) or None."""
    if activation is None:
        value, nothing, owner = similarity, np.zeros(len(similarity)), net.prototype_class.tolist()
        weight = net.last_layer.weight[c].tolist()
    else:
        value, owner = activation.flatten(), net.groups.class_of_group.tolist()
        nothing = [float((net.groups.members[k] >= 0).any()) for k in owner]          # exp(0); no group: 0
        weight = net.groups.last_layer.weight[c].tolist()
    rows = [(w * n, w * (v - n), k) for w, v, n, k in zip(weight, value, nothing, owner) if k != c]
    assert found["constant"] == pytest.approx(sum(row[0] for row in rows), rel=1e-4, abs=1e-5)
    assert found["others"] == pytest.approx(sum(row[1] for row in rows), rel=1e-3, abs=1e-2)
    lowest = [row for row in sorted(rows, key=lambda row: row[1])[:3] if row[1] < 0]
    assert [part["contribution"] for part in found["against"]] == pytest.approx(
        [row[1] for row in lowest], rel=1e-3, abs=1e-3)
    assert {part["class"] for part in found["against"]} <= {row[2] for row in rows}


@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("method", ["scaleprotoseg", "protoseg"])
def test_contributions_sum_to_the_logit(method, alpha, base, ancestor):
    net, _, _ = load(base.out if method == "scaleprotoseg" else ancestor)
    x = torch.randn(1, 3, 50, 70, generator=torch.Generator().manual_seed(1))
    similarity, slow, activation = slow_logits(net, x, alpha)
    with torch.no_grad():
        s = net.similarity(x)[0]
        logits = net.logits(s[None], alpha)[0]
        if alpha == 0:
            assert torch.equal(logits, net(x)[-1][0][0])
    # float32 leaves 1e-6 in d2, and the similarity's slope is 1 / (d2 + 1e-4), about e^similarity
    assert (np.abs(s.numpy() - similarity) <= 1e-5 + 1e-6 * np.exp(similarity)).all()
    assert np.allclose(logits.numpy(), slow, rtol=1e-3, atol=1e-2)
    for c in range(len(logits)):
        for cell in ((0, 0), (7, 11), (12, 17)):
            found = scaleprotoseg.explain_cell(net, s, c, cell, alpha)
            assert found["logit"] == pytest.approx(float(logits[c][cell]), rel=1e-4, abs=1e-3)
            assert total(found) == pytest.approx(found["logit"], rel=1e-4, abs=1e-3)
            check_others(net, found, c, similarity[(slice(None), *cell)], None if activation is None else
                         activation[(slice(None), slice(None), *cell)])
            for part in found["own"]:
                assert part["contribution"] == pytest.approx(part["weight"] * part["activation"], rel=1e-5)
                if method == "protoseg":
                    p = part["prototype"]
                    assert net.prototype_class[p] == c
                    assert part["activation"] == pytest.approx(similarity[(p, *cell)], abs=1e-3)
                    continue
                assert part["activation"] == pytest.approx(activation[c, part["group"]][cell], rel=1e-3)
                if part["members"]:
                    exponent = sum(m["weight"] * m["similarity"] for m in part["members"])
                    assert part["activation"] == pytest.approx(math.exp(exponent), rel=1e-4)
                for m in part["members"]:
                    assert net.prototype_class[m["prototype"]] == c and m["weight"] >= alpha
                    assert m["scale"] == net.prototype_scale[m["prototype"]]
            if method == "protoseg":
                own = (net.prototype_class == c).nonzero()[:, 0].tolist()
                assert [part["prototype"] for part in found["own"]] == own
            else:
                assert [part["group"] for part in found["own"]] == [0, 1, 2]


def test_an_explanation_by_hand():
    """Class 0 has groups that speak against it, which are no other class's; class 3 has none."""
    net = grouped_net(WEIGHTS, HEAD)
    s = torch.tensor([2.0, 1.0, 3.0, 0.5, 1.5, 4.0])
    found = scaleprotoseg.explain_cell(net, s[:, None, None], 0, (0, 0), alpha=0.05)
    activation = np.exp([1.92, 1.9, 1.5, 1.47, 4.0, 4.0])               # without 0.04 and 0.02
    own, others = HEAD[0, :2] * activation[:2], HEAD[0, 2:6] * (activation[2:] - 1)
    assert [part["contribution"] for part in found["own"]] == pytest.approx(own.tolist(), rel=1e-5)
    assert [len(part["members"]) for part in found["own"]] == [1, 3]
    assert found["constant"] == pytest.approx(HEAD[0, 2:6].sum(), rel=1e-5)
    assert found["others"] == pytest.approx(others.sum(), rel=1e-5)
    assert found["logit"] == pytest.approx((HEAD[0, :6] * activation).sum(), rel=1e-5)
    assert [part["contribution"] for part in found["against"]] == pytest.approx(sorted(others)[:3], rel=1e-5)
    assert [part["class"] for part in found["against"]] == [2, 2, 1]


def explanation(out, image, *argv):
    """(what --explain wrote as JSON, the path of its picture, what it printed)"""
    for path in (out / "explanations").glob("*"):
        path.unlink()
    printed = done("--out", out, "--explain", image, *argv)
    numbers_file, = (out / "explanations").glob("*.json")
    with Image.open(numbers_file.with_suffix(".png")) as drawn:
        assert drawn.mode == "RGB" and min(drawn.size) > 200
    assert str(numbers_file.with_suffix(".png")) in printed
    return read(numbers_file), numbers_file, printed


def test_explain_takes_the_pixel_and_class_that_are_asked_for(base, pictures):
    image = pictures / "images" / "test" / "2.png"                      # 51 x 37: 13 x 10 cells
    net, _, cfg = load(base.out)
    _, logits, _ = slow_logits(net, transforms.normalise(read_image(image))[None], cfg.threshold)
    for c, name in enumerate(CLASSES):
        strongest = divmod(int(logits[c].argmax()), 13)
        for pixel, cell in (((), strongest), ((50, 36), (9, 12)), ((0, 5), (1, 0))):
            if pixel and name != "kite":
                continue
            asked = ["--pixel", *pixel] if pixel else []
            found, path, printed = explanation(base.out, image, "--class", name, *asked)
            assert path.name == f"2-{name.replace(' ', '-')}.json" and found["class"] == name
            assert found["logit"] == pytest.approx(logits[c][cell], rel=1e-3, abs=1e-2)
            assert found["predicted"] == CLASSES[logits[:, cell[0], cell[1]].argmax()]
            assert (found["y"] * 10 // 37, found["x"] * 13 // 51) == cell
            assert total(found) == pytest.approx(found["logit"], rel=1e-4, abs=1e-3)
            assert all(part["class"] in set(CLASSES) - {name} for part in found["against"])
            assert f"{name} at x {found['x']}, y {found['y']}" in printed


def test_explain_chooses_the_class_that_fills_the_picture_or_of_the_pixel(base, pictures):
    image = pictures / "images" / "test" / "3.png"
    net, _, cfg = load(base.out)
    _, logits, _ = slow_logits(net, transforms.normalise(read_image(image))[None], cfg.threshold)
    predicted = logits.argmax(0)
    most = Counter(predicted.flatten().tolist()).most_common(1)[0][0]
    assert explanation(base.out, image)[0]["class"] == CLASSES[most]
    found, _, _ = explanation(base.out, image, "--pixel", 2, 36)
    assert found["class"] == found["predicted"] == CLASSES[predicted[9, 0]]


def test_explain_a_run_of_protoseg(ancestor, pictures):
    net, progress, _ = load(ancestor)
    name = progress["classes"][int(net.prototype_class[0])]
    image = pictures / "images" / "test" / "2.png"
    found, _, _ = explanation(ancestor, image, "--class", name)
    assert found["class"] == name and "prototype" in found["own"][0]
    lost = next(c for c in range(14) if not (net.prototype_class == c).any())
    found, _, _ = explanation(ancestor, image, "--class", progress["classes"][lost])
    assert found["own"] == [] and found["logit"] == pytest.approx(found["others"])


# ---- use of a trained run ----

@pytest.mark.parametrize("method", ["scaleprotoseg", "protoseg", "deeplab"])
def test_predict_writes_the_argmax_at_the_pictures_own_size(method, base, ancestor, plain, pictures):
    out = dict(scaleprotoseg=base.out, protoseg=ancestor, deeplab=plain)[method]
    done("--out", out, "--predict", pictures / "images" / "test")
    net, _, cfg = load(out)
    assert files(out / "predictions") == {f"{k}{tail}.png" for k in range(5) for tail in ("", "_overlay")}
    for k in range(5):
        image = read_image(pictures / "images" / "test" / f"{k}.png")
        x = transforms.normalise(image)[None]
        if method == "deeplab":
            with torch.no_grad():
                logits = sum(conv(net.backbone(x)) for conv in net.aspp)[0].double().numpy()
        else:
            logits = slow_logits(net, x, cfg.threshold)[1]
        grown = F.interpolate(torch.from_numpy(logits)[None], image.shape[1:], mode="bilinear",
                              align_corners=False)
        with Image.open(out / "predictions" / f"{k}.png") as ids:
            assert ids.mode == "P" and ids.size == image.shape[:0:-1]
            assert (np.asarray(ids) == grown.argmax(1)[0].numpy()).mean() > 0.995     # float32 at the borders
        with Image.open(out / "predictions" / f"{k}_overlay.png") as overlay:
            assert overlay.size == image.shape[:0:-1] and overlay.mode == "RGB"


@pytest.mark.parametrize("method", ["scaleprotoseg", "protoseg", "deeplab"])
def test_eval_only_repeats_the_metrics(method, toy, ancestor, plain, no_figures):
    out = dict(scaleprotoseg=toy, protoseg=ancestor, deeplab=plain)[method]
    before = read(out / "metrics.json")
    done("--out", out, "--eval-only")
    after = read(out / "metrics.json")
    assert numbers(after) == numbers(before) and after["seconds"] == before["seconds"]


def test_eval_only_on_another_split(toy, tmp_path, no_figures):
    for name in ("config.json", "last.pt"):
        (tmp_path / name).write_bytes((toy / name).read_bytes())
    done("--out", tmp_path, "--eval-only", "--test-split", "val", "--equivariance", 0)
    metrics = read(tmp_path / "metrics.json")
    assert metrics["split"] == "val" and "equivariance" not in metrics
    last = list(csv.DictReader(open(toy / "log.csv")))[-1]              # was evaluated on val as well
    assert metrics["miou"] == pytest.approx(float(last["val_miou"]))


def test_a_split_that_is_void_all_over_is_one_sentence(base, tmp_path, no_figures):
    data = make_pictures(tmp_path / "data")
    for path in (data / "masks" / "test").iterdir():
        with Image.open(path) as mask:
            Image.new("L", mask.size, 255).save(path)
    assert "--test-split" in mistake("--out", base.out, "--eval-only", "--data", data)


def test_failure_finds_the_pictures_in_which_a_class_is_missed_or_invented(base, pictures):
    done("--out", base.out, "--predict", pictures / "images" / "test")
    for name in ("sky", "ghost"):
        c, expected = CLASSES.index(name), []
        for k in range(5):
            mask = np.asarray(Image.open(pictures / "masks" / "test" / f"{k}.png"))
            said = np.asarray(Image.open(base.out / "predictions" / f"{k}.png"))
            own, known = mask == c, mask != 255
            if own.any():
                iou = (own & (said == c)).sum() / (own | (said == c) & known).sum()
                wrong = Counter(said[own & (said != c)].tolist() + mask[~own & known & (said == c)].tolist())
                if iou < 0.9:
                    expected.append((k, iou, sum(wrong.values()), wrong))
        for path in (base.out / "failures").glob("*"):
            path.unlink()
        cfg = replace(run.read_config(scaleprotoseg.Config, base.out), failure=name, failure_iou=0.9)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            found = scaleprotoseg.main(cfg)
        assert expected and sorted(row["image"] for row in found) == [k for k, *_ in expected]
        assert [row["wrong"] for row in found] == sorted((row[2] for row in expected), reverse=True)
        for row in found:
            _, iou, count, wrong = next(e for e in expected if e[0] == row["image"])
            assert row["iou"] == pytest.approx(iou, abs=1e-6) and row["wrong"] == count
            assert wrong[row["confused_with"]] == max(wrong.values())
        assert_pictures(base.out / "failures", {f"{name}-{n}.png" for n in range(1, min(3, len(found)) + 1)})
        assert f"confused with {CLASSES[found[0]['confused_with']]}" in printed.getvalue()


def test_failure_of_protoseg_and_of_a_class_that_is_not_missed(ancestor, base):
    assert "IoU" in done("--out", ancestor, "--failure", "grass", "--failure-iou", 1)
    assert any(name.startswith("grass") for name in files(ancestor / "failures"))
    printed = done("--out", base.out, "--failure", "kite", "--failure-iou", 1)
    assert "no test image with kite" in printed


def test_stage_1_of_another_run_is_taken_over(base, pictures, tmp_path):
    flags = dict(w_entropy=3.0, group_joint=8)
    with watching() as found:
        metrics = train(config(tmp_path, pictures, stage1=str(base.out), **flags))
    assert {step for step, _ in found.weights} == {"group_warmup", "group_joint"}
    first = read(base.out / "metrics.json")
    for name in STAGE_1 - {"prototypes", "mean_abs_weight", "extra_parameters"}:
        assert metrics[name] == first[name], name
    a, b = (run.read_checkpoint(out / "last.pt")["model"] for out in (tmp_path, base.out))
    changed = {name for name in a if not torch.equal(a[name], b[name])}
    assert changed == {"groups.weights", "groups.last_layer.weight"}
    rows = list(csv.DictReader(open(tmp_path / "log.csv")))
    phases = [row["phase"] for row in rows]
    assert phases[:8] == ["warmup"] * 2 + ["joint"] * 2 + ["project"] + ["finetune"] * 2 + ["group_warmup"]


def test_the_same_stage_2_after_a_stage_1_that_was_taken_over(base, pictures, tmp_path):
    train(config(tmp_path, pictures, stage1=str(base.out)))
    assert numbers(read(tmp_path / "metrics.json")) == numbers(read(base.out / "metrics.json"))
    a, b = (run.read_checkpoint(out / "last.pt")["model"] for out in (tmp_path, base.out))
    assert same(a, b)


def test_resume_of_a_run_that_took_over_its_stage_1(base, pictures, tmp_path, no_figures):
    interrupt("group_joint", 4, "--out", tmp_path, *on(pictures),
              "--stage1", base.out)
    done("--out", tmp_path, "--resume")
    assert numbers(read(tmp_path / "metrics.json")) == numbers(read(base.out / "metrics.json"))


def test_another_threshold_needs_no_other_run(base, tmp_path, no_figures):
    for name in ("config.json", "last.pt"):
        (tmp_path / name).write_bytes((base.out / name).read_bytes())
    done("--out", tmp_path, "--eval-only", "--threshold", 0.3)
    before, after = read(base.out / "metrics.json"), read(tmp_path / "metrics.json")
    net, _, cfg = load(base.out)
    assert after["stage2"] == before["stage2"] and after["threshold"] == 0.3
    expected = measures.sparsity(net, replace(cfg, threshold=0.3))
    assert {name: after[name] for name in expected} == expected
    assert after["group_average"] < before["group_average"]


def test_a_threshold_above_all_weights_still_ends_in_a_report(base, tmp_path):
    (tmp_path / "config.json").write_bytes((base.out / "config.json").read_bytes())
    saved = run.read_checkpoint(base.out / "last.pt")
    saved["model"]["groups.weights"].clamp_(max=0.5)
    torch.save(saved, tmp_path / "last.pt")
    done("--out", tmp_path, "--eval-only", "--threshold", 0.6)
    metrics = read(tmp_path / "metrics.json")
    assert metrics["prototypes"] == 0 and metrics["group_average"] == 0


def test_a_run_without_steps_in_stage_2_can_be_evaluated_again(pictures, tmp_path, no_figures):
    train(config(tmp_path, pictures, **{**ONE_EACH, "group_warmup": 0, "group_joint": 0}))
    before = read(tmp_path / "metrics.json")
    done("--out", tmp_path, "--eval-only")
    assert numbers(read(tmp_path / "metrics.json")) == numbers(before)


def test_steps_of_no_iterations_are_passed_over(pictures, tmp_path, no_figures):
    """As in the preset em, which has no warm-up, and a U-Net."""
    unet = dict(backbone="unet", unet_width=4, output_stride=8, batch_size=2)
    none = dict(warmup=0, finetune=0, group_warmup=0)
    metrics = train(config(tmp_path, pictures, **{**ONE_EACH, **none, **unet}))
    phases = [row["phase"] for row in csv.DictReader(open(tmp_path / "log.csv"))]
    assert phases == ["joint", "project", "group_joint"]
    assert metrics["stage1_projected"] == metrics["stage1_finetuned"]
    before = read(tmp_path / "metrics.json")
    done("--out", tmp_path, "--eval-only")
    assert numbers(read(tmp_path / "metrics.json")) == numbers(before)


# ---- tables ----

def table(out, number, data, **flags):
    """(text of tableN.md, {step: training iterations})"""
    with watching() as found:
        train(config(out, data, table=number, **{**ONE_EACH, **flags}))
    return (out / f"table{number}.md").read_text(), Counter(step for step, _ in found.weights)


def rows_of(text):
    """First cell -> the other cells, of the rows under the header of a markdown table."""
    lines = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines[2:]}


@pytest.fixture(scope="module")
def tables(pictures, tmp_path_factory):
    """Tables 8, 7, 9, 10 and 5 in one folder: number -> (text, iterations trained for it)."""
    out = tmp_path_factory.mktemp("tables")
    return out, {number: table(out, number, pictures) for number in (8, 7, 9, 10, 5)}


def test_tables_share_rows_and_train_stage_1_once(tables):
    out, found = tables
    extra = 4                                                           # announcing the time takes four more
    assert found[8][1] == dict(warmup=1, joint=1 + extra, finetune=1, group_warmup=2, group_joint=2)
    assert found[7][1] == found[9][1] == {}
    assert found[10][1] == dict(warmup=1, joint=1 + extra, finetune=1)  # protoseg
    assert found[5][1] == dict(warmup=1, joint=1 + extra)               # deeplab
    names = {path.name for path in (out / "rows").iterdir()}
    assert names == {"scaleprotoseg", "entropy-off", "protoseg", "deeplab"}
    on, off = (read(out / "rows" / name / "metrics.json") for name in ("scaleprotoseg", "entropy-off"))
    assert on["stage1_finetuned"] == off["stage1_finetuned"]
    assert read(out / "rows" / "entropy-off" / "config.json")["w_entropy"] == 0
    with Image.open(out / "entropy.png") as drawn:                      # Fig. 6
        assert drawn.mode == "RGB" and min(drawn.size) > 200


def test_tables_have_a_row_each_with_the_papers_numbers_beside_ours(tables):
    out, found = tables
    on, off, ancestor = (read(out / "rows" / name / "metrics.json")
                         for name in ("scaleprotoseg", "entropy-off", "protoseg"))
    eight, seven, nine, ten = (rows_of(found[number][0]) for number in (8, 7, 9, 10))
    for rows, names in ((eight, ["off", "on"]), (seven, ["0.0", "0.05", "0.1"]), (nine, ["off", "on"]),
                        (ten, ["protoseg", "scaleprotoseg"])):
        assert list(rows) == names
    for name, metrics in (("on", on), ("off", off)):
        assert eight[name][:3] == [str(metrics["prototypes"]), f"{metrics['group_average']:.2f}",
                                   f"{metrics['miou']:.2f}"]
        assert float(nine[name][0]) == pytest.approx(metrics["group_overlap"], abs=0.01)
    assert eight["on"][3:] == ["131 / 3.70 / 72.26", "111 / 3.39 / 69.22", "1132 / 4.08 / 34.32"]
    assert nine["off"][1:] == ["47.45", "61.65", "50.25"]
    assert seven["0.05"][:3] == eight["on"][:3]                         # alpha of the run
    assert seven["0.1"][3:] == ["126 / 3.21 / 72.12", "109 / 3.10 / 69.03", "1067 / 3.48 / 34.16"]
    assert ten["protoseg"][1] == str(ancestor["extra_parameters"])
    assert ten["protoseg"][3] == "0.527 / 12100 / 20.70"
    net, _, cfg = load(out / "rows" / "scaleprotoseg")
    for alpha in (0.0, 0.1):
        expected = measures.sparsity(net, replace(cfg, threshold=alpha))
        assert seven[str(alpha)][:2] == [str(expected["prototypes"]), f"{expected['group_average']:.2f}"]


def test_table_5_compares_the_three_methods(tables):
    out, found = tables
    rows = rows_of(found[5][0])
    assert list(rows) == ["deeplab", "protoseg", "scaleprotoseg"]
    for name, row in rows.items():
        metrics = read(out / "rows" / name / "metrics.json")
        assert row == [f"{metrics['miou']:.2f}", "-"] and metrics["method"] == name


def test_table_5_of_the_em_images_has_both_cuts(tmp_path, monkeypatch):
    rows = {}

    def row(train, cfg, *rest):
        rows[Path(cfg.out).name] = cfg
        return dict(miou=10.0 + len(rows))

    monkeypatch.setattr(tables_module, "finished_row", row)
    done("--preset", "em", "--data", "unread", "--out", tmp_path, "--table", 5, "--device", "cpu")
    text = rows_of((tmp_path / "table5.md").read_text())
    assert {name: cells for name, cells in text.items()} == {
        "deeplab 1": ["11.00", "-"], "deeplab 2": ["12.00", "-"], "protoseg 1": ["13.00", "77.63"],
        "protoseg 2": ["14.00", "78.92"], "scaleprotoseg 1": ["15.00", "77.97"],
        "scaleprotoseg 2": ["16.00", "79.29"]}
    for name, cfg in rows.items():
        method, cut = name.split("-")
        assert (cfg.method, cfg.table, cfg.joint) == (method, 0, 10000)
        assert cfg.train_split == f"train-{cut}" and cfg.val_split == cfg.test_split == f"val-{cut}"


# ---- measures on hand-made networks ----

class Shades:
    """A data set whose picture i has the grey value 20 i; masks: N tensors (H,W)."""
    name, split, classes = "shades", "test", ("a", "b", "c", "d")

    def __init__(self, masks):
        self.masks, self.num_classes = masks, len(self.classes)

    def __len__(self):
        return len(self.masks)

    def read(self, i):
        return torch.full((3, *self.masks[i].shape), 20 * i, dtype=torch.uint8), self.masks[i].to(torch.uint8)

    def read_mask(self, i):
        return self.masks[i].to(torch.uint8)


class Parts:
    """points: {image: rows of class, part, x, y}; maps: {image: part map (H,W)}."""

    def __init__(self, classes=(), num_parts=3, points=None, maps=None):
        self.classes, self.num_parts, self.points, self.maps = classes, num_parts, points, maps

    def has(self, i):
        return i in (self.points if self.maps is None else self.maps)

    def keypoints(self, i):
        return torch.tensor(self.points[i], dtype=torch.float32).reshape(-1, 4)

    def part_map(self, i):
        return None if self.maps is None else self.maps[i].to(torch.uint8)


def seen_as(net, clean, noisy=None):
    """net.similarity returns clean[i] (P,h,w) for picture i of Shades, noisy[i] if noise lies on it."""
    noisy = clean if noisy is None else noisy

    def similarity(x):
        i = round(denormalise(x[0].mean((1, 2), keepdim=True)).float().mean().item() / 20)
        return (noisy if x.std((2, 3)).max() > 0.05 else clean)[i][None]

    net.similarity = similarity
    return net


PART_CELLS = {1: (0, 1), 2: (2, 3), 3: (3, 0)}                          # row, column; 2 x 2 pixels each


def lit(parts_of_prototype):
    """(P,4,5): each prototype is 5 on the cells of its parts, 0 elsewhere."""
    maps = torch.zeros(len(parts_of_prototype), 4, 5)
    for p, parts in enumerate(parts_of_prototype):
        for q in parts:
            maps[(p, *PART_CELLS[q])] = 5
    return maps


def street():
    """Five pictures 8 x 10 of class 0 with parts, and a sixth without labels; class 1 has no parts."""
    masks = [torch.zeros(8, 10, dtype=torch.int64) for _ in range(6)]
    for mask in masks:
        mask[:2, 6:], mask[:2, 5:6] = 1, 255
    points = {i: [(0, 1, 3, 1), (0, 2, 7, 4)] + [(0, 3, 0, 7)] * (i < 3) for i in range(5)}
    maps = [lit([[1], [2] if i < 4 else [], [3] if i < 3 else [], [1]]) for i in range(5)]
    return Shades(masks), Parts((0, 2), points=points), [*maps, lit([[], [], [], []])]


CLASS_OF = [0, 0, 0, 1]                                                 # p3 is on a part of another class


def test_consistency_and_stability_by_hand():
    """p0 is on part 1 in 5 of 5 pictures, p1 on part 2 in 4 of 5, which is not more than 80 %, p2 on part 3
    in all 3 that have it. Under noise p0 loses its part in picture 1, p2 gains one in picture 4."""
    data, parts, maps = street()
    noisy = list(maps)
    noisy[1], noisy[4] = lit([[], [2], [3], [1]]), lit([[1], [], [2], [1]])
    net, cfg = seen_as(stub_net(torch.rand(4, 5), CLASS_OF, [0] * 4, 4), maps, noisy), config("unused")
    found = measures.part_scores(net, data, parts, cfg, CPU)
    assert found["consistency"] == pytest.approx(200 / 3, abs=1e-4)
    assert found["stability"] == pytest.approx(100 * 13 / 15, abs=1e-4)
    for by_quantile in (found["consistency_by_quantile"], found["stability_by_quantile"]):
        assert list(by_quantile) == ["0.7", "0.8", "0.9"] and len(set(by_quantile.values())) == 1


def test_consistency_counts_the_prototypes_in_use():
    data, parts, maps = street()
    weights = torch.tensor([[[0.5, 0.0, 0.5]], [[1.0, 0.0, 0.0]], [[0.0] * 3], [[0.0] * 3]])  # p1 in no group
    net = seen_as(grouped_net(weights, np.ones((4, 4)), cls=CLASS_OF), maps)
    found = measures.part_scores(net, data, parts, config("unused"), CPU)
    assert found["consistency"] == 100 and found["stability"] == 100
    net.groups.weights.data[0, 0] = torch.tensor([0.02, 0.98, 0.0])    # p0 falls to the threshold
    found = measures.part_scores(net, data, parts, config("unused"), CPU)
    assert found["consistency"] == 0


def test_consistency_of_several_quantiles():
    """A prototype that is on for a fifth of the class and brightest there where no part is."""
    data, parts, _ = street()
    grown = torch.zeros(1, 4, 5)
    grown[0, 0, :2], grown[0, 3, 3:] = torch.tensor([3.0, 2.0]), 3.0    # part 1 at (0,1): not the brightest
    net = seen_as(stub_net(torch.rand(1, 5), [0], [0], 4), [grown] * 6)
    found = measures.part_scores(net, data, parts, config("unused", quantiles=["0.5", "0.9"]), CPU)
    assert found["consistency_by_quantile"] == {"0.5": 100, "0.9": 0} and found["consistency"] == 50


def test_no_parts_no_scores():
    data, _, maps = street()
    net = seen_as(stub_net(torch.rand(4, 5), CLASS_OF, [0] * 4, 4), maps)
    for parts in (Parts((0,), points={}), Parts((0,), points={0: [], 1: []}),
                  Parts((2,), points={0: [(2, 1, 1, 1)]})):
        found = measures.part_scores(net, data, parts, config("unused"), CPU)
        assert found == dict(consistency=None, stability=None)
    assert measures.part_purity(net, data, Parts((0,), points={0: []}), config("unused"), CPU) == {}


def test_purity_by_hand():
    """p0 is highest at part 1, 1, 2, 1 of its class, with similarity 4, 3, 2, 1; p1 outside of its class."""
    masks = [torch.zeros(4, 4, dtype=torch.int64) for _ in range(4)]
    part_map = torch.tensor([[1, 1, 2, 2], [1, 1, 2, 2], [1, 1, 3, 3], [0, 0, 0, 0]])
    maps = []
    for i, (row, column) in enumerate([(0, 0), (1, 1), (0, 3), (2, 0)]):
        masks[i][3] = 1
        s = torch.zeros(2, 4, 4)
        s[0, row, column], s[0, 3, 3], s[1, 3, i], s[1, 0, 0] = 4 - i, 9, 1, 9           # 9: not its class
        maps.append(s)
    net = seen_as(stub_net(torch.rand(2, 5), [0, 1], [0, 0], 4), maps)
    parts, cfg = Parts((0,), maps={i: part_map for i in range(4)}), config("unused")
    for most, expected in ((10, 75), (3, 200 / 3), (2, 100)):
        found = measures.part_purity(net, Shades(masks), parts, cfg, CPU, most)
        assert found["purity"] == pytest.approx(expected, abs=1e-4)
        assert found["largest_part"] == pytest.approx(100 * 6 / 12, abs=1e-4)        # part 1 of class 0
    bare = Parts((0,), maps={i: part_map * (part_map != 1) for i in range(4)})           # 1 becomes "no part"
    found = measures.part_purity(net, Shades(masks), bare, cfg, CPU)
    assert found["purity"] == 25 and found["largest_part"] == pytest.approx(100 * 4 / 12)
    masks[3][:] = 2                                                     # a picture without the class
    found = measures.part_purity(net, Shades(masks), parts, cfg, CPU)
    assert found["purity"] == pytest.approx(200 / 3, abs=1e-4)


def ramps(net, maps_of):
    """net.similarity returns, for an image w wide, the maps that maps_of(w) names, on cells of 4 pixels: a
    ramp to the "right", "left", "up" or "down"."""
    def similarity(x):
        h, w = x.shape[2] // 4, x.shape[3] // 4
        right, down = torch.arange(w).expand(h, w).float(), torch.arange(h)[:, None].expand(h, w).float()
        kinds = dict(right=right, left=-right, down=down, up=-down)
        return torch.stack([kinds[name] for name in maps_of(x.shape[3])])[None]

    net.similarity = similarity
    return net


@pytest.mark.parametrize("rates, half", [(["1", "2"], 80), (["6", "12"], 80), (["1", "4"], 40)])
def test_equivariant_prototypes_light_up_alike_when_the_picture_makes_up_for_their_rates(rates, half):
    """p0 of scale 0 looks at the picture shrunk by the rate of scale 1, and p1, p2 of scale 1 at the picture
    as it is. p3 belongs to another class."""
    net, cfg = stub_net(torch.rand(4, 5), [0, 0, 0, 1], [0, 1, 1, 1], 4), config("unused", rates=rates)
    net.start_groups(3)
    mask = torch.zeros(80, 160, dtype=torch.int64)
    mask[:, :20] = 255                                                  # the quantiles are over the class
    small, whole = ["right", "up", "up", "up"], ["down", "right", "left", "right"]
    net = ramps(net, lambda w: small if w == half else whole)
    found = scaleprotoseg.equivariance(net, Shades([mask] * 2), cfg, CPU)
    assert set(found) == {"0.6", "0.7"}
    for entry in found.values():
        assert [pair[:2] for pair in entry["pairs"]] == [(0, 1)] and entry["pairs"][0][2] == pytest.approx(1)
        assert entry["groups"] == 1 and entry["groups_to_learned_groups"] == pytest.approx(100 / 6)
        assert entry["prototypes_in_groups"] == 50 and entry["classes_with_groups"] == 50


def test_equivariance_is_a_mean_over_the_pictures_of_the_class():
    """p1 agrees in two of three pictures of the class, p2 in one; a fourth is of another class."""
    net, cfg = stub_net(torch.rand(3, 5), [0, 0, 0], [0, 1, 1], 4), config("unused", rates=["1", "2"])
    net.start_groups(2)
    masks = [torch.full((80, 160), c) for c in (0, 0, 0, 1)]
    turn = iter(["right", "right", "left", "left"])
    now = SimpleNamespace(name=None)

    def maps_of(width):
        if width == 160:                                                # each picture comes first as it is
            now.name = next(turn)
            return ["down", now.name, "left" if now.name == "right" else "right"]
        return ["right", "up", "up"]

    found = scaleprotoseg.equivariance(ramps(net, maps_of), Shades(masks), cfg, CPU)
    pairs = found["0.7"]["pairs"]
    assert [pair[:2] for pair in pairs] == [(0, 1)] and pairs[0][2] == pytest.approx(2 / 3, abs=1e-5)


def test_equivariance_looks_at_so_many_pictures_evenly_spaced_and_at_objects_of_ten_cells():
    net, seen = stub_net(torch.rand(2, 5), [0, 0], [0, 1], 4), []
    net.start_groups(2)
    masks = [torch.full((80, 160), 1) for _ in range(7)]
    for i in (1, 2, 4):                                                 # of pictures 0, 2, 4: 9 cells and 10
        masks[i][8:20, 8:20] = 0
    masks[4][20:24, 8:12] = 0
    net = ramps(net, lambda w: ["right", "right"])
    similarity = net.similarity
    net.similarity = lambda x: seen.append(x) or similarity(x)
    cfg = config("unused", rates=["1", "2"], equivariance=3)
    for least_cells, pairs in ((10, 1), (11, 0)):
        found = scaleprotoseg.equivariance(net, Shades(masks), cfg, CPU, least_cells=least_cells)
        assert len(found["0.6"]["pairs"]) == pairs
    shades = [round(denormalise(x[0]).float().mean().item() / 20) for x in seen]
    assert shades == [0, 0, 2, 2, 4, 4] * 2                             # each in two sizes


def test_pairs_that_share_a_prototype_merge_into_groups():
    cls = [0, 0, 0, 0, 0, 0, 1, 1, 2, 2]
    net = stub_net(torch.rand(10, 5), cls, [0, 0, 1, 1, 2, 2, 0, 1, 0, 1], 4)
    iou = torch.zeros(10, 10)
    for i, j in ((1, 3), (3, 5), (0, 2), (0, 5), (6, 7)):               # 1-3-5-0-2 and 6-7
        iou[i, j] = 0.75
    iou[8, 9] = 0.5                                                     # not above
    iou[3, 5] = 0.875
    net.start_groups(3)
    found = measures.equivariance_ratios(net, iou, 0.5)
    assert found["pairs"][0] == (3, 5, 0.875)                           # the best first
    assert sorted(pair[:2] for pair in found["pairs"]) == [(0, 2), (0, 5), (1, 3), (3, 5), (6, 7)]
    assert found["groups"] == 2 and found["groups_to_learned_groups"] == pytest.approx(100 * 2 / 9)
    assert found["prototypes_in_groups"] == 70 and found["classes_with_groups"] == pytest.approx(200 / 3)


def test_overlap_of_groups_is_one_ratio_over_all_pictures():
    """Two groups of class 0: the same map in picture 0, and apart in picture 1; class 1 is in no picture."""
    masks = [torch.zeros(10, 40, dtype=torch.int64) for _ in range(2)]
    masks[1][:, 30:] = 255
    weights = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]])
    net = grouped_net(weights, np.ones((2, 4)), cls=[0, 0, 1, 1], num_classes=2)
    right = torch.arange(400).view(10, 40) / 100
    net = seen_as(net, [torch.stack([right] * 4), torch.stack([right, -right, right, right]) + 4])
    found = measures.mean_overlap(net, Shades(masks), config("unused"), CPU)
    assert found == pytest.approx(100 * 20 / (20 + 40))                 # 5 % of 400 pixels are active


def test_groups_that_the_threshold_emptied_overlap_nowhere():
    """Their activation is 1 everywhere, above no quantile of its own, also after resizing."""
    net = grouped_net(torch.full((2, 2, 2), 0.5), np.ones((2, 4)), cls=[0, 0, 1, 1], num_classes=2)
    net = seen_as(net, [torch.rand(4, 10, 13)] * 2)
    masks = [torch.zeros(37, 51, dtype=torch.int64)] * 2
    assert not measures.mean_overlap(net, Shades(masks), config("unused", threshold=0.6), CPU)


def test_images_per_second_is_the_inverse_of_the_median_time(monkeypatch):
    net, cfg = small_net("group_joint", num_classes=14)
    rate = measures.images_per_second(net, datasets.open_dataset("toy_scenes", "", "val"), cfg, CPU)
    assert 0.1 < rate < 10_000 and not net.training
    seconds = {(1, 128, 128): 0.25}                                     # of a call that ends in labels
    monkeypatch.setattr(speed, "measured_speed", lambda step, *args, **kwargs: seconds[tuple(step().shape)])
    assert measures.images_per_second(net, datasets.open_dataset("toy_scenes", "", "val"), cfg, CPU) == 4


# ---- part files ----

@pytest.fixture(scope="module")
def town(tmp_path_factory):
    """(Cityscapes with two pictures to train on and two to test, its part labels, a run without parts)"""
    root, rng = tmp_path_factory.mktemp("town"), np.random.default_rng(0)
    for split in ("train", "val"):
        for k in range(2):
            label = np.full((24, 40), 7, np.uint8)
            label[4:16, 6:30], label[:3] = 26, 1                        # road, a car, void
            ids = np.where(label == 26, 2600001 + (np.arange(40) > 11), label).astype(np.int32)
            image = rng.integers(0, 255, (24, 40, 3), dtype=np.uint8)
            for folder, tail, pixels in (("leftImg8bit", "_leftImg8bit.png", image),
                                         ("gtFine", "_gtFine_labelIds.png", label),
                                         ("parts", "_gtFinePanopticParts.tif", ids)):
                path = root / folder / split / "town" / f"town_{k}{tail}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    cfg = config(root / "out", root, dataset="cityscapes", test_split="val", prototypes=2, **ONE_EACH)
    assert "consistency" not in train(cfg)
    return root


def test_part_files_bring_consistency_stability_and_purity(town, no_figures):
    done("--out", town / "out", "--eval-only", "--parts", town / "parts" / "val")
    metrics = read(town / "out" / "metrics.json")
    assert PARTS <= set(metrics)
    assert 0 <= metrics["consistency"] <= 100 and metrics["purity"] >= 50
    assert metrics["largest_part"] == pytest.approx(100 * 4 / 6)      # columns of the car, at stride 4


def test_part_files_of_the_wrong_size_are_one_sentence(town, tmp_path, no_figures):
    for k in range(2):
        path = tmp_path / "parts" / "val" / f"town_{k}_gtFinePanopticParts.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((25, 40), 2600001, np.int32)).save(path)
    said = mistake("--out", town / "out", "--eval-only", "--parts", tmp_path / "parts")
    assert "town_0_gtFinePanopticParts.tif" in said and "40 x 25" in said and "40 x 24" in said


# ---- mistakes ----

BELOW = """crop batch-size depth prototypes protoseg-prototypes groups lr backbone-lr finetune-lr group-lr
           unet-width eval-every save-every scale-min""".split()
NEGATIVE = """micro-batch test-size warmup joint finetune group-warmup group-joint workers weight-decay
              w-diversity w-l1 w-l1-group w-entropy equivariance""".split()
QUICK = flags_of({**TINY, **ONE_EACH})


@pytest.mark.parametrize("argv, words", [
    *[([f"--{name}", 0], [f"--{name} 0", "above 0"]) for name in BELOW],
    *[([f"--{name}", -1], [f"--{name} -1", "0 or more"]) for name in NEGATIVE],
    (["--scale-min", 1.5, "--scale-max", 0.5], ["--scale-max 0.5", "--scale-min 1.5"]),
    (["--threshold", 1], ["--threshold 1.0"]), (["--threshold", -0.1], ["--threshold -0.1"]),
    (["--rates", 2, 1], ["--rates 2 1"]), (["--rates", 1, 1], ["--rates 1 1"]),
    (["--rates", 0, 1], ["--rates 0 1"]),
    (["--rates", 1.5], ["--rates", "1.5", "int"]), (["--rates", "one"], ["--rates", "one"]),
    (["--input-scales", 0], ["--input-scales 0"]), (["--input-scales", "half"], ["--input-scales", "half"]),
    (["--quantiles", 0.5, 1], ["--quantiles 0.5 1"]), (["--quantiles", "most"], ["--quantiles", "most"]),
    (["--explain", "x.png", "--pixel", 3], ["holds no run"]), (["--pixel", 3], ["--pixel 3"]),
    (["--class", "car"], ["--class", "--explain"]), (["--pixel", 3, 4], ["--pixel", "--explain"]),
    (["--stage1", "x", "--method", "protoseg"], ["--stage1", "protoseg"]),
    (["--stage1", "nowhere"], ["nowhere", "holds no run"]),
    (["--table", 6], ["--table"]), (["--method", "deeplab3"], ["deeplab3"]),
    (["--schedule", 0], ["--schedule"]),
    (["--preset", "camvid", "--weights", "none"], ["--data"]),
    (["--preset", "camvid", "--weights", "none", "--data", "nowhere"], ["nowhere"]),
    (["--dataset", "folder"], ["--data"]), (["--data", "somewhere"], ["somewhere", "--dataset folder"]),
    (["--parts", "somewhere"], ["--parts", "toy_scenes"]), (["--test-split", "exam"], ["exam"]),
    (["--project-split", "exam"], ["exam"]), (["--weights", "gone.pth"], ["gone.pth"]),
    (["--output-stride", 3], ["3"]), (["--test-square"], ["--test-square", "--test-size"]),
    *[([f"--{name}", *value], ["holds no run"]) for name, value in (
        ("eval-only", []), ("resume", []), ("predict", ["x.png"]), ("explain", ["x.png"]),
        ("failure", ["car"]))],
])
def test_mistakes_are_one_sentence_before_anything_is_written(tmp_path, argv, words):
    out = tmp_path / "out"
    said = mistake("--out", out, *QUICK, *argv)
    assert all(word in said for word in words), said
    assert not out.exists()


def test_pixels_are_two_whole_numbers_inside_the_picture(base, pictures):
    image = pictures / "images" / "test" / "2.png"
    for pixel, words in (([3], "--pixel 3"), ([3, 4, 5], "--pixel 3 4 5"), ([1.5, 2], "int"),
                         (["a", "b"], "int"), ([51, 0], "51 x 37"), ([0, 37], "51 x 37"),
                         ([-1, 0], "51 x 37")):
        assert words in mistake("--out", base.out, "--explain", image, "--pixel", *pixel)


def test_a_class_that_the_run_does_not_know_is_one_sentence(base, pictures):
    image = pictures / "images" / "test" / "2.png"
    for argv in (["--explain", image, "--class", "unicorn"], ["--failure", "unicorn"]):
        said = mistake("--out", base.out, *argv)
        assert "unicorn" in said and "tall house" in said


def test_pictures_that_cannot_be_read_are_named(base, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no picture")
    for option in ("--explain", "--predict"):
        assert "broken.png" in mistake("--out", base.out, option, tmp_path / "broken.png")
        assert "gone.png" in mistake("--out", base.out, option, tmp_path / "gone.png")


def test_the_plain_network_cannot_be_explained(plain, pictures):
    for argv in (["--explain", pictures / "images" / "test" / "2.png"], ["--failure", "car"]):
        assert "plain network" in mistake("--out", plain, *argv)


def test_a_run_before_its_projection_is_told_to_go_on(pictures, tmp_path):
    interrupt("joint", 4, "--out", tmp_path, *on(pictures))
    image = pictures / "images" / "test" / "2.png"
    for argv in (["--explain", image], ["--failure", "sky"], ["--eval-only"]):
        assert "--resume" in mistake("--out", tmp_path, *argv)
    assert "stage1.pt" in mistake("--out", tmp_path / "next", *on(pictures), "--stage1", tmp_path)
    assert not (tmp_path / "next").exists()


@pytest.mark.parametrize("flags, words", [
    (dict(depth=7), ["--depth 6", "7"]), (dict(rates=["1", "3"]), ["--rates"]),
    (dict(frozen_bn=True), ["--frozen-bn"]), (dict(input_scales=["0.5"]), ["--input-scales"]),
    (dict(backbone="unet", output_stride=8), ["--backbone tiny"]),
    (dict(output_stride=8), ["--output-stride 4"])])
def test_stage_1_of_another_network_is_refused(base, pictures, tmp_path, flags, words):
    said = mistake("--out", tmp_path / "out", *on(pictures, **ONE_EACH, stage1=base.out, **flags))
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


def test_stage_1_must_come_from_scaleprotoseg_on_the_same_data(base, ancestor, tmp_path):
    for other, words in ((ancestor, "--method protoseg"), (base.out, "--dataset folder")):
        assert words in mistake("--out", tmp_path / "out", *QUICK, "--stage1", other)
    more = make_pictures(tmp_path / "more", CLASSES + ("cloud",))
    said = mistake("--out", tmp_path / "out", *on(more, **ONE_EACH), "--stage1", base.out)
    assert "5 classes" in said and "6" in said
    assert not (tmp_path / "out").exists()


def test_a_run_meets_data_of_other_classes(base, tmp_path, no_figures):
    more = make_pictures(tmp_path / "more", CLASSES + ("cloud",))
    before = read(base.out / "metrics.json")
    for option in (["--resume"], ["--eval-only"], ["--failure", "sky"]):
        assert "5 classes" in mistake("--out", base.out, *option, "--data", more)
    assert read(base.out / "metrics.json") == before


def test_a_new_run_does_not_leave_the_stage_1_of_the_last_one(pictures, tmp_path):
    """--stage1 of a run that was killed early must not find what an earlier run in this folder had left."""
    train(config(tmp_path, pictures, **ONE_EACH))
    interrupt("joint", 3, "--out", tmp_path, *on(pictures), "--seed", 1)
    assert (tmp_path / "previous-1" / "last.pt").exists() and not (tmp_path / "stage1.pt").exists()


def test_checkpoints_and_settings_of_other_scripts_are_refused(base, tmp_path):
    (tmp_path / "config.json").write_bytes((base.out / "config.json").read_bytes())
    run.save_checkpoint(tmp_path / "last.pt", dict(model=nn.Linear(2, 2)), dict(iteration=3, log=[]))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_bytes((base.out / "config.json").read_bytes())
    (tmp_path / "broken" / "last.pt").write_bytes(b"half a file")
    run.write_json(tmp_path / "other" / "config.json", dict(preset="toy", classifier="cbp"))
    for out, words in ((tmp_path, "checkpoint of this script"), (tmp_path / "broken", "cannot be read"),
                       (tmp_path / "other", "config of this script")):
        for option in ("--resume", "--eval-only"):
            assert words in mistake("--out", out, option)


def test_a_batch_must_split_over_the_processes(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = mistake("--out", tmp_path / "out", *QUICK, "--batch-size", 3)
    assert "--batch-size 3" in said and "multiple of 2" in said


def test_settings_that_contradict_the_run_are_refused(base):
    assert "--depth 8 contradicts" in mistake("--out", base.out, "--resume", "--depth", 8)


def test_a_loss_that_is_not_finite_stops_the_run(pictures, tmp_path):
    said = mistake("--out", tmp_path, *on(pictures), "--lr", "1e30")
    assert "not finite" in said and "--lr" in said


# ---- several processes ----

TWO = """
import sys, torch, torch.distributed as dist
import scaleprotoseg
from common import run
step = scaleprotoseg.train_step
def checked(model, net, *rest):
    out = step(model, net, *rest)
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        mine = torch.cat([p.detach().flatten() for p in net.parameters()])
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine)
        assert torch.equal(both[0], both[1]), "weights differ between ranks"
        open(f"{sys.argv[2]}.steps{dist.get_rank()}", "a").write("x")
    return out
scaleprotoseg.train_step = checked
scaleprotoseg.gallery.draw_figures = lambda *args: None
run.run_script(scaleprotoseg.main, scaleprotoseg.Config, scaleprotoseg.PRESETS)
"""


def test_two_processes_train_the_same_weights_and_evaluate_as_one(pictures, tmp_path, no_figures):
    (tmp_path / "two.py").write_text(TWO)
    out, flags = tmp_path / "out", {phase: 2 for phase in ONE_EACH}
    argv = ["--standalone", "--nproc-per-node", 2, tmp_path / "two.py", "--out", out,
            *on(pictures, batch_size=4, micro_batch=1, **flags)]
    ended = subprocess.run([sys.executable, "-m", "torch.distributed.run", *map(str, argv)], cwd=ROOT,
                           capture_output=True, text=True, env=ENV)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert [Path(f"{out}.steps{rank}").read_text() for rank in (0, 1)] == ["x" * 10] * 2
    two = read(out / "metrics.json")
    done("--out", out, "--eval-only")
    one = read(out / "metrics.json")
    assert (two.pop("processes"), one.pop("processes")) == (2, 1) and numbers(one) == numbers(two)
    assert len(run.read_checkpoint(out / "last.pt")["rng"]) == 2


# ---- the file itself ----

SOURCE = (ROOT / "scaleprotoseg.py").read_text(encoding="utf-8")
HEADER, BODY = SOURCE.split('"""', 2)[1:]


def preset(name):
    return run.make_config(scaleprotoseg.Config, scaleprotoseg.PRESETS, name, out="unused")


@pytest.mark.parametrize("name, expected", [
    ("cityscapes", dict(iterations=(3000, 30000, 2000, 2000, 30000), crop=513, scale=(0.5, 1.5), entropy=0.05,
                        l1=(1e-4, 1e-3), sizes=[], prototypes=(3, 10), lr=(2.5e-4, 2.5e-5, 2.5e-4))),
    ("pascal", dict(iterations=(3000, 30000, 6000, 2000, 30000), crop=321, scale=(0.5, 1.5), entropy=0.05,
                    l1=(1e-4, 1e-3), sizes=[0.5, 0.75], prototypes=(3, 10), lr=(2.5e-4, 2.5e-5, 2.5e-4))),
    ("ade20k", dict(iterations=(6000, 60000, 4000, 2000, 30000), crop=512, scale=(0.5, 2.0), entropy=0.25,
                    l1=(1e-5, 1e-4), sizes=[], prototypes=(3, 12), lr=(2.5e-4, 2.5e-5, 2.5e-4))),
    ("cocostuff", dict(iterations=(6000, 100000, 4000, 2000, 30000), crop=321, scale=(0.5, 1.5),
                       entropy=0.25, l1=(1e-5, 1e-4), sizes=[0.5, 0.75], prototypes=(3, 12),
                       lr=(2.5e-4, 2.5e-5, 2.5e-4))),
    ("em", dict(iterations=(0, 10000, 10000, 0, 10000), crop=512, scale=(0.5, 1.5), entropy=0.25,
                l1=(1e-4, 1e-4), sizes=[], prototypes=(3, 10), lr=(1e-4, 1e-4, 5e-5)))])
def test_presets_are_the_papers_recipes(name, expected):
    cfg = preset(name)
    iterations = (cfg.warmup, cfg.joint, cfg.finetune, cfg.group_warmup, cfg.group_joint)
    found = dict(iterations=iterations, crop=cfg.crop, scale=(cfg.scale_min, cfg.scale_max),
                 entropy=cfg.w_entropy, l1=(cfg.w_l1, cfg.w_l1_group), sizes=cfg.input_scales,
                 prototypes=(cfg.prototypes, cfg.protoseg_prototypes),
                 lr=(cfg.lr, cfg.backbone_lr, cfg.group_lr))
    assert found == expected
    assert (cfg.batch_size, cfg.frozen_bn, cfg.backbone) == ((2, False, "unet") if name == "em" else
                                                             (10, True, "resnet101"))
    assert (cfg.groups, cfg.depth, cfg.rates, cfg.w_diversity) == (3, 64, [6, 12, 18, 24], 0.25)
    assert (cfg.threshold, cfg.finetune_lr, cfg.weight_decay) == (0.05, 1e-5, 5e-4)


def test_every_preset_passes_the_checks_and_tests_pictures_in_the_papers_size():
    for name in scaleprotoseg.PRESETS:
        scaleprotoseg.check_config(preset(name))
    sizes = {name: (preset(name).test_size, preset(name).test_square) for name in scaleprotoseg.PRESETS}
    assert sizes["pascal"] == (513, True) and sizes["ade20k"] == (512, False)
    assert sizes["cityscapes"] == sizes["cocostuff"] == (0, False)
    assert (preset("pascal").train_split, preset("pascal").project_split) == ("trainaug", "train")


@pytest.mark.parametrize("name, classes, count", [
    ("cityscapes", 19, 228), ("pascal", 21, 252), ("ade20k", 150, 1800), ("cocostuff", 182, 2184),
    ("em", 2, 24)])
def test_prototypes_at_first_are_the_papers(name, classes, count):
    cfg = preset(name)
    cls, scale = scaleprotoseg.first_prototypes(cfg, classes)
    assert len(cls) == len(scale) == count
    assert all((cls[s * classes * 3 + c * 3 + k], scale[s * classes * 3 + c * 3 + k]) == (c, s)
               for s in range(4) for c in (0, classes - 1) for k in range(3))
    cls, scale = scaleprotoseg.first_prototypes(replace(cfg, method="protoseg"), classes)
    assert len(cls) == classes * (12 if name in ("ade20k", "cocostuff") else 10) and set(scale) == {0}


def test_every_name_of_the_symbol_table_is_in_the_body():
    table = HEADER[HEADER.index("symbol "):HEADER.index("Phases:")]
    names = re.findall(r"^\S+(?: \S+)?  +(\w+(?:\.\w+)?)", table, re.M)[1:]
    assert len(names) >= 10 and all(name.split(".")[-1] in BODY for name in names)


def test_prototypes_losses_groups_and_model_paste_into_a_notebook():
    span = SOURCE[SOURCE.index("# ---- prototypes and pixels"):SOURCE.index("def first_prototypes")]
    names = dict(torch=torch, nn=nn, F=F)
    exec(span, names)
    backbone = nn.Conv2d(3, 7, 3, stride=8, padding=1)
    backbone.channels = 7
    net = names["ScaleProtoSeg"](backbone, 5, [1, 2], False, (), True, [0, 0, 1, 1] * 2, [0] * 4 + [1] * 4, 2)
    x, labels = torch.randn(2, 3, 48, 64), torch.randint(2, (2, 48, 64))
    (logits, d2), = net.train()(x)
    small = names["nearest_label"](labels, logits.shape[2:])
    diversity = names["diversity_loss"](d2, small, net.prototype_class, net.prototype_scale)
    loss = F.cross_entropy(logits, small) + diversity
    loss.backward()
    assert torch.isfinite(loss) and net.prototypes.grad.any()
    net.start_groups(3)
    assert net(x)[0][0].shape == (2, 2, 6, 8)


# ---- GPU ----

@pytest.mark.gpu
@pytest.mark.parametrize("step", ["joint", "group_joint"])
def test_gpu_a_training_step_never_waits_for_the_device(step):
    device = torch.device("cuda")
    net, cfg = small_net(step, device="cuda", micro_batch=2, input_scales=["0.5"])
    net = net.to(device, memory_format=torch.channels_last)
    optimizer, scheduler = scaleprotoseg.build_optimizer(net, step, cfg, device)
    x, labels = torch.randn(4, 3, 48, 48).to(device), torch.randint(3, (4, 48, 48)).to(device)
    net.train()
    for _ in range(3):                                                  # first calls: kernels load
        scaleprotoseg.train_step(net, net, optimizer, scheduler, x, labels, step, cfg)
    torch.cuda.set_sync_debug_mode("error")
    try:
        terms = scaleprotoseg.train_step(net, net, optimizer, scheduler, x, labels, step, cfg)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(v.is_cuda and math.isfinite(v) for v in terms.values())


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["scaleprotoseg", "protoseg", "deeplab"])
def test_gpu_a_run_trains_in_bf16_resumes_and_explains(pictures, tmp_path, method):
    metrics = scaleprotoseg.main(config(tmp_path, pictures, device="cuda", method=method))
    assert metrics["device"].startswith("cuda") and math.isfinite(metrics["miou"])
    done("--out", tmp_path, "--resume")
    if method != "deeplab":
        done("--out", tmp_path, "--explain", pictures / "images" / "test" / "2.png")


@pytest.mark.gpu
def test_gpu_projection_equals_cpu():
    generator = torch.Generator().manual_seed(0)
    features = torch.randint(3, (4, 6, 3, 4), generator=generator) / 2
    masks = [torch.randint(3, (7, 9), generator=generator) for _ in range(4)]
    cls, scale, prototypes = [0, 1, 2, 2], [0, 1, 0, 1], torch.randint(9, (4, 3), generator=generator) / 8
    expected, sources = slow_projection(features, masks, prototypes, cls, scale)
    net = stub_net(prototypes, cls, scale, 3).to("cuda")
    assert project_prototypes(net, loader_of(features, masks), torch.device("cuda")) == sources
    assert np.array_equal(net.prototypes.detach().cpu().numpy(), expected.astype(np.float32))
