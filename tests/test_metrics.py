"""common/metrics.py against plain Python loops over pixels and against values worked out by hand."""
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from common.metrics import (ConfusionMatrix, activation_box, activation_boxes, part_consistency, part_shares,
                            part_stability, points_in_boxes)


def random_maps(seed, num_classes, shape=(2, 6, 7), classes_used=None, ignored=0.2):
    """labels with 255 in them, predictions: two int64 maps; only ids below `classes_used` occur."""
    generator = torch.Generator().manual_seed(seed)
    used = classes_used or num_classes
    labels = torch.randint(0, used, shape, generator=generator)
    guesses = torch.randint(0, used, shape, generator=generator)
    predictions = torch.where(torch.rand(shape, generator=generator) < 0.6, labels, guesses)
    labels[torch.rand(shape, generator=generator) < ignored] = 255
    return labels, predictions


def filled(num_classes, *batches):
    confusion = ConfusionMatrix(num_classes)
    for labels, predictions in batches:
        confusion.update(labels, predictions)
    return confusion


def brute_force(labels, predictions, num_classes):
    """Sets of pixel positions: IoU, acc and F1 of each class as fractions, None where the ratio is 0/0."""
    pairs = [(t, p) for t, p in zip(labels.flatten().tolist(), predictions.flatten().tolist()) if t != 255]
    rates = {"iou": [], "acc": [], "f1": []}
    for c in range(num_classes):
        true = {i for i, (t, _) in enumerate(pairs) if t == c}
        found = {i for i, (_, p) in enumerate(pairs) if p == c}
        both = len(true & found)
        rates["iou"].append(both / len(true | found) if true | found else None)
        rates["acc"].append(both / len(true) if true else None)
        precision = both / len(found) if found else 0.0
        recall = both / len(true) if true else 0.0
        harmonic = 2 * precision * recall / (precision + recall) if both else 0.0
        rates["f1"].append(harmonic if true or found else None)
    rates["pixel_acc"] = sum(t == p for t, p in pairs) / len(pairs)
    rates["absent"] = [c for c in range(num_classes) if all(t != c for t, _ in pairs)]
    return rates


def mean_of_known(values):
    known = [v for v in values if v is not None]
    return sum(known) / len(known)


