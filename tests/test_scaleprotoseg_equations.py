"""The pure functions of scaleprotoseg.py against the definitions of the method, formula by formula.

The references are plain loops in float64 and share no line with scaleprotoseg.py: a second explanation of
the method (Porta et al., WACV 2025). P prototypes, S scales, D channels a scale, C classes, G groups a
class, N the most prototypes that a class has. Labels are 0..C-1; 255 belongs to no class.

    python -m pytest -q tests/test_scaleprotoseg_equations.py
"""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from common.scaleprotoseg_measures import group_overlap
from scaleprotoseg import (diversity_loss, entropy_loss, group_activations, log_similarity, nearest_label,
                           off_class_l1, part_presence, project_simplex, prototype_distances,
                           remove_duplicates, threshold_groups)

# Uneven on purpose, in no order. Prototypes of a class per scale: class 0 has 3, 2, 1; class 1 has 1, 0, 3;
# class 2 has a single one; class 3 has 3, 0, 0; class 4 has none.
CLASS = torch.tensor([0, 1, 3, 0, 2, 0, 1, 3, 0, 1, 3, 0, 1, 0])
SCALE = torch.tensor([2, 0, 0, 0, 1, 1, 2, 0, 0, 2, 0, 1, 2, 0])
P, S, D, C, G = len(CLASS), 3, 5, 5, 3
MEMBERS = torch.tensor([[0, 3, 5, 8, 11, 13], [1, 6, 9, 12, -1, -1], [4, -1, -1, -1, -1, -1],
                        [2, 7, 10, -1, -1, -1], [-1, -1, -1, -1, -1, -1]])              # (C,N)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shuffled(n, seed=0):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def assert_near(actual, expected, tolerance):
    """Equal shapes, and differences of at most tolerance * (1 + |expected|); nan is near to nothing."""
    actual, expected = (torch.as_tensor(x).detach().double().cpu() for x in (actual, expected))
    assert actual.shape == expected.shape
    assert ((actual - expected).abs() <= tolerance * (1 + expected.abs())).all()


# ---- distances: each prototype in the slice of its own scale -------------------------------------

def differences(features, prototypes, scale):
    """z_s - p for every cell and prototype p, s the scale of p: (B,P,D,h,w) float64."""
    z, p = features.detach().cpu().double(), prototypes.detach().cpu().double()
    z = z.unflatten(1, (-1, p.shape[1]))                                # (B,S,D,h,w)
    return torch.stack([z[:, s] - p[m][:, None, None] for m, s in enumerate(scale.tolist())], 1)


def slow_distances(features, prototypes, scale):
    return (differences(features, prototypes, scale) ** 2).sum(2)


@pytest.mark.parametrize("shape", [(3, S * D, 4, 5), (1, S * D, 1, 1), (1, S * D, 7, 2)])
def test_prototype_distances_by_definition(shape):
    """||z_s - p||^2 with channels [sD, sD + D) of the cell; float32 whatever comes in, any memory layout."""
    features, prototypes = uniform(*shape), uniform(P, D, seed=1)
    for kind in (torch.float32, torch.float64, torch.bfloat16):
        z, p = features.to(kind), prototypes.to(kind)
        d2 = prototype_distances(z.contiguous(memory_format=torch.channels_last), p, SCALE)
        assert d2.dtype == torch.float32 and d2.min() >= 0
        assert_near(d2, slow_distances(z, p, SCALE), 1e-5)
        assert_near(prototype_distances(z, p, SCALE), d2, 1e-5)


@pytest.mark.parametrize("scale", [[0, 0, 1, 1, 2, 2], [2, 2, 1, 1, 0, 0], [0, 1, 2, 0, 1, 2],
                                   [2, 0, 2, 2, 0, 2], [1, 1, 1, 1, 1, 1], [2]])
def test_prototypes_come_in_any_order_of_scales(scale):
    """Without duplicates scales are uneven, or even empty: map p still belongs to prototype p."""
    scale = torch.tensor(scale)
    features, prototypes = uniform(2, S * D, 3, 4).float(), uniform(len(scale), D, seed=1).float()
    d2 = prototype_distances(features, prototypes, scale)
    assert_near(d2, slow_distances(features, prototypes, scale), 1e-5)
    order = shuffled(len(scale))
    assert_near(prototype_distances(features, prototypes[order], scale[order]), d2[:, order], 1e-6)


def test_one_scale_is_the_ordinary_prototype_layer():
    """With S = 1 every prototype meets all channels."""
    inputs = uniform(2, D, 3, 4).float(), uniform(4, D, seed=1).float(), torch.zeros(4, dtype=torch.int64)
    assert_near(prototype_distances(*inputs), slow_distances(*inputs), 1e-5)


def test_prototype_distances_pass_gradients_to_their_own_scale_only():
    """d ||z - p||^2 / dz = 2 (z - p), the opposite for p; a scale without prototypes gets none."""
    scale = torch.where(SCALE == 1, 0, SCALE)                           # nobody looks at scale 1
    z, p = uniform(3, S * D, 4, 5).float().requires_grad_(), uniform(P, D, seed=1).float().requires_grad_()
    weight = normal(3, P, 4, 5, seed=2)
    dz, dp = torch.autograd.grad((prototype_distances(z, p, scale) * weight).sum(), (z, p))
    slope, expected = 2 * weight[:, :, None] * differences(z, p, scale), torch.zeros(3, S, D, 4, 5).double()
    for m, s in enumerate(scale.tolist()):
        expected[:, s] += slope[:, m]
    assert_near(dz, expected.flatten(1, 2), 1e-4)
    assert_near(dp, -slope.sum((0, 3, 4)), 1e-4)
    assert (dz[:, D:2 * D] == 0).all() and (dz[:, :D] != 0).all()


def exact_patches(device="cpu"):
    """The paper's 4 scales of 64 channels: 96 prototypes, each an exact copy of one cell of its scale."""
    features, scale = uniform(2, 256, 3, 4).float().to(device), torch.arange(96, device=device) % 4
    cells = features.permute(0, 2, 3, 1).reshape(24, 4, 64)             # (image and cell, scale, channel)
    return features, cells.reshape(96, 64).clone(), scale


