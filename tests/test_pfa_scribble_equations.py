"""PFA from its first equation to a training step: pfa_scribble.py against slow loops written from the paper.

Chan et al., ICML 2024. A few strokes label an image. Where the network is sure of a class, the mean of its
features is a prototype of that class (Eq. 1 to 3); a memory keeps n of them for every class (Eq. 4, 5). A
pixel attends to the prototypes of the classes in its image, and what it finds is added to its features (Eq.
6 to 8). One classifier looks at the features before and after. It learns from the strokes (Eq. 9), and the
two predictions shall agree (Eq. 10). Then whole iterations of all phases, what learns, the constants.
The loops are numpy in float64 and share no line with the script.

[D1] to [D17]: where the print is silent or the released code differs, explained at the top of the script.
B images, N classes (0 is the background), C channels, D hidden ones, M keys, n slots; 255 is not labelled.
"""
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import grad, gradcheck

import pfa_scribble as pfa
from common import run
from pfa_scribble import (FeatureAugmenter, PrototypeMemory, confidence, consistency_loss,
                          extract_prototypes, global_keys, local_keys, partial_cross_entropy)

CPU, N, C = torch.device("cpu"), 4, 4


def normal(*shape, seed=0, size=1.0):
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_present(batch, classes, seed=0):
    """(B,N) bool: background everywhere, the others by chance."""
    present = normal(batch, classes, seed=seed) < 0.3
    present[:, 0] = True
    return present


def array(tensor):
    return tensor.detach().cpu().double().clone().numpy()


def assert_near(actual, expected, tolerance=1e-6):
    """Equal shapes, and differences of at most tolerance * (1 + |expected|); nan is near to nothing."""
    actual, expected = (torch.as_tensor(x).detach().double().cpu() for x in (actual, expected))
    assert actual.shape == expected.shape
    assert ((actual - expected).abs() <= tolerance * (1 + expected.abs())).all()


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


# ---- confidence and local prototypes, Eq. (1) to (3) ------------------------------------------------------

def slow_official(logits):
    """ReLU, then min-max of every map; what is hardly above the minimum is set to 0 before that [D1]."""
    scores = np.zeros(logits.shape)
    for b, t in np.ndindex(*logits.shape[:2]):
        a = np.maximum(logits[b, t], 0)
        low, high = a.min(), a.max()
        scores[b, t] = (np.where(a < low + 1e-5, 0, a) - low - 1e-5) / (high - low + 1e-5)
    return scores


def slow_prototypes(features, scores, present, k):
    """Eq. (1) to (3) for scores without ties."""
    out = np.zeros(scores.shape[:2] + features.shape[1:2])
    for b, t in np.argwhere(present):
        best = sorted(np.ndindex(*scores.shape[2:]), key=lambda pixel: -scores[b, t][pixel])[:k]
        weighted = sum(scores[b, t][pixel] * features[b, :, pixel[0], pixel[1]] for pixel in best)
        mean = weighted / sum(scores[b, t][pixel] for pixel in best)
        out[b, t] = mean / np.sqrt((mean ** 2).sum())
    return out


@pytest.mark.parametrize("shift", [-1.0, 0.0, 8.0])
def test_confidence_is_a_probability_or_the_official_scaled_logit(shift):
    """shift 8: all logits are positive, so the smallest one is above 0 when it is set to 0."""
    logits, present = normal(3, 5, 4, 3, size=2) + shift, some_present(3, 5)
    assert_near(confidence(logits, present), softmax(array(logits), 1))
    assert_near(confidence(logits, present, "official"), slow_official(array(logits)))
    assert_near(confidence(-logits.exp(), present, "official"), -np.ones(logits.shape))     # nothing fires
    with pytest.raises(ValueError, match=r"\(3, 4\) does not fit"):
        confidence(logits, present[:, :4])


@pytest.mark.parametrize("h, w, fraction, k", [(6, 5, 0.08, 2), (7, 4, 1 / 12, 2), (3, 3, 0.08, 1),
                                               (4, 6, 0.45, 10), (3, 4, 1.0, 12)])
