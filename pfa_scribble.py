"""PFA: segmentation learned from scribbles, with prototypes that augment the features, in one file.

Paper  G. Chan, P. Zhang, H. Dong, S. Ji, B. Chen, "Scribble-Supervised Semantic Segmentation with Prototype-based
       Feature Augmentation", ICML 2024. "Released code" is github.com/TranquilChan/PFA.
Idea   Strokes label a few percent of the pixels. Where the network is already sure of a class, the mean of its
       features is a prototype of that class: one per image (local), and a few per class remembered over the whole
       training (global). Every pixel then attends to the prototypes of the classes in its image, which pulls the
       unsure pixels towards the right class.

Try    python pfa_scribble.py                                # toy scenes with strokes, under two minutes on a CPU
Train  python pfa_scribble.py --preset voc-b1 --data VOC2012 --weights mit_b1.pth --train-classifier
       torchrun --nproc-per-node 2 pfa_scribble.py --preset voc-b3 --data VOC2012 --weights mit_b3.pth
       python pfa_scribble.py --method pce                   # strokes alone; --method full: upper bound
Look   python pfa_scribble.py --draw photo.png strokes.png --out runs/pfa_scribble-toy    # paint some strokes yourself
       python pfa_scribble.py --table 2                      # what each part adds

symbol      here                    shape    meaning                                                    paper
F           features                B,C,h,w  decoder's map before the classifier                        Sec. 3.1, A.1
p           confidence()            B,N,h,w  initial prediction: how sure is each pixel of a class      Sec. 3.2.2
c_t, v_t    in extract_prototypes() B,N,K    the K surest pixels of class t: confidences (and features) Eq. (1), (2)
fp_t        extract_prototypes()    B,N,C    local prototypes, one of every class in an image           Eq. (3)
fp_global   memory.bank             N,n,C    global prototypes, n for every class                       Sec. 3.2.3
alpha       memory.momentum         scalar   how slowly a full slot moves                               Eq. (4), (5)
e_f         project_feature         B,hw,D   pixels in the embedding space                              Sec. 3.3.1
e_fp        project_prototype       B,M,D    M prototypes (keys) in the embedding space                 Sec. 3.3.1
omega       attention()             B,hw,M   attention of a pixel over the keys                         Eq. (6)
e_f*        fuse                    B,hw,D   pixel and what it attends to, mixed                        Eq. (7)
f_aug       FeatureAugmenter        B,C,h,w  augmented features; the same classifier follows            Eq. (8)
L_pce       partial_cross_entropy() scalar   cross-entropy on labelled pixels                           Eq. (9)
L_con       consistency_loss()      scalar   initial and augmented prediction agree                     Eq. (10)
lambda      w_local, w_global       scalar   weights of L_con-l and L_con-g                             Sec. 3.4

Phases: warmup (L_pce) -> local (prototypes of the image; the memory fills) -> global (the memory is full: both). An
"iteration" is an optimizer step. N counts the background, class 0, which every image is taken to contain.

Where the print is silent, contradicts itself, or differs from the released code ([D*] marks the line). --reading
official takes the code's side in D1, D3, D8, D9, D11 and D12; no configuration is known to give the printed tables.
[D1] "Initial prediction values" (Eq. 1) are softmax probabilities here; in the code ReLU(logit), scaled to 0..1 over
     the pixels of an image and class.
[D2] Eq. (4) prints selectmin; the text updates the most similar slot, and so do the code and we. No second norm. In
     Eq. (2) we read topk(f_t) as the features of the pixels that Eq. (1) chose.
[D3] Paper: K = 8 % of the pixels, n = 5, crop 512, batch 16, rate 3e-5, lambda_l = 0.01. Code: 1/12, 10, 320, 12,
     6e-5, and 0.02 while the memory fills.
[D4] The "merge" of global prototypes (Sec. 3.3.2) is not described; as in the code every slot is a key of its own.
[D5] Eqs. (6), (7) write one "linear" for f and fp; the code has two layers, and one augmenter for both paths.
[D6] F is taken after SegFormer's dropout, prototypes are constants and belong to one image, as in the code; the text
     says "within each batch".
[D7] Which prediction L_pce looks at (one symbol in Sec. 3.4) is told by Fig. 2: initial, then local, then global. It
     moves, it does not add up. --pce local is the fourth row of Table 2 (which colour is which is our guess).
[D8] L_con is "MSE" in the text and a cross-entropy in Eq. (10). We take Eq. (10), as a mean over pixels instead of a
     sum; both sides get gradient, as in the code. Code: softmax twice, and the augmented prediction is the target.
[D9] "Classes of the current image": those with a stroke in the crop, so that no prototype is made of a class that
     cannot be seen (the background always counts, as in the code). Code: those of the whole image, from a file.
[D10] The memory is updated before it is used. It is full when every class that has a stroke in some training image
     has n prototypes: a class without any would prevent the last phase.
[D11] Length, warm-up and milestones are not printed. From the code: 200 epochs (10,582 images), 30 of warm-up. Ours:
     the "multi-step" rate falls to a tenth after 60 % and 85 %; code: linearly (there once an epoch). We take the
     "decay weight of 0.01" for AdamW's weight decay, as it is in the code.
[D12] The code freezes the backbone's LayerNorms; the paper does not say so.
[D13] Where F sits in ResNet-101 is not known. DeepLabv2: 256 channels between backbone and its four dilated
     convolutions, which are the classifier. DeepLabv3+: the map before the last 1x1 convolution.
[D14] Rotation, blur and flip happen with probability 1/2 each (code; the paper: all images "undergo" them). Fill and
     padding are void. Logits are resized with aligned corners, as in the code.
[D15] Q2L and MCAR (Table 4) are replaced by --class-scores FILE, or by a classifier trained on the strokes' classes
     alone (--train-classifier). Filters count pixels at full resolution, strictly more than the threshold.
[D16] Validation: whole images, no true classes, and the last weights are kept. The code evaluates a centre crop with
     the true classes given, and keeps what is best by that.
[D17] toy, small: recipes of ours for networks without MiT weights (chosen on toy's val split). On CUDA networks run in
     bfloat16, prototypes, augmenter and losses in float32; the code knows float32 alone.
"""

import math
import os
import time
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import Dataset, default_collate
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

from common import datasets, figures, files, loaders, run, transforms
from common.backbones import EXTRACTORS, GOES_WITH, build_extractor, build_network, freeze_layer_norms
from common.metrics import ConfusionMatrix, mean_average_precision
from common.run import RunConfig, UserError, opt
from common.weights import locate_weights


# ---- options and recipes -------------------------------------------------------------------------------------

@dataclass
class Config(RunConfig):
    method: str = opt("pfa", "pce = partial cross-entropy alone (baseline); full = all pixels of the full masks "
                      "(upper bound)", choices=("pfa", "pce", "full"))
    augment: str = opt("both", "prototypes that augment the features in training (Table 2)",
                       choices=("both", "local", "global"))
    reading: str = opt("paper", "official = the released code where it differs, [D*] at the top of the file",
                       choices=("paper", "official"))
    dataset: str = opt("voc_scribble", "reader of --data; voc and folder need --scribbles",
                       choices=("toy_scenes", "voc_scribble", "voc", "folder"))
    scribbles: str = opt("", "folder of the strokes: class ids, 255 elsewhere (data/README.md); "
                         "voc_scribble finds its own")
    scribble_drop: float = opt(0.0, "share of strokes left out, 0 to 1 (Fig. 8)")
    scribble_shrink: float = opt(0.0, "share of every stroke's length cut off, 0 to 1; 1 = dots (Fig. 8)")
    train_split: str = opt("trainaug", "split whose strokes are learned from")
    val_split: str = opt("val", "evaluated while training")
    test_split: str = opt("val", "evaluated at the end, into metrics.json, and by --eval-only", runtime=True)
    backbone: str = opt("mit_b1", "network before the decoder; mobilenet_v2 for a laptop or a small GPU",
                        choices=tuple(dict.fromkeys(GOES_WITH["mlp"] + GOES_WITH["deeplabv2"])))
    head: str = opt("mlp", "decoder: mlp = SegFormer's", choices=("mlp", "deeplabv2", "deeplabv3plus"))
    head_channels: int = opt(256, "C, channels of the features and prototypes")
    weights: str = opt("imagenet", "of the backbone: a file or URL, imagenet (torchvision's), none; --table 3: a "
                       "folder with mit_b1.pth, mit_b3.pth, mit_b5.pth", runtime=True)
    freeze_norms: bool = opt(None, "the backbone's LayerNorms do not learn [D12] (default no; official yes)")
    crop: int = opt(None, "training crop in pixels (default 512; official 320); lower it if memory runs out")
    scale_min: float = opt(0.5, "training images are resized by a random factor from here ...")
    scale_max: float = opt(2.0, "... to here")
    rotation: float = opt(10.0, "degrees they are turned at most")
    blur: bool = opt(True, "half of them are blurred")
    test_size: int = opt(0, "short side of test images; 0 = the image's own", runtime=True)
    batch_size: int = opt(None, "images an iteration, over all GPUs (default 16; official 12)")
    iterations: int = opt(None, "of the whole training (default 132400; official 176400: 200 epochs each) [D11]",
                          schedule=True)
    warmup: int = opt(None, "iterations before prototypes are made (default 19860; official 26460: 30 epochs)",
                      schedule=True)
    lr: float = opt(None, "AdamW learning rate of the backbone (default 3e-5; official 6e-5)")
    head_lr: float = opt(10.0, "all else learns so many times faster")
    lr_policy: str = opt(None, "multistep = a tenth after 60 and 85 % of the iterations; linear = to 0 "
                         "(default multistep; official linear)", choices=("multistep", "linear"))
    weight_decay: float = opt(0.01, "of AdamW")
    slots: int = opt(None, "n, global prototypes of a class (default 5; official 10)")
    momentum: float = opt(0.99, "alpha of Eq. (5)")
    top_fraction: float = opt(None, "share of the pixels that make a prototype (default 0.08; official 1/12)")
    hidden: int = opt(128, "D, width of the augmenter's embedding space")
    confidence: str = opt(None, "how sure a pixel is [D1] (default: the reading's)", choices=("paper", "official"))
    consistency: str = opt(None, "L_con [D8] (default: the reading's)", choices=("paper", "official", "mse"))
    pce: str = opt("moves", "prediction under L_pce [D7]: moves = initial, local, global by phase; local = stays on "
                   "local in the last phase; initial = always the plain one", choices=("moves", "local", "initial"))
    classes_of: str = opt(None, "whose strokes tell the classes in training [D9] (default crop; official image)",
                          choices=("crop", "image"))
    w_local: float = opt(0.01, "lambda_l, weight of L_con-l")
    w_local_first: float = opt(None, "the same before the memory is full (default 0.01; official 0.02)")
    w_global: float = opt(0.01, "lambda_g, weight of L_con-g")
    filter: int = opt(500, "pixels that a class needs in the plain prediction to lend its prototypes (Table 4), in "
                      "log.csv and with --infer filter; the report has 0, 100, 500 and 1000", runtime=True)
    class_scores: str = opt("", "FILE.npz: image name -> scores of the classes, from a classifier of your own [D15]",
                            runtime=True)
    score_threshold: float = opt(0.5, "a class whose score is above counts as present", runtime=True)
    train_classifier: bool = opt(False, "train a classifier of images on the strokes' classes when all else is done; "
                                 "with --eval-only for a run that has none", runtime=True)
    classifier_backbone: str = opt("resnet50", "network of the image classifier", choices=EXTRACTORS)
    classifier_weights: str = opt("imagenet", "pretrained weights of the image classifier: imagenet, file, URL or "
                                  "none", runtime=True)
    classifier_size: int = opt(448, "the image classifier sees squares of so many pixels a side")
    classifier_iterations: int = opt(6600, "training steps of the image classifier, --batch-size images each",
                                     schedule=True)
    classifier_lr: float = opt(1e-4, "AdamW learning rate of the image classifier, falling to 0; its new layer "
                               "learns 10 times as fast")
    eval_every: int = opt(5000, "iterations between evaluations, one row of log.csv each", schedule=True)
    save_every: int = opt(1000, "iterations between checkpoints: what --resume can lose", runtime=True)
    baseline: str = opt("", "run folder, such as one of --method pce: its predictions join the figures", runtime=True)
    eval_only: bool = opt(False, "evaluate and draw the run in OUT again and stop", runtime=True, uses_run=True)
    predict: str = opt("", "image or folder: write index PNGs and overlays to OUT/predictions and stop",
                       runtime=True, uses_run=True)
    infer: str = opt("plain", "classes whose prototypes --predict uses: plain = no augmentation; filter, classifier, "
                     "scores as in Table 4", choices=("plain", "filter", "classifier", "scores"), runtime=True)
    draw: list = opt((), "IMAGE STROKES: adapt the run in OUT to the strokes on this image, write before and after "
                     "to OUT/drawings, and stop. STROKES is an index PNG, or a PNG painted in the colours of "
                     "OUT/figures/colours.png, on the image itself or on nothing", runtime=True, uses_run=True)
    draw_steps: int = opt(40, "steps of --draw", runtime=True)
    draw_lr: float = opt(2e-4, "learning rate of --draw; the backbone's is a tenth", runtime=True)
    table: int = opt(0, "train and evaluate the rows of this table of the paper on the chosen preset", runtime=True,
                     choices=(0, 2, 3, 4, 5))
    figure: int = opt(0, "the same for a figure: 5 = number of global prototypes, 6 = top-k, 8 = drop and shrink",
                      runtime=True, choices=(0, 5, 6, 8))

    def __post_init__(self):
        """What was not given comes from the reading."""
        for name, value in READINGS[self.reading].items():
            if getattr(self, name) is None:
                setattr(self, name, value)


