"""The equations of pfa_scribble.py against slow references written from the paper alone.

Chan et al., ICML 2024: Eq. 1-3 prototypes, Eq. 4-5 memory, Eq. 6-8 augmenter, Eq. 9-10 losses. The references
are loops in numpy, float64, and share no line with pfa_scribble.py; slopes are central differences of them.
B images, N classes (0 is the background), C channels, n slots a class, K keys. 255 is not labelled.

    python -m pytest -q tests/test_pfa_scribble_equations.py
"""

import copy
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pfa_scribble import (FeatureAugmenter, PrototypeMemory, confidence, consistency_loss, extract_prototypes,
                          global_keys, local_keys, partial_cross_entropy)

SOURCE = (Path(__file__).resolve().parents[1] / "pfa_scribble.py").read_text(encoding="utf-8")
READINGS = ("paper", "official", "mse")
LAYERS = ("project_prototype", "project_feature", "fuse", "expand")


def normal(*shape, seed=0, size=1.0):
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def some_present(batch, classes, seed=0, chance=0.6):
    """(B,N) bool: background everywhere, the others by chance."""
    present = uniform(batch, classes, seed=seed) < chance
    present[:, 0] = True
    return present


def unit(vectors):
    vectors = torch.as_tensor(vectors, dtype=torch.float32)
    return vectors / vectors.norm(dim=-1, keepdim=True)


def array(tensor):
    return tensor.detach().cpu().double().numpy()


def assert_near(actual, expected, tolerance=1e-5):
    """Equal shapes, and differences of at most tolerance * (1 + |expected|); nan is near to nothing."""
    actual, expected = (torch.as_tensor(x).detach().double().cpu() for x in (actual, expected))
    assert actual.shape == expected.shape
    assert ((actual - expected).abs() <= tolerance * (1 + expected.abs())).all()


def assert_same_slope(actual, expected, tolerance=1e-4):
    """Compared on the scale of the largest slope."""
    size = np.abs(expected).max()
    assert size > 0
    assert_near(array(actual) / size, expected / size, tolerance)


def numerical_slope(function, x, step=1e-5):
    """Central differences of a scalar function of one numpy array."""
    slope = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        slope[index] = (function(up) - function(down)) / (2 * step)
    return slope


def bf16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


# ---- slow references -----------------------------------------------------------------------------

def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def log_softmax(x, axis):
    x = x - x.max(axis, keepdims=True)
    return x - np.log(np.exp(x).sum(axis, keepdims=True))


def slow_official(logits):
    """ReLU, then min-max of every map; what is hardly above the minimum becomes 0 before it is scaled."""
    scores = np.zeros(logits.shape)
    for b, t in np.ndindex(*logits.shape[:2]):
        a = np.maximum(logits[b, t], 0)
        low, high = a.min(), a.max()
        a[a < low + 1e-5] = 0
        scores[b, t] = (a - low - 1e-5) / (high - low + 1e-5)
    return scores


def slow_prototypes(features, scores, present, k):
    """Eq. 1-3 for scores without ties."""
    out = np.zeros(scores.shape[:2] + features.shape[1:2])
    for b, t in np.argwhere(present):
        best = sorted(np.ndindex(*scores.shape[2:]), key=lambda pixel: -scores[b, t][pixel])[:k]
        weighted = sum(scores[b, t][pixel] * features[b, :, pixel[0], pixel[1]] for pixel in best)
        mean = weighted / sum(scores[b, t][pixel] for pixel in best)
        out[b, t] = mean / np.sqrt((mean ** 2).sum())
    return out


class SlowMemory:
    """Eq. 4-5: lists that fill up, after that the most similar slot moves."""

    def __init__(self, classes, slots, momentum):
        self.rows, self.slots, self.momentum = [[] for _ in range(classes)], slots, momentum

    def update(self, prototypes, present):
        for b, t in np.argwhere(present):                               # image by image, class by class
            rows, p = self.rows[t], prototypes[b, t]
            if len(rows) < self.slots:
                rows.append(p)
                continue
            cosine = [p @ q / (np.sqrt(p @ p) * np.sqrt(q @ q)) for q in rows]
            oldest = cosine.index(max(cosine))
            rows[oldest] = self.momentum * rows[oldest] + (1 - self.momentum) * p

    def bank(self, channels):
        bank = np.zeros((len(self.rows), self.slots, channels))
        for t, rows in enumerate(self.rows):
            for s, row in enumerate(rows):
                bank[t, s] = row
        return bank

    def full(self):
        return all(len(rows) == self.slots for rows in self.rows)


def slow_augment(features, keys, mask, weights):
    """Eq. 6-8, one pixel after the other. weights: parameter name -> array."""
    def linear(name, x):
        return weights[name + ".weight"] @ x + weights[name + ".bias"]

    out = np.zeros(features.shape)
    for b, i, j in np.ndindex(len(features), *features.shape[2:]):
        f = features[b, :, i, j]
        e_f = linear("project_feature", f)
        e_fp = np.stack([linear("project_prototype", key) for key in keys[b][mask[b]]])
        attention = softmax(e_fp @ e_f, 0)
        e = np.maximum(linear("fuse", np.concatenate([attention @ e_fp, e_f])), 0)
        out[b, :, i, j] = np.maximum(f + linear("expand", e), 0)
    return out


def interpolation(small, large):
    """(large, small): rows of weights of a linear resize whose first and last pixels stay in place."""
    matrix = np.zeros((large, small))
    for i in range(large):
        x = i * (small - 1) / (large - 1) if large > 1 else 0
        left = min(int(x), small - 1)
        right = min(left + 1, small - 1)
        matrix[i, left] += 1 - (x - left)
        matrix[i, right] += x - left
    return matrix


def slow_pce(logits, scribbles):
    """Eq. 9, after the resize."""
    rows, columns = (interpolation(a, b) for a, b in zip(logits.shape[2:], scribbles.shape[1:]))
    terms = []
    for b, i, j in np.argwhere(scribbles != 255):
        z = np.array([rows[i] @ plane @ columns[j] for plane in logits[b]])
        terms.append(-log_softmax(z, 0)[scribbles[b, i, j]])
    return np.mean(terms)


def slow_consistency(logits, augmented, reading):
    """Eq. 10 or another reading of it, pixel by pixel."""
    terms = []
    for b, i, j in np.ndindex(len(logits), *logits.shape[2:]):
        z, z_aug = logits[b, :, i, j], augmented[b, :, i, j]
        p, p_aug = softmax(z, 0), softmax(z_aug, 0)
        terms.append({"paper": lambda: -(p * log_softmax(z_aug, 0)).sum(),
                      "official": lambda: -(p_aug * log_softmax(p, 0)).sum(),
                      "mse": lambda: ((p - p_aug) ** 2).mean()}[reading]())
    return np.mean(terms)


