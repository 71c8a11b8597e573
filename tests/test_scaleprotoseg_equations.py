"""ScaleProtoSeg, formula by formula: scaleprotoseg.py against plain loops that share no line with it.

Read it beside the script: a second explanation of the method (Porta et al., WACV 2025) in the paper's order.
Stage 1: pixels are compared with prototypes of their scale, losses, projection. Stage 2: sparse groups of
the frozen prototypes. Then logits, what each phase trains, and the paper's recipes.
P prototypes, C classes, N the most prototypes of a class. Labels are 0..C-1; 255 belongs to no class.
"""
import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import scaleprotoseg as sps
from common import run

# Uneven on purpose, in no order. Prototypes of a class per scale: class 0 has 3, 2, 1; class 1 has 1, 0, 3;
# class 2 has a single one; class 3 has 3, 0, 0; class 4 has none.
CLASS = torch.tensor([0, 1, 3, 0, 2, 0, 1, 3, 0, 1, 3, 0, 1, 0])
SCALE = torch.tensor([2, 0, 0, 0, 1, 1, 2, 0, 0, 2, 0, 1, 2, 0])
P, S, D, C, G = len(CLASS), 3, 5, 5, 3
MEMBERS = torch.tensor([[0, 3, 5, 8, 11, 13], [1, 6, 9, 12, -1, -1], [4, -1, -1, -1, -1, -1],
                        [2, 7, 10, -1, -1, -1], [-1, -1, -1, -1, -1, -1]])              # (C,N)
CPU = torch.device("cpu")
on_devices = pytest.mark.parametrize(
    "device", [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)], ids=str)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=seeded(seed), dtype=torch.float64)


def assert_near(actual, expected, tolerance):
    """Equal shapes, and differences of at most tolerance * (1 + |expected|); nan is near to nothing."""
    actual, expected = (torch.as_tensor(x).detach().double().cpu() for x in (actual, expected))
    assert actual.shape == expected.shape
    assert ((actual - expected).abs() <= tolerance * (1 + expected.abs())).all()


# ---- prototypes and pixels (Sec. 11) ----

def slow_distances(features, prototypes, scale):
    """|z_s - p|^2 for every cell and prototype p, s the scale of p: (B,P,h,w) float64."""
    z = features.cpu().double().unflatten(1, (-1, prototypes.shape[1]))                 # (B,S,D,h,w)
    p = prototypes.cpu().double()[:, :, None, None]
    return torch.stack([(z[:, s] - p[m]).square().sum(1) for m, s in enumerate(scale.tolist())], 1)


@on_devices
@pytest.mark.parametrize("autocast", [False, True])
def test_prototypes_see_their_own_scale_and_a_training_patch_has_similarity_9_21(device, autocast):
    """|z|^2 - 2 z.p + |p|^2 is a difference of numbers near 20: bf16 (error 0.1) or the TF32 of cuDNN (1e-2)
    would spoil it."""
    z, scale = uniform(2, 256, 3, 4).float().to(device), torch.arange(96, device=device) % 4
    patches = z.permute(0, 2, 3, 1).reshape(96, 64).clone()             # cell 0 at its 4 scales, cell 1, ...
    with (torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast),
          torch.backends.cudnn.flags(enabled=True, allow_tf32=True)):
        d2 = sps.prototype_distances(z, patches, scale)
    assert d2.dtype == torch.float32 and d2.device.type == device.type and d2.min() >= 0
    assert_near(d2, slow_distances(z, patches, scale), 5e-5)
    own = d2.permute(0, 2, 3, 1).reshape(24, 96).repeat_interleave(4, 0).diagonal()
    assert sps.log_similarity(own).min() > (9 if device == CPU else 8.5)


def test_log_similarity_by_hand():
    """From ln(1 / eps) = 9.21 at d = 0 down to 0 far away, always falling."""
    d2 = torch.tensor([0, 1e-4, 1e-2, 0.1, 1, 8], dtype=torch.float64, requires_grad=True)
    g = sps.log_similarity(d2)
    assert_near(g, torch.tensor([9.21034, 8.51729, 4.60517, 2.39691, 0.69305, 0.11777]), 1e-5)
    assert_near(torch.autograd.grad(g.sum(), d2)[0], 1 / (d2 + 1) - 1 / (d2 + 1e-4), 1e-6)


