"""The equations of cbp_occl.py against slow references written from the paper alone.

The references are loops over pixels and classes in float64 and share no line with cbp_occl.py. Where the
paper's print is garbled they follow the readings that the header of cbp_occl.py explains: -log of the ratio,
cosines instead of raw dot products, a mean over the classes that have pixels in both views.

    python -m pytest -q tests/test_cbp_occl_equations.py
"""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cbp_occl import (category_basis_prototypes, category_loss, centroid_loss, class_separability,
                      gram_schmidt, occl_loss, split_views, view_centroids)
from common.run import UserError

IGNORE = 255
N, C, B, H, W = 7, 12, 2, 6, 7          # classes, channels, images, feature rows and columns
ABSENT, ONE_PIXEL = 2, 5                # the two classes of make_batch() without a pair of view centroids


# ---- slow references -----------------------------------------------------------------------------

def slow_gram_schmidt(rows):
    """Alg. 1, lines 3-11: every coefficient is taken from the row a_i as it was drawn."""
    basis = []
    for a in np.asarray(rows, dtype=np.float64):
        temp = np.zeros_like(a)
        for b in basis:
            temp = temp + (a @ b) / (b @ b) * b
        basis.append(a - temp)
    return np.stack(basis)


def slow_split(labels, num_classes):
    """In batch, row, column order: the first floor(n/2) pixels of a class are view 1, the others view 2."""
    views = np.zeros(labels.shape, dtype=np.int64)
    for k in range(num_classes):
        pixels = [p for p in np.ndindex(*labels.shape) if labels[p] == k]
        for position, p in enumerate(pixels):
            views[p] = 1 if position < len(pixels) // 2 else 2
    return views