def test_prototypes_are_the_loop_and_constants(h, w, fraction, k):
    """Of unit length; 0 where a class is absent; no image knows another; no gradient flows back [D6]."""
    features, scores = normal(3, 6, h, w, seed=1).requires_grad_(), normal(3, 4, h, w).exp().requires_grad_()
    present = some_present(3, 4)
    prototypes = extract_prototypes(features, scores, present, fraction)
    assert_near(prototypes, slow_prototypes(array(features), array(scores), present.numpy(), k))
    assert not prototypes.requires_grad and not present.all() and not prototypes[~present].any()
    for factor in (1e-30, 1e4):                                         # no epsilon below the sum of Eq. (3)
        assert_near(extract_prototypes(features, factor * scores, present, fraction), prototypes)


def test_prototypes_by_hand():
    """2 x 2 pixels, the better half: (0.6 (1,0) + 0.2 (0,3)) / 0.8 = (3,3) / 4, then (1,1) / sqrt 2."""
    features = torch.tensor([[[[1.0, 0], [5, 4]], [[0, 3], [5, 3]]]])   # pixels (1,0) (0,3) / (5,5) (4,3)
    scores, one = torch.tensor([[[[0.6, 0.2], [0.1, 0.0]]]]), torch.ones(1, 1, dtype=torch.bool)
    assert_near(extract_prototypes(features, scores, one, 0.5)[0], [[math.sqrt(1 / 2)] * 2])
    assert_near(extract_prototypes(features, scores, one)[0], [[1, 0]])          # 8 % of four pixels: one


@pytest.mark.parametrize("score", [0.0, 0.25, -1.0])
def test_a_class_that_fires_nowhere_gets_a_plain_mean_and_dark_features_no_nan(score):
    """Scores that are all 0 (underflow) or one negative number (official) cancel: no mirrored mean."""
    features, one = normal(2, 3, 2, 2) + 1, torch.ones(2, 1, dtype=torch.bool)
    features[1] = 0
    prototypes = extract_prototypes(features, torch.full((2, 1, 2, 2), score).double(), one, 1.0)
    assert_near(prototypes[:, 0], F.normalize(features.mean((2, 3))))


# ---- memory of global prototypes, Eq. (4), (5) ------------------------------------------------------------

class SlowMemory:
    """Lists that fill up, then the most similar slot moves: so says the text, Eq. (4) has a minimum [D2]."""

    def __init__(self, classes, slots, momentum):
        self.rows, self.slots, self.momentum = [[] for _ in range(classes)], slots, momentum

    def update(self, prototypes, present):
        for b, t in np.argwhere(present):                               # image by image, class by class
            rows, p = self.rows[t], prototypes[b, t]
            if len(rows) < self.slots:
                rows.append(p)
                continue
            cosine = [p @ q / (np.sqrt(p @ p) * np.sqrt(q @ q)) for q in rows]
            nearest = cosine.index(max(cosine))
            rows[nearest] = self.momentum * rows[nearest] + (1 - self.momentum) * p

    def bank(self, channels):
        empty = np.zeros(channels)
        return np.array([[*rows, *[empty] * (self.slots - len(rows))] for rows in self.rows])


@pytest.mark.parametrize("momentum", [0.99, 0.5, 0.0])
@pytest.mark.parametrize("classes, slots, batch", [(4, 3, 3), (2, 1, 4), (21, 5, 2)])
def test_memory_is_the_loop(classes, slots, batch, momentum):
    """Filling, full, absent classes (which may hold anything), several images a batch; keys after each."""
    slow = SlowMemory(classes, slots, momentum)
    memory = PrototypeMemory(classes, slots, 5, momentum).double()
    for step in range(25):
        present = some_present(batch, classes, seed=step)
        prototypes = F.normalize(normal(batch, classes, 5, seed=100 + step) + 0.3, dim=2)
        memory.update(prototypes, present)
        slow.update(array(prototypes), present.numpy())
        assert_near(memory.bank, slow.bank(5))
        assert memory.count.tolist() == [len(rows) for rows in slow.rows]
        assert memory.full is (min(map(len, slow.rows)) == slots)
        keys, mask = global_keys(memory, present)                       # class by class, every slot [D4]
        for b in range(batch):
            rows = [row for t in range(classes) if present[b, t] for row in slow.rows[t]]
            assert_near(keys[b][mask[b]], np.array(rows))
    assert memory.full and not list(memory.parameters())


# ---- augmentation, Eq. (6) to (8) -------------------------------------------------------------------------