READINGS = {                                                         # [D3] [D11]
    "paper": dict(crop=512, batch_size=16, iterations=132400, warmup=19860, lr=3e-5, lr_policy="multistep", slots=5,
                  top_fraction=0.08, confidence="paper", consistency="paper", classes_of="crop", w_local_first=0.01,
                  freeze_norms=False),                               # Sec. 4.2
    "official": dict(crop=320, batch_size=12, iterations=176400, warmup=26460, lr=6e-5, lr_policy="linear", slots=10,
                     top_fraction=1 / 12, confidence="official", consistency="official", classes_of="image",
                     w_local_first=0.02, freeze_norms=True),         # released code
}
R101 = dict(backbone="resnet101")
PRESETS = {
    "toy": dict(dataset="toy_scenes", train_split="train", test_split="test", backbone="tiny",
                weights="none", head_channels=64, hidden=32, crop=96, batch_size=16, iterations=900, warmup=120,
                lr=2e-3, head_lr=1.0, train_classifier=True, classifier_backbone="tiny", classifier_weights="none",
                classifier_size=96, classifier_iterations=400, classifier_lr=2e-3, score_threshold=0.1, eval_every=300,
                save_every=150, workers=0),                          # [D17]
    "small": dict(dataset="folder", scribbles="scribbles", train_split="train", backbone="mobilenet_v2", crop=320,
                  batch_size=8, iterations=4000, warmup=800, lr=1e-4, classifier_backbone="mobilenet_v2",
                  classifier_size=256, classifier_iterations=1000, eval_every=1000, save_every=200),        # [D17]
    "voc-b1": dict(),
    "voc-b3": dict(backbone="mit_b3"),
    "voc-b5": dict(backbone="mit_b5"),
    "voc-r101-deeplabv2": R101 | dict(head="deeplabv2"),
    "voc-r101-deeplabv3plus": R101 | dict(head="deeplabv3plus"),
}
FILTERS = (0, 100, 500, 1000)                                        # Table 4, pixels


# progress, a dict in every checkpoint: iteration (done), full_at (iterations until the memory was full, or None),
# seconds, log (rows), sums (of losses since the last row), classes (names), phases {name: iterations in it}.


def check_config(cfg):
    """UserError for a setting that cannot work, before anything is read or written."""
    for name in ("crop", "batch_size", "iterations", "lr", "head_lr", "slots", "hidden", "head_channels", "scale_min",
                 "eval_every", "save_every", "classifier_iterations", "classifier_size", "classifier_lr",
                 "draw_steps", "draw_lr"):
        if not getattr(cfg, name) > 0:                               # so that nan is refused too
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be above 0.")
    for name in ("warmup", "test_size", "workers", "weight_decay", "w_local", "w_local_first", "w_global", "filter",
                 "rotation"):
        if not getattr(cfg, name) >= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must not be negative.")
    for name in ("scribble_drop", "scribble_shrink", "momentum", "top_fraction", "score_threshold"):
        if not 0 <= getattr(cfg, name) <= 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must lie between 0 and 1.")
    if cfg.scribble_drop == 1:
        raise UserError("--scribble-drop 1 leaves no stroke to learn from: choose less.")
    for name in ("crop", "test_size"):
        if 0 < getattr(cfg, name) < 32:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: networks need 32 pixels or more.")
    if cfg.scale_max < cfg.scale_min:
        raise UserError(f"--scale-max {cfg.scale_max} is below --scale-min {cfg.scale_min}: swap them.")
    if cfg.warmup >= cfg.iterations and cfg.method == "pfa":
        raise UserError(f"--warmup {cfg.warmup} leaves none of the --iterations {cfg.iterations} for prototypes: "
                        "lower it, or take --method pce.")
    if cfg.backbone not in GOES_WITH[cfg.head]:
        raise UserError(f"--head {cfg.head} does not go with --backbone {cfg.backbone}: choose one of "
                        f"{', '.join(GOES_WITH[cfg.head])}, or another head.")
    if cfg.draw and len(cfg.draw) != 2:
        raise UserError(f"--draw {' '.join(cfg.draw)}: give two files, the image and the PNG of its strokes.")
    if cfg.table and cfg.figure:
        raise UserError("--table and --figure are two commands: give one of them.")
    if cfg.infer != "plain" and not cfg.predict:
        raise UserError(f"--infer {cfg.infer} goes with --predict; other runs report all modes.")
    if cfg.infer == "scores" and not cfg.class_scores:
        raise UserError("--infer scores needs the file: add --class-scores FILE.npz.")
    if (cfg.scribble_drop or cfg.scribble_shrink) and cfg.method == "full":
        raise UserError("--scribble-drop and --scribble-shrink change strokes, and --method full uses none.")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if cfg.batch_size % world:
        raise UserError(f"--batch-size {cfg.batch_size} for {world} processes: choose a multiple of {world}.")


# ---- prototypes (Sec. 3.2) -----------------------------------------------------------------------------------

def full_precision(x):
    """float32, or float64 if it is. Under bfloat16 an attention logit of 50 is off by 0.2: a weight by a fifth."""
    return x if x.dtype == torch.float64 else x.float()


def confidence(logits, present, reading="paper"):
    """p of Eq. (1): how sure every pixel is of every class. logits (B,N,h,w) -> (B,N,h,w) float32.

    paper     softmax over all N classes
    official  ReLU(logit), min-max scaled over the pixels of an image and class; -1 everywhere if no logit is
              positive [D1]
    present (B,N) bool changes nothing here: extract_prototypes leaves absent classes out.
    Raises ValueError if its shape is not that of the logits.
    """
    if present.shape != logits.shape[:2]:
        raise ValueError(f"present {tuple(present.shape)} does not fit logits {tuple(logits.shape)}")
    logits = full_precision(logits)
    if reading == "paper":
        return logits.softmax(1)
    p = logits.relu()
    low, high = p.amin((2, 3), keepdim=True), p.amax((2, 3), keepdim=True)
    p = torch.where(p < low + 1e-5, 0, p)
    return (p - low - 1e-5) / (high - low + 1e-5)


@torch.no_grad()
def extract_prototypes(features, scores, present, top_fraction=0.08):
    """fp_t, Eq. (1) to (3): mean of the features of each class's K surest pixels, weighted by their confidence.

    features (B,C,h,w), scores (B,N,h,w) from confidence(), present (B,N) bool -> (B,N,C) float32 of unit length,
    0 where a class is absent. K = max(1, int(top_fraction h w)). Constants: no gradient flows back [D6].
    """
    with torch.autocast(features.device.type, enabled=False):        # float32: sums over a thousand pixels
        f, p = full_precision(features).flatten(2), full_precision(scores).flatten(2)    # (B,C,hw), (B,N,hw)
        K = max(1, int(top_fraction * p.shape[2]))
        c, pixel = p.topk(K, dim=2, sorted=False)                    # Eq. (1), (B,N,K)
        c = torch.where(c.sum(2, keepdim=True) == 0, 1, c)           # all underflowed to 0: their plain mean
        weights = torch.zeros_like(p).scatter_(2, pixel, c)          # 0 for the pixels that Eq. (2) leaves out
        mean = weights @ f.transpose(1, 2) / c.sum(2, keepdim=True)  # Eq. (3), (B,N,C)
        return torch.where(present[..., None], F.normalize(mean, dim=2), 0)


class PrototypeMemory(nn.Module):
    """Global prototypes (Sec. 3.2.3). Buffers, saved with the model: bank (N,n,C), count (N,) slots in use."""

    def __init__(self, num_classes, slots, channels, momentum=0.99):
        super().__init__()
        self.momentum = momentum                                     # alpha
        self.register_buffer("bank", torch.zeros(num_classes, slots, channels))
        self.register_buffer("count", torch.zeros(num_classes, dtype=torch.int64))

    @property
    def full(self):
        """Has every class n prototypes? Waits for the device."""
        return bool((self.count == self.bank.shape[1]).all())

    @torch.no_grad()
    def update(self, prototypes, present):
        """Image by image: into an empty slot, else Eq. (4), (5). prototypes (B,N,C), present (B,N) bool.

        An image's update depends on the one before, so images are a loop; its classes touch different rows of
        the bank and are done at once. Nothing here waits for the device.
        """
        rows, n = torch.arange(len(self.bank), device=self.bank.device), self.bank.shape[1]
        for fp, here in zip(prototypes.to(self.bank.dtype), present):                    # (N,C), (N,)
            cosine = F.cosine_similarity(fp[:, None], self.bank, dim=2)                  # (N,n)
            filling = self.count < n                                                     # (N,)
            slot = torch.where(filling, self.count, cosine.argmax(1))                    # Eq. (4), most similar [D2]
            old = self.bank[rows, slot]                                                  # (N,C)
            new = self.momentum * old + (1 - self.momentum) * fp                         # Eq. (5)
            new = torch.where(filling[:, None], fp, new)
            self.bank[rows, slot] = torch.where(here[:, None], new, old)
            self.count += filling & here


def local_keys(prototypes, present):
    """select(fp) of Sec. 3.3.1 -> keys (B,N,C), mask (B,N) bool: True = this key counts for this image."""
    return prototypes, present


def global_keys(memory, present):
    """The n slots of every class, class-major [D4] -> keys (B,N*n,C), mask (B,N*n): those of present classes.

    present (B,N) bool. An empty slot never counts.
    """
    keys = memory.bank.flatten(0, 1).expand(len(present), -1, -1)
    filled = (memory.bank != 0).any(2)                               # (N,n)
    return keys, (present[:, :, None] & filled).flatten(1)


