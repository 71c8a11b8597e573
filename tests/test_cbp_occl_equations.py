"""CBP + OCCL (Chen et al., Pattern Recognition 2024), equation by equation: read it beside cbp_occl.py.

The logits of a pixel are the products of its feature with one row for each class. CBP draws the rows once,
makes them orthogonal and equally long (Alg. 1) and never trains them: no classes are alike, none is favoured.
OCCL works on means: the pixels of each class in a batch are cut into two views, and the mean features of the
views (Eq. 3) are drawn to each other, away from the other classes (Eq. 4), and to the row of their class
(Eq. 5). Eq. (6) adds these up, and Eq. (7) adds the cross-entropy of the pixels.

The references are loops in float64 written from the paper, and share no line with the script. Where the print
is garbled they follow the readings [D1] to [D13] of the script's header.
"""
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cbp_occl
from cbp_occl import (PrototypeClassifier, category_basis_prototypes, category_loss, centroid_loss,
                      gram_schmidt, occl_loss, pixel_loss, split_views, view_centroids)
from common import run
from common.cbp_occl_measures import class_separability, mean_abs_cosine

N, C, B, H, W = 7, 12, 2, 6, 7          # classes, channels, images, feature rows and columns
ABSENT, ONE_PIXEL, IGNORE = 2, 5, 255   # the two classes of make_labels() without a pair of view centroids


def assert_near(actual, expected, tolerance=2e-5):
    """Shapes agree and no entry is off by more than `tolerance` of the largest expected entry."""
    actual, expected = (torch.as_tensor(x).detach().double() for x in (actual, expected))
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max().item()
    assert error <= tolerance * max(expected.abs().max().item(), 1e-3), (error, actual, expected)


