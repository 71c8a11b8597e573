"""common/metrics.py against plain loops and values by hand: rates, quantiles, parts, activation boxes."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.metrics import (ConfusionMatrix, activation_box, activation_boxes, counted_quantiles,
                            part_consistency, part_truth, row_quantile, variant_truth)


def random_maps(seed, num_classes, shape=(2, 6, 7)):
    """labels with 255 in them, predictions: two int64 maps."""
    generator = torch.Generator().manual_seed(seed)
    labels, guesses = torch.randint(0, num_classes, (2, *shape), generator=generator)
    predictions = torch.where(torch.rand(shape, generator=generator) < 0.6, labels, guesses)
    labels[torch.rand(shape, generator=generator) < 0.2] = 255
    return labels, predictions


def filled(num_classes, *batches):
    confusion = ConfusionMatrix(num_classes)
    for labels, predictions in batches:
        confusion.update(labels, predictions)
    return confusion


# ---- segmentation ----

@pytest.mark.parametrize("num_classes, used", [(2, 2), (7, 4), (150, 40)])
def test_every_rate_is_that_of_sets_of_pixels(num_classes, used):
    """In one batch or two, also of uint8, into which label * N does not fit."""
    labels, predictions = random_maps(num_classes, used)
    true, found = (torch.stack([maps[labels != 255] == c for c in range(num_classes)]).numpy()
                   for maps in (labels, predictions))                     # (N,pixels)
    both, either = (true & found).sum(1), (true | found).sum(1)
    with np.errstate(invalid="ignore"):
        iou, recall = both / either, both / true.sum(1)
        f1 = 2 * both / (true.sum(1) + found.sum(1))
    first, second = zip(labels, predictions)
    confusion = filled(num_classes, first, [maps.byte() for maps in second])
    summary = confusion.summary()
    for rate, expected in zip(confusion.rates(), (iou, recall, f1), strict=True):
        np.testing.assert_allclose(rate.numpy(), expected, atol=1e-12)
    assert summary["miou"] == pytest.approx(100 * np.nanmean(iou))
    assert summary["macc"] == pytest.approx(100 * np.nanmean(recall))


def test_by_hand_rates_are_of_the_whole_split_and_a_class_only_predicted_counts_as_zero():
    """Two images; rows of the matrix are labels. A mean over images would be another number."""
    labels = torch.tensor([[[0, 0, 0, 1]], [[1, 255, 255, 0]]])
    predictions = torch.tensor([[[0, 0, 1, 1]], [[2, 3, 0, 0]]])          # 3: only where the label is 255
    confusion = filled(4, (labels, predictions))
    assert confusion.matrix.tolist() == [[3, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert confusion.summary() == dict(                                 # class 2 counts in mIoU, not in mAcc
        miou=pytest.approx((75 + 100 / 3 + 0) / 3), macc=pytest.approx((75 + 50) / 2), absent=[2, 3],
        pixel_acc=pytest.approx(100 * 4 / 6), iou=[pytest.approx(75), pytest.approx(100 / 3), 0.0, None],
        f1=[pytest.approx(600 / 7), pytest.approx(50), 0.0, None])
    empty = filled(2, (torch.full((1, 3, 3), 255), torch.zeros(1, 3, 3))).summary()
    assert empty["iou"] == [None] * 2 and empty["absent"] == [0, 1] and math.isnan(empty["miou"])
    confusion.matrix += 2 ** 24                                           # float32 has no 2^24 + 1
    assert confusion.totals()[0].tolist() == [2 ** 24 + 3, 2 ** 24 + 1, 2 ** 24, 2 ** 24]
    with pytest.raises(ValueError, match="resize the logits"):
        confusion.update(labels, predictions[:, :, :2])
    confusion.all_reduce()
    with pytest.raises(RuntimeError, match="start a new ConfusionMatrix"):
        confusion.update(labels, predictions)


@pytest.mark.gpu
def test_update_on_a_gpu_does_not_wait_for_it():
    maps = random_maps(6, 20, shape=(2, 64, 64))
    confusion, on_gpu = ConfusionMatrix(20, device="cuda"), [part.to("cuda") for part in maps]
    confusion.update(*on_gpu)                                             # first call: kernels load
    torch.cuda.set_sync_debug_mode("error")
    try:
        confusion.update(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert confusion.summary() == filled(20, maps, maps).summary()


def test_row_quantile_is_torchs_and_takes_more_than_16_million_values():
    values = random_maps(0, 50)[1].flatten(1).float()
    for q in (0.3, 0.8, 1):
        torch.testing.assert_close(row_quantile(values, q), values.quantile(q, 1))
    assert row_quantile(torch.arange(2.0 ** 24 + 1)[None], 0.5) == 2 ** 23             # torch.quantile stops


def test_counted_quantiles_are_those_of_values_that_stand_there_so_often():
    values, counts = (random_maps(seed, n, (40, 30))[0] for seed, n in ((0, 9), (1, 4)))
    counts[:4], counts[0, 7] = 0, 1                                     # one value, and rows without any
    found = counted_quantiles(values / 7, counts, [0.1, 0.5, 0.99])
    for row, count, those in zip(values / 7, counts, found.T):
        repeated = row.repeat_interleave(count)
        assert not len(repeated) or those.tolist() == pytest.approx(np.quantile(repeated, [0.1, 0.5, 0.99]))


# ---- parts: N images, M prototypes, P parts, C classes of 3 slots ----

N, M, P, C = 14, 5, 4, 4


def percent(hits):
    return pytest.approx(100 * np.mean(hits), abs=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_parts_and_what_classes_share_are_judged_as_by_loops(seed):
    rng = np.random.default_rng(seed)
    similarity, labels, home = torch.tensor(rng.random((N, M))), torch.arange(N) % C, rng.integers(0, C, M)
    points = torch.tensor(np.dstack([rng.random((N, P, 2)) * 9, rng.random((N, P)) < 0.7]))
    points[:, 2, :2], points[:, 3, 2] = 2 + points[:, 2, :2] / 2, 0     # rather central; never visible
    boxes, noisy = (torch.tensor(rng.integers([0, 5] * 2, [4, 10] * 2, (N, M, 4))) for _ in range(2))
    held_in, variants = rng.integers(0, M, (C, 3)), rng.integers(0, 2 + seed, (C, P))
    slots = torch.zeros(C, 3, M)
    filled = [(c, k) for c, k in np.ndindex(C, 3) if (c, k) != (1, 2)]
    for c, k in filled:
        slots[c, k, held_in[c, k]] = 1
    holds = [{held_in[c, k] for k in range(3) if (c, k) in filled} for c in range(C)]
    held = torch.tensor([[m in holds[c] for m in range(M)] for c in range(C)])

    def holds_part(box, point):
        return bool(point[2]) and box[0] <= point[1] < box[1] and box[2] <= point[0] < box[3]
    inside, found = part_truth(boxes, noisy, points, similarity, labels, held, torch.tensor(home), 9)
    shaken = torch.zeros_like(inside)
    for n, m, p in np.ndindex(N, M, P):
        assert inside[n, m, p] == holds_part(boxes[n, m], points[n, p])
        shaken[n, m, p] = holds_part(noisy[n, m], points[n, p])
    assert found["stability"] == percent([torch.equal(inside[n, m], shaken[n, m])
                                          for n, m in np.ndindex(N, M) if held[labels[n], m]])
    for name, counts in (("", lambda c, m: True), ("_home", lambda c, m: c == home[m]),
                         ("_guests", lambda c, m: c != home[m])):
        consistent = []
        for m in range(M):
            own = [n for n in range(N) if held[labels[n], m] and counts(labels[n], m)]
            seen = [[inside[n, m, p].item() for n in own if points[n, p, 2]] for p in range(P)]
            consistent += [any(hits and np.mean(hits) >= 0.8 for hits in seen)] * bool(own)
        assert found[f"consistency{name}"] == percent(consistent)

    numbers, true = variant_truth(inside, similarity, labels, slots, torch.tensor(variants))
    shown, purity, variant_purity = [], [], []
    for m in range(M):
        top = sorted(range(N), key=lambda n: -similarity[n, m].item())[:10]
        purity.append(max(np.mean([inside[n, m, p] for n in top]) for p in range(P)))
        shares = {(p, v): np.mean([inside[n, m, p] and variants[labels[n], p] == v for n in top])
                  for p in range(P) for v in range(variants.max() + 1)}
        shown.append(max(shares, key=shares.get))                       # of equal ones the first
        variant_purity.append(shares[shown[m]])
    fits = [[variants[c, p] == v for p, v in shown] for c in range(C)]
    assert found["purity"] == percent(purity) and numbers["variant_purity"] == percent(variant_purity)
    assert true.tolist() == fits
    assert numbers["true_slots"] == percent([fits[c][held_in[c, k]] for c, k in filled])
    pairs = [(len(holds[a] & holds[b]), sum(variants[a] == variants[b])) for a in range(C) for b in range(a)]
    for name, is_of in (("with", lambda alike: alike > 0), ("without", lambda alike: alike == 0)):
        counts = [shared for shared, alike in pairs if is_of(alike)]
        assert numbers[f"shared_{name}_variant"] == (pytest.approx(np.mean(counts)) if counts else None)
    assert numbers["graph_correlation"] == pytest.approx(np.corrcoef(np.transpose(pairs))[0, 1])
    same = variant_truth(inside, similarity, labels, slots, torch.zeros(C, P).long())[0]
    assert same["graph_correlation"] is same["shared_without_variant"] is None
    assert part_consistency(inside, inside[:, 0], torch.zeros(N, M).bool()) is None


# ---- the box of a prototypical part: 95th percentile of the upsampled map ----

@pytest.mark.parametrize("shape, size, percentile", [((7, 7), (50, 9), 95), ((5, 8), (64, 33), 80)])
def test_a_box_surrounds_all_pixels_at_or_above_the_percentile(shape, size, percentile):
    """ProtoPNet's crop: upsample bicubically, then the smallest box."""
    maps = torch.rand(3, *shape, generator=torch.Generator().manual_seed(sum(shape))) ** 3
    large = F.interpolate(maps[None], size, mode="bicubic")[0].double().numpy()
    for values, up, box in zip(maps, large, activation_boxes(maps, size, percentile).tolist()):
        y, x = np.nonzero(up >= np.percentile(up, percentile))
        assert box == [y.min(), y.max() + 1, x.min(), x.max() + 1]
        assert activation_box(values, size, percentile) == tuple(box)