# ---- feature augmentation (Sec. 3.3, Fig. 3) -----------------------------------------------------------------

class FeatureAugmenter(nn.Module):
    """Pixels attend to prototypes and are augmented with what they find. One module for both paths [D5]."""

    def __init__(self, channels, hidden=128):
        super().__init__()
        self.project_prototype = nn.Linear(channels, hidden)         # e_fp = linear(fp)
        self.project_feature = nn.Linear(channels, hidden)           # e_f = linear(f)
        self.fuse = nn.Linear(2 * hidden, hidden)
        self.expand = nn.Linear(hidden, channels)

    def forward(self, features, keys, mask):
        """features (B,C,h,w), keys (B,M,C), mask (B,M) bool -> f_aug (B,C,h,w), float32 also under autocast."""
        return self.augment(self.embed(features), keys, mask).unflatten(2, features.shape[2:])

    def embed(self, features):
        """The half of Eq. (6) to (8) that knows no prototype, so that both paths share it.

        (B,C,h,w) -> f (B,hw,C), e_f (B,hw,D), and e_f's share of Eq. (7), (B,hw,D): a linear layer on a
        concatenation is the sum of two, linear(concat(a, b)) = a W_a^T + b W_b^T + bias.
        """
        with torch.autocast(features.device.type, enabled=False):
            f = full_precision(features).flatten(2).transpose(1, 2)
            e_f = self.project_feature(f)
            W_f = self.fuse.weight[:, e_f.shape[2]:]                 # (D,D)
            return f, e_f, F.linear(e_f, W_f, self.fuse.bias)

    def augment(self, embedded, keys, mask):
        """The other half: what embed() returns, keys (B,M,C), mask (B,M) -> f_aug (B,C,hw)."""
        f, e_f, fused_f = embedded
        with torch.autocast(f.device.type, enabled=False):
            e_fp = self.project_prototype(full_precision(keys))      # (B,M,D)
            W_fp = self.fuse.weight[:, :e_fp.shape[2]]               # (D,D), applied to M keys, not hw pixels
            omega = self.attention(e_f, e_fp, mask)                  # (B,hw,M)
            e = F.relu(omega @ F.linear(e_fp, W_fp) + fused_f)       # Eq. (7), (B,hw,D)
            return F.relu(f + self.expand(e)).transpose(1, 2)        # Eq. (8)

    def attention(self, e_f, e_fp, mask):
        """omega, Eq. (6): e_f (B,hw,D), e_fp (B,M,D), mask (B,M) -> (B,hw,M); rows sum to 1.

        Masked keys have 0, unless a row has no other.
        """
        similarity = e_f @ e_fp.transpose(1, 2)                      # no 1 / sqrt(D), as printed
        return similarity.masked_fill(~mask[:, None], torch.finfo(similarity.dtype).min).softmax(2)


# ---- losses (Sec. 3.4) ---------------------------------------------------------------------------------------

def enlarge(logits, size):
    """(B,N,h,w) -> (B,N,*size) float32, bilinear with aligned corners [D14]."""
    logits = full_precision(logits)
    return logits if logits.shape[2:] == size else F.interpolate(logits, size, mode="bilinear", align_corners=True)


def partial_cross_entropy(logits, scribbles):
    """L_pce, Eq. (9): mean over the labelled pixels of the batch; 0, and no gradient, if there is none.

    logits (B,N,h,w), resized to the labels; scribbles (B,H,W) int64, 255 = no label -> scalar.
    """
    total = F.cross_entropy(enlarge(logits, scribbles.shape[1:]), scribbles, ignore_index=255, reduction="sum")
    return total / (scribbles != 255).sum().clamp(min=1)


def consistency_loss(logits, augmented, reading="paper"):
    """L_con, Eq. (10): -sum_c p_c log p^aug_c, mean over pixels [D8]. logits, augmented (B,N,h,w) -> scalar.

    official: -sum_c p^aug_c log softmax(p)_c, p softmaxed twice.   mse: (p - p^aug)^2, mean over classes too.
    """
    logits, augmented = full_precision(logits), full_precision(augmented)
    p = logits.softmax(1)
    if reading == "paper":
        return -(p * augmented.log_softmax(1)).sum(1).mean()
    if reading == "official":
        return -(augmented.softmax(1) * p.log_softmax(1)).sum(1).mean()
    return (p - augmented.softmax(1)).square().mean()


def classes_in(labels, num_classes):
    """Labels (B,H,W) int64 -> (B,N) bool: which classes occur. Background always counts as there (released code)."""
    seen = torch.zeros(len(labels), num_classes + 1, dtype=torch.bool, device=labels.device)
    seen.scatter_(1, labels.clamp(max=num_classes).flatten(1), True)                     # 255 falls into the last
    seen[:, 0] = True
    return seen[:, :-1]


# ---- model (Sec. 3.1, A.1) -----------------------------------------------------------------------------------

class DilatedClassifier(nn.Module):
    """DeepLabv2's: four dilated 3x3 convolutions, summed. (B,C,h,w) -> (B,N,h,w)."""

    def __init__(self, channels, num_classes):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, num_classes, 3, padding=rate, dilation=rate)
                                   for rate in (6, 12, 18, 24))
        for conv in self.convs:
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)

    def forward(self, x):
        return sum(conv(x) for conv in self.convs)


class PFA(nn.Module):
    """Images -> features F and initial prediction; holds the augmenter and the memory of the other predictions.

    A network without prototypes (--method pce, full) has neither: augmenter and memory are None.
    """

    def __init__(self, network, classifier, num_classes, augmenter=None, memory=None):
        super().__init__()
        self.network, self.dropout, self.classifier = network, nn.Dropout2d(0.1), classifier
        self.augmenter, self.memory = augmenter, memory
        self.register_buffer("occurs", torch.ones(num_classes, dtype=torch.bool))        # in some training image
        self.register_buffer("trained", torch.zeros(2, dtype=torch.bool))        # the local, the global prediction

    def forward(self, x):
        """Images (B,3,H,W) -> F (B,C,h,w), logits (B,N,h,w)."""
        features = self.dropout(self.network(x)[0])                  # [D6]
        return features, self.classifier(features)

    def augmented(self, features, **keys_and_masks):
        """{path: logits (B,N,h,w) of the augmented features}; the three decoders of Fig. 2 share this classifier.

        local, global: (keys, mask) each, as FeatureAugmenter takes them.
        """
        embedded, size = self.augmenter.embed(features), features.shape[2:]
        return {path: self.classifier(self.augmenter.augment(embedded, *keys).unflatten(2, size))
                for path, keys in keys_and_masks.items()}

    def memory_full(self):
        """Has every class that occurs in the training strokes n prototypes [D10]? Waits for the device."""
        return bool((self.memory.count[self.occurs] == self.memory.bank.shape[1]).all())


def build_model(cfg, num_classes, weights="none"):
    """The network of the options. UserError as build_network raises it."""
    last_stride = 1 if cfg.backbone.startswith("mit") else 2         # 1: only so are Table 3's FLOPs right
    output_stride = 16 if cfg.head == "deeplabv3plus" else 8
    network = build_network(cfg.backbone, cfg.head, num_classes, cfg.head_channels, weights, output_stride,
                            last_stride=last_stride)
    C = network.channels
    classifier = (DilatedClassifier(C, num_classes) if cfg.head == "deeplabv2" else        # [D13]
                  nn.Conv2d(C, num_classes, 1))
    if cfg.method != "pfa":
        return PFA(network, classifier, num_classes)
    augmenter = FeatureAugmenter(C, cfg.hidden)
    return PFA(network, classifier, num_classes, augmenter, PrototypeMemory(num_classes, cfg.slots, C, cfg.momentum))


# ---- one training step ---------------------------------------------------------------------------------------

def phase_of(net, iteration, cfg):
    """Phase of an iteration, counted from 0 (Sec. 3.3.3): "warmup", "local", "global"; of a baseline its method."""
    if cfg.method != "pfa":
        return cfg.method
    if iteration < cfg.warmup:
        return "warmup"
    return "global" if cfg.augment != "local" and net.memory_full() else "local"


def of_all_ranks(tensor):
    """(B,...) of every process -> (B*world,...) in the order of the undivided batch, of which rank r has r::world."""
    if not dist.is_initialized():
        return tensor
    tensor = tensor.contiguous()
    every = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(every, tensor)
    return torch.stack(every, 1).flatten(0, 1)


def share_of_labels(scribbles):
    """Labelled pixels of this process over their mean over all processes.

    Eq. (9) is a mean over the pixels of the batch, DistributedDataParallel averages over processes.
    """
    if not dist.is_initialized():
        return 1.0
    mine = (scribbles != 255).sum().float()
    mean = mine / dist.get_world_size()
    dist.all_reduce(mean)
    return mine / mean.clamp(min=1e-6)


def predictions_of(model, net, x, present, phase, cfg):
    """{"initial": logits (B,N,h,w), and "local", "global" as the phase has them}; updates the memory.

    x (B,3,H,W), present (B,N) bool. model: DistributedDataParallel around net, or net.
    """
    with run.autocast(x.device, cfg.amp):
        features, initial = model(x)
        predictions = dict(initial=initial)
        if phase not in ("local", "global"):
            return predictions
        features = full_precision(features)                          # once for prototypes and augmenter
        scores = confidence(initial.detach(), present, cfg.confidence)
        prototypes = extract_prototypes(features, scores, present, cfg.top_fraction)     # Eq. (1) to (3)
        if cfg.augment != "local":
            net.memory.update(of_all_ranks(prototypes), of_all_ranks(present))           # Eq. (4), (5) [D10]
        keys = {}
        if cfg.augment != "global":
            keys["local"] = local_keys(prototypes, present)
        if phase == "global":
            keys["global"] = global_keys(net.memory, present)
        return predictions | net.augmented(features, **keys) if keys else predictions


def losses_of(predictions, scribbles, phase, cfg):
    """The terms of L_total (Sec. 3.4): dict of scalars to be summed."""
    initial, latest = predictions["initial"], list(predictions)[-1]
    under_pce = dict(moves=latest, local="local" if "local" in predictions else latest, initial="initial")[cfg.pce]
    pce = partial_cross_entropy(predictions[under_pce], scribbles)                       # [D7]
    losses = dict(pce=pce * share_of_labels(scribbles))
    if "local" in predictions:
        weight = cfg.w_local_first if phase == "local" and cfg.augment == "both" else cfg.w_local
        losses["con_local"] = weight * consistency_loss(initial, predictions["local"], cfg.consistency)
    if "global" in predictions:
        losses["con_global"] = cfg.w_global * consistency_loss(initial, predictions["global"], cfg.consistency)
    return losses


def train_step(model, net, optimizer, scheduler, x, scribbles, image_classes, phase, cfg):
    """One iteration; returns the terms of L_total, detached, on the device.

    x (B,3,H,W), scribbles (B,H,W) int64, image_classes (B,N) bool: classes with a stroke in the whole image.
    """
    present = classes_in(scribbles, image_classes.shape[1])
    if cfg.classes_of == "image":                                    # [D9]
        present = present | image_classes
    losses = losses_of(predictions_of(model, net, x, present, phase, cfg), scribbles, phase, cfg)
    optimizer.zero_grad(set_to_none=True)
    sum(losses.values()).backward()
    optimizer.step()
    scheduler.step()
    return {name: value.detach() for name, value in losses.items()}