def own_distances(d2):
    """(96,): of every prototype of exact_patches() to the cell that it was copied from."""
    return d2.permute(0, 2, 3, 1).reshape(24, 96).repeat_interleave(4, 0).diagonal()


def test_an_exact_patch_keeps_its_similarity_inside_bf16_autocast():
    """A projected prototype is a training patch: d = 0, similarity ln(1e4) = 9.21; d is never negative.

    In bf16, ||z||^2 - 2 z.p + ||p||^2 is a difference of numbers near 20 with 8 binary digits, wrong by 0.1.
    """
    features, prototypes, scale = exact_patches()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        d2 = prototype_distances(features, prototypes, scale)
    for distances in (d2, prototype_distances(features, prototypes, scale)):
        assert distances.dtype == torch.float32 and distances.min() >= 0
        assert_near(distances, slow_distances(features, prototypes, scale), 2e-5)
        assert log_similarity(own_distances(distances)).min() > 9
    half = prototypes.bfloat16()                                        # a patch as a bf16 network gives it
    exact = prototype_distances(half.reshape(24, 256, 1, 1), half, scale)[:, :, 0, 0]
    assert exact.repeat_interleave(4, 0).diagonal().max() < 2e-5


def test_gradients_at_distance_zero_are_finite():
    """The similarity has slope -9999 there, the distance has slope 0."""
    features, prototypes, scale = exact_patches()                       # whole numbers: nothing is rounded
    features, prototypes = features.round().requires_grad_(), prototypes.round().requires_grad_()
    d2 = prototype_distances(features, prototypes, scale)
    assert (own_distances(d2) == 0).all()
    for slope in torch.autograd.grad(log_similarity(d2).sum(), (features, prototypes)):
        assert torch.isfinite(slope).all()


# ---- similarity ----------------------------------------------------------------------------------

def test_log_similarity_by_hand():
    """g = ln((d + 1) / (d + eps)), from ln(1 / eps) = 9.21 at d = 0 down to 0 far away."""
    d2 = torch.tensor([[0, 1e-4, 1e-2], [0.1, 1, 8]], dtype=torch.float64)
    assert_near(log_similarity(d2), torch.tensor([[9.2103, 8.5173, 4.6052], [2.3969, 0.6930, 0.1178]]), 1e-4)
    assert_near(log_similarity(d2), np.log(1 + (1 - 1e-4) / (d2.numpy() + 1e-4)), 1e-6)
    assert log_similarity(torch.zeros(1), eps=0.01).item() == pytest.approx(math.log(100))
    far = log_similarity(torch.tensor([1e3, 1e6, 1e12]))
    assert far.dtype == torch.float32 and far[0].item() == pytest.approx(1e-3, rel=0.01) and far.min() >= 0


def test_log_similarity_slope():
    """1 / (d + 1) - 1 / (d + eps): always falling, steepest at 0."""
    d2 = (8 * uniform(2, 3, 4, 5) ** 4).requires_grad_()
    slope, = torch.autograd.grad(log_similarity(d2).sum(), d2)
    assert_near(slope, 1 / (d2.detach() + 1) - 1 / (d2.detach() + 1e-4), 1e-5)


# ---- diversity loss ------------------------------------------------------------------------------

def slow_diversity(d2, labels, cls, scale):
    """exp(-J) of every pair of prototypes of one class and scale in every image, then the mean; by loops."""
    d2, terms = d2.double(), []
    for b, i, j in np.ndindex(len(d2), len(cls), len(cls)):
        pixels = labels[b] == cls[i]
        if i < j and cls[i] == cls[j] and scale[i] == scale[j] and pixels.sum() > 1:
            log_p, log_q = (x - x.logsumexp(0) for x in (d2[b, i][pixels], d2[b, j][pixels]))
            forward = (log_p.exp() * (log_p - log_q)).sum()
            backward = (log_q.exp() * (log_q - log_p)).sum()
            terms.append((-(forward + backward) / 2).exp())
    return torch.stack(terms).mean() if terms else 0 * d2.sum()


def some_labels(batch, h, w, seed=0):
    """All classes and 255 anywhere, (B,h,w); in the last image no class 1 and a single pixel of class 3."""
    labels = torch.randint(0, 6, (batch, h, w), generator=torch.Generator().manual_seed(seed))
    labels[labels == 5] = 255
    last = labels[-1]
    last[(last == 1) | (last == 3)] = 0
    last[0, 0] = 3
    return labels


def value_and_slope(loss, x):
    value = loss(x)
    assert value.shape == ()
    return value, torch.autograd.grad(value, x)[0]


@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 1, 19), (2, 9, 1), (1, 12, 12)])
@pytest.mark.parametrize("spread, kind", [(1, torch.float64), (6, torch.float32)])
def test_diversity_loss_is_the_loop(shape, spread, kind):
    """Softmax of the raw squared distances over the pixels of the class, Jeffreys, mean of exp(-J)."""
    batch, h, w = shape
    labels, d2 = some_labels(*shape), (spread * uniform(batch, P, h, w)).to(kind).requires_grad_()
    value, slope = value_and_slope(lambda x: diversity_loss(x, labels, CLASS, SCALE), d2)
    expected, expected_slope = value_and_slope(lambda x: slow_diversity(x, labels, CLASS, SCALE), d2)
    assert 0 < expected < 1
    assert_near(value, expected, 2e-6)
    assert_near(slope / expected_slope.abs().max(), expected_slope / expected_slope.abs().max(), 1e-4)
    assert_near(diversity_loss(d2, labels.to(torch.uint8), CLASS, SCALE), expected, 2e-6)


def test_diversity_loss_by_hand():
    """Softmax of the distances (0, ln 2, ln 5) is (1, 2, 5) / 8, of a constant (1, 1, 1) / 3."""
    d2 = torch.full((1, 2, 2, 3), 7.0)                                  # the upper row counts
    d2[0, 0, 0] = torch.tensor([0, math.log(2), math.log(5)])
    d2[0, 0, 1] = torch.tensor([40.0, -3.0, 11.0])
    labels, cls, scale = torch.tensor([[[6, 6, 6], [255, 0, 5]]]), torch.tensor([6, 6]), torch.tensor([1, 1])
    J = sum((p - 1 / 3) * math.log(3 * p) for p in (1 / 8, 2 / 8, 5 / 8)) / 2
    assert diversity_loss(d2, labels, cls, scale).item() == pytest.approx(math.exp(-J), abs=1e-6)
    d2[0, :, 0] = torch.tensor([[math.log(3), 0, 0], [0, 0, 90]])
    labels[0, 0, 2] = 255                                               # (3, 1) / 4 against (1, 1) / 2
    assert diversity_loss(d2, labels, cls, scale).item() == pytest.approx(3 ** (-1 / 8), abs=1e-6)


