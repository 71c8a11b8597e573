"""PFA: segmentation learned from scribbles, with prototypes that augment the features, in one file.

Paper  G. Chan, P. Zhang, H. Dong, S. Ji, B. Chen, "Scribble-Supervised Semantic Segmentation with
       Prototype-based Feature Augmentation", ICML 2024. "Released code" is github.com/TranquilChan/PFA.
Idea   Strokes label a few percent of the pixels. Where the network is already sure of a class, the mean of
       its features is a prototype of that class: one per image (local), and a few per class remembered over
       the whole training (global). Every pixel then attends to the prototypes of the classes in its image,
       which pulls the unsure pixels towards the right class.
Ours   Table 4 tells the augmenter which classes are in a test image, and has no row that tells the plain
       prediction the same. This control is plain_restricted: the plain logits of all other classes at minus
       infinity. What prototypes add is what local and global gain over it, not over plain (see README).

Try    python pfa_scribble.py                              # toy scenes with strokes, two minutes on a CPU
Train  python pfa_scribble.py --preset voc-b1 --data VOC2012 --weights mit_b1.pth --train-classifier
       torchrun --nproc-per-node 2 pfa_scribble.py --preset voc-b3 --data VOC2012 --weights mit_b3.pth
       python pfa_scribble.py --method pce                 # strokes alone; --method full: upper bound
Look   python pfa_scribble.py --draw photo.png strokes.png --out runs/pfa_scribble-toy
       python pfa_scribble.py --table 2                    # what each part adds

symbol    here                    shape    meaning                                             paper
F         features                B,C,h,w  decoder's map before the classifier                 Sec. 3.1, A.1
p         confidence()            B,N,h,w  initial prediction: how sure of each class          Sec. 3.2.2
c_t, v_t  in extract_prototypes() B,N,K    confidences of the K surest pixels; v_t: their f    Eq. (1), (2)
fp_t      extract_prototypes()    B,N,C    local prototypes, one of every class in an image    Eq. (3)
fp_global memory.bank             N,n,C    global prototypes, n for every class                Sec. 3.2.3
alpha     memory.momentum         scalar   how slowly a full slot moves                        Eq. (5)
e_f       project_feature         B,hw,D   pixels in the embedding space                       Sec. 3.3.1
e_fp      project_prototype       B,M,D    M prototypes (keys) in the embedding space          Sec. 3.3.1
omega     attention()             B,hw,M   attention of a pixel over the keys                  Eq. (6)
e_f*      fuse                    B,hw,D   pixel and what it attends to, mixed                 Eq. (7)
f_aug     FeatureAugmenter        B,C,h,w  augmented features; the same classifier follows     Eq. (8)
L_pce     partial_cross_entropy() scalar   cross-entropy on labelled pixels                    Eq. (9)
L_con     consistency_loss()      scalar   initial and augmented prediction agree              Eq. (10)
lambda    w_local, w_global       scalar   weights of L_con-l and L_con-g                      Sec. 3.4

Phases: warmup (no prototypes), local (those of the image; the memory fills up), global (both kinds). B
images, N classes; class 0, the background, is taken to be in every image. An iteration: one optimizer step.

Where the print is silent, contradicts itself, or differs from the released code ([D*] marks the line).
--reading official takes the code's side in D1, D3, D8, D9, D11, D12; no setting is known to give the tables.
[D1] "Initial prediction values" (Eq. 1) are softmax probabilities here; in the code ReLU(logit), scaled to
     0..1 over the pixels of an image and class.
[D2] Eq. (4) prints selectmin; the text updates the most similar slot, and so do the code and we. No second
     norm. In Eq. (2) we read topk(f_t) as the features of the pixels that Eq. (1) chose.
[D3] Paper: K = 8 % of the pixels, n = 5, crop 512, batch 16, rate 3e-5, lambda_l = 0.01. Code: 1/12, 10,
     320, 12, 6e-5, and 0.02 while the memory fills.
[D4] The "merge" of global prototypes (Sec. 3.3.2) is not described; as in the code every slot is a key.
[D5] Eqs. (6), (7) write one "linear" for f and fp; the code has two, and one augmenter for both paths.
[D6] F follows SegFormer's dropout; prototypes are constants of one image (code; text: "within each batch").
[D7] Sec. 3.4 does not say which prediction L_pce looks at. As in Fig. 2 and the code: initial, then local,
     then global, never a sum. --pce local is the fourth row of Table 2, if we take its colours rightly.
[D8] L_con is "MSE" in the text and a cross-entropy in Eq. (10). We take Eq. (10), a mean over pixels and not
     a sum; both sides get gradient, as in the code. Code: softmax twice, the augmented one is the target.
[D9] "Classes of the current image": those with a stroke in the crop, so that no prototype is made of a class
     that cannot be seen; in the code, in the image. Both make one of the background even if there is none.
[D10] The memory is updated before it is used. It is full when every class that has a stroke in some training
     image has n prototypes: a class without any would prevent the last phase. Every 20th iteration asks.
[D11] Length, warm-up and milestones are not printed. From the code: 200 epochs (10,582 images), 30 of
     warm-up. Ours: the multi-step rate falls to a tenth after 60 % and 85 %; the code's falls linearly (once
     an epoch, ours every iteration). The "decay weight of 0.01" is AdamW's, as in the code.
[D12] The code freezes the backbone's LayerNorms; the paper does not say so.
[D13] Where F sits in ResNet-101 is not known. DeepLabv2: 256 channels before its four dilated convolutions,
     the classifier; 180 G multiply-adds at stride 8, 53 at 16, printed 75.2. DeepLabv3+: the map before the
     last 1x1 convolution. MiT: C = 256, stride 1 in the last patch embedding (code; Table 3's FLOPs agree).
[D14] Rotation, blur and flip happen with probability 1/2 each (code; the paper: all images "undergo" them).
     Fill and padding are void: L_pce leaves them out, L_con counts them (6 % of a toy crop; the code too).
     Logits are resized with aligned corners, as in the code.
[D15] Q2L and MCAR (Table 4) are replaced by --class-scores FILE, or by a classifier trained on the strokes'
     classes alone (--train-classifier). Filters ask for more than --filter pixels, at full resolution.
[D16] Validation: whole images, no true classes, last weights. Code: centre crop, true classes, best weights.
[D17] toy, small: recipes of ours for networks without MiT weights (chosen on toy's val split). On CUDA the
     networks run in bfloat16, prototypes, augmenter and losses in float32; the code knows float32 alone.
[D18] --wrong-classes, 0 in the paper: global keys are always true in training, and noisy at test.
[D19] Fig. 8: each stroke (not object or image) is dropped with the given probability, or loses its ends.
"""
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

from common import files, heads, pfa_figures, run, segmentation, speed, strokes, survey, tables
from common.backbones import GOES_WITH, build_network, check_sides, norm_parameters
from common.image_classifier import (ClassifierConfig, check_classifier, scorer, scores_of_classifier,
                                     scores_of_file, scores_quality)
from common.loaders import (ScribbleView, TestView, eval_loader, of_all_ranks, share_of_ranks, to_device,
                            train_loader)
from common.pfa_page import PAGE
from common.pfa_tables import (FIGURES, NETWORKS, PREDICTIONS, TABLES, USUAL_ROW, best_rate, in_words,
                               rows_by_mode)
from common.report import write_report
from common.run import RunConfig, UserError, opt
from common.scribble_sets import open_full, open_sets
from common.weights import weights_in


# ---- options and recipes ---------------------------------------------------------------------------------

