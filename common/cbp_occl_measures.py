"""What cbp_occl.py measures beside IoU: the paper's two ambiguities, in the rows of the classifier, in rates
and in the features. The network is only asked for net(x): logits (B,N,h,w), features (B,C,h,w), another.
"""
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Subset
from tqdm import tqdm

from common import datasets, run, segmentation
from common.loaders import TestView, eval_loader, to_device
from common.metrics import ConfusionMatrix


def class_separability(prototypes):
    """CS of Eq. (8): half the sum of cosines over ordered pairs of different rows. (N,C) -> float.

    The sum is signed and can cancel: CS = 0 does not imply orthogonality (a simplex has -N/2). The paper
    calls a large CS "large separability" though it means the opposite.
    """
    unit = F.normalize(prototypes.detach().cpu().double(), dim=1)
    return 0.5 * float((unit @ unit.T).fill_diagonal_(0).sum())


def mean_abs_cosine(prototypes):
    """Mean |cos| over pairs of different rows, (N,C) -> float: 0 only if orthogonal (ours, beside CS)."""
    unit = F.normalize(prototypes.detach().cpu().double(), dim=1)
    return float((unit @ unit.T).fill_diagonal_(0).abs().sum()) / max(len(unit) * (len(unit) - 1), 1)


def rarest_first(class_pixels, f1s):
    """Fig. 5: ids of the classes that have an F1 in all of f1s (lists), in up to 15 groups by pixels."""
    order = np.argsort(class_pixels, kind="stable").tolist()
    scored = [c for c in order if all(f1[c] is not None for f1 in f1s)]
    return [group.tolist() for group in np.array_split(scored, min(15, len(scored)))]


def analyse(class_vectors, cfg, rates, class_pixels, classes):
    """The paper's measures of both ambiguities, as entries of metrics.json.

    class_vectors (N,C): rows of the classifier. rates: what segmentation.evaluate returns. class_pixels (N,)
    int64: labelled training pixels. Table 8: class_separability. Fig. 5: F1 as means over up to 15 groups of
    classes, rarest first. Sec. 4.3: correlation of pixels and row norms. Table 6: IoU sums of look-alikes.
    Table 7: IoU of rare classes and of the most frequent one.
    """
    W = class_vectors.detach().float().cpu()
    iou, f1 = rates["iou"], rates["f1"]
    norms = W.norm(dim=1)
    correlation = float(torch.corrcoef(torch.stack([norms, class_pixels.float()]))[0, 1])
    groups = rarest_first(class_pixels.tolist(), [f1])
    pairs = [pair for pair in datasets.LOOKALIKES.get(cfg.dataset, []) if None not in (iou[c] for c in pair)]
    scored = [c for group in groups for c in group]
    extremes = datasets.RARE_AND_FREQUENT.get(cfg.dataset, (*scored[:2], scored[-1]))
    return dict(
        class_separability=class_separability(W), mean_abs_cosine=mean_abs_cosine(W),
        norm_pixel_correlation=correlation if norms.std() > 1e-5 * norms.mean() else None,
        training_pixels=dict(zip(classes, class_pixels.tolist())),
        f1_rarest_first=[dict(classes=[classes[c] for c in group], f1=float(np.mean([f1[c] for c in group])))
                         for group in groups],
        lookalike_iou_sums={f"{classes[a]} + {classes[b]}": iou[a] + iou[b] for a, b in pairs},
        rare_and_frequent_iou={classes[c]: iou[c] for c in extremes})


# ---- the features ----------------------------------------------------------------------------------------

class Features(NamedTuple):
    """The features of a network on some images; see features_of."""
    centroids: torch.Tensor                                            # (N,C), nan: no pixel of the class
    confusion: torch.Tensor                                            # (N,N): pixels by class, prediction
    pixels: list                                                       # of each class (n,C), n <= 2,000
    images: int


@torch.no_grad()
def features_of(net, data, cfg, device, shrink_labels, most=200):
    """Mean feature of every class, and single pixels, in at most `most` images spread over a split.

    Whole images, or windows, as they are tested. shrink_labels: OCCL's, labels (B,H,W), size -> (B,h,w).
    Of a class at most 40 pixels an image are kept, spread over it.
    """
    N = data.num_classes
    sums, pixels, confusion = [0.0] * N, [[] for _ in range(N)], ConfusionMatrix(N, device)
    some = Subset(TestView(data, cfg.size), range(0, len(data), math.ceil(len(data) / most)))

    def forward(x):
        with run.autocast(device, cfg.amp):
            logits, features, _ = net(x)
        return features.float(), logits.argmax(1)
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False                             # every image may have another size
    for batch in tqdm(eval_loader(some, cfg.workers, device), desc="features", leave=False, disable=None):
        x, labels = to_device(batch, device, "image", "mask")
        labels = shrink_labels(labels, x.shape[2:])                    # training crops both at one size
        for rows, columns, (features, ids) in segmentation.in_windows(forward, x, cfg.window):
            small = shrink_labels(labels[:, rows, columns], features.shape[2:])            # (1,h,w)
            confusion.update(small, ids)
            for c in set(small.unique().tolist()) - {255}:
                own = features.permute(0, 2, 3, 1)[small == c]         # (n,C)
                sums[c] = sums[c] + own.sum(0)
                pixels[c].append(own[::math.ceil(len(own) / 40)].cpu())
    torch.backends.cudnn.benchmark = benchmark
    counts, width = confusion.matrix.sum(1).cpu(), features.shape[1]
    pixels = [torch.cat(parts) if parts else torch.zeros(0, width) for parts in pixels]
    pixels = [part[::max(1, math.ceil(len(part) / 2000))] for part in pixels]
    centroids = torch.stack([torch.zeros(width) + torch.as_tensor(total).cpu() for total in sums])
    return Features(centroids / counts[:, None], confusion.matrix.cpu(), pixels, len(some))


def results_of(net, cfg, rates, class_pixels, data, shrink_labels):
    """All that metrics.json tells of a network on a test split, and its Features; net is left in eval mode.
    rates, class_pixels: see analyse; shrink_labels: see features_of."""
    rows = net.eval().classifier.class_vectors()
    features = features_of(net, data, cfg, rows.device, shrink_labels)
    found = segmentation.named_rates(rates, data.classes, data.split)
    found |= analyse(rows, cfg, rates, class_pixels, data.classes)
    return found | centroid_cosines(features, rows), features


def cosines(vectors, prototypes):
    """(n,C), (N,C) -> (n,N) on the CPU, nan where a vector is."""
    unit, rows = (F.normalize(x.detach().float().cpu(), dim=1) for x in (vectors, prototypes))
    return unit @ rows.T


def centroid_cosines(features, prototypes):
    """How the features lie to the prototypes (ours), as entries of metrics.json: mean cosine of the mean
    feature of a class with its own row, and with the rows of the others."""
    table = cosines(features.centroids, prototypes)                    # (N,N)
    own = torch.eye(len(table), dtype=torch.bool)
    return dict(own_cosine=table[own].nanmean().item(), other_cosine=table[~own].nanmean().item())


def lookalikes(data, features):
    """Pairs of class ids: the look-alikes of a data set that its images show, or, without any, the two
    classes that are taken for each other most, in shares of their pixels."""
    counts = features.confusion.sum(1)
    pairs = [(a, b) for a, b in datasets.LOOKALIKES.get(data.name, []) if counts[a] and counts[b]]
    rates = features.confusion / counts[:, None]
    both = (rates + rates.T).nan_to_num(-1).triu(1)
    return pairs or [divmod(both.argmax().item(), len(both))] * bool(both.max() > 0)