def nearest_exact(labels, h, w):
    """Labels (B,H,W) -> (B,h,w): cell i of h shows the row under its centre, floor((i + 1/2) H / h)."""
    rows, columns = ([(2 * i + 1) * old // (2 * new) for i in range(new)]
                     for old, new in zip(labels.shape[1:], (h, w)))
    return labels[:, rows][:, :, columns]


@pytest.mark.parametrize("old, new", [((513, 321), (65, 41)), ((7, 3), (3, 7))])
def test_labels_shrink_to_the_pixel_under_the_centre_of_a_cell(old, new):
    labels = torch.randint(0, 256, (2, *old), generator=seeded(0), dtype=torch.uint8)
    small = sps.nearest_label(labels, new)
    assert small.dtype == torch.uint8 and torch.equal(small, nearest_exact(labels, *new))


# ---- losses of stage 1 (Sec. 6) ----

def slow_diversity(d2, labels, cls=CLASS, scale=SCALE):
    """exp(-J) of every pair of prototypes of one class and scale in every image, then the mean."""
    d2, terms = d2.double(), []
    for b, i, j in np.ndindex(len(d2), len(cls), len(cls)):
        pixels = labels[b] == cls[i]
        if i < j and cls[i] == cls[j] and scale[i] == scale[j] and pixels.sum() > 1:
            log_p, log_q = (x - x.logsumexp(0) for x in (d2[b, i][pixels], d2[b, j][pixels]))
            forward = (log_p.exp() * (log_p - log_q)).sum()
            backward = (log_q.exp() * (log_q - log_p)).sum()
            terms.append((-(forward + backward) / 2).exp())
    return torch.stack(terms).mean() if terms else 0 * d2.sum()


SPREADS = {"usual": lambda x: x, "huge": lambda x: 1e3 + 1e6 * x, "alike": lambda x: x[:, :1] + 0 * x}
LABELS = {                                                              # images in a row: (B,h*w)
    "pairs": [[0, 1, 3, 0, 2, 255, 1, 3, 0, 4, 3, 1], [0, 0, 3, 1, 2, 2, 255, 1, 1, 0, 4, 0]],
    "void": [[255, 255, 255]], "a pixel each": [[0, 1, 255]], "no prototype": [[4, 4, 255]],
    "one prototype": [[2, 2, 2]]}


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("spread", SPREADS)
def test_diversity_loss_is_the_loop(name, spread):
    """Softmax of the raw squared distances over the pixels of the class, Jeffreys, mean of exp(-J). Here
    exp(1000) would overflow. Without any pair the loss is 0."""
    labels = torch.tensor(LABELS[name])[:, None]                        # (B,1,w)
    d2 = SPREADS[spread](uniform(len(labels), P, *labels.shape[1:])).float().requires_grad_()
    losses = sps.diversity_loss(d2, labels.to(torch.uint8), CLASS, SCALE), slow_diversity(d2, labels)
    slopes = [torch.autograd.grad(loss, d2)[0] for loss in losses]
    assert_near(*losses, 1e-5)
    assert_near(*slopes, 1e-4)
    assert name == "pairs" or losses[0] == 0 and not slopes[0].any()


def test_diversity_loss_by_hand():
    """Softmax of the distances (0, ln 2, ln 5) is (1, 2, 5) / 8, of a constant (1, 1, 1) / 3. A second class
    adds three pairs that are alike to one mean."""
    d2 = torch.tensor([[0, math.log(2), math.log(5), 9, 9, 9], [4, 4, 4, 0, 9, 9], *[[0] * 6] * 3])
    labels, scale = torch.tensor([[[6, 6, 6, 255, 1, 1]]]), torch.tensor([1, 1, 2, 2, 2])
    loss = sps.diversity_loss(d2[None, :, None], labels, torch.tensor([6, 6, 1, 1, 1]), scale)
    J = sum((p - 1 / 3) * math.log(3 * p) for p in (1 / 8, 2 / 8, 5 / 8)) / 2
    assert loss.item() == pytest.approx((math.exp(-J) + 3) / 4, abs=1e-6)


# ---- projection ----

def stub_net(prototypes, cls, scale, num_classes):
    """A network whose maps before the sigmoid are its image (B,S*D,h,w)."""
    prototypes = torch.as_tensor(prototypes, dtype=torch.float32)
    backbone = nn.Identity()
    backbone.channels = 1
    net = sps.ScaleProtoSeg(backbone, prototypes.shape[1], range(1, 2 + max(scale)), False, (), True,
                            list(cls), list(scale), num_classes)
    net.prototypes.data.copy_(prototypes)
    net.maps = lambda x: [x] if not net.training else None
    return net


def loader_of(features, masks):
    """features (N,S*D,h,w) as the sigmoid gives them; masks (N,H,W)."""
    return [dict(image=torch.logit(z)[None].clamp(-1000, 1000), mask=mask[None], index=torch.tensor([i]))
            for i, (z, mask) in enumerate(zip(features, masks))]


def slow_projection(features, masks, prototypes, cls, scale):
    """(prototypes that moved, [(image, row, column, squared distance)])"""
    moved, found = prototypes.clone(), []
    for p, start in enumerate(prototypes):
        found.append((-1, -1, -1, math.inf))
        for i, labels in enumerate(nearest_exact(masks, *features.shape[2:])):
            for row, column in (labels == cls[p]).nonzero().tolist():
                patch = features[i, :, row, column].view(-1, len(start))[scale[p]]
                d2 = (patch - start).square().sum().item()
                if d2 < found[p][3]:
                    found[p], moved[p] = (i, row, column, d2), patch
    return moved, found


def projection_task(seed):
    """features, masks, prototypes, their classes and scales. Features are 0, 1/2 or 1, exact after the
    sigmoid: many ties, of which the first wins. Class 4 has no pixel. Two prototypes are equal."""
    features = torch.randint(3, (7, 2 * 3, 3, 4), generator=seeded(seed)) / 2
    masks = torch.randint(4, (7, 7, 9), generator=seeded(seed + 10))
    masks[masks == 3] = 255
    masks[0] = 255
    prototypes = torch.randint(9, (8, 3), generator=seeded(seed + 20)) / 8
    prototypes[7] = prototypes[6]
    return features, masks, prototypes, [0, 1, 2, 4, 2, 1, 0, 0], [0, 1, 0, 1, 1, 0, 0, 0]


@on_devices
@pytest.mark.parametrize("seed", range(3))
def test_projection_moves_prototypes_to_the_nearest_pixel_of_class_and_scale(seed, device):
    """Without such a pixel a prototype stays. Of equal ones of a class and scale the first is kept."""
    features, masks, prototypes, cls, scale = projection_task(seed)
    moved, sources = slow_projection(features, masks, prototypes, cls, scale)
    net = stub_net(prototypes, cls, scale, 5).train().to(device)
    assert sps.project_prototypes(net, loader_of(features, masks), device) == sources
    assert sources[3] == (-1, -1, -1, math.inf) and torch.equal(net.prototypes.cpu(), moved)
    rows = [*zip(moved.tolist(), cls, scale)]
    first = [p for p, row in enumerate(rows) if row not in rows[:p]]
    kept = sps.remove_duplicates(net.prototypes, net.prototype_class, net.prototype_scale)
    assert kept.tolist() == first and len(first) < 8


def project_and_prune(rank=0, world=1):
    """What the images rank::world of three tasks give."""
    for features, masks, *about in map(projection_task, range(3)):
        net, loader = stub_net(*about, 5), loader_of(features, masks)[rank::world]
        sources = sps.project_prototypes(net, loader, CPU)
        yield from (torch.tensor(sources), net.prototypes.data.clone())
        net.prototypes.data.copy_(uniform(8, 3))
        yield sps.prune_prototypes(net, loader, CPU)


def one_of_two(rank, folder):
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save([*project_and_prune(rank, 2)], folder / f"{rank}.pt")


def test_two_processes_share_the_projection_and_find_what_one_does(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)
    for rank in (0, 1):
        shared = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert all(itertools.starmap(torch.equal, zip(shared, project_and_prune(), strict=True)))


@pytest.mark.parametrize("images", [2, 4, 12])
def test_pruning_keeps_prototypes_whose_nearest_patches_show_their_class(images):
    """ProtoSeg: of the 6 images with the nearest cell that is not void, 3 must show the class in it."""
    features = uniform(images, 3, 4, 5, seed=images).float()
    masks = torch.randint(9, (images, 11, 13), generator=seeded(images)) // 2
    masks[masks == 4] = 255
    masks[:, :6][masks[:, :6] == 1] = 0                                 # classes are not spread evenly
    masks[-1] = 255
    cls, prototypes = [0] * 8 + [1] * 8 + [2] * 8, uniform(24, 3).float()       # class 3 has no prototype
    expected = []
    for c, prototype in zip(cls, prototypes):
        rows = []
        for z, mask, labels in zip(features, masks, nearest_exact(masks, 4, 5)):
            d2 = (z - prototype[:, None, None]).square().sum(0).masked_fill(labels == 255, math.inf)
            i, j = divmod(int(d2.argmin()), 5)
            block = mask[i * 11 // 4:-(-(i + 1) * 11 // 4), j * 13 // 5:-(-(j + 1) * 13 // 5)]
            rows.append((d2.min().item(), bool((block == c).any())))
        expected.append(sum(hit for _, hit in sorted(rows)[:6]) >= min(3, images))
    net = stub_net(prototypes, cls, [0] * 24, 4).train()
    assert sps.prune_prototypes(net, loader_of(features, masks), CPU).tolist() == expected
    assert images == 2 or {True, False} == set(expected)


# ---- groups, stage 2 (Sec. 9, 13) ----

def test_project_simplex_is_the_nearest_point():
    """x is on the simplex, and no corner lies on v's side of x: (v - x).(corner - x) <= 0."""
    v = torch.tensor([0.1, 1, 10]).view(3, 1, 1) * normal(3, 6, 12)
    x = sps.project_simplex(v)
    assert x.min() >= 0 and (x.sum(-1) - 1).abs().max() < 1e-6
    assert ((v - x) - ((v - x) * x).sum(-1, keepdim=True)).max() < 1e-6
    by_hand = sps.project_simplex(torch.tensor([[2, 0, 0], [-1, -1, -1], [1.2, 0.4, -3], [0.4, 0, 0]]))
    assert_near(by_hand, torch.tensor([[1, 0, 0], [1 / 3] * 3, [0.9, 0.1, 0], [0.6, 0.2, 0.2]]), 1e-6)


def some_weights():
    """(C,G,N) float64: rows on the simplex over the members of the class, rubbish where there is none."""
    there = (MEMBERS >= 0)[:, None]
    weights = uniform(C, G, 6) * there
    weights[0, :, 1] = 0                                                # sparse, as trained groups are
    return torch.where(there, weights / weights.sum(2, keepdim=True).clamp(min=1e-9), 50)


def slow_groups(d2, weights, members):
    """prod over m of ((d_m + 1) / (d_m + eps))^w_m: a weighted geometric mean, class by class."""
    maps = []
    for c, g in np.ndindex(*weights.shape[:2]):
        powers = [((d2[:, m] + 1) / (d2[:, m] + 1e-4)) ** weights[c, g, n]
                  for n, m in enumerate(members[c].tolist()) if m >= 0]
        maps.append(math.prod(powers, start=torch.ones_like(d2[:, 0])))
    return torch.stack(maps, 1)


@on_devices
@pytest.mark.parametrize("copies", [1, 30])                             # of 150 classes each has a product
def test_group_activations_are_weighted_geometric_means(copies, device):
    """exp(sum of w g) by its other name, channel c G + g, in float32 also under autocast. A class without
    members has activation 1. By hand: the mean of 2 and 8 is 4."""
    order = torch.randperm(P * copies, generator=seeded(0))
    members = torch.cat([torch.where(MEMBERS < 0, -1, order[MEMBERS + P * k]) for k in range(copies)])
    weights, d2 = some_weights().repeat(copies, 1, 1), 0.1 + 8 * uniform(2, P * copies, 2, 3)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        inputs = (x.to(device) for x in (sps.log_similarity(d2), weights, members))
        activations = sps.group_activations(*inputs)
    assert activations.dtype == torch.float32 and (activations[:, (C - 1) * G:C * G] == 1).all()
    assert_near(activations, slow_groups(d2, weights, members), 5e-5)
    g, half = torch.tensor([2.0, 8.0]).log().view(1, 2, 1, 1), torch.tensor([[[0.5, 0.5]]])
    assert sps.group_activations(g, half, torch.tensor([[1, 0]])).item() == pytest.approx(4)


def slow_entropy(weights, members):
    """-sum of w ln(w + 1e-5) over ln n of every group of a class with n >= 2 members, then the mean."""
    rows = []
    for c, g in np.ndindex(*weights.shape[:2]):
        row = weights[c, g][members[c] >= 0].double()
        if len(row) > 1:
            rows.append(-(row * (row + 1e-5).log()).sum() / math.log(len(row)))
    return torch.stack(rows).mean() if rows else 0 * weights.sum()


@pytest.mark.parametrize("members", [MEMBERS, MEMBERS.clamp(max=0)[:, :1], MEMBERS[4:].expand(C, 6)])
def test_entropy_loss_is_the_loop(members):
    """Every class is divided by its own ln n; groups of one prototype are left out, as ln 1 = 0."""
    weights = some_weights()[..., :members.shape[1]]
    assert_near(sps.entropy_loss(weights, members), slow_entropy(weights, members), 1e-6)


def test_entropy_loss_and_threshold_by_hand():
    """1 for equal weights, 0 for a single one, 1 / 2 for two of four. Table 7: weights below alpha become 0;
    what is left is not scaled up, and what equals alpha stays."""
    weights = torch.tensor([[[0.25] * 4, [0, 1, 0, 0], [0.5, 0, 0, 0.5]]])
    members = torch.tensor([[0, 1, 2, 3]])
    assert sps.entropy_loss(weights, members).item() == pytest.approx((1 + 0 + 0.5) / 3, abs=1e-4)
    kept = sps.threshold_groups(torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.2, 0.3, 0.24, 0.26]]), 0.25)
    assert kept.tolist() == torch.tensor([[0.5, 0.25, 0, 0], [0, 0.3, 0, 0.26]]).tolist()


