"""Tables and figures of numbers of the PFA paper: what a row changes, and what the paper prints. It scores
VOC 2012 val. pfa_scribble.py trains and evaluates the rows; see common/tables.py for what a Table is.
"""
import re

from common.tables import Table, beside_paper

# Of a test image: "plain" is the initial one, the others are augmented with one kind of prototypes. In
# NAME_restricted no class can win but those that lend their prototypes. plain_restricted is the control.
PREDICTIONS = tuple(name + end for name in ("plain", "local", "global") for end in ("", "_restricted"))


def rate(name, mode=None):
    """Column of a table: mIoU of a prediction in a mode, by default the headline; None without one."""
    return lambda metrics: metrics["miou"].get(mode or metrics["headline"], {}).get(name)


def best_rate(metrics):
    """mIoU of the last unrestricted prediction without true classes: global, else local, else plain."""
    rates = metrics["miou"]["plain"] | metrics["miou"][metrics["headline"]]
    return [rates[name] for name in ("plain", "local", "global") if name in rates][-1]


def in_words(rates):
    """{prediction: mIoU} -> "plain 49.2 (restricted 57.7), local 53.0, ..."."""
    text = ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
    return re.sub(r", \w+_(restricted [\d.]+)", r" (\1)", text)


def rows_by_mode(results):
    """{row: [metrics, one a seed]} -> rows of Table 4, {mode: [mAP and rates, one a seed]}. Modes of other
    rows than "both" have the name of the row before them."""
    rows = {}
    for row, runs in results.items():
        for metrics in runs:
            for mode, rates in metrics["miou"].items():
                quality = metrics["class_map"] if mode in ("scores", "classifier") else None
                name = "oracle (true classes given)" if mode == "oracle" else mode
                name = name if row == "both" else f"{row}, {name}"
                rows.setdefault(name, []).append(metrics["miou"]["plain"] | rates | dict(mAP=quality))
    return rows


MIOU = {"plain": rate("plain", "plain")} | {
    name.replace("_", " ") + end: rate(name, mode)
    for mode, end in ((None, ""), ("oracle", ", true classes")) for name in PREDICTIONS[1:]}
R101 = dict(backbone="resnet101")
TABLES = {
    2: beside_paper("Table 2: what each part adds", MIOU, ("paper basic", "paper local", "paper global"), {
        "baseline": (dict(method="pce"), 67.5, None, None),
        "local": (dict(augment="local"), 75.7, 76.9, None),
        "global": (dict(augment="global"), 76.0, None, 77.4),
        "both, L_pce on local": (dict(pce="local"), 76.4, 77.7, 77.1),
        "both": ({}, 76.8, 77.3, 77.9)}),
    3: beside_paper("Table 3: backbones, all pixels and scribbles (global prediction); without augmenter "
                    "and attention products, as the paper counts", {
        "M parameters": "parameters", "G multiply-adds at 512": "multiply_adds", "full": "full",
        "scribble": "scribble"}, ("paper M", "paper G", "paper full", "paper scribble"), {
        "DeepLabv2 ResNet-101": (R101 | dict(head="deeplabv2"), 43.6, 75.2, 77.7, 76.2),
        "DeepLabv3+ ResNet-101": (R101 | dict(head="deeplabv3plus"), 60.8, 102.3, 80.2, 78.1),
        "LTF ResNet-101": ("no design of F is known", 91.7, 138.4, 80.9, 78.2),
        "SegFormer MiT-B1": (dict(backbone="mit_b1", head="mlp"), 13.6, 19.4, 79.2, 77.9),
        "SegFormer MiT-B3": (dict(backbone="mit_b3", head="mlp"), 44.6, 44.5, 81.9, 79.8),
        "SegFormer MiT-B5": (dict(backbone="mit_b5", head="mlp"), 82.0, 72.9, 83.9, 81.5)}),
    4: Table("Table 4: which classes are in a test image? The paper prints the global prediction, and no "
             "control, which is plain_restricted; beside classifier and scores stands Q2L (mAP 96.6), MCAR "
             "(94.3) has 76.2", rows={"both": {}, "strokes alone": dict(method="pce")},
             columns={name: name for name in ("mAP", *PREDICTIONS)}, paper_columns=("paper",),
             paper={"plain": (76.8,), "filter_0": (74.1,), "filter_100": (75.2,), "filter_500": (75.7,),
                    "filter_1000": (74.3,), "classifier": (77.9,), "scores": (77.9,),
                    "oracle (true classes given)": (80.4,)}),
    5: beside_paper("Table 5: weights of the consistency losses", MIOU, ("paper global",), {
        "both": ({}, 77.9),
        **{f"lambda_l {w}": (dict(w_local=w, w_local_first=w), paper)
           for w, paper in ((0.005, 77.7), (0.02, 77.2), (0.05, 76.8))},
        **{f"lambda_g {w}": (dict(w_global=w), paper)
           for w, paper in ((0.005, 77.4), (0.02, 77.6), (0.05, 77.1))}}),
}
NETWORKS = {name: changes for name, changes in TABLES[3].rows.items() if isinstance(changes, dict)}
WEAKER = dict(drop=(0.0, 0.25, 0.5, 0.75), shrink=(0.0, 0.25, 0.5, 0.75, 1.0))     # Fig. 8, ratios of ours
METHODS = {"strokes alone": dict(method="pce"), "local": dict(augment="local"),
           "global": dict(augment="global")}
FIGURES = {
    5: Table("Fig. 5: global prototypes of a class", columns=MIOU,
             rows={f"n = {n}": dict(augment="global", slots=n) for n in (1, 2, 5, 10)}),
    6: Table("Fig. 6: share of pixels that make a prototype", columns=MIOU,
             rows={f"{p} %": dict(augment="local", top_fraction=p / 100) for p in (1, 2, 4, 8, 16, 32)}),
    8: Table("Fig. 8: strokes dropped and shrunk", columns=MIOU,
             rows={f"{kind} {ratio:g}, {method}": changes | {f"scribble_{kind}": ratio}
                   for kind, ratios in WEAKER.items() for ratio in ratios
                   for method, changes in METHODS.items()}),
}
USUAL_ROW = dict(method="pfa", augment="both", pce="moves", figure=0)