# ---- confidence of pixels ------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(2, 5, 4, 3), (1, 2, 1, 1), (3, 21, 2, 7)])
def test_confidence_of_the_paper_is_the_probability_among_all_classes(shape):
    """Which classes are present does not matter: they are chosen later."""
    logits, (batch, classes) = normal(*shape, size=3), shape[:2]
    for present in (some_present(batch, classes), torch.ones(batch, classes, dtype=torch.bool)):
        scores = confidence(logits, present)
        assert_near(scores, softmax(array(logits), 1), 1e-6)
        assert torch.equal(scores, confidence(logits, present, reading="paper"))


@pytest.mark.parametrize("reading", ["paper", "official"])
@pytest.mark.parametrize("shape", [(1, 3), (2, 4), (2,)])
def test_presence_of_another_batch_is_refused(reading, shape):
    with pytest.raises(ValueError):
        confidence(normal(2, 3, 4, 4), torch.ones(shape, dtype=torch.bool), reading=reading)


@pytest.mark.parametrize("shift", [-1.0, 0.0, 8.0])
@pytest.mark.parametrize("shape", [(2, 5, 4, 3), (3, 4, 1, 2), (2, 3, 9, 8)])
def test_official_confidence_by_definition(shape, shift):
    """shift 8: all logits are positive, so the smallest one is above 0 when it is set to 0."""
    logits, present = normal(*shape, size=2) + shift, some_present(*shape[:2])
    scores = confidence(logits, present, reading="official")
    assert scores.shape == logits.shape
    kept = present[:, :, None, None].expand_as(scores)
    assert_near(scores[kept], slow_official(array(logits))[kept.numpy()], 2e-5)


def test_official_confidence_by_hand():
    """Two classes of one image and two of another: mixed, positive, negative, constant."""
    logits = torch.tensor([[[[-3, 0], [1, 4]], [[1, 2], [3, 5]]],
                           [[[-1, -7], [-2, -1]], [[2, 2], [2, 2]]]], dtype=torch.float32)
    scores = array(confidence(logits, torch.ones(2, 2, dtype=torch.bool), reading="official"))
    e = 1e-5
    assert_near(scores[0, 0], [[-e / (4 + e), -e / (4 + e)], [(1 - e) / (4 + e), (4 - e) / (4 + e)]], 1e-6)
    assert_near(scores[0, 1], [[(-1 - e) / (4 + e), (1 - e) / (4 + e)],
                               [(2 - e) / (4 + e), (4 - e) / (4 + e)]], 1e-6)
    assert_near(scores[1, 0], [[-1, -1], [-1, -1]], 1e-6)              # nothing fires: (0 - 0 - e) / (0 + e)
    assert_near(scores[1, 1], np.full((2, 2), (-2 - e) / e), 1e-4)     # all equal: all set to 0
    assert scores[0, 0, 0, 0] < 0                                      # the offset is kept


def test_official_confidence_knows_only_its_own_image_and_class():
    """Relative to its own maximum: a class that fires weakly has a best pixel of about 1 too."""
    logits, present = normal(2, 3, 4, 4), torch.ones(2, 3, dtype=torch.bool)
    scores = confidence(logits, present, reading="official")
    changed = logits.clone()
    changed[0, 0] *= 50
    changed[1] -= 9
    again = confidence(changed, present, reading="official")
    assert torch.equal(again[0, 1:], scores[0, 1:])
    assert_near(again[0, 0], scores[0, 0], 1e-4)
    assert_near(scores.amax((2, 3)), np.ones((2, 3)), 1e-4)
    assert_near(again[1], -np.ones((3, 4, 4)), 1e-6)                    # all below 0


@pytest.mark.parametrize("reading", ["paper", "official"])
def test_confidence_and_prototypes_of_huge_logits_are_finite(reading):
    """Also those of a present class whose probability is 0 everywhere."""
    logits, present = normal(2, 4, 5, 5, size=1e4), torch.ones(2, 4, dtype=torch.bool)
    logits[0, 1] = -1e4
    logits[0, 2] = 2e4
    scores = confidence(logits, present, reading=reading)
    prototypes = extract_prototypes(uniform(2, 6, 5, 5), scores, present)
    assert torch.isfinite(scores).all() and torch.isfinite(prototypes).all()
    assert_near(prototypes[0, 2].norm(), 1.0, 1e-6)


# ---- Eq. 1-3: local prototypes -------------------------------------------------------------------

@pytest.mark.parametrize("h, w, fraction, k", [(6, 5, 0.08, 2), (7, 4, 1 / 12, 2), (3, 3, 0.08, 1),
                                               (1, 1, 0.08, 1), (4, 6, 0.5, 12), (3, 4, 1.0, 12)])
@pytest.mark.parametrize("reading", ["paper", "official"])
def test_prototypes_are_the_loop(h, w, fraction, k, reading):
    logits, features, present = normal(3, 4, h, w, size=2) + 1, normal(3, 6, h, w, seed=1), some_present(3, 4)
    logits.clamp_(min=0.01 + 0.01 * uniform(h, w, seed=2))              # no ties at 0
    scores = confidence(logits, present, reading=reading)
    prototypes = extract_prototypes(features, scores, present, top_fraction=fraction)
    expected = slow_prototypes(array(features), array(scores), present.numpy(), k)
    assert prototypes.shape == (3, 4, 6) and prototypes.dtype == torch.float32
    assert_near(prototypes, expected, 2e-5)
    assert_near(prototypes[present].norm(dim=1), np.ones(int(present.sum())), 1e-6)
    assert not present.all() and not prototypes[~present].any()        # exactly 0


def test_prototypes_by_hand():
    """2 x 2 pixels, the better half: (0.6 (1,0) + 0.2 (0,3)) / 0.8 = (3,3) / 4, then (1,1) / sqrt 2."""
    features = torch.tensor([[[[1.0, 0], [5, 4]], [[0, 3], [5, 3]]]])   # pixels (1,0) (0,3) / (5,5) (4,3)
    scores = torch.tensor([[[[0.6, 0.2], [0.1, 0.0]], [[0.4, 0.8], [0.9, 1.0]]]])
    prototypes = extract_prototypes(features, scores, torch.tensor([[True, True]]), top_fraction=0.5)
    assert_near(prototypes[0, 0], np.ones(2) / math.sqrt(2), 1e-6)
    mean = (0.9 * np.array([5, 5]) + 1.0 * np.array([4, 3])) / 1.9      # (8.5, 7.5) / 1.9
    assert_near(prototypes[0, 1], mean / np.hypot(*mean), 1e-6)
    best = extract_prototypes(features, scores, torch.tensor([[True, True]]))
    assert_near(best[0], [[1, 0], [0.8, 0.6]], 1e-6)                    # 8 % of 4 pixels is one


@pytest.mark.parametrize("side, fraction, k", [(128, None, 1310), (128, 0.08, 1310), (128, 1 / 12, 1365),
                                               (80, 1 / 12, 533), (80, 0.08, 512), (16, None, 20),
                                               (5, None, 2), (4, None, 1), (3, None, 1), (1, None, 1)])
