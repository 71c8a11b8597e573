"""What cbp_occl.py measures beside IoU: the paper's two ambiguities, in the rows of the classifier and in rates.

Nothing here knows a network: it is given rows, rates and counts of pixels.
"""
import numpy as np
import torch
import torch.nn.functional as F

from common import datasets


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
    scored = [c for c in class_pixels.argsort(stable=True).tolist() if f1[c] is not None]    # rarest first
    groups = np.array_split(scored, min(15, len(scored)))
    pairs = [pair for pair in datasets.LOOKALIKES.get(cfg.dataset, []) if None not in (iou[c] for c in pair)]
    extremes = datasets.RARE_AND_FREQUENT.get(cfg.dataset, (*scored[:2], scored[-1]))
    return dict(
        class_separability=class_separability(W), mean_abs_cosine=mean_abs_cosine(W),
        norm_pixel_correlation=correlation if norms.std() > 1e-5 * norms.mean() else None,
        training_pixels=dict(zip(classes, class_pixels.tolist())),
        f1_rarest_first=[dict(classes=[classes[c] for c in group], f1=float(np.mean([f1[c] for c in group])))
                         for group in groups],
        lookalike_iou_sums={f"{classes[a]} + {classes[b]}": iou[a] + iou[b] for a, b in pairs},
        rare_and_frequent_iou={classes[c]: iou[c] for c in extremes})
