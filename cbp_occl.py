"""CBP + OCCL: frozen orthogonal class prototypes as the classifier of a segmentation network, in one file.

Paper  J. Chen, D. Deguchi, C. Zhang, X. Zheng, H. Murase, "Frozen is better than learning: A new design of
       prototype-based classifier for semantic segmentation", Pattern Recognition 2024, article 110431.
       The authors released no code; networks and recipes follow mmsegmentation, as Sec. 4.1 says.
Idea   A learned 1x1 classifier gives similar classes similar rows (correlation ambiguity) and frequent classes
       long rows (prior ambiguity). So draw the rows once, make them orthogonal and equally long, and never train
       them. A contrastive loss on class centroids (OCCL) shapes the features around them, in training only.

Try    python cbp_occl.py                                             # toy scenes, about a minute on a CPU
Train  python cbp_occl.py --preset ade20k-segformer-b0 --data ADEChallengeData2016 --weights mit_b0.pth
       torchrun --nproc-per-node 4 cbp_occl.py --preset ade20k-swin_b --data ADEChallengeData2016
Look   python cbp_occl.py --predict photo.jpg --out runs/cbp_occl-toy  # index PNG and overlay
       python cbp_occl.py --table 3                                   # the paper's ablation, on toy scenes

symbol   here                 shape    meaning                                              paper
W, w_l   prototypes           N,C      Category-Basis Prototypes (CBP), frozen              Sec. 3.2, Alg. 1
T        length               scalar   their common l2 norm                                 Alg. 1 line 12
F, f_i   features             B,C,h,w  decode-head output before its last 1x1 convolution   Eq. (1)
y_1,y_2  views                B,h,w    the two halves of the labels                         Sec. 3.3
v_lx     centroids[x-1, l]    2,N,C    View Centroid (VC) of class l in view x              Eq. (3)
s_l      category             N,C      Category Centroid (CC): mean of the two VCs          Sec. 3.3
L_v      centroid_loss        2        the VCs of a class attract, other CCs repel          Eq. (4)
L_c      category_loss        2        a VC is drawn to its own prototype                   Eq. (5)
lambda   w_centroid           scalar   weight of L_v                                        Eq. (6)
phi      w_category           scalar   weight of L_c                                        Eq. (6)
tau      tau                  scalar   temperature, 0.07                                    Sec. 4.1

Where we read or do something else than is printed ([D*] marks the line):
[D1] Alg. 1 line 12 lost its root and its "per row": w = T b / sqrt(b.b), row by row.
[D2] Eq. (4) and (5) print a sum of ratios. Minimising a ratio would push the two views apart, and the text says
     InfoNCE, so it is -log(ratio). A test shows both directions.
[D3] Eq. (4) prints v_j.SG_j in the denominator: a class against its own centroid. Sec. 1 wants a VC apart from
     the other CCs, so it is v_i.SG(s_j): the anchor against the other classes' stop-gradient CCs.
[D4] Eq. (5) prints v_j.w_j. The text calls the frozen prototypes the keys, so it is v_i against every w_j.
[D5] All products inside OCCL are cosines (v, s and w are l2-normalised): 0.07 is a temperature for cosines; raw
     products run to a loss of hundreds. So T does not change OCCL; it scales the pixel logits only.
[D6] Mean over the classes that both views hold, not a sum over all N: absent classes have no centroid.
[D7] "Equally divide y": per class, the first half of its pixels in batch, row, column order, and the rest. Cuts
     mostly between images and objects, the paper's idea of a view. A class of one pixel is left out.
     --views random halves at random. Labels are shrunk to the features' size by nearest.
[D8] The features of Eq. (1) are not normalised, though Sec. 3.2 says that only the cosine counts: with unit
     features and T = 2 the cross-entropy of 150 classes could not fall below 3.05. The argmax does depend on
     cosines alone.
[D9] g of Eq. (1) is the decode head itself: no extra projection, and no bias, which would bring the prior back.
[D10] Cross-entropy averages over labelled pixels (PyTorch); mmsegmentation divides by all, 255 included.
[D11] "For convolution models the optimizer is SGD" holds for FCN; ConvNeXt takes mmsegmentation's AdamW.
[D12] OCCL sees the classes of one GPU's images: 8 GPUs with 2 images each contrast fewer than one with 16.
[D13] ResNet has torchvision's 7x7 stem, not mmsegmentation's three 3x3 convolutions, and ConvNeXt is evaluated on
     whole images, not in sliding windows.
[D14] The paper prints neither the momentum of "EMA" (0.999, as in ProtoSeg and GMMSeg) nor the form of "Penalty".
"""

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from common import datasets, figures, files, loaders, run, transforms
from common.backbones import build_network
from common.metrics import ConfusionMatrix
from common.run import RunConfig, UserError, opt
from common.toy_scenes import LOOKALIKES as TOY_LOOKALIKES


# ---- options and recipes -------------------------------------------------------------------------------------

@dataclass
class Config(RunConfig):
    dataset: str = opt("toy_scenes", "reader of --data", choices=datasets.DATASETS)
    train_split: str = opt("train", "trained on; voc also has trainaug")
    val_split: str = opt("val", "evaluated while training")
    test_split: str = opt("val", "evaluated once at the end, into metrics.json, and by --eval-only", runtime=True)
    backbone: str = opt("mit_b0", "network before the head; common/backbones.py lists which go with which head")
    head: str = opt("segformer", "segformer = all-MLP head", choices=("segformer", "fcn", "upernet"))
    head_channels: int = opt(0, "C, width of the features before the classifier, at least N; 0 = the head's own")
    weights: str = opt("imagenet", "of the backbone: imagenet (torchvision downloads them), a file, a URL, or none",
                       runtime=True)
    size: int = opt(512, "short side of the resized image; training scales it by 0.5 to 2; 0 = the image's own")
    crop: int = opt(512, "training crop in pixels; lower it if memory runs out")
    batch_size: int = opt(16, "images an iteration, over all GPUs; halve it if memory runs out, and --lr too")
    iterations: int = opt(160000, "training steps", schedule=True)
    warmup: int = opt(1500, "iterations of linear learning-rate warm-up", schedule=True)
    eval_every: int = opt(16000, "iterations between evaluations, one row of log.csv each", schedule=True)
    save_every: int = opt(1000, "iterations between checkpoints: what --resume can lose", runtime=True)
    optimizer: str = opt("adamw", "sgd has momentum 0.9", choices=("adamw", "sgd"))
    lr: float = opt(6e-5, "learning rate of the backbone")
    head_lr: float = opt(10.0, "learning rate of the head as a multiple of --lr")
    weight_decay: float = opt(0.01, "never applied to frozen prototypes")
    power: float = opt(1.0, "of the polynomial learning-rate decay")
    floor: float = opt(0.0, "learning rate where the decay ends")
    stage_decay: float = opt(1.0, "ConvNeXt: the learning rate shrinks by this factor a layer group to the stem")
    classifier: str = opt("cbp", "cbp = frozen prototypes, learnable = ordinary 1x1 convolution; the others are "
                          "Table 4", choices=("cbp", "learnable", "ema", "gradient", "penalty"))
    init: str = opt("random", "rows before Gram-Schmidt; masked = the backbone's class means (Table 5)",
                    choices=("random", "masked"))
    prototypes: str = opt("", "N x C .npy file of rows instead, e.g. CLIP text embeddings (Table 5)")
    orthogonal: bool = opt(True, "Gram-Schmidt (Alg. 1 lines 3-11)")
    equal: bool = opt(True, "rescale every prototype to --length (Alg. 1 line 12)")
    length: float = opt(2.0, "T, l2 norm of the prototypes; scales the pixel logits")
    w_centroid: float = opt(1.0, "lambda, weight of the centroid loss; 0 switches it off")
    w_category: float = opt(0.3, "phi, weight of the category loss; 0 switches it off")
    tau: float = opt(0.07, "temperature of OCCL")
    views: str = opt("ordered", "how a class is cut into two views [D7]", choices=("ordered", "random"))
    eval_only: bool = opt(False, "evaluate OUT/last.pt on --test-split and stop", runtime=True, uses_run=True)
    predict: str = opt("", "image or folder: write index PNGs and overlays to OUT/predictions and stop",
                       runtime=True, uses_run=True)
    profile: bool = opt(False, "parameters, GFLOPs, memory and speed of this model (Table 2) and stop",
                        runtime=True)
    table: int = opt(0, "train every row of this table of the paper on the chosen preset", runtime=True,
                     choices=(0, 3, 4, 5, 6, 7, 8, 9, 10))