def test_number_of_pixels_of_a_prototype(side, fraction, k):
    """Stride 4: side 128 is an image of 512. Channel 1 is the last pixel that counts, channel 2 the next."""
    pixels = side * side
    rank = torch.randperm(pixels, generator=torch.Generator().manual_seed(0))
    features = torch.stack([rank < k - 1, rank == k - 1, rank >= k]).float().reshape(1, 3, side, side)
    scores = ((pixels - rank) / pixels).reshape(1, 1, side, side)
    rest = {} if fraction is None else {"top_fraction": fraction}
    prototype, = extract_prototypes(features, scores, torch.tensor([[True]]), **rest)[0]
    assert prototype[1] > 0 and prototype[2] == 0


def test_prototypes_of_one_image_know_no_other_image_and_no_absent_class():
    features, scores, present = normal(3, 5, 6, 6), uniform(3, 4, 6, 6), some_present(3, 4)
    assert not present.all()
    whole = extract_prototypes(features, scores, present)
    garbage = torch.where(present[:, :, None, None], scores, 1e6)
    assert torch.equal(extract_prototypes(features, garbage, present), whole)
    for b in range(3):
        alone = extract_prototypes(features[b:b + 1], scores[b:b + 1], present[b:b + 1])
        assert_near(alone, whole[b:b + 1], 1e-6)
    assert not extract_prototypes(features, scores, torch.zeros(3, 4, dtype=torch.bool)).any()


def test_pixels_of_one_score_may_be_any_of_them():
    """Four equal scores, two of them count: the prototype is the mean of one of the six pairs."""
    features, one = normal(1, 3, 2, 2), torch.ones(1, 1, dtype=torch.bool)
    pixels = array(features).reshape(3, 4).T
    pairs = np.array([a + b for a, b in itertools.combinations(pixels, 2)])
    pairs /= np.linalg.norm(pairs, axis=1, keepdims=True)
    for score in (0.25, 1.0, -1.0):
        prototype = extract_prototypes(features, torch.full((1, 1, 2, 2), score), one, top_fraction=0.5)[0, 0]
        assert np.abs(pairs - array(prototype)).max(1).min() < 1e-6


@pytest.mark.parametrize("level", [-3.0, 0.0, 2.0])
def test_a_present_class_that_fires_nowhere_gets_a_plain_mean(level):
    """All official scores are one negative number, which cancels: sum(c f) / sum(c) is no mirrored mean."""
    features, present = normal(2, 5, 3, 4) + 1, torch.ones(2, 2, dtype=torch.bool)
    logits = torch.full((2, 2, 3, 4), level) - (uniform(2, 2, 3, 4) if level < 0 else 0)
    scores = confidence(logits, present, reading="official")
    assert (scores < 0).all()
    prototypes = extract_prototypes(features, scores, present, top_fraction=1.0)
    mean = array(features).mean((2, 3))
    assert_near(prototypes[:, 0], mean / np.linalg.norm(mean, axis=1, keepdims=True), 1e-5)
    assert_near(prototypes[:, 1], prototypes[:, 0], 1e-5)


def test_a_class_that_fires_at_one_pixel_takes_that_pixel():
    """The official scores of the others, about -1e-5, count for nothing though k = 3 asks for two."""
    logits, features = torch.full((1, 1, 3, 4), -1.0), normal(1, 5, 3, 4)
    logits[0, 0, 1, 2] = 0.7
    present = torch.tensor([[True]])
    scores = confidence(logits, present, reading="official")
    prototype = extract_prototypes(features, scores, present, top_fraction=0.25)[0, 0]
    assert_near(prototype, unit(features[0, :, 1, 2]), 1e-4)


@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1e4, -1.0])
def test_the_sum_of_the_scores_divides_as_it_is(factor):
    """No epsilon: a class of probability 1e-30 has the same prototype. Minus cancels if all pixels count."""
    features, scores = normal(2, 5, 4, 4), 0.1 + uniform(2, 3, 4, 4)
    present = torch.ones(2, 3, dtype=torch.bool)
    fraction = 1.0 if factor < 0 else 0.25
    expected = slow_prototypes(array(features), array(scores), present.numpy(), int(16 * fraction))
    assert_near(extract_prototypes(features, factor * scores, present, top_fraction=fraction), expected, 1e-5)


def test_prototypes_are_constants():
    """Nothing flows back into features or scores."""
    features, logits = normal(2, 5, 4, 4).requires_grad_(), normal(2, 3, 4, 4, seed=1).requires_grad_()
    present = torch.ones(2, 3, dtype=torch.bool)
    for scores in (logits, logits.softmax(1), confidence(logits, present)):
        assert not extract_prototypes(features, scores, present).requires_grad


def test_prototypes_of_a_dark_image_are_finite():
    """All features 0, as after ReLU and dropout: the row has no direction, but it is no nan."""
    scores, present = uniform(1, 3, 4, 4), torch.tensor([[True, False, True]])
    assert torch.isfinite(extract_prototypes(torch.zeros(1, 5, 4, 4), scores, present)).all()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_prototypes_inside_bf16_autocast(kind):
    """Means of hundreds of pixels with 8 binary digits would be wrong in the third decimal."""
    features, logits = uniform(2, 8, 40, 40).to(kind), normal(2, 3, 40, 40).to(kind)
    present = some_present(2, 3)
    with bf16():
        scores = confidence(logits, present)
        prototypes = extract_prototypes(features, scores, present)
    assert scores.dtype == prototypes.dtype == torch.float32
    assert_near(scores, softmax(array(logits), 1), 1e-6)
    assert_near(prototypes, slow_prototypes(array(features), array(scores), present.numpy(), 128), 1e-5)


def test_prototypes_of_channels_last_features():
    features, scores, present = normal(2, 6, 5, 4), uniform(2, 3, 5, 4), some_present(2, 3)
    expected = extract_prototypes(features, scores, present)
    moved = features.contiguous(memory_format=torch.channels_last)
    assert_near(extract_prototypes(moved, scores, present), expected, 1e-6)


# ---- Eq. 4-5: memory of prototypes ---------------------------------------------------------------

def some_updates(steps, batch, classes, channels, seed=0, chance=0.6):
    """Lists of unit prototypes (B,N,C), zero rows where absent, and present (B,N)."""
    for step in range(steps):
        present = some_present(batch, classes, seed=1000 * seed + step, chance=chance)
        prototypes = unit(normal(batch, classes, channels, seed=2000 * seed + step) + 0.3)
        yield prototypes * present[..., None], present


@pytest.mark.parametrize("momentum", [0.99, 0.5, 0.0])
@pytest.mark.parametrize("classes, slots, channels, batch", [(4, 3, 5, 3), (2, 1, 3, 4), (21, 5, 8, 2)])
def test_memory_is_the_loop(classes, slots, channels, batch, momentum):
    """Filling, full, absent classes, several images a batch; compared after every batch."""
    memory = PrototypeMemory(classes, slots, channels, momentum=momentum)
    slow, states = SlowMemory(classes, slots, momentum), {memory.full}
    for prototypes, present in some_updates(25, batch, classes, channels, seed=classes):
        memory.update(prototypes, present)
        slow.update(array(prototypes), present.numpy())
        assert_near(memory.bank, slow.bank(channels), 1e-5)
        assert memory.count.tolist() == [len(rows) for rows in slow.rows]
        assert memory.full is slow.full()
        states.add(memory.full)
    assert states == {False, True}