def slow_augment(features, keys, weights):
    """One pixel after the other. keys: for every image those that count, (M,C). weights: name -> array."""
    def linear(name, x):
        return weights[f"augmenter.{name}.weight"] @ x + weights[f"augmenter.{name}.bias"]

    out = np.zeros(features.shape)
    for b, i, j in np.ndindex(len(features), *features.shape[2:]):
        f = features[b, :, i, j]
        e_f = linear("project_feature", f)
        e_fp = np.stack([linear("project_prototype", key) for key in keys[b]])
        attended = softmax(e_fp @ e_f, 0) @ e_fp                        # Eq. (6), no 1 / sqrt(D)
        e = np.maximum(linear("fuse", np.concatenate([attended, e_f])), 0)
        out[b, :, i, j] = np.maximum(f + linear("expand", e), 0)
    return out


@pytest.mark.parametrize("shape, M", [((2, 5, 3, 4), 6), ((1, 5, 1, 1), 1), ((3, 5, 2, 2), 3)])
@pytest.mark.parametrize("size", [0.3, 1.5, 1000.0])
def test_augmenter_is_the_loop(shape, M, size):
    """Whatever masked keys hold, they change nothing, not even where all other logits are far below 0."""
    augmenter = FeatureAugmenter(5, hidden=4).double()
    for seed, parameter in enumerate(augmenter.parameters()):
        parameter.data = normal(*parameter.shape, seed=seed, size=size)
    weights = {f"augmenter.{name}": array(value) for name, value in augmenter.named_parameters()}
    features, keys, mask = normal(*shape), normal(shape[0], M, 5, seed=1), some_present(shape[0], M)
    expected = slow_augment(array(features), [array(keys[b, mask[b]]) for b in range(shape[0])], weights)
    assert (expected > 0).any() and (M == 1 or not mask.all())
    assert_near(augmenter(features, keys, mask), expected)
    assert_near(augmenter(features, torch.where(mask[..., None], keys, 1e4), mask), expected)
    assert size > 1 or gradcheck(lambda f: augmenter(f, keys, mask), features.requires_grad_())


def test_augmenter_by_hand():
    """Attention logits 0 and ln 3: weights 1/4 and 3/4. All layers are copies or sums."""
    augmenter, eye = FeatureAugmenter(2, hidden=2), torch.eye(2)
    layers = dict(project_prototype=eye, project_feature=eye, fuse=torch.eye(2, 4), expand=2 * eye)
    with torch.no_grad():
        for name, weight in layers.items():
            getattr(augmenter, name).weight.copy_(weight)
            getattr(augmenter, name).bias.zero_()
        augmenter.fuse.bias[1] = -1                                     # ReLU(3/4 - 1) = 0
        augmenter.expand.bias[1] = -0.25
    features, mask = torch.tensor([0, math.log(3)]).reshape(1, 2, 1, 1), torch.ones(1, 2, dtype=torch.bool)
    assert_near(augmenter(features, eye[None], mask).flatten(), [0 + 2 * 0.25, math.log(3) - 0.25])
    assert torch.isfinite(augmenter(features, eye[None], ~mask)).all()  # an image without a key
    assert sum(p.numel() for p in FeatureAugmenter(256).parameters()) == 131_712         # D = 128


# ---- losses, Eq. (9), (10) --------------------------------------------------------------------------------

def enlarge(x, size):
    """(B,N,h,w) -> (B,N,*size): linear, the first and the last pixels stay in place [D14]."""
    rows, columns = (np.stack([np.interp(np.linspace(0, small - 1, large), np.arange(small), pixel)
                               for pixel in np.eye(small)], 1) for small, large in zip(x.shape[2:], size))
    return rows @ x @ columns.T


def slow_pce(logits, scribbles):
    """Eq. (9), after the resize."""
    p = softmax(enlarge(logits, scribbles.shape[1:]), 1)
    return np.mean([-np.log(p[b, scribbles[b, i, j], i, j]) for b, i, j in np.argwhere(scribbles != 255)])


def slow_consistency(logits, augmented, reading="paper"):
    """Eq. (10) or another reading of it [D8], pixel by pixel."""
    terms = []
    for b, i, j in np.ndindex(len(logits), *logits.shape[2:]):
        p, p_aug = softmax(logits[b, :, i, j], 0), softmax(augmented[b, :, i, j], 0)
        terms.append({"paper": -(p * np.log(p_aug)).sum(), "mse": ((p - p_aug) ** 2).mean(),
                      "official": -(p_aug * np.log(softmax(p, 0))).sum()}[reading])
    return np.mean(terms)