@dataclass
class MethodConfig(RunConfig):
    """Options of the method. common/run.py has those of all scripts, and says what schedule, ... mark."""
    method: str = opt("pfa", "pce = partial cross-entropy alone (baseline); full = all pixels of the full "
                      "masks (upper bound)", choices=("pfa", "pce", "full"))
    augment: str = opt("both", "which prototypes augment (Table 2)", choices=("both", "local", "global"))
    reading: str = opt("paper", "official = the released code where it differs, [D*] at the top of the file",
                       choices=("paper", "official"))
    dataset: str = opt("voc_scribble", "reader of --data; voc needs --scribbles",
                       choices=("toy_scenes", "voc_scribble", "voc", "folder"))
    ignore: int = opt(None, "folder: value of unlabelled pixels in masks, besides 255 (data/README.md)",
                      at_least=0, at_most=255)
    scribbles: str = opt("", "folder of strokes (default: the data set's own, see data/README.md)")
    scribble_drop: float = opt(0.0, "share of the strokes left out (Fig. 8) [D19]", at_least=0, below=1)
    scribble_shrink: float = opt(0.0, "share cut off every stroke; 1 leaves dots", at_least=0, at_most=1)
    train_split: str = opt("trainaug", "split to train on, with its strokes")
    val_split: str = opt("val", "split to evaluate on during the training")
    test_split: str = opt("val", "split to evaluate on at the end, and by --eval-only", evaluation=True)
    backbone: str = opt("mit_b1", "network before the decoder; mobilenet_v2 for a laptop or a small GPU",
                        choices=tuple(dict.fromkeys(GOES_WITH["mlp"] + GOES_WITH["deeplabv2"])))
    head: str = opt("mlp", "decoder; mlp is SegFormer's", choices=("mlp", "deeplabv2", "deeplabv3plus"))
    head_channels: int = opt(256, "C, channels of the features and prototypes", above=0)
    weights: str = opt("imagenet", "the backbone's: a file or URL, imagenet (torchvision's) or none; with "
                       "--table 3 a folder with mit_b1.pth, mit_b3.pth, mit_b5.pth", source=True)
    freeze_norms: bool = opt(None, "the backbone's LayerNorms do not learn [D12] (default no; official yes)")
    crop: int = opt(None, "side of a training crop in pixels; lower it if memory runs out (default 512; "
                    "official 320)", at_least=32)
    scale_min: float = opt(0.5, "lowest random factor by which training images are resized", above=0)
    scale_max: float = opt(2.0, "highest random factor by which training images are resized", above=0)
    rotation: float = opt(10.0, "highest angle in degrees by which training images are turned", at_least=0)
    blur: bool = opt(True, "blur training images with probability 1/2")
    window: int = opt(0, segmentation.WINDOW + ". Local prototypes are of the whole image and augment every "
                      "window", at_least=0, evaluation=True)
    test_size: int = opt(0, "short side of test images; 0 = the image's own", at_least=0, evaluation=True)
    batch_size: int = opt(None, "images an iteration, over all GPUs; with fewer, lower --lr in proportion "
                          "(default 16; official 12)", above=0)
    iterations: int = opt(None, "length of the training [D11] (default 132400; official 176400; both 200 "
                          "epochs)", above=0, schedule=True)
    warmup: int = opt(None, "iterations without prototypes (default 19860; official 26460)", at_least=0,
                      schedule=True)
    lr: float = opt(None, "AdamW learning rate of the backbone (default 3e-5; official 6e-5)", above=0)
    head_lr: float = opt(10.0, "learning rate of all but the backbone, as a multiple of --lr", above=0)
    lr_policy: str = opt(None, "multistep = a tenth after 60 and 85 % of the iterations; linear = to 0 "
                         "(default multistep; official linear)", choices=("multistep", "linear"))
    weight_decay: float = opt(0.01, "weight decay of AdamW", at_least=0)
    slots: int = opt(None, "n, global prototypes of a class (default 5; official 10)", above=0)
    momentum: float = opt(0.99, "alpha of Eq. (5)", at_least=0, at_most=1)
    top_fraction: float = opt(None, "share of the pixels that make a prototype (default 0.08; official "
                              "1/12)", at_least=0, at_most=1)
    hidden: int = opt(128, "D, width of the augmenter's embedding space", above=0)
    confidence: str = opt(None, "form of p [D1] (default: --reading)", choices=("paper", "official"))
    consistency: str = opt(None, "form of L_con [D8] (default: --reading)",
                           choices=("paper", "official", "mse"))
    pce: str = opt("moves", "prediction under L_pce [D7]: moves = the phase's; local = local in the last "
                   "phase too; initial = always the initial one", choices=("moves", "local", "initial"))
    classes_of: str = opt(None, "a class is present if it has a stroke in the crop, or in the whole image "
                          "[D9] (default crop; official image)", choices=("crop", "image"))
    w_local: float = opt(0.01, "lambda_l, weight of L_con-l", at_least=0)
    w_local_first: float = opt(None, "lambda_l while the memory fills (default 0.01; official 0.02)",
                               at_least=0)
    w_global: float = opt(0.01, "lambda_g, weight of L_con-g", at_least=0)
    wrong_classes: float = opt(0.0, "while training, probability with which a class that is not in an image "
                               "lends it its global prototypes [D18]", at_least=0, at_most=1)
    filter: int = opt(500, "a class is told if more pixels than this (500: 0.27 % of a photo) are predicted "
                      "as it: log.csv, --infer filter; the report has more", at_least=0, evaluation=True)
    eval_every: int = opt(5000, "iterations between evaluations, rows of log.csv", above=0, schedule=True)
    save_every: int = opt(1000, "iterations between checkpoints: the most to be lost", above=0, runtime=True)
    baseline: str = opt("", "folder of another run (--method pce) for the figures", runtime=True)
    eval_only: bool = opt(False, "evaluate and draw the run in OUT again and stop", uses_run=True)
    predict: str = opt("", "image or folder: write ids and overlays to OUT/predictions, stop", uses_run=True)
    infer: str = opt("plain", "prototypes that --predict uses: plain = none; others as in Table 4",
                     choices=("plain", "filter", "classifier", "scores"), runtime=True)
    draw: list = opt((), "IMAGE STROKES: adapt the run in OUT to strokes (ids, or painted in the colours of "
                     "OUT/figures/colours.png), write OUT/drawings and stop", uses_run=True)
    draw_steps: int = opt(40, "training steps of --draw", above=0, runtime=True)
    draw_lr: float = opt(2e-4, "learning rate of --draw; the backbone's is a tenth", above=0, runtime=True)
    table: int = opt(0, "train and evaluate the rows of this table of the paper on the chosen preset",
                     runtime=True, choices=(0, 2, 3, 4, 5))
    figure: int = opt(0, "train and evaluate the rows of this figure: 5 = slots, 6 = share of pixels, "
                      "8 = weaker strokes", runtime=True, choices=(0, 5, 6, 8))


@dataclass
class Config(ClassifierConfig, MethodConfig):
    """All options; --help lists those of the classifier [D15] (common/image_classifier.py) last."""

    def __post_init__(self):
        """What was not given comes from the reading; check_options refuses one that does not exist."""
        for name, value in READINGS.get(self.reading, {}).items():
            if getattr(self, name) is None:
                setattr(self, name, value)