def build_optimizer(net, cfg, device):
    """AdamW and its schedule (Sec. 4.2): all but the backbone learns cfg.head_lr times faster [D11]."""
    if cfg.freeze_norms:
        freeze_layer_norms(net.network.backbone)                     # [D12]
    backbone = [p for p in net.network.backbone.parameters() if p.requires_grad]
    own = {id(p) for p in net.network.backbone.parameters()}
    rest = [p for p in net.parameters() if id(p) not in own]
    groups = [dict(params=backbone, lr=cfg.lr), dict(params=rest, lr=cfg.lr * cfg.head_lr)]
    optimizer = torch.optim.AdamW(groups, weight_decay=cfg.weight_decay, fused=device.type == "cuda")
    if cfg.lr_policy == "linear":
        return optimizer, run.poly_schedule(optimizer, cfg.iterations)
    milestones = [round(0.6 * cfg.iterations), round(0.85 * cfg.iterations)]
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)


# ---- training ------------------------------------------------------------------------------------------------

def open_train_set(cfg):
    """The training images with their strokes, or for --method full with their full masks."""
    if cfg.method == "full":
        return open_full(cfg, cfg.train_split)
    if cfg.dataset in ("voc", "folder") and not cfg.scribbles:
        raise UserError(f"--dataset {cfg.dataset} has full masks: name the folder of the strokes, --scribbles FOLDER "
                        "(data/README.md), or take --method full.")
    folder = "scribbles" if cfg.dataset == "toy_scenes" else cfg.scribbles
    data = datasets.open_dataset(cfg.dataset, cfg.data, cfg.train_split, mask_dir=folder)
    if cfg.scribble_drop or cfg.scribble_shrink:
        data = datasets.WeakerScribbles(data, cfg.scribble_drop, cfg.scribble_shrink, cfg.seed)
    return data


def open_full(cfg, split):
    """A split with its full masks."""
    return datasets.open_dataset("voc" if cfg.dataset == "voc_scribble" else cfg.dataset, cfg.data, split)


def open_sets(cfg):
    """{"train", "val", "test"}: SegmentationSets."""
    sets = dict(train=open_train_set(cfg), val=open_full(cfg, cfg.val_split), test=open_full(cfg, cfg.test_split))
    if sets["train"].num_classes < 2:
        raise UserError(f"{cfg.data} has one class: two are needed, of which the first is the background.")
    return sets


def training_view(data, cfg):
    """Strokes with Sec. 4.2's augmentation: scale, rotation, blur, flip, crop."""
    scale = (cfg.scale_min, cfg.scale_max)
    return loaders.ScribbleView(data, 0, cfg.crop, scale, cfg.rotation, cfg.blur)                # [D14]


def test_loader(data, cfg, device, rank=0, world=1):
    """Whole images, one a batch [D16]."""
    return loaders.eval_loader(loaders.TestView(data, cfg.test_size), cfg.workers, device, rank, world)


def to_device(batch, device, *names):
    """The image (channels_last) and what else is named, on the device."""
    cuda = device.type == "cuda"                                     # only there are batches in pinned memory
    x = batch["image"].to(device, non_blocking=cuda, memory_format=torch.channels_last)
    return x, *(batch[name].to(device, non_blocking=cuda) for name in names)


def survey(data, cfg, rank):
    """(N,) bool: classes with a stroke in some training image. Prints which masks and classes have none."""
    found = loaders.survey_scribbles(data, cfg.workers)
    if rank == 0:
        for names, what in ((found["empty"], "label nothing"), (found["background_only"], "label background alone")):
            if names:
                print(f"note: {len(names)} of {len(data)} scribble masks {what}, such as {names[0]}")
        absent = [name for name, images in zip(data.classes, found["images"].tolist()) if not images]
        if absent:
            print(f"note: no training image has a stroke of {', '.join(absent)}: not learned, and not waited for by "
                  "the memory")
        print(f"strokes label {found['labelled']:.1f} % of the pixels of {len(data)} training images", flush=True)
    return found["images"] > 0


def prepare(cfg, data, device, rank):
    """net, optimizer, scheduler, and the progress so far.

    Makes the run folder once the model stands, so that a mistake in the options leaves nothing behind.
    """
    last = Path(cfg.out) / "last.pt"
    resumes = cfg.resume and last.exists()                           # killed before the first: start again
    torch.manual_seed(cfg.seed)
    if resumes:
        check_classes(run.read_checkpoint(last)["progress"]["classes"], data.classes, cfg.out)
    net = build_model(cfg, data.num_classes, "none" if resumes else cfg.weights)
    if cfg.method != "full" and not resumes:
        found = survey(data, cfg, rank)                              # also of a baseline's strokes
        net.occurs.copy_(found)
    run.start_run(cfg, rank)
    net.to(device, memory_format=torch.channels_last)
    optimizer, scheduler = build_optimizer(net, cfg, device)
    torch.manual_seed(cfg.seed + 1 + rank)                           # dropout differs between ranks
    progress = dict(iteration=0, full_at=None, seconds=0.0, classes=data.classes, log=[], sums={}, phases={})
    if resumes:
        progress = run.load_checkpoint(last, dict(model=net, optimizer=optimizer, scheduler=scheduler), device)
    return net, optimizer, scheduler, progress


def wrap(net, phase, cfg, device, world):
    """net for a phase; DistributedDataParallel waits for every gradient, so the augmenter is frozen while unused."""
    if net.augmenter is not None:
        now = torch.tensor([phase != "warmup" and cfg.augment != "global", phase == "global"])     # local, global
        net.trained |= now.to(device)
        net.augmenter.requires_grad_(bool(now.any()))
    return run.distribute(net, device, world)


def train(cfg, device, rank=0, world=1):
    """Train, evaluate in all modes, draw. Returns what metrics.json holds (None on other ranks than 0)."""
    sets, out = open_sets(cfg), Path(cfg.out)
    scores = scores_of_file(cfg, sets["test"])                       # a wrong file is told now, not at the end
    baseline = load_baseline(cfg, device, sets["test"].classes)
    net, optimizer, scheduler, progress = prepare(cfg, sets["train"], device, rank)
    parts = dict(model=net, optimizer=optimizer, scheduler=scheduler)
    start, sums = progress["iteration"], progress["sums"]
    expect(net, parts, sets, progress, cfg, device, rank, world)
    loader = loaders.train_loader(training_view(sets["train"], cfg), cfg.batch_size, cfg.seed, start,
                                  cfg.iterations, cfg.workers, device, rank, world)
    began, phase = time.perf_counter() - progress["seconds"], None
    torch.backends.cudnn.benchmark = True                            # crops are of one size, whole images are not
    bar = tqdm(loader, total=cfg.iterations, initial=start, leave=False, disable=True if rank else None)
    for iteration, batch in enumerate(bar, start + 1):
        if phase != "global" and phase != (now := phase_of(net, iteration - 1, cfg)):
            phase, model = now, wrap(net, now, cfg, device, world).train()
            bar.set_description(phase)
            note_phase(phase, iteration, progress, rank)
        batch = to_device(batch, device, "mask", "classes")
        for name, value in train_step(model, net, optimizer, scheduler, *batch, phase, cfg).items():
            sums.setdefault(name, [0.0, 0])
            sums[name] = [sums[name][0] + value, sums[name][1] + 1]  # stays on the device: no sync per step
        progress["phases"][phase] = progress["phases"].get(phase, 0) + 1
        progress |= dict(iteration=iteration, seconds=time.perf_counter() - began)
        saves = iteration % cfg.save_every == 0 or iteration == cfg.iterations
        evaluates = iteration % cfg.eval_every == 0 or iteration == cfg.iterations
        if saves or evaluates:
            means = mean_losses(sums, iteration)
        if evaluates:
            sums.clear()
            log_row(net, sets["val"], progress, phase, means, scheduler.get_last_lr()[0], cfg, device, rank, world)
            model.train()
        if saves:
            run.share_buffers(net)
            run.save_checkpoint(out / "last.pt", parts, progress)
    torch.backends.cudnn.benchmark = False
    if scores is None and cfg.train_classifier and cfg.method == "pfa":
        scores = scores_of_classifier(cfg, sets, device, rank, world)
    return report(net, cfg, sets, scores, baseline, progress, device, rank, world)


def note_phase(phase, iteration, progress, rank):
    """A phase begins with this iteration, counted from 1: say so, and note when the memory was full."""
    if phase == "global" and progress["full_at"] is None:
        progress["full_at"] = iteration - 1
    if rank == 0 and iteration > 1:
        full = f" (memory full after {progress['full_at']} iterations, warm-up included)" if phase == "global" else ""
        tqdm.write(f"from iteration {iteration} on: phase {phase}{full}")