def assert_same(function, reference, *inputs, tolerance=1e-4):
    """The same values and, for each of them, gradients equal to `tolerance`; the reference is in float64."""
    inputs, exact = ([x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
                     for dtype in (None, torch.float64))
    found, expected = function(*inputs), reference(*exact)
    assert_near(found, expected)
    for value, wanted in zip(found.flatten(), expected.flatten()):
        slopes = torch.autograd.grad(value, inputs, retain_graph=True)
        for slope, exact_slope in zip(slopes, torch.autograd.grad(wanted, exact, retain_graph=True)):
            assert_near(slope, exact_slope, tolerance)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_rows(seed=0):
    """Of unequal lengths and not orthogonal: the losses must be right for a learned classifier too."""
    return normal(N, C, seed=100 + seed) * torch.linspace(0.3, 4, N)[:, None]


def make_labels(*shape, seed=0):
    """Labels (B,H,W) with one class absent, a class of a single pixel and some pixels ignored."""
    labels = torch.randint(0, N, shape, generator=torch.Generator().manual_seed(seed))
    labels[(labels == ABSENT) | (labels == ONE_PIXEL) | (normal(*shape, seed=seed) < -1.3)] = IGNORE
    labels[0, -1, -1] = ONE_PIXEL
    return labels


# ---- category-basis prototypes: Sec. 3.2, Alg. 1 -------------------------------------------------

def slow_gram_schmidt(rows):
    """Alg. 1, lines 3-11: every coefficient is taken from the row a_i as it was drawn."""
    basis = []
    for a in rows.double().numpy():
        basis.append(a - sum((a @ b) / (b @ b) * b for b in basis))
    return torch.from_numpy(np.stack(basis))


def test_algorithm_1_by_hand():
    """Below, Laeuchli's example: 1 + e^2 rounds to 1, a_3.b_2 to 0, but what is left of a_3 has e^2 / 2. The
    coefficients are those of the drawn rows."""
    rows = torch.tensor([[2.0, 0, 0], [3, 4, 0], [1, 1, 5]])
    assert_near(gram_schmidt(rows), torch.tensor([[2.0, 0, 0], [0, 4, 0], [0, 0, 5]]), 1e-12)
    assert_near(category_basis_prototypes(3, 3, 3.0, rows), 3 * torch.eye(3), 1e-6)
    e = 1e-8
    rows = torch.tensor([[1, e, 0, 0], [1, 0, e, 0], [1, 0, 0, e]], dtype=torch.float64)
    expected = torch.tensor([[1, e, 0, 0], [0, -e, e, 0], [0, -e, 0, e]], dtype=torch.float64)
    assert torch.allclose(gram_schmidt(rows), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("equal", [True, False])
def test_prototypes_are_algorithm_1_or_either_half_of_it(orthogonal, equal):
    """Table 5 leaves lines 3-11 or line 12 out; rows may be given, or they are the draw of the seed."""
    drawn = category_basis_prototypes(N, C, orthogonal=False, equal=False, seed=4)
    torch.manual_seed(3)
    given = torch.empty(N, C).normal_()
    before = given.clone()
    for rows, options in ((given, dict(rows=given, seed=9)), (drawn, dict(seed=4))):
        expected = slow_gram_schmidt(rows) if orthogonal else rows.double()
        if equal:
            expected = torch.stack([3 * b / (b @ b).sqrt() for b in expected])
        found = category_basis_prototypes(N, C, 3.0, orthogonal=orthogonal, equal=equal, **options)
        assert found.dtype == torch.float32
        assert_near(found, expected, 1e-6)
    assert torch.equal(given, before)
    torch.manual_seed(3)                                                # torch's own, on the same Gaussian
    torch_rows = nn.init.orthogonal_(torch.empty(N, C), gain=3)
    assert_near(category_basis_prototypes(N, C, 3.0, given), torch_rows, 1e-5)


def test_the_draw_is_kaimings_and_depends_on_the_seed_alone():
    """He et al. 2015: mean 0, variance 2 / fan (which fan, the paper leaves open). Other generators rest."""
    drawn, before = category_basis_prototypes(60, 120, orthogonal=False, equal=False), torch.get_rng_state()
    std = drawn.std().item()
    assert abs(drawn.mean()) < 0.05 * std
    assert min(abs(std / math.sqrt(2 / fan) - 1) for fan in (60, 120)) < 0.05
    first, again, other = (category_basis_prototypes(N, C, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first, again) and (first - other).abs().max() > 0.1
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size, rows, options, words", [
    ((9, 8), normal(9, 8), {}, "9 classes.* in 8 channels.*wider.*--head-channels 9"),
    ((3, 3), torch.tensor([[1.0, 3, 0], [0, 1, 7], [1, 5, 14]]), {}, "row 2.*linear combination"),
    ((2, 2), torch.tensor([[1.0, 0], [0, 0]]), dict(orthogonal=False), "row 1 is zero"),
    ((2, 4), normal(2, 5), {}, r"\(2, 5\).*2 classes in 4 channels.*--head-channels"),
])
def test_rows_that_cannot_become_prototypes_are_refused(size, rows, options, words):
    with pytest.raises(ValueError, match=words):
        category_basis_prototypes(*size, rows=rows, **options)


# ---- logits: Eq. 1 and 2 -------------------------------------------------------------------------

def test_logits_are_inner_products_and_commute_with_upsampling():
    """No bias [D9], no normalisation: with unit features, T = 2 and 150 classes the cross-entropy cannot fall
    below 3.04, at the unit feature that leans away from all other rows [D8]."""
    features, rows = 3 * normal(B, C, H, W), random_rows()
    head, resize = PrototypeClassifier(rows), nn.Upsample((20, 15), mode="bilinear")
    assert_near(head(features), torch.stack([sum(w[c] * features[:, c] for c in range(C)) for w in rows], 1))
    assert_near(head(resize(features)), resize(head(features)))         # N maps grow, not C
    rows = category_basis_prototypes(150, 256)
    best = F.normalize(rows[:1] - rows.mean(0), dim=1)
    assert 3.04 < F.cross_entropy(best @ rows.T, torch.tensor([0])) < 3.05


def test_features_without_a_sign_cannot_be_orthogonal():
    """[D14]: a feature >= 0 has nothing in common with the negative part of a row."""
    W = F.normalize(category_basis_prototypes(150, 256), dim=1).double().numpy()
    best = np.where(W > 0, W, 0) / np.linalg.norm(np.where(W > 0, W, 0), axis=1, keepdims=True)
    own = (best * W).sum(1)
    assert 0.695 < own.mean() < 0.71 and 0.565 < own.min() < 0.575
    others = (best @ best.T)[~np.eye(150, dtype=bool)]
    assert 0.31 < others.mean() < 0.325
    rng = np.random.default_rng(0)                                      # nothing close to `best` is better
    near = np.abs(best + 0.02 * rng.normal(size=(40, *W.shape)))
    assert ((near * W).sum(2) / np.linalg.norm(near, axis=2) <= own).all()


@pytest.mark.parametrize("head, backbone", [("segformer", "tiny"), ("fcn", "mobilenet_v2"),
                                            ("upernet", "mobilenet_v2")])
def test_without_the_last_relu_features_have_both_signs(head, backbone):
    """[D14], and nothing else changes: what is above 0 is what the head had."""
    nets = [cbp_occl.build_model(config(head=head, backbone=backbone, last_relu=relu), 6)
            for relu in (True, False)]
    nets[1].load_state_dict(nets[0].state_dict())
    with_relu, without = (net.eval()(normal(2, 3, 64, 64))[1] for net in nets)
    assert without.min() < 0 and torch.equal(with_relu, without.relu())


def test_freezing_the_classifier_of_another_network():
    """Its logits become products with prototypes that no optimizer moves, and the features are at hand."""
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(nn.ReLU(), nn.Conv2d(8, 5, 1)))
    classifier, seen = cbp_occl.freeze_classifier(net, 5, length=3.0)
    W = classifier.prototypes.clone()
    assert_near(W @ W.T, 9 * torch.eye(5))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5)
    labels = torch.randint(5, (2, 9, 9))
    for _ in range(2):
        logits = net(normal(2, 3, 9, 9))
        assert_near(logits, torch.einsum("nc,bchw->bnhw", W, seen["features"]))
        loss = F.cross_entropy(logits, labels) + occl_loss(seen["features"], labels, W, 1, 1)
        before = net[0].weight.clone()
        loss.backward()
        optimizer.step()
    assert torch.equal(net.state_dict()["1.1.prototypes"], W) and not torch.equal(net[0].weight, before)
    with pytest.raises(ValueError, match="1x1 convolution .* 7 channels"):
        cbp_occl.freeze_classifier(net, 7)


