"""The tables of the paper of cbp_occl.py as data: what a row changes, and what the paper prints for it.

SegFormer-B0, ADE20K, 40K iterations (Sec. 4.3). Some tables have lost their digits: see the titles.
"""

SWEEP = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 1.0)                            # of lambda and phi, the presets' too
ROWS = {                                                               # what a row changes in a preset
    "baseline": dict(classifier="learnable", w_centroid=0.0, w_category=0.0),
    "CBP": dict(w_centroid=0.0, w_category=0.0),
    "OCCL": dict(classifier="learnable"),                              # L_c moves the learned rows too [D13]
    "CBP + OCCL": dict(classifier="cbp"),
    **{name: dict(classifier=name.lower()) for name in ("EMA", "gradient", "penalty")},
    "not equal": dict(equal=False), "not orthogonal": dict(orthogonal=False),
    "CLIP": dict(orthogonal=False),                                    # and prototypes, in run_table
    "masked": dict(init="masked", orthogonal=False), "masked, orthogonal": dict(init="masked"),
    **{f"T = {T}": dict(length=float(T)) for T in range(1, 6)},
    # controls of ours for table 3: frozen, or only a better start? And what if features may have both signs?
    "CBP, rows learn": dict(classifier="gradient", w_centroid=0.0, w_category=0.0),
    "random rows of length T, learn": dict(classifier="gradient", orthogonal=False, w_centroid=0.0,
                                           w_category=0.0),
    "baseline, warm-up x 4": dict(classifier="learnable", w_centroid=0.0, w_category=0.0),  # see run_table
    "baseline, no last ReLU": dict(classifier="learnable", w_centroid=0.0, w_category=0.0, last_relu=False),
    "CBP + OCCL, no last ReLU": dict(last_relu=False),                       # [D14]
    **{f"lambda = {weight:g}": dict(w_centroid=weight) for weight in SWEEP},
    **{f"phi = {weight:g}": dict(w_category=weight) for weight in SWEEP},
}
PAPER = {                                                              # mIoU, mAcc
    "baseline": (33.4, 44.4), "CBP": (33.5, 44.4), "OCCL": (34.3, 45.8), "CBP + OCCL": (35.1, 48.1),
    "EMA": (29.9, 41.8), "gradient": (34.6, 46.1), "not equal": (33.3, 44.6), "not orthogonal": (35.0, 47.8),
    "CLIP": (33.2, 45.2), "masked": (30.3, 41.7), "masked, orthogonal": (35.1, 48.0),
    "phi = 0": (34.2, None), "phi = 0.3": (35.1, 48.1), "lambda = 1": (35.1, 48.1),
}
TABLES = {                                                             # title, rows
    3: ("effect of the two modules; the last five rows are ours", (
        "baseline", "CBP", "OCCL", "CBP + OCCL", "gradient", "CBP, rows learn",
        "random rows of length T, learn", "baseline, warm-up x 4", "baseline, no last ReLU",
        "CBP + OCCL, no last ReLU")),
    4: ("how the prototypes are updated", ("CBP + OCCL", "EMA", "gradient", "penalty")),
    5: ("initial rows; masked = class means of the backbone, which --weights none leaves untrained",
        ("CBP + OCCL", "not equal", "not orthogonal", "CLIP", "masked", "masked, orthogonal")),
    6: ("IoU sums of look-alikes; paper, not orthogonal: bike + minibike -0.3, stairs + stairway -1.0",
        ("CBP + OCCL", "not orthogonal")),
    7: ("IoU of rare and frequent classes; paper, not equal: flag -7.3, radiator -5.3, wall 0.0",
        ("CBP + OCCL", "not equal")),
    8: ("class separability CS, Eq. (8); paper: 0 for CBP, 6.2 not orthogonal, 75.8 gradient",
        ("CBP + OCCL", "not orthogonal", "gradient", "penalty")),
    9: ("length T; the paper's rows are lost: mIoU 34.6 to 35.3, mAcc 47.6 to 48.2 over T = 1 to 5",
        tuple(f"T = {T}" for T in range(1, 6))),
    10: ("stability over four seeds; the paper's: mIoU 35.1, 34.9, 35.2, 34.8", ("CBP + OCCL",)),
}
FIGURES = {4: ("one weight varied, the other the preset's (paper's: 1, 0.3); paper: 35.1 to 35.4 over lambda",
               tuple(f"{symbol} = {weight:g}" for symbol in ("lambda", "phi") for weight in SWEEP))}
BESIDE = {3: ("baseline", "CBP + OCCL"), 6: ("not orthogonal", "CBP + OCCL"), 7: ("not equal", "CBP + OCCL")}