def test_memory_at_first():
    memory = PrototypeMemory(3, 2, 4)
    assert memory.bank.shape == (3, 2, 4) and memory.bank.dtype == torch.float32 and not memory.bank.any()
    assert memory.count.shape == (3,) and memory.count.dtype == torch.int64 and not memory.count.any()
    assert memory.full is False and not list(memory.parameters())
    assert {name for name, _ in memory.named_buffers()} == {"bank", "count"}


def test_filling_stores_exactly_even_what_is_there_already():
    """A slot that is free is taken, however similar the others are; momentum has no say."""
    memory, p = PrototypeMemory(2, 3, 4), unit(normal(1, 2, 4))
    for count in (1, 2, 3):
        memory.update(p, torch.tensor([[True, False]]))
        assert memory.count.tolist() == [count, 0] and memory.full is False
        assert torch.equal(memory.bank[0, :count], p[0, :1].expand(count, 4))
        assert not memory.bank[0, count:].any() and not memory.bank[1].any()


def test_images_of_a_batch_fill_slots_in_their_order():
    memory, p = PrototypeMemory(2, 3, 4), unit(normal(4, 2, 4))
    memory.update(p, torch.tensor([[True, False], [True, True], [False, True], [True, False]]))
    assert torch.equal(memory.bank[0], p[[0, 1, 3], 0])
    assert torch.equal(memory.bank[1, :2], p[[1, 2], 1])
    assert memory.count.tolist() == [3, 2]


@pytest.mark.parametrize("momentum", [None, 0.99, 0.5])
def test_update_of_a_full_class_by_hand(momentum):
    """The most similar slot (the text; Eq. 4 prints a minimum) moves and is not normalised again."""
    rest = {} if momentum is None else {"momentum": momentum}
    memory, a = PrototypeMemory(1, 2, 2, **rest), momentum or 0.99
    one = torch.ones(1, 1, dtype=torch.bool)
    for p in ([1.0, 0.0], [0.0, 1.0]):
        memory.update(torch.tensor([[p]]), one)
    memory.update(torch.tensor([[[0.6, 0.8]]]), one)
    expected = [[1, 0], [(1 - a) * 0.6, a + (1 - a) * 0.8]]
    assert_near(memory.bank[0], expected, 1e-7)
    assert memory.bank[0, 1].norm() < 1                                 # shorter than 1, left so
    assert memory.count.tolist() == [2]


def test_similarity_is_the_cosine():
    """A slot that has become short still wins by its direction."""
    memory, one = PrototypeMemory(1, 2, 2, momentum=0.5), torch.ones(1, 1, dtype=torch.bool)
    memory.bank.copy_(torch.tensor([[[0.0, 0.1], [0.8, 0.6]]]))
    memory.count.fill_(2)
    memory.update(torch.tensor([[unit([0.1, 1.0]).tolist()]]), one)     # dot products 0.1 and 0.68
    assert_near(memory.bank[0, 1], [0.8, 0.6], 1e-7)
    assert_near(memory.bank[0, 0], (np.array([0, 0.1]) + np.array([0.1, 1]) / math.sqrt(1.01)) / 2, 1e-6)


def test_of_equal_similarities_the_first_slot_moves():
    one = torch.ones(1, 1, dtype=torch.bool)
    memory = PrototypeMemory(1, 3, 2, momentum=0.5)
    for p in ([-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]):
        memory.update(torch.tensor([[p]]), one)
    memory.update(torch.full((1, 1, 2), 0.5).sqrt(), one)               # 45 degrees from the last two
    half = math.sqrt(0.5) / 2
    assert_near(memory.bank[0], [[-1, 0], [0.5 + half, half], [0, 1]], 1e-6)
    same = PrototypeMemory(1, 3, 2, momentum=0.5)
    for p in ([1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]):
        same.update(torch.tensor([[p]]), one)
    assert_near(same.bank[0], [[0.5, 0.5], [1, 0], [1, 0]], 1e-7)


def test_one_image_at_a_time_is_the_whole_batch():
    """Also in the batch in which a class becomes full."""
    together, alone = PrototypeMemory(3, 4, 5), PrototypeMemory(3, 4, 5)
    for prototypes, present in some_updates(4, 6, 3, 5):
        together.update(prototypes, present)
        for b in range(6):
            alone.update(prototypes[b:b + 1], present[b:b + 1])
        assert_near(alone.bank, together.bank, 1e-6)
        assert torch.equal(alone.count, together.count)
    assert together.full is True


def test_absent_classes_leave_no_trace_and_may_hold_anything():
    memory, clean = PrototypeMemory(4, 2, 5), PrototypeMemory(4, 2, 5)
    for prototypes, present in some_updates(6, 3, 4, 5):
        memory.update(prototypes + 7 * (~present)[..., None], present)
        clean.update(prototypes, present)
    assert torch.equal(memory.bank, clean.bank) and torch.equal(memory.count, clean.count)
    memory.update(torch.ones(3, 4, 5), torch.zeros(3, 4, dtype=torch.bool))
    assert torch.equal(memory.bank, clean.bank)


def test_memory_keeps_copies_without_gradient():
    memory = PrototypeMemory(1, 1, 3)
    p = unit(normal(1, 1, 3)).requires_grad_()
    stored = p.detach().clone()
    memory.update(p, torch.tensor([[True]]))
    with torch.no_grad():
        p.zero_()
    assert torch.equal(memory.bank[0], stored[0]) and not memory.bank.requires_grad


def test_memory_goes_through_a_state_dict():
    """Half full and full: the restored memory goes on exactly as the first one does."""
    memory = PrototypeMemory(3, 3, 5)
    updates = list(some_updates(12, 2, 3, 5))
    for split in (2, 9):
        for prototypes, present in updates[:split]:
            memory.update(prototypes, present)
        restored = PrototypeMemory(3, 3, 5)
        restored.load_state_dict(copy.deepcopy(memory.state_dict()))
        assert restored.full == memory.full == (split == 9)
        for prototypes, present in updates[split:]:
            memory.update(prototypes, present)
            restored.update(prototypes, present)
        assert torch.equal(restored.bank, memory.bank) and torch.equal(restored.count, memory.count)
        memory = PrototypeMemory(3, 3, 5)


def test_memory_finds_the_most_similar_slot_inside_bf16_autocast():
    """Cosines 0.999 and 1: with 8 binary digits both are 1, and the wrong slot would move."""
    memory, one = PrototypeMemory(1, 2, 4, momentum=0.5), torch.ones(1, 1, dtype=torch.bool)
    slots = unit([[1.0, 0.5, 0.25, 0.05], [1.0, 0.5, 0.25, 0.0]])
    with bf16():
        for p in slots:
            memory.update(p[None, None], one)
        assert torch.equal(memory.bank[0], slots)
        memory.update(slots[None, 1:], one)
        assert torch.equal(memory.bank[0, 0], slots[0])
        memory.update(-slots[None, 1:], one)                            # slot 0 is a little less opposite
        assert torch.equal(memory.bank[0, 1], slots[1])
    assert memory.bank.dtype == torch.float32


