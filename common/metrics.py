"""Scores: segmentation from one confusion matrix over a whole split (the protocol of mmsegmentation), mAP of
several labels an image, and whether the regions that prototypes point at hold the same part.

With T = labelled pixels of a class, P = pixels predicted as it, TP = pixels that are both:
    IoU = TP / (T + P - TP)        acc = TP / T        F1 = 2 TP / (T + P)
mIoU and mAcc are means over the classes for which the ratio exists: a class in neither the labels nor the
predictions is left out of mIoU, one that is only predicted enters it with IoU 0. The counts are summed
before any ratio is taken: a mean of the mIoU of single images is another number.
"""
import functools

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F


class ConfusionMatrix:
    """Counts in `matrix`: (N,N) int64 on the device, row = label, column = prediction. N is at most 255."""

    def __init__(self, num_classes, device="cpu"):
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        self.finished = False                                       # True once all_reduce was called

    def update(self, labels, predictions):
        """Add a batch. Both (B,H,W) integer tensors of the same shape, on the device of the matrix.

        labels: class ids 0..N-1, or 255 = ignore: such a pixel counts neither as T nor as P. predictions:
        0..N-1. Other ids are not looked for, as a GPU would wait at every batch: the readers in
        common/datasets.py do. Raises ValueError if the shapes differ, RuntimeError after all_reduce.
        """
        if labels.shape != predictions.shape:
            raise ValueError(f"labels {tuple(labels.shape)} and predictions {tuple(predictions.shape)} "
                             "differ in shape: resize the logits to the label's size before argmax")
        if self.finished:
            raise RuntimeError("update after all_reduce: start a new ConfusionMatrix for another split")
        N = len(self.matrix)
        # One bin per (label, prediction) pair and one more for the ignored pixels, dropped below. A boolean
        # index or bincount would make a GPU wait for the size of the result.
        pair = torch.where(labels == 255, N * N, labels.long() * N + predictions.long()).flatten()
        counts = torch.zeros(N * N + 1, dtype=torch.int64, device=self.matrix.device)
        counts.scatter_add_(0, pair, torch.ones_like(pair))
        self.matrix += counts[:-1].view(N, N)

    def all_reduce(self):
        """After the last update: sum the counts over all processes; a second call changes nothing."""
        if dist.is_available() and dist.is_initialized() and not self.finished:
            dist.all_reduce(self.matrix)
        self.finished = True

    def totals(self):
        """TP, T, P of every class: (N,) float64 on the CPU (the counts move first: MPS has no float64)."""
        counts = self.matrix.cpu().double()
        return counts.diag(), counts.sum(1), counts.sum(0)

    def rates(self):
        """IoU, acc (recall), F1 of every class: (N,) float64 each on the CPU, fractions; nan for 0 / 0."""
        tp, labelled, predicted = self.totals()
        return tp / (labelled + predicted - tp), tp / labelled, 2 * tp / (labelled + predicted)

    def summary(self):
        """All rates in percent, as plain Python numbers.

        miou, macc, pixel_acc: floats, nan if not one pixel is labelled. iou, f1: one value per class, None
        where there is none. absent: ids of the classes without a label; report them next to the mean.
        """
        tp, labelled, _ = self.totals()
        iou, acc, f1 = self.rates()
        return {"miou": 100 * iou.nanmean().item(), "macc": 100 * acc.nanmean().item(),
                "pixel_acc": 100 * (tp.sum() / labelled.sum()).item(),
                "iou": percent_or_none(iou), "f1": percent_or_none(f1),
                "absent": (labelled == 0).nonzero().flatten().tolist()}


def percent_or_none(rates):
    """(N,) fractions -> list of N percentages, None for nan."""
    return [None if rate != rate else 100 * rate for rate in rates.tolist()]


def mean_average_precision(scores, truth):
    """mAP in percent: mean over the classes that occur of the area under precision against recall.

    scores (M,N) float, truth (M,N) bool, both without the background: precision averaged over the positives,
    images ranked by falling score (stable). nan if no class occurs.
    """
    order = scores.argsort(dim=0, descending=True, stable=True)
    hits = truth.gather(0, order).double()                           # (M,N)
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)[:, None]
    positives = hits.sum(0)
    return 100 * ((precision * hits).sum(0) / positives)[positives > 0].mean().item()


def row_quantile(values, q):
    """Quantile of every row (R,n) -> (R,), as torch.quantile, which stops at 16 million values."""
    if values.device.type == "mps":                                  # old torch lacks kthvalue there
        return row_quantile(values.cpu(), q).to("mps")
    place = q * (values.shape[1] - 1)
    low, high = int(place), min(int(place) + 1, values.shape[1] - 1)
    if values.device.type == "cpu":                                  # numpy needs a sixth of kthvalue's time
        both = np.partition(values.detach().numpy(), (low, high), axis=1)[:, [low, high]]
        below, above = torch.from_numpy(both).unbind(1)
    else:
        below, above = (values.kthvalue(rank + 1, 1).values for rank in (low, high))
    return torch.lerp(below, above, place - low)


