"""What report.html says of a run of pfa_scribble.py: its numbers, columns, figures and next commands."""
import html

from common.files import some_of
from common.report import Page

PAPER = {"pce": ("strokes alone", 67.5), "full": ("all pixels", 79.2)}            # of other methods than pfa


def rates_in(metrics, mode):
    """mIoU of the plain prediction, which is told nothing; of the control and of the last augmented one in a
    mode, and the name of that one. None for what the run does not have."""
    miou = metrics.get("miou") or {}
    rates = miou.get(mode) or {}
    name = next((name for name in ("global", "local") if name in rates), None)
    return (miou.get("plain") or {}).get("plain"), rates.get("plain_restricted"), rates.get(name), name


def headline(metrics):
    """{what it is: percent}, ours first."""
    mode = metrics.get("headline") or ""
    source = {"classifier": "those of the trained "
                            "classifier", "scores": "those of --class-scores"}.get(mode, mode)
    if mode.startswith("filter_"):
        source = f"those with more than {mode.removeprefix('filter_')} predicted pixels"
    plain, control, augmented, name = rates_in(metrics, mode)
    tiles = {f"mIoU, {metrics.get('split')} split, plain prediction, this run": plain,
             "the control plain_restricted: the plain prediction, allowed only these classes: "
             f"{source}": control}
    if name:
        tiles[f"the {name} prediction: prototypes of the same classes, any class allowed"] = augmented
    if (metrics.get("settings") or {}).get("dataset") == "folder":     # the paper has no number for it
        return tiles
    if metrics.get("method") in PAPER:
        row, rate = PAPER[metrics["method"]]
        tiles[f"the paper's {row}: VOC 2012 val, SegFormer-B1"] = rate
    tiles["the paper's PFA: VOC 2012 val, SegFormer-B1, classes by Q2L; its plain prediction has "
          "76.8, and it prints no control"] = 77.9
    return tiles


def advice(metrics):
    """Sentences on what is to be looked at."""
    found = []
    mode, evaluated = metrics.get("headline") or "", metrics.get("evaluated") or {}
    phases = metrics.get("phases") or {}
    done, last = sum(phases.values()), phases.get("global", 0)
    if metrics.get("method") == "pfa" and metrics.get("augment") != "local" and last < done / 2:
        full = f"was full only after {done - last} of {done} iterations, late for the global prediction"
        never = f"never filled in {done} iterations, so that no global prediction was trained"
        found.append(f"The memory {full if last else never}: train longer, or lower --warmup or --slots.")
    plain, control, augmented, name = rates_in(metrics, mode)
    if None not in (plain, control) and control < plain - 1:
        remedy = f"lower --score-threshold, which is {evaluated.get('score_threshold')}"
        if mode.startswith("filter_"):
            remedy = f"lower --filter, which is {evaluated.get('filter')}, or try --train-classifier"
        found.append("The list of classes for a test image leaves out classes that are there: if only "
                     f"listed ones may win, the plain prediction falls from {plain:.1f} to {control:.1f}. To "
                     f"list more, {remedy}.")
    if None not in (plain, control, augmented) and augmented <= max(plain, control):
        found.append(f"Prototypes add nothing here: the {name} prediction has {augmented:.1f}, the plain one "
                     f"{plain:.1f}, and {control:.1f} if it is told the same classes. Train longer, and "
                     "look at several seeds.")
    plain, control, augmented, name = rates_in(metrics, "oracle")
    known = None not in (plain, control, augmented)
    if known and augmented > plain + 1 and control - plain > (augmented - plain) / 2:
        found.append(f"The true classes lift the {name} prediction to {augmented:.1f}, but the plain one "
                     f"from {plain:.1f} to {control:.1f} without any prototype: most of this lead is "
                     "knowledge of the classes. Better classes (--train-classifier, --class-scores) promise "
                     "more than prototypes.")
    iou = ((metrics.get("iou") or {}).get("plain") or {}).get("plain") or {}
    absent = metrics.get("absent") or []
    never = [html.escape(name) for name, rate in iou.items() if rate == 0 and name not in absent]
    if never:
        found.append(f"Not one pixel of the plain prediction is right in {some_of(never)}: a rare class is "
                     "learned late, so train longer, or paint more strokes of it.")
    return found