# ---- keys of the augmenter -----------------------------------------------------------------------

def assert_keys(keys, mask, expected):
    """Those not masked, image by image and in order."""
    assert keys.dim() == 3 and mask.dtype == torch.bool and keys.shape[:2] == mask.shape
    assert len(keys) == len(expected) and not keys.requires_grad
    for b, rows in enumerate(expected):
        assert_near(keys[b][mask[b]], torch.stack(rows) if rows else torch.zeros(0, keys.shape[2]), 1e-7)


def test_local_keys_are_the_prototypes_of_the_classes_present():
    prototypes, present = unit(normal(4, 5, 6)), some_present(4, 5)
    present[3] = False                                                  # no key at all
    prototypes = prototypes * present[..., None]
    expected = [[prototypes[b, t] for t in range(5) if present[b, t]] for b in range(4)]
    assert_keys(*local_keys(prototypes, present), expected)


def test_global_keys_are_all_slots_of_the_classes_present():
    """Class by class, every slot a key of its own; slots that are still empty are masked."""
    memory, lengths = PrototypeMemory(4, 3, 6), set()
    for prototypes, present in some_updates(8, 2, 4, 6, chance=0.4):
        memory.update(prototypes, present)
        wanted = some_present(5, 4, seed=int(memory.count.sum()))
        wanted[4] = False
        expected = [[memory.bank[t, s] for t in range(4) if wanted[b, t] for s in range(int(memory.count[t]))]
                    for b in range(5)]
        assert_keys(*global_keys(memory, wanted), expected)
        lengths.add(len(expected[0]))
    assert memory.full and max(lengths) > 3
    empty = PrototypeMemory(4, 3, 6)
    assert_keys(*global_keys(empty, wanted), [[]] * 5)


# ---- Eq. 6-8: augmenter --------------------------------------------------------------------------

def some_augmenter(channels=5, hidden=4, seed=0, size=1.0):
    augmenter = FeatureAugmenter(channels, hidden=hidden)
    with torch.no_grad():
        for i, name in enumerate(LAYERS):
            layer = getattr(augmenter, name)
            layer.weight.copy_(normal(*layer.weight.shape, seed=10 * i + seed, size=size))
            layer.bias.copy_(normal(*layer.bias.shape, seed=10 * i + 5 + seed, size=size))
    return augmenter


def weights_of(augmenter):
    return {name: array(value) for name, value in augmenter.named_parameters()}


def some_mask(batch, K, seed=0):
    """(B,K) bool, at least one True and, for K > 1, at least one False in all."""
    mask = uniform(batch, K, seed=seed) < 0.6
    mask[torch.arange(batch), torch.arange(batch) % K] = True
    return mask


@pytest.mark.parametrize("channels, hidden, count", [(256, 128, 131712), (256, None, 131712),
                                                      (5, 4, 24 + 24 + 36 + 25)])
def test_augmenter_has_four_linear_layers(channels, hidden, count):
    """(C h + h) twice, (2 h h + h), (h C + C); at 256 and 128 the method's 131,712 parameters."""
    augmenter = FeatureAugmenter(channels, **({} if hidden is None else {"hidden": hidden}))
    h = hidden or 128
    assert sum(p.numel() for p in augmenter.parameters()) == count
    sizes = ((channels, h), (channels, h), (2 * h, h), (h, channels))
    for name, (inputs, outputs) in zip(LAYERS, sizes):
        layer = getattr(augmenter, name)
        assert isinstance(layer, nn.Linear)
        assert (layer.in_features, layer.out_features) == (inputs, outputs) and layer.bias is not None
    assert set(augmenter.state_dict()) == {f"{name}.{kind}" for name in LAYERS for kind in ("weight", "bias")}


@pytest.mark.parametrize("shape, K", [((2, 5, 3, 4), 6), ((1, 5, 1, 1), 1), ((3, 5, 2, 2), 3),
                                      ((1, 5, 7, 2), 20)])
@pytest.mark.parametrize("size", [0.3, 1.5])
def test_augmenter_is_the_loop(shape, K, size):
    """No 1 / sqrt(d), no sharing of the two projections, ReLU inside and after the sum."""
    augmenter = some_augmenter(size=size)
    features, keys, mask = normal(*shape), unit(normal(shape[0], K, 5, seed=1)), some_mask(shape[0], K)
    expected = slow_augment(array(features), array(keys), mask.numpy(), weights_of(augmenter))
    assert (expected > 0).any()
    assert_near(augmenter(features, keys, mask), expected, 2e-5)
    moved = features.contiguous(memory_format=torch.channels_last)
    assert_near(augmenter(moved, keys, mask), expected, 2e-5)


def test_slopes_of_the_augmenter():
    """To the features (through the sum and through both uses of e_f) and to all four layers."""
    augmenter = some_augmenter(3, 2, seed=3)
    features, keys, mask = normal(2, 3, 2, 2).requires_grad_(), unit(normal(2, 3, 3, seed=1)), some_mask(2, 3)
    weight, weights = normal(2, 3, 2, 2, seed=2), weights_of(augmenter)
    names = list(weights)
    (augmenter(features, keys, mask) * weight).sum().backward()

    def total(name, value):
        changed = dict(weights, features=array(features)) | {name: value}
        return (slow_augment(changed["features"], array(keys), mask.numpy(), changed) * array(weight)).sum()

    slope = numerical_slope(lambda x: total("features", x), array(features))
    assert_same_slope(features.grad, slope)
    for name in names:
        slope = numerical_slope(lambda x: total(name, x), weights[name])
        assert_same_slope(augmenter.get_parameter(name).grad, slope)


def test_one_key_has_the_weight_one():
    """Eq. 7 without attention: ReLU(f + L4 ReLU(L3 [e_fp, e_f])), whatever the feature is."""
    augmenter, features, key = some_augmenter(), normal(1, 5, 3, 3, size=4), unit(normal(1, 1, 5))
    f = features[0].flatten(1).T                                        # (9,C)
    with torch.no_grad():
        e_fp = augmenter.project_prototype(key[0]).expand(9, -1)
        e = F.relu(augmenter.fuse(torch.cat([e_fp, augmenter.project_feature(f)], 1)))
        expected = F.relu(f + augmenter.expand(e)).T.reshape(1, 5, 3, 3)
    assert_near(augmenter(features, key, torch.tensor([[True]])), expected, 1e-5)


def test_augmenter_by_hand():
    """Attention logits 0 and ln 3: weights 1/4 and 3/4. All layers are copies or sums."""
    augmenter = FeatureAugmenter(2, hidden=2)
    eye, zero = torch.eye(2), torch.zeros(2, 2)
    with torch.no_grad():
        for name, weight in zip(LAYERS, (eye, eye, torch.cat([eye, zero], 1), 2 * eye)):
            getattr(augmenter, name).weight.copy_(weight)
            getattr(augmenter, name).bias.zero_()
        augmenter.fuse.bias[1] = -1                                     # ReLU(3/4 - 1) = 0
        augmenter.expand.bias[1] = -0.25
    features = torch.tensor([0, math.log(3)]).reshape(1, 2, 1, 1)
    keys, mask = torch.tensor([[[1.0, 0], [0, 1]]]), torch.ones(1, 2, dtype=torch.bool)
    assert_near(augmenter(features, keys, mask).flatten(), [0 + 2 * 0.25, math.log(3) - 0.25], 1e-6)
    lower = augmenter(features - torch.tensor([9.0, 9.0]).reshape(1, 2, 1, 1), keys, mask)
    assert not lower.any()                                              # the last ReLU