def counted_quantiles(values, counts, quantiles):
    """row_quantile for each of Q quantiles, of rows in which values[r,k] stands counts[r,k] times. values
    (R,n), counts int64 (R,n) -> (Q,R); a row of counts 0 gets any number. Never waits for the device."""
    if values.device.type == "mps":                                  # which lacks float64
        return counted_quantiles(values.cpu(), counts.cpu(), quantiles).to("mps")
    values, order = values.sort(1)
    ends = counts.gather(1, order).cumsum(1)                         # (R,n): ranks below are values up to k
    place = torch.stack([q * (ends[:, -1].double() - 1) for q in quantiles], 1)           # (R,Q)
    low = place.long()
    ranks = torch.cat([low, low + 1], 1).clamp(max=ends[:, -1:] - 1)                      # (R,2Q)
    below, above = values.gather(1, torch.searchsorted(ends, ranks, right=True)).chunk(2, 1)
    return torch.lerp(below, above, (place - low).to(values.dtype)).T


# ---- parts: does a prototype's region hold the same part of the object? --------------------------------
# N images, M prototypes, P annotated parts. inside bool (N,M,P): the part is visible in the region.

def activation_boxes(maps, size, percentile=95):
    """Smallest boxes around the pixels at or above the percentile of each map. (n,h,w) -> int64 (n,4): y0,
    y1, x0, x1, ends exclusive. Maps are upsampled bicubically to size (height, width), as in ProtoPNet."""
    maps = maps.float() - maps.float().amin((1, 2), keepdim=True)    # a flat map stays exactly flat
    tall, wide = (enlarging(*sides).to(maps.device) for sides in zip(maps.shape[1:], size))
    large = tall @ maps @ wide.T                                     # (n,H,W)
    threshold = row_quantile(large.flatten(1), percentile / 100)[:, None]
    edges = []
    for lines in (large.amax(2), large.amax(1)):                     # rows (n,H), columns (n,W)
        lines = (lines >= threshold).int()
        edges += [lines.argmax(1), lines.shape[1] - lines.flip(1).argmax(1)]
    return torch.stack(edges, 1)


@functools.lru_cache(maxsize=8)
def enlarging(n, m):
    """The matrix (m,n) that bicubic interpolation from n to m values is, float32 on the CPU: a product with
    it takes an eighth of F.interpolate's time."""
    return F.interpolate(torch.eye(n)[None, None], (m, n), mode="bicubic", align_corners=False)[0, 0]


def activation_box(similarity, size, percentile=95):
    """activation_boxes of one map (h,w); size: an int or (height, width). Returns ints y0, y1, x0, x1."""
    size = (size, size) if isinstance(size, int) else tuple(size)
    return tuple(activation_boxes(similarity[None], size, percentile)[0].tolist())


def points_in_boxes(boxes, points):
    """boxes (N,M,4) y0 y1 x0 x1, ends exclusive; points (N,P,3) x, y, visible -> bool (N,M,P)."""
    y0, y1, x0, x1 = boxes[..., None].unbind(2)                      # (N,M,1)
    x, y, visible = points[:, None].unbind(3)                        # (N,1,P)
    return (y0 <= y) & (y < y1) & (x0 <= x) & (x < x1) & (visible > 0)


def part_shares(inside, similarity, most=10):
    """(M,P): of the `most` images in which a prototype is most similar (N,M), the share that hold the part.
    The purity of a prototype is its largest share: does it always show the same part?"""
    top = similarity.topk(min(most, len(similarity)), dim=0).indices                          # (most,M)
    return inside.gather(0, top[..., None].expand(-1, -1, inside.shape[2])).float().mean(0)


def part_consistency(inside, visible, own, share=0.8):
    """Percent of prototypes whose region holds one and the same part in at least `share` of the images where
    that part is visible, among the images own (N,M) bool of its own classes (Huang et al., ICCV 2023).
    A prototype without such images does not count; None where none has any."""
    known = own.any(0)                                               # (M,)
    if not known.any():
        return None
    shown = (own[..., None] & visible[:, None]).sum(0)               # (M,P) images
    rates = (own[..., None] & inside).sum(0) / shown.clamp(min=1)
    return 100 * (rates.amax(1) >= share)[known].double().mean().item()


def part_stability(inside, noisy, own):
    """Percent of the pairs own (N,M) whose region holds the same parts in the noisy image (same source)."""
    return 100 * (inside == noisy).all(2)[own].float().mean().item()