# Optimizer and schedule are mmsegmentation's for each model (Sec. 4.1); batch 16 and crop 512 throughout.
ADE20K = dict(dataset="ade20k")                                        # 160K iterations, 150 classes
COCO = dict(dataset="cocostuff10k", val_split="test", test_split="test", iterations=80000, eval_every=8000)
FCN = dict(backbone="resnet101", head="fcn", optimizer="sgd", lr=0.01, head_lr=1.0, weight_decay=5e-4, power=0.9,
           floor=1e-4, warmup=0)                                       # [D13]
CONVNEXT = dict(backbone="convnext_base", head="upernet", lr=1e-4, head_lr=1.0, weight_decay=0.05,
                stage_decay=0.9)                                       # [D11]; the paper does not say which size
SWIN = dict(backbone="swin_b", head="upernet", head_lr=1.0)
SEGFORMER = dict(head="segformer", w_category=0.1, length=1.0)         # on both data sets (Sec. 4.2)

PRESETS = {                                                            # lambda, phi and T: Sec. 4.2
    "toy": dict(test_split="test", backbone="tiny", weights="none", size=128, crop=96, iterations=800, warmup=50,
                eval_every=200, save_every=200, lr=6e-3, head_lr=1.0, workers=0),                         # ours
    "camvid": dict(dataset="camvid", test_split="test", backbone="mobilenet_v2", size=360, crop=360, batch_size=8,
                   iterations=8000, warmup=400, eval_every=1000, lr=5e-4, head_lr=5.0, w_category=0.1,
                   length=1.0),                                                                           # ours
    "ade20k-fcn-r101": ADE20K | FCN | dict(w_centroid=0.4, w_category=0.1),
    "ade20k-convnext_b": ADE20K | CONVNEXT | dict(w_category=0.2),
    "ade20k-swin_b": ADE20K | SWIN | dict(w_category=0.2, length=1.0),
    **{f"ade20k-segformer-b{i}": ADE20K | SEGFORMER | dict(backbone=f"mit_b{i}") for i in range(6)},
    "ade20k-segformer-b0-40k": ADE20K | dict(iterations=40000, eval_every=4000),       # Sec. 4.3: all ablations
    "cocostuff10k-fcn-r101": COCO | FCN | dict(length=0.3),            # as printed; perhaps a slip for 3
    "cocostuff10k-convnext_b": COCO | CONVNEXT | dict(length=3.0),
    "cocostuff10k-swin_b": COCO | SWIN,
    **{f"cocostuff10k-segformer-b{i}": COCO | SEGFORMER | dict(backbone=f"mit_b{i}") for i in range(6)},
}

ROWS = {                                                               # what a row of a table changes in a preset
    "baseline": dict(classifier="learnable", w_centroid=0.0, w_category=0.0),
    "CBP": dict(w_centroid=0.0, w_category=0.0),
    "OCCL": dict(classifier="learnable"),                              # keys of L_c: the learned rows, with gradient
    "CBP + OCCL": dict(classifier="cbp"),
    "EMA": dict(classifier="ema"),
    "gradient": dict(classifier="gradient"),
    "penalty": dict(classifier="penalty"),
    "not equal": dict(equal=False),
    "not orthogonal": dict(orthogonal=False),
    "CLIP": dict(orthogonal=False),                                    # with --prototypes CLIP.npy
    "masked": dict(init="masked", orthogonal=False),
    "masked, orthogonal": dict(init="masked"),
    **{f"T = {T}": dict(length=float(T)) for T in range(1, 6)},
    **{f"seed {seed}": dict(seed=seed) for seed in range(4)},
}


