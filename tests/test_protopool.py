"""protopool.py as its users meet it: projection, training and its phases, resuming, explanations, mistakes.

The pure functions of the paper's formulas are in test_protopool_equations.py. C classes, K slots a class,
M prototypes of D channels.
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
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

import protopool
from commands import call, flags_of
from common import images, protopool_figures, run, tables, toy_birds
from common.run import UserError
from protopool import ProtoPool, Source, project_prototypes

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
CLASSES = ("ant", "bee", "cat")
both_readings = pytest.mark.parametrize("reading", ["paper", "official"])


def make_folders(root, train=6, test=3, classes=CLASSES):
    """An imagefolder of 32 x 32 pictures: a square in the colour of the class, somewhere on dark noise."""
    for c, name in enumerate(classes):
        for part, count in (("train", train), ("test", test)):
            (root / part / name).mkdir(parents=True)
            for k in range(count):
                rng = np.random.default_rng([c, k, part == "test"])
                pixels = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
                y, x = rng.integers(2, 18, 2)
                pixels[y:y + 12, x:x + 12, c] = 250
                Image.fromarray(pixels).save(root / part / name / f"{k}.png")
    return root


TINY = dict(dataset="imagefolder", device="cpu", size=32, prototypes=8, slots=2, depth=8, batch_size=6,
            passes_per_epoch=1, pretrain_epochs=2, warmup_epochs=2, joint_epochs=2, finetune_epochs=2,
            val_fraction=0.34, workers=0)                      # 12 images to train, 6 to validate, 9 to test

QUICK = dict(pretrain_epochs=0, warmup_epochs=1, joint_epochs=1, finetune_epochs=1)


def config(out, data, **flags):
    """The toy preset with a tiny pool, two steps an epoch."""
    return run.make_config(protopool.Config, protopool.PRESETS, "toy", out=str(out), data=str(data),
                           **{**TINY, **flags})


def script(*argv):
    """`python protopool.py ARGV` in this process: returncode, stdout, stderr."""
    return call(protopool, *argv)


def mistake(*argv):
    """The one sentence that the script must end with, exit code 2."""
    done = script(*argv)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("protopool.py: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def files(path):
    return {str(p.relative_to(path)) for p in Path(path).rglob("*") if p.is_file()}


def numbers(metrics):
    return {k: v for k, v in metrics.items() if k != "seconds"}


def read(path):
    return json.loads(Path(path).read_text())


def same(a, b):
    """Bit for bit, through dicts, lists and tensors; seconds aside."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[k], b[k]) for k in a if k != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a and b != b                                  # nan equals nan


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("data") / "bugs")


@contextlib.contextmanager
def recording():
    """What a run saves and reads: .saved [(file, phase, epoch, weights)], .reads [(stage, split, path)]."""
    found = SimpleNamespace(saved=[], reads=[], stage="train")
    save, one, report = run.save_checkpoint, images.ImageSet.read, protopool.report

    def saving(path, parts, progress):
        weights = copy.deepcopy(parts["model"].state_dict())
        found.saved.append((Path(path).name, progress.get("phase"), progress.get("epoch"), weights))
        return save(path, parts, progress)

    def reading(self, i):
        found.reads.append((found.stage, self.split, str(self.paths[i])))
        return one(self, i)

    def reporting(*args):
        found.stage = "report"
        return report(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "save_checkpoint", saving)
        patch.setattr(images.ImageSet, "read", reading)
        patch.setattr(protopool, "report", reporting)
        yield found


@pytest.fixture(scope="module")
def paper(data, tmp_path_factory):
    """One run of every phase from the command line, watched, read by many tests."""
    out = tmp_path_factory.mktemp("paper")
    with recording() as found:
        done = script("--out", out, "--data", data, *flags_of(TINY))
    assert done.returncode == 0, done.stderr
    found.out, found.done, found.cfg = out, done, config(out, data)
    return found