def slow_nearest(labels, h, w):
    """Row i of h takes row floor(i * rows / h), columns likewise."""
    rows, columns = labels.shape[1:]
    out = np.zeros((len(labels), h, w), dtype=np.int64)
    for b, i, j in np.ndindex(len(labels), h, w):
        out[b, i, j] = labels[b, i * rows // h, j * columns // w]
    return out


def slow_centroids(features, labels, views, num_classes):
    """Eq. 3 in float64: centroids (2,N,C), zero for an empty view, and counts (2,N)."""
    features = features.double()
    counts = np.zeros((2, num_classes))
    centroids = []
    for x in (1, 2):
        for k in range(num_classes):
            total = torch.zeros(features.shape[1], dtype=torch.float64)
            for b, i, j in np.ndindex(*labels.shape):
                if labels[b, i, j] == k and views[b, i, j] == x:
                    total = total + features[b, :, i, j]
                    counts[x - 1, k] += 1
            centroids.append(total / max(counts[x - 1, k], 1))
    return torch.stack(centroids).reshape(2, num_classes, -1), counts


def cosine(a, b):
    return (a @ b) / ((a @ a).sqrt() * (b @ b).sqrt())


def valid_classes(counts):
    return [k for k in range(len(counts[0])) if counts[0][k] > 0 and counts[1][k] > 0]


def category_centroids(centroids):
    return (centroids[0] + centroids[1]) / 2


def slow_ratio(centroids, counts, x, i, tau, keys):
    """The fraction of Eq. 4 for class i, view x (0 or 1): anchor v_xi, negatives keys[j] for j != i."""
    positive = torch.exp(cosine(centroids[0, i], centroids[1, i]) / tau)
    negative = sum(torch.exp(cosine(centroids[x, i], keys[j]) / tau) for j in valid_classes(counts) if j != i)
    return positive / (positive + negative)


def slow_centroid_loss(centroids, counts, tau=0.07, keys=None):
    """Eq. 4 with -log. `keys` replaces the category centroids; by default they are stopped."""
    keys = category_centroids(centroids).detach() if keys is None else keys
    classes = valid_classes(counts)
    if not classes:
        return torch.zeros(2, dtype=torch.float64)
    losses = [[-torch.log(slow_ratio(centroids, counts, x, i, tau, keys)) for i in classes] for x in (0, 1)]
    return torch.stack([sum(view) / len(classes) for view in losses])


def slow_category_loss(centroids, counts, prototypes, tau=0.07):
    """Eq. 5 with -log: v_xi against all N prototypes."""
    classes = valid_classes(counts)
    if not classes:
        return torch.zeros(2, dtype=torch.float64)
    losses = []
    for x in (0, 1):
        terms = []
        for i in classes:
            similar = [torch.exp(cosine(centroids[x, i], w) / tau) for w in prototypes.double()]
            terms.append(-torch.log(similar[i] / sum(similar)))
        losses.append(sum(terms) / len(classes))
    return torch.stack(losses)


def slow_occl(features, labels, prototypes, w_centroid, w_category, tau=0.07, views=None):
    """Eq. 6 from features (B,C,h,w) and labels of any size."""
    num_classes = len(prototypes)
    labels = slow_nearest(labels.numpy(), *features.shape[2:])
    views = slow_split(labels, num_classes) if views is None else views.numpy()
    centroids, counts = slow_centroids(features, labels, views, num_classes)
    l_v = slow_centroid_loss(centroids, counts, tau)
    l_c = slow_category_loss(centroids, counts, prototypes, tau)
    return (w_centroid * (l_v[0] + l_v[1]) + w_category * (l_c[0] + l_c[1])) / 2


# ---- small data ----------------------------------------------------------------------------------

def make_batch(seed=0):
    """features (2,C,6,7), labels (2,6,7): one class absent, one with a single pixel, a tenth ignored."""
    g = torch.Generator().manual_seed(seed)
    present = torch.tensor([k for k in range(N) if k not in (ABSENT, ONE_PIXEL)])
    labels = present[torch.randint(len(present), (B, H, W), generator=g)]
    labels[torch.rand(B, H, W, generator=g) < 0.1] = IGNORE
    labels[1, 2, 3] = ONE_PIXEL
    means = torch.cat([0.3 * torch.randn(N, C, generator=g), torch.zeros(IGNORE + 1 - N, C)])
    features = means[labels].permute(0, 3, 1, 2) + torch.randn(B, C, H, W, generator=g)
    return features.contiguous(), labels


def make_centroids(seed=0):
    """centroids (2,N,C), unequal counts (2,N). Class 1 lacks view 1, class 4 view 2, class 6 both.

    The centroids of empty views hold numbers on purpose: what is valid is for the counts to say.
    """
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(N, C, generator=g)
    centroids = shared + 0.8 * torch.randn(2, N, C, generator=g)
    centroids = centroids * torch.linspace(0.5, 3, 2 * N).reshape(2, N, 1)      # lengths must not matter
    counts = torch.tensor([[3, 0, 9, 1, 4, 6, 0], [3, 2, 10, 1, 0, 7, 0]])
    return centroids, counts


def random_prototypes(seed=0, num_classes=N, channels=C):
    """Unequal lengths, not orthogonal: the losses must be right for a learned classifier too."""
    g = torch.Generator().manual_seed(100 + seed)
    return torch.randn(num_classes, channels, generator=g) * torch.linspace(0.3, 4, num_classes)[:, None]


def gradient(loss, *leaves):
    """Gradients in float64 so that they compare with the references."""
    return [g.double() for g in torch.autograd.grad(loss, leaves)]


def assert_near(actual, expected, tolerance=2e-5):
    """Shapes agree and no entry is off by more than `tolerance` of the largest expected entry."""
    actual = torch.as_tensor(actual).detach().double()
    expected = torch.as_tensor(expected).detach().double()
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max().item()
    assert error <= tolerance * max(expected.abs().max().item(), 1e-3), (error, actual, expected)


# ---- category-basis prototypes: Sec. 3.2, Alg. 1 -------------------------------------------------

def test_gram_schmidt_is_algorithm_1():
    rows = torch.randn(N, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = rows.clone()
    basis = gram_schmidt(rows)
    assert_near(basis, slow_gram_schmidt(rows), 1e-12)
    assert torch.equal(rows, before)                                    # the caller's rows are left alone
    assert_near(basis[0], rows[0], 1e-15)                               # b_1 = a_1: nothing is rescaled


def test_gram_schmidt_by_hand():
    rows = torch.tensor([[2.0, 0, 0], [3, 4, 0], [1, 1, 5]])
    assert_near(gram_schmidt(rows), torch.tensor([[2.0, 0, 0], [0, 4, 0], [0, 0, 5]]), 1e-12)


def test_gram_schmidt_takes_its_coefficients_from_the_drawn_rows():
    """Laeuchli's example: 1 + e^2 rounds to 1, which parts the classical from the modified form.

    Classical (Alg. 1): a_3.b_2 = 0, so b_3 = a_3 - b_1 = (0,-e,0,e). Modified: (0,-e/2,-e/2,e).
    """
    e = 1e-8
    rows = torch.tensor([[1, e, 0, 0], [1, 0, e, 0], [1, 0, 0, e]], dtype=torch.float64)
    expected = torch.tensor([[1, e, 0, 0], [0, -e, e, 0], [0, -e, 0, e]], dtype=torch.float64)
    assert torch.allclose(gram_schmidt(rows).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-6)])
def test_gram_schmidt_keeps_float64_accuracy_where_float32_would_fail(dtype, tolerance):
    """256 rows in 256 dimensions: float32 arithmetic would leave cosines of about 1e-3."""
    rows = torch.randn(256, 256, generator=torch.Generator().manual_seed(1), dtype=dtype)
    basis = gram_schmidt(rows).double()
    unit = basis / basis.norm(dim=1, keepdim=True)
    assert (unit @ unit.T - torch.eye(256, dtype=torch.float64)).abs().max() < tolerance
    assert_near(basis, slow_gram_schmidt(rows), tolerance)


@pytest.mark.parametrize("num_classes, channels", [(5, 16), (7, 8), (8, 8), (150, 256), (256, 256)])
@pytest.mark.parametrize("length", [0.3, 2.0])
def test_prototypes_are_orthogonal_and_of_equal_length(num_classes, channels, length):
    w = category_basis_prototypes(num_classes, channels, length)
    assert w.shape == (num_classes, channels) and w.dtype == torch.float32 and not w.requires_grad
    w = w.double()
    assert (w @ w.T - length ** 2 * torch.eye(num_classes)).abs().max() < 1e-5
    assert (w.norm(dim=1) - length).abs().max() < 1e-5


def test_default_length_is_2():
    assert torch.equal(category_basis_prototypes(N, C), category_basis_prototypes(N, C, length=2.0, seed=0))