READINGS = {                                                             # [D3] [D11]
    "paper": dict(crop=512, batch_size=16, iterations=132400, warmup=19860, lr=3e-5, lr_policy="multistep",
                  slots=5, top_fraction=0.08, confidence="paper", consistency="paper", classes_of="crop",
                  w_local_first=0.01, freeze_norms=False),               # Sec. 4.2
    "official": dict(crop=320, batch_size=12, iterations=176400, warmup=26460, lr=6e-5, lr_policy="linear",
                     slots=10, top_fraction=1 / 12, confidence="official", consistency="official",
                     classes_of="image", w_local_first=0.02, freeze_norms=True),         # released code
}
R101 = dict(backbone="resnet101")
PRESETS = {                                                              # toy, small [D17]
    "toy": dict(dataset="toy_scenes", train_split="train", test_split="test", backbone="tiny",
                weights="none", head_channels=64, hidden=32, crop=96, batch_size=16, iterations=900,
                warmup=120, lr=2e-3, head_lr=1.0, train_classifier=True, classifier_backbone="tiny",
                classifier_weights="none", classifier_size=96, classifier_iterations=400,
                classifier_lr=2e-3, score_threshold=0.1, filter=45, eval_every=300, save_every=150,
                workers=0),
    "small": dict(dataset="folder", train_split="train", backbone="mobilenet_v2", crop=320, batch_size=8,
                  iterations=4000, warmup=800, lr=1e-4, classifier_backbone="mobilenet_v2",
                  classifier_size=256, classifier_iterations=1000, eval_every=1000, save_every=200),
    "voc-b1": dict(),
    "voc-b3": dict(backbone="mit_b3"),
    "voc-b5": dict(backbone="mit_b5"),
    "voc-r101-deeplabv2": R101 | dict(head="deeplabv2"),
    "voc-r101-deeplabv3plus": R101 | dict(head="deeplabv3plus"),
}


def check_config(cfg):
    """UserError for a setting that cannot work, before anything is read or written."""
    run.check_options(cfg)
    run.check_batch_size(cfg.batch_size, least=2 if cfg.head == "deeplabv3plus" else 1)
    if 0 < cfg.test_size < 32:
        raise UserError(f"--test-size {cfg.test_size}: networks need 32 pixels or more; 0 = as it is.")
    if cfg.scale_max < cfg.scale_min:
        raise UserError(f"--scale-max {cfg.scale_max} is below --scale-min {cfg.scale_min}: swap them.")
    if cfg.warmup >= cfg.iterations and cfg.method == "pfa":
        raise UserError(f"--warmup {cfg.warmup} leaves none of the --iterations {cfg.iterations} for "
                        "prototypes: lower it, or take --method pce.")
    if cfg.backbone not in GOES_WITH[cfg.head]:
        raise UserError(f"--head {cfg.head} does not go with --backbone {cfg.backbone}: choose one of "
                        f"{', '.join(GOES_WITH[cfg.head])}, or another head.")
    if cfg.draw and len(cfg.draw) != 2:
        raise UserError(f"--draw {' '.join(cfg.draw)}: give two files, an image and the PNG of its strokes.")
    if cfg.infer != "plain" and not cfg.predict:
        raise UserError(f"--infer {cfg.infer} goes with --predict; other runs report all modes.")
    if cfg.infer == "scores" and not cfg.class_scores:
        raise UserError("--infer scores needs the file: add --class-scores FILE.npz.")
    check_sides(lambda: build_network(cfg.backbone, cfg.head, 2, cfg.head_channels), cfg)
    check_classifier(cfg)
    if (cfg.scribble_drop or cfg.scribble_shrink) and cfg.method == "full":
        raise UserError("--scribble-drop and --scribble-shrink change strokes; --method full uses none.")


# ---- prototypes (Sec. 3.2) -------------------------------------------------------------------------------

def full_precision(x):
    """float32, or float64 if it is. bfloat16 moves a logit near 50 by up to 0.125, its attention by 13 %."""
    return x if x.dtype == torch.float64 else x.float()


def confidence(logits, present, reading="paper"):
    """p of Eq. (1): how sure every pixel is of every class. logits (B,N,h,w) -> (B,N,h,w) float32.

    paper     softmax over all N classes
    official  ReLU(logit), min-max scaled over the pixels of an image and class [D1]
    present (B,N) bool is only checked: ValueError if it does not fit the logits.
    """
    if present.shape != logits.shape[:2]:
        raise ValueError(f"present {tuple(present.shape)} does not fit logits {tuple(logits.shape)}")
    logits = full_precision(logits)
    if reading == "paper":
        return logits.softmax(1)
    p = logits.relu()
    low, high = p.amin((2, 3), keepdim=True), p.amax((2, 3), keepdim=True)
    p = torch.where(p < low + 1e-5, 0, p)
    return (p - low - 1e-5) / (high - low + 1e-5)                        # -1 if no logit is positive


@torch.no_grad()
def extract_prototypes(features, scores, present, top_fraction=0.08):
    """fp_t, Eq. (1) to (3): mean of the features of each class's K surest pixels, weighted by confidence.

    features (B,C,h,w), scores (B,N,h,w) from confidence(), present (B,N) bool -> (B,N,C) float32 of unit
    length, 0 where a class is absent. K = max(1, int(top_fraction h w)). No gradient flows back [D6].
    """
    with torch.autocast(features.device.type, enabled=False):            # float32 for long sums
        f = full_precision(features).flatten(2)                          # (B,C,hw)
        p = full_precision(scores).flatten(2)                            # (B,N,hw)
        K = max(1, int(top_fraction * p.shape[2]))
        c, pixel = p.topk(K, dim=2, sorted=False)                        # Eq. (1), (B,N,K)
        c = torch.where(c.sum(2, keepdim=True) == 0, 1, c)               # all underflowed: a plain mean
        weights = torch.zeros_like(p).scatter_(2, pixel, c)              # 0 where Eq. (2) leaves a pixel out
        mean = weights @ f.transpose(1, 2) / c.sum(2, keepdim=True)      # Eq. (3), (B,N,C)
        return torch.where(present[..., None], F.normalize(mean, dim=2), 0)


class PrototypeMemory(nn.Module):
    """Global prototypes (Sec. 3.2.3). Buffers: bank (N,n,C); count (N,), the slots in use."""

    def __init__(self, num_classes, slots, channels, momentum=0.99):
        super().__init__()
        self.momentum = momentum                                         # alpha
        self.register_buffer("bank", torch.zeros(num_classes, slots, channels))
        self.register_buffer("count", torch.zeros(num_classes, dtype=torch.int64))

    @property
    def full(self):
        """Has every class n prototypes? Waits for the device."""
        return bool((self.count == self.bank.shape[1]).all())

    @torch.no_grad()
    def update(self, prototypes, present):
        """Image by image: into an empty slot, else Eq. (4), (5). prototypes (B,N,C), present (B,N) bool.

        An image's update depends on the one before, so images are a loop; its classes touch different rows
        of the bank and are done at once. Nothing here waits for the device.
        """
        n = self.bank.shape[1]
        rows = torch.arange(len(self.bank), device=self.bank.device)
        for fp, is_present in zip(prototypes.to(self.bank.dtype), present):              # (N,C), (N,)
            cosine = F.cosine_similarity(fp[:, None], self.bank, dim=2)                  # (N,n)
            filling = self.count < n                                                     # (N,)
            slot = torch.where(filling, self.count, cosine.argmax(1))                    # Eq. (4) [D2]
            old = self.bank[rows, slot]                                                  # (N,C)
            new = self.momentum * old + (1 - self.momentum) * fp                         # Eq. (5)
            new = torch.where(filling[:, None], fp, new)
            self.bank[rows, slot] = torch.where(is_present[:, None], new, old)
            self.count += filling & is_present


def local_keys(prototypes, present):
    """select(fp) of Sec. 3.3.1 -> keys (B,N,C), mask (B,N) bool: True = this key counts for this image."""
    return prototypes, present