def test_groups_start_on_the_simplex_of_the_prototypes_of_their_class():
    """Drawn by the seed as nn.Linear draws, within 1 / sqrt(n), then projected; members by the class."""
    net = stub_net(uniform(P, D), CLASS, SCALE, C)
    net.start_groups(G, seed=3)
    groups = net.groups
    torch.manual_seed(3)
    draw, expected = 2 * torch.rand(C, G, 6) - 1, torch.zeros(C, G, 6)
    for c, n in enumerate((6, 4, 1, 3)):
        expected[c, :, :n] = sps.project_simplex(draw[c, :, :n] / math.sqrt(n))
    assert_near(groups.weights, expected, 1e-5)
    head = [[1 if c == f // G else -0.5 for f in range(C * G)] for c in range(C)]
    assert torch.equal(groups.members, MEMBERS) and groups.last_layer.weight.tolist() == head


# ---- the network and its logits ----

@torch.no_grad()
def slow_logits(net, x, alpha=0.0):
    """(1,3,H,W) -> similarity (P,h,w), logits (C,h,w), group activations (C,G,h,w) or None; all in numpy."""
    z = net.maps(x)[-1].double().sigmoid()
    d2 = slow_distances(z, net.prototypes, net.prototype_scale)
    maps = similarity = ((d2 + 1) / (d2 + 1e-4)).log()[0]
    head, groups = net.last_layer.weight.double(), None
    if net.groups is not None:
        weights = net.groups.weights.double()
        maps = slow_groups(d2, weights * (weights >= alpha), net.groups.members)[0]
        maps[(net.groups.members < 0).all(1).repeat_interleave(weights.shape[1])] = 0     # [D5]
        head, groups = net.groups.last_layer.weight.double(), maps.unflatten(0, weights.shape[:2]).numpy()
    return similarity.numpy(), torch.einsum("cf,fyx->cyx", head, maps).numpy(), groups


def test_logits_of_every_stage_and_after_prototypes_were_dropped():
    """Stage 1 with its first and its trained last layer, stage 2 before and after the threshold; to all
    of them the log prior is added. Of scale 1 no prototype is left."""
    net, x = stub_net(uniform(P, D), CLASS, SCALE, C).eval(), normal(1, S * D, 3, 4).float()
    cfg, kept = run.make_config(sps.Config, sps.PRESETS, "toy", threshold=0.3), [3, 7, 6, 8, 9, 10, 12, 0]
    before = net.distances(x)
    net.keep(torch.tensor(kept))
    assert_near(net.distances(x), before[:, kept], 1e-6)
    expected = [slow_logits(net, x)[1]]
    net.last_layer.weight.data.copy_(normal(C, 8, seed=1))
    expected.append(slow_logits(net, x)[1])
    assert_near(net.final_logits(x, cfg)[0], expected[1], 1e-4)
    net.start_groups(G)
    net.groups.last_layer.weight.data.copy_(normal(C, C * G, seed=2))
    expected += [slow_logits(net, x)[1], slow_logits(net, x, 0.3)[1]]
    net.log_prior = normal(C).float()
    expected = [slow + net.log_prior.numpy()[:, None, None] for slow in expected]
    for logits, slow in zip(net.logits_of_stages(x, cfg), expected, strict=True):
        assert_near(logits[0], slow, 1e-4)
    assert_near(net.final_logits(x, cfg)[0], expected[3], 1e-4)
    assert_near(net(x)[0][0][0], expected[2], 1e-4)


def small_net(phase="joint", method="scaleprotoseg", **flags):
    """(net, cfg): a new network of 3 classes as it stands in a phase."""
    sizes = dict(depth=6, rates=[1, 2], prototypes=2, protoseg_prototypes=4, device="cpu")
    cfg = run.make_config(sps.Config, sps.PRESETS, "toy", method=method, **sizes | flags)
    torch.manual_seed(0)
    cls, scale = sps.first_prototypes(cfg, 3)
    progress = dict(phase=phase, classes="abc", prototype_class=cls, prototype_scale=scale)
    return sps.build_model(cfg, progress).train(), cfg


@pytest.mark.parametrize("method", sps.PHASES)
def test_the_largest_map_over_the_sizes_of_the_input_counts(method):
    """Dilated convolutions side by side (other methods: summed) on the image and on smaller copies of it. In
    training every size has its loss, and so has the maximum; in a test it is the maximum alone."""
    net, cfg = small_net(method=method, input_scales=[0.5, 0.75], frozen_bn=True)
    x = normal(2, 3, 47, 61).float()

    def maps_of(x):
        maps = [F.conv2d(net.backbone(x), conv.weight, conv.bias, padding=rate, dilation=rate)
                for conv, rate in zip(net.aspp, (1, 2))]
        return torch.cat(maps, 1) if method == "scaleprotoseg" else sum(maps)
    sizes = [maps_of(F.interpolate(x, scale_factor=s, mode="bilinear")) for s in (1, 0.5, 0.75)]
    grown = [F.interpolate(maps, sizes[0].shape[2:], mode="bilinear") for maps in sizes]
    largest = torch.stack(grown).amax(0)
    for found, expected in zip(net.maps(x), (*sizes, largest), strict=True):
        assert_near(found, expected, 1e-6)
    (logits, d2), = net.eval()(x)
    if method == "deeplab":
        assert d2 is None and torch.equal(logits, largest) and net.stages == ("plain",)
    else:
        assert_near(logits[:1], slow_logits(net, x[:1])[1][None], 1e-4)
    assert torch.equal(net.final_logits(x, cfg), logits)
    net.log_prior = torch.arange(logits.shape[1]) - 5.0
    assert_near(net.final_logits(x, cfg), logits + net.log_prior.view(-1, 1, 1), 1e-6)


# ---- a training step (Sec. 6 to 8) ----

def slow_l1(weight, owner):
    return sum(weight[c, f].abs().item() for c, f in np.ndindex(*weight.shape) if c != owner[f])


TRAINS = {"warmup": {"aspp": (0.01, 5e-4), "prototypes": (0.01, 0)},    # part: learning rate, weight decay
          "joint": {"backbone": (1e-3, 5e-4), "aspp": (0.01, 5e-4), "prototypes": (0.01, 0)},
          "finetune": {"last_layer": (0.02, 0)}, "group_warmup": {"groups.weights": (0.03, 0)},
          "group_joint": {"groups.weights": (0.03, 0), "groups.last_layer": (0.03, 0)}}
in_phases = pytest.mark.parametrize("method, phase", [
    (method, phase) for method, phases in sps.PHASES.items() for phase in phases if phase != "project"])


@in_phases
def test_the_terms_of_a_phase_are_means_over_the_sizes_of_the_input(method, phase):
    """Cross entropy over the labelled cells of each grid; diversity loss while prototypes move, L1 on the
    layer that learns, entropy in stage 2. A batch that is void all over has no cross entropy."""
    net, cfg = small_net(phase, method, input_scales=[0.5, 0.75], w_diversity=0.5, w_l1=0.3, w_l1_group=0.2,
                         w_entropy=0.7, frozen_bn=True)
    x, labels = normal(2, 3, 48, 64).float(), torch.randint(4, (2, 48, 64), generator=seeded(0))
    labels[labels == 3] = 255
    ce, diversity = [], []
    for logits, d2 in net(x):
        small = nearest_exact(labels, *logits.shape[2:])
        ce.append(F.cross_entropy(logits, small, ignore_index=255).item())
        if phase in ("warmup", "joint") and method != "deeplab":
            diversity.append(slow_diversity(d2.detach(), small, net.prototype_class, net.prototype_scale))
    expected = dict(ce=np.mean(ce))
    if diversity:
        expected["diversity"] = 0.5 * np.mean(diversity)
    if phase == "finetune":
        expected["l1"] = 0.3 * slow_l1(net.last_layer.weight, net.prototype_class)
    if phase.startswith("group"):
        expected["l1"] = 0.2 * slow_l1(net.groups.last_layer.weight, net.groups.class_of_group)
        expected["entropy"] = 0.7 * slow_entropy(net.groups.weights, net.groups.members).item()
    losses = {name: value.item() for name, value in sps.losses_of(net, net, x, labels, phase, cfg).items()}
    assert losses == pytest.approx(expected, rel=1e-4)
    void = sps.losses_of(net, net, x, torch.full_like(labels, 255), phase, cfg)
    assert void["ce"] == 0 == void.get("diversity", 0)


@pytest.mark.parametrize("frozen_bn", [True, False])
@in_phases
def test_a_phase_trains_its_parameters_at_its_rates_and_nothing_else(method, phase, frozen_bn):
    """Adam, whose rates fall with the power 0.9 in the joint phases. Batch norm learns and counts in `joint`
    alone, and only if it is not frozen. Group weights move, and are on the simplex after every step."""
    net, cfg = small_net(phase, method, frozen_bn=frozen_bn, lr=0.01, backbone_lr=1e-3, finetune_lr=0.02,
                         group_lr=0.03, w_entropy=0.0, **{phase: 10})
    norms = {f"{name}.{key}" for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)
             for key in module.state_dict()}
    learn = {name: rate for name in net.state_dict() for part, rate in TRAINS[phase].items()
             if name.startswith(part) and not (name in norms and frozen_bn)}
    optimizer, scheduler = sps.build_optimizer(net, phase, cfg, CPU)
    assert type(optimizer) is torch.optim.Adam and optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    name_of, before = {p: name for name, p in net.named_parameters()}, copy.deepcopy(net.state_dict())
    net.train()
    for k in range(4):
        factor = (1 - k / 10) ** 0.9 if phase.endswith("joint") else 1
        found = {name_of[p]: (group["lr"] / factor, group["weight_decay"])
                 for group in optimizer.param_groups for p in group["params"]}
        assert found == {name: pytest.approx(learn[name]) for name in name_of.values() if name in learn}
        x, labels = normal(2, 3, 48, 48, seed=k).float(), torch.randint(3, (2, 48, 48), generator=seeded(k))
        sps.train_step(net, net, optimizer, scheduler, x, labels, phase, cfg)
        if phase.startswith("group"):
            assert_near(net.groups.weights.sum(2), torch.ones(3, 3), 1e-5)
            assert net.groups.weights.min() >= 0
    assert {name for p, name in name_of.items() if p.requires_grad} == set(found)
    after = net.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(learn)


def ready_step(phase, device="cpu", **flags):
    """(net, a function that trains it for a step on 4 pictures with the same classes and no void)"""
    net, cfg = small_net(phase, input_scales=[0.5], **flags)
    net = net.to(device)
    optimizer, scheduler = sps.build_optimizer(net, phase, cfg, torch.device(device))
    x, labels = normal(4, 3, 48, 48).float().to(device), torch.arange(48).expand(4, 48, 48).to(device) // 16
    return net, lambda: sps.train_step(net, net, optimizer, scheduler, x, labels, phase, cfg)


@pytest.mark.parametrize("phase", ["joint", "group_joint"])
def test_micro_batches_add_up_to_the_gradient_of_the_batch(phase):
    found = []
    for micro in (0, 1, 3):
        net, step = ready_step(phase, frozen_bn=True, micro_batch=micro)
        found.append(step() | {name: p.grad / p.grad.abs().max() for name, p in net.named_parameters()
                               if p.requires_grad})
    for parts in found[1:]:
        for name, whole in found[0].items():
            assert_near(parts[name], whole, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("phase", ["joint", "group_joint"])
def test_gpu_a_training_step_never_waits_for_the_device_and_is_the_cpus(phase):
    (_, on_cpu), (_, step) = (ready_step(phase, name, amp="off", micro_batch=2) for name in ("cpu", "cuda"))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected, found, _ = on_cpu(), step(), step()                   # the first steps load kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for name, value in expected.items():
        assert_near(found[name], value, 1e-3)


# ---- the paper's recipes (Sec. 6 to 8) ----

CITYSCAPES = dict(
    dataset="cityscapes", train_split="train", project_split="", val_split="val", test_split="val", crop=513,
    scale_min=0.5, scale_max=1.5, test_size=0, test_square=False, input_scales=[], batch_size=10, depth=64,
    backbone="resnet101", output_stride=8, weights="imagenet", frozen_bn=True, rates=[6, 12, 18, 24],
    method="scaleprotoseg", groups=3, prototypes=3, protoseg_prototypes=10, warmup=3000, joint=30000,
    finetune=2000, group_warmup=2000, group_joint=30000, lr=2.5e-4, backbone_lr=2.5e-5, finetune_lr=1e-5,
    group_lr=2.5e-4, weight_decay=5e-4, w_diversity=0.25, w_l1=1e-4, w_l1_group=1e-3, w_entropy=0.05,
    threshold=0.05)
MANY = dict(w_l1=1e-5, w_l1_group=1e-4, w_entropy=0.25, protoseg_prototypes=12, warmup=6000, finetune=4000)
PAPER = {                                       # what differs from Cityscapes, classes, prototypes at first
    "cityscapes": ({}, 19, 228),
    "pascal": (dict(dataset="voc", train_split="trainaug", project_split="train", finetune=6000, crop=321,
                    input_scales=[0.5, 0.75], test_size=513, test_square=True), 21, 252),
    "ade20k": (MANY | dict(dataset="ade20k", joint=60000, crop=512, scale_max=2, test_size=512), 150, 1800),
    "cocostuff": (MANY | dict(dataset="cocostuff164k", joint=100000, crop=321, input_scales=[0.5, 0.75]),
                  182, 2184),
    "em": (dict(dataset="em", train_split="train-1", val_split="val-1", test_split="val-1", backbone="unet",
                weights="none", frozen_bn=False, crop=512, batch_size=2, warmup=0, joint=10000, lr=1e-4,
                finetune=10000, group_warmup=0, group_joint=10000, backbone_lr=1e-4, group_lr=5e-5,
                w_l1_group=1e-4, w_entropy=0.25), 2, 24)}


@pytest.mark.parametrize("name", PAPER)
def test_presets_are_the_papers_recipes(name):
    changes, classes, count = PAPER[name]
    cfg = run.make_config(sps.Config, sps.PRESETS, name)
    sps.check_config(cfg)
    assert {option: getattr(cfg, option) for option in CITYSCAPES} == CITYSCAPES | changes
    cls, scale = sps.first_prototypes(cfg, classes)                     # scale by scale, class by class
    assert [*zip(scale, cls)] == [(s, c) for s in range(4) for c in range(classes) for _ in range(3)]
    assert len(cls) == count
    cfg.method = "protoseg"
    cls, scale = sps.first_prototypes(cfg, classes)
    assert not any(scale) and cls == [c for c in range(classes) for _ in range(cfg.protoseg_prototypes)]