@pytest.mark.parametrize("num_classes, channels", [(5, 8), (8, 8), (150, 256)])
def test_prototypes_equal_torch_orthogonal_init_on_the_same_gaussian(num_classes, channels):
    torch.manual_seed(3)
    rows = torch.empty(num_classes, channels).normal_()
    torch.manual_seed(3)
    expected = nn.init.orthogonal_(torch.empty(num_classes, channels), gain=1.5)
    if num_classes == channels:                                 # torch takes a square matrix by its columns
        rows, expected = rows.T, expected.T
    actual = category_basis_prototypes(num_classes, channels, length=1.5, rows=rows)
    assert (actual - expected).abs().max() < 1e-4


def test_rows_replace_the_draw():
    rows = random_prototypes()
    before = rows.clone()
    basis = torch.from_numpy(slow_gram_schmidt(rows))
    unit = basis / basis.norm(dim=1, keepdim=True)
    for seed in (0, 1):
        assert_near(category_basis_prototypes(N, C, 3.0, rows=rows, seed=seed), 3 * unit, 1e-6)
    assert_near(category_basis_prototypes(N, C, 3.0, rows=rows, equal=False), basis, 1e-6)
    assert_near(category_basis_prototypes(N, C, 3.0, rows=rows, orthogonal=False, equal=False), rows, 1e-6)
    assert torch.equal(rows, before)


def test_not_orthogonal_keeps_directions_and_sets_the_length():
    rows = random_prototypes()
    w = category_basis_prototypes(N, C, length=3.0, rows=rows, orthogonal=False)
    assert w.dtype == torch.float32
    for i in range(N):
        assert_near(w[i], 3 * rows[i].double() / rows[i].double().norm(), 1e-6)
    drawn = category_basis_prototypes(N, C, length=3.0, orthogonal=False)
    assert (drawn.norm(dim=1) - 3).abs().max() < 1e-5
    assert (drawn @ drawn.T - torch.diag((drawn * drawn).sum(1))).abs().max() > 0.1


def test_all_four_variants_start_from_the_draw_of_the_seed():
    drawn = category_basis_prototypes(N, C, orthogonal=False, equal=False, seed=4)
    assert drawn.dtype == torch.float32
    for orthogonal, equal in [(True, True), (True, False), (False, True)]:
        from_seed = category_basis_prototypes(N, C, orthogonal=orthogonal, equal=equal, seed=4)
        from_rows = category_basis_prototypes(N, C, rows=drawn, orthogonal=orthogonal, equal=equal)
        assert_near(from_seed, from_rows, 1e-5)


def test_the_draw_is_a_kaiming_initialisation():
    """He et al. 2015: mean 0, variance 2 / fan. The paper leaves open which fan."""
    drawn = category_basis_prototypes(60, 120, orthogonal=False, equal=False)
    std = drawn.std().item()
    assert abs(drawn.mean().item()) < 0.05 * std
    assert min(abs(std / math.sqrt(2 / fan) - 1) for fan in (60, 120)) < 0.05


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_without_equal_the_residuals_shrink_with_the_row_number(seed):
    """E ||b_i||^2 falls as (C - i) / C: early rows are longer, which ties length to class order."""
    w = category_basis_prototypes(150, 256, equal=False, seed=seed).double()
    assert torch.equal(w, category_basis_prototypes(150, 256, length=9.0, equal=False, seed=seed).double())
    squared = w.square().sum(1)
    unit = w / squared.sqrt()[:, None]
    assert (unit @ unit.T - torch.eye(150)).abs().max() < 1e-5
    share = squared * 256 / (256 - torch.arange(150))                   # about the same for every row
    assert abs(share[:75].mean() / share[75:].mean() - 1) < 0.08
    last_to_first = squared[-20:].mean().sqrt() / squared[:20].mean().sqrt()
    assert abs(last_to_first - math.sqrt((256 - 139.5) / (256 - 9.5))) < 0.07


def test_the_draw_depends_on_the_seed_alone_and_leaves_other_generators_alone():
    torch.manual_seed(0)
    first = category_basis_prototypes(N, C, seed=5)
    torch.manual_seed(999)
    np.random.seed(999)
    random.seed(999)
    torch.rand(10)
    states = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
    again = category_basis_prototypes(N, C, seed=5)
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (repr(np.random.get_state()), random.getstate()) == states[1:]
    assert (first - category_basis_prototypes(N, C, seed=6)).abs().max() > 0.1


def test_more_classes_than_channels_is_refused_with_the_remedy():
    for rows in (None, torch.randn(9, 8, generator=torch.Generator().manual_seed(0))):
        with pytest.raises((ValueError, UserError)) as error:
            category_basis_prototypes(9, 8, rows=rows)
        message = str(error.value).lower()
        assert "wider" in message or "head-channels" in message or "head_channels" in message
        assert "9" in message and "8" in message


@pytest.mark.parametrize("length, at_prototype, floor",
                         [(1.0, 4.02, 4.02), (2.0, 3.05, 3.05), (5.0, 0.70, 0.69)])