def global_keys(memory, present):
    """All slots, class-major [D4] -> keys (B,N*n,C), mask (B,N*n) bool: class present, slot not empty."""
    keys = memory.bank.flatten(0, 1).expand(len(present), -1, -1)
    filled = (memory.bank != 0).any(2)                                   # (N,n)
    return keys, (present[:, :, None] & filled).flatten(1)


# ---- feature augmentation (Sec. 3.3, Fig. 3) -------------------------------------------------------------

class FeatureAugmenter(nn.Module):
    """Pixels attend to prototypes and are augmented with what they find. One module for both paths [D5]."""

    def __init__(self, channels, hidden=128):
        super().__init__()
        self.project_prototype = nn.Linear(channels, hidden)             # e_fp = linear(fp)
        self.project_feature = nn.Linear(channels, hidden)               # e_f = linear(f)
        self.fuse = nn.Linear(2 * hidden, hidden)                        # linear of Eq. (7)
        self.expand = nn.Linear(hidden, channels)                        # linear of Eq. (8)

    def forward(self, features, keys, mask):
        """features (B,C,h,w), keys (B,M,C), mask (B,M) bool -> f_aug (B,C,h,w), in full precision."""
        with torch.autocast(features.device.type, enabled=False):
            f = full_precision(features).flatten(2).transpose(1, 2)      # (B,hw,C)
            e_f = self.project_feature(f)                                # (B,hw,D)
            e_fp = self.project_prototype(full_precision(keys))          # (B,M,D)
            omega = self.attention(e_f, e_fp, mask)                      # Eq. (6), (B,hw,M)
            e = F.relu(self.fuse(torch.cat([omega @ e_fp, e_f], 2)))     # Eq. (7), (B,hw,D)
            f_aug = F.relu(f + self.expand(e))                           # Eq. (8), (B,hw,C)
            return f_aug.transpose(1, 2).unflatten(2, features.shape[2:])

    def attention(self, e_f, e_fp, mask):
        """omega, Eq. (6): e_f (B,hw,D), e_fp (B,M,D), mask (B,M) -> (B,hw,M).

        A masked key has 0; where all keys are masked, they share evenly.
        """
        similarity = e_f @ e_fp.transpose(1, 2)                          # no 1 / sqrt(D), as printed
        return similarity.masked_fill(~mask[:, None], torch.finfo(similarity.dtype).min).softmax(2)


# ---- losses (Sec. 3.4) -----------------------------------------------------------------------------------

def enlarge(logits, size):
    """(B,N,h,w) -> (B,N,*size) float32, bilinear with aligned corners [D14]."""
    logits = full_precision(logits)
    if logits.shape[2:] == size:
        return logits
    return F.interpolate(logits, size, mode="bilinear", align_corners=True)


def partial_cross_entropy(logits, scribbles):
    """L_pce, Eq. (9): mean over the labelled pixels of the batch; 0, and no gradient, if there is none.

    logits (B,N,h,w), resized to the labels; scribbles (B,H,W) int64, 255 = no label -> scalar.
    """
    large = enlarge(logits, scribbles.shape[1:])
    total = F.cross_entropy(large, scribbles, ignore_index=255, reduction="sum")
    return total / (scribbles != 255).sum().clamp(min=1)


def consistency_loss(logits, augmented, reading="paper"):
    """L_con, Eq. (10): -sum_c p_c log p^aug_c, mean over pixels [D8]. logits, augmented (B,N,h,w) -> scalar.

    official  -sum_c p^aug_c log softmax(p)_c: p is softmaxed twice
    mse       (p - p^aug)^2, mean over classes too
    Eq. (10) is mostly the entropy of p (0.57 nats on toy's val split) and little KL(p, p^aug) (0.11). At
    weight 1 (--w-local 1 --w-local-first 1 --w-global 1) it ruins the network: plain val mIoU 38.4, not 49.5
    (seed 0, CPU, 2026-11-27). In shorter runs official, mse and a detached p opened no gap to strokes alone.
    """
    logits, augmented = full_precision(logits), full_precision(augmented)
    p = logits.softmax(1)
    if reading == "paper":
        return -(p * augmented.log_softmax(1)).sum(1).mean()
    if reading == "official":
        return -(augmented.softmax(1) * p.log_softmax(1)).sum(1).mean()
    return (p - augmented.softmax(1)).square().mean()


def classes_in(labels, num_classes):
    """Labels (B,H,W) int64 -> (B,N) bool: which classes occur; the background always does [D9]."""
    present = torch.zeros(len(labels), num_classes + 1, dtype=torch.bool, device=labels.device)
    present.scatter_(1, labels.clamp(max=num_classes).flatten(1), True)  # 255 falls into the last column
    present[:, 0] = True
    return present[:, :-1]


# ---- model (Sec. 3.1, A.1) -------------------------------------------------------------------------------

PATHS = ("local", "global")                                              # of augmentation, Fig. 2


class PFA(nn.Module):
    """Images -> F, initial prediction; augmenter and memory (None for --method pce, full) give the rest."""

    def __init__(self, network, classifier, num_classes, augmenter=None, memory=None):
        super().__init__()
        self.network, self.classifier = network, classifier
        self.augmenter, self.memory = augmenter, memory
        self.dropout = nn.Dropout2d(0.1)
        self.register_buffer("occurs", torch.ones(num_classes, dtype=torch.bool))    # in some training image
        self.register_buffer("trained", torch.zeros(2, dtype=torch.bool))            # one for each path

    def forward(self, x):
        """Images (B,3,H,W) -> F (B,C,h,w), logits (B,N,h,w)."""
        features, _ = self.network(x)                                    # _: no auxiliary head
        features = self.dropout(features)                                # [D6]
        return features, self.classifier(features)

    def keys(self, path, prototypes, present, wrong=0.0):
        """Keys (B,M,C) and mask (B,M) of one of PATHS: local prototypes (B,N,C), or those of the memory.

        wrong: probability with which an absent class counts as present among the global ones [D18].
        """
        if path == "local":
            return local_keys(prototypes, present)
        if wrong > 0:
            present = present | (torch.rand(present.shape, device=present.device) < wrong)
        return global_keys(self.memory, present)

    def augmented(self, features, prototypes, present, paths, wrong=0.0):
        """{path: logits (B,N,h,w) of f_aug}; Fig. 2's three decoders are this one classifier.

        features (B,C,h,w), prototypes (B,N,C) for the path local, present (B,N) bool, paths: of PATHS.
        """
        keys = {path: self.keys(path, prototypes, present, wrong) for path in paths}
        return {path: self.classifier(self.augmenter(features, *keys[path])) for path in paths}

    def memory_full(self):
        """Has every class that occurs in the training strokes n prototypes [D10]? Waits for the device."""
        return bool(((self.memory.count == self.memory.bank.shape[1]) | ~self.occurs).all())

    def paths(self):
        """Those of PATHS that the network has been trained for."""
        return [path for path, trained in zip(PATHS, self.trained.tolist()) if trained]


def build_model(cfg, num_classes, weights="none"):
    """The network of the options. UserError as build_network raises it."""
    last_stride = 1 if cfg.backbone.startswith("mit") else 2             # [D13]
    output_stride = 16 if cfg.head == "deeplabv3plus" else 8
    network = build_network(cfg.backbone, cfg.head, num_classes, cfg.head_channels, weights, output_stride,
                            last_stride=last_stride)
    C = network.channels
    if cfg.head == "deeplabv2":                                          # [D13]
        classifier = heads.DilatedClassifier(C, num_classes)
    else:
        classifier = nn.Conv2d(C, num_classes, 1)
    if cfg.method != "pfa":
        return PFA(network, classifier, num_classes)
    augmenter = FeatureAugmenter(C, cfg.hidden)
    memory = PrototypeMemory(num_classes, cfg.slots, C, cfg.momentum)
    return PFA(network, classifier, num_classes, augmenter, memory)


