"""Segmentation scores from one confusion matrix over a whole split (the protocol of mmsegmentation); at the end
of the file: mAP of several labels an image, and do the regions that prototypes point at hold the same part?

    matrix = ConfusionMatrix(num_classes, device)
    for each batch: matrix.update(labels, logits.argmax(1))   # logits already at the label's own size
    matrix.all_reduce()                                       # several processes: sum their counts
    result = matrix.summary()                                 # percent

With T = labelled pixels of a class, P = pixels predicted as it, TP = pixels that are both:
    IoU = TP / (T + P - TP)        acc = TP / T        F1 = 2 TP / (T + P)
mIoU and mAcc are means over the classes for which the ratio exists. So a class that occurs neither in the
labels nor in the predictions is left out of mIoU, while one that is only ever predicted enters it with IoU 0.
The counts are summed before any ratio is taken: a mean of the mIoU of single images is another number.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F


class ConfusionMatrix:
    """Counts in `matrix`: (N,N) int64 on the device, row = label, column = prediction."""

    def __init__(self, num_classes, device="cpu"):
        self.num_classes = num_classes                              # N, at most 255: id 255 means ignore
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        self.finished = False                                       # True once all_reduce was called

    def update(self, labels, predictions):
        """Add a batch. Both (B,H,W) integer tensors of the same shape, on the device of the matrix.

        labels: class ids 0..N-1, or 255 = ignore: such a pixel never counts, neither as T nor as P.
        predictions: class ids 0..N-1. Any other id is not looked for here, as that would make a GPU wait at
        every batch: the readers in common/datasets.py refuse it with the name of the file.
        Raises ValueError if the shapes differ, RuntimeError after all_reduce.
        """
        if labels.shape != predictions.shape:
            raise ValueError(f"labels {tuple(labels.shape)} and predictions {tuple(predictions.shape)} "
                             "differ in shape: resize the logits to the label's size before argmax")
        if self.finished:
            raise RuntimeError("update after all_reduce: start a new ConfusionMatrix for the next evaluation")
        N = self.num_classes
        # One bin per (label, prediction) pair and one more for the ignored pixels, dropped below. On a CPU a
        # boolean index and bincount do as well; on a GPU both wait for a result to learn their output size.
        pair = torch.where(labels == 255, N * N, labels.long() * N + predictions.long()).flatten()
        counts = torch.zeros(N * N + 1, dtype=torch.int64, device=self.matrix.device)
        counts.scatter_add_(0, pair, torch.ones_like(pair))
        self.matrix += counts[:-1].view(N, N)

    def all_reduce(self):
        """After the last update: sum the counts over all processes of torch.distributed, exactly once.

        A second call changes nothing, nor does the first one where there is a single process.
        """
        if dist.is_available() and dist.is_initialized() and not self.finished:
            dist.all_reduce(self.matrix)
        self.finished = True

    def totals(self):
        """TP, T, P of every class: (N,) float64 on the CPU (the counts move first: MPS has no float64)."""
        counts = self.matrix.cpu().double()
        return counts.diag(), counts.sum(1), counts.sum(0)

    def iou(self):
        """(N,) float64 on the CPU, fractions; nan for a class in neither the labels nor the predictions."""
        tp, labelled, predicted = self.totals()
        return tp / (labelled + predicted - tp)

    def acc(self):
        """(N,) float64 on the CPU, fractions: the recall of every class; nan for a class without a label."""
        tp, labelled, _ = self.totals()
        return tp / labelled

    def f1(self):
        """(N,) float64 on the CPU, fractions; nan for a class in neither the labels nor the predictions."""
        tp, labelled, predicted = self.totals()
        return 2 * tp / (labelled + predicted)

    def summary(self):
        """All rates in percent, as plain Python numbers.

        miou, macc, pixel_acc: floats, nan if not one pixel is labelled.
        iou, f1: one value per class, None where iou() or f1() gives nan.
        absent: ids of the classes that never occur in the labels; report them next to the mean.
        """
        tp, labelled, _ = self.totals()
        return {"miou": 100 * self.iou().nanmean().item(),
                "macc": 100 * self.acc().nanmean().item(),
                "pixel_acc": 100 * (tp.sum() / labelled.sum()).item(),
                "iou": percent_or_none(self.iou()),
                "f1": percent_or_none(self.f1()),
                "absent": (labelled == 0).nonzero().flatten().tolist()}


def percent_or_none(rates):
    """(N,) fractions -> list of N percentages, None for nan."""
    return [None if rate != rate else 100 * rate for rate in rates.tolist()]


def mean_average_precision(scores, truth):
    """mAP in percent: mean over the classes that occur of the area under precision against recall.

    scores (M,N) float, truth (M,N) bool, both without the background: precision averaged over the positives, images
    ranked by falling score (stable). nan if no class occurs.
    """
    order = scores.argsort(dim=0, descending=True, stable=True)
    hits = truth.gather(0, order).double()                           # (M,N)
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)[:, None]
    positives = hits.sum(0)
    return 100 * ((precision * hits).sum(0) / positives)[positives > 0].mean().item()


def row_quantile(values, q):
    """Quantile of every row (R,n) -> (R,), linear between neighbours; torch.quantile stops at 16 million values."""
    if values.device.type == "mps":                                  # old torch lacks kthvalue there
        return row_quantile(values.cpu(), q).to("mps")
    place = q * (values.shape[1] - 1)
    low = int(place)
    below = values.kthvalue(low + 1, 1).values
    above = values.kthvalue(min(low + 2, values.shape[1]), 1).values
    return torch.lerp(below, above, place - low)


# ---- parts: does a prototype's region hold the same part of the object? ---------------------------------------
# N images, M prototypes, P annotated parts. inside bool (N,M,P): the part is visible in the prototype's region.

def points_in_boxes(boxes, points):
    """boxes (N,M,4) y0 y1 x0 x1, ends exclusive; points (N,P,3) x, y, visible -> bool (N,M,P)."""
    y0, y1, x0, x1 = boxes[..., None].unbind(2)                      # (N,M,1)
    x, y, visible = points[:, None].unbind(3)                        # (N,1,P)
    return (y0 <= y) & (y < y1) & (x0 <= x) & (x < x1) & (visible > 0)


def part_shares(inside, similarity, most=10):
    """(M,P): among the `most` images in which a prototype is most similar (N,M), the share that hold the part.

    The purity of a prototype is its largest share: does it always show the same part?
    """
    top = similarity.topk(min(most, len(similarity)), dim=0).indices                          # (most,M)
    return inside.gather(0, top[..., None].expand(-1, -1, inside.shape[2])).float().mean(0)


def part_consistency(inside, visible, own, share=0.8):
    """Percent of prototypes whose region holds one and the same part in at least `share` of the images where that
    part is visible, among the images own (N,M) bool of the prototype's classes (Huang et al., ICCV 2023)."""
    seen = (own[..., None] & visible[:, None]).sum(0)                # (M,P)
    rates = (own[..., None] & inside).sum(0) / seen.clamp(min=1)
    return 100 * (rates.amax(1) >= share).float().mean().item()