def test_masked_keys_change_nothing():
    augmenter, features = some_augmenter(), normal(3, 5, 3, 2)
    keys, mask = unit(normal(3, 4, 5, seed=1)), some_mask(3, 4)
    expected = augmenter(features, keys, mask)
    garbage = torch.where(mask[..., None], keys, normal(3, 4, 5, seed=2, size=1e4))
    assert_near(augmenter(features, garbage, mask), expected, 1e-6)
    padded = torch.cat([normal(3, 2, 5, seed=3, size=1e4), keys, torch.zeros(3, 5, 5)], 1)
    wide = torch.cat([torch.zeros(3, 2), mask, torch.zeros(3, 5)], 1).bool()
    assert_near(augmenter(features, padded, wide), expected, 1e-6)
    for b in range(3):                                                  # without any padding
        alone = augmenter(features[b:b + 1], keys[b:b + 1, mask[b]], mask[b:b + 1, mask[b]])
        assert_near(alone, expected[b:b + 1], 1e-6)


def test_slopes_do_not_see_masked_keys():
    slopes = []
    features, keys = normal(2, 5, 3, 2).requires_grad_(), unit(normal(2, 4, 5, seed=1))
    mask = some_mask(2, 4)
    assert not mask.all()
    for rest in (torch.zeros(2, 4, 5), normal(2, 4, 5, seed=2, size=1e3)):
        augmenter = some_augmenter()
        out = augmenter(features, torch.where(mask[..., None], keys, rest), mask)
        slopes.append(torch.autograd.grad(out.square().sum(), [features, *augmenter.parameters()]))
    for clean, dirty in zip(*slopes):
        assert_same_slope(dirty, array(clean), 1e-5)


def test_order_and_copies_of_keys_change_nothing():
    """A softmax over twice the same keys gives every copy half the weight."""
    augmenter, features = some_augmenter(), normal(2, 5, 3, 2)
    keys, mask = unit(normal(2, 6, 5, seed=1)), some_mask(2, 6)
    expected, order = augmenter(features, keys, mask), [4, 0, 5, 2, 1, 3]
    assert_near(augmenter(features, keys[:, order], mask[:, order]), expected, 1e-5)
    assert_near(augmenter(features, keys.repeat(1, 2, 1), mask.repeat(1, 2)), expected, 1e-5)


def test_an_image_without_keys_has_finite_features_and_slopes():
    """And the other image of its batch is what it is alone."""
    augmenter, features = some_augmenter(), normal(2, 5, 3, 2).requires_grad_()
    keys, mask = unit(normal(2, 3, 5, seed=1)), torch.tensor([[False] * 3, [True] * 3])
    out = augmenter(features, keys, mask)
    slopes = torch.autograd.grad(out.sum(), [features, *augmenter.parameters()])
    assert all(torch.isfinite(x).all() for x in (out, *slopes))
    assert_near(out[1:], augmenter(features[1:], keys[1:], mask[1:]), 1e-6)
    for empty in (augmenter(features, keys, torch.zeros_like(mask)),
                  augmenter(features, *global_keys(PrototypeMemory(3, 2, 5), mask)),
                  augmenter(features, *local_keys(keys, torch.zeros_like(mask)))):
        assert torch.isfinite(empty).all()


def test_attention_logits_of_ten_thousand_are_finite():
    """The key with the largest one has the weight 1."""
    augmenter, keys = some_augmenter(), unit(normal(1, 4, 5, seed=1))
    features, mask = normal(1, 5, 3, 2, size=1e4).requires_grad_(), torch.ones(1, 4, dtype=torch.bool)
    out = augmenter(features, keys, mask)
    slopes = torch.autograd.grad(out.sum(), [features, *augmenter.parameters()])
    assert all(torch.isfinite(x).all() for x in (out, *slopes))
    expected = slow_augment(array(features), array(keys), mask.numpy(), weights_of(augmenter))
    assert_near(out, expected, 1e-3)


def sharp_augmenter():
    """(augmenter, features (2,4,5,5), keys (2,3,4), mask): logits near 50; channels 1-3 are x_i + w_i."""
    augmenter = FeatureAugmenter(4, hidden=4)
    eye, zero = torch.eye(4), torch.zeros(4, 4)
    with torch.no_grad():
        for name, weight in zip(LAYERS, (eye, eye, torch.cat([eye, zero], 1), eye)):
            getattr(augmenter, name).weight.copy_(weight)
            getattr(augmenter, name).bias.zero_()
    features = torch.cat([10 + uniform(2, 1, 5, 5, seed=1), uniform(2, 3, 5, 5, seed=2)], 1)
    keys = torch.cat([5 + 0.1 * uniform(2, 3, 1, seed=3), torch.eye(3).expand(2, 3, 3)], 2)
    return augmenter, features, keys, torch.ones(2, 3, dtype=torch.bool)


def test_a_masked_key_never_wins():
    """Not even where the logits of all others are -10,000: its weight is 0, theirs add up to 1."""
    augmenter, features, keys, mask = sharp_augmenter()
    features[:, 0] = torch.where(uniform(2, 5, 5) < 0.5, -1e4, 1e4)
    keys[:, :, 0] = 1
    mask[:, 1] = False
    out = augmenter(features, keys, mask)
    expected = slow_augment(array(features), array(keys), mask.numpy(), weights_of(augmenter))
    assert_near(out[:, 1:], expected[:, 1:], 1e-2)                      # the logits have steps of 1/1000
    assert_near((out - features)[:, 1:].sum(1), np.ones((2, 5, 5)), 1e-5)
    assert_near(out[:, 2], features[:, 2], 1e-6)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_attention_inside_bf16_autocast(kind):
    """Logits of 50 in bf16 have steps of 1/4, projections of 5 steps of 1/32: weights off by 0.1."""
    augmenter, features, keys, mask = sharp_augmenter()
    features = features.to(kind).requires_grad_()
    with bf16():
        out = augmenter(features, keys, mask)
        out.float().sum().backward()
    expected = slow_augment(array(features), array(keys), mask.numpy(), weights_of(augmenter))
    attention = expected[:, 1:] - array(features)[:, 1:]
    assert attention.min() > 0.05 and attention.max() < 0.95
    assert_near(out[:, 1:], expected[:, 1:], 1e-2)
    assert torch.isfinite(features.grad).all()


# ---- Eq. 9: partial cross-entropy ----------------------------------------------------------------