def test_unit_features_cannot_lower_the_cross_entropy_far(length, at_prototype, floor):
    """Why the pixel loss does not normalise features: with ||f|| = 1 the length T alone bounds it from below.

    On its own prototype a pixel has CE = log(e^T + N-1) - T. The best unit feature also leans away from the
    other rows: f ~ w_i - mean(w), CE = log(1 + (N-1) exp(-T sqrt(N/(N-1)))). CE is convex in f, so a unit f
    whose gradient points along -f is the minimum over the whole unit ball.
    """
    classes, target = 150, torch.tensor([42])
    w = category_basis_prototypes(classes, 256, length).double()
    on_prototype = w[target] / length
    assert F.cross_entropy(on_prototype @ w.T, target).item() == pytest.approx(at_prototype, abs=0.005)
    best = F.normalize(w[target] - w.mean(0), dim=1).requires_grad_()
    loss = F.cross_entropy(best @ w.T, target)
    assert loss.item() == pytest.approx(floor, abs=0.005)
    expected = math.log(1 + (classes - 1) * math.exp(-length * math.sqrt(classes / (classes - 1))))
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    g, = torch.autograd.grad(loss, best)
    assert cosine(g[0], best[0].detach()).item() == pytest.approx(-1, abs=1e-6)


# ---- the two views: Sec. 3.3 ---------------------------------------------------------------------

def test_ordered_split_by_hand():
    labels = torch.tensor([[[0, 1, 0], [1, 255, 0]], [[0, 2, 1], [0, 255, 255]]])
    # class 0 has 5 pixels: 2 + 3, class 1 has 3: 1 + 2, class 2 has 1: view 2
    expected = torch.tensor([[[1, 1, 1], [2, 0, 2]], [[2, 2, 2], [2, 0, 0]]])
    views = split_views(labels, 3)
    assert views.shape == labels.shape and not views.is_floating_point()
    assert torch.equal(views.long(), expected)
    assert torch.equal(split_views(labels, 3, mode="ordered").long(), expected)
    assert torch.equal(split_views(labels, 150).long(), expected)       # absent classes change nothing


@pytest.mark.parametrize("seed, shape", [(0, (B, H, W)), (1, (B, H, W)), (2, (1, 1, 9)), (3, (3, 20, 17))])
def test_ordered_split_is_the_loop(seed, shape):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, N, shape, generator=g)
    labels[torch.rand(shape, generator=g) < 0.2] = IGNORE
    assert np.array_equal(split_views(labels, N).numpy(), slow_split(labels.numpy(), N))


def test_a_class_with_one_pixel_has_no_first_view():
    _, labels = make_batch()
    for mode in ("ordered", "random"):
        assert (split_views(labels, N, mode)[labels == ONE_PIXEL] == 2).all()


def test_random_split_halves_every_class():
    _, labels = make_batch()
    torch.manual_seed(0)
    views = split_views(labels, N, mode="random")
    assert views.shape == labels.shape and not views.is_floating_point()
    assert (views[labels == IGNORE] == 0).all()
    for k in range(N):
        mine = views[labels == k]
        assert (mine == 1).sum() == len(mine) // 2 and (mine == 2).sum() == len(mine) - len(mine) // 2
    assert not torch.equal(views.long(), split_views(labels, N).long())


def test_random_split_follows_torch_random_numbers():
    _, labels = make_batch()
    torch.manual_seed(7)
    first, second = split_views(labels, N, mode="random"), split_views(labels, N, mode="random")
    torch.manual_seed(7)
    assert torch.equal(first, split_views(labels, N, mode="random"))
    assert not torch.equal(first, second)


def test_random_split_gives_every_pixel_an_even_chance():
    labels = torch.tensor([[[0, 0, 1, 1, 0], [1, 0, 1, 0, 1]], [[1, 1, 0, 0, 1], [0, 1, 0, 1, 0]]])
    torch.manual_seed(0)
    draws = 500
    share = sum((split_views(labels, 2, mode="random") == 1).double() for _ in range(draws)) / draws
    assert (share - 0.5).abs().max() < 0.1                              # standard error 0.022


@pytest.mark.parametrize("mode", ["ordered", "random"])
def test_nothing_labelled_gives_no_view(mode):
    assert (split_views(torch.full((B, H, W), IGNORE), N, mode) == 0).all()


# ---- view centroids: Eq. 3 -----------------------------------------------------------------------

def test_view_centroids_are_means_over_pixels():
    features, labels = make_batch()
    views = split_views(labels, N)
    centroids, counts = view_centroids(features, labels, views, N)
    expected, expected_counts = slow_centroids(features, labels.numpy(), views.numpy(), N)
    assert centroids.shape == (2, N, C) and counts.shape == (2, N)
    assert_near(centroids, expected, 1e-6)
    assert np.array_equal(counts.numpy().astype(np.float64), expected_counts)
    assert counts[:, ABSENT].tolist() == [0, 0] and counts[:, ONE_PIXEL].tolist() == [0, 1]
    assert (centroids[:, ABSENT] == 0).all() and (centroids[0, ONE_PIXEL] == 0).all()    # empty, not NaN
    assert_near(centroids[1, ONE_PIXEL], features[1, :, 2, 3], 1e-6)


def test_view_centroids_of_any_views_map_and_memory_format():
    """Any map of 0, 1, 2 will do; a pixel with 0 is in neither mean."""
    features, labels = make_batch(seed=1)
    views = torch.randint(0, 3, labels.shape, generator=torch.Generator().manual_seed(0))
    views[labels == IGNORE] = 0
    expected, expected_counts = slow_centroids(features, labels.numpy(), views.numpy(), N)
    for layout in (torch.contiguous_format, torch.channels_last):
        centroids, counts = view_centroids(features.contiguous(memory_format=layout), labels, views, N)
        assert_near(centroids, expected, 1e-6)
        assert np.array_equal(counts.numpy().astype(np.float64), expected_counts)