# ---- one training step -----------------------------------------------------------------------------------

def phase_of(net, iteration, cfg, passed=()):
    """Phase of an iteration, counted from 0 (Sec. 3.3.3): warmup, local, global; or a baseline's method.

    passed: phases so far. Asking the memory waits for the device, so after 20 iterations every 20th does.
    """
    if cfg.method != "pfa":
        return cfg.method
    if iteration < cfg.warmup:
        return "warmup"
    asks = cfg.augment != "local" and (iteration < cfg.warmup + 20 or iteration % 20 == 0)          # [D10]
    return "global" if "global" in passed or asks and net.memory_full() else "local"


def paths_of_phase(phase, cfg):
    """Paths that a phase trains; none in phase local of --augment global, in which the memory fills."""
    reached = {"local": PATHS[:1], "global": PATHS}.get(phase, ())
    return [path for path in reached if cfg.augment in (path, "both")]


def prototypes_of(features, logits, present, cfg):
    """Local prototypes (B,N,C) of F (B,C,h,w) and initial logits (B,N,h,w), Eq. (1) to (3)."""
    scores = confidence(logits, present, cfg.confidence)
    return extract_prototypes(features, scores, present, cfg.top_fraction)


def predictions_of(model, net, x, present, phase, cfg):
    """{"initial": logits (B,N,h,w), and "local", "global" as the phase has them}; updates the memory.

    x (B,3,H,W), present (B,N) bool. model: DistributedDataParallel around net, or net.
    """
    with run.autocast(x.device, cfg.amp):
        features, initial = model(x)
        predictions = dict(initial=initial)
        if phase not in ("local", "global"):
            return predictions
        features = full_precision(features)                              # once for prototypes and augmenter
        prototypes = prototypes_of(features, initial.detach(), present, cfg)
        if cfg.augment != "local":
            net.memory.update(of_all_ranks(prototypes), of_all_ranks(present))           # [D10]
        paths = paths_of_phase(phase, cfg)
        return predictions | net.augmented(features, prototypes, present, paths, cfg.wrong_classes)


def losses_of(predictions, scribbles, phase, cfg):
    """The terms of L_total (Sec. 3.4): dict of scalars to be summed."""
    last = list(predictions)[-1]
    chosen = cfg.pce if cfg.pce in predictions else last                 # "moves": the last one [D7]
    pce = partial_cross_entropy(predictions[chosen], scribbles)
    losses = dict(pce=pce * share_of_ranks((scribbles != 255).sum()))    # over the labels of all processes
    memory_fills = phase == "local" and cfg.augment == "both"
    lambda_l = cfg.w_local_first if memory_fills else cfg.w_local        # [D3]
    for path, weight in zip(PATHS, (lambda_l, cfg.w_global)):
        if path in predictions:
            con = consistency_loss(predictions["initial"], predictions[path], cfg.consistency)
            losses[f"con_{path}"] = weight * con
    return losses


def train_step(model, net, optimizer, scheduler, x, scribbles, image_classes, phase, cfg):
    """One iteration; returns the terms of L_total, detached, on the device.

    x (B,3,H,W), scribbles (B,H,W) int64, image_classes (B,N) bool: classes with a stroke in the whole image.
    """
    present = classes_in(scribbles, image_classes.shape[1])
    if cfg.classes_of == "image":                                        # [D9]
        present = present | image_classes
    predictions = predictions_of(model, net, x, present, phase, cfg)
    losses = losses_of(predictions, scribbles, phase, cfg)
    optimizer.zero_grad(set_to_none=True)
    run.backward(sum(losses.values()), optimizer, cfg.amp)               # as loss.backward()
    run.step(optimizer)                                                  # optimizer.step(); see --amp fp16
    scheduler.step()
    return {name: value.detach() for name, value in losses.items()}


def build_optimizer(net, cfg, device):
    """AdamW and its schedule (Sec. 4.2): all but the backbone learns cfg.head_lr times faster."""
    if cfg.freeze_norms:                                                 # [D12]
        for parameter in norm_parameters(net.network.backbone, nn.LayerNorm):
            parameter.requires_grad_(False)
    groups = split_parameters(net, cfg.lr, cfg.lr * cfg.head_lr)
    optimizer = torch.optim.AdamW(groups, weight_decay=cfg.weight_decay, fused=device.type == "cuda")
    if cfg.lr_policy == "linear":                                        # [D11]
        return optimizer, run.poly_schedule(optimizer, cfg.iterations)
    milestones = [round(0.6 * cfg.iterations), round(0.85 * cfg.iterations)]             # [D11]
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)


# ---- training --------------------------------------------------------------------------------------------

def wrap(net, phase, cfg, machine):
    """net, ready to train in a phase; from here on the paths of the phase count as trained (net.trained)."""
    if net.augmenter is not None:
        paths = paths_of_phase(phase, cfg)
        for path in paths:
            net.trained[PATHS.index(path)] = True
        net.augmenter.requires_grad_(bool(paths))                        # or DDP would wait for its gradient
    return run.distribute(net, machine).train()


def train(cfg, machine):
    """Train, evaluate in all modes, draw. Returns what metrics.json holds, on the first process."""
    sets = open_sets(cfg)
    scores = scores_of_file(cfg, sets["test"])                           # UserError before any training
    baseline = load_other(cfg.baseline, machine.device, sets["test"].classes)
    parts, progress = prepare(cfg, sets, machine)
    net, optimizer, scheduler = parts["model"], parts["optimizer"], parts["scheduler"]
    scale = (cfg.scale_min, cfg.scale_max)
    view = ScribbleView(sets["train"], 0, cfg.crop, scale, cfg.rotation, cfg.blur)       # Sec. 4.2 [D14]
    tell_time(parts, view, sets, progress, cfg, machine)
    start, phase = progress["iteration"], None
    loader = train_loader(view, cfg.batch_size, cfg.seed, start, cfg.iterations, cfg.workers, *machine)
    torch.backends.cudnn.benchmark = True                                # crops are of one size
    log = run.Log(cfg.out, progress, machine)
    bar = tqdm(loader, total=cfg.iterations, initial=start, leave=False, disable=machine.quiet)
    for iteration, batch in enumerate(bar, start + 1):
        before, phase = phase, phase_of(net, iteration - 1, cfg, progress["phases"])
        if phase != before:
            model = wrap(net, phase, cfg, machine)
            tell_phase(phase, iteration, progress["phases"], machine)
            bar.set_description(phase)
        x, scribbles, image_classes = to_device(batch, machine.device, "image", "mask", "classes")
        log.add(train_step(model, net, optimizer, scheduler, x, scribbles, image_classes, phase, cfg))
        progress["phases"][phase] = progress["phases"].get(phase, 0) + 1
        if run.due(iteration, cfg.eval_every, cfg.iterations):
            log_row(log, net, sets["val"], iteration, phase, scheduler.get_last_lr()[0], cfg, machine)
        if run.due(iteration, cfg.save_every, cfg.iterations):
            log.save("last.pt", parts, iteration=iteration)
    torch.backends.cudnn.benchmark = False
    return report(net, cfg, sets, scores, baseline, progress, machine)


# ==== from here on: the start of a run, evaluation, using a trained run, the paper's tables ================