def some_scribbles(batch, h, w, classes, seed=0, share=0.4):
    labels = torch.randint(classes, (batch, h, w), generator=torch.Generator().manual_seed(seed))
    labels[uniform(batch, h, w, seed=seed + 1) > share] = 255
    labels[0, 0, 0], labels[-1, -1, -1] = 1, 0                          # corners count in every test
    return labels


PCE_SIZES = [((3, 4), (3, 4)), ((3, 4), (9, 10)), ((2, 3), (5, 3)), ((1, 2), (4, 7)), ((6, 5), (3, 3))]


@pytest.mark.parametrize("small, large", PCE_SIZES)
def test_partial_cross_entropy_is_the_loop(small, large):
    """Mean over the labelled pixels of the batch; logits are resized with their corners on the corners."""
    logits, scribbles = normal(2, 3, *small, size=2).requires_grad_(), some_scribbles(2, *large, 3)
    loss = partial_cross_entropy(logits, scribbles)
    assert loss.shape == () and loss.dtype == torch.float32
    assert_near(loss, slow_pce(array(logits), scribbles.numpy()), 1e-5)
    slope, = torch.autograd.grad(loss, logits)
    assert_same_slope(slope, numerical_slope(lambda x: slow_pce(x, scribbles.numpy()), array(logits)))


def test_partial_cross_entropy_by_hand():
    """Logits 0 and ln 3: -ln(1/4), -ln(3/4). One pixel in the first image, three in the second: one mean."""
    logits = torch.zeros(2, 2, 2, 2)
    logits[:, 1] = math.log(3)
    logits.requires_grad_()
    scribbles = torch.tensor([[[0, 255], [255, 255]], [[1, 1], [255, 1]]])
    loss = partial_cross_entropy(logits, scribbles)
    assert loss.item() == pytest.approx((math.log(4) + 3 * math.log(4 / 3)) / 4, abs=1e-6)
    slope, = torch.autograd.grad(loss, logits)
    expected = np.zeros((2, 2, 2, 2))                                   # (p - y) / 4
    expected[0, :, 0, 0] = [(1 / 4 - 1) / 4, (3 / 4) / 4]
    for i, j in ((0, 0), (0, 1), (1, 1)):
        expected[1, :, i, j] = [(1 / 4) / 4, (3 / 4 - 1) / 4]
    assert_near(slope, expected, 1e-6)


def test_resized_logits_keep_their_corners():
    """From 2 to 3 pixels with aligned corners: ends as they are, the mean between them."""
    logits = torch.zeros(1, 2, 1, 2)
    logits[0, 1, 0] = torch.tensor([-1.0, 3.0])
    for position, z in ((0, -1.0), (1, 1.0), (2, 3.0)):
        scribbles = torch.full((1, 1, 3), 255)
        scribbles[0, 0, position] = 1
        expected = math.log1p(math.exp(-z))
        assert partial_cross_entropy(logits, scribbles).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("side", [3, 6])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_a_batch_without_scribbles_costs_nothing(side, size):
    """Zero, attached to the graph with slope zero: backward() and distributed training go on."""
    logits = normal(2, 3, 3, 3, size=size).requires_grad_()
    loss = partial_cross_entropy(logits, torch.full((2, side, side), 255))
    assert loss.shape == () and loss.item() == 0 and loss.requires_grad
    loss.backward()
    assert logits.grad is not None and not logits.grad.any()


def test_an_image_without_scribbles_counts_for_nothing():
    logits, scribbles = normal(3, 4, 3, 3), some_scribbles(3, 3, 3, 4)
    scribbles[1] = 255
    kept = partial_cross_entropy(logits[[0, 2]], scribbles[[0, 2]])
    assert_near(partial_cross_entropy(logits, scribbles), kept, 1e-6)


def test_pixels_without_scribbles_have_no_slope():
    logits, scribbles = normal(2, 3, 5, 5).requires_grad_(), some_scribbles(2, 5, 5, 3)
    slope, = torch.autograd.grad(partial_cross_entropy(logits, scribbles), logits)
    labelled = (scribbles != 255)[:, None].expand_as(slope)
    assert not slope[~labelled].any() and slope[labelled].all()


def test_partial_cross_entropy_of_huge_logits_is_finite():
    logits, scribbles = normal(2, 3, 3, 3, size=1e4).requires_grad_(), some_scribbles(2, 7, 7, 3)
    loss = partial_cross_entropy(logits, scribbles)
    slope, = torch.autograd.grad(loss, logits)
    assert torch.isfinite(slope).all()
    assert loss.item() == pytest.approx(slow_pce(array(logits), scribbles.numpy()), rel=1e-5)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", [4, 11])
def test_partial_cross_entropy_inside_bf16_autocast(kind, side):
    """Also the resize: a logit of 50 between two pixels has steps of 1/4 in bf16."""
    logits, scribbles = (50 + normal(2, 3, 4, 4)).to(kind).requires_grad_(), some_scribbles(2, side, side, 3)
    with bf16():
        loss = partial_cross_entropy(logits, scribbles)
    assert loss.dtype == torch.float32
    assert_near(loss, slow_pce(array(logits), scribbles.numpy()), 2e-5)


# ---- Eq. 10: consistency -------------------------------------------------------------------------

@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("shape", [(2, 3, 3, 2), (1, 2, 1, 1), (3, 5, 2, 2)])
def test_consistency_is_the_loop(shape, reading):
    """With slopes to both sides: nothing is detached."""
    logits, augmented = (normal(*shape, seed=s, size=2).requires_grad_() for s in (0, 1))
    loss = consistency_loss(logits, augmented, reading=reading)
    assert loss.shape == () and loss.dtype == torch.float32
    assert_near(loss, slow_consistency(array(logits), array(augmented), reading), 1e-5)
    if reading == "paper":
        assert torch.equal(loss, consistency_loss(logits, augmented))
    slopes = torch.autograd.grad(loss, (logits, augmented))
    sides = [lambda x: slow_consistency(x, array(augmented), reading),
             lambda x: slow_consistency(array(logits), x, reading)]
    for slope, side, x in zip(slopes, sides, (logits, augmented)):
        assert_same_slope(slope, numerical_slope(side, array(x)))


def test_consistency_by_hand():
    """One pixel, p = (1, 3) / 4 and p_aug = (1, 1) / 2; then a second pixel at which both are (1, 1) / 2."""
    logits, augmented = torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)
    logits[0, 1] = math.log(3)
    p = np.array([0.25, 0.75])
    values = {"paper": math.log(2), "official": -(0.5 * (p - np.log(np.exp(p).sum()))).sum(), "mse": 1 / 16}
    assert values["official"] == pytest.approx(math.log(math.exp(0.25) + math.exp(0.75)) - 0.5)
    for reading in READINGS:
        loss = consistency_loss(logits, augmented, reading=reading)
        assert loss.item() == pytest.approx(values[reading], abs=1e-6)
    both = [torch.cat([x, torch.zeros(1, 2, 1, 1)], 3) for x in (logits, augmented)]
    agree = {"paper": math.log(2), "official": math.log(2), "mse": 0}   # of that pixel
    for reading in READINGS:
        expected = (values[reading] + agree[reading]) / 2
        assert consistency_loss(*both, reading=reading).item() == pytest.approx(expected, abs=1e-6)