@pytest.mark.parametrize("size", [1, 1e3])
def test_identical_maps_cost_one(size):
    """J = 0 for all pairs, also if a constant is added to a map: the softmax does not see it."""
    labels = some_labels(3, 4, 5)
    d2 = (size * uniform(3, 1, 4, 5) + size * torch.arange(P).double()[:, None, None] / P).float()
    tolerance = 1e-5 if size == 1 else 1e-3                             # float32 rounds 1000 to 6e-5
    value, slope = value_and_slope(lambda x: diversity_loss(x, labels, CLASS, SCALE), d2.requires_grad_())
    assert value.item() == pytest.approx(1, abs=tolerance)
    assert slope.abs().max() < tolerance                                # J is at its minimum
    same = d2.detach()[:, :1].expand(3, P, 4, 5)
    assert diversity_loss(same, labels, CLASS, SCALE).item() == pytest.approx(1, abs=1e-6)


def test_diversity_loss_is_one_mean_over_all_terms():
    """Three pairs at 1 and one at 0: 3 / 4, not the mean of class means; a second image adds its terms."""
    cls, scale = torch.tensor([0, 1, 0, 1, 0]), torch.tensor([2, 0, 2, 0, 2])
    labels = torch.tensor([[[0, 0, 1, 1]], [[1, 1, 1, 255]]])
    d2 = torch.zeros(2, 5, 1, 4)
    d2[:, 1, 0, 2] = d2[1, 1, 0, 0] = 1e3                               # prototypes 1 and 3 look elsewhere
    assert diversity_loss(d2[:1], labels[:1], cls, scale).item() == pytest.approx(3 / 4)
    assert diversity_loss(d2, labels, cls, scale).item() == pytest.approx(3 / 5)
    assert diversity_loss(d2[1:], labels[1:], cls, scale).item() == pytest.approx(0)


NO_TERMS = {"nothing is labelled": ([[255, 255, 255, 255]], [0, 0, 1, 1], [0, 0, 1, 1]),
            "a class without prototypes": ([[2, 2, 255, 2]], [0, 0, 1, 1], [0, 0, 1, 1]),
            "absent classes": ([[0, 0, 0, 255]], [1, 1, 3, 3], [0, 0, 1, 1]),
            "one pixel a class": ([[0, 1, 255, 255]], [0, 0, 1, 1], [0, 0, 1, 1]),
            "one prototype a class": ([[0, 1, 1, 0]], [0, 1, 2, 3], [0, 0, 0, 0]),
            "one prototype a scale": ([[0, 1, 1, 0]], [0, 1, 0, 1], [0, 0, 1, 1])}


@pytest.mark.parametrize("case", NO_TERMS)
def test_diversity_loss_without_terms_is_zero_with_zero_gradient(case):
    labels, cls, scale = (torch.tensor(x) for x in NO_TERMS[case])
    labels, d2 = labels.expand(2, 1, 4), (1e3 * uniform(2, 4, 1, 4)).float().requires_grad_()
    value, slope = value_and_slope(lambda x: diversity_loss(x, labels, cls, scale), d2)
    assert value.item() == 0 and (slope == 0).all()


def test_diversity_loss_looks_at_pixels_of_the_class_only():
    """Whatever a prototype shows on other classes and on 255 changes neither the value nor the gradient."""
    labels, d2 = some_labels(3, 4, 5), uniform(3, P, 4, 5).requires_grad_()
    own = labels[:, None] == CLASS[:, None, None]                       # (B,P,h,w)
    elsewhere = torch.where(own, d2.detach(), 1e3 * uniform(3, P, 4, 5, seed=1)).requires_grad_()
    value, slope = value_and_slope(lambda x: diversity_loss(x, labels, CLASS, SCALE), d2)
    other_value, other_slope = value_and_slope(lambda x: diversity_loss(x, labels, CLASS, SCALE), elsewhere)
    assert_near(other_value, value, 1e-6)
    assert_near(other_slope, slope, 1e-6)
    assert (slope[~own] == 0).all()
    alone = (labels == 3).sum((1, 2)) == 1                              # the last image: skipped
    assert alone.tolist()[-1] and (slope[-1, CLASS == 3] == 0).all()
    assert (slope[:, CLASS == 2] == 0).all() and (slope[:, 0] == 0).all()   # nobody to compare them with


def test_diversity_loss_does_not_depend_on_any_order():
    """Of prototypes, images or pixels, nor on the numbers of classes and scales; absent classes add none."""
    labels, d2, order = some_labels(3, 4, 5), uniform(3, P, 4, 5), shuffled(P)
    value = diversity_loss(d2, labels, CLASS, SCALE)
    assert_near(diversity_loss(d2[:, order], labels, CLASS[order], SCALE[order]), value, 1e-6)
    assert_near(diversity_loss(d2.flip(0), labels.flip(0), CLASS, SCALE), value, 1e-6)
    assert_near(diversity_loss(d2.mT.flip(2), labels.mT.flip(1), CLASS, SCALE), value, 1e-6)
    renamed = torch.where(labels == 255, 255, (3 * labels + 2) % 7)
    assert_near(diversity_loss(d2, renamed, (3 * CLASS + 2) % 7, 2 - SCALE), value, 1e-6)
    more, cls, scale = uniform(3, 4, 4, 5, seed=1), torch.tensor([7, 7, 9, 9]), torch.tensor([0, 0, 3, 3])
    more, cls, scale = torch.cat([more, d2], 1), torch.cat([cls, CLASS]), torch.cat([scale, SCALE])
    assert_near(diversity_loss(more, labels, cls, scale), value, 1e-6)