def split_parameters(net, lr, head_lr):
    """Two parameter groups: the backbone, without what is frozen, and all else."""
    backbone = [p for p in net.network.backbone.parameters() if p.requires_grad]
    others = [p for name, p in net.named_parameters() if not name.startswith("network.backbone.")]
    return [dict(params=backbone, lr=lr), dict(params=others, lr=head_lr)]


def prepare(cfg, sets, machine):
    """parts {"model": net, "optimizer", "scheduler"}, and the progress, which every checkpoint holds.

    The run folder is made once the model stands, so that a mistake in the options leaves nothing behind.
    """
    last = Path(cfg.out) / "last.pt"
    resumes = cfg.resume and last.exists()                               # else there is no checkpoint yet
    torch.manual_seed(cfg.seed)
    classes, pixels = sets["train"].classes, None
    if resumes:
        run.read_progress(cfg.out, ("phases",), classes, sets["train"])
    net = build_model(cfg, len(classes), "none" if resumes else cfg.weights)
    if not resumes:
        others, strokes = (sets["val"], sets["test"]), cfg.method != "full"
        pixels = survey.survey(sets["train"], others, cfg, machine, strokes, net)
        if strokes:
            net.occurs.copy_(pixels > 0)
    run.start_run(cfg, machine)
    net.to(machine.device, memory_format=torch.channels_last)
    optimizer, scheduler = build_optimizer(net, cfg, machine.device)
    parts = dict(model=net, optimizer=optimizer, scheduler=scheduler)
    torch.manual_seed(cfg.seed + 1 + machine.rank)                       # dropout differs between processes
    if resumes:
        return parts, run.load_checkpoint(last, parts, machine.device)
    return parts, dict(iteration=0, seconds=0.0, classes=classes, pixels=pixels, log=[], sums={}, phases={},
                       images=run.code_of_names(sets["train"]))


def tell_time(parts, view, sets, progress, cfg, machine):
    """Prints the expected time and peak memory, measured on a step of the last phase; changes nothing."""
    left = cfg.iterations - progress["iteration"]
    if left <= 0:
        return
    phase = "global" if cfg.method == "pfa" else cfg.method
    net = parts["model"].train()

    def step(batch):
        tensors = to_device(batch, machine.device, "image", "mask", "classes")
        train_step(net, net, parts["optimizer"], parts["scheduler"], *tensors, phase, cfg)
    images = math.ceil(left / cfg.eval_every) * len(sets["val"]) + len(sets["test"])
    speed.announce(step, view, parts, left, images, cfg, machine)


def tell_phase(phase, iteration, phases, machine):
    """Says that a phase begins with this iteration, counted from 1. phases: {phase: iterations so far}."""
    filled = sum(phases.values()) - phases.get("global", 0)
    remark = f" (memory full after {filled} iterations, warm-up included)" if phase == "global" else ""
    if machine.rank == 0 and iteration > 1:
        tqdm.write(f"from iteration {iteration} on: phase {phase}{remark}")


def log_row(log, net, val_set, iteration, phase, lr, cfg, machine):
    """Evaluate on the val split and add a row to the log; classes come from the filter, not from labels."""
    mode = f"filter_{cfg.filter}"
    rates = evaluate(Predictor(net, cfg), val_set, machine, [mode])
    miou = {name: score["miou"] for name, score in (rates["plain"] | rates.get(mode, {})).items()}
    log.row(f"iteration {iteration} ({phase})", before=dict(iteration=iteration, phase=phase, lr=lr),
            after={f"val_{name}": miou.get(name) for name in PREDICTIONS},
            text=f"{cfg.val_split} mIoU {in_words(miou)}", losses=("pce", "con_local", "con_global"))


# ---- evaluation ------------------------------------------------------------------------------------------

def class_sets(plain, num_classes, modes, labels=None, scores=None, threshold=0.5):
    """{mode: (N,) bool}: classes whose prototypes may augment an image, background always. A.2, Table 4.

    plain (H,W): initial prediction as ids. filter_T: classes of more than T of its pixels [D15]. scores,
    classifier: scores (N,) above the threshold. oracle: classes of the labels (H,W), only where asked for.
    """
    counts = torch.bincount(plain.flatten(), minlength=num_classes)
    sets = {}
    for mode in modes:
        if mode == "oracle":
            present = classes_in(labels[None].long().to(plain.device), num_classes)[0]
        elif mode.startswith("filter_"):
            present = counts > int(mode.removeprefix("filter_"))
        else:
            present = (scores > threshold).to(plain.device)
        present[0] = True
        sets[mode] = present
    return sets


class Plain(NamedTuple):
    """The initial prediction of an image in eval mode: "plain" is what training calls "initial"."""
    windows: list                                                        # (rows, columns, (F, logits)) each
    size: tuple                                                          # sides of the network's input
    ids: torch.Tensor                                                    # (H,W) int64: predicted classes

    def cells(self, k):
        """F (1,C,h,w) with k = 0, logits (1,N,h,w) with k = 1; of several windows (P,1) cells."""
        maps = [outputs[k] for *_, outputs in self.windows]
        return maps[0] if len(maps) == 1 else torch.cat([m.flatten(2) for m in maps], 2)[..., None]

    @property
    def features(self):
        return self.cells(0)

    @property
    def logits(self):
        return self.cells(1)


class Predictor(NamedTuple):
    """A trained network and the settings of its run. present: (N,) bool; predictions: ids (H,W) int64."""
    net: PFA
    cfg: Config

    @torch.inference_mode()
    def plain(self, x, size):
        """x (1,3,h,w), size (H,W) of the label -> Plain."""
        def forward(part):
            with run.autocast(x.device, self.cfg.amp):
                return self.net(part)
        windows = segmentation.in_windows(forward, x, self.cfg.window)
        ids = segmentation.class_ids(segmentation.part_of(windows, 1), x.shape[2:], size, aligned=True)
        return Plain(windows, x.shape[2:], ids[0])

    def of_image(self, image):
        """uint8 (3,H,W) -> Plain."""
        x = segmentation.network_input(image, self.cfg.test_size)
        x = x.to(self.net.occurs.device, memory_format=torch.channels_last)
        return self.plain(x, image.shape[1:])

    def class_sets(self, plain, modes, labels=None, scores=None):
        """{mode: present}, see class_sets above. labels (H,W) integer, scores (N,)."""
        return class_sets(plain.ids, len(self.net.occurs), modes, labels, scores, self.cfg.score_threshold)

    @torch.inference_mode()
    def augmented(self, plain, present, paths, restricted=False):
        """{path: ids} with the prototypes of the classes present. Local ones are of all windows together.

        restricted: also "plain_restricted", the control, and "PATH_restricted": no other class can win.
        """
        with run.autocast(plain.ids.device, self.cfg.amp):
            prototypes = None                                            # the memory has the global ones
            if "local" in paths:
                prototypes = prototypes_of(plain.features, plain.logits, present[None], self.cfg)
            windows = []
            for rows, columns, (features, logits) in plain.windows:
                made = self.net.augmented(features, prototypes, present[None], paths)
                windows.append((rows, columns, made | dict(plain=logits)))
        ids, sizes = {}, (plain.size, plain.ids.shape)
        for name in ("plain", *paths):
            logits = segmentation.part_of(windows, name)
            if name != "plain":
                ids[name] = segmentation.class_ids(logits, *sizes, aligned=True)[0]
            if restricted:
                found = segmentation.class_ids(logits, *sizes, aligned=True, classes=present)[0]
                ids[f"{name}_restricted"] = found
        return ids

    @torch.inference_mode()
    def surest(self, plain, present):
        """For a picture: p of Eq. (1), (N,h,w) float32, and its K pixels, (N,h,w) bool, both on the CPU."""
        p = confidence(plain.logits, present[None], self.cfg.confidence)[0].cpu().flatten(1)
        K = max(1, int(self.cfg.top_fraction * p.shape[1]))
        chosen = torch.zeros(p.shape, dtype=torch.bool).scatter(1, p.topk(K).indices, True)
        size = plain.logits.shape[2:]
        return p.unflatten(1, size), chosen.unflatten(1, size)

    @torch.inference_mode()
    def attention(self, path, plain, present):
        """For a picture: omega of Eq. (6), (h,w,M), and which of the M keys count, (M,) bool, on the CPU."""
        prototypes = prototypes_of(plain.features, plain.logits, present[None], self.cfg)
        keys, mask = self.net.keys(path, prototypes, present[None])
        augmenter = self.net.augmenter
        e_f = augmenter.project_feature(full_precision(plain.features).flatten(2).transpose(1, 2))
        omega = augmenter.attention(e_f, augmenter.project_prototype(keys), mask)[0].cpu()
        return omega.unflatten(0, plain.features.shape[2:]), mask[0].cpu()


