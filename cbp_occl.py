"""CBP + OCCL: frozen orthogonal class prototypes as the classifier of a segmentation network, in one file.

Paper  J. Chen, D. Deguchi, C. Zhang, X. Zheng, H. Murase, "Frozen is better than learning: A new design of
       prototype-based classifier for semantic segmentation", Pattern Recognition 2024, article 110431.
       The authors released no code; networks and recipes follow mmsegmentation, as Sec. 4.1 says.
Idea   A learned 1x1 classifier gives similar classes similar rows (correlation ambiguity) and frequent ones
       long rows (prior ambiguity). So draw the rows once, make them orthogonal and equally long, and never
       train them. In training the Online Centroid Contrastive Loss (OCCL) gathers each class at its row.

Try    python cbp_occl.py                                            # toy scenes, a minute on a CPU: 53 mIoU
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
s_l      category_centroids   N,C      Category Centroid (CC): mean of the two VCs          Sec. 3.3
L_v      centroid_loss        2        the VCs of a class attract, other CCs repel          Eq. (4)
L_c      category_loss        2        a VC is drawn to its own prototype                   Eq. (5)
lambda   w_centroid           scalar   weight of L_v                                        Eq. (6)
phi      w_category           scalar   weight of L_c                                        Eq. (6)
tau      tau                  scalar   temperature, 0.07                                    Sec. 4.1
L_p      pixel_loss           scalar   cross-entropy of the pixels                          Eq. (7)
B images, N classes, C channels; h,w: sides of the features, H,W: of the labels; P = B h w pixels.

Where we read or do something else than is printed ([D*] marks the line):
[D1] Alg. 1 line 12 is written for the whole list; we divide row by row: w = T b / sqrt(b.b).
[D2] Eq. (4) and (5) print a sum of ratios. Minimising a ratio would push the two views apart, and the text
     says InfoNCE, so it is -log(ratio). A test shows both directions.
[D3] Eq. (4) prints v_j.SG_j in the denominator: a class against its own centroid. Sec. 1 wants a VC apart
     from the other CCs, so it is v_i.SG(s_j): the anchor against the other classes' stop-gradient CCs.
[D4] Eq. (5) prints v_j.w_j. The text calls the frozen prototypes the keys, so it is v_i against every w_j.
[D5] All products inside OCCL are cosines (v, s and w are l2-normalised): 0.07 is a temperature for cosines;
     raw products run to a loss of hundreds. So T does not change OCCL; it scales the pixel logits only.
[D6] Mean over the classes that both views hold, not a sum over all N: absent classes have no centroid.
[D7] "Equally divide y": per class, the first half of its pixels in batch, row, column order, and the rest.
     Cuts mostly between images and objects, the paper's idea of a view. A class of one pixel is left out.
     --views random halves at random. Labels are shrunk to the features' size by nearest: the top left pixel
     of each block, 1.5 pixels from the feature's place at stride 4.
[D8] The features of Eq. (1) are not normalised, though Sec. 3.2 says that only the cosine counts, which is
     true of the argmax: with unit features and T = 2 the cross-entropy of 150 classes stays above 3.04.
[D9] g of Eq. (1) is left out, as in Eq. (7): F is the decode head's output. No projection, and no bias,
     which would be a prior again. Dropout2d is for the pixels' logits alone: OCCL sees F before it.
     Auxiliary heads keep a learned classifier.
[D10] Cross-entropy averages over labelled pixels (PyTorch); mmsegmentation divides by all, 255 included.
[D11] "For convolution models the optimizer is SGD" holds for FCN; ConvNeXt takes mmsegmentation's AdamW.
     FCN's ResNet has torchvision's 7x7 stem, not three 3x3 convolutions. Its depth (101) and ConvNeXt's size
     (B) are our guesses: the table that names them is lost.
[D12] OCCL sees the images of one GPU: 8 GPUs with 2 images each contrast fewer classes than one with 16.
[D13] The paper prints neither the momentum of "EMA" (0.999 as in ProtoSeg; centroid and result get length T)
     nor the formula of "Penalty" (penalty_loss). Where rows learn, the gradient of L_c reaches them.
[D14] Every head ends in a ReLU: F is never negative, W has both signs. With 150 rows in 256 channels a
     feature comes at best to a cosine of 0.70 with its own row (0.57 with the worst one), and these best
     features of two classes have 0.32, where L_v wants less. --no-last-relu (ours) takes the ReLU away.
[D15] On CUDA the network computes in bfloat16, both losses in float32.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common import cbp_occl_figures as gallery, cbp_occl_measures as measures, cbp_occl_walkthrough
from common import datasets, files, run, segmentation, speed, survey, tables
from common.backbones import build_network, check_sides, class_means_of_backbone, parameter_groups
from common.cbp_occl_page import PAGE
from common.cbp_occl_tables import BESIDE, FIGURES, PAPER, ROWS, SWEEP, TABLES
from common.loaders import TestView, TrainView, eval_loader, to_device, train_loader
from common.report import write_report
from common.run import RunConfig, UserError, opt


# ---- options and recipes ---------------------------------------------------------------------------------

@dataclass
class Config(RunConfig):
    dataset: str = opt("toy_scenes", "which data set the folder --data holds", choices=datasets.DATASETS)
    ignore: int = opt(None, "folder: value of unlabelled pixels in masks, besides 255 (data/README.md)",
                      at_least=0, at_most=255)
    train_split: str = opt("train", "split to train on; voc also has trainaug")
    val_split: str = opt("val", "split that is evaluated during training")
    test_split: str = opt("val", "split that is evaluated at the end and by --eval-only", evaluation=True)
    backbone: str = opt("mit_b0", "network before the head; common/backbones.py tells which go together")
    head: str = opt("segformer", "segformer = all-MLP head", choices=("segformer", "fcn", "upernet"))
    head_channels: int = opt(0, "C, width of the features, at least N; 0 = the head's own", at_least=0)
    weights: str = opt("imagenet", "backbone: imagenet (torchvision's), none, a file or a URL", source=True)
    window: int = opt(0, segmentation.WINDOW, at_least=0, evaluation=True)
    size: int = opt(512, "short side after resizing, in training x 0.5 to 2; 0 = as it is", at_least=0)
    crop: int = opt(512, "training crop in pixels; lower it if memory runs out", above=0)
    batch_size: int = opt(16, "images over all GPUs; halve it if memory runs out, and --lr too", above=0)
    iterations: int = opt(160000, "training steps", above=0, schedule=True)
    warmup: int = opt(1500, "iterations of linear learning-rate warm-up", at_least=0, schedule=True)
    eval_every: int = opt(16000, "iterations between two rows of log.csv", above=0, schedule=True)
    save_every: int = opt(1000, "iterations between two checkpoints", above=0, runtime=True)
    optimizer: str = opt("adamw", "adamw, or sgd with momentum 0.9", choices=("adamw", "sgd"))
    lr: float = opt(6e-5, "learning rate of the backbone", above=0)
    head_lr: float = opt(10.0, "learning rate of the head as a multiple of --lr", above=0)
    weight_decay: float = opt(0.01, "of the optimizer; frozen prototypes have none", at_least=0)
    power: float = opt(1.0, "exponent of the polynomial learning-rate decay", at_least=0)
    floor: float = opt(0.0, "learning rate where the decay ends", at_least=0)
    stage_decay: float = opt(1.0, "ConvNeXt: rate of a group of layers / rate of the next", above=0)
    last_relu: bool = opt(True, "ReLU at the end of the head; without it F has both signs [D14]")
    classifier: str = opt("cbp", "cbp = frozen prototypes, learnable = ordinary 1x1 convolution; the others "
                          "are Table 4", choices=("cbp", "learnable", "ema", "gradient", "penalty"))
    init: str = opt("random", "initial rows; masked = class means (Table 5)", choices=("random", "masked"))
    prototypes: str = opt("", "N x C .npy file of initial rows, e.g. CLIP text embeddings (Table 5)")
    orthogonal: bool = opt(True, "Gram-Schmidt (Alg. 1 lines 3-11)")
    equal: bool = opt(True, "rescale every prototype to --length (Alg. 1 line 12)")
    length: float = opt(2.0, "T, l2 norm of the prototypes; scales the pixel logits", above=0)
    w_centroid: float = opt(1.0, "lambda, weight of the centroid loss; 0 switches it off", at_least=0)
    w_category: float = opt(0.3, "phi, weight of the category loss; 0 switches it off", at_least=0)
    tau: float = opt(0.07, "temperature of OCCL", above=0)
    views: str = opt("ordered", "how a class is cut into two views [D7]", choices=("ordered", "random"))
    baseline: str = opt("", "folder of another finished run, shown beside this one in figures", runtime=True)
    eval_only: bool = opt(False, "evaluate OUT/last.pt on --test-split", uses_run=True)
    predict: str = opt("", "image or folder to label: files go into OUT/predictions", uses_run=True)
    profile: bool = opt(False, "parameters, GFLOPs, memory and speed of this model (Table 2)", runtime=True)
    walkthrough: bool = opt(False, "Alg. 1 and Eq. (3) to (6) on two classes and six pixels, in numbers",
                            runtime=True)
    table: int = opt(0, "train and print this table (Table 2: --profile)", runtime=True,
                     choices=(0, 3, 4, 5, 6, 7, 8, 9, 10))
    figure: int = opt(0, "4 = train and draw sweeps of lambda and phi", runtime=True, choices=(0, 4))


# Optimizer and schedule are mmsegmentation's for each model (Sec. 4.1), batch 16 and crop 512 the paper's.
ADE20K = dict(dataset="ade20k")                                        # 160K iterations, 150 classes
COCO = dict(dataset="cocostuff10k", val_split="test", test_split="test", iterations=80000, eval_every=8000)
FCN = dict(backbone="resnet101", head="fcn", optimizer="sgd", lr=0.01, head_lr=1.0, weight_decay=5e-4,
           power=0.9, floor=1e-4, warmup=0)                            # [D11]
CONVNEXT = dict(backbone="convnext_base", head="upernet", lr=1e-4, head_lr=1.0, weight_decay=0.05,
                stage_decay=0.9, window=512)                           # [D11]; the paper names no size
SWIN = dict(backbone="swin_b", head="upernet", head_lr=1.0)
SEGFORMER = dict(head="segformer", w_category=0.1, length=1.0)         # on both data sets (Sec. 4.2)

PRESETS = {                                                            # lambda, phi and T: Sec. 4.2
    "toy": dict(test_split="test", backbone="tiny", weights="none", size=128, crop=96, iterations=800,
                warmup=50, eval_every=200, save_every=200, lr=6e-3, head_lr=1.0, workers=0),        # ours
    "camvid": dict(dataset="camvid", test_split="test", backbone="mobilenet_v2", size=360, crop=360,
                   batch_size=8, iterations=8000, warmup=400, eval_every=1000, lr=5e-4, head_lr=5.0,
                   w_category=0.1, length=1.0),                                                     # ours
    "ade20k-fcn-r101": ADE20K | FCN | dict(w_centroid=0.4, w_category=0.1),
    "ade20k-convnext_b": ADE20K | CONVNEXT | dict(w_category=0.2),
    "ade20k-swin_b": ADE20K | SWIN | dict(w_category=0.2, length=1.0),
    **{f"ade20k-segformer-b{i}": ADE20K | SEGFORMER | dict(backbone=f"mit_b{i}") for i in range(6)},
    "ade20k-segformer-b0-40k": ADE20K | dict(iterations=40000, eval_every=4000),   # Sec. 4.3: all ablations
    "cocostuff10k-fcn-r101": COCO | FCN | dict(length=0.3),            # as printed; perhaps a slip for 3
    "cocostuff10k-convnext_b": COCO | CONVNEXT | dict(length=3.0),
    "cocostuff10k-swin_b": COCO | SWIN,
    **{f"cocostuff10k-segformer-b{i}": COCO | SEGFORMER | dict(backbone=f"mit_b{i}") for i in range(6)},
}


def check_config(cfg):
    """UserError for a setting that cannot work, before anything is read or written."""
    run.check_options(cfg)
    run.check_batch_size(cfg.batch_size, least=2)
    if cfg.floor > cfg.lr:
        raise UserError(f"--floor {cfg.floor:g} is above --lr {cfg.lr:g}: the rate would rise; lower it.")
    check_sides(lambda: build_network(cfg.backbone, cfg.head, 2, cfg.head_channels), cfg)
    if cfg.classifier == "learnable" and (cfg.prototypes or cfg.init == "masked") and not cfg.table:
        raise UserError("--classifier learnable draws its own rows: drop --prototypes and --init masked.")
    if cfg.prototypes and cfg.init == "masked" and not cfg.table:
        raise UserError("--prototypes and --init masked exclude each other: give one of them.")
    if cfg.stage_decay != 1 and cfg.backbone not in ("convnext_small", "convnext_base"):
        raise UserError(f"--stage-decay is for convnext_small and _base, not for {cfg.backbone}: drop it.")


# ---- prototypes (Sec. 3.2, Alg. 1) -----------------------------------------------------------------------

def gram_schmidt(rows):
    """Algorithm 1, lines 3-11: orthogonal rows by the classical Gram-Schmidt process, not rescaled.

    rows (N,C) -> (N,C) float64; in float32 the square case N = C = 256 ends 5.7e-3 off. ValueError
    if N > C, or if a row is a combination of those before it: the rest of it would be rounding noise.
    """
    num_classes, channels = rows.shape
    if num_classes > channels:
        raise ValueError(f"{num_classes} classes cannot have mutually orthogonal prototypes in {channels} "
                         f"channels: make the decode head wider (--head-channels {num_classes} or more).")
    rows = rows.double()
    basis = rows.clone()                                               # beta; row i is a_i until its turn
    for i in range(num_classes):
        earlier = basis[:i]                                            # (i,C)
        v = earlier @ rows[i] / (earlier * earlier).sum(1)             # (i,) line 7; a_i, not what is left
        basis[i] = rows[i] - v @ earlier                               # lines 8 and 10
        if basis[i].norm() <= 1e-9 * rows[i].norm():
            raise ValueError(f"row {i} of the prototypes is zero or a linear combination of the rows before "
                             "it: give other rows, or --no-orthogonal.")
    return basis


def category_basis_prototypes(num_classes, channels, length=2.0, rows=None, orthogonal=True, equal=True,
                              seed=0):
    """Category-Basis Prototypes W (N,C) float32: Kaiming draw, Gram-Schmidt, equal l2 norm `length` (= T).

    rows (N,C) replaces the random draw (Table 5: CLIP, masked); the draw depends on `seed` alone.
    orthogonal=False skips Gram-Schmidt; equal=False skips the rescaling, and then length has no effect
    (Table 5). For N < C the same as nn.init.orthogonal_ with gain T on the same Gaussian. ValueError: as
    gram_schmidt, and for a zero row.
    """
    if rows is None:
        generator = torch.Generator().manual_seed(seed)                # W must not depend on other draws
        rows = nn.init.kaiming_normal_(torch.empty(num_classes, channels), generator=generator)
    if tuple(rows.shape) != (num_classes, channels):
        raise ValueError(f"rows of shape {tuple(rows.shape)} do not fit {num_classes} classes in {channels} "
                         "channels, which --head-channels sets.")
    W = gram_schmidt(rows) if orthogonal else rows.double()
    if equal:
        norms = W.norm(dim=1, keepdim=True)
        if norms.min() == 0:
            raise ValueError(f"prototype row {int(norms.argmin())} is zero and cannot be given a length.")
        W = length * W / norms                                         # line 12 [D1]
    return W.float()


# ---- OCCL (Sec. 3.3) -------------------------------------------------------------------------------------

def split_views(labels, num_classes, mode="ordered"):
    """Cut the pixels of every class into two views (Sec. 3.3) [D7]: floor(n/2) to view 1, the rest to 2.

    labels (B,h,w) int64 -> (B,h,w) int64: 1 or 2, and 0 where ignored. mode "ordered": the first half in
    batch, row, column order; "random": a random half (torch's RNG). No loop over classes, and no waiting for
    the GPU: pixels are sorted by class, and a pixel's place in its class says which half it is in. Six
    pixels, two classes:

        label     1 0 1 1 255 0       by pixel
        order     1 5 0 2 3 4         the pixels sorted by class, ignored ones (here pixel 4) at the end
        first     0 2 5               by class: where it begins in `order`
        place     0 0 1 2 0 1         by pixel: how many of its class stand before it in `order`
        views     1 1 2 2 0 2         by pixel: class 0 has 2 // 2 = 1 in view 1, class 1 has 3 // 2 = 1
    """
    if mode not in ("ordered", "random"):
        raise ValueError(f"views can be cut 'ordered' or 'random', not {mode!r}")
    label = labels.flatten()                                           # (P,)
    label = torch.where((label >= 0) & (label < num_classes), label, num_classes)
    pixels = torch.arange(len(label), device=label.device)
    shuffled = torch.randperm(len(label), device=label.device) if mode == "random" else pixels
    order = shuffled[label[shuffled].argsort(stable=True)]             # stable: classes keep their order
    class_sizes = torch.zeros(num_classes + 1, dtype=torch.int64, device=label.device)
    class_sizes.scatter_add_(0, label, torch.ones_like(label))         # (N+1,)
    first = class_sizes.cumsum(0) - class_sizes
    position = torch.empty_like(pixels).scatter_(0, order, pixels)     # (P,) of each pixel in `order`
    place = position - first[label]
    views = torch.where(place < class_sizes[label] // 2, 1, 2)
    return torch.where(label < num_classes, views, 0).view(labels.shape)


def view_centroids(features, labels, views, num_classes):
    """Eq. (3): mean feature of every class in either view.

    features (B,C,h,w), labels and views (B,h,w) -> centroids (2,N,C), zero where a view is empty, and counts
    (2,N), the pixels behind each, both in the features' dtype.
    """
    N = num_classes
    vectors = features.permute(0, 2, 3, 1).flatten(0, 2)               # (P,C)
    bin_of = torch.where(views == 2, N + labels, labels)               # bin l: view 1, bin N + l: view 2
    bin_of = torch.where(views == 0, 2 * N, bin_of).flatten()          # bin 2N: the ignored pixels
    sums = vectors.new_zeros(2 * N + 1, vectors.shape[1]).index_add(0, bin_of, vectors)
    counts = vectors.new_zeros(2 * N + 1).index_add(0, bin_of, vectors.new_ones(len(bin_of)))
    centroids = sums[:-1] / counts[:-1, None].clamp(min=1)             # without the last bin
    return centroids.view(2, N, -1), counts[:-1].view(2, N)


def mean_over_valid(loss, counts):
    """loss (2,N) -> (2,): mean over classes that have both views [D6]; 0 with zero gradient if none has."""
    valid = (counts > 0).all(0)                                        # (N,)
    return torch.where(valid, loss, 0.0).sum(1) / valid.sum().clamp(min=1)


def centroid_loss(centroids, counts, tau=0.07):
    """L_v of Eq. (4) [D2][D3][D5][D6]; centroids (2,N,C), counts (2,N) -> (2,), one value for each view x.

    L_v(x) = mean_i -log( e^p_i / (e^p_i + sum_{j != i} e^{cos(v_ix, SG(s_j)) / tau}) )
    with p_i = cos(v_i1, v_i2) / tau; SG: no gradient flows into s_j.
    """
    v = F.normalize(centroids, dim=2)                                  # (2,N,C)
    category_centroids = F.normalize(centroids.mean(0), dim=1).detach()                   # (N,C) SG(s_j)
    positive = (v[0] * v[1]).sum(1) / tau                              # (N,) p_i: gradient into both views
    # scores[x, i, j]: row i is the anchor class in view x, column j the class that it is compared with.
    scores = v @ category_centroids.T / tau                            # (2,N,N)
    valid = (counts > 0).all(0)                                        # (N,) [D6]
    scores = scores.masked_fill(~valid, -torch.inf)                    # class j has no centroid: no negative
    diagonal = torch.eye(len(valid), dtype=torch.bool, device=valid.device)
    scores = torch.where(diagonal, positive[:, None], scores)          # j = i: the other view, not s_i
    return mean_over_valid(scores.logsumexp(2) - positive, counts)


def category_loss(centroids, counts, prototypes, tau=0.07):
    """L_c of Eq. (5) [D2][D4][D5][D6]; centroids (2,N,C), counts (2,N), prototypes (N,C) -> (2,).

    L_c(x) = mean_i -log softmax_j( cos(v_ix, w_j) / tau ) at j = i; the keys are all N prototypes.
    """
    scores = F.normalize(centroids, dim=2) @ F.normalize(prototypes, dim=1).T / tau       # (2,N,N)
    return mean_over_valid(-scores.log_softmax(2).diagonal(dim1=1, dim2=2), counts)


def shrink_labels(labels, size):
    """Labels (B,H,W) at the features' (h,w) by nearest [D7]."""
    return F.interpolate(labels[:, None].float(), size, mode="nearest")[:, 0].long()


def occl_loss(features, labels, prototypes, w_centroid, w_category, tau=0.07, mode="ordered"):
    """Online Centroid Contrastive Loss, Eq. (6): half of (lambda (L_v1 + L_v2) + phi (L_c1 + L_c2)).

    features (B,C,h,w), labels (B,H,W) at any size, 255 ignored, prototypes (N,C) -> scalar; the images of
    this process only [D12]. In float32: means over thousands of pixels, divided by 0.07, do not survive
    bfloat16. 0 with zero gradient where nothing is labelled.
    """
    with torch.autocast(features.device.type, enabled=False):
        labels = shrink_labels(labels, features.shape[2:])
        views = split_views(labels, len(prototypes), mode)
        centroids, counts = view_centroids(features.float(), labels, views, len(prototypes))
        return (w_centroid * centroid_loss(centroids, counts, tau).sum()
                + w_category * category_loss(centroids, counts, prototypes.float(), tau).sum()) / 2


# ---- model -----------------------------------------------------------------------------------------------

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

    def class_vectors(self):
        """(N,C): what the features are multiplied with."""
        if self.update == "penalty":
            return self.length * F.normalize(self.prototypes, dim=1)
        return self.prototypes

    def forward(self, features):
        return F.conv2d(features, self.class_vectors()[:, :, None, None])        # (B,C,h,w) -> (B,N,h,w)

    @torch.no_grad()
    def ema_step(self, category_centroids, valid, momentum=0.999):
        """Table 4 "EMA" [D13]: w_i <- m w_i + (1 - m) T s_i/|s_i|, then length T, where valid (N,) bool."""
        target = self.length * F.normalize(category_centroids, dim=1)
        moved = momentum * self.prototypes + (1 - momentum) * target
        moved = self.length * F.normalize(moved, dim=1)
        self.prototypes.copy_(torch.where(valid[:, None], moved, self.prototypes))


class LearnableClassifier(nn.Conv2d):
    """The baseline: mmsegmentation's 1x1 convolution with bias, drawn from N(0, 0.01^2)."""

    def __init__(self, channels, num_classes):
        super().__init__(channels, num_classes, 1)
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)

    def class_vectors(self):
        return self.weight.flatten(1)