def test_prototypes_of_different_scales_are_not_compared():
    """Twins on two scales cost nothing: only what shares class and scale is pushed apart."""
    labels, cls = torch.zeros(1, 2, 3, dtype=torch.int64), torch.tensor([0, 0, 0, 0])
    d2 = torch.zeros(1, 4, 2, 3)
    d2[0, 0, 0, 0] = d2[0, 2, 0, 0] = d2[0, 1, 1, 2] = d2[0, 3, 1, 2] = 100
    assert diversity_loss(d2, labels, cls, torch.tensor([0, 0, 1, 1])).item() == pytest.approx(0, abs=1e-6)
    assert diversity_loss(d2, labels, cls, torch.tensor([0, 1, 0, 1])).item() == pytest.approx(1, abs=1e-6)


def test_large_distances_stay_finite():
    """Distances of 1000: exp(1000) would overflow, and exp(-1000) times its logarithm must not be nan."""
    labels, near = some_labels(3, 4, 5), 1e3 + uniform(3, P, 4, 5)
    peaks = 1e3 * (uniform(3, P, 4, 5, seed=1) > 0.7)
    for d2 in (near, 1e3 * near, peaks, 0.5 * uniform(3, P, 4, 5) + 1e3 * (uniform(3, 1, 4, 5) > 0.5)):
        d2 = d2.float().requires_grad_()
        value, slope = value_and_slope(lambda x: diversity_loss(x, labels, CLASS, SCALE), d2)
        expected, expected_slope = value_and_slope(lambda x: slow_diversity(x, labels, CLASS, SCALE), d2)
        assert_near(value, expected, 1e-5)
        assert_near(slope, expected_slope, 1e-5)


# ---- simplex -------------------------------------------------------------------------------------

def slow_simplex(row):
    """max(v - t, 0) with the t that makes it sum to one, found by bisection."""
    low, high = row.min() - 1, row.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(row - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(row - low, 0)


@pytest.mark.parametrize("shape", [(4,), (1,), (6, 1), (3, 5), (2, 3, 12), (50, 2)])
@pytest.mark.parametrize("size", [0.1, 1, 10])
def test_project_simplex_is_the_nearest_point(shape, size):
    """Against bisection, and by the condition for a nearest point x: (v - x).(corner - x) <= 0."""
    for kind in (torch.float64, torch.float32):
        v = (size * normal(*shape)).to(kind)
        x = project_simplex(v)
        rows = v.double().reshape(-1, shape[-1]).numpy()
        assert x.dtype == kind
        assert_near(x, np.stack([slow_simplex(row) for row in rows]).reshape(shape), 1e-5)
        assert x.min() >= 0 and (x.sum(-1) - 1).abs().max() < 1e-5
        gap = (v - x) - ((v - x) * x).sum(-1, keepdim=True)             # (v - x).(e_n - x), corners e_n
        assert gap.max() < 1e-5 * (1 + size)


def test_project_simplex_by_hand():
    """What exceeds a sum of one is taken from all positive entries alike, what lacks is added to all."""
    rows = torch.tensor([[2, 0, 0], [0.5, 0.5, 0.5], [-1, -1, -1], [1.2, 0.4, -3], [0.6, 0.6, 0.05],
                         [0.4, 0, 0]])
    expected = torch.tensor([[1, 0, 0], [1 / 3] * 3, [1 / 3] * 3, [0.9, 0.1, 0], [0.5, 0.5, 0],
                             [0.6, 0.2, 0.2]])
    assert_near(project_simplex(rows), expected, 1e-6)
    assert project_simplex(torch.tensor([[5.0], [-5.0], [0.0]])).tolist() == [[1], [1], [1]]


def test_points_of_the_simplex_stay():
    """Corners, edges, the middle, random points: projecting them, or projecting twice, changes nothing."""
    points = torch.cat([torch.eye(4).double(), torch.full((1, 4), 0.25).double(),
                        torch.tensor([[0.3, 0, 0.7, 0]]).double(), torch.softmax(3 * normal(20, 4), -1)])
    assert_near(project_simplex(points), points, 1e-6)
    assert_near(project_simplex(points.float()), points, 1e-6)
    once = project_simplex(normal(20, 4))
    assert_near(project_simplex(once), once, 1e-6)
    assert (once == 0).any()                                            # sparse, which a softmax never is


def test_project_simplex_row_by_row():
    """A row is not changed by the others, by adding a constant, or by the order; equal entries stay so."""
    v, order = normal(2, 3, 6), shuffled(6)
    x = project_simplex(v)
    assert_near(torch.stack([torch.stack([project_simplex(row) for row in rows]) for rows in v]), x, 1e-6)
    assert_near(project_simplex(v + 100 * normal(2, 3, 1, seed=1)), x, 1e-5)
    assert_near(project_simplex(v[..., order]), x[..., order], 1e-6)
    assert_near(project_simplex(v.transpose(0, 1)), x.transpose(0, 1), 1e-6)
    assert_near(project_simplex(torch.tensor([1.0, 0.2, 1.0, 0.2])), torch.tensor([0.5, 0, 0.5, 0]), 1e-6)


# ---- groups --------------------------------------------------------------------------------------

def some_weights(seed=0, rubbish=50.0):
    """(C,G,N) float64: rows on the simplex over the members of the class, rubbish where there is none."""
    weights = torch.full((C, G, MEMBERS.shape[1]), rubbish, dtype=torch.float64)
    for c, g in np.ndindex(C, G):
        row = (uniform(C, G, MEMBERS.shape[1], seed=seed)[c, g] ** 3)[MEMBERS[c] >= 0]
        if len(row) > 3:
            row[(c + g) % len(row)] = 0                                 # sparse, as trained groups are
        weights[c, g, MEMBERS[c] >= 0] = row / row.sum()
    return weights


def slow_groups(d2, weights, members):
    """prod over m of ((d_m + 1) / (d_m + eps))^w_m: a weighted geometric mean, class by class."""
    maps = []
    for c, g in np.ndindex(*weights.shape[:2]):
        product = torch.ones_like(d2[:, 0])
        for n, m in enumerate(members[c].tolist()):
            if m >= 0:
                product = product * ((d2[:, m] + 1) / (d2[:, m] + 1e-4)) ** weights[c, g, n]
        maps.append(product)
    return torch.stack(maps, 1)


@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 1, 1), (2, 1, 9)])
def test_group_activations_are_weighted_geometric_means(shape):
    """exp(sum of w g) by its other name, channel c G + g; both similarities and weights learn."""
    d2 = 8 * uniform(shape[0], P, *shape[1:]) ** 4
    similarity = log_similarity(d2).requires_grad_()
    weights, probe = some_weights().requires_grad_(), normal(shape[0], C * G, *shape[1:], seed=2)
    groups = group_activations(similarity, weights, MEMBERS)
    expected = slow_groups(d2, weights.detach(), MEMBERS)
    assert_near(groups, expected, 2e-5)
    slopes = torch.autograd.grad((groups * probe).sum(), (similarity, weights))
    for c, g, n in np.ndindex(*weights.shape):                          # d exp(w g) / dw = exp(w g) g
        m = MEMBERS[c, n].item()
        slope = (expected * probe)[:, c * G + g] * similarity.detach()[:, m] if m >= 0 else torch.zeros(1)
        assert_near(slopes[1][c, g, n], slope.sum(), 1e-4)
    for m in range(P):
        slope = sum(weights.detach()[c, g, n] * (expected * probe)[:, c * G + g]
                    for c, n in (MEMBERS == m).nonzero().tolist() for g in range(G))
        assert_near(slopes[0][:, m], slope, 1e-4)