def evaluate(predictor, data, machine, modes=(), scores=None):
    """{mode: {prediction: rates in percent}}: "plain" in the mode "plain", the other PREDICTIONS in `modes`.

    modes: as class_sets takes them; scores: {image name: (N,)} for the modes scores and classifier.
    """
    net, cfg = predictor
    paths = net.paths()

    def predict(batch):
        x, labels = to_device(batch, machine.device, "image", "mask")
        plain = predictor.plain(x, labels.shape[1:])
        predictions = {("plain", "plain"): plain.ids[None]}
        row = scores[data.name_of(int(batch["index"]))] if scores else None
        computed = {}                                                    # modes often agree on the classes
        for mode, present in predictor.class_sets(plain, modes, labels[0], row).items():
            classes = tuple(present.tolist())
            if classes not in computed:
                computed[classes] = predictor.augmented(plain, present, paths, restricted=True)
            for name, ids in computed[classes].items():
                predictions[mode, name] = ids[None]
        return predictions
    told = [name for name in PREDICTIONS[1:] if name.removesuffix("_restricted") in ("plain", *paths)]
    names = [("plain", "plain"), *((mode, name) for mode in modes for name in told)]
    view = TestView(data, cfg.test_size)                                 # whole images [D16]
    loader = eval_loader(view, cfg.workers, *machine)
    rates = segmentation.evaluate(net, loader, data.num_classes, names, predict, machine)
    by_mode = {}
    for (mode, name), score in rates.items():
        by_mode.setdefault(mode, {})[name] = score
    return by_mode


def headline_mode(scores, cfg):
    """The mode without true classes whose augmented predictions stand for the run (paper: Q2L's scores)."""
    if scores is None:
        return f"filter_{cfg.filter}"
    return "scores" if cfg.class_scores else "classifier"


def all_modes(scores, cfg):
    """The modes of Table 4 for a run: filters, scores where there are any, and the true classes last."""
    filters = [f"filter_{T}" for T in sorted({0, 100, 500, 1000, cfg.filter})]
    return list(dict.fromkeys([*filters, headline_mode(scores, cfg), "oracle"]))


def report(net, cfg, sets, scores, baseline, progress, machine):
    """Evaluation in all modes, metrics.json and figures/. Returns the metrics, on the first process."""
    data = sets["test"]
    predictor = Predictor(net.eval(), cfg)
    if scores is None and cfg.train_classifier:
        scores = scores_of_classifier(cfg, sets["train"], data, machine)
    rates = evaluate(predictor, data, machine, all_modes(scores, cfg), scores)
    if machine.rank:
        return None
    plain_rates = segmentation.named_rates(rates["plain"]["plain"], data.classes, cfg.test_split)
    miou, iou = {}, {}
    for mode, predictions in rates.items():
        miou[mode] = {name: score["miou"] for name, score in predictions.items()}
        iou[mode] = {name: dict(zip(data.classes, score["iou"])) for name, score in predictions.items()}
    phases, done = progress["phases"], progress["iteration"]
    metrics = {key: plain_rates[key] for key in ("macc", "pixel_acc", "absent")}
    metrics |= dict(
        miou=miou, iou=iou, headline=headline_mode(scores, cfg), split=cfg.test_split, phases=phases,
        iterations=done, finished=done >= cfg.iterations,
        iterations_until_bank_full=done - phases["global"] if "global" in phases else None,
        class_map=None if scores is None else scores_quality(scores, data, net.occurs))
    metrics |= run.facts(cfg, net, progress, machine, "method", "augment", "reading")
    cfg = run.for_results(cfg)
    run.write_json(Path(cfg.out) / "metrics.json", metrics)
    print(pfa_figures.summary(metrics, cfg), flush=True)
    predictor = predictor._replace(cfg=cfg)
    pfa_figures.draw_figures(predictor, sets, scores, metrics, baseline, progress["log"])
    write_report(cfg.out, PAGE, cfg.baseline)
    return metrics


# ---- use a trained run -----------------------------------------------------------------------------------

def load_run(cfg, device, classes=None):
    """Predictor of the run in cfg.out, and its progress. UserError if it does not know these classes."""
    progress = run.read_progress(cfg.out, ("phases",), classes)
    done = progress["iteration"]
    if done < cfg.iterations:
        print(f"note: the run in {cfg.out} is not finished: iteration {done} of {cfg.iterations}")
    net = build_model(cfg, len(progress["classes"])).to(device, memory_format=torch.channels_last)
    run.load_checkpoint(Path(cfg.out) / "last.pt", dict(model=net), device)
    return Predictor(net.eval(), cfg), progress


def load_other(out, device, classes):
    """Predictor of another run of this script with the same classes, None if `out` is empty."""
    if not out:
        return None
    return load_run(replace(run.read_config(Config, out), out=str(out)), device, classes)[0]


def evaluate_run(cfg, machine):
    """--eval-only: the run in OUT on --test-split, into metrics.json and figures/ again."""
    sets = open_sets(cfg)
    scores = scores_of_file(cfg, sets["test"])
    predictor, progress = load_run(cfg, machine.device, sets["test"].classes)
    baseline = load_other(cfg.baseline, machine.device, sets["test"].classes)
    return report(predictor.net, cfg, sets, scores, baseline, progress, machine)


def predict(cfg, device):
    """--predict: for every image OUT/predictions/NAME.png (class ids, palette) and NAME_overlay.png."""
    predictor, progress = load_run(cfg, device)
    images = files.list_images(cfg.predict)
    paths = predictor.net.paths()[-1:]
    mode = f"filter_{cfg.filter}" if cfg.infer == "filter" else cfg.infer
    if mode != "plain" and not paths:
        raise UserError(f"--infer {cfg.infer}: the run in {cfg.out} has no prototypes; use --infer plain.")
    scores_of = scorer(cfg, images, len(progress["classes"]), device)
    remark = "; --infer filter, classifier or scores augments it" if paths else ""
    if mode != "plain":
        remark = f", classes by the {cfg.infer}"
    print(f"{'plain' if mode == 'plain' else paths[0]} prediction{remark}")

    def predict_file(file):
        image = files.read_large_enough(file)
        plain = predictor.of_image(image)
        ids = plain.ids
        if mode != "plain":
            present = predictor.class_sets(plain, [mode], scores=scores_of(file, image))[mode]
            ids = predictor.augmented(plain, present, paths)[paths[0]]
        return image, ids.to(torch.uint8).cpu()
    segmentation.predict_files(images, predict_file, progress["classes"], cfg.out)