def some_scribbles(batch, h, w, classes, seed=0):
    labels = torch.randint(classes, (batch, h, w), generator=torch.Generator().manual_seed(seed))
    return torch.where(normal(batch, h, w, seed=seed + 1) < -0.3, labels, 255)


def test_partial_cross_entropy_by_hand():
    """Logits 0 and ln 3: -ln(1/4), -ln(3/4). One pixel in the first image, three in the second: one mean."""
    logits = torch.tensor([0, math.log(3)]).reshape(1, 2, 1, 1).repeat(2, 1, 2, 2).requires_grad_()
    loss = partial_cross_entropy(logits, torch.tensor([[[0, 255], [255, 255]], [[1, 1], [255, 1]]]))
    assert loss.item() == pytest.approx((math.log(4) + 3 * math.log(4 / 3)) / 4, abs=1e-6)
    assert_near(grad(loss, logits)[0][0, :, 0, 0], [(1 / 4 - 1) / 4, (3 / 4) / 4])       # (p - y) / 4 pixels
    nothing = partial_cross_entropy(logits, torch.full((2, 3, 3), 255))
    assert nothing.item() == 0 and not grad(nothing, logits)[0].any()   # backward() goes on


@pytest.mark.parametrize("reading", ["paper", "official", "mse"])
def test_consistency_is_the_loop_with_slopes_to_both_sides(reading):
    both = [normal(2, 3, 3, 2, seed=seed, size=2).requires_grad_() for seed in (0, 1)]
    assert_near(consistency_loss(*both, reading), slow_consistency(*map(array, both), reading))
    assert gradcheck(lambda a, b: consistency_loss(a, b, reading), both)


# ---- phases and losses (Sec. 3.3.3, 3.4) ------------------------------------------------------------------

def settings(preset="toy", **flags):
    return run.make_config(pfa.Config, pfa.PRESETS, preset, out="unused", **flags)


def pixel_net(full=False, **flags):
    """(net, cfg): a pixel's features are a map of its colour. Class 3 is in no training image [D10]."""
    flags |= dict(slots=2, warmup=2, top_fraction=0.2, w_local=0.3, w_local_first=0.7, w_global=0.2)
    cfg, network, memory = settings(**flags), nn.Module(), PrototypeMemory(N, 2, C, 0.7)
    torch.manual_seed(0)
    network.backbone = nn.Conv2d(3, C, 1)
    network.forward = lambda x: (network.backbone(x), None)             # no auxiliary head
    net = pfa.PFA(network, nn.Conv2d(C, N, 1), N, FeatureAugmenter(C, 2), memory).double()
    net.classifier.bias.data += 4                                       # above 0: no ties in official scores
    net.occurs[3] = False
    if full:
        memory.count.fill_(cfg.slots)
        memory.bank.normal_()
    return net, cfg


def pixel_batch(seed=0):
    """x (2,3,4,4), strokes (2,7,7) without class 1 or 2, image 1 without 0; classes of images (2,N)."""
    scribbles, classes = some_scribbles(2, 7, 7, 3, seed), F.pad(some_present(2, 3, seed), (0, 1))
    scribbles[1][scribbles[1] == 0] = 255
    return normal(2, 3, 4, 4, seed=seed), torch.where(scribbles == 1 + seed % 2, 255, scribbles), classes


def slow_conv(weights, name, x):
    weight, bias = weights[f"{name}.weight"][:, :, 0, 0], weights[f"{name}.bias"]
    return np.einsum("cd,bdij->bcij", weight, x) + bias[:, None, None]


def slow_keys(weights, x, present, phase, cfg, memory):
    """{path: keys of each image}; those of x enter the memory before it is used [D10]."""
    if phase == "warmup":
        return {}
    features, keys = slow_conv(weights, "network.backbone", x), {}
    logits = slow_conv(weights, "classifier", features)
    scores = softmax(logits, 1) if cfg.reading == "paper" else slow_official(logits)
    prototypes = slow_prototypes(features, scores, present, 3)          # 20 % of 16 pixels
    if cfg.augment != "global":
        keys["local"] = [prototypes[b][present[b]] for b in range(len(x))]
    if cfg.augment != "local":
        memory.update(prototypes, present)
    if phase == "global":
        keys["global"] = [np.array([row for t in np.flatnonzero(present[b]) for row in memory.rows[t]])
                          for b in range(len(x))]
    return keys