def test_gradient_of_view_centroids_is_one_over_the_count():
    features, labels = make_batch()
    features.requires_grad_()
    views = split_views(labels, N)
    centroids, counts = view_centroids(features, labels, views, N)
    weight = torch.randn(2, N, C, generator=torch.Generator().manual_seed(0))
    actual, = gradient((weight * centroids).sum(), features)
    expected = torch.zeros(B, C, H, W, dtype=torch.float64)
    for b, i, j in np.ndindex(B, H, W):
        k, x = labels[b, i, j].item(), views[b, i, j].item() - 1
        if k != IGNORE:
            expected[b, :, i, j] = weight[x, k].double() / counts[x, k].item()
    assert_near(actual, expected, 1e-6)


# ---- centroid loss: Eq. 4 ------------------------------------------------------------------------

def test_centroid_loss_by_hand():
    """Two classes in the plane, views at 0 and 60 degrees and at 90 and 150 degrees, tau = 0.5."""

    def at(degrees):
        return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]

    centroids = torch.tensor([[at(0), at(90)], [at(60), at(150)]])      # s_0 at 30, s_1 at 120 degrees
    positive = math.exp(math.cos(math.radians(60)) / 0.5)

    def term(degrees):                                              # angle between the anchor and the other s
        return -math.log(positive / (positive + math.exp(math.cos(math.radians(degrees)) / 0.5)))
    expected = [(term(120) + term(60)) / 2, (term(60) + term(120)) / 2]
    assert_near(centroid_loss(centroids, torch.ones(2, 2), tau=0.5), torch.tensor(expected), 1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("tau", [0.07, 0.5])
def test_centroid_loss_and_gradient(seed, tau):
    centroids, counts = make_centroids(seed)
    centroids.requires_grad_()
    exact = centroids.detach().double().requires_grad_()
    actual, expected = centroid_loss(centroids, counts, tau), slow_centroid_loss(exact, counts, tau)
    assert actual.shape == (2,)
    assert_near(actual, expected)
    for x in (0, 1):                                                    # each view's loss by itself
        g, = gradient(centroid_loss(centroids, counts, tau)[x], centroids)
        g_expected, = gradient(slow_centroid_loss(exact, counts, tau)[x], exact)
        assert_near(g, g_expected, 1e-4)
        assert (g[:, [1, 4, 6]] == 0).all()                             # classes without both views


def test_centroid_loss_default_temperature():
    centroids, counts = make_centroids()
    assert torch.equal(centroid_loss(centroids, counts), centroid_loss(centroids, counts, tau=0.07))


def test_category_centroid_is_the_plain_mean_of_the_two_view_centroids():
    """Neither a mean of unit vectors nor a mean weighted by pixels: make the three differ and compare."""
    centroids, _ = make_centroids(3)
    centroids[0] *= 5
    counts = torch.tensor([[1] * N, [30] * N])
    exact = centroids.double()
    loss = centroid_loss(centroids, counts)
    assert_near(loss, slow_centroid_loss(exact, counts))
    unit = F.normalize(exact[0], dim=1) + F.normalize(exact[1], dim=1)
    pooled = (exact[0] + 30 * exact[1]) / 31
    for wrong in (unit, pooled):
        assert (loss.double() - slow_centroid_loss(exact, counts, keys=wrong)).abs().max() > 0.02


def test_negatives_are_stopped_and_positives_are_not():
    """The gradient is that of finite differences with the category centroids held still, not moving along."""
    centroids, counts = make_centroids()
    centroids.requires_grad_()
    exact = centroids.detach().double()
    keys = category_centroids(exact)
    step, numeric = 1e-5, torch.zeros(2, N, C, dtype=torch.float64)
    for p in np.ndindex(2, N, C):
        plus, minus = exact.clone(), exact.clone()
        plus[p] += step
        minus[p] -= step
        change = slow_centroid_loss(plus, counts, keys=keys) - slow_centroid_loss(minus, counts, keys=keys)
        numeric[p] = change.sum() / (2 * step)
    actual, = gradient(centroid_loss(centroids, counts).sum(), centroids)
    assert_near(actual, numeric, 1e-4)

    exact.requires_grad_()
    moving, = gradient(slow_centroid_loss(exact, counts, keys=category_centroids(exact)).sum(), exact)
    assert (actual - moving).abs().max() > 0.05 * moving.abs().max()

    first_view, = gradient(centroid_loss(centroids, counts)[0], centroids)  # anchors of L_v(1) are view 1 ...
    assert first_view[1, [0, 2, 3, 5]].abs().max() > 1e-3                   # ... yet view 2 is pulled as well


def test_one_valid_class_has_no_centroid_loss():
    centroids, _ = make_centroids()
    centroids.requires_grad_()
    counts = torch.tensor([[0, 2, 0, 0, 1, 0, 0], [0, 2, 0, 3, 0, 0, 0]])
    loss = centroid_loss(centroids, counts)
    assert loss.shape == (2,) and loss.abs().max() < 1e-6
    g, = gradient(loss.sum(), centroids)
    assert g.abs().max() < 1e-6


def printed_eq_4(centroids, tau):
    """Eq. 4 letter by letter for x = 1: raw dot products, anchors v_j1, stopped centroids SG_j, no log."""
    keys = category_centroids(centroids).detach()
    classes, total = range(len(keys)), 0
    for i in classes:
        positive = torch.exp(centroids[0, i] @ centroids[1, i] / tau)
        negative = sum(torch.exp(centroids[0, j] @ keys[j] / tau) for j in classes if j != i)
        total = total + positive / (negative + positive)
    return total


@pytest.mark.parametrize("seed", range(5))
def test_minimising_the_printed_ratio_would_part_the_views(seed):
    """One small gradient step: Eq. 4 as printed lowers cos(v_1, v_2), with -log it rises."""
    g = torch.Generator().manual_seed(seed)
    start = F.normalize(torch.randn(1, 5, 8, generator=g) + torch.randn(2, 5, 8, generator=g), dim=2)
    counts = torch.full((2, 5), 4)

    def mean_cosine(centroids):
        return F.cosine_similarity(centroids[0], centroids[1], dim=1).mean().item()

    def after_one_step(loss_of):
        centroids = start.double().requires_grad_()
        slope, = torch.autograd.grad(loss_of(centroids), centroids)
        return mean_cosine(centroids.detach() - 1e-3 * slope / slope.norm())

    def ratio_with_cosines(centroids):
        keys = category_centroids(centroids).detach()
        return sum(slow_ratio(centroids, counts, x, i, 0.07, keys) for x in (0, 1) for i in range(5))

    before = mean_cosine(start.double())
    assert after_one_step(lambda v: printed_eq_4(v, 0.07)) < before - 1e-6
    assert after_one_step(ratio_with_cosines) < before - 1e-6
    assert after_one_step(lambda v: centroid_loss(v, counts).sum()) > before + 1e-6


# ---- category loss: Eq. 5 ------------------------------------------------------------------------

def test_category_loss_by_hand():
    """Prototypes 2 e_1, 2 e_2, 2 e_3 and tau = 0.5; class 1 is the only valid one: its target is 1, not 0."""
    prototypes = 2 * torch.eye(3)
    centroids = torch.zeros(2, 3, 3)
    centroids[0, 1] = torch.tensor([0.0, 5, 0])                         # cosines 0, 1, 0
    centroids[1, 1] = torch.tensor([3.0, 4, 0])                         # cosines 0.6, 0.8, 0
    counts = torch.tensor([[0, 2, 0], [0, 3, 1]])
    expected = [math.log(math.exp(2) + 2) - 2, math.log(math.exp(1.2) + math.exp(1.6) + 1) - 1.6]
    assert_near(category_loss(centroids, counts, prototypes, tau=0.5), torch.tensor(expected), 1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("tau", [0.07, 0.5])
def test_category_loss_and_gradient(seed, tau):
    centroids, counts = make_centroids(seed)
    prototypes = random_prototypes(seed).requires_grad_()
    centroids.requires_grad_()
    exact, exact_w = (t.detach().double().requires_grad_() for t in (centroids, prototypes))
    actual = category_loss(centroids, counts, prototypes, tau)
    assert actual.shape == (2,)
    assert_near(actual, slow_category_loss(exact, counts, exact_w, tau))
    for x in (0, 1):
        g, g_w = gradient(category_loss(centroids, counts, prototypes, tau)[x], centroids, prototypes)
        expected, expected_w = gradient(slow_category_loss(exact, counts, exact_w, tau)[x], exact, exact_w)
        assert_near(g, expected, 1e-4)
        assert_near(g_w, expected_w, 1e-4)                          # a learnable classifier is moved as well
        assert (g[1 - x] == 0).all() and (g[:, [1, 4, 6]] == 0).all()


def test_category_loss_default_temperature_and_length_free_prototypes():
    centroids, counts = make_centroids()
    w = category_basis_prototypes(N, C, length=2.0)
    loss = category_loss(centroids, counts, w)
    assert torch.equal(loss, category_loss(centroids, counts, w, tau=0.07))
    assert_near(category_loss(centroids, counts, category_basis_prototypes(N, C, length=0.3)), loss, 1e-5)


# ---- OCCL: Eq. 6 ---------------------------------------------------------------------------------

@pytest.mark.parametrize("w_centroid, w_category", [(1.0, 0.3), (0.4, 0.1), (0.0, 1.0), (1.0, 0.0)])
def test_occl_loss_and_gradient(w_centroid, w_category):
    features, labels = make_batch()
    prototypes = category_basis_prototypes(N, C)
    features.requires_grad_()
    exact = features.detach().double().requires_grad_()
    actual = occl_loss(features, labels, prototypes, w_centroid, w_category)
    expected = slow_occl(exact, labels, prototypes, w_centroid, w_category)
    assert actual.shape == () and actual.dtype == torch.float32
    assert_near(actual, expected)
    g, g_expected = gradient(actual, features)[0], gradient(expected, exact)[0]
    assert_near(g, g_expected, 1e-4)
    ignored = (labels == IGNORE) | (labels == ONE_PIXEL)
    assert (g.permute(0, 2, 3, 1)[ignored] == 0).all()


def test_occl_loss_takes_its_temperature():
    features, labels = make_batch(seed=2)
    prototypes = random_prototypes()
    assert_near(occl_loss(features, labels, prototypes, 1.0, 0.3, tau=0.2),
                slow_occl(features, labels, prototypes, 1.0, 0.3, tau=0.2))
    assert_near(occl_loss(features, labels, prototypes, 1.0, 0.3, tau=0.07),
                slow_occl(features, labels, prototypes, 1.0, 0.3))


def test_occl_gradient_reaches_the_features_with_stopped_negatives():
    features, labels = make_batch()
    prototypes = category_basis_prototypes(N, C)
    features.requires_grad_()
    g, = gradient(occl_loss(features, labels, prototypes, 1.0, 0.0), features)

    exact = features.detach().double().requires_grad_()
    small = labels.numpy()
    centroids, counts = slow_centroids(exact, small, slow_split(small, N), N)
    moving = slow_centroid_loss(centroids, counts, keys=category_centroids(centroids)).sum() / 2
    wrong, = gradient(moving, exact)
    assert (g - wrong).abs().max() > 0.05 * wrong.abs().max()


def test_occl_loss_moves_prototypes_only_if_they_ask_for_it():
    """Frozen prototypes get no gradient; without CBP the learnable classifier holds the keys and moves."""
    features, labels = make_batch()
    features.requires_grad_()
    frozen = random_prototypes()
    occl_loss(features, labels, frozen, 1.0, 0.3).backward()
    assert frozen.grad is None and features.grad is not None

    learned = nn.Parameter(random_prototypes())
    exact = learned.detach().double().requires_grad_()
    g, = gradient(occl_loss(features, labels, learned, 1.0, 0.3), learned)
    expected, = gradient(slow_occl(features.detach(), labels, exact, 1.0, 0.3), exact)
    assert_near(g, expected, 1e-4)


@pytest.mark.parametrize("size", [(24, 28), (25, 31), (13, 7), (6, 50), (3, 4)])
def test_labels_of_any_size_are_brought_to_the_features_by_nearest(size):
    features, _ = make_batch()
    g = torch.Generator().manual_seed(sum(size))
    labels = torch.randint(0, N, (B, *size), generator=g)
    labels[torch.rand(labels.shape, generator=g) < 0.1] = IGNORE
    prototypes = random_prototypes()
    before = labels.clone()
    assert_near(occl_loss(features, labels, prototypes, 1.0, 0.3),
                slow_occl(features, labels, prototypes, 1.0, 0.3))
    assert torch.equal(labels, before)


def test_occl_random_mode_uses_the_random_split():
    features, labels = make_batch()
    prototypes = random_prototypes()
    torch.manual_seed(11)
    actual = occl_loss(features, labels, prototypes, 1.0, 0.3, mode="random")
    torch.manual_seed(11)
    views = split_views(labels, N, mode="random")
    assert_near(actual, slow_occl(features, labels, prototypes, 1.0, 0.3, views=views))


def test_occl_is_float32_inside_bfloat16_autocast():
    features, labels = make_batch()
    prototypes = category_basis_prototypes(N, C)
    half = features.bfloat16().requires_grad_()
    exact = half.detach().double().requires_grad_()
    plain = occl_loss(features, labels, prototypes, 1.0, 0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = occl_loss(features, labels, prototypes, 1.0, 0.3)
        from_half = occl_loss(half, labels, prototypes, 1.0, 0.3)
    expected = slow_occl(exact, labels, prototypes, 1.0, 0.3)
    assert inside.dtype == torch.float32 and from_half.dtype == torch.float32
    assert_near(inside, plain, 1e-6)
    assert_near(from_half, expected)
    assert_near(gradient(from_half, half)[0], gradient(expected, exact)[0], 1e-2)       # stored in bfloat16


def test_occl_of_channels_last_features():
    features, labels = make_batch()
    prototypes = random_prototypes()
    channels_last = features.contiguous(memory_format=torch.channels_last)
    assert_near(occl_loss(channels_last, labels, prototypes, 1.0, 0.3),
                occl_loss(features, labels, prototypes, 1.0, 0.3), 1e-6)


# ---- edge cases ----------------------------------------------------------------------------------

def one_class(labels):
    return torch.where(labels == IGNORE, labels, torch.full_like(labels, 3))


def one_pixel(labels):
    return torch.where(labels == ONE_PIXEL, labels, torch.full_like(labels, IGNORE))


def nothing(labels):
    return torch.full_like(labels, IGNORE)


@pytest.mark.parametrize("mode", ["ordered", "random"])
@pytest.mark.parametrize("case", [one_pixel, nothing])
def test_no_valid_class_gives_exactly_zero_and_a_zero_gradient(case, mode):
    """The loss stays in the graph, so that `loss.backward()` runs and every rank of a DDP run takes part."""
    features, labels = make_batch()
    features.requires_grad_()
    loss = occl_loss(features, case(labels), category_basis_prototypes(N, C), 1.0, 0.3, mode=mode)
    assert loss.item() == 0 and loss.requires_grad
    loss.backward()
    assert features.grad is not None and (features.grad == 0).all()


def test_no_valid_class_gives_zero_for_each_loss():
    centroids, counts = torch.zeros(2, N, C), torch.zeros(2, N, dtype=torch.long)
    counts[1, 3] = 1                                                    # a single pixel: view 2 only
    centroids[1, 3] = 1
    assert centroid_loss(centroids, counts).tolist() == [0, 0]
    assert category_loss(centroids, counts, category_basis_prototypes(N, C)).tolist() == [0, 0]


def test_one_class_keeps_its_category_loss():
    features, labels = make_batch()
    labels = one_class(labels)
    prototypes = category_basis_prototypes(N, C)
    features.requires_grad_()
    exact = features.detach().double().requires_grad_()
    actual = occl_loss(features, labels, prototypes, 1.0, 0.3)
    expected = slow_occl(exact, labels, prototypes, 1.0, 0.3)
    assert expected > 0
    assert_near(actual, expected)
    assert_near(gradient(actual, features)[0], gradient(expected, exact)[0], 1e-4)
    assert occl_loss(features, labels, prototypes, 1.0, 0.0).abs() < 1e-6


@pytest.mark.parametrize("case", [None, one_class, one_pixel, nothing])
def test_dead_features_stay_finite(case):
    """All-zero features (a dead ReLU) have no direction: nothing may become NaN."""
    features, labels = make_batch()
    features = torch.zeros_like(features).requires_grad_()
    labels = labels if case is None else case(labels)
    prototypes = nn.Parameter(category_basis_prototypes(N, C))
    loss = occl_loss(features, labels, prototypes, 1.0, 0.3)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(features.grad).all()
    assert prototypes.grad is None or torch.isfinite(prototypes.grad).all()


# ---- what leaves the method unchanged ------------------------------------------------------------

def test_scaling_the_features_leaves_occl_unchanged():
    features, labels = make_batch()
    prototypes = category_basis_prototypes(N, C)
    features.requires_grad_()
    ten = (10 * features.detach()).requires_grad_()
    loss, scaled = (occl_loss(f, labels, prototypes, 1.0, 0.3) for f in (features, ten))
    assert_near(scaled, loss, 1e-5)
    assert_near(10 * gradient(scaled, ten)[0], gradient(loss, features)[0], 1e-4)


def test_permuting_class_ids_and_rows_leaves_everything_unchanged():
    features, labels = make_batch()
    prototypes = random_prototypes()
    new_id = torch.tensor([4, 0, 6, 2, 5, 1, 3])                        # class k becomes class new_id[k]
    table = torch.full((IGNORE + 1,), IGNORE)
    table[:N] = new_id
    renamed = table[labels]
    rows = torch.empty_like(prototypes)
    rows[new_id] = prototypes

    views, renamed_views = split_views(labels, N), split_views(renamed, N)
    assert torch.equal(views, renamed_views)
    centroids, counts = view_centroids(features, labels, views, N)
    renamed_centroids, renamed_counts = view_centroids(features, renamed, renamed_views, N)
    assert_near(renamed_centroids[:, new_id], centroids, 1e-6)
    assert torch.equal(renamed_counts[:, new_id], counts)
    assert_near(centroid_loss(renamed_centroids, renamed_counts), centroid_loss(centroids, counts), 1e-5)
    assert_near(category_loss(renamed_centroids, renamed_counts, rows),
                category_loss(centroids, counts, prototypes), 1e-5)
    assert_near(occl_loss(features, renamed, rows, 1.0, 0.3),
                occl_loss(features, labels, prototypes, 1.0, 0.3), 1e-5)
    assert class_separability(rows) == pytest.approx(class_separability(prototypes), abs=1e-4)


# ---- class separability: Eq. 8 -------------------------------------------------------------------

@pytest.mark.parametrize("seed", [0, 1, 2])
def test_class_separability_is_the_double_loop_and_the_identity(seed):
    w = random_prototypes(seed)
    exact = w.double().numpy()
    loops = 0.0
    for i in range(N):
        for j in range(N):
            if j != i:
                loops += 0.5 * exact[i] @ exact[j] / (np.linalg.norm(exact[i]) * np.linalg.norm(exact[j]))
    value = class_separability(w)
    assert isinstance(value, float)
    assert value == pytest.approx(loops, abs=1e-5)
    unit = exact / np.linalg.norm(exact, axis=1, keepdims=True)
    assert value == pytest.approx((np.linalg.norm(unit.sum(0)) ** 2 - N) / 2, abs=1e-5)
    assert class_separability(nn.Parameter(w)) == pytest.approx(value, abs=1e-6)    # a learnable classifier


def test_class_separability_is_zero_for_orthogonal_rows_of_any_length():
    assert class_separability(category_basis_prototypes(N, C)) == pytest.approx(0, abs=1e-5)
    assert class_separability(category_basis_prototypes(150, 256)) == pytest.approx(0, abs=1e-3)
    assert class_separability(category_basis_prototypes(N, C, equal=False)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("num_classes", [3, 7, 150])
def test_class_separability_of_a_simplex_is_minus_half_the_classes(num_classes):
    """All its cosines are -1/(N-1): a signed sum can be low, or zero, without orthogonality."""
    simplex = torch.eye(num_classes) - 1 / num_classes
    assert class_separability(3 * simplex) == pytest.approx(-num_classes / 2, abs=1e-3)


def test_class_separability_of_equal_rows_counts_the_pairs():
    assert class_separability(torch.ones(N, C)) == pytest.approx(N * (N - 1) / 2, abs=1e-4)