def test_groups_of_many_classes_are_the_same_formula():
    """ADE20K has 150 classes and 1800 prototypes; here 0 to 6 prototypes a class. Values and slopes."""
    count = torch.arange(150) % 7
    order, there = shuffled(int(count.sum())), torch.arange(6) < count[:, None]         # (C,N)
    members = torch.full((150, 6), -1)
    members[there] = order
    weights = torch.where(there[:, None], uniform(150, 2, 6), 50) / count.clamp(min=1)[:, None, None]
    d2, weights = (0.1 + 8 * uniform(2, len(order), 2, 3)).requires_grad_(), weights.requires_grad_()
    groups, probe = group_activations(log_similarity(d2), weights, members), normal(2, 300, 2, 3, seed=2)
    expected = slow_groups(d2, weights, members)
    assert_near(groups, expected, 2e-5)
    for slope, expected_slope in zip(torch.autograd.grad((groups * probe).sum(), (d2, weights)),
                                     torch.autograd.grad((expected * probe).sum(), (d2, weights))):
        assert_near(slope, expected_slope, 1e-4)


def test_group_activations_by_hand():
    """One-hot weights show (d + 1) / (d + eps) itself; 0.5 and 0.5 the geometric mean of 2 and 8."""
    similarity = torch.log(torch.tensor([2.0, 8.0, 1e4, 3.0])).reshape(1, 4, 1, 1)
    members = torch.tensor([[1, 0], [3, -1], [-1, -1], [-1, 2]])        # a gap may be in front
    weights = torch.tensor([[[0.5, 0.5], [1.0, 0.0]], [[1.0, 9.0], [0.5, -9.0]], [[7.0, 7.0], [-7.0, 7.0]],
                            [[3.0, 1.0], [3.0, 0.25]]])
    groups = group_activations(similarity, weights, members)
    assert groups.shape == (1, 8, 1, 1) and groups.dtype == torch.float32
    assert_near(groups.flatten(), torch.tensor([4, 8, 3, math.sqrt(3), 1, 1, 1e4, 10]), 1e-5)


def test_a_class_without_members_has_activation_one():
    """exp(0): its groups say nothing, and nothing learns from them, not even the last prototype."""
    similarity = log_similarity(uniform(2, P, 3, 3)).float().requires_grad_()
    weights = some_weights(rubbish=1e3).float().requires_grad_()
    empty = group_activations(similarity, weights, MEMBERS)[:, 4 * G:]
    assert (empty == 1).all()
    assert all((slope == 0).all() for slope in torch.autograd.grad(empty.sum(), (similarity, weights)))


def test_group_activations_stay_between_their_members():
    """A mean of a row on the simplex lies between the smallest and the largest member: within [1, 1e4]."""
    similarity, weights = log_similarity(8 * uniform(2, P, 4, 4) ** 4).float(), some_weights().float()
    groups = group_activations(similarity, weights, MEMBERS).reshape(2, C, G, 4, 4)
    for c in range(4):
        own = similarity[:, MEMBERS[c][MEMBERS[c] >= 0]].exp()
        assert (groups[:, c] >= own.amin(1)[:, None] * (1 - 1e-5)).all()
        assert (groups[:, c] <= own.amax(1)[:, None] * (1 + 1e-5)).all()
    top = group_activations(torch.full((1, P, 1, 1), math.log(1e4)), weights, MEMBERS)
    assert_near(top.flatten(), torch.tensor([1e4] * 4 * G + [1] * G), 1e-5)


def test_group_activations_do_not_depend_on_the_order_of_members():
    """Nor on the numbers of the prototypes; classes and groups move as a whole."""
    similarity, weights = log_similarity(uniform(2, P, 3, 4)), some_weights()
    groups = group_activations(similarity, weights, MEMBERS)
    columns, order = shuffled(6), shuffled(P, seed=1)
    assert_near(group_activations(similarity, weights[..., columns], MEMBERS[:, columns]), groups, 1e-5)
    renamed = torch.where(MEMBERS < 0, -1, order.argsort()[MEMBERS.clamp(min=0)])
    assert_near(group_activations(similarity[:, order], weights, renamed), groups, 1e-5)
    turned = group_activations(similarity, weights.flip(0, 1), MEMBERS.flip(0))
    assert_near(turned.reshape(2, C, G, 3, 4).flip(1, 2).flatten(1, 2), groups, 1e-5)


def slow_entropy(weights, members):
    """-sum of w ln(w + 1e-5) over ln n of every group of a class with n >= 2 members, then the mean."""
    weights, rows = weights.double(), []
    for c, g in np.ndindex(*weights.shape[:2]):
        row = weights[c, g][members[c] >= 0]
        if len(row) > 1:
            rows.append(-(row * (row + 1e-5).log()).sum() / math.log(len(row)))
    return torch.stack(rows).mean() if rows else 0 * weights.sum()