@pytest.fixture(scope="module")
def official(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("official")
    cfg = config(out, data, reading="official", finetune_epochs=6, seed=3)
    with recording() as found, contextlib.redirect_stdout(io.StringIO()):
        protopool.main(cfg)
    found.out, found.cfg = out, cfg
    return found


@pytest.fixture(scope="module")
def linear(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("linear")
    with contextlib.redirect_stdout(io.StringIO()):
        protopool.main(config(out, data, classifier="linear"))
    return out


# ---- projection: Eq. (3) by loops ----

class Pixels(nn.Module):
    """A backbone that hands its image through."""
    channels = 3

    def forward(self, x):
        return x


def pixel_pool(held, prototypes, slots=2, reading="paper"):
    """ProtoPool whose features are the pixels. held: (C,M) 0/1, at most `slots` ones a row."""
    held, prototypes = torch.as_tensor(held), torch.as_tensor(prototypes, dtype=torch.float32)
    net = ProtoPool(Pixels(), len(held), len(prototypes), slots, 3, reading)
    net.add_on_layers = nn.Identity()
    net.prototypes.data.copy_(prototypes)
    net.q.data.zero_()                                                  # a slot of zeros is empty in `paper`
    for c, row in enumerate(held):
        for k, m in enumerate(row.nonzero().flatten().tolist()):
            net.q.data[c, k, m] = 3
    return net.eval()


def batches_of(x, labels, sizes):
    return list(zip(x.split(sizes), labels.split(sizes)))


def slow_projection(x, labels, held, prototypes, in_loop=False):
    """Loops over images and cells. in_loop moves a prototype as soon as something nearer is found."""
    moved, found = prototypes.numpy().astype(float).copy(), []
    for m in range(len(prototypes)):
        p, best, where = moved[m].copy(), math.inf, (-1, -1, -1)
        for i, image in enumerate(x.numpy().astype(float)):
            for row in range(image.shape[1]):
                for column in range(image.shape[2]):
                    z = image[:, row, column]
                    d2 = ((z - (moved[m] if in_loop else p)) ** 2).sum()
                    if held[labels[i]][m] and d2 < best:
                        best, where, moved[m] = d2, (i, row, column), z
        found.append(Source(*where, best))
    return moved, found


def assert_projected(net, x, labels, sizes, expected):
    sources = project_prototypes(net, batches_of(x, labels, sizes), CPU)
    assert [source[:3] for source in sources] == [source[:3] for source in expected[1]]
    found, wanted = ([source.distance for source in list] for list in (sources, expected[1]))
    assert np.allclose(found, wanted, atol=1e-4)
    assert np.array_equal(net.prototypes.detach().numpy(), expected[0].astype(np.float32))


HELD = [[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0]]           # p1 shared, p4 nobody's, one empty slot


@pytest.mark.parametrize("seed", range(4))
def test_projection_equals_loops_whatever_the_batches(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-4, 5, (7, 3, 2, 3), generator=generator).float()            # whole numbers: many ties
    labels, prototypes = torch.arange(7) % 3, torch.randint(-4, 5, (5, 3), generator=generator).float()
    expected = slow_projection(x, labels, HELD, prototypes)
    for sizes in ([7], [1] * 7, [1, 3, 2, 1], [6, 1]):
        net = pixel_pool(HELD, prototypes)
        assert_projected(net, x, labels, sizes, expected)
        assert expected[1][4] == Source(-1, -1, -1, math.inf)
        assert torch.equal(net.prototypes[4], prototypes[4])            # nobody's: it stays


def test_projection_takes_patches_of_the_classes_that_hold_the_prototype():
    x = torch.full((3, 3, 2, 2), 9.0)
    x[2, :, 1, 0] = 0                                               # exactly p0, but in a picture of class 1
    x[1, :, 0, 1] = 2
    labels = torch.tensor([0, 0, 1])
    net = pixel_pool([[1, 0], [0, 1]], torch.zeros(2, 3), slots=1)
    first, second = project_prototypes(net, batches_of(x, labels, [2, 1]), CPU)
    assert first == (1, 0, 1, 12) and second == (2, 1, 0, 0)
    assert net.prototypes.tolist() == [[2, 2, 2], [0, 0, 0]]


def test_of_equal_patches_the_first_is_taken():
    x = torch.full((4, 3, 2, 2), 5.0)
    x[1, :, 1, 1] = x[1, :, 1, 0] = x[2, :, 0, 0] = 1              # the same distance three times, and again
    x[3, :, 0, 0] = -1                                                  # as far on the other side
    for sizes in ([4], [2, 2], [1, 1, 1, 1], [3, 1]):
        net = pixel_pool([[1]], torch.zeros(1, 3), slots=1)
        found = project_prototypes(net, batches_of(x, torch.zeros(4, dtype=int), sizes), CPU)
        assert found == [(1, 1, 0, 3)]
        assert net.prototypes.tolist() == [[1, 1, 1]]


def test_prototypes_move_after_the_last_image_and_not_inside_the_loop():
    """From 0: 5 is near, -4 is nearer, 7 is far. A prototype that has moved to 5 would prefer 7 to -4."""
    x, labels, start = torch.zeros(3, 3, 1, 1), torch.zeros(3, dtype=int), torch.zeros(1, 3)
    x[:, 0, 0, 0] = torch.tensor([5.0, -4.0, 7.0])
    expected, moving = (slow_projection(x, labels, [[1]], start, in_loop) for in_loop in (False, True))
    assert expected[1] == [(1, 0, 0, 16)] and moving[1] == [(2, 0, 0, 4)]         # the case tells them apart
    for sizes in ([3], [1, 1, 1], [2, 1]):
        assert_projected(pixel_pool([[1]], start, slots=1), x, labels, sizes, expected)


@both_readings
def test_projection_runs_the_network_in_eval_mode_and_makes_a_perfect_match(reading):
    torch.manual_seed(0)
    net = ProtoPool(protopool.build_extractor("tiny"), 3, 8, 2, 8, reading)
    net.q.data *= 20
    x, labels = torch.randn(6, 3, 32, 32), torch.arange(6) % 3
    before = copy.deepcopy(net.train().state_dict())
    sources = project_prototypes(net, batches_of(x, labels, [4, 1, 1]), CPU)
    after = net.state_dict()
    assert [k for k in before if not torch.equal(before[k], after[k])] == ["prototypes"]
    held = net.hard_assignment().amax(1) > 0
    for m, source in enumerate(sources):
        assert (source.image >= 0) == held[:, m].any().item()
        if source.image >= 0:
            assert held[labels[source.image], m]
            z = net.features(x[source.image:source.image + 1])[0, :, source.row, source.column]
            assert torch.allclose(net.prototypes[m], z, atol=1e-5)
            distance = (z - before["prototypes"][m]).square().sum().item()
            assert source.distance == pytest.approx(distance, abs=1e-4)


# ---- the model ----

def small_net(reading="paper", sharp=20, seed=0, **flags):
    """Tiny backbone, 3 classes, 8 prototypes, 2 slots."""
    torch.manual_seed(seed)
    net = ProtoPool(protopool.build_extractor("tiny"), 3, 8, 2, 8, reading, **flags)
    net.q.data *= sharp
    return net


def slow_logits(net, x, assignment):
    """numpy from the features on: distances, similarities, slots, last layer."""
    z, p = (v.detach().double().numpy() for v in (net.features(x), net.prototypes))
    y, w = (v.detach().double().numpy() for v in (assignment, net.last_layer.weight))
    d2 = ((z[:, None] - p[None, :, :, None, None]) ** 2).sum(2)         # (B,M,h,w)

    def log_similarity(d2):
        return np.log((d2 + 1) / (d2 + 1e-4))

    nearest, mean = d2.min((2, 3)), d2.mean((2, 3))
    if net.reading == "official":
        first, second = (log_similarity(np.einsum("bm,ckm->bck", d, y)) for d in (nearest, mean))
    else:
        g = log_similarity(d2)
        first, second = (np.einsum("bm,ckm->bck", v, y) for v in (g.max((2, 3)), g.mean((2, 3))))
    slots = first - second if net.focal else first
    return slots.reshape(len(x), -1) @ w.T, nearest


def test_every_class_starts_with_weight_1_from_its_own_slots():
    net = small_net()
    expected = [[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]
    assert net.own_slots().tolist() == expected == net.last_layer.weight.tolist()
    assert net.last_layer.bias is None
    z = net.features(torch.randn(2, 3, 32, 32))
    assert z.shape == (2, 8, 4, 4) and z.min() > 0 and z.max() < 1


def test_initial_values_of_both_readings():
    """Xavier normal: std sqrt(2 / (fan_in + fan_out)); Kaiming, fan_out, ReLU: sqrt(2 / fan_out)."""
    torch.manual_seed(0)
    paper, official = (ProtoPool(protopool.build_extractor("tiny"), 200, 202, 10, 256, reading)
                       for reading in ("paper", "official"))
    for net in (paper, official):
        assert net.q.std().item() == pytest.approx(math.sqrt(2 / (202 * 10 + 200 * 10)), rel=0.02)
        assert not net.add_on_layers[0].bias.any()
    assert paper.add_on_layers[0].weight.std().item() == pytest.approx(math.sqrt(2 / (48 + 256)), rel=0.03)
    assert official.add_on_layers[0].weight.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.03)
    assert paper.prototypes.std().item() == pytest.approx(math.sqrt(2 / (202 + 256)), rel=0.03)
    assert 0 <= official.prototypes.min() < 0.001 and 0.999 < official.prototypes.max() < 1


@both_readings
@pytest.mark.parametrize("focal", [True, False])
@pytest.mark.parametrize("batch", [1, 5])
def test_logits_of_test_time_are_hard_slots_through_the_last_layer(reading, focal, batch):
    net = small_net(reading, focal=focal).eval()
    net.last_layer.weight.data = torch.randn(3, 6)
    q = net.q.detach().numpy()
    hard = np.zeros_like(q)
    hard[np.arange(3)[:, None], np.arange(2), q.argmax(2)] = 1         # sharp slots: argmax in both readings
    x = torch.randn(batch, 3, 32, 32)
    with torch.no_grad():
        logits, min_d2, y = net(x)
    assert np.array_equal(y.numpy(), hard)
    expected, nearest = slow_logits(net, x, torch.tensor(hard))
    assert np.allclose(logits.numpy(), expected, atol=2e-4)
    assert np.allclose(min_d2.numpy(), nearest, atol=1e-5)


@both_readings
@pytest.mark.parametrize("gumbel", [True, False])
def test_a_training_pass_samples_one_assignment_for_the_whole_batch(reading, gumbel):
    net = small_net(reading, sharp=1, gumbel=gumbel).eval()
    x = torch.randn(1, 3, 32, 32).expand(4, -1, -1, -1)
    with torch.no_grad():
        logits, _, y = net(x, tau=0.01)
        other = net(x, tau=0.01)[2]
    assert y.shape == (3, 2, 8) and torch.allclose(y.sum(-1), torch.ones(3, 2))
    assert torch.allclose(logits, logits[:1].expand(4, -1), atol=1e-5)
    assert np.allclose(logits.numpy(), slow_logits(net, x, y)[0], atol=2e-4)
    assert torch.equal(y, other) == (not gumbel)                        # noise of its own in every pass
    if not gumbel:
        assert torch.equal(y, net.q.softmax(-1))                     # Table 4: plain softmax, no temperature


def test_a_slot_without_a_winner_is_empty_and_adds_nothing():
    net = small_net()
    net.q.data[1] = 0
    net.q.data[2, 0, :2], net.q.data[2, 0, 2:] = 5, 0                   # two winners are none
    hard = net.hard_assignment()
    assert not hard[1].any() and not hard[2, 0].any() and hard.sum() == 3
    logits, _, _ = net.eval()(torch.randn(3, 3, 32, 32))
    assert not logits[:, 1].any() and (logits[:, [0, 2]] > 0).all()
    net.reading = "official"
    assert (net.hard_assignment().sum(2) == 1).all()                    # the code's slots are never empty


@both_readings
def test_fixing_the_slots_keeps_the_logits_and_prunes_the_dead(reading):
    net = small_net(reading).eval()
    if reading == "paper":                                  # a tie of a living and a dead prototype: empty
        used = net.hard_assignment().flatten(0, 1).any(0)
        net.q.data[1, 0] = 0
        net.q.data[1, 0, [int(net.q[0, 0].argmax()), int(used.int().argmin())]] = 5
    x, hard = torch.randn(3, 3, 32, 32), net.hard_assignment()
    assert hard[1, 0].any() == (reading == "official")
    before, alive = net(x)[0], hard.flatten(0, 1).any(0)
    kept = net.prototypes[alive].clone()
    assert net.fix_slots() == int((~alive).sum()) > 0
    assert torch.equal(net.hard_assignment(), hard[..., alive]) and torch.equal(net.prototypes, kept)
    assert torch.equal(net(x)[0], before) or torch.allclose(net(x)[0], before, atol=1e-6)
    assert isinstance(net.q, nn.Parameter) and isinstance(net.prototypes, nn.Parameter)
    assert net.fix_slots() == 0


@pytest.mark.parametrize("winners", [[(0, 0, 1), (1, 1, 1)], [(0, 0, 1), (1, 1, 4)],
                                     [(0, 0, 1), (0, 1, 3), (1, 0, 4)]])
def test_empty_slots_stay_empty_when_the_slots_are_fixed(winners):
    """Also where a single prototype is left: a softmax over one prototype is 1 whatever its logit."""
    net = small_net()
    net.q.data.zero_()
    for c, k, m in winners:
        net.q.data[c, k, m] = 1
    before = net.hard_assignment().sum(2)
    assert before.sum() == len(winners)
    net.fix_slots()
    assert torch.equal(net.hard_assignment().sum(2), before)


def test_nothing_held_at_all_is_said():
    net = small_net(sharp=0)
    with pytest.raises(UserError, match="every slot is empty"):
        net.fix_slots()


# ---- loss of a step, optimizers ----

def slow_losses(logits, min_d2, y, q, labels, others, lam, cfg):
    """Every weighted term in float64 loops."""
    logits, min_d2, y, q = (v.detach().double().numpy() for v in (logits, min_d2, y, q))
    classes, slots, _ = y.shape
    official = cfg.reading == "official"

    def ce(target):
        return np.mean([np.log(np.exp(row).sum()) - row[t] for row, t in zip(logits, target)])

    def nearest(target, own):
        found = []
        for row, t in zip(min_d2, target):
            order = np.argsort(-y[t].sum(0))
            found.append(row[order[:slots]].min() if own else row[order[slots:]].min())
        return np.mean(found)

    def mixed(cost, share=lam):
        return share * cost(labels) + (1 - share) * cost(others)

    table, orth = q if official else y, 0
    for c in range(classes):
        unit = table[c] / np.linalg.norm(table[c], axis=1, keepdims=True)
        orth += sum(unit[i] @ unit[j] for i in range(slots) for j in range(slots)
                    if (i != j if official else i < j))
    share = 1.0 if official else lam
    return dict(ce=mixed(ce), cluster=cfg.w_cluster * mixed(lambda t: nearest(t, True), share),
                separation=cfg.w_separation * mixed(lambda t: nearest(t, False), share),
                orth=cfg.w_orth * orth / (classes * slots))


@both_readings
@pytest.mark.parametrize("mixup", [True, False])
@pytest.mark.parametrize("batch", [1, 6])
def test_the_loss_is_the_weighted_sum_of_the_paper(reading, mixup, batch):
    """Supp. 8; mix-up draws lam ~ Beta(0.5, 0.5), then an order, then comes the Gumbel noise of the pass."""
    cfg = config("unused", "", reading=reading, mixup=mixup, w_cluster=0.7, w_separation=-0.3, w_orth=2.0)
    net = small_net(reading, sharp=3).eval()
    x, labels = torch.randn(batch, 3, 32, 32), torch.arange(batch) % 3
    for seed in range(3):
        torch.manual_seed(seed)
        losses = protopool.losses_of(net, x, labels, 0.3, cfg)
        torch.manual_seed(seed)
        lam, order = 1.0, torch.arange(batch)
        if mixup:
            lam, order = torch.distributions.Beta(0.5, 0.5).sample().item(), torch.randperm(batch)
        with torch.no_grad():
            seen = net(lam * x + (1 - lam) * x[order], 0.3)
        expected = slow_losses(*seen, net.q, labels.tolist(), labels[order].tolist(), lam, cfg)
        assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert not mixup or 0 < lam < 1


def test_mix_up_draws_from_beta_one_half():
    torch.manual_seed(0)
    x, labels = torch.rand(5, 3, 4, 4), torch.arange(5)
    drawn = [protopool.mix(x, labels) for _ in range(400)]
    for mixed, others, lam in drawn[:20]:
        assert torch.allclose(mixed, lam * x + (1 - lam) * x[others])   # label n is image n
        assert sorted(others.tolist()) == [0, 1, 2, 3, 4]
    lams = np.array([lam for _, _, lam in drawn])
    assert lams.min() >= 0 and lams.max() <= 1 and abs(lams.mean() - 0.5) < 0.07
    assert lams.var() == pytest.approx(0.125, abs=0.02)                 # a b / ((a + b)^2 (a + b + 1))
    assert len({tuple(others.tolist()) for _, others, _ in drawn}) > 60


def test_a_step_trains_what_it_should_and_reports_its_terms():
    cfg, net = config("unused", "", mixup=True), small_net(sharp=1)
    optimizer, _ = protopool.build_optimizer(net, "joint", cfg, CPU)
    before = {k: v.detach().clone() for k, v in net.named_parameters()}
    x, labels = torch.randn(1, 3, 32, 32), torch.tensor([2])
    terms = protopool.train_step(net.train(), optimizer, x, labels, 0.5, cfg)
    assert set(terms) == {"ce", "cluster", "separation", "orth"} and terms["separation"] < 0
    assert not any(v.requires_grad for v in terms.values())
    still = {k for k, v in net.named_parameters() if torch.equal(v, before[k])}
    assert "last_layer.weight" in still and not still & {"q", "prototypes", "add_on_layers.0.weight"}
    assert not any(k.startswith("backbone") and k.endswith("0.weight") for k in still)


def rates(net, phase, cfg):
    """{parameter: (rate, decay)} and the scheduler."""
    optimizer, scheduler = protopool.build_optimizer(net, phase, cfg, CPU)
    assert isinstance(optimizer, torch.optim.Adam)
    assert all(g["betas"] == (0.9, 0.999) for g in optimizer.param_groups)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert len(found) == sum(len(g["params"]) for g in optimizer.param_groups)                   # each once
    return {name: found.get(id(p)) for name, p in net.named_parameters()}, optimizer, scheduler


def preset(name, **flags):
    return run.make_config(protopool.Config, protopool.PRESETS, name, out="unused", **flags)


@both_readings
def test_optimizers_follow_table_6(reading):
    cfg, net = preset("cub-r34", reading=reading), small_net(reading)
    decays = {"warmup": 1e-3 if reading == "official" else 0.0, "joint": 1e-3, "pretrain": 0.0}
    for phase in ("warmup", "joint", "pretrain"):
        found, optimizer, scheduler = rates(net, phase, cfg)
        assert found["prototypes"] == found["q"] == (1.5e-3, 0.0) and found["last_layer.weight"] is None
        assert {found[k] for k in found if k.startswith("add_on")} == {(1.5e-3, decays[phase])}
        backbone = {found[k] for k in found if k.startswith("backbone")}
        assert backbone == {dict(warmup=None, joint=(5e-5, 1e-3), pretrain=(1.5e-3, 0.0))[phase]}
        seen = []
        for _ in range(11):
            seen.append([g["lr"] for g in optimizer.param_groups])
            optimizer.step()
            scheduler.step()
        cut = dict(paper=0.5, official=0.1)[reading] if phase == "joint" else 1.0
        assert np.allclose(np.array(seen) / seen[0], [[1]] * 5 + [[cut]] * 5 + [[cut ** 2]], rtol=1e-6)


@both_readings
def test_the_decay_of_the_add_on_layer_can_be_chosen_for_both_phases(reading):
    cfg, net = preset("cub-r34", reading=reading, add_on_decay=0.03), small_net(reading)
    for phase in ("warmup", "joint"):
        found = rates(net, phase, cfg)[0]
        assert found["add_on_layers.0.weight"] == found["add_on_layers.0.bias"] == (1.5e-3, 0.03)
        assert found["prototypes"] == found["q"] == (1.5e-3, 0.0)
    assert rates(net, "joint", cfg)[0]["backbone.0.0.0.weight"] == (5e-5, 1e-3)
    assert rates(net, "joint", replace(cfg, add_on_decay=0.0))[0]["add_on_layers.0.weight"] == (1.5e-3, 0.0)


def test_the_plain_classifier_has_the_same_budget():
    cfg = preset("cub-r34", classifier="linear")
    net = protopool.PlainClassifier(protopool.build_extractor("tiny"), 3)
    warmup, joint, pretrain = (rates(net, phase, cfg)[0] for phase in ("warmup", "joint", "pretrain"))
    head = "last_layer.weight"
    assert (warmup[head], joint[head], pretrain[head]) == ((1.5e-3, 0.0), (1.5e-3, 1e-3), (1.5e-3, 0.0))
    assert {v for k, v in warmup.items() if k.startswith("backbone")} == {None}
    assert {v for k, v in joint.items() if k.startswith("backbone")} == {(5e-5, 1e-3)}
    x = torch.randn(2, 3, 32, 32)
    logits, *rest = net.eval()(x)
    mean = net.backbone(x).mean((2, 3))
    assert torch.allclose(logits, mean @ net.last_layer.weight.T + net.last_layer.bias)
    assert rest == [None, None]


def test_presets_and_readings_are_the_printed_recipes():
    cub = preset("cub-r34")
    assert (cub.prototypes, cub.slots, cub.depth, cub.batch_size, cub.size) == (202, 10, 256, 80, 224)
    assert (cub.warmup_epochs, cub.patience, cub.finetune_epochs, cub.finetune_lr) == (10, 12, 15, 1e-4)
    assert (cub.lr, cub.slot_lr, cub.backbone_lr, cub.weight_decay) == (1.5e-3, 1.5e-3, 5e-5, 1e-3)
    assert (cub.lr_step, cub.lr_gamma, cub.augment) == (5, 0.5, "chain")
    assert (cub.mixup, cub.finetune_mixup) == (True, False)
    assert (cub.w_cluster, cub.w_separation, cub.w_orth, cub.w_l1) == (0.8, -0.08, 1.0, 1e-4)
    cars = preset("cars-r34")
    assert (cars.prototypes, cars.slots, cars.depth, cars.dataset) == (195, 10, 128, "cars")
    code = preset("cub-r34", reading="official")
    assert (code.warmup_epochs, code.finetune_epochs, code.finetune_lr, code.lr_gamma) == (9, 25, 5e-5, 0.1)
    assert (code.augment, code.finetune_mixup) == ("single", True)
    given = preset("cub-r34", reading="official", lr_gamma=0.5, finetune_mixup=False)
    assert given.lr_gamma == 0.5 and given.finetune_mixup is False and given.finetune_lr == 5e-5
    for name in protopool.PRESETS:
        protopool.check_config(preset(name))


def test_temperature_counts_epochs_from_the_start_of_the_warm_up():
    paper, official = (preset("cub-r34", reading=reading) for reading in ("paper", "official"))
    assert protopool.temperature_of("warmup", 0, paper) == 1
    assert protopool.temperature_of("joint", 0, paper) == pytest.approx(1 / math.sqrt(3.4e4 * 10))
    assert protopool.temperature_of("joint", 20, paper) == 0.001
    assert protopool.temperature_of("warmup", 0, official) == pytest.approx(0.001 * math.sqrt(30))
    assert protopool.temperature_of("joint", 0, official) == pytest.approx(0.001 * math.sqrt(30 / 10))


# ---- augmentation: Table 5 ----

KINDS = ("chain", "single", "flip", "none")


def augmented(image, kind, count, seed=0):
    torch.manual_seed(seed)
    return torch.stack([protopool.augment(image, kind) for _ in range(count)])


@pytest.mark.parametrize("kind", KINDS)
def test_augmentation_repeats_with_the_seed_and_keeps_shape_and_type(kind):
    image = torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8)
    first = augmented(image, kind, 12)
    assert first.dtype == torch.uint8 and first.shape == (12, 3, 20, 20)
    assert torch.equal(first, augmented(image, kind, 12))
    looks = len({a.numpy().tobytes() for a in first})
    assert looks == {"none": 1, "flip": 2}.get(kind, looks) and (looks > 9 or kind in ("none", "flip"))


@pytest.mark.parametrize("size", [20, 33, 96])
def test_none_and_flip_leave_every_pixel_value(size):
    image = torch.randint(0, 256, (3, size, size), dtype=torch.uint8)
    assert (augmented(image, "none", 5) == image).all()
    for found in augmented(image, "flip", 20):
        assert torch.equal(found, image) or torch.equal(found, image.flip(2))


@pytest.mark.parametrize("kind", ["chain", "single"])
@pytest.mark.parametrize("size", [8, 33])
def test_no_border_shows(kind, size):
    """Outside the picture all would be black: a white picture stays white to the last pixel."""
    assert (augmented(torch.full((3, size, size), 255, dtype=torch.uint8), kind, 300) == 255).all()


@pytest.mark.parametrize("kind", KINDS)
def test_flips_occur_half_the_time_and_vertical_ones_in_the_chain_alone(kind):
    image = torch.zeros(3, 24, 24, dtype=torch.uint8)
    image[0, :, :12], image[1, :12] = 200, 200                          # red is left, green is above
    found = augmented(image, kind, 400).float()
    red, green = found[:, 0], found[:, 1]
    mirrored = (red[..., 12:].mean((1, 2)) > red[..., :12].mean((1, 2))).float().mean().item()
    upside_down = (green[:, 12:].mean((1, 2)) > green[:, :12].mean((1, 2))).float().mean().item()
    assert mirrored == 0 if kind == "none" else 0.4 < mirrored < 0.6
    assert 0.4 < upside_down < 0.6 if kind == "chain" else upside_down == 0


# ---- a run of all phases ----

FIGURES = {"prototypes-01.png", "classes-01.png", "shared_pair.png", "shared_prototype.png",
           "classes_per_prototype.png", "class_graph.png", "class_graph.csv", "assignment.png",
           "assignment_histogram.png", "slot_over_time.png", "focal.png", "focal_histogram.png",
           "explanation-1.png", "explanation-2.png", "explanation-3.png"}
TRUTH = {"purity", "purity_by_chance", "consistency", "stability", "box_area", "parts_per_box"}


def test_a_run_leaves_numbers_log_and_figures(paper):
    assert files(paper.out) == {"config.json", "log.csv", "metrics.json", "last.pt", "best.pt",
                                *(f"figures/{name}" for name in FIGURES)}
    metrics = read(paper.out / "metrics.json")
    assert {"accuracy", "accuracy_before_projection", "accuracy_after_projection", "prototypes_used",
            "classes_per_prototype", "empty_slots", "seconds", "preset", "seed", "reading"} <= set(metrics)
    assert not TRUTH & set(metrics)                                  # nobody knows where a bug has its parts
    assert metrics["split"] == "test" and metrics["chosen_on"] == "validation split"
    assert metrics["epochs"] == dict(pretrain=2, warmup=2, joint=2, finetune=2)
    for name in ("accuracy", "accuracy_before_projection", "accuracy_after_projection"):
        hits = metrics[name] * 9 / 100                                  # of 9 test images
        assert hits == pytest.approx(round(hits))
    rows = list(csv.DictReader(open(paper.out / "log.csv")))
    phases = ("pretrain", "warmup", "joint", "finetune")
    assert [(r["phase"], r["epoch"]) for r in rows] == [(phase, epoch) for phase in phases for epoch in "12"]
    assert all(r["cluster"] and r["orth"] for r in rows if r["phase"] in ("warmup", "joint"))
    assert all(r["l1"] for r in rows[6:]) and all(math.isfinite(float(r["ce"])) for r in rows)
    assert paper.done.stderr == ""                                      # no progress bar into a pipe
    first = paper.done.stdout.splitlines()[0]
    assert "12 steps" in first and "s a step" in first and "GiB" in first


def test_figures_are_legible_pictures(paper):
    for path in (paper.out / "figures").glob("*.png"):
        with Image.open(path) as image:
            assert image.mode == "RGB" and min(image.size) >= 100 and max(image.size) <= 4000, path
            assert len(image.resize((150, 150), Image.Resampling.NEAREST).getcolors(1 << 15)) > 5, path


def test_the_numbers_of_sharing_are_those_of_the_slots(paper):
    metrics, weights = read(paper.out / "metrics.json"), run.read_checkpoint(paper.out / "last.pt")
    table = weights["model"]["q"].numpy()                               # fixed: 0/1, (C,K,M)
    assert set(np.unique(table)) <= {0, 1} and table.sum(2).max() == 1
    holds = [{int(m) for k in range(2) for m in np.flatnonzero(table[c, k])} for c in range(3)]
    counts = [sum(m in held for held in holds) for m in range(table.shape[2])]
    assert min(counts) > 0 and metrics["classes_of_each_prototype"] == counts        # the dead are pruned
    assert metrics["prototypes_used"] == len(counts) and metrics["prototypes_pruned"] == 8 - len(counts)
    assert metrics["classes_per_prototype"] == pytest.approx(np.mean(counts))
    filled = int(table.sum())
    assert metrics["slots_in_all"] == 6 and metrics["empty_slots"] == 6 - filled
    assert metrics["repeated_slots"] == filled - sum(map(len, holds))
    pairs = [len(holds[a] & holds[b]) for a in range(3) for b in range(a)]
    assert metrics["shared_per_class_pair"] == pytest.approx(np.mean(pairs))
    edges = list(csv.DictReader(open(paper.out / "figures" / "class_graph.csv")))
    assert sum(float(edge["shared"]) for edge in edges) == sum(pairs)


def states(found, *phases):
    """Weights after every epoch of these phases, in order: last.pt only."""
    return [(phase, weights) for file, phase, _, weights in found.saved
            if file == "last.pt" and phase in phases]


def moved(before, after, start=""):
    return {k for k in before if k.startswith(start) and not torch.equal(before[k], after[k])}


def test_each_phase_moves_what_it_trains_and_nothing_else(paper, official):
    for found in (paper, official):
        (_, last), = states(found, "pretrain")[-1:]
        for _, now in states(found, "warmup"):
            backbone = {k: v for k, v in last.items() if k.startswith("backbone")}   # and statistics
            assert backbone and not moved(backbone, now)
        warm, joint = states(found, "warmup")[-1][1], states(found, "joint")
        changed = moved(warm, joint[0][1])
        assert changed == set(warm) - {"last_layer.weight", "fixed"}           # statistics too
        projected, = states(found, "project")
        tuned = states(found, "finetune")
        assert torch.equal(projected[1]["last_layer.weight"], warm["last_layer.weight"])
        assert moved(projected[1], tuned[0][1]) == moved(tuned[0][1], tuned[1][1]) == {"last_layer.weight"}
        assert moved(joint[-1][1] if found is official else best_of(found), projected[1], "b") == set()


def best_of(found):
    return [weights for file, _, _, weights in found.saved if file == "best.pt"][-1]


def test_fine_tuning_follows_the_reading(paper, official):
    def group(found):
        optimizer = run.read_checkpoint(found.out / "last.pt")["optimizer"]
        return optimizer["param_groups"][0]["weight_decay"], [
            float(r["lr"]) for r in csv.DictReader(open(found.out / "log.csv")) if r["phase"] == "finetune"]
    decay, lr = group(paper)
    assert decay == 0 and lr == [1e-4, 1e-4]
    decay, lr = group(official)
    assert decay == 1e-3 and lr == pytest.approx([5e-5] * 5 + [5e-5 * 0.95])
    reads = {found.cfg.reading: sum(split == "train" and stage == "train" for stage, split, _ in found.reads)
             for found in (paper, official)}
    assert reads["official"] - reads["paper"] >= 6 * 12 - 12         # the whole network again in every epoch


def test_fine_tuning_without_mix_up_works_on_the_slots_of_the_clean_images(data, tmp_path):
    """The cached slots, batch by batch, are those of a pass over the clean images."""
    cfg = config(tmp_path, data)
    sets, net = protopool.open_splits(cfg), small_net().eval()
    view = images.CleanView(sets["train"], 32)
    batches = list(protopool.slot_batches(net, sets, 0, 4, cfg, run.Machine(CPU)))
    assert [len(b[1]) for b in batches] == [6] * 4 and all(lam == 1 for *_, lam in batches)
    with torch.no_grad():
        every = {tuple(net.slot_scores(view[i][0][None])[0].tolist()): view[i][1]
                 for i in range(12)}
    for slots, labels, others, _ in batches:
        assert slots.shape == (6, 6) and torch.equal(labels, others)
        for row, label in zip(slots.tolist(), labels.tolist()):
            near = min(every, key=lambda known: np.abs(np.subtract(known, row)).max())
            assert np.abs(np.subtract(near, row)).max() < 1e-4 and every[near] == label


def test_validation_is_apart_and_the_test_split_is_read_for_the_report_alone(paper):
    before = {(split, path) for stage, split, path in paper.reads if stage == "train"}
    train, val = ({path for split, path in before if split == name} for name in ("train", "val"))
    assert len(train) == 12 and len(val) == 6 and not train & val
    assert {split for split, _ in before} == {"train", "val"}
    assert all("/train/" in Path(path).as_posix() for path in train | val)
    after = {path for stage, split, path in paper.reads if stage == "report" and split == "test"}
    assert len(after) == 9 and all("/test/" in Path(path).as_posix() for path in after)


def test_choosing_on_the_test_split_is_said_in_the_metrics(data, tmp_path, monkeypatch):
    monkeypatch.setattr(protopool_figures, "draw_run", lambda *args: [])
    with recording() as found:
        metrics = protopool.main(config(tmp_path, data, select_on_test=True, **QUICK))
    assert "test" in metrics["chosen_on"] and "optimistic" in metrics["chosen_on"]
    assert {split for stage, split, _ in found.reads if stage == "train"} == {"train", "test"}
    assert len({path for _, split, path in found.reads if split == "train"}) == 18   # nothing is set apart


def test_the_three_accuracies_are_of_the_three_stages(paper):
    """The pruned prototypes as they were; the same projected; with the last layer's new weights."""
    saved, metrics = run.read_checkpoint(paper.out / "last.pt"), read(paper.out / "metrics.json")
    net, sets, progress = protopool.load_run(paper.cfg, CPU)
    x = torch.stack([images.CleanView(sets["test"], 32)[i][0] for i in range(9)])
    labels, own = np.array(sets["test"].labels), net.own_slots()
    tuned = saved["model"]["last_layer.weight"]
    assert not torch.equal(tuned, own)
    for name, prototypes, weight in (("accuracy_before_projection", progress["prototypes_before"], own),
                                     ("accuracy_after_projection", saved["model"]["prototypes"], own),
                                     ("accuracy", saved["model"]["prototypes"], tuned)):
        net.prototypes.data, net.last_layer.weight.data = prototypes, weight
        hits = slow_logits(net, x, saved["model"]["q"])[0].argmax(1) == labels
        assert metrics[name] == pytest.approx(100 * hits.mean())
    best = best_of(paper)
    table = protopool.harden(protopool.assign(best["q"], 0.001))
    assert torch.equal(progress["prototypes_before"], best["prototypes"][table.flatten(0, 1).any(0)])


def test_projected_prototypes_are_patches_of_the_training_images_they_name(paper):
    net, sets, progress = protopool.load_run(paper.cfg, CPU)
    view = images.CleanView(sets["train"], 32)
    for m, (image, row, column, distance) in enumerate(progress["sources"]):
        with torch.no_grad():
            z = net.features(view[image][0][None])[0, :, row, column]
        assert torch.allclose(net.prototypes[m], z, atol=1e-4)
        way = (z - progress["prototypes_before"][m]).square().sum().item()
        assert distance == pytest.approx(way, abs=1e-3)


def test_same_seed_same_numbers(paper, data, tmp_path, monkeypatch):
    again = protopool.main(config(tmp_path / "again", data))
    assert numbers(again) == numbers(read(paper.out / "metrics.json"))
    a, b = (run.read_checkpoint(out / "last.pt") for out in (paper.out, tmp_path / "again"))
    assert same(a, b)
    monkeypatch.setattr(protopool_figures, "draw_run", lambda *args: [])
    protopool.main(config(tmp_path / "other", data, seed=1))
    assert not same(a["model"], run.read_checkpoint(tmp_path / "other" / "last.pt")["model"])


def test_batches_of_one_image_go_through_every_phase(data, tmp_path, monkeypatch):
    monkeypatch.setattr(protopool_figures, "draw_run", lambda *args: [])
    for reading in ("paper", "official"):
        metrics = protopool.main(config(tmp_path / reading, data, batch_size=1, reading=reading, mixup=True,
                                        **QUICK | dict(pretrain_epochs=1)))
        assert metrics["epochs"] == dict(pretrain=1, warmup=1, joint=1, finetune=1)
        rows = list(csv.DictReader(open(tmp_path / reading / "log.csv")))
        assert all(math.isfinite(float(r["ce"])) for r in rows)


SCRIPTED = [(40, 1.0), (50, 1.0), (60, 0.9), (45, 0.8), (70, 0.85), (55, 0.95), (50, 1.0)]  # accuracy, ce


@both_readings
def test_early_stopping_ends_the_joint_phase_with_its_best_weights(data, tmp_path, monkeypatch, reading):
    """Loss on val in the joint phase: 1.0, 0.9, 0.8 (the best), 0.85 though of higher accuracy, 0.95: stop."""
    calls, evaluate = [], protopool.evaluate

    def scripted(*args):
        calls.append(0)
        accuracy, ce = SCRIPTED[min(len(calls), len(SCRIPTED)) - 1]
        return dict(accuracy=accuracy, ce=ce) if len(calls) <= len(SCRIPTED) else evaluate(*args)

    monkeypatch.setattr(protopool, "evaluate", scripted)
    monkeypatch.setattr(protopool_figures, "draw_run", lambda *args: [])
    with recording() as found:
        metrics = protopool.main(config(tmp_path, data, reading=reading, patience=2,
                                        **QUICK | dict(joint_epochs=20)))
    assert metrics["epochs"] == dict(warmup=1, joint=5, finetune=1)
    epochs = [weights for _, weights in states(found, "joint")]
    assert [file for file, *_ in found.saved].count("best.pt") == 3 and same(best_of(found), epochs[2])
    source = epochs[2] if reading == "paper" else epochs[4]             # [D12]
    (_, projected), = states(found, "project")
    assert not moved(source, projected, "backbone") and not same(epochs[2], epochs[4])
    before = run.read_checkpoint(tmp_path / "last.pt")["progress"]["prototypes_before"]
    assert all((source["prototypes"] == p).all(1).any() for p in before)
    rows = list(csv.DictReader(open(tmp_path / "log.csv")))
    assert [float(r["val_accuracy"]) for r in rows] == [40, 50, 60, 45, 70, 55, 50]


def test_the_plain_classifier_trains_for_the_same_epochs(linear):
    metrics = read(linear / "metrics.json")
    assert metrics["classifier"] == "linear" and metrics["epochs"] == dict(pretrain=2, warmup=2, joint=2)
    assert "prototypes_used" not in metrics and 0 <= metrics["accuracy"] <= 100
    assert files(linear) >= {"config.json", "log.csv", "metrics.json", "last.pt"}


def test_a_loss_that_is_not_finite_ends_the_run(data, tmp_path, monkeypatch):
    step = protopool.train_step
    calls = []

    def broken(*args):
        calls.append(0)
        return {k: v * (math.nan if len(calls) > 8 else 1) for k, v in step(*args).items()}

    monkeypatch.setattr(protopool, "train_step", broken)
    text = mistake("--out", tmp_path / "out", "--data", data, *flags_of(TINY))
    assert "not finite" in text and "--lr" in text
    assert run.read_checkpoint(tmp_path / "out" / "last.pt")["progress"]["phase"] in ("pretrain", "warmup")


def test_one_process_of_the_command_line(data, tmp_path):
    """The real thing, once: a process of its own, with another that loads the images."""
    flags = flags_of(TINY | QUICK)
    argv = ["--out", tmp_path, "--data", data, *flags, "--workers", 1]
    done = subprocess.run([sys.executable, "protopool.py", *map(str, argv)], cwd=ROOT, capture_output=True,
                          text=True, env=ENV)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert (tmp_path / "metrics.json").exists() and "test accuracy" in done.stdout


# ---- resume ----

class Killed(KeyboardInterrupt):
    pass


def killing(function, at):
    """The function, whose call number `at` (from 0) raises Killed."""
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(0)
        if len(calls) == at + 1:
            raise Killed
        return function(*args, **kwargs)
    return wrapped


RESUMED = dict(pretrain_epochs=2, warmup_epochs=2, joint_epochs=3, finetune_epochs=2, mixup=True)
DEATHS = [("evaluate", 0), ("evaluate", 1), ("train_step", 6), ("evaluate", 3), ("evaluate", 5),
          ("evaluate", 6), ("project_prototypes", 0), ("finetune_losses", 0), ("evaluate", 8), ("evaluate", 10)]
# while: pretrain 1, pretrain 2, warmup 1 (4 steps are announce's), warmup 2, joint 2, joint 3,
# the projection, right after it, finetune 2, the report


@pytest.fixture(scope="module", params=["paper", "official"])
def whole(request, data, tmp_path_factory):
    """An uninterrupted run with mix-up, which `official` has in fine-tuning too."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(protopool_figures, "draw_run", lambda *args: [])
        metrics = protopool.main(config(out, data, reading=request.param, **RESUMED))
    log, saved = list(csv.DictReader(open(out / "log.csv"))), run.read_checkpoint(out / "last.pt")
    return SimpleNamespace(metrics=metrics, saved=saved, reading=request.param, log=log)


@pytest.mark.parametrize("name, at", DEATHS)
def test_resume_ends_bit_for_bit_like_an_uninterrupted_run(whole, data, tmp_path, monkeypatch, name, at):
    monkeypatch.setattr(protopool_figures, "draw_run", lambda *args: [])
    cfg = config(tmp_path, data, reading=whole.reading, **RESUMED)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(protopool, name, killing(getattr(protopool, name), at))
        protopool.main(cfg)
    assert not (tmp_path / "metrics.json").exists()
    assert (tmp_path / "last.pt").exists() == (name != "evaluate" or at > 0)
    done = script("--out", tmp_path, "--resume")
    assert done.returncode == 0, done.stderr
    assert same(run.read_checkpoint(tmp_path / "last.pt"), whole.saved)
    assert numbers(read(tmp_path / "metrics.json")) == numbers(whole.metrics)
    log = csv.DictReader(open(tmp_path / "log.csv"))
    assert [numbers(row) for row in log] == [numbers(row) for row in whole.log]


def test_resume_remembers_how_long_the_joint_phase_has_waited(data, tmp_path, monkeypatch):
    """Killed after one epoch of two without a better validation: the count goes on."""
    monkeypatch.setattr(protopool_figures, "draw_run", lambda *args: [])
    found, evaluate = {}, protopool.evaluate
    for name, death in (("whole", None), ("killed", 3)):
        calls = []

        def scripted(*args):
            calls.append(0)
            if len(calls) - 1 == death:
                raise Killed
            real = evaluate(*args)
            return dict(accuracy=real["accuracy"], ce=1 + len(calls) / 10)

        cfg = config(tmp_path / name, data, patience=2, **QUICK | dict(joint_epochs=9))
        with monkeypatch.context() as patch:
            patch.setattr(protopool, "evaluate", scripted)
            if death is None:
                protopool.main(cfg)
            else:
                with pytest.raises(Killed):
                    protopool.main(cfg)
                calls[:] = [0] * death
                death = None
                protopool.main(replace(cfg, resume=True))
        found[name] = run.read_checkpoint(tmp_path / name / "last.pt")
    assert same(found["whole"], found["killed"])
    assert sum(row["phase"] == "joint" for row in found["whole"]["progress"]["log"]) == 3


def test_resume_of_a_linear_run(linear, data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(protopool, "evaluate", killing(protopool.evaluate, 5))
        protopool.main(config(tmp_path, data, classifier="linear"))
    assert script("--out", tmp_path, "--resume").returncode == 0
    assert same(*(run.read_checkpoint(out / "last.pt") for out in (linear, tmp_path)))


# ---- explanations ----

@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A grey and an RGBA picture of other sizes than the network's."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 60), dtype=np.uint8)).save(folder / "grey.png")
    Image.fromarray(rng.integers(0, 255, (50, 37, 4), dtype=np.uint8)).save(folder / "clear.png")
    return folder


def assert_explains(facts, net, x, classes):
    """own + rest = the network's logit of the predicted class; the terms are the slots of that class."""
    logits, _, y = net(x)
    c = int(logits[0].argmax())
    with torch.no_grad():
        slots = net.slot_scores(x)[0]
    assert facts["prediction"] == classes[c]
    assert facts["logit"] == pytest.approx(logits[0, c].item(), abs=1e-4)
    assert facts["own"] + facts["rest"] == pytest.approx(facts["logit"], abs=1e-9)
    assert facts["probability"] == pytest.approx(logits[0].softmax(0)[c].item(), abs=1e-5)
    terms = facts["slots"]
    assert sum(term["product"] for term in terms) == pytest.approx(facts["own"], abs=1e-9)
    products = [term["product"] for term in terms]
    assert products == sorted(products, reverse=True)
    per_class, expected = net.q.shape[1], []
    for k in range(per_class):
        if y[c, k].any():
            s = c * per_class + k
            expected.append((int(y[c, k].argmax()), slots[s].item(), net.last_layer.weight[c, s].item()))
    found = sorted((term["prototype"], term["similarity"], term["weight"]) for term in terms)
    assert np.allclose(found, sorted(expected), atol=1e-4)
    for term in terms:
        assert term["product"] == pytest.approx(term["similarity"] * term["weight"], abs=1e-6)
    others = sum(slots[s].item() * net.last_layer.weight[c, s].item() for s in range(len(slots))
                 if s // per_class != c)
    assert facts["rest"] == pytest.approx(others, abs=1e-4)


@pytest.mark.parametrize("run_of", ["paper", "official"])
def test_an_explanation_adds_up_to_the_logit(run_of, request, tmp_path):
    found = request.getfixturevalue(run_of)
    net, sets, progress = protopool.load_run(found.cfg, CPU)
    patches = protopool_figures.prototype_patches(net, sets["train"], progress["sources"], found.cfg.size)
    assert len(patches) == len(net.prototypes) and all(p.dtype == torch.uint8 and p.numel() for p in patches)
    torch.manual_seed(0)
    for trial in range(3):
        net.last_layer.weight.data += 0.3 * torch.randn(3, 6)        # negative weights and others' slots too
        if trial == 2:
            net.q.data[:, 0] = 0                                        # an empty slot gives no term
            net.reading = "paper"
        image = sets["test"].read(trial)[0]
        path = tmp_path / "why.png"
        facts = protopool.explanation(net, CLASSES, found.cfg.size, image, "title")
        maps = protopool_figures.maps_of(net, image, found.cfg.size)
        protopool_figures.draw_explanation(facts, image, maps, patches, path)
        x = images.CleanView(sets["test"], 32)[trial][0][None]
        assert_explains(facts, net, x, CLASSES)
        assert trial < 2 or len(facts["slots"]) == 1
        with Image.open(path) as drawn:
            assert drawn.mode == "RGB" and min(drawn.size) > 200


def test_explain_takes_grey_and_transparent_pictures(paper, pictures):
    done = script("--out", paper.out, "--explain", pictures)
    assert done.returncode == 0, done.stderr
    folder, (net, _, _) = paper.out / "explanations", protopool.load_run(paper.cfg, CPU)
    assert files(folder) == {"grey.png", "grey.json", "clear.png", "clear.json"}
    for name in ("grey", "clear"):
        with Image.open(pictures / f"{name}.png") as raw:
            pixels = torch.tensor(np.array(raw.convert("RGB"))).permute(2, 0, 1)
        with Image.open(folder / f"{name}.png") as drawn:
            assert drawn.mode == "RGB"
        facts = read(folder / f"{name}.json")
        assert facts["image"] == f"{name}.png" and f"= {facts['logit']:.2f}" in done.stdout
        assert_explains(facts, net, images.network_input(pixels, 32, CPU), CLASSES)
    assert script("--out", paper.out, "--explain", pictures / "grey.png").returncode == 0


def test_two_pictures_of_one_name_are_refused_before_one_explanation_replaces_the_other(paper, tmp_path):
    (tmp_path / "same").mkdir()
    for name, colour in {"a.png": "red", "a.jpg": "blue"}.items():
        Image.new("RGB", (30, 20), colour).save(tmp_path / "same" / name)
    before = files(paper.out)
    text = mistake("--out", paper.out, "--explain", tmp_path / "same")
    assert str(tmp_path / "same") in text and "rename" in text
    assert files(paper.out) == before


def test_compare_draws_what_two_classes_share(paper):
    done = script("--out", paper.out, "--compare", "cat", "ant")
    assert done.returncode == 0, done.stderr
    path = paper.out / "figures" / "pair-cat-ant.png"
    assert str(path) in done.stdout
    with Image.open(path) as image:
        assert image.mode == "RGB" and min(image.size) > 100


def test_eval_only_repeats_the_metrics(paper):
    before = read(paper.out / "metrics.json")
    done = script("--out", paper.out, "--eval-only")
    assert done.returncode == 0, done.stderr
    assert read(paper.out / "metrics.json") == before


def test_eval_only_of_a_linear_run(linear):
    before = read(linear / "metrics.json")
    done = script("--out", linear, "--eval-only")
    assert done.returncode == 0, done.stderr
    assert read(linear / "metrics.json") == before


def test_an_ensemble_averages_probabilities(paper, official, data, tmp_path):
    done = script("--out", tmp_path, "--ensemble", paper.out, official.out, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    result, chances = read(tmp_path / "ensemble" / "metrics.json"), []
    for found in (paper, official):
        net, sets, _ = protopool.load_run(found.cfg, CPU)
        x = torch.stack([images.CleanView(sets["test"], 32)[i][0] for i in range(9)])
        logits = slow_logits(net, x, net.hard_assignment())[0]
        chances.append(np.exp(logits) / np.exp(logits).sum(1, keepdims=True))
    labels = np.array(sets["test"].labels)
    hits = [(c.argmax(1) == labels).mean() for c in chances]
    assert result["accuracies"] == pytest.approx([100 * h for h in hits])
    assert result["accuracy"] == pytest.approx(100 * (np.mean(chances, 0).argmax(1) == labels).mean())
    assert files(tmp_path) == {f"ensemble/{name}" for name in (
        "metrics.json", "classes_per_prototype.png", "class_graph.png", "class_graph.csv")}


# ---- tables ----

def test_table_4_keeps_the_rows_that_were_trained(data, tmp_path, monkeypatch):
    monkeypatch.setattr(protopool_figures, "draw_run", lambda *args: [])
    cfg = config(tmp_path, data, table="4", slot_lr=0.5, **QUICK)
    protopool.main(cfg)
    table = (tmp_path / "table4.md").read_text()
    cells = [line.strip("| ").split(" | ") for line in table.splitlines()]
    lines = {line[0]: line for line in cells}
    paper = {"ProtoPool": ("85.5", "88.9"), "w/o orthogonality": ("82.4", "86.8"),
             "w/o Gumbel-softmax": ("80.3", "64.5"), "w/o both": ("65.1", "30.8"),
             "w/o focal similarity": ("85.3", "88.8")}                  # Table 4, ResNet-50
    rows = {"ProtoPool": "ProtoPool", "w/o orthogonality": "no-orthogonality", "w/o both": "no-both",
            "w/o Gumbel-softmax": "no-Gumbel-softmax", "w/o focal similarity": "no-focal-similarity"}
    for name, folder in rows.items():
        assert tuple(lines[name][-2:]) == paper[name]
        metrics = read(tmp_path / "rows" / folder / "metrics.json")
        assert lines[name][1:4] == [f"{metrics[k]:.1f}" for k in ("accuracy_before_projection",
                                                                 "accuracy_after_projection", "accuracy")]
    settings = {name: read(tmp_path / "rows" / folder / "config.json") for name, folder in rows.items()}
    assert [name for name, s in settings.items() if s["w_orth"] == 0] == ["w/o orthogonality", "w/o both"]
    assert {name for name, s in settings.items() if not s["gumbel"]} == {"w/o Gumbel-softmax", "w/o both"}
    assert [name for name, s in settings.items() if not s["focal"]] == ["w/o focal similarity"]
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "rows").rglob("last.pt")}
    (tmp_path / "rows" / "no-both" / "metrics.json").unlink()          # as if interrupted in the last moment
    protopool.main(cfg)
    assert (tmp_path / "table4.md").read_text() == table
    assert all(p.stat().st_mtime_ns == t for p, t in stamps.items())


def test_table_11b_trains_other_numbers_of_slots(data, tmp_path, monkeypatch):
    monkeypatch.setattr(protopool_figures, "draw_run", lambda *args: [])
    cfg = config(tmp_path, data, table="11b", **QUICK)
    found = protopool.main(cfg)
    assert list(found) == ["1 slots", "2 slots", "3 slots"]             # 0.4 to 1.4 times 2
    assert [metrics["slots_in_all"] for metrics, in found.values()] == [3, 6, 9]
    text = (tmp_path / "table11b.md").read_text()
    assert "11b" in text and "| 3 slots |" in text
    with monkeypatch.context() as patch:
        patch.setattr(protopool, "train", lambda *args: pytest.fail("a finished row was trained again"))
        assert protopool.main(cfg) == found


def test_rows_of_the_tables_for_cub():
    def rows(table):
        return list(protopool.table_of(preset("cub-r34", table=table)).rows.values())
    assert [r["slots"] for r in rows("11b")] == [4, 6, 8, 10, 12, 14]   # the ticks of Fig. 11b
    sizes = [r["prototypes"] for r in rows("11a")]
    assert sizes[0] == 50 and sizes[-1] == 505 and 202 in sizes
    table = protopool.table_of(preset("cub-r34", table="3"))
    metrics = dict(accuracy_before_projection=1.0, accuracy_after_projection=2.0, accuracy=3.0,
                   prototypes_used=4, empty_slots=5, repeated_slots=6)
    assert tables.table_text(table, {"ProtoPool": [metrics]}).splitlines()[-1] == (
        "| ProtoPool | 1.0 | 2.0 | 3.0 | 4 | 5 | 6 | 80.8 | 80.3 |")    # the paper's Table 3, ResNet-34


# ---- parts: birds know where theirs are ----

def test_birds_get_the_truth_metrics(tmp_path, monkeypatch):
    monkeypatch.setattr(toy_birds, "SPLITS", {"train": 36, "test": 24})
    cfg = config(tmp_path, "", dataset="toy_birds", prototypes=10, batch_size=12, **QUICK)
    metrics = protopool.main(cfg)
    assert TRUTH | {"variant_purity", "variants", "variants_found_shared"} <= set(metrics)
    for name in (TRUTH | {"variant_purity"}) - {"parts_per_box"}:
        assert 0 <= metrics[name] <= 100, name
    assert metrics["variant_purity"] <= metrics["purity"] + 1e-4 and 0 <= metrics["parts_per_box"] <= 5
    assert metrics["variants_found_shared"] <= metrics["variants"]
    assert len(metrics["explanations"]) == 3
    assert {f"figures/{name}" for name in FIGURES} <= files(tmp_path)

    net, sets, _ = protopool.load_run(cfg, CPU)                         # purity once more, by loops
    view, similarity, inside = images.CleanView(sets["test"], 32), [], []
    for i in range(24):
        with torch.no_grad():
            d2 = protopool.squared_distances(net.features(view[i][0][None]), net.prototypes)
        similarity.append(protopool.focal_similarity(d2)[0].numpy())
        places = sets["test"].part_locations(i).numpy()
        boxes = [protopool.activation_box(map, 32) for map in protopool.log_similarity(d2[0])]
        inside.append([[bool(v) and y0 <= y * 32 / 96 < y1 and x0 <= x * 32 / 96 < x1 for x, y, v in places]
                       for y0, y1, x0, x1 in boxes])
    similarity, inside, purity = np.array(similarity), np.array(inside), []
    for m in range(similarity.shape[1]):
        top = np.argsort(-similarity[:, m], kind="stable")[:10]
        purity.append(inside[top, m].mean(0).max())
    assert metrics["purity"] == pytest.approx(100 * np.mean(purity), abs=1.0)
    assert metrics["parts_per_box"] == pytest.approx(inside.sum(2).mean(), abs=0.02)


# ---- mistakes ----

@pytest.mark.parametrize("argv, words", [
    (["--dataset", "imagefolder"], ["--data"]), (["--preset", "cub-r34"], ["--data"]),
    (["--dataset", "imagefolder", "--data", "nowhere"], ["nowhere", "train/"]),
    (["--preset", "cub-r34", "--weights", "none", "--data", "nowhere"], ["nowhere"]),
    (["--data", "nowhere"], ["toy_birds", "nowhere"]),
    (["--slots", "9", "--prototypes", "8"], ["--slots 9", "--prototypes 8"]),
    (["--w-separation", "1"], ["--w-separation 1.0", "must be at most 0"]), (["--lr", "0"], ["--lr 0.0"]),
    (["--batch-size", "0"], ["--batch-size 0"]), (["--weight-decay", "-1"], ["--weight-decay -1.0"]),
    (["--val-fraction", "0.9"], ["val_fraction", "0.9"]), (["--patience", "0"], ["--patience 0"]),
    (["--reading", "own"], ["--reading"]), (["--backbone", "vgg"], ["vgg"]), (["--table", "5"], ["--table"]),
    (["--table", "4", "--classifier", "linear"], ["--table", "--classifier linear"]),
    (["--add-on-decay", "-1"], ["--add-on-decay -1.0"]),
    (["--weights", "gone.pth"], ["gone.pth"]), (["--prototype", "8"], ["did you mean --prototypes"]),
    (["--compare", "one", "two"], ["holds no run"]), (["--schedule", "0"], ["--schedule"]),
    (["--eval-only"], ["holds no run"]), (["--explain", "x.png"], ["holds no run"]),
    (["--resume"], ["holds no run"]),
    (["--ensemble", "nowhere"], ["nowhere holds no run"]),
])
def test_mistakes_are_one_sentence_and_exit_code_2(tmp_path, monkeypatch, argv, words):
    monkeypatch.setattr(protopool, "announce", lambda *args: pytest.fail("training has begun"))
    text = mistake("--out", tmp_path / "out", "--device", "cpu", *argv)
    assert all(word in text for word in words), text
    assert not (tmp_path / "out").exists()                              # nothing half-written


def test_broken_data_are_named(tmp_path):
    def fail(root, *more):
        settings = TINY | dict(pretrain_epochs=0, warmup_epochs=1, joint_epochs=0)
        return mistake("--out", tmp_path / "out", "--data", root, *flags_of(settings), *more)
    root = make_folders(tmp_path / "truncated")
    path = root / "train" / "bee" / "2.png"
    path.write_bytes(path.read_bytes()[:300])
    assert str(path) in fail(root) and "cut short" in fail(root)
    assert str(path) in fail(root, "--workers", 1)                      # out of another process
    root = make_folders(tmp_path / "empty")
    for path in (root / "train" / "bee").iterdir():
        path.unlink()
    assert "bee" in fail(root)
    root = make_folders(tmp_path / "missing")
    (root / "test" / "bee").rename(root / "bee")
    assert "bee" in fail(root)
    root = make_folders(tmp_path / "one", train=1)
    assert "ant has a single training image" in fail(root)


def test_explaining_and_comparing_name_what_is_wrong(paper, linear, pictures, tmp_path):
    text = mistake("--out", paper.out, "--compare", "ant", "dog")
    assert "'dog'" in text and "ant, bee, cat" in text
    assert "two class names" in mistake("--out", paper.out, "--compare", "ant", "bee", "cat")
    assert "nothing.png" in mistake("--out", paper.out, "--explain", "nothing.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    assert "broken.jpg" in mistake("--out", paper.out, "--explain", tmp_path / "broken.jpg")
    assert "plain classifier" in mistake("--out", linear, "--explain", pictures)
    assert "plain classifier" in mistake("--out", linear, "--compare", "ant", "bee")
    assert str(linear) in mistake("--out", tmp_path, "--ensemble", paper.out, linear)


def test_an_unfinished_run_is_not_explained(data, pictures, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(protopool, "project_prototypes", killing(protopool.project_prototypes, 0))
        protopool.main(config(tmp_path, data))
    for argv in (["--explain", pictures], ["--eval-only"], ["--compare", "ant", "bee"]):
        text = mistake("--out", tmp_path, *argv)
        assert "phase joint" in text and "--resume" in text


def test_checkpoints_of_other_runs_are_refused(paper, linear, data, pictures, tmp_path, monkeypatch):
    assert "--slots 3 contradicts" in mistake("--out", paper.out, "--resume", "--slots", 3)
    assert "contradicts" in mistake("--out", paper.out, "--resume", "--reading", "official")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text((paper.out / "config.json").read_text())

    def with_checkpoint(path, *argv):
        (other / "last.pt").write_bytes(path.read_bytes())
        text = mistake("--out", other, *argv)
        assert str(other) in text, text
        return text

    monkeypatch.setattr(protopool_figures, "draw_run", lambda *args: [])
    protopool.main(config(tmp_path / "deep", data, depth=5))
    for argv in (["--resume"], ["--eval-only"], ["--explain", pictures]):
        assert "does not fit" in with_checkpoint(tmp_path / "deep" / "last.pt", *argv)
    assert "does not fit" in with_checkpoint(linear / "last.pt", "--resume")
    run.save_checkpoint(tmp_path / "cbp.pt", dict(model=nn.Linear(2, 2)), dict(iteration=3))  # as cbp_occl's
    for argv in (["--resume"], ["--explain", pictures]):
        assert "not a checkpoint of this script" in with_checkpoint(tmp_path / "cbp.pt", *argv)
    (other / "last.pt").write_bytes(b"no checkpoint")
    assert "cannot be read" in mistake("--out", other, "--resume")
    two = make_folders(tmp_path / "two", classes=("ant", "bee"))
    text = mistake("--out", paper.out, "--resume", "--data", two)
    assert "3 classes" in text and "--data" in text


def test_an_ensemble_of_other_scripts_runs_is_refused(paper, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    run.write_json(other / "config.json", dict(preset="toy", head="segformer", data="", out=str(other)))
    assert str(other) in mistake("--out", tmp_path / "out", "--ensemble", paper.out, other)


# ---- the file itself ----

SOURCE = (ROOT / "protopool.py").read_text(encoding="utf-8")
HEADER, BODY = SOURCE.split('"""', 2)[1:]


def test_every_equation_of_the_symbol_table_is_in_the_body():
    table = HEADER[HEADER.index("symbol "):HEADER.index("Where the print")]
    found = set(re.findall(r"Eq\. \(\d\)", table))
    assert found == {"Eq. (1)", "Eq. (2)", "Eq. (3)"} and all(mark in BODY for mark in found)
    for name in re.findall(r"(\w+)\(\)", table):                    # what the column `here` calls a function
        assert f"def {name}(" in BODY, name


def test_slots_similarity_and_losses_paste_into_a_notebook():
    span = SOURCE[SOURCE.index("# ---- slots"):SOURCE.index("# ---- model")]
    names = dict(torch=torch, nn=nn, F=nn.functional, math=math)
    exec(span, names)
    y = names["assign"](torch.randn(3, 2, 8), 0.5)
    d2 = names["squared_distances"](torch.rand(2, 5, 4, 4), torch.rand(8, 5))
    assert torch.isfinite(names["slot_similarity"](d2, y)).all() and names["orthogonality_loss"](y) > 0


# ---- GPU ----

@pytest.mark.gpu
@both_readings
def test_gpu_a_training_step_never_waits_for_the_device(reading):
    cfg = config("unused", "", reading=reading, mixup=True, device="cuda")
    device = torch.device("cuda")
    net = small_net(reading, sharp=1).to(device, memory_format=torch.channels_last)
    optimizer, _ = protopool.build_optimizer(net, "joint", cfg, device)
    x, labels = torch.randn(6, 3, 32, 32).to(device), torch.tensor([0, 1, 2, 0, 1, 2]).to(device)
    net.train()
    for _ in range(3):                                                  # first calls: kernels load
        protopool.train_step(net, optimizer, x, labels, 0.5, cfg)
    torch.cuda.set_sync_debug_mode("error")
    try:
        terms = protopool.train_step(net, optimizer, x, labels, 0.5, cfg)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(v.is_cuda and math.isfinite(v) for v in terms.values())


@pytest.mark.gpu
@both_readings
def test_gpu_a_run_trains_in_bf16_projects_resumes_and_explains(data, pictures, tmp_path, reading):
    metrics = protopool.main(config(tmp_path, data, device="cuda", reading=reading))
    assert metrics["device"] == "cuda" and metrics["prototypes_used"] > 0
    assert script("--out", tmp_path, "--resume").returncode == 0
    assert script("--out", tmp_path, "--explain", pictures).returncode == 0


@pytest.mark.gpu
def test_gpu_projection_equals_cpu():
    x, labels = torch.randint(-4, 5, (7, 3, 4, 4)).float(), torch.arange(7) % 3
    prototypes = torch.randint(-4, 5, (5, 3)).float()
    net = pixel_pool(HELD, prototypes).to("cuda")
    moved_to, found = slow_projection(x, labels, HELD, prototypes)
    sources = project_prototypes(net, batches_of(x, labels, [4, 3]), torch.device("cuda"))
    assert [s[:3] for s in sources] == [s[:3] for s in found]
    assert np.array_equal(net.prototypes.detach().cpu().numpy(), moved_to.astype(np.float32))