def test_eq_10_is_a_mean_over_pixels_so_its_size_does_not_depend_on_the_image():
    logits, augmented = normal(1, 4, 2, 3), normal(1, 4, 2, 3, seed=1)
    for reading in READINGS:
        once = consistency_loss(logits, augmented, reading=reading)
        tiled = consistency_loss(logits.repeat(3, 1, 2, 5), augmented.repeat(3, 1, 2, 5), reading=reading)
        assert_near(tiled, once, 1e-6)


def test_eq_10_between_equal_predictions_is_their_entropy():
    """The least that any augmented prediction can reach: the slope of that side vanishes there."""
    logits = normal(2, 4, 3, 3)
    augmented = logits.clone().requires_grad_()
    loss = consistency_loss(logits, augmented)
    p = softmax(array(logits), 1)
    assert_near(loss, -(p * np.log(p)).sum(1).mean(), 1e-6)
    assert torch.autograd.grad(loss, augmented)[0].abs().max() < 1e-7


def test_official_consistency_of_21_classes_lies_between_2_12_and_3_12():
    """Softmax twice: log(e + 20) - 1 if both are sure of one class, log(e + 20) if of different ones."""
    sure = torch.full((1, 21, 2, 2), -60.0)
    sure[:, 4] = 60
    best, worst = (consistency_loss(sure, sure.roll(shift, 1), reading="official").item() for shift in (0, 1))
    assert best == pytest.approx(2.12, abs=0.01) and worst == pytest.approx(3.12, abs=0.01)
    assert best == pytest.approx(math.log(math.e + 20) - 1, abs=1e-5)
    for seed in range(5):
        loss = consistency_loss(*normal(2, 2, 21, 4, 4, seed=seed, size=4.0 ** seed), reading="official")
        assert best <= loss.item() <= worst


@pytest.mark.parametrize("reading", READINGS)
def test_consistency_of_huge_logits_is_finite(reading):
    logits, augmented = (normal(2, 5, 3, 3, seed=s, size=1e4).requires_grad_() for s in (0, 1))
    loss = consistency_loss(logits, augmented, reading=reading)
    expected = slow_consistency(array(logits), array(augmented), reading)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(loss, (logits, augmented)))


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_consistency_inside_bf16_autocast(reading, kind):
    logits, augmented = ((50 + normal(2, 5, 4, 4, seed=s)).to(kind).requires_grad_() for s in (0, 1))
    with bf16():
        loss = consistency_loss(logits, augmented, reading=reading)
    assert loss.dtype == torch.float32
    assert_near(loss, slow_consistency(array(logits), array(augmented), reading), 2e-5)
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(loss, (logits, augmented)))


# ---- all together --------------------------------------------------------------------------------

def one_step(names, device="cpu", autocast=False, reading="paper"):
    """A step with both augmentations after the memory has become full: results by name.

    names: dictionary with the functions of pfa_scribble.py.
    """
    augmenter = names["FeatureAugmenter"](8, hidden=4).to(device)
    augmenter.load_state_dict(some_augmenter(8, 4, size=0.5).state_dict())
    memory = names["PrototypeMemory"](3, 2, 8, momentum=0.5).to(device)
    features = normal(4, 8, 6, 6).abs().to(device).requires_grad_()
    logits = normal(4, 3, 6, 6, seed=1, size=3).to(device).requires_grad_()
    present, scribbles = some_present(4, 3, seed=2).to(device), some_scribbles(4, 21, 21, 3).to(device)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=autocast):
        scores = names["confidence"](logits, present, reading=reading)
        prototypes = names["extract_prototypes"](features, scores, present)
        for _ in range(3):
            memory.update(prototypes, present)
        local_aug = augmenter(features, *names["local_keys"](prototypes, present))
        global_aug = augmenter(features, *names["global_keys"](memory, present))
        loss = names["partial_cross_entropy"](global_aug[:, :3], scribbles)
        for augmented in (local_aug, global_aug):
            loss = loss + names["consistency_loss"](logits, augmented[:, :3], reading=reading)
    loss.backward()
    return {"prototypes": prototypes, "bank": memory.bank, "count": memory.count.double(), "local": local_aug,
            "global": global_aug, "loss": loss, "features": features.grad, "logits": logits.grad,
            "expand": augmenter.expand.weight.grad, "key": augmenter.project_prototype.weight.grad}


@pytest.mark.parametrize("reading", ["paper", "official"])
def test_prototypes_to_losses_paste_into_a_notebook(reading):
    """From the line `# ---- prototypes` to the line `# ---- model` the source needs torch alone."""
    start, end = (re.search(rf"^# ---- {word}", SOURCE, re.M).start() for word in ("prototypes", "model"))
    assert start < end
    names = dict(torch=torch, nn=nn, F=F)
    exec(SOURCE[start:end], names)
    pasted, imported = one_step(names, reading=reading), one_step(globals(), reading=reading)
    for name, value in imported.items():
        assert torch.isfinite(value).all() and torch.equal(pasted[name], value)


def assert_devices_agree(device, reading, autocast):
    here = one_step(globals(), reading=reading)
    there = one_step(globals(), device, autocast, reading)
    tolerance = 2e-2 if autocast else 1e-4
    for name, value in here.items():
        assert there[name].device.type == torch.device(device).type
        exact = name in ("prototypes", "bank", "count")                 # in float32 even under autocast
        assert_near(there[name], value, 1e-4 if exact else tolerance)


@pytest.mark.parametrize("reading", ["paper", "official"])
def test_a_step_inside_bf16_autocast_is_the_step(reading):
    """Features and logits come in float32: what these functions compute stays near to it."""
    assert_devices_agree("cpu", reading, True)


@pytest.mark.gpu
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("reading", ["paper", "official"])
def test_cpu_and_cuda_agree(reading, autocast, tf32):
    """Prototypes, memory, augmented features, losses and slopes; TF32 convolutions change nothing."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
        assert_devices_agree("cuda", reading, autocast)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_attention_on_cuda(autocast):
    """Logits near 50, against float64."""
    augmenter, features, keys, mask = sharp_augmenter()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        out = augmenter.to("cuda")(features.to("cuda"), keys.to("cuda"), mask.to("cuda"))
    expected = slow_augment(array(features), array(keys), mask.numpy(), weights_of(augmenter))
    assert_near(out[:, 1:], expected[:, 1:], 1e-2 if autocast else 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("momentum", [0.99, 0.5])
def test_memory_on_cuda_is_the_loop(momentum):
    memory, slow = PrototypeMemory(4, 3, 5, momentum=momentum).to("cuda"), SlowMemory(4, 3, momentum)
    for prototypes, present in some_updates(25, 3, 4, 5):
        memory.update(prototypes.to("cuda"), present.to("cuda"))
        slow.update(array(prototypes), present.numpy())
        assert memory.bank.is_cuda and memory.count.is_cuda and memory.full is slow.full()
        assert_near(memory.bank, slow.bank(5), 1e-5)