def slow_losses(weights, x, scribbles, keys, phase, cfg):
    """L_pce of the last prediction, or of the one that --pce names [D7]; L_con of each augmented one."""
    features = slow_conv(weights, "network.backbone", x)
    logits = dict(initial=slow_conv(weights, "classifier", features))
    for path, rows in keys.items():
        logits[path] = slow_conv(weights, "classifier", slow_augment(features, rows, weights))
    losses = dict(pce=slow_pce(logits.get(cfg.pce, list(logits.values())[-1]), scribbles))
    fills = phase == "local" and cfg.augment == "both"                  # the memory [D3]
    factors = {"local": 0.7 if fills else 0.3, "global": 0.2}
    for path in keys:
        con = slow_consistency(logits["initial"], logits[path], cfg.reading)
        losses[f"con_{path}"] = factors[path] * con
    return losses


@pytest.mark.parametrize("augment, reading, pce", [
    ("both", "paper", "moves"), ("both", "official", "moves"), ("both", "paper", "local"),
    ("both", "paper", "initial"), ("local", "paper", "moves"), ("global", "official", "moves"),
    ("global", "paper", "local")])
def test_iterations_of_every_phase_are_the_loops(augment, reading, pce):
    """Phases, losses, memory, and in the end the slopes, in which prototypes are constants [D6] and all else
    is not. The official reading takes the classes of the whole image [D9]."""
    net, cfg = pixel_net(augment=augment, reading=reading, pce=pce)
    net.eval()                                                          # no dropout
    memory, phases = SlowMemory(N, 2, 0.7), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for iteration in range(8):
        x, scribbles, image_classes = pixel_batch(iteration)
        phase = pfa.phase_of(net, iteration, cfg)
        later = "global" if all(len(rows) == 2 for rows in memory.rows[:3]) else "local"
        assert phase == ("warmup" if iteration < 2 else later)
        phases.append(phase)
        present = np.array([[t == 0 or (mask == t).any().item() for t in range(N)] for mask in scribbles])
        present |= image_classes.numpy() & (reading == "official")
        weights = {name: array(value) for name, value in net.named_parameters()}
        keys = slow_keys(weights, array(x), present, phase, cfg, memory)
        expected = slow_losses(weights, array(x), scribbles.numpy(), keys, phase, cfg)
        terms = pfa.train_step(net, net, optimizer, scheduler, x, scribbles, image_classes, phase, cfg)
        assert {name: value.item() for name, value in terms.items()} == pytest.approx(expected)
        assert_near(net.memory.bank, memory.bank(C))
    assert set(phases) == {"warmup", "local"} | ({"global"} if augment != "local" else set())
    for name, parameter in net.named_parameters():                      # SGD moved it by rate times slope
        moved, direction = weights[name] - array(parameter), array(normal(*parameter.shape))
        ends = [weights | {name: weights[name] + step * direction} for step in (1e-6, -1e-6)]
        high, low = (sum(slow_losses(end, array(x), scribbles.numpy(), keys, phase, cfg).values())
                     for end in ends)
        slope = (moved * direction).sum() / (0.1 * 0.9 ** 7)
        assert slope == pytest.approx((high - low) / 2e-6, rel=1e-3, abs=1e-5), name


def test_wrong_classes_are_among_the_global_keys_of_training_and_nowhere_else():
    """Each absent class with its probability [D18]; local keys and memory know the true ones alone."""
    net, cfg = pixel_net(full=True, wrong_classes=1.0)
    (x, scribbles, _), before = pixel_batch(), net.eval().memory.bank.clone()
    present = pfa.classes_in(scribbles, N)
    made, (features, logits) = pfa.predictions_of(net, net, x, present, "global", cfg), net(x)
    prototypes = pfa.prototypes_of(features, logits, present, cfg)
    for path, classes in (("local", present), ("global", present | True)):
        assert_near(made[path], net.augmented(features, prototypes, classes, [path])[path])
    assert torch.equal((net.memory.bank != before).any(2).any(1), present.any(0))
    present = some_present(3000, N)
    chosen = net.keys("global", None, present, 0.2)[1].unflatten(1, (N, -1)).all(2)
    assert chosen[present].all() and chosen[~present].double().mean().item() == pytest.approx(0.2, abs=0.03)