def part_truth(boxes, noisy, points, similarity, labels, held, home, size):
    """Purity, consistency and stability of prototypes in percent, and what makes them easy.

    boxes, noisy (N,M,4): of the images and of the same images with noise, in pixels of size x size; points
    (N,P,3); similarity (N,M); labels (N,); held (C,M) bool: prototypes of a class; home (M,): the class
    whose patch a prototype is. -> inside (N,M,P), a dict; in it
    consistency, consistency_home, consistency_guests: see part_consistency, in the images of all classes
    that hold a prototype, of its home class, of the others. Guests have more images than a home, so that one
    part is more rarely in 80 % of them by chance: compare a number with the same number of another run.
    purity_by_chance: the same boxes laid on other images.
    """
    inside = points_in_boxes(boxes, points)
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
    elsewhere = points_in_boxes(boxes, points[order])
    area = (boxes[..., 1] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 2]) / size ** 2         # (N,M)
    visible, own, at_home = points[..., 2] > 0, held[labels], labels[:, None] == home
    return inside, dict(
        purity=100 * part_shares(inside, similarity).amax(1).mean().item(),
        purity_by_chance=100 * part_shares(elsewhere, similarity).amax(1).mean().item(),
        consistency=part_consistency(inside, visible, own),
        consistency_home=part_consistency(inside, visible, own & at_home),
        consistency_guests=part_consistency(inside, visible, own & ~at_home),
        stability=part_stability(inside, points_in_boxes(noisy, points), own),
        box_area=100 * area.mean().item(), parts_per_box=inside.sum(2).float().mean().item())


def variant_truth(inside, similarity, labels, slots, variants):
    """Does a prototype show the same part in the same variant, and is that what its classes share?

    inside (N,M,P); similarity (N,M); labels (N,); slots (C,K,M) of 0 and 1: the prototype in a slot, if any;
    variants (C,P): the variant of part p in class c. A prototype shows the part and variant that most of its
    ten most similar images hold. -> a dict, and true (C,M) bool: the class has what the prototype shows.
    variant_purity: mean over prototypes of the share of the ten, in percent; variants: how many there are.
    true_slots: percent of the filled slots whose class has the variant that their prototype shows.
    graph_correlation: over the pairs of classes, between the prototypes and the variants that they have in
    common, -1 to 1; None where either number is the same for all pairs.
    shared_with_variant, shared_without_variant: prototypes in common, mean over the pairs of classes that
    have a variant in common, and over those that have none; None without such pairs.
    """
    count = int(variants.max()) + 1
    looks = F.one_hot(variants[labels], count).bool()                # (N,P,V)
    shows = (inside[..., None] & looks[:, None]).flatten(2)          # (N,M,P*V)
    best, look = part_shares(shows, similarity).max(1)               # (M,)
    true = variants[:, look // count] == look % count                # (C,M)
    held = slots.amax(1) > 0.5                                       # (C,M)
    prototypes, alike = of_pairs(in_common(held)), of_pairs(in_common(F.one_hot(variants, count).flatten(1)))
    known = prototypes.std() * alike.std() > 0                       # false for nan, too
    return dict(
        variant_purity=100 * best.mean().item(), variants=int(looks.any(0).sum()),
        true_slots=100 * ((slots * true[:, None]).sum() / slots.sum()).item(),
        graph_correlation=torch.corrcoef(torch.stack([prototypes, alike]))[0, 1].item() if known else None,
        shared_with_variant=mean_or_none(prototypes[alike > 0]),
        shared_without_variant=mean_or_none(prototypes[alike == 0])), true


def in_common(marks):
    """marks (C,n) of 0 and 1 -> (C,C) float64: how many ones two rows have in the same places."""
    return marks.double() @ marks.double().T


def of_pairs(graph):
    """The entries (C,C) of all pairs of different rows, each once: (C*(C-1)/2,)."""
    return graph[torch.ones_like(graph).triu(1) > 0]


def mean_or_none(values):
    return values.mean().item() if len(values) else None


def sharing(slots):
    """How classes share prototypes, as a dict. slots (C,K,M) of 0 and 1: the prototype in a slot, if any.
    empty_slots, repeated_slots: of slots_in_all; a slot repeats if one before it has its prototype."""
    held = slots.amax(1) > 0.5                                       # (C,M)
    count, filled = slots.shape[0] * slots.shape[1], int(slots.sum())
    return dict(
        prototypes_used=int(held.any(0).sum()), slots_in_all=count, empty_slots=count - filled,
        repeated_slots=filled - int(held.sum()), classes_per_prototype=held.sum(0).float().mean().item(),
        classes_of_each_prototype=held.sum(0).tolist(),
        shared_per_class_pair=of_pairs(in_common(held)).mean().item())