class Segmenter(nn.Module):
    """Images (B,3,H,W) -> logits (B,N,h,w), features (B,C,h,w) for OCCL, auxiliary logits or None."""

    def __init__(self, network, classifier):
        super().__init__()
        self.network, self.classifier = network, classifier
        self.dropout = nn.Dropout2d(0.1)                               # whole channels; not for OCCL [D9]

    def forward(self, x):
        features, aux_logits = self.network(x)
        return self.classifier(self.dropout(features)), features, aux_logits


def build_model(cfg, num_classes, weights="none", rows=None):
    """The preset's network, prototypes for its last 1x1 convolution; rows (N,C): in place of the draw."""
    network = build_network(cfg.backbone, cfg.head, num_classes, cfg.head_channels, weights)
    if not cfg.last_relu:
        network.head.fuse[2] = nn.Identity()                           # [D14]
    if cfg.classifier == "learnable":
        return Segmenter(network, LearnableClassifier(network.channels, num_classes))
    try:
        prototypes = category_basis_prototypes(num_classes, network.channels, cfg.length, rows,
                                               cfg.orthogonal, cfg.equal, cfg.seed)
    except ValueError as error:
        source = f"--prototypes {cfg.prototypes}: " if cfg.prototypes else ""
        raise UserError(f"{source}{error}") from None
    update = "frozen" if cfg.classifier == "cbp" else cfg.classifier
    return Segmenter(network, PrototypeClassifier(prototypes, update, cfg.length))