@pytest.mark.parametrize("num_classes, used", [(2, 2), (5, 5), (7, 4), (150, 40), (1, 1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_rate_equals_brute_force(num_classes, used, seed):
    labels, predictions = random_maps(seed, num_classes, classes_used=used)
    confusion = filled(num_classes, (labels, predictions))
    expected = brute_force(labels, predictions, num_classes)
    for name, rates in zip(("iou", "acc", "f1"), confusion.rates()):
        assert rates.shape == (num_classes,) and rates.dtype == torch.float64
        for rate, value in zip(rates.tolist(), expected[name]):
            assert math.isnan(rate) if value is None else rate == pytest.approx(value, abs=1e-12)
    summary = confusion.summary()
    assert summary["miou"] == pytest.approx(100 * mean_of_known(expected["iou"]))
    assert summary["macc"] == pytest.approx(100 * mean_of_known(expected["acc"]))
    assert summary["pixel_acc"] == pytest.approx(100 * expected["pixel_acc"])
    assert summary["absent"] == expected["absent"]
    for name in ("iou", "f1"):
        for percent, value in zip(summary[name], expected[name], strict=True):
            assert percent is None if value is None else percent == pytest.approx(100 * value)


def test_hand_values_rows_are_labels_and_a_class_only_predicted_counts_as_zero():
    labels = torch.tensor([[[0, 0, 0, 1], [1, 255, 255, 0]]])
    predictions = torch.tensor([[[0, 0, 1, 1], [2, 3, 0, 0]]])      # 3: only where the label is 255
    confusion = filled(4, (labels, predictions))
    assert confusion.matrix.tolist() == [[3, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    summary = confusion.summary()
    assert summary["iou"] == [pytest.approx(75), pytest.approx(100 / 3), 0.0, None]
    assert summary["miou"] == pytest.approx((75 + 100 / 3 + 0) / 3)       # class 2 counts, class 3 does not
    assert summary["macc"] == pytest.approx((75 + 50) / 2)                # classes with labels alone
    assert summary["pixel_acc"] == pytest.approx(100 * 4 / 6)
    assert summary["f1"] == [pytest.approx(600 / 7), pytest.approx(50), 0.0, None]
    assert summary["absent"] == [2, 3]
    assert all(type(summary[name]) is float for name in ("miou", "macc", "pixel_acc"))


def test_ignored_pixels_never_count():
    labels, predictions = random_maps(3, 5)
    before = filled(5, (labels, predictions)).matrix
    changed = torch.where(labels == 255, (predictions + 1) % 5, predictions)
    assert torch.equal(filled(5, (labels, changed)).matrix, before)
    assert before.sum() == (labels != 255).sum()


def test_nothing_labelled_gives_no_rate_and_no_error():
    labels = torch.full((1, 3, 3), 255)
    summary = filled(3, (labels, torch.zeros_like(labels))).summary()
    assert summary["iou"] == [None] * 3 and summary["absent"] == [0, 1, 2]
    assert all(math.isnan(summary[name]) for name in ("miou", "macc", "pixel_acc"))


def test_the_order_of_images_and_their_batching_do_not_matter():
    labels, predictions = random_maps(4, 6, shape=(5, 8, 8))
    whole = filled(6, (labels, predictions)).matrix
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(filled(6, (labels[order], predictions[order])).matrix, whole)
    parts = filled(6, (labels[:2], predictions[:2]), (labels[2:], predictions[2:]))
    assert torch.equal(parts.matrix, whole)


def test_scores_are_of_the_whole_split_and_not_a_mean_over_images():
    # Image 1: 1 of 1 pixel right; image 2: 1 of 3. Whole split: IoU 2/4; mean over images: (1 + 1/3) / 2.
    first = (torch.tensor([[[0, 255, 255]]]), torch.tensor([[[0, 1, 1]]]))
    second = (torch.tensor([[[0, 0, 0]]]), torch.tensor([[[0, 1, 1]]]))
    assert filled(2, first, second).rates()[0][0].item() == pytest.approx(0.5)


def test_uint8_maps_count_like_int64_maps():
    labels, predictions = random_maps(5, 150)                             # 149 * 150 does not fit into uint8
    expected = filled(150, (labels, predictions)).matrix
    assert torch.equal(filled(150, (labels.to(torch.uint8), predictions.to(torch.uint8))).matrix, expected)


def test_counts_stay_exact_beyond_float32():
    confusion = filled(2, *[random_maps(seed, 2) for seed in range(3)])
    confusion.matrix += 2 ** 24                                           # float32 has no 2^24 + 1
    tp, labelled, _ = confusion.totals()
    assert confusion.matrix.dtype == torch.int64
    assert tp.tolist() == confusion.matrix.diag().tolist()
    assert labelled.tolist() == confusion.matrix.sum(1).tolist()


def test_labels_of_another_size_are_refused():
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="resize the logits"):
        ConfusionMatrix(3).update(labels, labels[:, :2, :2])


def test_update_reads_no_value_back_to_the_host():
    # Tensors on "meta" have no values: .item(), .cpu() or a boolean index (its size is a value) would fail.
    confusion = ConfusionMatrix(5, device="meta")
    maps = torch.zeros(2, 8, 8, dtype=torch.int64, device="meta")
    confusion.update(maps, maps)
    assert confusion.matrix.device.type == "meta" and confusion.matrix.shape == (5, 5)


@pytest.mark.gpu
def test_update_on_a_gpu_does_not_wait_for_it():
    labels, predictions = random_maps(6, 20, shape=(2, 64, 64))
    confusion, on_gpu = ConfusionMatrix(20, device="cuda"), (labels.to("cuda"), predictions.to("cuda"))
    confusion.update(*on_gpu)                                             # first call: kernels load
    torch.cuda.set_sync_debug_mode("error")
    try:
        confusion.update(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = filled(20, (labels, predictions), (labels, predictions))
    assert torch.equal(confusion.matrix.cpu(), expected.matrix)
    assert confusion.summary() == expected.summary()


def test_all_reduce_in_one_process_changes_nothing_and_ends_the_counting():
    labels, predictions = random_maps(7, 3)
    confusion = filled(3, (labels, predictions))
    before = confusion.matrix.clone()
    confusion.all_reduce()
    assert torch.equal(confusion.matrix, before)
    with pytest.raises(RuntimeError, match="start a new ConfusionMatrix"):
        confusion.update(labels, predictions)


def count_in_one_of_two_processes(rank, store, folder):
    """Rank 0 counts two batches, rank 1 one; all_reduce is called twice on purpose."""
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    confusion = filled(4, *[random_maps(seed, 4) for seed in ((0, 1), (2,))[rank]])
    confusion.all_reduce()
    confusion.all_reduce()
    torch.save(confusion.matrix, f"{folder}/{rank}.bin")
    dist.destroy_process_group()


def test_two_processes_both_hold_the_sum_once(tmp_path):
    mp.spawn(count_in_one_of_two_processes, ((tmp_path / "store").as_uri(), str(tmp_path)), nprocs=2)
    expected = filled(4, *[random_maps(seed, 4) for seed in range(3)]).matrix
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"{rank}.bin", weights_only=True), expected)


# ---- parts: N images, M prototypes, P parts -------------------------------------------------------

N, M, P = 14, 5, 4


def random_parts(seed):
    """inside (N,M,P), visible (N,P), own (N,M) bool: a part inside a region is visible; part 3 never is."""
    generator = torch.Generator().manual_seed(seed)
    visible = torch.rand(N, P, generator=generator) < 0.7
    visible[:, 3] = False
    inside = (torch.rand(N, M, P, generator=generator) < 0.6) & visible[:, None]
    own = torch.rand(N, M, generator=generator) < 0.5
    return inside, visible, own


@pytest.mark.parametrize("seed", range(3))
def test_points_in_boxes_by_loops(seed):
    generator = torch.Generator().manual_seed(seed)
    low, long = torch.randint(0, 6, (2, N, M, 2), generator=generator)
    boxes = torch.stack([low, low + long], 3).flatten(2)                              # y0 y1 x0 x1
    points = torch.randint(0, 12, (N, P, 3), generator=generator).float()             # many on the edges
    points[..., 2] = torch.randint(0, 2, (N, P), generator=generator).float()
    found = points_in_boxes(boxes, points)
    assert found.dtype == torch.bool and found.shape == (N, M, P) and 0 < found.sum() < found.numel()
    for n, m, p in np.ndindex(N, M, P):
        y0, y1, x0, x1 = boxes[n, m].tolist()
        x, y, visible = points[n, p].tolist()
        assert found[n, m, p] == (visible == 1 and int(x) in range(x0, x1) and int(y) in range(y0, y1))


def test_points_in_boxes_by_hand():
    """Ends are exclusive; rows come first in a box, columns first in a point."""
    boxes = torch.tensor([[[2, 5, 10, 20]]])
    points = torch.tensor([[[10.0, 2, 1], [19.9, 4.9, 1], [20, 3, 1], [12, 5, 1], [3, 12, 1], [12, 3, 0]]])
    assert points_in_boxes(boxes, points)[0, 0].tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize("most", [1, 3, 10, 50])
@pytest.mark.parametrize("seed", range(3))
def test_part_shares_by_loops(seed, most):
    inside, _, _ = random_parts(seed)
    similarity = torch.rand(N, M, generator=torch.Generator().manual_seed(seed))
    shares = part_shares(inside, similarity, most)
    assert shares.shape == (M, P)
    for m, p in np.ndindex(M, P):
        top = sorted(range(N), key=lambda n: -similarity[n, m].item())[:most]
        assert shares[m, p].item() == pytest.approx(sum(inside[n, m, p].item() for n in top) / len(top))
    if most == 10:
        assert torch.equal(part_shares(inside, similarity), shares)                   # the default


@pytest.mark.parametrize("share", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("seed", range(6))
def test_part_consistency_by_loops(seed, share):
    inside, visible, own = random_parts(seed)
    own[:, 4] = seed % 2 == 0                                                    # of all classes, or of none
    inside[:, 1, 2] = visible[:, 2]                                                   # always the same part
    consistent = 0
    for m in range(M):
        rates = []
        for p in range(P):
            seen = [n for n in range(N) if own[n, m] and visible[n, p]]
            rates.append(sum(inside[n, m, p].item() for n in seen) / len(seen) if seen else 0)
        consistent += max(rates) >= share
    assert part_consistency(inside, visible, own, share) == pytest.approx(100 * consistent / M)
    assert consistent >= 1
    if share == 0.8:
        assert part_consistency(inside, visible, own) == pytest.approx(100 * consistent / M)


@pytest.mark.parametrize("seed", range(3))
def test_part_stability_by_loops(seed):
    inside, visible, own = random_parts(seed)
    flips = torch.rand(N, M, P, generator=torch.Generator().manual_seed(seed + 9)) < 0.1
    noisy = inside ^ flips
    pairs = [(n, m) for n, m in np.ndindex(N, M) if own[n, m]]
    kept = sum(inside[n, m].tolist() == noisy[n, m].tolist() for n, m in pairs)
    assert 0 < kept < len(pairs)
    assert part_stability(inside, noisy, own) == pytest.approx(100 * kept / len(pairs))
    assert part_stability(inside, inside, own) == 100


# ---- the box of a prototypical part: 95th percentile of the upsampled map ------------------------

def bicubic_weights(size, out):
    """(out,size): Keys' cubic kernel, a = -0.75, pixel centres aligned, the border cell repeated outside."""
    weights = np.zeros((out, size))
    for i in range(out):
        position = (i + 0.5) * size / out - 0.5
        for cell in range(math.floor(position) - 1, math.floor(position) + 3):
            t = abs(position - cell)
            near, far = 1.25 * t ** 3 - 2.25 * t ** 2 + 1, -0.75 * (t ** 3 - 5 * t ** 2 + 8 * t - 4)
            weights[i, min(max(cell, 0), size - 1)] += near if t <= 1 else far
    return weights


def slow_box(values, height, width, percentile):
    values = values.double().numpy()
    up = bicubic_weights(values.shape[0], height) @ values @ bicubic_weights(values.shape[1], width).T
    y, x = np.nonzero(up >= np.percentile(up, percentile))
    return y.min(), y.max() + 1, x.min(), x.max() + 1


@pytest.mark.parametrize("shape, size", [((7, 7), 224), ((3, 3), 96), ((7, 7), (50, 9)), ((5, 8), (64, 33))])
@pytest.mark.parametrize("percentile", [95, 80, 99.5])
def test_activation_box_by_brute_force(shape, size, percentile):
    """ProtoPNet's crop: upsample bicubically, smallest box around all pixels >= the percentile."""
    height, width = (size, size) if isinstance(size, int) else size
    values = torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) ** 3
    box = activation_box(values, size, percentile)
    assert all(type(edge) is int for edge in box)
    assert tuple(box) == slow_box(values, height, width, percentile)


def test_activation_box_by_hand():
    """A map at its own size is not interpolated. The 95th percentile of 0..99 is 94.05, below 95 to 99."""
    count = torch.arange(100.0).reshape(10, 10)
    assert tuple(activation_box(count, 10)) == (9, 10, 5, 10)           # 95 is the default
    peaks = torch.zeros(6, 20)
    peaks[2, 3] = peaks[4, 15] = 1
    assert tuple(activation_box(peaks, (6, 20), percentile=99)) == (2, 5, 3, 16)    # one box around both
    assert tuple(activation_box(peaks, (6, 20))) == (0, 6, 0, 20)       # the percentile is 0


@pytest.mark.parametrize("value", [0.0, 0.3, 9.2103, -2.7])
@pytest.mark.parametrize("shape, size", [((7, 7), 224), ((5, 8), (40, 96)), ((3, 3), (30, 50)), ((1, 1), 9)])
def test_activation_box_of_a_constant_map_is_the_whole_picture(value, shape, size):
    """No pixel stands out: all tie with the percentile. Rounding in the upsampling must not choose some."""
    height, width = (size, size) if isinstance(size, int) else size
    assert tuple(activation_box(torch.full(shape, value), size)) == (0, height, 0, width)


def test_activation_boxes_are_those_of_activation_box():
    maps = torch.rand(9, 4, 5, generator=torch.Generator().manual_seed(0))
    maps[3], maps[4, 2, 2] = 0.5, 9.0
    for size in ((32, 32), (20, 41)):
        for percentile in (95, 60):
            boxes = activation_boxes(maps, size, percentile)
            assert boxes.shape == (9, 4) and boxes.dtype == torch.int64
            single = [activation_box(one, size, percentile) for one in maps]
            assert [tuple(box) for box in boxes.tolist()] == single
    assert boxes[3].tolist() == [0, 20, 0, 41]