def expect(net, parts, sets, progress, cfg, device, rank, world):
    """Prints the expected time and peak memory, measured on one iteration of the last phase; changes nothing."""
    left = cfg.iterations - progress["iteration"]
    if left <= 0:
        return
    phase = cfg.method if cfg.method != "pfa" else "local" if cfg.augment == "local" else "global"
    view = training_view(sets["train"], cfg)
    images = -(-left // cfg.eval_every) * len(sets["val"]) + len(sets["test"])
    net.train()
    run.announce(lambda batch: train_step(net, net, parts["optimizer"], parts["scheduler"],
                                          *to_device(batch, device, "mask", "classes"), phase, cfg),
                 lambda: default_collate([view[(i % len(view), i)] for i in range(cfg.batch_size // world)]),
                 parts, left, images, cfg, device, rank, world)


def mean_losses(sums, iteration):
    """{name: [sum on the device, steps]} -> {name: mean as a float}. UserError if one is not finite."""
    means = {name: float(total) / steps for name, (total, steps) in sums.items()}
    if not all(map(math.isfinite, means.values())):
        raise UserError(f"the loss is not finite ({means}) by iteration {iteration}: lower --lr, or use --amp off; "
                        "--resume goes back to the last good checkpoint.")
    return means


def log_row(net, val_set, progress, phase, means, lr, cfg, device, rank, world):
    """Evaluate on the val split and add a row to the log; augmented predictions use the class filter, no labels."""
    found = evaluate(net, val_set, cfg, device, rank, world, [f"filter_{cfg.filter}"])
    miou = {f"val_{prediction}": score["miou"] for mode in found.values() for prediction, score in mode.items()}
    row = dict(iteration=progress["iteration"], phase=phase, lr=lr)
    for name in ("pce", "con_local", "con_global"):
        row[name] = means.get(name)
    for name in ("val_plain", "val_local", "val_global"):
        row[name] = miou.get(name)
    progress["log"].append(row | dict(seconds=progress["seconds"]))
    if rank == 0:
        run.write_csv(Path(cfg.out) / "log.csv", progress["log"])
        tqdm.write(f"iteration {row['iteration']} ({phase}): "
                   + ", ".join(f"{name} {value:.3f}" for name, value in means.items()) + f", {cfg.val_split} mIoU "
                   + ", ".join(f"{name[4:]} {value:.1f}" for name, value in miou.items())
                   + f", {run.duration(progress['seconds'])}")


# ---- which classes are in a test image? (A.2, Table 4) -------------------------------------------------------

def read_scores(path, names, num_classes):
    """--class-scores FILE -> {image name: (N,) float32}, background 1. UserError if one of the names has none."""
    N = num_classes
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except Exception as error:                                       # numpy raises many types for a wrong file
        raise UserError(f"--class-scores {path} cannot be read ({error}): an .npz file is needed, written by "
                        "numpy.savez(path, **{image name: scores}).") from None
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f"--class-scores {path} lacks {len(missing)} of {len(names)} images, such as {missing[0]}: "
                        "its keys must be the images' names without ending.")
    scores = {}
    for name in names:
        row = found[name]
        if row.shape not in ((N,), (N - 1,)) or row.dtype.kind not in "fiu" or not np.isfinite(row).all():
            raise UserError(f"--class-scores {path} holds {row.dtype} of shape {row.shape} for {name}: {N} finite "
                            f"numbers are needed, one a class, or {N - 1} without the background.")
        row = torch.from_numpy(row.astype(np.float32))
        scores[name] = torch.cat([torch.ones(1), row[len(row) - N + 1:]])                # the background is there
    every = torch.stack(list(scores.values()))
    if every.min() < 0 or every.max() > 1:
        print(f"note: {path} has scores from {every.min():.3g} to {every.max():.3g}; if they are logits, apply a "
              "sigmoid, or choose a fitting --score-threshold")
    return scores


def scores_of_file(cfg, data):
    """--class-scores for all images of a set, None without the option."""
    if not cfg.class_scores:
        return None
    return read_scores(cfg.class_scores, [data.name_of(i) for i in range(len(data))], data.num_classes)


class ImageLabels(Dataset):
    """Square images and the classes of their strokes: view[(index, sample_seed)] -> dict(image, classes (N,))."""

    def __init__(self, data, size):
        self.data, self.size = data, size

    def __len__(self):
        return len(self.data)

    def __getitem__(self, key):
        index, sample_seed = key
        image, mask = self.data.read(index)
        image = transforms.normalise(transforms.resize_to_square(image, self.size))
        image = image.flip(2) if sample_seed % 2 else image
        return {"image": image, "classes": classes_in(mask[None].long(), self.data.num_classes)[0]}


def build_classifier(cfg, num_classes, weights="none"):
    """Images (B,3,S,S) -> logits (B,N-1) of the classes but the background; several may be there."""
    extractor = build_extractor(cfg.classifier_backbone, weights)
    return nn.Sequential(extractor, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(extractor.channels, num_classes - 1))


def scores_of_classifier(cfg, sets, device, rank=0, world=1):
    """--train-classifier: train it on the strokes' classes, OUT/classifier.pt; its scores of the test images, also
    written to OUT/class_scores-SPLIT.npz for --class-scores. -> as read_scores."""
    path, data = Path(cfg.out) / "classifier.pt", sets["train"]
    resumes = path.exists()                                          # start_run moved those of earlier runs away
    torch.manual_seed(cfg.seed)
    net = build_classifier(cfg, data.num_classes, "none" if resumes else cfg.classifier_weights)
    net.to(device, memory_format=torch.channels_last)
    model, criterion = run.distribute(net, device, world), nn.BCEWithLogitsLoss()
    optimizer = torch.optim.AdamW([dict(params=net[0].parameters(), lr=cfg.classifier_lr),
                                   dict(params=net[-1].parameters(), lr=10 * cfg.classifier_lr)],
                                  weight_decay=cfg.weight_decay)
    scheduler = run.poly_schedule(optimizer, max(1, cfg.classifier_iterations))
    parts, start = dict(model=net, optimizer=optimizer, scheduler=scheduler), 0
    if resumes:
        start = run.load_checkpoint(path, parts, device)["iteration"]
    loader = loaders.train_loader(ImageLabels(data, cfg.classifier_size), cfg.batch_size, cfg.seed, start,
                                  cfg.classifier_iterations, cfg.workers, device, rank, world)
    model.train()
    bar = tqdm(loader, total=cfg.classifier_iterations, initial=start, desc="classifier", leave=False,
               disable=True if rank else None)
    for iteration, batch in enumerate(bar, start + 1):
        x, classes = to_device(batch, device, "classes")
        with run.autocast(device, cfg.amp):
            logits = model(x)
        optimizer.zero_grad(set_to_none=True)
        criterion(logits.float(), classes[:, 1:].float()).backward()
        optimizer.step()
        scheduler.step()
        if iteration % cfg.save_every == 0 or iteration == cfg.classifier_iterations:
            run.share_buffers(net)
            run.save_checkpoint(path, parts, dict(iteration=iteration, classes=data.classes))
    test, net = sets["test"], net.eval()
    found = {test.name_of(i): classify(net, test.read(i)[0], cfg, device) for i in range(rank, len(test), world)}
    if dist.is_initialized():
        every = [None] * world
        dist.all_gather_object(every, found)
        found = {name: row for part in every for name, row in part.items()}
    if rank == 0:
        save_scores(Path(cfg.out) / f"class_scores-{cfg.test_split}.npz", found)
    return found


def save_scores(path, scores):
    """{image name: (N,) float32} -> .npz for --class-scores; numpy.savez would refuse an image called "file"."""
    with run.replacing(path, "wb") as file, zipfile.ZipFile(file, "w") as archive:
        for name, row in scores.items():
            with archive.open(f"{name}.npy", "w") as entry:
                np.lib.format.write_array(entry, row.numpy())


@torch.inference_mode()
def classify(net, image, cfg, device):
    """uint8 (3,H,W) -> scores (N,) float32 on the CPU; the background's is 1."""
    x = transforms.normalise(transforms.resize_to_square(image, cfg.classifier_size))[None]
    with run.autocast(device, cfg.amp):
        logits = net(x.to(device, memory_format=torch.channels_last))[0].float()
    return torch.cat([torch.ones(1), logits.sigmoid().cpu()])


def class_sets(plain, num_classes, modes, labels=None, scores=None, threshold=0.5):
    """{mode: (N,) bool}: classes whose prototypes may augment an image, background always. Table 4.

    plain (H,W): initial prediction as ids. filter_T: classes with more than T of its pixels [D15]. scores,
    classifier: scores (N,) above the threshold. oracle: the classes of the labels (H,W); never without them.
    """
    counts = torch.bincount(plain.flatten(), minlength=num_classes)
    sets = {}
    for mode in modes:
        if mode == "oracle":
            here = classes_in(labels[None], num_classes)[0]
        elif mode.startswith("filter_"):
            here = counts > int(mode.removeprefix("filter_"))
        else:
            here = (scores > threshold).to(plain.device)
        sets[mode] = here.clone()
        sets[mode][0] = True
    return sets


# ---- evaluation ----------------------------------------------------------------------------------------------

class Seen(NamedTuple):
    """An image as the plain branch sees it, in eval mode."""
    features: torch.Tensor                                           # (1,C,h,w)
    logits: torch.Tensor                                             # (1,N,h,w)
    plain: torch.Tensor                                              # (H,W) int64: predicted ids


@torch.inference_mode()
def see(net, x, size, cfg):
    """x (1,3,h,w), size (H,W) of the label -> Seen."""
    with run.autocast(x.device, cfg.amp):
        features, logits = net(x)
    return Seen(features, logits, enlarge(logits, size).argmax(1)[0])


def paths_of(net):
    """The augmented predictions that a network has been trained for."""
    return [path for path, trained in zip(("local", "global"), net.trained.tolist()) if trained]


@torch.inference_mode()
def keys_of(net, path, seen, present, cfg):
    """Keys and mask of "local" or "global" for an image; present (N,) bool."""
    present = present[None]
    if path == "global":
        return global_keys(net.memory, present)
    scores = confidence(seen.logits, present, cfg.confidence)
    return local_keys(extract_prototypes(seen.features, scores, present, cfg.top_fraction), present)


@torch.inference_mode()
def augmented_ids(net, seen, present, paths, cfg):
    """{"local", "global": ids (H,W) int64} for the classes present (N,) bool."""
    keys = {path: keys_of(net, path, seen, present, cfg) for path in paths}
    with run.autocast(seen.features.device, cfg.amp):
        logits = net.augmented(seen.features, **keys) if keys else {}
    return {path: enlarge(maps, seen.plain.shape).argmax(1)[0] for path, maps in logits.items()}


@torch.inference_mode()
def evaluate(net, data, cfg, device, rank=0, world=1, modes=(), scores=None):
    """{mode: {prediction: rates in percent}}, summed over ranks; "plain" has the prediction "plain" alone.

    modes: names as class_sets takes them; scores {image name: (N,)} for "scores" and "classifier".
    """
    run.share_buffers(net)
    net.eval()
    tuned, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False        # sizes differ
    paths, N = paths_of(net), data.num_classes
    matrices = {("plain", "plain"): ConfusionMatrix(N, device)}
    matrices |= {(mode, path): ConfusionMatrix(N, device) for mode in modes for path in paths}
    for batch in tqdm(test_loader(data, cfg, device, rank, world), desc="evaluate", leave=False,
                      disable=True if rank else None):
        x, labels = to_device(batch, device, "mask")
        seen, done = see(net, x, labels.shape[1:], cfg), {}
        matrices["plain", "plain"].update(labels[0], seen.plain)
        row = scores[data.name_of(int(batch["index"]))] if scores else None
        sets = class_sets(seen.plain, N, modes, labels[0], row, cfg.score_threshold) if paths else {}
        for mode, present in sets.items():
            key = tuple(present.tolist())                            # modes often agree: compute once
            if key not in done:
                done[key] = augmented_ids(net, seen, present, paths, cfg)
            for path, ids in done[key].items():
                matrices[mode, path].update(labels[0], ids)
    torch.backends.cudnn.benchmark = tuned
    found = {}
    for (mode, path), matrix in matrices.items():
        matrix.all_reduce()
        found.setdefault(mode, {})[path] = matrix.summary()
    return found


def all_modes(scores, cfg):
    """The modes of Table 4 for a run: filters, scores where there are any, and the true classes last."""
    own = [] if scores is None else ["scores" if cfg.class_scores else "classifier"]
    return [f"filter_{T}" for T in sorted({*FILTERS, cfg.filter})] + own + ["oracle"]


def headline_mode(scores, cfg):
    """The mode without true classes whose augmented predictions stand for the run (paper: Q2L's scores)."""
    return all_modes(scores, cfg)[-2] if scores is not None else f"filter_{cfg.filter}"


def scores_quality(scores, data, learned):
    """mAP of the scores against the classes of the labels (Table 4), over the classes learned (N,) bool."""
    rows = torch.stack([scores[data.name_of(i)] for i in range(len(data))])
    truth = torch.cat([classes_in(data.read_mask(i)[None].long(), data.num_classes) for i in range(len(data))])
    columns = [c for c in learned.nonzero()[:, 0].tolist() if c]     # without the background
    return mean_average_precision(rows[:, columns], truth[:, columns])


def report(net, cfg, sets, scores, baseline, progress, device, rank, world):
    """Final evaluation in all modes, metrics.json and figures/ (rank 0 writes). Returns the metrics."""
    data, modes, headline = sets["test"], all_modes(scores, cfg), headline_mode(scores, cfg)
    found = evaluate(net, data, cfg, device, rank, world, modes, scores)
    if rank:
        return None
    plain, out = found["plain"]["plain"], Path(cfg.out)
    if all(rate is None for rate in plain["iou"]):
        raise UserError(f"no pixel of the {cfg.test_split} split is labelled, so there is nothing to score: check "
                        "its masks, or choose another --test-split.")
    metrics = dict(
        miou={mode: {path: score["miou"] for path, score in paths.items()} for mode, paths in found.items()},
        iou={mode: {path: dict(zip(data.classes, score["iou"])) for path, score in paths.items()}
             for mode, paths in found.items()},
        macc=plain["macc"], pixel_acc=plain["pixel_acc"], absent=[data.classes[c] for c in plain["absent"]],
        headline=headline, iterations_until_bank_full=progress["full_at"], phases=progress["phases"],
        class_map=None if scores is None else scores_quality(scores, data, net.occurs), split=cfg.test_split,
        preset=cfg.preset, method=cfg.method, augment=cfg.augment, reading=cfg.reading, seed=cfg.seed,
        evaluated={name: getattr(cfg, name) for name in run.EVALUATION if hasattr(cfg, name)},
        finished=progress["iteration"] >= cfg.iterations, iterations=progress["iteration"],
        seconds=round(progress["seconds"], 1), device=device.type, processes=world,
        parameters=sum(p.numel() for p in net.parameters()))
    run.write_json(out / "metrics.json", metrics)
    print(summary(metrics, cfg), flush=True)
    draw_figures(net, cfg, sets, scores, baseline, progress, device)
    return metrics


def summary(metrics, cfg):
    """What a run ends with, in words; filters that give the same share a line."""
    lines, filters = [f"{cfg.test_split} mIoU: plain {metrics['miou']['plain']['plain']:.1f}"], {}
    for mode, rates in metrics["miou"].items():
        text = ", ".join(f"{path} {rate:.1f}" for path, rate in rates.items())
        if mode.startswith("filter_"):
            filters.setdefault(text, []).append(mode.removeprefix("filter_"))
    for text, thresholds in filters.items():
        lines.append(f"  classes with more than {' or '.join(thresholds)} predicted pixels: {text}")
    for mode, words in (("scores", "classes from --class-scores"),
                        ("classifier", "classes from the trained classifier"),
                        ("oracle", "TRUE CLASSES GIVEN (oracle: an upper bound, not a result)")):
        if mode in metrics["miou"]:
            quality = "" if mode == "oracle" else f" (mAP {metrics['class_map']:.1f})"
            rates = ", ".join(f"{path} {rate:.1f}" for path, rate in metrics["miou"][mode].items())
            lines.append(f"  {words}{quality}: {rates}")
    if cfg.method == "pfa" and cfg.augment != "local" and metrics["iterations_until_bank_full"] is None:
        lines.append("  the memory never filled in time, so that no global prediction was trained: train longer, or "
                     "lower --warmup or --slots")
    return "\n".join(lines) + f"\nsee {cfg.out}/metrics.json and {cfg.out}/figures"


# ---- figures -------------------------------------------------------------------------------------------------

WIDTH = 400                                                          # pixels of a picture in a figure, at most


def load_network(cfg, device, classes=None):
    """The run in cfg.out in eval mode, and its progress. UserError if it does not know these classes."""
    path = Path(cfg.out) / "last.pt"
    progress = run.read_checkpoint(path)["progress"]
    if "full_at" not in progress:
        raise UserError(f"{path} is not a checkpoint of this script: pass the --out of one of its runs.")
    if classes is not None:
        check_classes(progress["classes"], classes, cfg.out)
    if progress["iteration"] < cfg.iterations:
        print(f"note: the run in {cfg.out} is not finished: iteration {progress['iteration']} of {cfg.iterations}")
    net = build_model(cfg, len(progress["classes"])).to(device, memory_format=torch.channels_last)
    return net.eval(), run.load_checkpoint(path, dict(model=net), device)


def check_classes(known, classes, out):
    """UserError if the run in the folder `out` knows other classes than the data have."""
    if known != classes:
        c = next((c for c, (a, b) in enumerate(zip(known, classes)) if a != b), min(len(known), len(classes)))
        theirs, ours = (names[c] if c < len(names) else "none" for names in (known, classes))
        raise UserError(f"the run in {out} knows {len(known)} classes, but the data have {len(classes)}; class {c} is "
                        f"{theirs} there and {ours} here: pass the --data of that run, or another run.")


def load_baseline(cfg, device, classes):
    """--baseline RUN -> (net, its config), or None."""
    if not cfg.baseline:
        return None
    its_cfg = replace(run.read_config(Config, cfg.baseline), out=cfg.baseline)
    return load_network(its_cfg, device, classes)[0], its_cfg


def network_input(image, size, device):
    """uint8 (3,H,W) -> (1,3,h,w), short side `size` or 0 = as it is."""
    x = transforms.normalise(transforms.resize_to_short_side(image, size))[None]
    return x.to(device, memory_format=torch.channels_last)


def see_image(net, image, cfg, device):
    """uint8 (3,H,W) -> Seen."""
    return see(net, network_input(image, cfg.test_size, device), image.shape[1:], cfg)


def thumbnail(image):
    """uint8 (3,H,W), at most WIDTH wide: a figure shows no more."""
    height = round(WIDTH * image.shape[1] / image.shape[2])
    return image if image.shape[2] <= WIDTH else resize(image, [height, WIDTH])


def in_colours(image, ids):
    """Class colours over the image, for a figure."""
    return thumbnail(figures.overlay(image, ids.to(torch.uint8).cpu()))


def widened(scribbles):
    """uint8 (H,W) -> the same with strokes a pixel wider on all sides, so that they are still seen in a thumbnail."""
    near = -F.max_pool2d(-scribbles.float()[None, None], 3, 1, 1)    # 255 where no stroke is near
    return near[0, 0].to(torch.uint8)


def with_strokes(image, scribbles):
    """Image with its strokes, for a figure."""
    return thumbnail(figures.overlay(image, widened(scribbles), opacity=1.0))


def save_examples(path, data, cells_of, title, count=5):
    """A row of pictures for `count` images, evenly spaced. cells_of(image, label) -> {caption: ids (H,W)}."""
    rows, shown = [], set()
    for i in sorted({round(k * (len(data) - 1) / max(1, count - 1)) for k in range(count)}):
        image, label = data.read(i)
        cells = cells_of(i, image, label)
        rows.append([(thumbnail(image), data.name_of(i))]
                    + [(in_colours(image, ids), text) for text, ids in cells.items()])
        shown |= {c for ids in cells.values() for c in ids.unique().tolist()} - {255}
    figures.save_grid(path, rows, title=title, legend={c: data.classes[c] for c in sorted(shown)})


def draw_figures(net, cfg, sets, scores, baseline, progress, device):
    """All figures of a run; the README says what each shows."""
    net.eval()
    folder = Path(cfg.out) / "figures"
    draw_colours(sets["test"].classes, folder)
    draw_examples(net, cfg, sets["test"], scores, baseline, device, folder)
    draw_training(net, cfg, sets["train"], baseline, device, folder)
    draw_log(progress["log"], cfg, folder)
    if paths_of(net):
        draw_confidence(net, cfg, sets["train"], device, folder)
        draw_attention(net, cfg, sets["test"], device, folder)


def draw_colours(classes, folder):
    """colours.png: what to paint the strokes of --draw with."""
    colours = figures.palette(len(classes)).tolist()
    entries = [(rgb, f"{c} {name}: {', '.join(map(str, rgb))}") for c, (rgb, name) in enumerate(zip(colours, classes))]
    title = figures.text_piece("Colours of the classes (red, green, blue)", 700, 18)
    figures.save_stack(folder / "colours.png", [title, figures.legend_piece(entries, 700)])


def draw_examples(net, cfg, data, scores, baseline, device, folder):
    """examples.png (Fig. 4, 9, 10): test images, predictions of every branch, true classes given, label."""
    paths, headline = paths_of(net), headline_mode(scores, cfg)
    whose = {"scores": "classes of the scores", "classifier": "classes of the classifier"}

    def cells_of(i, image, label):
        seen = see_image(net, image, cfg, device)
        sets = class_sets(seen.plain, data.num_classes, [headline, "oracle"], label.long().to(device),
                          scores[data.name_of(i)] if scores else None, cfg.score_threshold)
        cells = {}
        if baseline:
            cells[f"baseline ({baseline[1].method})"] = see_image(baseline[0], image, baseline[1], device).plain
        cells["plain"] = seen.plain
        for path, ids in augmented_ids(net, seen, sets[headline], paths, cfg).items():
            cells[f"{path}, {whose.get(headline, f'classes > {cfg.filter} pixels')}"] = ids
        for path, ids in augmented_ids(net, seen, sets["oracle"], paths[-1:], cfg).items():
            cells[f"{path}, true classes given"] = ids
        return cells | {"label": label}
    save_examples(folder / "examples.png", data, cells_of, f"{data.split} images")


def draw_training(net, cfg, data, baseline, device, folder):
    """training.png (Fig. 4): strokes of training images, what becomes of them, and the full label if there is one."""
    try:
        full = open_full(cfg, cfg.train_split)
    except UserError:                                                # strokes are all there is
        full = None

    def cells_of(i, image, scribbles):
        seen = see_image(net, image, cfg, device)
        present = classes_in(scribbles[None].long(), data.num_classes)[0].to(device)
        cells = {"what is labelled": scribbles if cfg.method == "full" else widened(scribbles)}
        if baseline:
            cells[f"baseline ({baseline[1].method})"] = see_image(baseline[0], image, baseline[1], device).plain
        cells |= {"plain": seen.plain} | augmented_ids(net, seen, present, paths_of(net), cfg)
        return cells | ({"label": full.read_mask(i)} if full else {})
    save_examples(folder / "training.png", data, cells_of,
                  "training images; augmented with the classes of the strokes")


def draw_log(log, cfg, folder):
    """miou.png: val mIoU of the predictions over the training."""
    series = {name[4:]: [row[name] for row in log] for name in ("val_plain", "val_local", "val_global")
              if any(row[name] is not None for row in log)}
    if log:
        figures.save_bars(folder / "miou.png", series, [f"{row['iteration']} {row['phase']}" for row in log],
                          title=f"{cfg.val_split} mIoU by iteration and phase; classes by the filter")


def some_classes(present, most):
    """Ids of a few classes present (N,) bool: the background and the last ones."""
    ids = present.nonzero()[:, 0].tolist()
    return ids[:1] + ids[1:][-(most - 1):]


@torch.inference_mode()
def draw_confidence(net, cfg, data, device, folder, count=4):
    """confidence.png: of classes with a stroke, how sure each pixel is, and the K pixels of the local prototype."""
    rows = []
    for i in range(0, len(data), max(1, len(data) // count))[:count]:
        image, scribbles = data.read(i)
        seen = see_image(net, image, cfg, device)
        present = classes_in(scribbles[None].long(), data.num_classes).to(device)
        p = confidence(seen.logits, present, cfg.confidence)[0].cpu()                    # (N,h,w)
        K = max(1, int(cfg.top_fraction * p[0].numel()))
        cells = [(with_strokes(image, scribbles), f"{data.name_of(i)}: strokes")]
        for c in some_classes(present[0], 4):
            surest = torch.full(p[0].shape, 255, dtype=torch.uint8)
            surest.view(-1)[p[c].flatten().topk(K).indices] = c
            surest = F.interpolate(surest[None, None].float(), image.shape[1:])[0, 0]
            cells += [(figures.heatmap(thumbnail(image), p[c], vmin=0, vmax=1), f"{data.classes[c]}: confidence"),
                      (in_colours(image, surest), f"its {K} surest pixels")]
        rows.append(cells)
    figures.save_grid(folder / "confidence.png", rows, cell=200,
                      title="Confidence, and the pixels that form the local prototype (Eq. 1 to 3)")


@torch.inference_mode()
def draw_attention(net, cfg, data, device, folder, count=4):
    """attention.png, attention_matrix.png: how pixels attend to the prototypes of their image's classes, Eq. (6)."""
    path, rows, matrix = paths_of(net)[-1], [], None
    for i in range(0, len(data), max(1, len(data) // count))[:count]:
        image, label = data.read(i)
        seen = see_image(net, image, cfg, device)
        present = classes_in(label[None].long(), data.num_classes)[0].to(device)
        keys, mask = keys_of(net, path, seen, present, cfg)
        e_f, e_fp = net.augmenter.embed(seen.features)[1], net.augmenter.project_prototype(keys)
        omega = net.augmenter.attention(e_f, e_fp, mask)[0].cpu()    # (hw,M)
        h, w = seen.features.shape[2:]
        of_class = omega.T.unflatten(0, (data.num_classes, -1)).sum(1).unflatten(1, (h, w))         # (N,h,w)
        rows.append([(thumbnail(image), data.name_of(i))] + [
            (figures.heatmap(thumbnail(image), of_class[c], vmin=0, vmax=1), f"to {data.classes[c]}")
            for c in some_classes(present, 5)])
        small = F.interpolate(label[None, None].float(), (h, w), mode="nearest-exact").flatten()    # (hw,)
        there = [c for c in range(data.num_classes) if (small == c).any()]
        if there:
            matrix = torch.stack([omega[small == c].mean(0) for c in there])[:, mask[0].cpu()], there, mask[0]
    figures.save_grid(folder / "attention.png", rows, cell=200, title=f"Attention of every pixel to the {path} "
                      "prototypes of the true classes (Eq. 6; sums to 1 over the classes)")
    if matrix:
        values, there, mask = matrix
        slots = len(mask) // data.num_classes
        names = [data.classes[k // slots] + f" {k % slots + 1}" * (slots > 1) for k in mask.nonzero()[:, 0].tolist()]
        figures.save_matrix(folder / "attention_matrix.png", values, [data.classes[c] for c in there], names, vmin=0,
                            vmax=1, title=f"Mean attention of a class's pixels (rows) to the {path} prototypes")


# ---- use a trained run ---------------------------------------------------------------------------------------

def evaluate_run(cfg, device, rank, world):
    """--eval-only: the run in OUT on --test-split, into metrics.json and figures/ again."""
    sets = open_sets(cfg)
    scores = scores_of_file(cfg, sets["test"])
    net, progress = load_network(cfg, device, sets["test"].classes)
    baseline = load_baseline(cfg, device, sets["test"].classes)
    if scores is None and cfg.train_classifier and cfg.method == "pfa":
        scores = scores_of_classifier(cfg, sets, device, rank, world)
    return report(net, cfg, sets, scores, baseline, progress, device, rank, world)


def load_classifier(cfg, num_classes, device):
    """The classifier that --train-classifier left in cfg.out."""
    path = Path(cfg.out) / "classifier.pt"
    if not path.exists():
        raise UserError(f"--infer classifier: {cfg.out} has no classifier.pt; make one with --eval-only "
                        "--train-classifier, or choose another --infer.")
    net = build_classifier(cfg, num_classes).to(device, memory_format=torch.channels_last)
    done = run.load_checkpoint(path, dict(model=net), device)["iteration"]
    if done < cfg.classifier_iterations:
        print(f"note: the classifier in {path} is not finished: iteration {done} of {cfg.classifier_iterations}")
    return net.eval()


def read_large_enough(file):
    """An image of the user's, uint8 (3,H,W). UserError below 32 pixels a side, which is too small for a network."""
    image = files.read_image(file)
    if min(image.shape[1:]) < 32:
        raise UserError(f"{file} is {image.shape[2]} x {image.shape[1]} pixels, but 32 a side are needed: enlarge it.")
    return image


def predict(cfg, device):
    """--predict: for every image OUT/predictions/NAME.png (class ids, palette) and NAME_overlay.png."""
    net, progress = load_network(cfg, device)
    classes, folder, path = progress["classes"], Path(cfg.out) / "predictions", (paths_of(net) or ["plain"])[-1]
    N = len(classes)
    paths = files.list_images(cfg.predict)
    mode = f"filter_{cfg.filter}" if cfg.infer == "filter" else cfg.infer
    if mode != "plain" and path == "plain":
        raise UserError(f"--infer {cfg.infer}: the run in {cfg.out} has no prototypes; use --infer plain.")
    classifier = load_classifier(cfg, N, device) if mode == "classifier" else None
    scores = read_scores(cfg.class_scores, [file.stem for file in paths], N) if mode == "scores" else {}
    print(f"{path} prediction, classes by the {cfg.infer}" if mode != "plain" else "plain prediction"
          + "; --infer filter, classifier or scores augments it" * (path != "plain"))
    for file in tqdm(paths, desc="predict", disable=None):
        image = read_large_enough(file)
        seen = see_image(net, image, cfg, device)
        ids = seen.plain
        if mode != "plain":
            row = classify(classifier, image, cfg, device) if classifier else scores.get(file.stem)
            present = class_sets(seen.plain, N, [mode], scores=row, threshold=cfg.score_threshold)[mode]
            ids = augmented_ids(net, seen, present, [path], cfg)[path]
        figures.save_prediction(folder, file.stem, image, ids.to(torch.uint8).cpu())
        share = 100 * torch.bincount(ids.flatten(), minlength=N) / ids.numel()
        top = [f"{classes[c]} {share[c]:.0f} %" for c in share.topk(min(3, N)).indices if share[c] > 0]
        tqdm.write(f"{file}: {', '.join(top)} -> {folder / file.stem}_overlay.png")


def read_strokes(path, image, classes):
    """STROKES of --draw -> uint8 (H,W): class ids, 255 = none.

    An index PNG as data/README.md describes it, or a painting in the colours of figures.palette: on transparency, on
    white, or on the image (3,H,W) uint8 itself, whose unchanged pixels are no strokes. A painted pixel has the class
    whose colour is at most 40 away in each of R, G and B. UserError: other size, nothing labelled.
    """
    picture = files.load_picture(path)
    if (picture.width, picture.height) != (image.shape[2], image.shape[1]):
        raise UserError(f"--draw: the image is {image.shape[2]} x {image.shape[1]} pixels, but its strokes {path} "
                        f"are {picture.width} x {picture.height}: both must have the same size.")
    if len(picture.getbands()) == 1:
        ids = files.read_index_map(path, len(classes))
    else:
        painted = torch.from_numpy(np.array(picture.convert("RGBA"))).permute(2, 0, 1)   # (4,H,W)
        changed = (painted[3] > 127) & (painted[:3] != image).any(0) # (H,W)
        r, g, b = painted[:3, changed].int()
        rgb, which = (r * 65536 + g * 256 + b).unique(return_inverse=True)               # few colours, many pixels
        rgb = torch.stack([rgb // 65536, rgb // 256 % 256, rgb % 256], 1)                # (U,3)
        nearest, c = (rgb[:, None] - figures.palette(len(classes)).int()).abs().amax(2).min(1)      # (U,)
        ids = torch.full(changed.shape, 255, dtype=torch.uint8)
        ids[changed] = torch.where(nearest <= 40, c, 255).to(torch.uint8)[which]
    if (ids == 255).all():
        raise UserError(f"--draw: {path} has no stroke: it must hold class ids along strokes and 255 elsewhere, or "
                        "strokes painted in the colours of figures/colours.png.")
    return ids


def adapt(net, x, scribbles, paths, cfg):
    """Train net, in place, for cfg.draw_steps steps on the strokes of one image and its mirror image. Ours.

    x (1,3,h,w), scribbles (1,H,W) int64, 255 = no stroke. The loss is L_pce of the plain and of the augmented
    prediction. Batch norm, dropout and memory stay as in evaluation.
    """
    backbone = list(net.network.backbone.parameters())
    rest = [p for name, p in net.named_parameters() if not name.startswith("network.backbone.")]
    optimizer = torch.optim.AdamW([dict(params=backbone, lr=cfg.draw_lr / 10), dict(params=rest, lr=cfg.draw_lr)],
                                  weight_decay=cfg.weight_decay)
    H, W = scribbles.shape[1:]
    _, row, column = (scribbles != 255).nonzero().T
    place = torch.stack([2 * column / max(1, W - 1) - 1, 2 * row / max(1, H - 1) - 1], 1).float()[None, None]
    present = classes_in(scribbles, len(net.occurs))[0]
    for step in tqdm(range(cfg.draw_steps), desc="draw", leave=False, disable=None):
        flip = step % 2
        with run.autocast(x.device, cfg.amp):
            features, logits = net(x.flip(-1) if flip else x)
            predictions = [logits]
            for path in paths:
                keys = keys_of(net, path, Seen(features.detach(), logits.detach(), None), present, cfg)
                keys = [tensor.clone() for tensor in keys]           # made in inference mode
                predictions += net.augmented(features, **{path: keys}).values()
        loss = 0.0
        for maps in predictions:                                     # L_pce without a map of the photo's size
            maps = maps.float().flip(-1) if flip else maps.float()
            loss = loss + F.cross_entropy(F.grid_sample(maps, place, align_corners=True)[0, :, 0].T,
                                          scribbles[0, row, column])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def draw(cfg, device):
    """--draw IMAGE STROKES: the run adapted to this image's strokes; OUT/drawings/NAME*.png. It is not changed."""
    net, progress = load_network(cfg, device)
    classes, paths, file = progress["classes"], paths_of(net)[-1:], Path(cfg.draw[0])
    image = read_large_enough(file)
    scribbles = read_strokes(cfg.draw[1], image, classes)
    if not (scribbles == 0).any():
        print(f"note: no stroke of {classes[0]}; a few help to tell where the others end")
    labels = scribbles[None].long().to(device)
    present = classes_in(labels, len(classes))[0]
    factor = min(1, cfg.crop / min(image.shape[1:]))
    x = network_input(resize(image, [round(side * factor) for side in image.shape[1:]]), 0, device)
    before = see(net, x, image.shape[1:], cfg).plain
    adapt(net, x, labels, paths, cfg)
    seen = see(net, x, image.shape[1:], cfg)
    found = {"after, plain": seen.plain} | {f"after, {path}, classes of the strokes": ids for path, ids in
                                            augmented_ids(net, seen, present, paths, cfg).items()}
    after, folder = list(found.values())[-1], Path(cfg.out) / "drawings"
    figures.save_prediction(folder, file.stem, image, after.to(torch.uint8).cpu())
    shown = {c for ids in (scribbles, before, *found.values()) for c in ids.unique().tolist()} - {255}
    figures.save_grid(folder / f"{file.stem}_before_after.png", [
        [(with_strokes(image, scribbles), "strokes"), (in_colours(image, before), "before"),
         *((in_colours(image, ids), text) for text, ids in found.items())]],
        legend={c: classes[c] for c in sorted(shown)})
    drawn = scribbles != 255
    right = [100 * (ids.cpu()[drawn] == scribbles[drawn]).float().mean().item() for ids in (before, after)]
    print(f"{right[0]:.0f} % of the stroke pixels had their class before, {right[1]:.0f} % after {cfg.draw_steps} "
          f"steps; see {folder / file.stem}_before_after.png; ids in {folder / file.stem}.png")


# ---- tables and figures of the paper -------------------------------------------------------------------------

# Paper: VOC 2012 val. Name of the row -> (changed options, what the paper prints).
PFA_ROW = dict(method="pfa", augment="both", pce="moves")
TABLES = {
    2: {"baseline": (dict(method="pce"), (67.5, None, None)),        # mIoU basic, local, global
        "local": (dict(augment="local"), (75.7, 76.9, None)),
        "global": (dict(augment="global"), (76.0, None, 77.4)),
        "both, L_pce on local": (dict(pce="local"), (76.4, 77.7, 77.1)),
        "both": ({}, (76.8, 77.3, 77.9))},
    5: {"both": ({}, (77.9,))} | {                                   # mIoU
        f"lambda_l {w}": (dict(w_local=w, w_local_first=w), (rate,))
        for w, rate in ((0.005, 77.7), (0.02, 77.2), (0.05, 76.8))} | {
        f"lambda_g {w}": (dict(w_global=w), (rate,)) for w, rate in ((0.005, 77.4), (0.02, 77.6), (0.05, 77.1))},
}
TABLE_3 = {                                                          # parameters M, FLOPs G, mIoU full, scribble
    "DeepLabv2 ResNet-101": (R101 | dict(head="deeplabv2"), (43.6, 75.2, 77.7, 76.2)),
    "DeepLabv3+ ResNet-101": (R101 | dict(head="deeplabv3plus"), (60.8, 102.3, 80.2, 78.1)),
    "LTF ResNet-101": (None, (91.7, 138.4, 80.9, 78.2)),
    "SegFormer MiT-B1": (dict(backbone="mit_b1", head="mlp"), (13.6, 19.4, 79.2, 77.9)),
    "SegFormer MiT-B3": (dict(backbone="mit_b3", head="mlp"), (44.6, 44.5, 81.9, 79.8)),
    "SegFormer MiT-B5": (dict(backbone="mit_b5", head="mlp"), (82.0, 72.9, 83.9, 81.5)),
}
TABLE_4 = {"oracle": 80.4, "plain": 76.8, "classifier": 77.9, "scores": 77.9, "filter_0": 74.1, "filter_100": 75.2,
           "filter_500": 75.7, "filter_1000": 74.3}                  # mIoU; the classifier's is Q2L's, mAP 96.6
FIGURES = {                                                          # the paper plots no numbers; the ratios are ours
    5: {f"n = {n}": (dict(augment="global", slots=n), ()) for n in (1, 2, 5, 10)},
    6: {f"{p} %": (dict(augment="local", top_fraction=p / 100), ()) for p in (1, 2, 4, 8, 16, 32)},
    8: {f"{kind} {ratio:g}, {path}": ({"augment": path, f"scribble_{kind}": ratio}, ()) for path in ("local", "global")
        for kind, ratios in (("drop", (0.0, 0.25, 0.5, 0.75)), ("shrink", (0.25, 0.5, 0.75, 1.0)))
        for ratio in ratios},
}
TITLES = {5: "Fig. 5: global prototypes of a class", 6: "Fig. 6: share of pixels that make a prototype",
          8: "Fig. 8: strokes dropped and shrunk"}
PRINTED = {2: ("paper basic", "paper local", "paper global"), 5: ("paper",)}


def row_config(cfg, changes):
    """Config of a row, a run in OUT/rows/NAME; the name tells what differs, so that tables share rows."""
    base = replace(cfg, table=0, figure=0, **PFA_ROW)
    different = [f"{name}-{value}" for name, value in changes.items()
                 if name != "weights" and value != getattr(base, name)]
    return replace(base, **changes, out=str(Path(cfg.out) / "rows" / ("_".join(different) or "pfa")))


def trained_row(cfg, name, changes, device, rank, world):
    """Metrics of one row; a finished run is kept."""
    row_cfg = row_config(cfg, changes)
    check_config(row_cfg)
    if rank == 0:
        print(f"row {name} in {row_cfg.out}", flush=True)
    return run.finished_row(train, row_cfg, device, rank, world)


def rates_of(m):
    """plain, local, global of the headline mode, then local, global with the true classes given; None: not there."""
    own, oracle = m["miou"].get(m["headline"], {}), m["miou"].get("oracle", {})
    augmented = [rates.get(path) for rates in (own, oracle) for path in ("local", "global")]
    return [m["miou"]["plain"]["plain"], *augmented]


def best_rate(m):
    """mIoU of the last prediction that a run has without true classes: global, else local, else plain."""
    return [rate for rate in rates_of(m)[:3] if rate is not None][-1]


def markdown(columns, rows):
    """A table; numbers with one decimal, None as "-"."""
    cells = [["-" if x is None else f"{x:.1f}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *cells])


def run_table(cfg, device, rank, world):
    """--table, --figure: every row as a run in OUT/rows/, then OUT/tableN.md or OUT/figureN.md and .png."""
    if cfg.table in (3, 4):
        found, text = (table_3 if cfg.table == 3 else table_4)(cfg, device, rank, world)
    else:
        rows = TABLES[cfg.table] if cfg.table else FIGURES[cfg.figure]
        found = {name: trained_row(cfg, name, changes, device, rank, world) for name, (changes, _) in rows.items()}
        whose = sorted({m["headline"] for m in found.values() if m["method"] == "pfa"})
        text = markdown(["row", "plain", "local", "global", "local, true classes", "global, true classes",
                         *PRINTED.get(cfg.table, ())],
                        [[name, *rates_of(m), *rows[name][1]] for name, m in found.items()])
        text += f"\n\nClasses for local and global: {', '.join(whose)}."
        if rank == 0 and cfg.table == 2:
            draw_components(cfg, device)
        if rank == 0 and cfg.figure:
            draw_curve(cfg, found)
    if rank == 0:
        about = (f"Preset {cfg.preset}, {cfg.iterations} iterations, seed {cfg.seed}, {cfg.test_split} split, "
                 f"{device.type}. Paper: VOC 2012 val" + ("; it plots no numbers." if cfg.figure else "."))
        name = f"table{cfg.table}" if cfg.table else f"figure{cfg.figure}"
        with run.replacing(Path(cfg.out) / f"{name}.md") as file:
            file.write(f"{about}\n\n{text}\n")
        print(f"\n{about}\n\n{text}\nwritten to {cfg.out}/{name}.md")
    return found


def draw_curve(cfg, found):
    """OUT/figureN.png: mIoU of the augmented prediction, and in Fig. 5 and 6 of the plain one."""
    values = {name: best_rate(m) for name, m in found.items()}
    names, series = list(values), {"plain": [m["miou"]["plain"]["plain"] for m in found.values()],
                                   "augmented": list(values.values())}
    if cfg.figure == 8:
        names = [name.removesuffix(", local") for name in values if name.endswith("local")]
        series = {path: [values[f"{name}, {path}"] for name in names] for path in ("local", "global")}
    figures.save_bars(Path(cfg.out) / f"figure{cfg.figure}.png", series, names, title=TITLES[cfg.figure])


def draw_components(cfg, device):
    """OUT/components.png (Fig. 4, 11): test images, the last prediction of the rows of Table 2, label."""
    data, runs, mode = open_full(cfg, cfg.test_split), {}, f"filter_{cfg.filter}"
    for name in ("baseline", "local", "global", "both"):
        row_cfg = row_config(cfg, TABLES[2][name][0])
        runs[name] = load_network(row_cfg, device, data.classes)[0], row_cfg

    def cells_of(i, image, label):
        cells = {}
        for name, (net, row_cfg) in runs.items():
            seen, paths = see_image(net, image, row_cfg, device), paths_of(net)[-1:]
            present = class_sets(seen.plain, data.num_classes, [mode])[mode]
            found = augmented_ids(net, seen, present, paths, row_cfg)
            cells[f"{name}: {(paths or ['plain'])[0]} prediction"] = found[paths[0]] if paths else seen.plain
        return cells | {"label": label}
    save_examples(Path(cfg.out) / "components.png", data, cells_of,
                  f"Components (Fig. 4, 11); classes with more than {cfg.filter} predicted pixels")


def table_3(cfg, device, rank, world):
    """Backbones -> metrics of the rows, Markdown."""
    options = {name: changes and changes | dict(weights=weights_of(cfg, changes["backbone"]))
               for name, (changes, _) in TABLE_3.items()}
    for changes in filter(None, options.values()):                   # missing weights are told before days of training
        if changes["weights"] != "none":
            locate_weights(changes["weights"], changes["backbone"])
    found, rows = {}, []
    for name, changes in options.items():
        cells = ["not run: no design of F is known", None, None, None]
        if changes is not None:
            full, own = (trained_row(cfg, f"{name} {method}", changes | dict(method=method), device, rank, world)
                         for method in ("full", "pfa"))
            found[name] = dict(full=full, scribble=own)
            parameters, gmacs = cost(replace(cfg, method="pce", **changes), len(own["iou"]["plain"]["plain"]))
            cells = [parameters / 1e6, gmacs, full["miou"]["plain"]["plain"], best_rate(own)]
        rows.append([name, *cells, *TABLE_3[name][1]])
    columns = ["row", "M parameters", "G multiply-adds at 512", "full", "scribble", "paper M", "paper G", "paper full",
               "paper scribble"]
    return found, markdown(columns, rows) + ("\n\nParameters and multiply-adds as the paper counts them: without "
                                             "augmenter and attention products. scribble: global prediction.")


def weights_of(cfg, backbone):
    """--weights of a row of Table 3: FOLDER/BACKBONE.pth if it is a folder and has that file."""
    if cfg.weights in ("none", "imagenet") or not Path(cfg.weights).is_dir():
        return cfg.weights
    path = Path(cfg.weights) / f"{backbone}.pth"
    return str(path) if path.exists() or backbone.startswith("mit") else "imagenet"


def cost(cfg, num_classes, size=512):
    """Parameters, and 1e9 multiply-adds of a size x size image as Table 3 counts them.

    That is without attention products, and with the all-MLP decoder in its printed order (project, enlarge,
    concatenate, fuse). Ours fuses before it enlarges and needs 4.2e9 fewer for MiT-B1.
    """
    with torch.device("meta"), torch.no_grad():
        net = build_model(cfg, num_classes).eval()
        levels, count = counted(net.network.backbone, torch.empty(1, 3, size, size))
        E, cells = net.network.channels, [level[0, 0].numel() for level in levels]
        if cfg.head == "mlp":
            count += sum(level.shape[1] * E * n for level, n in zip(levels, cells)) + 4 * E * E * cells[0]
            features = torch.empty(1, E, *levels[0].shape[2:])
        else:
            features, more = counted(net.network.head, levels)
            count += more
        count += counted(net.classifier, features)[1]
    return sum(p.numel() for p in net.parameters()), count / 1e9


def counted(module, x):
    """module(x), and its multiply-adds without attention products (bmm on the meta device)."""
    with FlopCounterMode(display=False) as counter:
        y = module(x)
    flops = counter.get_flop_counts()["Global"]
    return y, sum(n for op, n in flops.items() if "attention" not in str(op) and "bmm" not in str(op)) / 2


def table_4(cfg, device, rank, world):
    """Whose classes? -> metrics of the one run, Markdown."""
    m = trained_row(cfg, "both", {}, device, rank, world)
    rows = [[mode + " (true classes given)" * (mode == "oracle"), m["class_map"] if mode in ("scores", "classifier")
             else None, *(rates.get(path) for path in ("plain", "local", "global")), TABLE_4.get(mode)]
            for mode, rates in m["miou"].items()]
    return m, markdown(["classes from", "mAP", "plain", "local", "global", "paper"], rows) + (
        "\n\nPaper: global prediction; beside classifier and scores stands Q2L (mAP 96.6), MCAR (94.3) has 76.2.")


def main(cfg):
    """Returns what the task returns, for use from Python."""
    check_config(cfg)
    device, rank, world = run.setup(cfg.device, cfg.seed)
    torch.backends.cudnn.benchmark = False                           # train() turns it on for its crops
    if cfg.table or cfg.figure:
        return run_table(cfg, device, rank, world)
    if cfg.eval_only:
        return evaluate_run(cfg, device, rank, world)
    if cfg.predict or cfg.draw:
        return None if rank else predict(cfg, device) if cfg.predict else draw(cfg, device)
    return train(cfg, device, rank, world)


if __name__ == "__main__":                                           # guard: worker processes import this file
    run.run_script(main, Config, PRESETS, __doc__)