def adapt(net, x, scribbles, paths, cfg):
    """Train net, in place, for cfg.draw_steps steps on the strokes of one image and its mirror image. Ours.

    x (1,3,h,w), scribbles (1,H,W) int64, 255 = no stroke. The loss is L_pce of the plain and of the
    augmented prediction. Batch norm, dropout and memory stay as in evaluation.
    """
    groups = split_parameters(net, cfg.draw_lr / 10, cfg.draw_lr)
    optimizer = torch.optim.AdamW(groups, weight_decay=cfg.weight_decay)
    H, W = scribbles.shape[1:]
    _, row, column = (scribbles != 255).nonzero().T
    place = torch.stack([2 * column / max(1, W - 1) - 1, 2 * row / max(1, H - 1) - 1], 1).float()[None, None]
    present = classes_in(scribbles, len(net.occurs))
    for step in tqdm(range(cfg.draw_steps), desc="draw", leave=False, disable=None):
        mirrored = [-1] * (step % 2)                                     # axes to flip
        with run.autocast(x.device, cfg.amp):
            features, logits = net(x.flip(mirrored))
            prototypes = prototypes_of(features, logits.detach(), present, cfg)
            augmented = net.augmented(features, prototypes, present, paths)
        loss = 0.0
        for maps in (logits, *augmented.values()):                       # L_pce, read at the strokes
            maps = maps.float().flip(mirrored)
            at_strokes = F.grid_sample(maps, place, align_corners=True)[0, :, 0].T       # (pixels,N)
            loss = loss + F.cross_entropy(at_strokes, scribbles[0, row, column])
        optimizer.zero_grad(set_to_none=True)
        run.backward(loss, optimizer, cfg.amp)
        run.step(optimizer)


def draw(cfg, device):
    """--draw IMAGE STROKES: a copy of the run adapted to this image's strokes; OUT/drawings/NAME*.png."""
    predictor, progress = load_run(replace(cfg, window=0), device)       # the image shrinks to a crop
    classes = progress["classes"]
    paths = predictor.net.paths()[-1:]
    image = files.read_large_enough(cfg.draw[0])
    stem = Path(cfg.out) / "drawings" / Path(cfg.draw[0]).stem
    scribbles = strokes.painted_strokes(cfg.draw[1], image, classes)
    pfa_figures.save_strokes(stem, scribbles, classes)
    size = image.shape[1:]
    factor = min(1, cfg.crop / min(size))
    x = segmentation.network_input(resize(image, [round(side * factor) for side in size]))
    x = x.to(device, memory_format=torch.channels_last)
    before = predictor.plain(x, size).ids
    adapt(predictor.net, x, scribbles[None].long().to(device), paths, cfg)
    plain = predictor.plain(x, size)
    present = predictor.class_sets(plain, ["oracle"], scribbles)["oracle"]
    after = {"after, plain": plain.ids}
    for path, ids in predictor.augmented(plain, present, paths).items():
        after[f"after, {path}, classes of the strokes"] = ids
    pfa_figures.save_drawing(stem, image, scribbles, before, after, classes, cfg.draw_steps)


# ---- tables and figures of the paper: VOC 2012 val -------------------------------------------------------

def run_table(cfg, machine):
    """--table, --figure: every row is a run in OUT/rows/. Returns {row: [metrics, one a seed]}."""
    number = cfg.figure or cfg.table
    table = FIGURES[number] if cfg.figure else TABLES[number]
    rows = networks_of_table_3(cfg) if cfg.table == 3 else table.rows
    tables.check_rows(rows, cfg, lambda row: check_config(replace(row, figure=0)), USUAL_ROW)
    usual = replace(cfg, **USUAL_ROW)
    folders = {name: tables.folder_of_changes(changes, usual) or "pfa" for name, changes in rows.items()}
    results = tables.train_rows(rows, usual, train, machine, folders.get)
    shown = results
    if cfg.table == 3:
        shown = networks_compared(cfg, results)
    elif cfg.table == 4:
        shown = rows_by_mode(results)
        table = table._replace(rows=dict.fromkeys(shown, {}))
    elif cfg.table == 2 and machine.rank == 0:
        data = open_full(cfg, cfg.test_split)
        predictors = {}
        for name in ("baseline", "local", "global", "both"):
            out = tables.row_out(cfg, folders[name], cfg.seed)
            predictors[name] = load_other(out, machine.device, data.classes)
        pfa_figures.draw_components(Path(cfg.out) / "components.png", predictors, data, cfg.filter)
    headline = results[list(results)[-1]][0]["headline"]
    if cfg.figure and machine.rank == 0:
        title = f"{table.title}; classes by {headline}"
        pfa_figures.draw_curves(Path(cfg.out) / f"figure{number}.png", results, title)
    paper = "plots no numbers" if cfg.figure else "scores VOC 2012 val"
    about = (f"{cfg.iterations} iterations, {cfg.test_split} split, classes of local and global: "
             f"{headline}; the paper {paper}")
    tables.write_table(number, table, shown, cfg, machine, about, name="figure" if cfg.figure else "table")
    write_report(cfg.out, PAGE)
    return results


def networks_of_table_3(cfg):
    """{row: changed options}: every network, with all pixels and with scribbles. UserError: no weights."""
    rows = {}
    for name, changes in NETWORKS.items():
        weights = weights_in(cfg.weights, changes["backbone"])           # UserError before any training
        for method in ("full", "pfa"):
            rows[f"{name} {method}"] = changes | dict(weights=weights, method=method)
    return rows


def networks_compared(cfg, results):
    """Rows of Table 3: {network: [columns, one a seed]}."""
    rows = {}
    for name, changes in NETWORKS.items():
        full, scribble = results[f"{name} full"], results[f"{name} pfa"]
        counts = cost(replace(cfg, method="pce", **changes), len(full[0]["iou"]["plain"]["plain"]))
        rows[name] = [dict(parameters=counts[0] / 1e6, multiply_adds=counts[1],
                           full=best_rate(first), scribble=best_rate(second))
                      for first, second in zip(full, scribble)]
    return rows


def cost(cfg, num_classes, size=512):
    """Parameters, and 1e9 multiply-adds of an image as Table 3 counts them: without attention products.

    The all-MLP decoder counts in its printed order: project, enlarge, concatenate, fuse. Ours fuses before
    it enlarges and needs 4.2e9 fewer for MiT-B1.
    """
    products = ("attention", "bmm")                                      # bmm: on the meta device
    total = 0
    with torch.device("meta"), torch.no_grad():
        net = build_model(cfg, num_classes).eval()
        x, decoder = torch.empty(1, 3, size, size), net.network.head
        if cfg.head == "mlp":
            decoder = heads.SegFormerHead(net.network.backbone.dims, net.network.channels)
        for module in (net.network.backbone, decoder, net.classifier):
            x, count = speed.counted(module, x, products)
            total += count
    return sum(p.numel() for p in net.parameters()), total / 1e9


def main(cfg):
    """Returns the metrics of a run, or of a table {row: [metrics, one a seed]}, for use from Python."""
    check_config(cfg)
    machine = run.setup(cfg.device, cfg.seed)
    torch.backends.cudnn.benchmark = False                               # train() turns it on for its crops
    if cfg.table or cfg.figure:
        return run_table(cfg, machine)
    if cfg.eval_only:
        return evaluate_run(cfg, machine)
    if not cfg.predict and not cfg.draw:
        return train(cfg, machine)
    if machine.rank == 0:
        command = predict if cfg.predict else draw
        command(cfg, machine.device)


if __name__ == "__main__":                                               # worker processes import this file
    run.run_script(main, Config, PRESETS, __doc__)