def part_stability(inside, noisy, own):
    """Percent of the pairs own (N,M) whose region holds the same parts when the image is noisy (same source)."""
    return 100 * (inside == noisy).all(2)[own].float().mean().item()


# ---- parts: does a prototype light up on the same part of the object? -------------------------------------------
# P prototypes, each of one class; Q annotated parts with the ids 1..Q, 0 = no part.

def part_scores(images, presence, prototype_class, used, classes, num_parts, quantiles):
    """Consistency and stability of prototypes in percent, for every quantile and as their mean.

    Consistency: share of the prototypes that light up on one and the same part in more than 80 % of the images that
    show this part. Stability: share of (image, class, prototype) whose parts stay the same in a noisy image.
    images: for each (clean (P,h,w), noisy (P,h,w), mask (H,W), keypoints (K,4): class, part, x, y), similarities.
    presence(similarity (p,H,W), class_mask (H,W), keypoints (K,3), num_parts, quantile) -> (p,Q), (Q,) bool: on which
    parts a prototype lights up, which the image has. used (P,) bool: those that count. classes: those with parts.
    """
    device = used.device
    seen = torch.zeros(len(used), num_parts, device=device)          # images of p's class that show part q
    hits = seen.repeat(len(quantiles), 1, 1)                         # those in which p lights up on q
    stable = torch.zeros(len(quantiles))
    pairs = 0
    for clean, noisy, mask, keypoints in images:
        for c in classes:
            index = ((prototype_class == c) & used).nonzero()[:, 0]
            points = keypoints[keypoints[:, 0] == c, 1:]
            if not len(index) or not len(points) or not (mask == c).any():
                continue
            maps = [F.interpolate(s[None, index], mask.shape, mode="nearest")[0] for s in (clean, noisy)]
            for k, q in enumerate(quantiles):
                before, exists = presence(maps[0], mask == c, points, num_parts, q)
                after, _ = presence(maps[1], mask == c, points, num_parts, q)
                hits[k, index] += before
                stable[k] += (before == after).all(1).sum().cpu()
            seen[index] += exists
            pairs += len(index)
    if not pairs:
        return dict(consistency=None, stability=None)
    rates = (hits / seen.clamp(min=1))[:, seen.sum(1) > 0].amax(2)   # (quantiles, prototypes)
    consistency = 100 * (rates > 0.8).float().mean(1)
    stability = 100 * stable / pairs
    names = [f"{q:g}" for q in quantiles]
    return dict(consistency=consistency.mean().item(), stability=stability.mean().item(),
                consistency_by_quantile=dict(zip(names, consistency.tolist())),
                stability_by_quantile=dict(zip(names, stability.tolist())))