def test_a_memory_that_does_not_fill_is_asked_every_20_iterations():
    (net, cfg), phases, asked = pixel_net(), [], []                     # 2 iterations of warm-up
    net.memory_full = lambda: asked.append(len(phases)) or len(phases) >= 45
    for iteration in range(70):
        phases.append(pfa.phase_of(net, iteration, cfg, {*phases}))
    assert asked == [*range(2, 22), 40, 60] and phases == ["warmup"] * 2 + ["local"] * 58 + ["global"] * 10


# ---- the network and what learns --------------------------------------------------------------------------

@pytest.mark.parametrize("augment, phase, paths", [
    ("both", "warmup", []), ("both", "local", ["local"]), ("both", "global", ["local", "global"]),
    ("local", "local", ["local"]), ("global", "local", []), ("global", "global", ["global"])])
def test_a_phase_trains_its_parameters_and_nothing_else(augment, phase, paths):
    net, cfg = pixel_net(phase == "global", augment=augment)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    model, steps = pfa.wrap(net, phase, cfg, run.Machine(CPU)), (net, *pfa.build_optimizer(net, cfg, CPU))
    pfa.train_step(model, *steps, *pixel_batch(), phase, cfg)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    learns = {name for name in before if paths or not name.startswith("augmenter.")}
    learns -= {"memory.bank", "memory.count", "occurs", *([] if paths else ["trained"])}
    if phase != "warmup" and augment != "local":                        # of the classes with strokes alone
        learns |= {"memory.bank", "memory.count"} if phase == "local" else {"memory.bank"}
        assert (net.memory.bank != before["memory.bank"]).any(2).any(1).tolist() == [True, False] * 2
    assert changed == learns and net.paths() == paths
    assert all(p.requires_grad == bool(paths) for p in net.augmenter.parameters())      # or DDP would wait


def test_a_tenth_of_the_channels_is_dropped_out_before_anything_reads_the_features():
    net, _ = pixel_net()                                                # [D6]
    features, logits = net.train()(normal(999, 3, 2, 2))                # whole channels
    assert (features == 0).all(3).all(2).double().mean().item() == pytest.approx(0.1, abs=0.02)
    assert_near(logits, net.classifier(features))


@pytest.mark.parametrize("reading, policy", [("paper", "multistep"), ("official", "linear")])
def test_optimizer_and_schedule(reading, policy):
    """AdamW; a tenth after 60 and 85 %, or linear [D11]; official: LayerNorms do not learn [D12]."""
    cfg = settings(reading=reading, backbone="mit_b0", lr=1e-3, head_lr=10.0, iterations=20)
    net = pfa.build_model(cfg, N)
    optimizer, scheduler = pfa.build_optimizer(net, cfg, CPU)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    norms = [module for module in net.network.backbone.modules() if isinstance(module, nn.LayerNorm)]
    frozen = {p for norm in norms for p in norm.parameters()} if reading == "official" else set()
    assert len(norms) > 20 and {p for p in net.parameters() if not p.requires_grad} == frozen
    assert rates == {p: 1e-3 if name.startswith("network.backbone.") else 1e-2
                     for name, p in net.named_parameters() if p not in frozen}
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["weight_decay"] == 0.01
    for i in range(20):
        factor = 1 - i / 20 if policy == "linear" else 0.1 ** ((i >= 12) + (i >= 17))
        assert scheduler.get_last_lr() == pytest.approx([1e-3 * factor, 1e-2 * factor])
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("head, stride, dilations", [
    ("deeplabv2", 8, [6, 12, 18, 24]), ("deeplabv3plus", 16, [1])])