def freeze_classifier(module, num_classes, length=2.0, seed=0):
    """Prototypes in place of the last 1x1 convolution to num_classes channels of a network of yours.

    module is changed; where an auxiliary head comes last, as in torchvision, give net.classifier. -> the
    PrototypeClassifier, and a dict whose "features" are what it was given in the last forward pass: F
    (B,C,h,w) for occl_loss (after dropout, if yours ends in one [D9]). ValueError without such a convolution.
    """
    found = [name for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d)
             and layer.kernel_size == (1, 1) and layer.out_channels == num_classes]
    if not found:
        raise ValueError(f"no 1x1 convolution in this module leads to {num_classes} channels: give the part "
                         "of the network that ends in its classifier.")
    weight = module.get_submodule(found[-1]).weight                    # (N,C,1,1)
    W = category_basis_prototypes(num_classes, weight.shape[1], length, seed=seed)
    classifier, seen = PrototypeClassifier(W).to(weight.device), {}
    classifier.register_forward_pre_hook(lambda layer, inputs: seen.update(features=inputs[0]))
    parent, _, name = found[-1].rpartition(".")
    setattr(module.get_submodule(parent), name, classifier)
    return classifier, seen


# ---- losses and one training step ------------------------------------------------------------------------

def pixel_loss(logits, labels):
    """L_p of Eq. (7): cross-entropy after bilinear upsampling, mean over labelled pixels [D10], or 0.

    logits (B,N,h,w), labels (B,H,W) -> scalar. Resizing and the product by W commute: N maps grow, not C.
    """
    logits = F.interpolate(logits.float(), labels.shape[1:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(logits, labels, ignore_index=255, reduction="sum")
    return total / (labels != 255).sum().clamp(min=1)


def penalty_loss(rows):
    """Table 4 "Penalty" [D13]: mean squared cosine between different rows, (N,C) -> scalar."""
    cosine = F.normalize(rows, dim=1) @ F.normalize(rows, dim=1).T
    return (cosine.square().sum() - len(rows)) / (len(rows) * (len(rows) - 1))


def update_by_ema(classifier, features, labels, cfg):
    """Table 4 "EMA": the prototypes step towards this batch's Category Centroids, over all processes."""
    num_classes = len(classifier.prototypes)
    labels = shrink_labels(labels, features.shape[2:])
    views = split_views(labels, num_classes, cfg.views)
    centroids, counts = view_centroids(features.float(), labels, views, num_classes)
    valid = (counts > 0).all(0).float()[:, None]                       # (N,1), 1 or 0
    total = torch.cat([centroids.mean(0) * valid, valid], dim=1)       # (N,C+1); last: in how many processes
    if dist.is_initialized():
        dist.all_reduce(total)
    classifier.ema_step(total[:, :-1] / total[:, -1:].clamp(min=1), total[:, -1] > 0)


def train_step(model, net, optimizer, scheduler, x, labels, cfg):
    """One iteration on x (B,3,H,W), labels (B,H,W) -> the terms of Eq. (7), detached, on the device.

    model: net, or DDP around net.
    """
    prototypes = net.classifier.class_vectors()                        # (N,C)
    with run.autocast(x.device, cfg.amp):                              # [D15]
        logits, features, aux_logits = model(x)                        # (B,N,h,w), (B,C,h,w)
    losses = dict(ce=pixel_loss(logits, labels))
    if aux_logits is not None:
        losses["aux"] = 0.4 * pixel_loss(aux_logits, labels)           # mmsegmentation's auxiliary head
    if cfg.w_centroid or cfg.w_category:
        losses["occl"] = occl_loss(features, labels, prototypes, cfg.w_centroid, cfg.w_category, cfg.tau,
                                   cfg.views)
    if cfg.classifier == "penalty":
        losses["penalty"] = 0.01 * penalty_loss(prototypes)            # 0.01: Sec. 4.3
    optimizer.zero_grad(set_to_none=True)
    run.backward(sum(losses.values()), optimizer, cfg.amp)             # Eq. (7); as loss.backward()
    run.step(optimizer)                                                # as optimizer.step(); see --amp fp16
    scheduler.step()
    if cfg.classifier == "ema":
        update_by_ema(net.classifier, features.detach(), labels, cfg)
    return {name: value.detach() for name, value in losses.items()}


def build_optimizer(net, cfg, device):
    """By mmsegmentation's rules for each model (Sec. 4.1); frozen prototypes are no parameters."""
    groups = parameter_groups(net, net.network.backbone, cfg.lr, cfg.head_lr, cfg.weight_decay,
                              cfg.stage_decay, decay_all=cfg.optimizer == "sgd")
    fused = device.type == "cuda"
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=cfg.lr, momentum=0.9, fused=fused)
    return torch.optim.AdamW(groups, lr=cfg.lr, fused=fused)


# ---- training --------------------------------------------------------------------------------------------

def train(cfg, machine):
    """Train, evaluate, draw. The first process returns what metrics.json holds, the others None."""
    splits = (cfg.train_split, cfg.val_split, cfg.test_split)
    train_set, val_set, test_set = (datasets.open_split(cfg, split) for split in splits)
    baseline = load_baseline(cfg, machine.device, test_set.classes)    # UserError before any training
    checkpoint = Path(cfg.out) / "last.pt"
    resuming = cfg.resume and checkpoint.exists()                      # if none was saved yet, begin anew
    if resuming:
        run.read_progress(cfg.out, (), train_set.classes, train_set)   # the data must still be the same
    torch.manual_seed(cfg.seed)
    rows = None if resuming else initial_rows(cfg, train_set, machine.device)
    torch.manual_seed(cfg.seed)                                        # the random layers that the rows saw
    net = build_model(cfg, train_set.num_classes, "none" if resuming else cfg.weights, rows)
    pixels = None if resuming else survey.survey(train_set, (val_set, test_set), cfg, machine, net=net)
    run.start_run(cfg, machine)                                        # what fails before leaves no folder
    net = net.to(machine.device, memory_format=torch.channels_last)
    optimizer = build_optimizer(net, cfg, machine.device)
    scheduler = run.poly_schedule(optimizer, cfg.iterations, cfg.power, cfg.floor, cfg.warmup)
    parts = dict(model=net, optimizer=optimizer, scheduler=scheduler)
    torch.manual_seed(cfg.seed + 1 + machine.rank)                     # dropout differs between processes
    progress = dict(iteration=0, seconds=0.0, classes=train_set.classes, pixels=pixels, log=[], sums={},
                    images=run.code_of_names(train_set))
    if resuming:
        progress = run.load_checkpoint(checkpoint, parts, machine.device)
    model = run.distribute(net, machine).train()                       # with one process: net itself
    start = progress["iteration"]
    samples = TrainView(train_set, cfg.size, cfg.crop)                 # random scale, crop, flip, colours
    loader = train_loader(samples, cfg.batch_size, cfg.seed, start, cfg.iterations, cfg.workers, *machine)

    def step(batch):
        x, labels = to_device(batch, machine.device, "image", "mask")
        return train_step(model, net, optimizer, scheduler, x, labels, cfg)

    if machine.rank == 0 and cfg.iterations <= cfg.warmup:
        print(f"note: --warmup {cfg.warmup} lasts as long as the training; --schedule shortens both")
    if start < cfg.iterations:
        images = math.ceil((cfg.iterations - start) / cfg.eval_every) * len(val_set) + len(test_set)
        speed.announce(step, samples, parts, cfg.iterations - start, images, cfg, machine)
    log = run.Log(cfg.out, progress, machine)
    bar = tqdm(loader, desc="train", total=cfg.iterations, initial=start, leave=False, disable=machine.quiet)
    for iteration, batch in enumerate(bar, start + 1):
        log.add(step(batch))
        if run.due(iteration, cfg.eval_every, cfg.iterations):
            rates = evaluate(net, val_set, cfg, machine)
            lr = scheduler.get_last_lr()[0]
            log.row(f"iteration {iteration}", before=dict(iteration=iteration, lr=lr),
                    after={name: rates[name] for name in ("miou", "macc", "pixel_acc")},
                    text=f"{cfg.val_split} mIoU {rates['miou']:.1f}")
        if run.due(iteration, cfg.save_every, cfg.iterations):
            log.save("last.pt", parts, iteration=iteration)            # and progress["iteration"]
    return report(net, cfg, test_set, baseline, progress, machine)


# ==== from here on: evaluation, using a trained run, the paper's tables ===================================

@torch.inference_mode()
def predict_labels(net, x, size, cfg):
    """Images x (B,3,h,w) -> class ids (B,H,W) int64 at `size` (H,W).

    mmsegmentation's order: logits to the size of x, then to `size`, both bilinear, then argmax.
    """
    def logits_of(part):
        with run.autocast(x.device, cfg.amp):
            return net(part)[0]
    windows = segmentation.in_windows(logits_of, x, cfg.window)
    return segmentation.class_ids(windows, x.shape[2:], size, twice=True)


def evaluate(net, data, cfg, machine):
    """Rates of a split in percent (common/metrics.py), over all processes. No flip, one scale (Sec. 4.1)."""
    loader = eval_loader(TestView(data, cfg.size), cfg.workers, *machine)

    def predict_batch(batch):
        [x] = to_device(batch, machine.device, "image")
        return {"ids": predict_labels(net, x, batch["mask"].shape[1:], cfg)}
    return segmentation.evaluate(net, loader, data.num_classes, ["ids"], predict_batch, machine)["ids"]


def report(net, cfg, test_set, baseline, progress, machine):
    """Final evaluation on the test split: metrics.json and figures/, by the first process. -> metrics."""
    networks = []
    for one, one_cfg in [*baseline, (net, cfg)]:                       # see load_baseline
        rates = evaluate(one, test_set, one_cfg, machine)
        if machine.rank == 0:
            metrics, features = measures.results_of(one, one_cfg, rates, progress["pixels"], test_set,
                                                    shrink_labels)
            name = "baseline: " * (one is not net) + gallery.name_of(one_cfg)
            networks.append(gallery.Shown(name, one, one_cfg, [metrics], features))
    if machine.rank:
        return None
    cfg = run.for_results(cfg)
    metrics |= run.facts(cfg, net, progress, machine, "classifier", "w_centroid", "w_category")
    frozen = sum(buffer.numel() for buffer in net.classifier.buffers())
    metrics |= dict(split=cfg.test_split, iterations=progress["iteration"],
                    finished=progress["iteration"] >= cfg.iterations,
                    trainable_parameters=metrics["parameters"], parameters=metrics["parameters"] + frozen)
    run.write_json(Path(cfg.out) / "metrics.json", metrics)
    gallery.draw_figures(f"{cfg.out}/figures/", test_set, networks, predict_image)
    print(f"{cfg.test_split} mIoU {rates['miou']:.1f}, mAcc {rates['macc']:.1f}, pixel accuracy "
          f"{rates['pixel_acc']:.1f}{segmentation.absent_classes(metrics)}; see {cfg.out}/metrics.json and "
          f"{cfg.out}/figures")
    write_report(cfg.out, PAGE, cfg.baseline)
    return metrics


def initial_rows(cfg, train_set, device):
    """Rows (N,C) from --prototypes or --init masked (Table 5), or None: a random draw. Raises UserError."""
    if cfg.prototypes:
        rows = torch.atleast_2d(files.read_numbers(cfg.prototypes, "--prototypes"))
        unit = F.normalize(rows.double().flatten(1), dim=1)
        alike = (unit @ unit.T).fill_diagonal_(0) > 1 - 1e-9
        if alike.any() or not unit.any(1).all():
            raise UserError(f"--prototypes {cfg.prototypes} has rows that are zero or point the same way and "
                            "cannot tell classes apart: give every class a row of its own.")
        return rows
    if cfg.init == "random":
        return None
    network = build_network(cfg.backbone, cfg.head, train_set.num_classes, cfg.head_channels, cfg.weights)
    loader = eval_loader(TestView(train_set, cfg.size), cfg.workers, device)
    rows = class_means_of_backbone(network.to(device), loader, train_set.num_classes, device)    # "Masked"
    absent = [name for name, row in zip(train_set.classes, rows) if not row.any()]
    if absent:
        raise UserError(f"--init masked: no training pixel of {absent[0]} is left at the backbone's stride, "
                        "so it has no mean; use --init random.")
    return rows


# ---- use a trained run -----------------------------------------------------------------------------------

def load_run(cfg, device, classes=None):
    """The trained network of cfg.out in eval mode, and its progress. UserError if it has other classes."""
    progress = run.read_progress(cfg.out, ("pixels",), classes)
    net = build_model(cfg, len(progress["classes"])).to(device, memory_format=torch.channels_last)
    run.load_checkpoint(Path(cfg.out) / "last.pt", dict(model=net), device)
    return net.eval(), progress


def load_baseline(cfg, device, classes):
    """[(network, settings)] of --baseline, [] without it. UserError: unfinished, or of other classes."""
    others = [tables.finished_run(Config, cfg.baseline)] if cfg.baseline else []
    return [(load_run(other, device, classes)[0], other) for other in others]


def predict_image(net, image, cfg, device):
    """uint8 (3,H,W) -> class ids (H,W) uint8 on the CPU."""
    x = segmentation.network_input(image, cfg.size).to(device)
    return predict_labels(net, x, image.shape[1:], cfg)[0].to(torch.uint8).cpu()


def predict(cfg, device):
    """--predict: for every image OUT/predictions/NAME.png (class ids, palette) and NAME_overlay.png."""
    net, progress = load_run(cfg, device)

    def predict_file(path):
        image = files.read_image(path)                                 # (3,H,W) uint8
        return image, predict_image(net, image, cfg, device)
    segmentation.predict_files(files.list_images(cfg.predict), predict_file, progress["classes"], cfg.out)


def profile(cfg, device):
    """--profile, Table 2: what the baseline and CBP + OCCL cost (common/speed.py); no images are needed."""
    num_classes = datasets.num_classes_of(cfg)
    costs = {}
    for name in ("baseline", "CBP + OCCL"):
        row_cfg = replace(cfg, **ROWS[name])
        net = build_model(row_cfg, num_classes).to(device, memory_format=torch.channels_last)
        optimizer = build_optimizer(net, row_cfg, device)
        scheduler = run.poly_schedule(optimizer, cfg.iterations)
        costs[name] = speed.cost_of_model(
            dict(model=net, optimizer=optimizer, scheduler=scheduler),
            lambda x, labels: train_step(net, net, optimizer, scheduler, x, labels, row_cfg),
            lambda x: predict_labels(net, x, x.shape[2:], row_cfg), num_classes, cfg, device)
        costs[name]["parameters"] += sum(buffer.numel() for buffer in net.classifier.buffers())
    speed.report_costs(costs, cfg, device)
    print("\nPaper, SegFormer-B5 on an A6000: 82.1 M, 75.6 GFLOPs, 7 GB in training, 19.5 images/s.")
    return costs


# ---- tables of the paper ---------------------------------------------------------------------------------

def run_table(cfg, machine):
    """--table, --figure: every row as a run in OUT/rows/, then OUT/tableN.md, .json. Tables share rows."""
    kind, number = ("figure", cfg.figure) if cfg.figure else ("table", cfg.table)
    title, names = FIGURES[number] if cfg.figure else TABLES[number]
    rows = {name: dict(classifier="cbp", prototypes="", figure=0) | ROWS[name] for name in names}
    tables.check_rows(rows, cfg, check_config, ["baseline"], free=["prototypes"] * (cfg.table == 5))
    if cfg.table == 3:
        rows["baseline, warm-up x 4"]["warmup"] = 4 * cfg.warmup
    if cfg.table == 10 and cfg.seeds == 1:
        cfg = replace(cfg, seeds=4)                                    # as in the paper
    note = "Paper: SegFormer-B0, ADE20K, 40K iterations."
    if cfg.table == 5:
        network = build_network(cfg.backbone, cfg.head, 2, cfg.head_channels)    # 2: no class matters here
        width = network.backbone.dims[3]                               # class means are as wide as level 4
        note += f" Width of the head: {network.channels} channels, masked ones {width}"
        for name in ("masked", "masked, orthogonal"):
            rows[name]["head_channels"] = width
        if cfg.prototypes:                                             # a wrong file is told now
            given = initial_rows(cfg, None, machine.device)
            rows["CLIP"] |= dict(prototypes=cfg.prototypes, head_channels=given.shape[1])
            build_model(replace(cfg, **rows["CLIP"]), datasets.num_classes_of(cfg), rows=given)
            note += f", CLIP {given.shape[1]}"
        else:
            rows["CLIP"] = "needs --prototypes FILE.npy"

    def folder(name):                                                  # of a row that changes nothing: ours
        changed = any(getattr(cfg, option) != value for option, value in ROWS[name].items())
        return tables.folder_of(name if changed else "CBP + OCCL")
    results = tables.train_rows(rows, cfg, train, machine, folder)
    if kind == "figure" and machine.rank == 0:
        gallery.draw_sweeps(f"{cfg.out}/figure{number}.png", results, SWEEP, cfg)
    if cfg.table in BESIDE and machine.rank == 0:
        test_set, networks = datasets.open_split(cfg, cfg.test_split), []
        for name in BESIDE[number]:
            row_cfg = next(tables.row_configs(name, rows[name], cfg, folder))             # its first seed
            net, _ = load_run(row_cfg, machine.device, test_set.classes)
            networks.append(gallery.Shown(name, net, row_cfg, results[name]))
        gallery.draw_figures(f"{cfg.out}/figures/table{number}_", test_set, networks, predict_image, results)
    columns = {"mIoU": "miou", "mAcc": "macc"}
    if cfg.table == 8:
        columns |= {"CS": "class_separability", "mean abs cos": "mean_abs_cosine"}
    if cfg.table in (6, 7):                                            # a column for each pair or class
        key = {6: "lookalike_iou_sums", 7: "rare_and_frequent_iou"}[cfg.table]
        columns |= {name: (key, name) for name in results["CBP + OCCL"][0][key]}
    paper = {"CBP + OCCL": ("35.0 +- 0.2", "48.0 +- 0.3")} if cfg.table == 10 else PAPER
    table = tables.Table(f"{kind.title()} {number}: {title}", rows, columns, ("paper mIoU", "paper mAcc"),
                         paper, digits={"CS": 2, "mean abs cos": 3})
    tables.write_table(number, table, results, cfg, machine, more=note, name=kind,
                       about=f"{cfg.iterations} iterations, {cfg.test_split} split")
    write_report(cfg.out, PAGE)
    return results


def main(cfg):
    """Returns what the task returns, for use from Python."""
    if cfg.walkthrough:
        return cbp_occl_walkthrough.walk(gram_schmidt, category_basis_prototypes, split_views,
                                         view_centroids, centroid_loss, category_loss, occl_loss)
    check_config(cfg)
    machine = run.setup(cfg.device, cfg.seed)
    if cfg.table or cfg.figure:
        return run_table(cfg, machine)
    if cfg.eval_only:
        test_set = datasets.open_split(cfg, cfg.test_split)
        net, progress = load_run(cfg, machine.device, test_set.classes)
        baseline = load_baseline(cfg, machine.device, test_set.classes)
        return report(net, cfg, test_set, baseline, progress, machine)
    for task, asked in ((profile, cfg.profile), (predict, cfg.predict)):
        if asked:                                                      # the first process does it alone
            return None if machine.rank else task(cfg, machine.device)
    return train(cfg, machine)


if __name__ == "__main__":                                             # worker processes import this file
    run.run_script(main, Config, PRESETS, __doc__)