def test_dropout_takes_whole_channels_from_the_logits_and_none_from_occl():
    """[D9]: mmsegmentation's Dropout2d(0.1) stands before the classifier alone."""
    net, x = cbp_occl.Segmenter(nn.Module(), PrototypeClassifier(2 * torch.eye(60))), normal(50, 60, 2, 2)
    net.network.forward = lambda x: (x, None)
    torch.manual_seed(0)
    logits, features, aux = net.train()(x)
    kept = logits / (2 * x)
    assert torch.equal(features, x) and aux is None and 0.08 < (kept == 0).float().mean() < 0.12
    assert_near(kept, kept[..., :1, :1].round().expand_as(x) / 0.9)     # 0 or 1 / 0.9
    assert_near(net.eval()(x)[0], 2 * x)


# ---- the two views and their centroids: Sec. 3.3, Eq. 3 ------------------------------------------

def slow_split(labels):
    """In batch, row, column order: the first floor(n/2) pixels of a class are view 1, the others view 2."""
    views = torch.zeros_like(labels)
    for k in range(N):
        pixels = [p for p in np.ndindex(*labels.shape) if labels[p] == k]
        for position, p in enumerate(pixels):
            views[p] = 1 if position < len(pixels) // 2 else 2
    return views


def test_views_by_hand_and_by_the_loop():
    """Class 0 has 5 pixels: 2 + 3, class 1 has 3: 1 + 2, class 2 has one: view 2; other ids are ignored."""
    labels = torch.tensor([[[0, 1, 0], [1, 255, 0]], [[0, 2, 1], [0, -1, 9]]])
    assert split_views(labels, 3).tolist() == [[[1, 1, 1], [2, 0, 2]], [[2, 2, 2], [2, 0, 0]]]
    for labels in (make_labels(B, H, W), make_labels(3, 20, 17), make_labels(1, 1, 9)):
        assert torch.equal(split_views(labels, N), slow_split(labels))
        assert torch.equal(split_views(labels, 150), slow_split(labels))               # absent classes
    with pytest.raises(ValueError, match="'halves'"):
        split_views(labels, 3, "halves")