def check_config(cfg):
    """UserError for a setting that cannot work, before anything is read or written."""
    above = ("batch_size", "iterations", "crop", "length", "tau", "lr", "head_lr", "save_every", "eval_every")
    for name in above:
        if getattr(cfg, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be above 0.")
    for name in ("w_centroid", "w_category", "weight_decay", "size", "warmup", "workers", "head_channels"):
        if getattr(cfg, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must not be negative.")
    if cfg.prototypes and not cfg.table and (cfg.init == "masked" or cfg.classifier == "learnable"):
        other = "--init masked" if cfg.init == "masked" else "--classifier learnable"
        raise UserError(f"--prototypes and {other} exclude each other: give one of them.")
    if cfg.stage_decay != 1 and cfg.backbone not in ("convnext_small", "convnext_base"):
        raise UserError(f"--stage-decay is for convnext_small and convnext_base, not {cfg.backbone}: drop it.")
    if cfg.prototypes and not cfg.prototypes.endswith(".npy"):
        raise UserError(f"--prototypes {cfg.prototypes}: must be a .npy file, written with numpy.save.")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if cfg.batch_size % world or cfg.batch_size // world < 2:
        raise UserError(f"--batch-size {cfg.batch_size} for {world} process(es): each needs the same number of "
                        "images, two at least for batch norm; choose a multiple.")


# ---- prototypes (Sec. 3.2, Alg. 1) ---------------------------------------------------------------------------

def gram_schmidt(rows):
    """Algorithm 1, lines 3-11: orthogonal rows by the classical Gram-Schmidt process, not rescaled.

    rows (N,C) -> (N,C) float64; in float32 a square case (N = C = 256) ends 5.7e-3 off orthogonal. ValueError if
    N > C, or if a row is a combination of those before it: what is left of it would be rounding noise.
    """
    num_classes, channels = rows.shape
    if num_classes > channels:
        raise ValueError(f"{num_classes} classes cannot have mutually orthogonal prototypes in {channels} channels:"
                         f" make the decode head wider (--head-channels {num_classes} or more).")
    rows = rows.double()
    basis = rows.clone()                                               # beta, filled from the top
    for i in range(num_classes):
        earlier = basis[:i]                                            # (i,C)
        v = earlier @ rows[i] / (earlier * earlier).sum(1)             # (i,) line 7, of the original row a_i
        basis[i] = rows[i] - v @ earlier                               # lines 8 and 10
        if basis[i].norm() <= 1e-9 * rows[i].norm():
            raise ValueError(f"row {i} of the prototypes is zero or a linear combination of the rows before it: give "
                             "other rows, or --no-orthogonal.")
    return basis


def category_basis_prototypes(num_classes, channels, length=2.0, rows=None, orthogonal=True, equal=True, seed=0):
    """Category-Basis Prototypes W (N,C) float32: Kaiming draw, Gram-Schmidt, equal l2 norm `length` (= T).

    rows (N,C) replaces the random draw (Table 5: CLIP, masked); the draw depends on `seed` alone. orthogonal=False
    skips Gram-Schmidt, equal=False the rescaling, so it ignores `length` (Table 5). For N < C the same as
    nn.init.orthogonal_ with gain T on the same Gaussian. ValueError as gram_schmidt, or for a zero row.
    """
    if rows is None:
        generator = torch.Generator().manual_seed(seed)                # its own: W must not depend on other draws
        rows = nn.init.kaiming_normal_(torch.empty(num_classes, channels), generator=generator)
    if tuple(rows.shape) != (num_classes, channels):
        raise ValueError(f"prototypes of shape {tuple(rows.shape)} do not fit {num_classes} classes in {channels} "
                         "channels.")
    W = gram_schmidt(rows) if orthogonal else rows.double()
    if equal:
        norms = W.norm(dim=1, keepdim=True)
        if norms.min() == 0:
            raise ValueError(f"prototype row {int(norms.argmin())} is zero and cannot be given a length.")
        W = length * W / norms                                         # line 12 [D1]
    return W.float()


def class_separability(prototypes):
    """CS of Eq. (8): half the sum of cosines over ordered pairs of different rows. (N,C) -> float.

    The sum is signed and can cancel: CS = 0 does not imply orthogonality (a simplex has -N/2). The paper calls a
    large CS "large separability" though it means the opposite.
    """
    unit = F.normalize(prototypes.detach().cpu().double(), dim=1)
    return 0.5 * float((unit @ unit.T).fill_diagonal_(0).sum())


def mean_abs_cosine(prototypes):
    """Mean |cos| over pairs of different rows, (N,C) -> float: 0 only for orthogonal rows. Ours, beside Eq. (8)."""
    unit = F.normalize(prototypes.detach().cpu().double(), dim=1)
    return float((unit @ unit.T).fill_diagonal_(0).abs().sum()) / max(len(unit) * (len(unit) - 1), 1)


# ---- OCCL (Sec. 3.3) -----------------------------------------------------------------------------------------

def split_views(labels, num_classes, mode="ordered"):
    """Cut the pixels of every class into two views (Sec. 3.3) [D7]: floor(n/2) to view 1, the rest to view 2.

    labels (B,H,W) int64 -> (B,H,W) int64: 1 or 2, and 0 where ignored. mode "ordered": the first half in batch,
    row, column order; "random": a random half (torch's RNG). No loop over classes, no waiting for the GPU.
    """
    if mode not in ("ordered", "random"):
        raise ValueError(f"views can be cut 'ordered' or 'random', not {mode!r}")
    label = labels.flatten()                                           # (P,)
    label = torch.where((label >= 0) & (label < num_classes), label, num_classes)     # the ignored: a last class
    pixels = torch.arange(len(label), device=label.device)
    shuffled = torch.randperm(len(label), device=label.device) if mode == "random" else pixels
    order = shuffled[label[shuffled].argsort(stable=True)]             # pixels by class; within one as they came
    count = torch.zeros(num_classes + 1, dtype=torch.int64, device=label.device)
    count.scatter_add_(0, label, torch.ones_like(label))               # (N+1,)
    first = count.cumsum(0) - count                                    # where a class starts in `order`
    place = torch.empty_like(pixels).scatter_(0, order, pixels) - first[label]        # 0..n-1 inside its class
    views = torch.where(place < count[label] // 2, 1, 2)
    return torch.where(label < num_classes, views, 0).view(labels.shape)


def view_centroids(features, labels, views, num_classes):
    """Eq. (3): mean feature of every class in either view.

    features (B,C,H,W), labels and views (B,H,W) -> centroids (2,N,C), zero where a view is empty, and counts
    (2,N), the pixels behind each, both in the features' dtype.
    """
    pixels = features.permute(0, 2, 3, 1).flatten(0, 2)                # (P,C)
    key = torch.where(views > 0, (views - 1) * num_classes + labels, 2 * num_classes).flatten()  # last: ignored
    sums = pixels.new_zeros(2 * num_classes + 1, pixels.shape[1]).index_add(0, key, pixels)
    counts = pixels.new_zeros(2 * num_classes + 1).index_add(0, key, pixels.new_ones(len(key)))
    centroids = sums[:-1] / counts[:-1, None].clamp(min=1)
    return centroids.view(2, num_classes, -1), counts[:-1].view(2, num_classes)


def mean_over_valid(loss, counts):
    """loss (2,N) -> (2,): mean over the classes with pixels in both views [D6]; 0, zero gradient, if none has."""
    valid = (counts > 0).all(0)                                        # (N,)
    return torch.where(valid, loss, 0.0).sum(1) / valid.sum().clamp(min=1)


def centroid_loss(centroids, counts, tau=0.07):
    """L_v of Eq. (4) [D2][D3][D5][D6]; centroids (2,N,C), counts (2,N) -> (2,), one value for each view x.

    L_v(x) = mean_i -log e^p_i / (e^p_i + sum_{j != i} e^{cos(v_xi, SG(s_j)) / tau}),   p_i = cos(v_1i, v_2i) / tau
    """
    v = F.normalize(centroids, dim=2)                                  # (2,N,C)
    category = F.normalize(centroids.mean(0), dim=1).detach()          # (N,C) s: mean of the two VCs; SG
    positive = (v[0] * v[1]).sum(1) / tau                              # (N,) p_i: gradient into both views
    scores = v @ category.T / tau                                      # (2,N,N)
    absent = ~(counts > 0).all(0)
    scores = scores.masked_fill(absent, -torch.inf)                    # a class without centroid is no negative
    own = torch.eye(len(absent), dtype=torch.bool, device=absent.device)
    scores = torch.where(own, positive[:, None], scores)               # the diagonal is p_i
    return mean_over_valid(scores.logsumexp(2) - positive, counts)


def category_loss(centroids, counts, prototypes, tau=0.07):
    """L_c of Eq. (5) [D2][D4][D5][D6]; centroids (2,N,C), counts (2,N), prototypes (N,C) -> (2,).

    L_c(x) = mean_i -log softmax_j( cos(v_xi, w_j) / tau ) at j = i; the keys are all N prototypes.
    """
    scores = F.normalize(centroids, dim=2) @ F.normalize(prototypes, dim=1).T / tau       # (2,N,N)
    return mean_over_valid(-scores.log_softmax(2).diagonal(dim1=1, dim2=2), counts)


def shrink_labels(labels, size):
    """Labels (B,H,W) at the features' (h,w) by nearest [D7]."""
    return F.interpolate(labels[:, None].float(), size, mode="nearest")[:, 0].long()


def occl_loss(features, labels, prototypes, w_centroid, w_category, tau=0.07, mode="ordered"):
    """Online Centroid Contrastive Loss, Eq. (6): half of (lambda (L_v1 + L_v2) + phi (L_c1 + L_c2)).

    features (B,C,h,w), labels (B,H,W) at any size, 255 ignored, prototypes (N,C) -> scalar; the images of this
    process only [D12]. Always in float32: means over thousands of pixels, divided by 0.07, do not
    survive bfloat16. 0 with zero gradient where nothing is labelled.
    """
    with torch.autocast(features.device.type, enabled=False):
        labels = shrink_labels(labels, features.shape[2:])
        views = split_views(labels, len(prototypes), mode)
        centroids, counts = view_centroids(features.float(), labels, views, len(prototypes))
        return (w_centroid * centroid_loss(centroids, counts, tau).sum()
                + w_category * category_loss(centroids, counts, prototypes.float(), tau).sum()) / 2


# ---- model ---------------------------------------------------------------------------------------------------

class PrototypeClassifier(nn.Module):
    """Logits = inner products of features and prototypes (Eq. 1-2): no bias, no normalisation [D8][D9].

    update (Table 4): "frozen" (the paper) and "ema" keep W in a buffer, which is saved but unknown to the
    optimizer and its weight decay; "gradient" trains it; "penalty" trains it with rows held at length T.
    """

    def __init__(self, prototypes, update="frozen", length=2.0):
        super().__init__()
        self.update, self.length = update, length
        if update in ("frozen", "ema"):
            self.register_buffer("prototypes", prototypes)             # (N,C)
        else:
            self.prototypes = nn.Parameter(prototypes)

    def rows(self):
        """(N,C): the rows that multiply the features."""
        return self.length * F.normalize(self.prototypes, dim=1) if self.update == "penalty" else self.prototypes

    def forward(self, features):
        return F.conv2d(features, self.rows()[:, :, None, None])       # (B,C,h,w) -> (B,N,h,w)

    @torch.no_grad()
    def ema_step(self, category, present, momentum=0.999):
        """w_i <- m w_i + (1 - m) T s_i/|s_i| for classes present, then length T. category (N,C), present (N,) bool.

        Table 4 "EMA" [D14].
        """
        moved = momentum * self.prototypes + (1 - momentum) * self.length * F.normalize(category, dim=1)
        moved = self.length * F.normalize(moved, dim=1)
        self.prototypes.copy_(torch.where(present[:, None], moved, self.prototypes))


class LearnableClassifier(nn.Conv2d):
    """The baseline: mmsegmentation's 1x1 convolution with bias, drawn from N(0, 0.01^2)."""

    def __init__(self, channels, num_classes):
        super().__init__(channels, num_classes, 1)
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)

    def rows(self):
        return self.weight.flatten(1)


class Segmenter(nn.Module):
    """Image (B,3,H,W) -> logits (B,N,h,w), features (B,C,h,w) for OCCL, logits of the auxiliary head or None."""

    def __init__(self, network, classifier):
        super().__init__()
        self.network, self.classifier = network, classifier
        self.dropout = nn.Dropout2d(0.1)                               # of whole channels, in the pixel path only

    def forward(self, x):
        features, aux_logits = self.network(x)
        return self.classifier(self.dropout(features)), features, aux_logits


@torch.no_grad()
def class_means_of_backbone(network, loader, num_classes, device):
    """Table 5 "Masked": mean feature of the backbone's last level over each class's training pixels, (N,C4)."""
    total, pixels = 0, 0
    network.eval()
    for batch in tqdm(loader, desc="class means", leave=False, disable=None):
        deepest = network.backbone(batch["image"].to(device))[-1].float()                 # (1,C4,h,w)
        labels = shrink_labels(batch["mask"].to(device), deepest.shape[2:])
        one_view = (labels < num_classes).long()
        means, counts = view_centroids(deepest, labels, one_view, num_classes)
        total, pixels = total + means[0] * counts[0][:, None], pixels + counts[0]
    return (total / pixels.clamp(min=1)[:, None]).cpu()


def initial_rows(cfg, network, train_set, device):
    """Rows (N,C) that replace the random draw (Table 5): from --prototypes, or of --init masked; None otherwise."""
    num_classes, channels = train_set.num_classes, network.channels
    if cfg.prototypes:
        try:
            rows = torch.from_numpy(np.load(cfg.prototypes, allow_pickle=False).astype(np.float32))
        except (OSError, ValueError) as error:
            raise UserError(f"--prototypes {cfg.prototypes} cannot be read ({error}): write an N x C array of "
                            "numbers with numpy.save.") from None
        if rows.shape != (num_classes, channels) or not rows.isfinite().all():
            raise UserError(f"--prototypes {cfg.prototypes} holds {tuple(rows.shape)}, but finite numbers of shape "
                            f"({num_classes}, {channels}) are needed; --head-channels sets the {channels}.")
        return rows
    if cfg.init == "random":
        return None
    loader = loaders.eval_loader(loaders.TestView(train_set, cfg.size), cfg.workers, device)
    rows = class_means_of_backbone(network.to(device), loader, num_classes, device)
    if rows.shape[1] != channels:
        raise UserError(f"--init masked: the backbone's last level has {rows.shape[1]} channels, the features "
                        f"{channels}; set --head-channels {rows.shape[1]}.")
    for name, row in zip(train_set.classes, rows):
        if not row.any():
            raise UserError(f"--init masked: no training pixel of {name} is left at the backbone's stride, so it has "
                            "no mean; use --init random.")
    return rows


def build_model(cfg, num_classes, weights="none", train_set=None, device="cpu"):
    """The preset's network with prototypes in place of its last 1x1 convolution. UserError as its parts raise it.

    A model that is about to load a checkpoint needs neither weights nor train_set (for --prototypes, --init).
    """
    network = build_network(cfg.backbone, cfg.head, num_classes, cfg.head_channels, weights)
    if cfg.classifier == "learnable":
        return Segmenter(network, LearnableClassifier(network.channels, num_classes))
    rows = initial_rows(cfg, network, train_set, device) if train_set is not None else None
    try:
        prototypes = category_basis_prototypes(num_classes, network.channels, cfg.length, rows, cfg.orthogonal,
                                               cfg.equal, cfg.seed)
    except ValueError as error:
        raise UserError(str(error)) from None
    update = "frozen" if cfg.classifier == "cbp" else cfg.classifier
    return Segmenter(network, PrototypeClassifier(prototypes, update, cfg.length))


# ---- losses and one training step ----------------------------------------------------------------------------

def pixel_loss(logits, labels):
    """L_p of Eq. (7): cross-entropy after bilinear upsampling, mean over labelled pixels [D10]; 0 if there is none.

    logits (B,N,h,w), labels (B,H,W) -> scalar. Upsampling and the product by W commute: N maps are resized, not C.
    """
    logits = F.interpolate(logits.float(), labels.shape[1:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(logits, labels, ignore_index=255, reduction="sum")
    return total / (labels != 255).sum().clamp(min=1)


def penalty_loss(rows):
    """Table 4 "Penalty" [D14]: mean squared cosine between different rows, (N,C) -> scalar."""
    cosine = F.normalize(rows, dim=1) @ F.normalize(rows, dim=1).T
    return (cosine.square().sum() - len(rows)) / (len(rows) * (len(rows) - 1))


def losses_of(model, x, labels, cfg):
    """The terms of Eq. (7) for x (B,3,H,W), labels (B,H,W): dict of scalars to be summed; and features (B,C,h,w).

    model: the Segmenter, or DistributedDataParallel around it.
    """
    rows = getattr(model, "module", model).classifier.rows()
    with run.autocast(x.device, cfg.amp):
        logits, features, aux_logits = model(x)
    losses = dict(ce=pixel_loss(logits, labels))
    if aux_logits is not None:
        losses["aux"] = 0.4 * pixel_loss(aux_logits, labels)           # mmsegmentation's auxiliary head
    if cfg.w_centroid or cfg.w_category:
        losses["occl"] = occl_loss(features, labels, rows, cfg.w_centroid, cfg.w_category, cfg.tau, cfg.views)
    if cfg.classifier == "penalty":
        losses["penalty"] = 0.01 * penalty_loss(rows)
    return losses, features.detach()


@torch.no_grad()
def update_by_ema(classifier, features, labels, cfg):
    """Table 4 "EMA": one step of the prototypes towards this batch's Category Centroids, averaged over ranks."""
    labels, num_classes = shrink_labels(labels, features.shape[2:]), len(classifier.prototypes)
    views = split_views(labels, num_classes, cfg.views)
    centroids, counts = view_centroids(features.float(), labels, views, num_classes)
    present = (counts > 0).all(0).float()[:, None]                     # (N,1)
    total = torch.cat([centroids.mean(0) * present, present], dim=1)   # (N,C+1)
    if dist.is_initialized():
        dist.all_reduce(total)
    classifier.ema_step(total[:, :-1] / total[:, -1:].clamp(min=1), total[:, -1] > 0)


def train_step(model, net, optimizer, scheduler, x, labels, cfg):
    """One iteration; returns the terms of Eq. (7), detached, on the device. net: the Segmenter inside model."""
    losses, features = losses_of(model, x, labels, cfg)
    optimizer.zero_grad(set_to_none=True)
    sum(losses.values()).backward()                                    # Eq. (7)
    optimizer.step()
    scheduler.step()
    if cfg.classifier == "ema":
        update_by_ema(net.classifier, features, labels, cfg)
    return {name: value.detach() for name, value in losses.items()}


def parameter_groups(net, cfg):
    """Learning rate and weight decay of every parameter, by mmsegmentation's rules for each model (Sec. 4.1).

    Head: lr x head_lr. SGD: decay everywhere. AdamW: none for LayerNorm and Swin's position tables. stage_decay
    (ConvNeXt): lr x stage_decay^k, k = 13 for stem and downsampling and 12 - i for stage i; no decay for 1-d.
    """
    groups = {}
    for module_name, module in net.named_modules():
        path = module_name.split(".")                                  # network.backbone.stages.i.(0|1)...
        for name, parameter in module.named_parameters(recurse=False):
            lr, decay = cfg.lr, cfg.weight_decay
            if path[:2] != ["network", "backbone"]:
                lr *= cfg.head_lr
            elif cfg.stage_decay != 1 and path[2] == "stages":
                lr *= cfg.stage_decay ** (13 if path[4] == "0" else 12 - int(path[3]))
            exempt = isinstance(module, nn.LayerNorm) or name == "relative_position_bias_table"
            if cfg.optimizer == "adamw" and (exempt or cfg.stage_decay != 1
                                             and (parameter.ndim == 1 or name == "layer_scale")):
                decay = 0.0
            groups.setdefault((lr, decay), []).append(parameter)
    return [dict(params=params, lr=lr, weight_decay=decay) for (lr, decay), params in groups.items()]


def build_optimizer(net, cfg, device):
    fused = device.type == "cuda"
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(parameter_groups(net, cfg), lr=cfg.lr, momentum=0.9, fused=fused)
    return torch.optim.AdamW(parameter_groups(net, cfg), lr=cfg.lr, fused=fused)


# ---- training ------------------------------------------------------------------------------------------------

def to_device(batch, device):
    cuda = device.type == "cuda"                                       # only there are batches in pinned memory
    x = batch["image"].to(device, non_blocking=cuda, memory_format=torch.channels_last)
    return x, batch["mask"].to(device, non_blocking=cuda)


def prepare(cfg, train_set, device, rank, world):
    """Model (DistributedDataParallel around net, or net), net, its optimizer and scheduler, and the progress so far.

    Makes the run folder once the model stands, so that a mistake in the options leaves nothing behind.
    """
    last = Path(cfg.out) / "last.pt"
    resumes = cfg.resume and last.exists()                             # killed before the first: start again
    torch.manual_seed(cfg.seed)
    if resumes:
        net = build_model(cfg, train_set.num_classes)
    else:
        net = build_model(cfg, train_set.num_classes, cfg.weights, train_set, device)
    run.start_run(cfg, rank)
    model = run.distribute(net.to(device, memory_format=torch.channels_last), device, world)
    net = getattr(model, "module", model)
    optimizer = build_optimizer(net, cfg, device)
    scheduler = run.poly_schedule(optimizer, cfg.iterations, cfg.power, cfg.floor, cfg.warmup)
    torch.manual_seed(cfg.seed + 1 + rank)                             # dropout differs between ranks
    progress = dict(iteration=0, seconds=0.0, classes=train_set.classes, log=[], sums={})
    if resumes:
        progress = run.load_checkpoint(last, dict(model=net, optimizer=optimizer, scheduler=scheduler), device)
    return model, net, optimizer, scheduler, progress


def train(cfg, device, rank=0, world=1):
    """Train, evaluate, analyse, draw. Returns what metrics.json holds (None on other ranks than 0)."""
    splits = (cfg.train_split, cfg.val_split, cfg.test_split)
    train_set, val_set, test_set = (datasets.open_dataset(cfg.dataset, cfg.data, split) for split in splits)
    model, net, optimizer, scheduler, progress = prepare(cfg, train_set, device, rank, world)
    out, start, log, sums = Path(cfg.out), progress["iteration"], progress["log"], progress["sums"]
    view = loaders.TrainView(train_set, cfg.size, cfg.crop)
    loader = loaders.train_loader(view, cfg.batch_size, cfg.seed, start, cfg.iterations, cfg.workers, device,
                                  rank, world)
    val_loader = loaders.eval_loader(loaders.TestView(val_set, cfg.size), cfg.workers, device, rank, world)
    parts = dict(model=net, optimizer=optimizer, scheduler=scheduler)
    model.train()

    def step(batch):
        return train_step(model, net, optimizer, scheduler, *to_device(batch, device), cfg)

    def read_batch():
        return default_collate([view[(i % len(view), i)] for i in range(cfg.batch_size // world)])

    if rank == 0 and 0 < cfg.iterations <= cfg.warmup:
        print(f"note: the learning rate never leaves its warm-up of {cfg.warmup} iterations; --schedule shortens both")
    if start < cfg.iterations:
        images = -(-(cfg.iterations - start) // cfg.eval_every) * len(val_set) + len(test_set)
        run.announce(step, read_batch, parts, cfg.iterations - start, images, cfg, device, rank, world)
    began = time.perf_counter() - progress["seconds"]
    bar = tqdm(loader, total=cfg.iterations, initial=start, desc="train", leave=False, disable=True if rank else None)
    for iteration, batch in enumerate(bar, start + 1):
        for name, value in step(batch).items():
            sums[name] = sums.get(name, 0.0) + value                   # stays on the device: no sync per step
        saves = iteration % cfg.save_every == 0 or iteration == cfg.iterations
        evaluates = iteration % cfg.eval_every == 0 or iteration == cfg.iterations
        if saves or evaluates:
            means = mean_losses(sums, (iteration - 1) % cfg.eval_every + 1, iteration)
        if evaluates:
            score = evaluate(net, val_loader, val_set.num_classes, cfg, device, rank)
            row = dict(iteration=iteration, lr=scheduler.get_last_lr()[0], **means, miou=score["miou"],
                       macc=score["macc"], pixel_acc=score["pixel_acc"], seconds=time.perf_counter() - began)
            log.append(row)
            sums.clear()
            if rank == 0:
                tqdm.write(f"iteration {iteration}: " + ", ".join(f"{k} {v:.3f}" for k, v in means.items())
                           + f", {cfg.val_split} mIoU {row['miou']:.1f}, {run.duration(row['seconds'])}")
        if saves:
            run.share_buffers(net)
            progress |= dict(iteration=iteration, seconds=time.perf_counter() - began)
            run.save_checkpoint(out / "last.pt", parts, progress)
            if rank == 0 and log:
                run.write_csv(out / "log.csv", log)
    return report(net, cfg, train_set, test_set, progress, device, rank, world)


def mean_losses(sums, steps, iteration):
    """{name: sum on the device} -> {name: mean as a float} (rank 0 logs its own). UserError if one is not finite."""
    means = {name: float(value) / steps for name, value in sums.items()}
    if not all(map(np.isfinite, means.values())):
        raise UserError(f"the loss is not finite ({means}) by iteration {iteration}: lower --lr, or use --amp off; "
                        "--resume goes back to the last good checkpoint.")
    return means


# ---- evaluation ----------------------------------------------------------------------------------------------

@torch.inference_mode()
def predict_labels(net, x, size, cfg):
    """Images x (B,3,h,w) -> predicted class ids (B,H,W) int64 at `size` (H,W).

    mmsegmentation's order: logits to the network's input size, to the label's own size, both bilinear, argmax.
    """
    with run.autocast(x.device, cfg.amp):
        logits = net(x)[0]
    for target in (x.shape[2:], size):
        if logits.shape[2:] != target:
            logits = F.interpolate(logits.float(), target, mode="bilinear", align_corners=False)
    return logits.argmax(1)


def evaluate(net, loader, num_classes, cfg, device, rank=0):
    """Rates over the split in percent (common/metrics.py), summed over ranks. Single scale, no flip (Sec. 4.1)."""
    training, tuned = net.training, torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False                             # every image may have another size
    run.share_buffers(net)
    net.eval()
    confusion = ConfusionMatrix(num_classes, device)
    for batch in tqdm(loader, desc="evaluate", leave=False, disable=True if rank else None):
        x, labels = to_device(batch, device)
        confusion.update(labels, predict_labels(net, x, labels.shape[1:], cfg))
    confusion.all_reduce()
    net.train(training)
    torch.backends.cudnn.benchmark = tuned
    return confusion.summary()


LOOKALIKES = {                                                         # Table 6 and Fig. 6; ids count from 0
    "ade20k": [(127, 116), (53, 59), (19, 23), (118, 124)],            # bicycle + minibike, stairs + stairway, ...
    "camvid": [(9, 10), (3, 4), (2, 6)],                               # pedestrian + bicyclist, road + pavement, ...
    "cocostuff10k": [(56, 57), (43, 44), (68, 69)],                    # chair + couch, knife + spoon, ...
    "voc": [(9, 18), (2, 14), (8, 12)],                                # chair + sofa, bicycle + motorbike, cat + dog
    "toy_scenes": TOY_LOOKALIKES,
}
RARE_AND_FREQUENT = {"ade20k": (149, 146, 0)}                          # Table 7: flag, radiator, wall


def analyse(net, cfg, score, pixels, classes):
    """The paper's measures of both ambiguities, as entries of metrics.json.

    pixels (N,) int64: labelled training pixels of a class. Table 8: class_separability. Fig. 5: F1 averaged over
    up to 15 groups of classes, rarest first. Sec. 4.3: correlation of pixels and row norms. Table 6: IoU sums of
    look-alikes. Table 7: IoU of rare classes and of the most frequent one.
    """
    rows, iou, f1 = net.classifier.rows().detach().float().cpu(), score["iou"], score["f1"]
    norms = rows.norm(dim=1)
    seen = [i for i in pixels.argsort(stable=True).tolist() if f1[i] is not None]         # rarest first
    groups = [g.tolist() for g in np.array_split(seen, min(15, len(seen)))]
    pairs = [(a, b) for a, b in LOOKALIKES.get(cfg.dataset, []) if iou[a] is not None and iou[b] is not None]
    correlation = float(torch.corrcoef(torch.stack([norms, pixels.float()]))[0, 1])
    return dict(
        class_separability=class_separability(rows), mean_abs_cosine=mean_abs_cosine(rows),
        norm_pixel_correlation=correlation if norms.std() > 1e-5 * norms.mean() else None,
        training_pixels=dict(zip(classes, pixels.tolist())),
        f1_rarest_first=[dict(classes=[classes[i] for i in g], f1=float(np.mean([f1[i] for i in g])))
                         for g in groups],
        lookalike_iou_sums={f"{classes[a]} + {classes[b]}": iou[a] + iou[b] for a, b in pairs},
        rare_and_frequent_iou={classes[i]: iou[i] for i in RARE_AND_FREQUENT.get(cfg.dataset,
                                                                                 (*seen[:2], seen[-1]))})


def count_parameters(net):
    """Trained parameters and frozen prototypes."""
    return sum(p.numel() for p in net.parameters()) + sum(b.numel() for b in net.classifier.buffers())


def report(net, cfg, train_set, test_set, progress, device, rank, world):
    """Final evaluation on the test split, metrics.json and figures/ (rank 0 writes). Returns the metrics."""
    loader = loaders.eval_loader(loaders.TestView(test_set, cfg.size), cfg.workers, device, rank, world)
    score = evaluate(net, loader, test_set.num_classes, cfg, device, rank)
    if rank:
        return None
    classes, out = test_set.classes, Path(cfg.out)
    if all(rate is None for rate in score["iou"]):
        raise UserError(f"no pixel of the {cfg.test_split} split is labelled, so there is nothing to score: check "
                        "its masks, or choose another --test-split.")
    analysis = analyse(net, cfg, score, loaders.pixel_counts(train_set, cfg.workers), classes)
    absent = [classes[i] for i in score["absent"]]
    metrics = score | analysis | dict(
        iou=dict(zip(classes, score["iou"])), f1=dict(zip(classes, score["f1"])), absent=absent,
        split=cfg.test_split, preset=cfg.preset, seed=cfg.seed, classifier=cfg.classifier, w_centroid=cfg.w_centroid,
        w_category=cfg.w_category, iterations=progress["iteration"], seconds=round(progress["seconds"], 1),
        device=device.type, processes=world, parameters=count_parameters(net),
        trainable_parameters=sum(p.numel() for p in net.parameters()))
    run.write_json(out / "metrics.json", metrics)
    draw_figures(net, cfg, test_set, analysis, out / "figures", device)
    print(f"{cfg.test_split} mIoU {score['miou']:.1f}, mAcc {score['macc']:.1f}, pixel accuracy "
          f"{score['pixel_acc']:.1f}{'; no ' if absent else ''}{', '.join(absent)}; see {out}/metrics.json and "
          f"{out}/figures")
    return metrics


def draw_figures(net, cfg, test_set, analysis, folder, device):
    """Fig. 5 (f1_by_frequency.png), Fig. 6 (similarity_map.png), Fig. 7 (examples.png)."""
    net.eval()
    names, count = test_set.classes, len(test_set)
    view, grid, present = loaders.TestView(test_set, cfg.size), [], set()
    for i in sorted({round(k * (count - 1) / 3) for k in range(4)}):
        image, label = test_set.read(i)
        x = view[i]["image"][None].to(device)
        prediction = predict_labels(net, x, label.shape, cfg)[0].to(torch.uint8).cpu()
        present |= {*label.unique().tolist(), *prediction.unique().tolist()} - {255}
        grid.append([(image, test_set.name_of(i)), (figures.overlay(image, label), "label"),
                     (figures.overlay(image, prediction), "prediction")])
    figures.save_grid(folder / "examples.png", grid, title=f"{cfg.test_split} images",
                      legend={c: names[c] for c in sorted(present)})

    rows = F.normalize(net.classifier.rows().detach().float().cpu(), dim=1)
    pairs = [c for pair in LOOKALIKES.get(cfg.dataset, []) for c in pair]                # the look-alikes first
    some = list(dict.fromkeys(pairs + list(range(len(names)))))[:20]
    figures.save_matrix(folder / "similarity_map.png", rows[some] @ rows[some].T, [names[c] for c in some],
                        title="Cosine between the classifier's rows (Fig. 6)")
    groups = analysis["f1_rarest_first"]
    labels = [g["classes"][0] + (f" ... ({len(g['classes'])})" if len(g["classes"]) > 1 else "") for g in groups]
    figures.save_bars(folder / "f1_by_frequency.png", {f"{cfg.test_split} F1": [g["f1"] for g in groups]}, labels,
                      title="F1 by number of training pixels, rarest classes left (Fig. 5)")


# ---- use a trained run ---------------------------------------------------------------------------------------

def load_run(cfg, device):
    """The trained model of cfg.out in eval mode, and its progress."""
    path = Path(cfg.out) / "last.pt"
    classes = run.read_checkpoint(path)["progress"]["classes"]
    net = build_model(cfg, len(classes)).to(device, memory_format=torch.channels_last)
    return net.eval(), run.load_checkpoint(path, dict(model=net), device)


def evaluate_run(cfg, device, rank, world):
    """--eval-only: OUT/last.pt on --test-split, into metrics.json and figures/ again."""
    splits = (cfg.train_split, cfg.test_split)
    train_set, test_set = (datasets.open_dataset(cfg.dataset, cfg.data, split) for split in splits)
    net, progress = load_run(cfg, device)
    if progress["classes"] != test_set.classes:
        raise UserError(f"the run in {cfg.out} knows {len(progress['classes'])} classes and {cfg.dataset} in "
                        f"{cfg.data} has {len(test_set.classes)}, or other names: pass the --data of that run.")
    return report(net, cfg, train_set, test_set, progress, device, rank, world)


def predict(cfg, device):
    """--predict: for every image OUT/predictions/NAME.png (class ids, palette) and NAME_overlay.png."""
    net, progress = load_run(cfg, device)
    classes, folder = progress["classes"], Path(cfg.out) / "predictions"
    for path in tqdm(files.list_images(cfg.predict), desc="predict", disable=None):
        image = files.read_image(path)                                 # (3,H,W) uint8
        x = transforms.normalise(transforms.resize_to_short_side(image, cfg.size))[None].to(device)
        ids = predict_labels(net, x, image.shape[1:], cfg)[0].to(torch.uint8).cpu()
        figures.save_prediction(folder, path.stem, image, ids)
        share = 100 * torch.bincount(ids.flatten().long(), minlength=len(classes)) / ids.numel()
        top = [f"{classes[c]} {share[c]:.0f} %" for c in share.topk(min(3, len(share))).indices if share[c] > 0]
        tqdm.write(f"{path}: {', '.join(top)} -> {folder / path.stem}_overlay.png")


def profile(cfg, device):
    """--profile, Table 2: parameters, GFLOPs, memory and speed of the baseline and of CBP + OCCL; no data needed.

    GFLOPs are multiply-adds of one crop x crop image, as mmsegmentation counts. Memory is that of one training
    step at --batch-size on CUDA, not known elsewhere.
    """
    num_classes = datasets.NUM_CLASSES.get(cfg.dataset)
    if num_classes is None:
        num_classes = datasets.open_dataset(cfg.dataset, cfg.data, cfg.train_split).num_classes
    batch = torch.randn(cfg.batch_size, 3, cfg.crop, cfg.crop).to(device, memory_format=torch.channels_last)
    labels, x = torch.randint(num_classes, (cfg.batch_size, cfg.crop, cfg.crop)).to(device), batch[:1]
    lines, results = ["| model | parameters, M | GFLOPs | training, GiB | training, images/s | inference, images/s |",
                      "|---|---|---|---|---|---|"], {}
    for name in ("baseline", "CBP + OCCL"):
        row_cfg = replace(cfg, **ROWS[name])
        net = build_model(row_cfg, num_classes).to(device, memory_format=torch.channels_last)
        optimizer = build_optimizer(net, row_cfg, device)
        scheduler = run.poly_schedule(optimizer, cfg.iterations)
        parts = dict(model=net, optimizer=optimizer, scheduler=scheduler)
        step = (net, net, optimizer, scheduler, batch, labels, row_cfg)
        seconds, memory = run.measured_speed(lambda: train_step(*step), parts, device), None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            train_step(*step)
            memory = run.peak_memory(device)
        net.eval()
        forward = run.measured_speed(lambda: predict_labels(net, x, x.shape[2:], row_cfg), {}, device, repeats=11)
        counter = FlopCounterMode(display=False)
        with torch.inference_mode(), counter:
            net(x)
        row = dict(parameters=count_parameters(net), gflops=counter.get_total_flops() / 2e9, training_gib=memory,
                   training_images_per_second=cfg.batch_size / seconds, inference_images_per_second=1 / forward)
        results[name] = row
        lines.append(f"| {name} | {row['parameters'] / 1e6:.3f} | {row['gflops']:.1f} | "
                     f"{'-' if memory is None else f'{memory:.2f}'} | {cfg.batch_size / seconds:.1f} | "
                     f"{1 / forward:.1f} |")
    lines.append("\nPaper, SegFormer-B5 on an A6000: 82.1 M, 75.6 GFLOPs, 7 GB in training, 19.5 images/s.")
    print("\n".join(lines))
    about = dict(preset=cfg.preset, device=device.type, crop=cfg.crop, batch_size=cfg.batch_size)
    run.write_json(Path(cfg.out) / "profile.json", results | about)
    return results


# ---- tables of the paper -------------------------------------------------------------------------------------

# Paper: SegFormer-B0, ADE20K, 40K iterations. Row of ROWS: mIoU, mAcc; None = not printed, or lost.
TABLES = {
    3: {"baseline": (33.4, 44.4), "CBP": (33.5, 44.4), "OCCL": (34.3, 45.8), "CBP + OCCL": (35.1, 48.1)},
    4: {"CBP + OCCL": (35.1, 48.1), "EMA": (29.9, 41.8), "gradient": (34.6, 46.1), "penalty": (None, None)},
    5: {"CBP + OCCL": (35.1, 48.1), "not equal": (33.3, 44.6), "not orthogonal": (35.0, 47.8), "CLIP": (33.2, 45.2),
        "masked": (30.3, 41.7), "masked, orthogonal": (35.1, 48.0)},
    6: {"CBP + OCCL": (35.1, 48.1), "not orthogonal": (35.0, 47.8)},
    7: {"CBP + OCCL": (35.1, 48.1), "not equal": (33.3, 44.6)},
    8: {"CBP + OCCL": (35.1, 48.1), "not orthogonal": (35.0, 47.8), "gradient": (34.6, 46.1), "penalty": (None, None)},
    9: {f"T = {T}": (None, None) for T in range(1, 6)},
    10: {"seed 0": (35.1, 48.1), "seed 1": (34.9, 47.7), "seed 2": (35.2, 48.3), "seed 3": (34.8, 47.7)},
}
TABLE_NOTES = {
    3: "effect of the two modules", 4: "how the prototypes are updated",
    5: "initialisation of the prototypes; masked = class means of the backbone, which --weights none leaves untrained",
    6: "IoU sums of look-alikes; paper, without orthogonalisation: bike + minibike -0.3, stairs + stairway -1.0",
    7: "IoU of rare and frequent classes; paper, without equal lengths: flag -7.3, radiator -5.3, wall 0.0",
    8: "class separability CS, Eq. (8); paper: 0 for CBP, 6.2 not orthogonal, 75.8 gradient",
    9: "length T; the paper's rows are lost: mIoU 34.6 to 35.3, mAcc 47.6 to 48.2 over T = 1 to 5",
    10: "seeds; paper: mIoU 35.0 +- 0.2, mAcc 48.0 +- 0.3",
}


def run_table(cfg, device, rank, world):
    """--table: every row as a run in OUT/rows/, then OUT/tableN.md. Tables share rows; finished rows are kept."""
    out, found, missing = Path(cfg.out), {}, {}
    network = build_network(cfg.backbone, cfg.head, 2, cfg.head_channels)
    for name in TABLES[cfg.table]:
        if name == "CLIP" and not cfg.prototypes:
            missing[name] = "needs --prototypes FILE.npy"
        elif name.startswith("masked") and network.backbone.dims[3] != network.channels:
            missing[name] = f"needs --head-channels {network.backbone.dims[3]}"
        else:
            folder = out / "rows" / name.replace(" = ", "").replace(", ", "-").replace(" ", "-")
            row_cfg = replace(cfg, table=0, out=str(folder), prototypes=cfg.prototypes if name == "CLIP" else "",
                              **ROWS[name])
            if rank == 0:
                print(f"row {name} in {folder}", flush=True)
            found[name] = run.finished_row(train, row_cfg, device, rank, world)
    if rank == 0:
        text = "\n".join(table_lines(cfg, found, missing, device)) + "\n"
        with run.replacing(out / f"table{cfg.table}.md") as file:
            file.write(text)
        print(f"\n{text}\nwritten to {out}/table{cfg.table}.md")
    return found


def table_lines(cfg, found, missing, device):
    """Markdown of a table: our rates, what the table is about, the paper's rates. found: row -> metrics."""
    extra = {6: "lookalike_iou_sums", 7: "rare_and_frequent_iou"}.get(cfg.table)
    columns = list(next(iter(found.values()))[extra]) if extra else ["CS", "mean abs cos"] if cfg.table == 8 else []
    seed = "" if cfg.table == 10 else f", seed {cfg.seed}"
    lines = [f"Table {cfg.table}: {TABLE_NOTES[cfg.table]}. Preset {cfg.preset}, {cfg.iterations} iterations{seed}, "
             f"{cfg.test_split} split, {device.type}. Paper: SegFormer-B0, ADE20K, 40K iterations.\n",
             "| " + " | ".join(["row", "mIoU", "mAcc", *columns, "paper mIoU", "paper mAcc"]) + " |",
             "|" + "---|" * (5 + len(columns))]
    for name, paper in TABLES[cfg.table].items():
        m = found.get(name)
        cells = [f"not run ({missing[name]})", ""] if m is None else [f"{m['miou']:.1f}", f"{m['macc']:.1f}"]
        if m and extra:
            cells += ["-" if m[extra].get(c) is None else f"{m[extra][c]:.1f}" for c in columns]
        elif m and columns:
            cells += [f"{m['class_separability']:.2f}", f"{m['mean_abs_cosine']:.3f}"]
        cells += ["-" if rate is None else str(rate) for rate in paper]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if cfg.table == 10:
        rates = np.array([[m["miou"], m["macc"]] for m in found.values()])
        cells = [f"{mean:.1f} +- {std:.1f}" for mean, std in zip(rates.mean(0), rates.std(0, ddof=1))]
        lines.append(f"| mean | {' | '.join(cells)} | 35.0 +- 0.2 | 48.0 +- 0.3 |")
    return lines


def main(cfg):
    """Returns what the task returns, for use from Python."""
    check_config(cfg)
    device, rank, world = run.setup(cfg.device, cfg.seed)
    if cfg.table:
        return run_table(cfg, device, rank, world)
    if cfg.eval_only:
        return evaluate_run(cfg, device, rank, world)
    if cfg.profile or cfg.predict:
        return None if rank else profile(cfg, device) if cfg.profile else predict(cfg, device)
    return train(cfg, device, rank, world)


if __name__ == "__main__":                                             # guard: worker processes import this file
    run.run_script(main, Config, PRESETS, __doc__)
