"""What report.html says of a run of cbp_occl.py: its numbers, columns, figures and next commands."""
import html

from common.files import some_of
from common.report import Page


def headline(metrics):
    """{what it is: percent}, ours first."""
    tiles = {f"mIoU, {metrics.get('split')} split, this run": metrics.get("miou")}
    if (metrics.get("settings") or {}).get("dataset") != "folder":     # the paper has no number for it
        tiles["mIoU of the paper on ADE20K (SegFormer-B0, 40,000 iterations); its ordinary "
              "classifier has 33.4"] = 35.1
    return tiles


def advice(metrics):
    """Sentences on what is to be looked at."""
    found = []
    absent, rates = metrics.get("absent") or [], metrics.get("iou") or {}
    never = [html.escape(name) for name, iou in rates.items() if iou == 0 and name not in absent]
    if never:
        found.append(f"Not one pixel is right in {some_of(never)}. Look at training_pixels: a rare class is "
                     "learned late, so train longer; if it is frequent, check the masks and --lr.")
    cosine = metrics.get("mean_abs_cosine")
    if metrics.get("classifier") == "cbp" and cosine is not None and cosine > 0.2:
        found.append(f"The frozen rows are far from orthogonal: their mean absolute cosine is {cosine:.2f} "
                     "(random rows of 256 channels have 0.05, with which the paper loses 0.1 mIoU). Rows "
                     "from a file, or class means, want Gram-Schmidt: leave <code>--no-orthogonal</code> "
                     "out.")
    own, other = metrics.get("own_cosine"), metrics.get("other_cosine")
    if None not in (own, other) and own < 2 * max(other, 0.05):
        found.append(f"Features lie hardly nearer to their own row (cosine {own:.2f}) than to those of "
                     f"other classes ({other:.2f}): train longer.")
    correlation = metrics.get("norm_pixel_correlation")
    if correlation is not None and correlation > 0.5:
        found.append(f"Frequent classes have longer rows (correlation {correlation:.2f}), which favours "
                     "them: the prior ambiguity that equally long rows take away.")
    return found


PAGE = Page(
    script="cbp_occl",
    paper="Chen et al., <i>Frozen is better than learning</i> (CBP + OCCL), Pattern Recognition 2024",
    headline=headline, advice=advice,
    numbers={
        "miou": "Mean over classes of TP / (TP + FP + FN), over all pixels of the split. A class that "
                "neither labels nor predictions have is left out, and so is 255.",
        "macc": "Mean over classes of the share of their pixels that is found. Far above mIoU: rare classes "
                "are claimed too often.",
        "pixel_acc": "Share of labelled pixels that are right; frequent classes decide it.",
        "iou": "IoU by class.", "f1": "F1 by class.", "absent": "Classes that the labels of this split lack.",
        "class_separability": "CS, Eq. (8): half the signed sum of cosines between rows; 0 for CBP. Cosines "
                              "can cancel: only mean_abs_cosine proves that rows are orthogonal.",
        "mean_abs_cosine": "Mean absolute cosine of two rows of the classifier: 0 only if they are "
                           "orthogonal.",
        "norm_pixel_correlation": "Correlation of a class's training pixels with the length of its row "
                                  "(prior ambiguity): near 1, frequent classes have an advantage. None where "
                                  "all rows are equally long.",
        "training_pixels": "Labelled pixels by class in the training split.",
        "f1_rarest_first": "Fig. 5 in numbers: F1 of groups of classes, rarest first.",
        "lookalike_iou_sums": "Table 6: IoU sums of pairs of classes that look alike (correlation "
                              "ambiguity).",
        "rare_and_frequent_iou": "Table 7: IoU of the two rarest classes and of the most frequent one.",
        "own_cosine": "Cosine of a class's mean feature with its own row, mean over classes. It cannot "
                      "reach 1: behind a ReLU 0.70 is the most for 150 rows of 256 channels.",
        "other_cosine": "The same with the rows of the other classes: near 0 is what OCCL wants.",
        "classifier": "cbp: frozen orthogonal rows; learnable: the ordinary 1x1 convolution.",
        "w_centroid": "lambda, weight of Eq. (4).", "w_category": "phi, weight of Eq. (5).",
        "iterations": "Training steps made.",
        "trainable_parameters": "Without the frozen rows.",
    },
    columns={
        "ce": "pixel cross-entropy, Eq. (7)", "occl": "OCCL, Eq. (6), with its weights",
        "penalty": "0.01 x mean squared cosine of the rows (--classifier penalty)",
        "aux": "0.4 x cross-entropy of the "
               "auxiliary head", "miou": "on the val split", "macc": "on the val split",
        "pixel_acc": "on the val split",
    },
    shown={
        "*examples.png": "Image, label, prediction; several networks side by side with --baseline (Fig. 7).",
        "*similarity_map.png": "Cosines between the rows of the classifier. Ours is a bare diagonal; a "
                               "learned classifier has red spots at look-alikes (Fig. 6).",
        "*f1_by_frequency.png": "Do rare classes pay? F1, rarest classes left (Fig. 5).",
        "*feature_cosines.png": "How near the mean feature of each class lies to each row: a red diagonal "
                                "is good, a second red cell in a line is a class that it is confused with, "
                                "and blue is far away. Ours, in no figure of the paper.",
        "*lookalikes.png": "Pixels of two classes that look alike, by their cosines with both rows: the "
                           "farther apart the clouds, the better (the paper's correlation ambiguity).",
        "figure4.png": "mIoU by the weights of OCCL (Fig. 4).",
    },
    commands={
        "python cbp_occl.py --classifier learnable --w-centroid 0 --w-category 0 --out runs/baseline":
            "The ordinary classifier at the same budget, without which the number above says little: give "
            "it the <code>--preset</code>, <code>--data</code> and other options of this run.",
        "python cbp_occl.py --eval-only --baseline runs/baseline "
        "--out OUT": "Both side by side in every figure.",
        "python cbp_occl.py "
        "--table 3": "The paper's ablation, and the controls: is it the freezing, or only a "
                                        "better start?",
    })