def part_purity(images, prototype_class, counted, num_classes, num_parts, most=10):
    """Is a prototype one part? In percent, over the prototypes counted (P,) bool; {} if there is nothing to count.

    images: for each (similarity (P,h,w), labels (h,w) int64, parts (h,w) int64), on the CPU. purity: of the `most`
    images in which a prototype is most similar to a pixel of its class, the share that holds the same part at that
    pixel, whichever part is the most frequent. largest_part: the share of the part that covers most of the class;
    chance lies above it, as purity takes the most frequent of ten.
    """
    similarity, part = [], []
    area = torch.zeros(num_classes, num_parts + 1)                   # pixels of each part in each class
    for s, labels, parts in images:
        s = s.masked_fill(labels != prototype_class[:, None, None], -1.0).flatten(1)
        labels, parts = labels.flatten(), parts.flatten()
        highest, cell = s.max(1)
        similarity.append(highest)
        part.append(parts[cell])
        known = labels < num_classes
        bins = labels[known] * area.shape[1] + parts[known]
        area.view(-1).index_add_(0, bins, torch.ones(len(bins)))
    if not part:
        return {}
    similarity, part = torch.stack(similarity), torch.stack(part)    # (images,P)
    value, top = similarity.topk(min(most, len(part)), dim=0)
    of_class = value >= 0                                            # (most,P): the image holds the class
    shown = F.one_hot(part.gather(0, top), area.shape[1]) * of_class[..., None]           # (most,P,Q+1)
    share = shown.sum(0)[:, 1:].amax(1) / of_class.sum(0).clamp(min=1)                    # (P,)
    chance = (area[:, 1:].amax(1) / area.sum(1).clamp(min=1))[prototype_class]
    counted = counted & of_class[0]
    if not counted.any():
        return {}
    return dict(purity=100 * share[counted].mean().item(), largest_part=100 * chance[counted].mean().item())


# ---- regions that light up alike --------------------------------------------------------------------------------

def pairwise_iou(a, b):
    """IoU of every row of a (n,k) bool with every row of b (m,k) bool -> (n,m)."""
    a, b = a.float(), b.float()
    both = a @ b.T
    return both / (a.sum(1)[:, None] + b.sum(1) - both).clamp(min=1)


def merged(pairs, count):
    """Numbers 0..count-1 that are linked by pairs (i, j), directly or not, get the same id: list, the smallest of each."""
    group = list(range(count))
    for i, j in pairs:
        both = group[i], group[j]
        group = [min(both) if number in both else number for number in group]
    return group