PAGE = Page(
    script="pfa_scribble",
    paper="Chan et al., <i>Scribble-supervised semantic segmentation with prototype-based feature "
          "augmentation</i> (PFA), ICML 2024",
    headline=headline, advice=advice,
    numbers={
        "miou": "Mean IoU by mode and prediction. A mode is who says which classes are in a test image: "
                "<code>filter_T</code>, more than T predicted pixels; <code>oracle</code>, the true ones, an "
                "upper bound and no result; <code>plain</code> is told nothing. "
                "<code>plain_restricted</code> is the control, told the classes without any prototype: what "
                "local and global gain over it, not over plain, is what prototypes add.",
        "iou": "The same by class. A class that neither labels nor predictions have has none, and is left "
               "out of the mean.",
        "headline": "The mode that stands for the run: scores or classifier if there is one, else the "
                    "filter; never the true classes.",
        "class_map": "Mean average precision of the scores or of the classifier over the classes that "
                     "occur, without the background (paper: Q2L 96.6, MCAR 94.3). If it is low, the wrong "
                     "classes get prototypes. None where neither was asked.",
        "macc": "Of the plain prediction: mean over classes of the share of their pixels that is found. Far "
                "above its mIoU: rare classes are claimed too often.",
        "pixel_acc": "Of the plain prediction: share of labelled pixels that are right; frequent classes "
                     "decide it.",
        "absent": "Classes that the labels of this split lack. One that is predicted all the same counts as "
                  "0 in the mean.",
        "phases": "Iterations in each phase: warmup knows no prototypes, local those of the image while the "
                  "memory fills, global both kinds; pce and full have one phase of their name. If there is "
                  "no global, see the next line.",
        "iterations_until_bank_full": "Iterations before the phase global, warm-up included. None if the "
                                      "memory never filled, so that no global prediction was trained, or if "
                                      "there is no such phase (--augment local, --method pce, full). Much "
                                      "later than --warmup: a class has strokes in few images.",
        "iterations": "Training steps made.",
        "method": "pfa: prototypes; pce: strokes alone, the baseline; full: all pixels of the full masks, "
                  "an upper bound.",
        "augment": "Which prototypes augment (Table 2): those of the image (local), of the memory (global), "
                   "or both. It says nothing for --method pce and full.",
        "reading": "Whose side is taken where paper and released code differ. No setting is known to give "
                   "the paper's tables.",
    },
    columns={
        "pce": "L_pce, Eq. (9): cross-entropy at the labelled pixels, by default of the prediction that the "
               "phase trains",
        "con_local": "L_con-l, Eq. (10), with its weight: do the initial and the local prediction agree? It "
                     "should stay far below pce; else lower --w-local",
        "con_global": "L_con-g, the same for the global prediction and --w-global",
        "val_plain": "mIoU on the val split, told nothing",
        "val_plain_restricted": "the control: no class can win but those with more than --filter predicted "
                                "pixels",
        "val_local": "mIoU on the val split, local prototypes of the same classes",
        "val_local_restricted": "local prototypes, and no other class can win",
        "val_global": "mIoU on the val split, global prototypes of the same classes",
        "val_global_restricted": "global prototypes, and no other class can win",
    },
    shown={
        "modes.png": "mIoU of every prediction in every mode: Table 4, with the control that it lacks. "
                     "Compare local and global with plain restricted in the same line: what they have more "
                     "is what prototypes add. Where plain restricted is darker than plain, classes that are "
                     "there were not told.",
        "examples.png": "Test images, every prediction, the last ones with the true classes, and the label; "
                        "with --baseline also another run's (Fig. 4, 9, 10). Good: local and global mend "
                        "what plain restricted, told the same, gets wrong.",
        "training.png": "Training images, what is labelled, and what becomes of it; all but plain are told "
                        "the labelled classes. Good: colours end at the edges of objects. Bad: they are "
                        "wrong where no stroke is near. Ours, in the manner of Fig. 4.",
        "confidence.png": "How sure pixels are of classes that have a stroke, and which of them form the "
                          "local prototype, Eq. (1) to (3). They should lie on the object: all classes get "
                          "as many, so that a small one borrows from around it, and a lower --top-fraction "
                          "helps. Ours, in no figure of the paper.",
        "attention_matrix.png": "How the pixels of a class (lines) attend to each prototype, mean over one "
                                "image. Bright cells at the own class are good; if all lines look alike, "
                                "attention has not learned yet. Ours, in no figure of the paper.",
        "attention.png": "Attention to the prototypes of the true classes, Eq. (6), beside the predictions. "
                         "Each class should be bright in places of its own, which need not be those of its "
                         "pixels; if it is as bright everywhere, prototypes tell pixels nothing. Ours, in no "
                         "figure of the paper.",
        "miou.png": "mIoU on the val split at each evaluation, classes by the filter. Local and global "
                    "should end above plain restricted, not only above plain. Ours, in no figure of the "
                    "paper.",
        "colours.png": "The colours in which to paint strokes for <code>--draw IMAGE STROKES</code>.",
        "components.png": "Test images by the rows of Table 2, each with its control (Fig. 4, 11). What the "
                          "control shows as well is no gain of prototypes.",
        "figure5.png": "mIoU by the number of global prototypes of a class (Fig. 5: the paper's gain "
                       "saturates near 5). Compare global with plain restricted.",
        "figure6.png": "mIoU by the share of pixels that make a local prototype (Fig. 6: the paper is best "
                       "at 8 %). Compare local with plain restricted.",
        "figure8.png": "mIoU with strokes dropped or shrunk, strokes alone among the curves (Fig. 8: in the "
                       "paper global falls less than local). Compare a restricted curve with strokes alone "
                       "restricted, which knows the same classes.",
    },
    commands={
        "python pfa_scribble.py --method pce --out runs/strokes-alone":
            "Strokes alone, with their own control, at the same budget: give the other options of this run "
            "too.",
        "python pfa_scribble.py --eval-only --baseline runs/strokes-alone --out OUT":
            "Both side by side in the figures.",
        "python pfa_scribble.py --table 4 --seeds 3":
            "Prototypes, or knowledge of the classes? All modes of PFA and of strokes alone, with the "
            "control, and the deviation over three seeds.",
    })