def test_the_deeplabs_have_strides_of_their_own_and_deeplabv2_dilates(head, stride, dilations):
    net = pfa.build_model(settings(backbone="mobilenet_v2", head=head), N)      # [D13]
    assert net.network.backbone(torch.rand(1, 3, 64, 96))[3].shape[2:] == (64 // stride, 96 // stride)
    layers = [module for module in net.classifier.modules() if isinstance(module, nn.Conv2d)]
    assert [layer.dilation[0] for layer in layers] == dilations


# ---- constants --------------------------------------------------------------------------------------------

EVERY = dict(head_lr=10, momentum=0.99, w_local=0.01, w_global=0.01, weight_decay=0.01, scale_min=0.5,
             scale_max=2, rotation=10, blur=True, head_channels=256, hidden=128, filter=500, pce="moves",
             augment="both", method="pfa", dataset="voc_scribble", train_split="trainaug", val_split="val",
             test_split="val", wrong_classes=0)
PRINTED = {                                                             # Sec. 4.2; released code [D3], [D11]
    "paper": dict(crop=512, batch_size=16, iterations=200 * 662, warmup=30 * 662, lr=3e-5, slots=5,
                  lr_policy="multistep", top_fraction=0.08, confidence="paper", consistency="paper",
                  classes_of="crop", w_local_first=0.01, freeze_norms=False),      # 662 x 16: 10,582 images
    "official": dict(crop=320, batch_size=12, iterations=200 * 882, warmup=30 * 882, lr=6e-5, slots=10,
                     lr_policy="linear", top_fraction=1 / 12, confidence="official", consistency="official",
                     classes_of="image", w_local_first=0.02, freeze_norms=True)}
NETWORKS = {f"voc-b{k}": (f"mit_b{k}", "mlp") for k in (1, 3, 5)}
NETWORKS |= {f"voc-r101-{head}": ("resnet101", head) for head in ("deeplabv2", "deeplabv3plus")}


@pytest.mark.parametrize("reading", list(PRINTED))
@pytest.mark.parametrize("name", list(pfa.PRESETS))
def test_presets_are_the_printed_recipe_and_toy_and_small_our_own(name, reading):
    cfg = settings(name, reading=reading)
    pfa.check_config(cfg)
    if name not in ("toy", "small"):                                    # [D17]
        expected = EVERY | PRINTED[reading] | dict(zip(("backbone", "head"), NETWORKS[name]))
        assert {key: getattr(cfg, key) for key in expected} == expected


# ---- the same in bfloat16 and on a GPU --------------------------------------------------------------------

def one_step(reading, device="cpu", amp=False, kind=torch.float32):
    """A full memory, both augmentations, all losses: [slope of the features, what was computed, loss]."""
    torch.manual_seed(0)
    augmenter, memory = FeatureAugmenter(8, 4).to(device), PrototypeMemory(3, 2, 8, 0.5).to(device)
    features, logits = normal(4, 8, 9, 9).abs(), normal(4, 3, 9, 9, seed=1, size=5) + 50
    features, logits = (x.to(device, kind).requires_grad_() for x in (features, logits))
    present, scribbles = some_present(4, 3).to(device), some_scribbles(4, 21, 21, 3).to(device)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=amp):
        prototypes = extract_prototypes(features, confidence(logits, present, reading), present)
        memory.update(prototypes.repeat(3, 1, 1), present.repeat(3, 1))
        every_key = local_keys(prototypes, present), global_keys(memory, present)
        augmented = [augmenter(10 * features, *keys) for keys in every_key]
        loss = partial_cross_entropy(logits, scribbles)
        loss = loss + sum(consistency_loss(logits, f_aug[:, :3], reading) for f_aug in augmented)
    loss.backward()
    return [features.grad, prototypes, memory.bank, *augmented, augmenter.fuse.weight.grad, loss]


@pytest.mark.parametrize("device, kind", [("cpu", torch.float32), ("cpu", torch.bfloat16),
                                          pytest.param("cuda", torch.float32, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("reading", ["paper", "official"])
def test_bf16_autocast_and_a_gpu_change_nothing(reading, device, kind, amp):
    """Logits near 50 have steps of 1/4 in bf16: all that is computed from them is in float32."""
    there, here = one_step(reading, device, amp, kind), one_step(reading, kind=kind)
    tolerances = [1e-6] * len(here) if device == "cpu" else [1e-3] + [1e-4] * (len(here) - 1)
    for actual, expected, tolerance in zip(there, here, tolerances):
        assert actual.device.type == device
        assert actual.dtype == (kind if actual is there[0] else torch.float32)
        assert_near(actual, expected, tolerance)