@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
def test_entropy_loss_is_the_loop(kind):
    """Every class is divided by its own ln n; groups of one prototype are left out of the mean."""
    for seed in range(3):
        weights = some_weights(seed).to(kind).requires_grad_()
        value, slope = value_and_slope(lambda x: entropy_loss(x, MEMBERS), weights)
        expected, expected_slope = value_and_slope(lambda x: slow_entropy(x, MEMBERS), weights)
        assert (weights == 0).any() and 0.1 < expected < 0.95
        assert_near(value, expected, 1e-6)
        assert_near(slope, expected_slope, 1e-5)
        assert (slope[(MEMBERS < 0)[:, None].expand_as(slope)] == 0).all() and (slope[2] == 0).all()
        columns = shuffled(6, seed)
        assert_near(entropy_loss(weights[..., columns], MEMBERS[:, columns]), value, 1e-6)


def test_entropy_loss_by_hand():
    """1 for equal weights, 0 for a single prototype, 1 / 2 for two of four; rubbish at -1 is ignored."""
    members, rubbish = torch.tensor([[0, 1, 2, 3], [4, 5, -1, -1], [6, -1, -1, -1]]), 1e3
    weights = torch.tensor([[[0.25] * 4, [0, 1, 0, 0], [0.5, 0, 0, 0.5]],
                            [[0.5, 0.5, rubbish, -rubbish], [1, 0, rubbish, 0.5], [0.75, 0.25, 0.5, 0.5]],
                            [[1, 0.5, 0.5, rubbish], [1, 0, 0, 0], [1, 1, 1, 1]]])
    last = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert entropy_loss(weights, members).item() == pytest.approx((1 + 0 + 0.5 + 1 + 0 + last) / 6, abs=1e-4)
    assert entropy_loss(weights[:1, :1], members[:1]).item() == pytest.approx(1, abs=1e-4)
    one_hot = entropy_loss(weights[:1, 1:2], members[:1]).item()
    assert one_hot == pytest.approx(-math.log(1 + 1e-5) / math.log(4), abs=1e-7)


@pytest.mark.parametrize("members", [[[3, -1], [0, -1]], [[-1, -1], [-1, 2]], [[-1, -1], [-1, -1]],
                                     [[1], [0]]])
def test_entropy_loss_is_zero_when_no_group_has_two_prototypes(members):
    """ln 1 = 0 must not become a division: value 0, gradient 0."""
    members = torch.tensor(members)
    weights = torch.ones(2, G, members.shape[1]).requires_grad_()
    value, slope = value_and_slope(lambda x: entropy_loss(x, members), weights)
    assert value.item() == 0 and (slope == 0).all()


def test_threshold_groups_by_hand():
    """Table 7: weights below alpha become 0. What is left is not scaled up, what equals alpha stays."""
    weights = torch.tensor([[[0.5, 0.25, 0.125, 0.125]], [[0.0625, 0.9375, 0, 0]], [[0.2, 0.3, 0.24, 0.26]]])
    before = weights.clone()
    kept = threshold_groups(weights, 0.25)
    assert_near(kept, torch.tensor([[[0.5, 0.25, 0, 0]], [[0, 0.9375, 0, 0]], [[0, 0.3, 0, 0.26]]]), 0)
    assert kept.dtype == torch.float32 and torch.equal(weights, before)
    assert torch.equal(threshold_groups(weights, 0.0), before)
    assert not threshold_groups(weights, 1.5).any()
    random = some_weights().float()
    expected = np.where(random.numpy() < np.float32(0.05), 0, random.numpy())
    assert torch.equal(threshold_groups(random, 0.05), torch.from_numpy(expected))


# ---- labels at the size of the features ----------------------------------------------------------

@pytest.mark.parametrize("old, new", [(513, 65), (321, 41), (321, 31), (321, 21), (512, 65), (257, 33),
                                      (96, 12), (7, 3), (3, 7), (10, 1), (1, 5), (5, 5), (41, 321)])
def test_nearest_label_takes_the_centre(old, new):
    """Cell i of h shows row floor((i + 1/2) H / h) of H, as Pillow's NEAREST; plain "nearest" is i H / h."""
    centre = [(2 * i + 1) * old // (2 * new) for i in range(new)]
    for axes in ((0, 1), (1, 0)):                                       # the other axis keeps its 6 pixels
        labels = torch.arange(2 * old * 6).reshape(2, old, 6).permute(0, *(1 + a for a in axes))
        small = nearest_label(labels, (new, 6) if axes == (0, 1) else (6, new))
        assert small.dtype == torch.int64
        assert torch.equal(small, labels[:, centre] if axes == (0, 1) else labels[:, :, centre])


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32, torch.int64])
def test_nearest_label_agrees_with_pillow_and_keeps_the_type(kind):
    """Two axes at once, 255 among the labels; only labels of the picture come out."""
    labels = some_labels(2, 33, 47).to(kind)
    for h, w in ((5, 6), (33, 47), (11, 20), (50, 60)):
        small = nearest_label(labels, (h, w))
        assert small.dtype == kind and small.shape == (2, h, w)
        for image, got in zip(labels, small):
            expected = Image.fromarray(image.numpy().astype(np.uint8)).resize((w, h), Image.NEAREST)
            assert (got.numpy() == np.asarray(expected)).all()
        assert set(small.unique().tolist()) <= {0, 1, 2, 3, 4, 255}


# ---- duplicates after the projection -------------------------------------------------------------

def test_remove_duplicates_by_hand():
    """Equal vectors of one class and scale are one prototype; of another class or scale they are two."""
    a, b, c = [0.5, 0.25], [0.25, 0.5], [0.5, math.nextafter(0.25, 1)]
    prototypes = torch.tensor([b, a, a, a, a, c, b, a], dtype=torch.float64)
    cls, scale = torch.tensor([0, 0, 0, 1, 0, 0, 0, 0]), torch.tensor([0, 0, 1, 0, 0, 0, 0, 1])
    kept = remove_duplicates(prototypes, cls, scale)
    assert kept.dtype == torch.int64 and kept.tolist() == [0, 1, 2, 3, 5]
    assert remove_duplicates(prototypes.float(), cls, scale).tolist() == [0, 1, 2, 3]   # c rounds to a
    assert remove_duplicates(uniform(P, D).float(), CLASS, SCALE).tolist() == list(range(P))
    assert remove_duplicates(torch.ones(5, D), torch.zeros(5).long(), torch.zeros(5).long()).tolist() == [0]
    assert remove_duplicates(torch.ones(1, D), torch.zeros(1).long(), torch.zeros(1).long()).tolist() == [0]