def test_random_views_halve_every_class_and_give_every_pixel_an_even_chance():
    labels = make_labels(B, H, W)
    torch.manual_seed(0)
    draws = torch.stack([split_views(labels, N, "random") for _ in range(500)])
    assert torch.equal((draws == 0).all(0), labels == IGNORE)
    for k in set(range(N)) - {ABSENT}:
        first = (draws[:, labels == k] == 1).double()
        assert (first.sum(1) == first.shape[1] // 2).all()
        assert (first.mean(0) - first.mean()).abs().max() < 0.1         # standard error 0.022
    torch.manual_seed(0)
    assert torch.equal(split_views(labels, N, "random"), draws[0]) and not torch.equal(draws[0], draws[1])


def slow_centroids(features, labels, views):
    """Eq. (3): centroids (2,N,C), zero for an empty view, and counts (2,N)."""
    sums, counts = torch.zeros(2, N, C, dtype=torch.float64), torch.zeros(2, N, dtype=torch.float64)
    for b, i, j in np.ndindex(*labels.shape):
        if views[b, i, j]:
            sums[views[b, i, j] - 1, labels[b, i, j]] += features[b, :, i, j]
            counts[views[b, i, j] - 1, labels[b, i, j]] += 1
    return sums / counts.clamp(min=1)[..., None], counts


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_view_centroids_are_means_over_pixels(layout):
    """Of any map of 0, 1, 2. An empty view has the centroid 0, not NaN."""
    labels, features = make_labels(B, H, W), normal(B, C, H, W).contiguous(memory_format=layout)
    some = torch.randint(0, 3, labels.shape, generator=torch.Generator().manual_seed(0)) * (labels != IGNORE)
    weight = normal(2, N, C, seed=1)
    for views in (some, slow_split(labels)):
        assert_same(lambda f: (weight * view_centroids(f, labels, views, N)[0]).sum(),
                    lambda f: (weight * slow_centroids(f, labels, views)[0]).sum(), features, tolerance=1e-6)
        centroids, counts = view_centroids(features, labels, views, N)
        for found, expected in zip((centroids, counts), slow_centroids(features, labels, views)):
            assert_near(found, expected, 1e-6)
    assert counts[:, ABSENT].tolist() == [0, 0] and counts[:, ONE_PIXEL].tolist() == [0, 1]
    assert not centroids[:, ABSENT].any() and not centroids[0, ONE_PIXEL].any()


# ---- centroid and category loss: Eq. 4 and 5 -----------------------------------------------------

def cosine(a, b):
    return (a @ b) / ((a @ a).sqrt() * (b @ b).sqrt())


def valid_classes(counts):
    return [k for k in range(len(counts[0])) if counts[0][k] > 0 and counts[1][k] > 0]


def slow_ratio(centroids, counts, x, i, tau, keys):
    """The fraction of Eq. (4) for class i, view x (0 or 1): anchor v_xi, negatives keys[j] for j != i."""
    positive = torch.exp(cosine(centroids[0, i], centroids[1, i]) / tau)
    negative = sum(torch.exp(cosine(centroids[x, i], keys[j]) / tau) for j in valid_classes(counts) if j != i)
    return positive / (positive + negative)


def slow_centroid_loss(centroids, counts, tau=0.07):
    """Eq. (4) with -log; no gradient reaches the category centroids."""
    keys = ((centroids[0] + centroids[1]) / 2).detach()
    classes, losses = valid_classes(counts), [0 * centroids.sum(), 0 * centroids.sum()]
    for x, i in ((x, i) for x in (0, 1) for i in classes):
        losses[x] = losses[x] - slow_ratio(centroids, counts, x, i, tau, keys).log() / len(classes)
    return torch.stack(losses)


def make_centroids(seed=0):
    """centroids (2,N,C), unequal counts (2,N). Class 1 lacks view 1, class 4 view 2, class 6 both, but their
    centroids hold numbers: what is valid is for the counts to say. Lengths differ, as only cosines count."""
    centroids = normal(N, C, seed=seed) + 0.8 * normal(2, N, C, seed=50 + seed)
    centroids = centroids * torch.linspace(0.5, 3, 2 * N).reshape(2, N, 1)
    return centroids, torch.tensor([[3, 0, 9, 1, 4, 6, 0], [3, 2, 10, 1, 0, 7, 0]])


@pytest.mark.parametrize("seed, tau", [(0, ()), (1, (0.5,))])           # () is 0.07, Sec. 4.1
def test_centroid_loss_is_the_loop(seed, tau):
    """By hand, tau = 0.5: views at 0 and 60, and at 90 and 150 degrees, so s at 30 and 120. Anchors are 120
    and 60 degrees off the other s, the views of a class 60."""
    centroids, counts = make_centroids(seed)
    assert_same(lambda v: centroid_loss(v, counts, *tau),
                lambda v: slow_centroid_loss(v, counts, *tau), centroids)
    a, b = math.sqrt(3) / 2, 0.5                                        # cosines of 30 and 60 degrees
    centroids = torch.tensor([[[1, 0], [0, 1]], [[b, a], [-a, b]]])
    expected = (math.log(1 + math.exp((-b - b) / 0.5)) + math.log(2)) / 2
    assert_near(centroid_loss(centroids, torch.ones(2, 2), 0.5), torch.tensor([expected, expected]), 1e-6)


def test_minimising_the_printed_ratio_would_part_the_views():
    """[D2]: a small step down the ratio itself lowers cos(v_1, v_2), one down its -log raises it."""
    v = F.normalize(normal(1, 5, 8) + normal(2, 5, 8, seed=9), dim=2).double().requires_grad_()
    counts, keys = torch.full((2, 5), 4), v.mean(0).detach()
    ratios = sum(slow_ratio(v, counts, x, i, 0.07, keys) for x in (0, 1) for i in range(5))
    for loss, sign in ((ratios, -1), (centroid_loss(v, counts).sum(), 1)):
        slope, = torch.autograd.grad(loss, v)
        before, after = (F.cosine_similarity(*views, dim=1).mean() for views in (v, v - 1e-3 * slope))
        assert sign * (after - before) > 1e-9


def slow_category_loss(centroids, counts, prototypes, tau=0.07):
    """Eq. (5) with -log: v_xi against all N prototypes, mean over the classes with both views."""
    classes, losses = valid_classes(counts), [0 * centroids.sum(), 0 * centroids.sum()]
    for x, i in ((x, i) for x in (0, 1) for i in classes):
        similar = [torch.exp(cosine(centroids[x, i], w) / tau) for w in prototypes]
        losses[x] = losses[x] - torch.log(similar[i] / sum(similar)) / len(classes)
    return torch.stack(losses)


@pytest.mark.parametrize("seed, tau", [(0, ()), (1, (0.5,))])
def test_category_loss_is_the_loop(seed, tau):
    """A learned classifier is moved too; T is without effect [D5]. By hand, tau = 0.5: prototypes 2 e_1,
    2 e_2, 2 e_3; class 1 is the only valid one, so its target is 1, not 0."""
    (centroids, counts), rows = make_centroids(seed), random_rows(seed)
    for length in (1, 7):
        assert_same(lambda v, w: category_loss(v, counts, length * w, *tau),
                    lambda v, w: slow_category_loss(v, counts, w, *tau), centroids, rows)
    centroids, counts = torch.zeros(2, 3, 3), torch.tensor([[0, 2, 0], [0, 3, 1]])
    centroids[:, 1] = torch.tensor([[0.0, 5, 0], [3, 4, 0]])            # cosines 0, 1, 0 and 0.6, 0.8, 0
    expected = [math.log(math.exp(2) + 2) - 2, math.log(math.exp(1.2) + math.exp(1.6) + 1) - 1.6]
    assert_near(category_loss(centroids, counts, 2 * torch.eye(3), 0.5), torch.tensor(expected), 1e-6)


# ---- OCCL: Eq. 6 ---------------------------------------------------------------------------------

def slow_occl(features, labels, prototypes, w_centroid, w_category, tau, mode="ordered"):
    """Eq. (6). Labels come to the features' size by nearest: row i of h takes row floor(i * rows / h)."""
    rows, columns = ([i * size // small for i in range(small)]
                     for small, size in zip(features.shape[2:], labels.shape[1:]))
    labels = labels[:, rows][:, :, columns]
    views = slow_split(labels) if mode == "ordered" else split_views(labels, N, mode)
    centroids, counts = slow_centroids(features, labels, views)
    l_v = slow_centroid_loss(centroids, counts, tau)
    l_c = slow_category_loss(centroids, counts, prototypes, tau)
    return (w_centroid * (l_v[0] + l_v[1]) + w_category * (l_c[0] + l_c[1])) / 2


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("options", [(1.0, 0.3, 0.07), (0.4, 0.1, 0.2), (0.0, 1.0, 0.07), (1.0, 0.0, 0.07),
                                     (1.0, 0.3, 0.07, "random")])
@pytest.mark.parametrize("size", [(H, W), (25, 31), (3, 50)])
def test_occl_is_the_loop_in_float32_with_labels_of_any_size(options, size, dtype, tolerance):
    """The gradient reaches the rows if they learn (a usual classifier's). In bfloat16 it is stored so."""
    def seeded(loss_of):
        def loss(features, rows):
            torch.manual_seed(11)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return loss_of(features, make_labels(B, *size), rows, *options)
        return loss
    features, rows = normal(B, C, H, W).to(dtype), random_rows().to(dtype)
    assert seeded(occl_loss)(features, rows).dtype == torch.float32
    assert_same(seeded(occl_loss), seeded(slow_occl), features, rows, tolerance=tolerance)


@pytest.mark.parametrize("mode", ["ordered", "random"])
@pytest.mark.parametrize("case", ["nothing", "one pixel", "one class"])
def test_batches_with_little_to_contrast_stay_finite(case, mode):
    """Without a valid class a loss is exactly 0 with gradient 0, in the graph: every process goes backwards.
    One class has no other centroid to leave, but keeps its category loss. Features may be 0 (dead ReLU)."""
    logits = normal(B, N, 4, 4).requires_grad_()
    loss = pixel_loss(logits, torch.full((B, H, W), IGNORE))
    assert loss == 0 and not torch.autograd.grad(loss, logits)[0].any()
    labels = torch.full((B, H, W), 3 if case == "one class" else IGNORE)
    labels[0, 0, 0] = IGNORE if case == "nothing" else 3
    for features in (normal(B, C, H, W).requires_grad_(), torch.zeros(B, C, H, W, requires_grad=True)):
        rows = random_rows().requires_grad_()
        attraction, loss = (occl_loss(features, labels, rows, 1.0, phi, mode=mode) for phi in (0.0, 0.3))
        slopes = torch.cat([slope.flatten() for slope in torch.autograd.grad(loss, (features, rows))])
        assert slopes.isfinite().all() and attraction.requires_grad and attraction.abs() < 1e-6
        assert loss > 0 if case == "one class" else loss == 0 and not slopes.any()


# ---- the loss of a step: Eq. 7; the classifiers of Table 4; what they are measured by: Eq. 8 -----

def slow_pixel_loss(logits, labels):
    """Mean over the labelled pixels of -log softmax, logits enlarged bilinearly [D10]."""
    log_p = F.interpolate(logits, labels.shape[1:], mode="bilinear").log_softmax(1)
    return -torch.stack([log_p[b, labels[b, i, j], i, j] for b, i, j in (labels != IGNORE).nonzero()]).mean()


def mean_over_pairs(rows, measure):
    pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if i != j]
    return sum(measure(cosine(rows[i], rows[j])) for i, j in pairs) / len(pairs)


def config(preset="toy", **flags):
    return run.make_config(cbp_occl.Config, cbp_occl.PRESETS, preset, out="unused", **flags)


class Network(nn.Module):
    """The least that a Segmenter needs: features of half the size and, if asked for, auxiliary logits."""

    def __init__(self, auxiliary):
        super().__init__()
        self.backbone, self.aux = nn.Conv2d(3, C, 2, stride=2), nn.Conv2d(3, N, 1) if auxiliary else None

    def forward(self, x):
        return self.backbone(x), self.aux(x) if self.aux else None


def exact_terms(net, x, labels, cfg):
    """The terms of the loss, by loops, for a network in float64; what the features are multiplied with."""
    features, aux = net.network(x)
    rows, bias = getattr(net.classifier, "prototypes", None), torch.zeros(N)
    if cfg.classifier == "learnable":
        rows, bias = net.classifier.weight[..., 0, 0], net.classifier.bias
    if cfg.classifier == "penalty":
        rows = torch.stack([cfg.length * w / (w @ w).sqrt() for w in rows])
    logits = torch.einsum("nc,bchw->bnhw", rows, features) + bias[:, None, None]
    terms = dict(ce=slow_pixel_loss(logits, labels))
    if aux is not None:
        terms["aux"] = 0.4 * slow_pixel_loss(aux, labels)
    if cfg.w_centroid or cfg.w_category:
        terms["occl"] = slow_occl(features, labels, rows, cfg.w_centroid, cfg.w_category, cfg.tau)
    if cfg.classifier == "penalty":
        terms["penalty"] = 0.01 * mean_over_pairs(rows, torch.square)
    return terms


@pytest.mark.parametrize("auxiliary, weights", [(True, (0.6, 0.2)), (False, (0.0, 0.2)), (False, (0.0, 0.0))])
@pytest.mark.parametrize("classifier", ["cbp", "learnable", "ema", "gradient", "penalty"])
def test_a_step_goes_down_eq_7(classifier, auxiliary, weights):
    """Its terms, and every weight after a step of plain gradient descent. Frozen rows stay. EMA rows of the
    classes with both views become m w + (1-m) T s/|s|, m = 0.999, then of length T. Others are weights."""
    cfg = config(classifier=classifier, w_centroid=weights[0], w_category=weights[1], tau=0.2, length=3.0,
                 seed=2, head_channels=C)
    torch.manual_seed(0)
    net = cbp_occl.build_model(cfg, N).eval()                           # without dropout
    net.network, head, rows = Network(auxiliary), net.classifier, random_rows()
    if classifier == "learnable":
        assert head.weight.std().item() == pytest.approx(0.01, rel=0.3) and not head.bias.any()
        assert torch.equal(head.class_vectors(), head.weight[..., 0, 0])
    else:
        assert_near(head.class_vectors(), category_basis_prototypes(N, C, 3.0, seed=2), 1e-6)
        head.prototypes.data.copy_(rows)
    exact, x = copy.deepcopy(net).double(), normal(B, 3, 2 * H, 2 * W)
    labels = make_labels(B, H, W).repeat_interleave(2, 1).repeat_interleave(2, 2)
    expected = exact_terms(exact, x.double(), labels, cfg)
    sum(expected.values()).backward()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    terms = cbp_occl.train_step(net, net, optimizer, scheduler, x, labels, cfg)
    assert set(terms) == set(expected) and not any(term.requires_grad for term in terms.values())
    for name, term in terms.items():
        assert_near(term, expected[name])
    for now, before in zip(net.parameters(), exact.parameters()):
        assert_near(now, before - 0.1 * before.grad)
    assert len(list(head.parameters())) == dict(learnable=2, gradient=1, penalty=1).get(classifier, 0)
    assert len(head.state_dict()) == (2 if classifier == "learnable" else 1)               # saved
    assert optimizer.param_groups[0]["lr"] == 0.05
    if classifier in ("cbp", "ema"):
        small = labels[:, ::2, ::2]
        centroids, counts = slow_centroids(exact.network.backbone(x.double()), small, slow_split(small))
        for i in valid_classes(counts) if classifier == "ema" else ():
            s = (centroids[0, i] + centroids[1, i]) / 2
            moved = 0.999 * rows[i] + 0.001 * 3 * s / s.norm()
            rows[i] = (3 * moved / moved.norm()).detach()
        assert_near(head.prototypes, rows, 1e-7)


def test_class_separability_is_the_double_loop_and_no_proof_of_orthogonality():
    """The sum is signed: 0 for orthogonal rows, but not for them alone; a simplex has cosines of -1/(N-1)."""
    rows = random_rows()
    value = class_separability(nn.Parameter(rows))
    assert value == pytest.approx(mean_over_pairs(rows.double(), float) * N * (N - 1) / 2, abs=1e-5)
    assert value == pytest.approx((F.normalize(rows, dim=1).sum(0).norm().item() ** 2 - N) / 2, abs=1e-5)
    assert class_separability(category_basis_prototypes(150, 256)) == pytest.approx(0, abs=1e-3)
    assert mean_abs_cosine(category_basis_prototypes(256, 256)) < 1e-7            # not in float32
    assert class_separability(3 * torch.eye(150) - 3 / 150) == pytest.approx(-75, abs=1e-3)
    assert mean_abs_cosine(rows) == pytest.approx(mean_over_pairs(rows.double(), abs).item())
    assert mean_abs_cosine(rows[:1]) == 0


# ---- recipes: Sec. 4.1 and 4.2 -------------------------------------------------------------------

OPTIONS = "backbone head optimizer lr head_lr weight_decay power floor warmup stage_decay".split()
MODELS = {                                                              # mmsegmentation's for each model
    "fcn-r101": ("resnet101", "fcn", "sgd", 0.01, 1, 5e-4, 0.9, 1e-4, 0, 1),
    "convnext_b": ("convnext_base", "upernet", "adamw", 1e-4, 1, 0.05, 1, 0, 1500, 0.9),
    "swin_b": ("swin_b", "upernet", "adamw", 6e-5, 1, 0.01, 1, 0, 1500, 1),
    **{f"segformer-b{i}": (f"mit_b{i}", "segformer", "adamw", 6e-5, 10, 0.01, 1, 0, 1500, 1)
       for i in range(6)}}
WEIGHTS = {"ade20k-fcn-r101": (0.4, 0.1, 2), "ade20k-convnext_b": (1, 0.2, 2), "ade20k-swin_b": (1, 0.2, 1),
           "cocostuff10k-fcn-r101": (1, 0.3, 0.3), "cocostuff10k-convnext_b": (1, 0.3, 3),
           "cocostuff10k-swin_b": (1, 0.3, 2), "ade20k-segformer-b0-40k": (1, 0.3, 2)}   # lambda, phi, T


@pytest.mark.parametrize("name", list(cbp_occl.PRESETS)[2:])
def test_presets_are_the_papers_recipes(name):
    cfg = config(name)
    cbp_occl.check_config(cfg)
    data, model = name.removesuffix("-40k").split("-", 1)
    assert tuple(getattr(cfg, option) for option in OPTIONS) == MODELS[model]
    assert (cfg.w_centroid, cfg.w_category, cfg.length, cfg.tau) == (*WEIGHTS.get(name, (1, 0.1, 1)), 0.07)
    iterations = 40000 if name.endswith("-40k") else dict(ade20k=160000, cocostuff10k=80000)[data]
    assert (cfg.iterations, cfg.eval_every) == (iterations, iterations // 10)
    split = dict(ade20k="val", cocostuff10k="test")[data]
    assert (cfg.dataset, cfg.train_split, cfg.val_split, cfg.test_split) == (data, "train", split, split)
    assert (cfg.batch_size, cfg.crop, cfg.size, cfg.classifier, cfg.views) == (16, 512, 512, "cbp", "ordered")
    assert (cfg.init, cfg.prototypes, cfg.orthogonal, cfg.equal) == ("random", "", True, True)