def test_remove_duplicates_by_brute_force():
    """Few vectors, classes and scales, so that all combinations occur; the first of its kind is kept."""
    for seed in range(5):
        bits, cls, scale = normal(40, 3, seed=seed) > 0, shuffled(40, seed) % 2, shuffled(40, seed + 9) % 2
        rows = [(*bits[m].tolist(), cls[m].item(), scale[m].item()) for m in range(40)]
        first = [m for m, row in enumerate(rows) if row not in rows[:m]]
        assert len(first) < 40
        assert remove_duplicates(0.1 * bits.float(), cls, scale).tolist() == first


# ---- off-class L1 --------------------------------------------------------------------------------

def test_off_class_l1_by_loop():
    """The sum, not the mean, of |w| wherever the row is not the class of the column; slope sign(w)."""
    weight = normal(C, P).requires_grad_()
    value, slope = value_and_slope(lambda x: off_class_l1(x, CLASS), weight)
    others = [(c, m) for c, m in np.ndindex(C, P) if c != CLASS[m]]
    expected = torch.zeros(C, P)
    for c, m in others:
        expected[c, m] = 1 if weight[c, m] > 0 else -1
    assert_near(value, sum(abs(weight[c, m].item()) for c, m in others), 1e-6)
    assert_near(slope, expected, 0)
    start = torch.full((4, 12), -0.5)                                   # 1 for the own class, else -0.5
    columns = torch.arange(12) // 3
    start[columns, torch.arange(12)] = 1
    assert off_class_l1(start, columns).item() == 0.5 * 3 * 12
    order = shuffled(12)
    assert off_class_l1(start[:, order], columns[order]).item() == 18
    assert off_class_l1(torch.eye(3), torch.arange(3)).item() == 0


# ---- overlap of the groups of a class ------------------------------------------------------------

def slow_overlap(activation, percentile):
    shared = covered = 0
    for maps in activation.double().numpy():
        on = [x > np.percentile(x, percentile) for x in maps]
        for i in range(len(on)):
            for j in range(i):
                shared, covered = shared + (on[i] & on[j]).sum(), covered + (on[i] | on[j]).sum()
    return float(shared), float(covered)


@pytest.mark.parametrize("shape", [(3, 4, 13, 17), (1, 2, 9, 8), (5, 3, 1, 30), (2, 1, 9, 9), (0, 3, 4, 4)])
@pytest.mark.parametrize("percentile", [95, 80, 33])
def test_group_overlap_by_brute_force(shape, percentile):
    """Pairs of groups of one class; each map above its own percentile; sums, for one ratio at the end."""
    activation = (9 * uniform(*shape)).exp().float()
    got = group_overlap(activation, percentile)
    assert tuple(float(x) for x in got) == slow_overlap(activation, percentile)
    grown = activation * torch.arange(1, shape[1] + 1)[:, None, None]   # every map has its own scale
    assert tuple(float(x) for x in group_overlap(grown, percentile)) == slow_overlap(activation, percentile)
    turned = group_overlap(activation.flip(0, 1, 2, 3), percentile)
    assert tuple(float(x) for x in turned) == slow_overlap(activation, percentile)


def test_group_overlap_by_hand():
    """The 95th percentile of 0..99 is 94.05: 5 pixels. Shifted by 2 they share 3 of 7, far away 0 of 10."""
    count = torch.arange(100.0)
    maps = torch.stack([count, count.roll(-2), count.flip(0)]).reshape(1, 3, 10, 10)
    assert tuple(float(x) for x in group_overlap(maps)) == (3, 7 + 10 + 10)     # 95 is the default
    flat = torch.full((1, 2, 6, 6), 3.0)                                # nothing is above the percentile
    assert tuple(float(x) for x in group_overlap(flat)) == (0, 0)
    assert tuple(float(x) for x in group_overlap(torch.cat([maps, maps]))) == (6, 54)


def test_group_overlap_of_a_street_scene():
    """4 classes, 2 groups, 1024 x 2048: older torch.quantile refuses more than 16 million values at once."""
    n, shift = 1024 * 2048, 50_000
    count = torch.arange(n, dtype=torch.float32)
    maps = torch.stack([count, count.roll(shift)]).reshape(2, 1024, 2048).expand(4, 2, 1024, 2048)
    active = n - 1 - math.floor(0.95 * (n - 1))                         # of 0..n-1 above the percentile
    shared, covered = (float(x) for x in group_overlap(maps))
    assert (shared, covered) == (4 * (active - shift), 4 * (active + shift))


# ---- parts under a prototype ---------------------------------------------------------------------

def slow_presence(similarity, mask, keypoints, num_parts, quantile):
    similarity, mask = similarity.double().numpy(), mask.numpy()
    present = np.zeros((len(similarity), num_parts), bool)
    for m, values in enumerate(similarity):
        level = np.quantile(values[mask], quantile)
        for part, x, y in keypoints.long().tolist():
            present[m, part - 1] |= bool(mask[y, x]) and values[y, x] > level
    found = keypoints[:, 0].tolist()
    return present.tolist(), [part in found for part in range(1, num_parts + 1)]


def assert_presence(got, expected):
    present, exists = got
    assert present.dtype == exists.dtype == torch.bool
    assert (present.tolist(), exists.tolist()) == expected


@pytest.mark.parametrize("quantile", [0.8, 0.5, 0.93])
@pytest.mark.parametrize("kind", [torch.int64, torch.float32])
def test_part_presence_by_brute_force(quantile, kind):
    """A part is present where one of its keypoints lies on an active pixel of the class."""
    h, w, parts, shown = 14, 23, 6, 0
    for seed in range(4):
        similarity = log_similarity(8 * uniform(4, h, w, seed=seed) ** 3).float()
        mask = uniform(h, w, seed=10 + seed) > 0.3
        points = uniform(40, 3, seed=20 + seed) * torch.tensor([parts - 1, w, h])
        keypoints = (points.long() + torch.tensor([1, 0, 0])).to(kind)  # part 6 does not occur
        for points in (keypoints, keypoints[:5], keypoints[:0]):
            got = part_presence(similarity, mask, points, parts, quantile=quantile)
            assert_presence(got, slow_presence(similarity, mask, points, parts, quantile))
            shown += got[0].sum().item()
    assert shown > 10


def row_of_ten():
    """Similarities 0..9 and 9..0 along a row of ten, and a row of larger ones of another class."""
    count = torch.arange(10.0)
    similarity = torch.stack([torch.stack([count, count + 50]), torch.stack([count.flip(0), count + 50])])
    mask = torch.tensor([[True] * 10, [False] * 10])
    return similarity, mask


def test_part_presence_by_hand():
    """0.8 of 0..9 is 7.2: two active pixels. Points are (part, x, y); the second prototype is mirrored."""
    similarity, mask = row_of_ten()
    keypoints = torch.tensor([[1, 9, 0], [2, 7, 0], [2, 8, 0], [3, 7, 0], [4, 0, 0], [5, 9, 1], [7, 5, 0]])
    present, exists = part_presence(similarity, mask, keypoints, 8)
    assert exists.tolist() == [True, True, True, True, True, False, True, False]
    assert present.tolist() == [[True, True, False, False, False, False, False, False],
                                [False, False, False, True, False, False, False, False]]
    assert part_presence(similarity, mask, keypoints, 8, quantile=0.5)[0][0].tolist() == [
        True, True, True, False, False, False, True, False]             # above 4.5


def test_part_presence_of_hardly_anything():
    """No keypoint, a class of no pixel: nothing is present. A constant map is nowhere above itself."""
    similarity, mask = row_of_ten()
    keypoints = torch.tensor([[1, 9, 0], [2, 3, 1]])
    for points in (keypoints[:0], keypoints[:0].float(), torch.zeros(0, 3, dtype=torch.int64)):
        present, exists = part_presence(similarity, mask, points, 2)
        assert present.shape == (2, 2) and not present.any() and not exists.any()
    present, exists = part_presence(similarity, torch.zeros_like(mask), keypoints, 2)
    assert not present.any() and exists.all()
    everywhere = torch.ones_like(mask)
    assert not part_presence(torch.full((2, 2, 10), 0.7), everywhere, keypoints, 2)[0].any()


def test_part_presence_in_a_street_scene():
    """8 prototypes, 1024 x 2048: older torch.quantile refuses more than 16 million values at once."""
    n = 1024 * 2048
    similarity = torch.arange(n, dtype=torch.float32).reshape(1, 1024, 2048).expand(8, 1024, 2048)
    level = 0.8 * (n - 1)
    rows = [math.floor(level / 2048) - 1, math.ceil(level / 2048) + 1]  # just below and just above
    keypoints = torch.tensor([[1, 700, rows[0]], [2, 700, rows[1]]])
    present, _ = part_presence(similarity, torch.ones(1024, 2048, dtype=torch.bool), keypoints, 2)
    assert present.tolist() == [[False, True]] * 8


# ---- devices -------------------------------------------------------------------------------------

@pytest.mark.gpu
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_tf32_and_autocast_do_not_spoil_distances_on_cuda(tf32, autocast):
    """cuDNN rounds convolutions to TF32 by default: error 1e-2, similarity 4. Distances must escape that."""
    features, prototypes, scale = exact_patches("cuda")
    with (torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32),
          torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast)):
        d2 = prototype_distances(features, prototypes, scale)
    assert d2.dtype == torch.float32 and d2.is_cuda and d2.min() >= 0
    assert_near(d2, slow_distances(features, prototypes, scale), 5e-5)
    assert log_similarity(own_distances(d2)).min() > 8.5


@pytest.mark.gpu
@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_does_not_spoil_groups_and_losses_on_cuda(tf32):
    """exp(9.2) with the 11 binary digits of TF32 would be off by half a percent."""
    d2, labels = (8 * uniform(3, P, 4, 5) ** 4).float(), some_labels(3, 4, 5)
    weights = some_weights().float()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
        results = (group_activations(log_similarity(d2.to("cuda")), weights.to("cuda"), MEMBERS.to("cuda")),
                   diversity_loss(d2.to("cuda"), labels.to("cuda"), CLASS.to("cuda"), SCALE.to("cuda")),
                   entropy_loss(weights.to("cuda"), MEMBERS.to("cuda")))
    expected = (slow_groups(d2.double(), weights.double(), MEMBERS),
                slow_diversity(d2, labels, CLASS, SCALE), slow_entropy(weights, MEMBERS))
    for got, value in zip(results, expected):
        assert got.dtype == torch.float32 and got.is_cuda
        assert_near(got, value, 5e-5)


@pytest.mark.gpu
def test_the_other_functions_on_cuda():
    """Same results as on the CPU, and what is a tensor stays on the device."""
    labels, weights, vectors = some_labels(2, 33, 47), normal(C, G, 6), uniform(P, 1).round().float()
    activation, (similarity, mask) = (9 * uniform(3, 4, 13, 17)).exp().float(), row_of_ten()
    keypoints = torch.tensor([[1, 9, 0], [2, 7, 0], [3, 9, 1]])
    calls = [(project_simplex, weights), (threshold_groups, weights, 0.05), (nearest_label, labels, (5, 6)),
             (remove_duplicates, vectors, CLASS, SCALE), (off_class_l1, normal(C, P), CLASS)]
    for function, *inputs in calls:
        moved = function(*(x.to("cuda") if torch.is_tensor(x) else x for x in inputs))
        assert moved.is_cuda and moved.dtype == function(*inputs).dtype
        assert_near(moved, function(*inputs), 1e-6)
    assert tuple(float(x) for x in group_overlap(activation.to("cuda"))) == slow_overlap(activation, 95)
    moved = part_presence(similarity.to("cuda"), mask.to("cuda"), keypoints.to("cuda"), 3)
    assert_presence(moved, slow_presence(similarity, mask, keypoints, 3, 0.8))
