"""ScaleProtoSeg: multi-scale part prototypes for semantic segmentation, then sparse groups of them, in one file.

Paper  H. Porta, E. Dalsasso, D. Marcos, D. Tuia, "Multi-Scale Grouped Prototypes for Interpretable Semantic
       Segmentation", WACV 2025. Sections 6 to 17 are its supplement; what only the main text or only the code
       says is marked "released code" (github.com/eceo-epfl/ScaleProtoSeg), from which we took it.
Idea   DeepLabv2 looks at a pixel through four convolutions with growing fields of view and sums them. Kept apart,
       each scale gets prototypes of its own: vectors that are patches of training images. A pixel is a car
       because it looks like such patches. Stage 2 freezes the prototypes and mixes the dozen of a class into
       three sparse groups, so that a logit is explained by three parts, each made of about four prototypes.

Try    python scaleprotoseg.py                                      # toy scenes, about 2 min on a CPU
Train  python scaleprotoseg.py --preset cityscapes --data CITYSCAPES --parts gtFinePanopticParts
       torchrun --nproc-per-node 2 scaleprotoseg.py --preset ade20k --data ADEChallengeData2016
       python scaleprotoseg.py --method protoseg                    # its ancestor; deeplab = the plain network
Look   python scaleprotoseg.py --explain photo.jpg --class car --out runs/scaleprotoseg-toy
       python scaleprotoseg.py --failure bird --out runs/scaleprotoseg-toy         # why is this class missed?
       python scaleprotoseg.py --table 8                            # stage 2 with and without the entropy loss

symbol      here               shape     meaning                                               source
p_{s,i}     prototypes         P,D       prototypes, each of one class and one scale           Sec. 11
f_s(x)      features           B,S*D,h,w sigmoid of the ASPP maps, scale s = channels sD..     released code
g_proto     log_similarity     B,P,h,w   ln((d2 + 1) / (d2 + 1e-4))                            released code
w_h_proto   last_layer         C,P       stage 1: similarities -> logits                       Sec. 12
L_J         diversity_loss     scalar    prototypes of a class and scale light up elsewhere    Sec. 6, released code
L_L1        off_class_l1       scalar    the last layer leans on its own classes' columns      Sec. 6, 12
w_{g,c}     groups.weights     C,G,N     group g of class c, a row on the simplex              Sec. 9
G_{c,g}     group_activations  B,C*G,h,w exp of the weighted sum of similarities               released code
w_h_group   groups.last_layer  C,C*G     stage 2: group activations -> logits                  Sec. 12
L_ent       entropy_loss       scalar    few prototypes in a group                             Sec. 9, released code
alpha       threshold          scalar    smaller group weights are dropped after training      Sec. 9, Table 7
p_th        equivariance       scalar    do two scales light up alike (IoU above IoU_th)?      Sec. 11, Eq. (10)

Phases: warmup -> joint -> project -> finetune (stage 1), group_warmup -> group_joint (stage 2). An "iteration" is
an optimizer step on the whole batch (10 images).

Where we do something else, or had to choose ([D*] marks the line):
[D1] ResNet-101 has the stride of a block on its 3x3 convolution (torchvision), not on its first 1x1 (Caffe).
[D2] The diversity loss takes the class's own pixels. The code of ProtoSeg is off by one there (class c's pixels
     train class c+1), so a ProtoSeg trained here is not the one of the printed tables.
[D3] Weight decay acts on backbone and ASPP only (released code); Sec. 6 does not say on what.
[D4] A class without a pixel in the projection images cannot be projected: its prototypes are dropped and the run
     says so. The released code moves them all to one corner of the first image.
[D5] A class without prototypes has no groups; its logit comes from the other classes' groups alone.
[D6] EM: entropy weight 0.25 as printed in Sec. 7; the released config has 0.05. The two cuts are ours (seeds 1 and 2).
[D7] ProtoSeg's pruning leaves void pixels out on all data sets (the code forgets to on three of them).
[D8] Consistency and stability binarise above a quantile over the pixels of the class; 0.7, 0.8, 0.9 are our choice,
     the paper's list and the code's quantile are not released. Component centroids are rounded; the background's
     is no keypoint (in the code it is). Images in which a class shows no keypoint are left out of stability. All
     classes of Pascal with parts count; the code drops cow, probably meaning dining table.
[D9] Validation sees whole images; the released code crops and scales them at random. The last weights are kept.
[D10] Where the backbone is frozen batch norm is in eval mode, also for networks that train theirs (U-Net, tiny).
[D11] The plain network is trained as the prototype models are (Adam, same phases, no CRF); Table 6's DeepLabv2 has
     SGD and equals the published number with a CRF.
[D12] Sec. 11 leaves open how IoUs are averaged: per pair, a mean over the images that hold the class, here in at
     least 10 cells of the grid on which the maps meet: of fewer cells any two maps pick the same. At most
     --equivariance images of the projection split are looked at, the paper takes all training images.
[D13] Toy scenes have no pretrained backbone: tiny is trained from scratch in the joint phase.
[D14] Projection and analyses run in float32; training, evaluation and prediction on CUDA in bfloat16 up to the
     ASPP maps.
"""

import contextlib
import math
import os
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import Subset, default_collate
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

from common import datasets, figures, files, loaders, run, transforms
from common.backbones import DENSE, build_dense, norm_parameters
from common.metrics import ConfusionMatrix
from common.parts import connected_components, open_parts
from common.run import RunConfig, UserError, opt


# ---- options and recipes -------------------------------------------------------------------------------------

@dataclass
class Config(RunConfig):
    method: str = opt("scaleprotoseg", "protoseg = one summed scale, no groups; deeplab = plain network",
                      choices=("scaleprotoseg", "protoseg", "deeplab"))
    dataset: str = opt("cityscapes", "reader of --data", choices=datasets.DATASETS)
    train_split: str = opt("train", "trained on")
    project_split: str = opt("", "images that prototypes are projected to (default: --train-split)")
    val_split: str = opt("val", "evaluated while training")
    test_split: str = opt("val", "evaluated at the end, into metrics.json, and by --eval-only", runtime=True)
    parts: str = opt("", "part annotations of the test split (data/README.md), for consistency and stability; toy "
                     "scenes have their own", runtime=True)
    backbone: str = opt("resnet101", "network before the ASPP", choices=DENSE)
    weights: str = opt("imagenet", "of the backbone: imagenet (torchvision downloads them), a file, a URL, or none",
                       runtime=True)
    frozen_bn: bool = opt(True, "batch norm keeps its pretrained statistics and scales (Sec. 6)")
    output_stride: int = opt(8, "pixels a side that a cell of the feature map stands for; the U-Net has 1")
    unet_width: int = opt(64, "channels of the U-Net's first level; 16 for a CPU")
    rates: list = opt(("6", "12", "18", "24"), "dilation of the ASPP convolutions: the scales, small to large")
    depth: int = opt(64, "D, channels of a scale's features and of its prototypes")
    input_scales: list = opt((), "also look at the image in these sizes, and keep the maximum")
    crop: int = opt(513, "training crop in pixels; lower it if memory runs out")
    scale_min: float = opt(0.5, "training images are resized by a random factor from here ...")
    scale_max: float = opt(1.5, "... to here")
    test_size: int = opt(0, "short side of test images; 0 = the image's own")
    test_square: bool = opt(False, "test images are resized to test-size x test-size (Pascal)")
    batch_size: int = opt(10, "images an iteration, over all GPUs")
    micro_batch: int = opt(0, "images at once on a GPU; gradients add up to the batch; 0 = all. Lower it if memory "
                           "runs out")
    prototypes: int = opt(3, "K, prototypes of a class and scale")
    protoseg_prototypes: int = opt(10, "the same for --method protoseg, which has one scale")
    groups: int = opt(3, "G, groups of a class")
    warmup: int = opt(3000, "iterations: ASPP and prototypes", schedule=True)
    joint: int = opt(30000, "iterations: all convolutions and prototypes", schedule=True)
    finetune: int = opt(2000, "iterations after the projection: last layer", schedule=True)
    group_warmup: int = opt(2000, "iterations of stage 2: group weights", schedule=True)
    group_joint: int = opt(30000, "iterations of stage 2: group weights and their last layer", schedule=True)
    lr: float = opt(2.5e-4, "Adam learning rate of ASPP and prototypes; poly decay in the joint steps")
    backbone_lr: float = opt(2.5e-5, "learning rate of the backbone")
    finetune_lr: float = opt(1e-5, "learning rate of the last layer")
    group_lr: float = opt(2.5e-4, "learning rate of stage 2")
    weight_decay: float = opt(5e-4, "of convolutions [D3]")
    w_diversity: float = opt(0.25, "lambda_J, weight of the diversity loss")
    w_l1: float = opt(1e-4, "lambda_L1, of the last layer's off-class weights, in fine-tuning")
    w_l1_group: float = opt(1e-3, "the same in stage 2")
    w_entropy: float = opt(0.05, "lambda_ent, weight of the entropy loss: higher = sparser groups")
    threshold: float = opt(0.05, "alpha: smaller group weights are dropped after training", runtime=True)
    quantiles: list = opt(("0.7", "0.8", "0.9"), "binarisations that consistency and stability are averaged over [D8]",
                          runtime=True)
    equivariance: int = opt(3000, "projection images, evenly spaced, in which quasi-equivariant prototypes are looked "
                            "for at the end (Sec. 11); 0 = not at all", runtime=True)
    eval_every: int = opt(5000, "iterations between evaluations, one row of log.csv each", schedule=True)
    save_every: int = opt(1000, "iterations between checkpoints: what --resume can lose", runtime=True)
    stage1: str = opt("", "run folder: take over its stage 1 and train only the groups anew", runtime=True)
    eval_only: bool = opt(False, "evaluate and draw the run in OUT again and stop", runtime=True, uses_run=True)
    predict: str = opt("", "image or folder: write index PNGs and overlays to OUT/predictions and stop",
                       runtime=True, uses_run=True)
    explain: str = opt("", "image: draw why one of its pixels got its class, by the run in OUT, and stop",
                       runtime=True, uses_run=True)
    class_: str = opt("", "class that --explain explains (default: the predicted one)", runtime=True)
    pixel: list = opt((), "x y of the pixel that --explain explains (default: the strongest of the class)",
                      runtime=True)
    failure: str = opt("", "class name: draw test images where its IoU is below --failure-iou (Sec. 17) and stop",
                       runtime=True, uses_run=True)
    failure_iou: float = opt(0.2, "epsilon_IoU of Sec. 17", runtime=True)
    table: int = opt(0, "train and evaluate the rows of this table of the paper on the chosen preset", runtime=True,
                     choices=(0, 5, 7, 8, 9, 10))


MULTISCALE = dict(input_scales=["0.5", "0.75"], crop=321)            # Sec. 6: {0.5, 0.75, 1}
LARGE = dict(w_l1=1e-5, w_l1_group=1e-4, w_entropy=0.25, protoseg_prototypes=12)       # many classes
PRESETS = {                                                          # Sec. 6 to 8; iterations of stage 2: Sec. 6
    "toy": dict(dataset="toy_scenes", test_split="test", backbone="tiny", weights="none", frozen_bn=False,
                output_stride=4, rates=["1", "2", "3", "4"], depth=16, crop=96, batch_size=16, warmup=50, joint=600,
                finetune=100, group_warmup=50, group_joint=300, lr=5e-3, backbone_lr=5e-3, finetune_lr=1e-3,
                group_lr=0.02, w_entropy=0.1, eval_every=200, save_every=200, workers=0),           # ours [D13]
    "camvid": dict(dataset="camvid", test_split="test", backbone="mobilenet_v2", crop=321, batch_size=8, warmup=200,
                   joint=4000, finetune=200, group_warmup=200, group_joint=1000, lr=1e-3, backbone_lr=1e-4,
                   finetune_lr=1e-3, group_lr=0.02, eval_every=500, save_every=200),                      # ours
    "cityscapes": dict(),
    "pascal": MULTISCALE | dict(dataset="voc", train_split="trainaug", project_split="train", test_size=513,
                                test_square=True, finetune=6000),
    "pascal-small": dict(dataset="voc", backbone="mobilenet_v2", crop=321, test_size=513, test_square=True,
                         batch_size=8, warmup=200, joint=3000, finetune=200, group_warmup=200, group_joint=800,
                         lr=1e-3, backbone_lr=1e-4, finetune_lr=1e-3, group_lr=0.02, eval_every=500,
                         save_every=200),                                                                 # ours
    "ade20k": LARGE | dict(dataset="ade20k", crop=512, test_size=512, scale_max=2.0, warmup=6000, joint=60000,
                           finetune=4000),
    "cocostuff": LARGE | MULTISCALE | dict(dataset="cocostuff164k", warmup=6000, joint=100000, finetune=4000),
    "em": dict(dataset="em", train_split="train-1", val_split="val-1", test_split="val-1", backbone="unet",
               weights="none", frozen_bn=False, crop=512, batch_size=2, warmup=0, joint=10000, finetune=10000,
               group_warmup=0, group_joint=10000, lr=1e-4, backbone_lr=1e-4, group_lr=5e-5, w_l1_group=1e-4,
               w_entropy=0.25, eval_every=2000),                                                          # [D6]
}
PHASES = {                                                           # what a method goes through
    "scaleprotoseg": ("warmup", "joint", "project", "finetune", "group_warmup", "group_joint"),
    "protoseg": ("warmup", "joint", "project", "finetune"),
    "deeplab": ("warmup", "joint"),
}


# progress, a dict in every checkpoint: phase, iteration (done in it), offset (iterations of the phases before),
# seconds, log (rows), sums (of losses since the last row), classes, prototype_class and prototype_scale (lists);
# from the projection on also sources (a Source for each prototype) and counts (what was dropped and why).


def check_config(cfg):
    """UserError for a setting that cannot work, before anything is read or written."""
    for name in ("crop", "batch_size", "depth", "prototypes", "protoseg_prototypes", "groups", "lr", "backbone_lr",
                 "finetune_lr", "group_lr", "unet_width", "eval_every", "save_every", "scale_min"):
        if getattr(cfg, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be above 0.")
    for name in ("micro_batch", "test_size", "warmup", "joint", "finetune", "group_warmup", "group_joint", "workers",
                 "weight_decay", "w_diversity", "w_l1", "w_l1_group", "w_entropy", "equivariance"):
        if getattr(cfg, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must not be negative.")
    if cfg.scale_max < cfg.scale_min:
        raise UserError(f"--scale-max {cfg.scale_max} is below --scale-min {cfg.scale_min}: swap them.")
    if cfg.test_square and not cfg.test_size:
        raise UserError("--test-square needs the side of the square: add --test-size.")
    if not 0 <= cfg.threshold < 1:
        raise UserError(f"--threshold {cfg.threshold}: weights lie between 0 and 1, and so must it (below 1).")
    if numbers(cfg, "rates") != sorted(set(numbers(cfg, "rates"))) or min(numbers(cfg, "rates")) < 1:
        raise UserError(f"--rates {' '.join(cfg.rates)}: give whole numbers from 1 on, rising.")
    for name, low, high in (("input_scales", 0.0, 4.0), ("quantiles", 0.0, 1.0)):
        if any(not low < value < high for value in numbers(cfg, name)):
            raise UserError(f"--{name.replace('_', '-')} {' '.join(getattr(cfg, name))}: each must lie between "
                            f"{low:g} and {high:g}.")
    if cfg.pixel and len(numbers(cfg, "pixel")) != 2:
        raise UserError(f"--pixel {' '.join(cfg.pixel)}: give x and y, two whole numbers.")
    if (cfg.class_ or cfg.pixel) and not cfg.explain:
        raise UserError("--class and --pixel go with --explain IMAGE.")
    if cfg.stage1 and cfg.method != "scaleprotoseg":
        raise UserError(f"--stage1 with --method {cfg.method}: only scaleprotoseg has a stage 2.")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if cfg.batch_size % world:
        raise UserError(f"--batch-size {cfg.batch_size} for {world} processes: choose a multiple of {world}.")


def numbers(cfg, name):
    """The option's strings as numbers: whole ones for rates and pixel."""
    kind = int if name in ("rates", "pixel") else float
    try:
        return [kind(text) for text in getattr(cfg, name)]
    except ValueError:
        raise UserError(f"--{name.replace('_', '-')} {' '.join(getattr(cfg, name))}: "
                        f"{'whole numbers' if kind is int else 'numbers'} are needed.") from None


# ---- prototypes and pixels (Sec. 11; the rest: released code) ------------------------------------------------

def prototype_distances(features, prototypes, prototype_scale):
    """d2[b,p,y,x] = |f_s(x)[b,:,y,x] - p|^2 with s the scale of p, >= 0.

    features (B,S*D,h,w), prototypes (P,D), prototype_scale (P,) int64 -> (B,P,h,w) float32. One matrix product
    for all scales: a prototype is a row of S*D numbers, zero outside its scale. Float32 also under autocast, and
    a product for which torch leaves TF32 off (cuDNN's convolutions have it on): where a pixel equals a prototype,
    an error of 1e-2 in d2 turns the similarity 9.2 into 4.6.
    """
    with torch.autocast(features.device.type, enabled=False):
        z, p = features.float().flatten(2), prototypes.float()       # (B,S*D,h*w), (P,D)
        num_scales = z.shape[1] // p.shape[1]
        own = F.one_hot(prototype_scale, num_scales).to(p.dtype)     # (P,S)
        rows = (own[:, :, None] * p[:, None]).flatten(1)             # (P,S*D)
        zz = z.unflatten(1, (num_scales, -1)).square().sum(2)        # (B,S,h*w)
        d2 = own @ zz - 2 * (rows @ z) + p.square().sum(1)[:, None]  # (B,P,h*w)
        return d2.clamp_min(0).unflatten(2, features.shape[2:])


def log_similarity(d2, eps=1e-4):
    """g_proto = ln((d2 + 1) / (d2 + eps)): ln(1 / eps) = 9.21 at d2 = 0, falling to 0. Same shape."""
    return torch.log((d2 + 1) / (d2 + eps))


def nearest_label(labels, size):
    """Labels (B,H,W) -> (B,h,w) of the same dtype: of each cell the pixel under its centre (nearest-exact)."""
    return F.interpolate(labels[:, None].float(), size, mode="nearest-exact")[:, 0].to(labels.dtype)


# ---- losses of stage 1 (Sec. 6) ------------------------------------------------------------------------------

def members_by_key(key, num_keys):
    """key (P,) int64 -> (num_keys,N): the p that have this key, rising, then -1. N: most p of one key, at least 1."""
    count, order = torch.bincount(key, minlength=num_keys), key.argsort(stable=True)
    place = torch.arange(len(key), device=key.device) - (count.cumsum(0) - count)[key[order]]
    table = torch.full((num_keys, max(1, int(count.max()))), -1, device=key.device)
    table[key[order], place] = order
    return table


def pair_table(prototype_class, prototype_scale):
    """(C,S,K): prototypes of each class and scale, -1 where there are fewer than K."""
    num_classes, num_scales = int(prototype_class.max()) + 1, int(prototype_scale.max()) + 1
    return members_by_key(prototype_class * num_scales + prototype_scale, num_classes * num_scales).unflatten(
        0, (num_classes, num_scales))


def diversity_loss(d2, labels, prototype_class, prototype_scale, table=None):
    """L_J: mean of exp(-J) over images b, classes c in them, scales s and pairs i < j of c's prototypes of scale s.

    J = (KL(p_i|p_j) + KL(p_j|p_i)) / 2 with p_i = softmax of the squared distances of prototype i over the pixels
    of class c in image b [D2]: 1 if both light up alike, 0 if elsewhere. d2 (B,P,h,w), labels (B,h,w), 255 ignored,
    prototype_class and prototype_scale (P,) int64 -> scalar. A class with a single pixel is left out; no term at
    all gives 0 and zero gradient. table: pair_table, which a training step passes in, as making it waits for the
    GPU. No loop: pixels are sorted into segments (b, c), and the normalisers cancel in
    J = sum over pixels of (p_i - p_j)(d_i - d_j) / 2.
    """
    table = pair_table(prototype_class, prototype_scale) if table is None else table      # (C,S,K)
    (num_classes, _, K), B, label = table.shape, len(d2), labels.flatten(1).long()
    if K < 2:
        return 0 * d2.sum()
    counts = label < num_classes                                     # (B,h*w) neither void nor without prototypes
    label = torch.where(counts, label, 0)
    first = num_classes * torch.arange(B, device=d2.device)[:, None]
    segment = torch.where(counts, first + label, B * num_classes).flatten()               # the last: left out
    own = table.flatten(1).clamp(min=0)[label]                       # (B,h*w,S*K)
    d = d2.flatten(2).transpose(1, 2).gather(2, own).flatten(0, 1)   # (pixels,S*K)
    empty = d.new_zeros(B * num_classes + 1, d.shape[1])
    index = segment[:, None].expand_as(d)
    highest = empty.scatter_reduce(0, index, d.detach(), "amax", include_self=False)
    d = d - highest.index_select(0, segment)
    mass = d.exp()
    p = mass / empty.index_add(0, segment, mass).index_select(0, segment)                 # softmax over the segment
    i, j = torch.triu_indices(K, K, 1, device=d.device)
    difference = (F.one_hot(i, K) - F.one_hot(j, K)).T.to(d.dtype)   # (K,pairs): a product is quicker than d[..., i]
    p, d = (x.view(-1, *table.shape[1:]) @ difference for x in (p, d))                    # (pixels,S,pairs)
    J = d.new_zeros(len(empty), *d.shape[1:]).index_add(0, segment, 0.5 * p * d)[:-1]
    pixels = d.new_zeros(len(empty)).index_add(0, segment, d.new_ones(len(segment)))[:-1]
    there = (table[..., i] >= 0) & (table[..., j] >= 0)              # (C,S,pairs)
    valid = (pixels >= 2)[:, None, None] & there.repeat(B, 1, 1)
    return torch.where(valid, (-J).exp(), 0).sum() / valid.sum().clamp(min=1)


def off_class_l1(weight, class_of_column):
    """L_L1: sum of |w| where the row is not the column's class. weight (C,F), class_of_column (F,) -> scalar."""
    rows = torch.arange(len(weight), device=weight.device)[:, None]
    return (weight.abs() * (rows != class_of_column)).sum()


# ---- groups, stage 2 (Sec. 9, 13; formulas: released code) ---------------------------------------------------

def project_simplex(w):
    """The nearest point (Euclid) with entries >= 0 and sum 1, for every row of w (...,n) -> same shape.

    It is max(w - theta, 0): theta by sorting (Held et al. 1974, Duchi et al. 2008), all rows at once.
    """
    falling = w.sort(-1, descending=True).values
    count = torch.arange(1, w.shape[-1] + 1, device=w.device)
    theta = (falling.cumsum(-1) - 1) / count                         # if the first `count` entries stay positive
    last = (falling > theta).sum(-1, keepdim=True) - 1
    return (w - theta.gather(-1, last)).clamp_min(0)


def group_activations(similarity, weights, members):
    """G_{c,g} = exp(sum_m w_{g,c}[m] g_proto(member m of c)): a weighted geometric mean, from 1 to 1e4, in float32.

    similarity (B,P,h,w), weights (C,G,N), members (C,N) int64, -1 = none -> (B,C*G,h,w), class-major. A weight
    at -1 counts nothing; a class without members has activation 1.
    """
    C, G, N = weights.shape
    with torch.autocast(similarity.device.type, enabled=False):      # an error of 0.01 in the exponent is 1 %
        weights, s = weights.float() * (members >= 0)[:, None], similarity.float().flatten(2)   # (C,G,N), (B,P,h*w)
        if C * s.shape[1] <= 8192:                                   # one product is quicker than many small ones
            rows = weights.new_zeros(C * G, s.shape[1]).scatter_add(
                1, members.clamp(min=0).repeat_interleave(G, dim=0), weights.flatten(0, 1))     # (C*G,P)
            exponent = rows @ s                                      # (B,C*G,h*w)
        else:
            own = s[:, members.clamp(min=0).flatten()].unflatten(1, (C, N))               # (B,C,N,h*w)
            exponent = (weights @ own).flatten(1, 2)
        return exponent.exp().unflatten(2, similarity.shape[2:])


def entropy_loss(weights, members):
    """L_ent: mean over rows of -sum_m w ln(w + 1e-5) / ln(members). weights (C,G,N), members (C,N) -> scalar.

    Rows of classes with fewer than two members are left out (the released code divides by ln 1 = 0 there).
    """
    there = members >= 0                                             # (C,N)
    count = there.sum(1)
    entropy = -(weights * (weights + 1e-5).clamp_min(1e-5).log() * there[:, None]).sum(2)   # (C,G)
    share = entropy / count.clamp(min=2).to(weights.dtype).log()[:, None]
    rows = (count >= 2)[:, None].expand_as(share)
    return torch.where(rows, share, 0).sum() / rows.sum().clamp(min=1)


def threshold_groups(weights, alpha):
    """Sec. 9: weights below alpha become 0. Not renormalised, nothing is trained again. Same shape."""
    return torch.where(weights < alpha, 0, weights)


class Groups(nn.Module):
    """Stage 2: similarities (B,P,h,w) -> logits (B,C,h,w) by way of C*G group activations."""

    def __init__(self, prototype_class, num_classes, num_groups):
        super().__init__()
        self.register_buffer("members", members_by_key(prototype_class, num_classes))           # (C,N)
        there = (self.members >= 0)[:, None]                         # (C,1,N)
        bound = there.sum(2, keepdim=True).clamp(min=1).rsqrt()      # nn.Linear's: 1 / sqrt(members)
        draw = torch.rand(num_classes, num_groups, self.members.shape[1])
        self.weights = nn.Parameter((2 * draw - 1) * bound)          # w_{g,c}
        self.last_layer = nn.Linear(num_classes * num_groups, num_classes, bias=False)                  # w_h_group
        self.register_buffer("class_of_group", torch.arange(num_classes).repeat_interleave(num_groups)) # (C*G,)
        self.last_layer.weight.data.copy_(initial_head(self.class_of_group, num_classes))
        self.to_simplex()

    @torch.no_grad()
    def to_simplex(self):
        """After every optimizer step: rows back on the simplex of their class's members."""
        none = (self.members < 0)[:, None]
        self.weights.copy_(project_simplex(self.weights.masked_fill(none, -1e4)).masked_fill(none, 0))

    def activations(self, similarity, alpha=0.0):
        """(B,P,h,w) -> (B,C*G,h,w); weights below alpha count as 0."""
        there = (self.members >= 0).any(1)[self.class_of_group, None, None]               # [D5]
        return group_activations(similarity, threshold_groups(self.weights, alpha), self.members) * there

    def forward(self, similarity, alpha=0.0):
        return on_maps(self.last_layer.weight, self.activations(similarity, alpha))


def initial_head(class_of_column, num_classes):
    """(C,F): 1 for the column's own class, -0.5 for the others."""
    return F.one_hot(class_of_column, num_classes).T * 1.5 - 0.5


def on_maps(weight, maps):
    """A linear layer at every pixel: (C,F), (B,F,h,w) -> (B,C,h,w)."""
    return (weight @ maps.flatten(2)).unflatten(2, maps.shape[2:])


# ---- model (Sec. 6; released code) ---------------------------------------------------------------------------

class DeepLab(nn.Module):
    """Backbone and ASPP. As it is, DeepLabv2: the ASPP maps are summed and are the logits.

    forward(x (B,3,H,W)) -> list of (logits (B,C,h,w), None). In training one entry for each size of the input, the
    image's own first, and the maximum of all; in eval mode the maximum only.
    """

    def __init__(self, backbone, num_channels, rates, summed=True, input_scales=(), frozen_bn=True):
        super().__init__()
        self.backbone, self.summed, self.input_scales = backbone, summed, input_scales
        self.frozen_bn, self.frozen = frozen_bn, False               # frozen: the backbone is not trained now
        self.aspp = nn.ModuleList(nn.Conv2d(backbone.channels, num_channels, 3, padding=r, dilation=r) for r in rates)
        for conv in self.aspp:
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)

    def train(self, mode=True):
        super().train(mode)
        self.backbone.train(mode and not self.frozen_bn and not self.frozen)              # [D10]
        return self

    def one_size(self, x):
        """(B,3,H,W) -> ASPP maps before the sigmoid, (B,S*D,h,w), or (B,D,h,w) if they are summed."""
        x = self.backbone(x)
        maps = [conv(x) for conv in self.aspp]
        return sum(maps) if self.summed else torch.cat(maps, 1)

    def maps(self, x):
        """(B,3,H,W) -> list of maps, see the class."""
        full = self.one_size(x)
        if not self.input_scales:
            return [full]
        others = [self.one_size(F.interpolate(x, scale_factor=s, mode="bilinear", align_corners=False))
                  for s in self.input_scales]
        largest = full
        for other in others:
            other = F.interpolate(other, full.shape[2:], mode="bilinear", align_corners=False)
            largest = torch.maximum(largest, other)
        return [full, *others, largest] if self.training else [largest]

    def forward(self, x):
        return [(maps, None) for maps in self.maps(x)]

    @torch.no_grad()
    def final_logits(self, x, cfg):
        """(B,3,H,W) -> (B,C,h,w) float32 in eval mode, as the network predicts."""
        with run.autocast(x.device, cfg.amp):
            return self(x)[-1][0].float()

    def readouts(self, x, cfg):
        """{name in metrics.json: logits} of all stages that are reported."""
        return {"plain": self.final_logits(x, cfg)}


class ScaleProtoSeg(DeepLab):
    """ASPP maps -> similarities to prototypes -> logits, by the last layer or, in stage 2, by the groups.

    forward(x) -> list as in DeepLab, of (logits (B,C,h,w), d2 (B,P,h,w)).
    """

    def __init__(self, backbone, depth, rates, summed, input_scales, frozen_bn, prototype_class, prototype_scale,
                 num_classes):
        super().__init__(backbone, depth, rates, summed, input_scales, frozen_bn)
        self.prototypes = nn.Parameter(torch.rand(len(prototype_class), depth))           # as features: in [0, 1]
        self.register_buffer("prototype_class", torch.as_tensor(prototype_class))         # (P,)
        self.register_buffer("prototype_scale", torch.as_tensor(prototype_scale))         # (P,)
        self.register_buffer("pairs", pair_table(self.prototype_class, self.prototype_scale), persistent=False)
        self.last_layer = nn.Linear(len(prototype_class), num_classes, bias=False)        # w_h_proto
        self.last_layer.weight.data.copy_(initial_head(self.prototype_class, num_classes))
        self.groups = None                                           # until stage 2

    def distances(self, maps):
        """(B,S*D,h,w) before the sigmoid -> d2 (B,P,h,w) float32."""
        return prototype_distances(maps.float().sigmoid(), self.prototypes, self.prototype_scale)

    def similarity(self, x, amp="off"):
        """Images (B,3,H,W) -> g_proto (B,P,h,w) in eval mode."""
        with run.autocast(x.device, amp):
            maps = self.maps(x)[-1]
        return log_similarity(self.distances(maps))

    def logits(self, similarity, alpha=0.0):
        """(B,P,h,w) -> (B,C,h,w), by the groups if there are any."""
        if self.groups is not None:
            return self.groups(similarity, alpha)
        return on_maps(self.last_layer.weight, similarity)

    def forward(self, x):
        maps = self.maps(x)
        with torch.autocast(x.device.type, enabled=False):           # float32: see prototype_distances
            d2 = [self.distances(m) for m in maps]
            return [(self.logits(log_similarity(d)), d) for d in d2]

    @torch.no_grad()
    def final_logits(self, x, cfg):
        return self.logits(self.similarity(x, cfg.amp), cfg.threshold)

    @torch.no_grad()
    def readouts(self, x, cfg):
        """Stage 1 with the last layer as it was at first, and fine-tuned; stage 2 before and after the threshold."""
        similarity = self.similarity(x, cfg.amp)
        head = initial_head(self.prototype_class, len(self.last_layer.weight))
        logits = {"stage1_projected": on_maps(head, similarity),
                  "stage1_finetuned": on_maps(self.last_layer.weight, similarity)}
        if self.groups is not None:
            logits |= {"stage2": self.groups(similarity),
                       "stage2_thresholded": self.groups(similarity, cfg.threshold)}
        return logits

    @torch.no_grad()
    def keep(self, index):
        """Only the prototypes index (int64) stay, in this order."""
        self.prototypes = nn.Parameter(self.prototypes[index])
        self.prototype_class, self.prototype_scale = self.prototype_class[index], self.prototype_scale[index]
        self.last_layer.weight = nn.Parameter(self.last_layer.weight[:, index])
        self.last_layer.in_features = len(index)
        self.pairs = pair_table(self.prototype_class, self.prototype_scale)

    def start_groups(self, num_groups, seed=0):
        """New groups, drawn on the CPU by the seed alone."""
        torch.manual_seed(seed)
        groups = Groups(self.prototype_class.cpu(), len(self.last_layer.weight), num_groups)
        self.groups = groups.to(self.prototypes.device)


def first_prototypes(cfg, num_classes):
    """Class and scale of every prototype, two lists of P: scale by scale, in a scale class by class."""
    scales = len(cfg.rates) if cfg.method == "scaleprotoseg" else 1
    each = cfg.prototypes if cfg.method == "scaleprotoseg" else cfg.protoseg_prototypes
    return ([c for _ in range(scales) for c in range(num_classes) for _ in range(each)],
            [s for s in range(scales) for _ in range(num_classes * each)])


def build_model(cfg, progress, weights="none"):
    """The network of cfg.method for what progress says of classes, prototypes and groups."""
    width = dict(width=cfg.unet_width) if cfg.backbone == "unet" else {}
    backbone = build_dense(cfg.backbone, weights, cfg.output_stride, **width)             # [D1]
    rates, scales, num_classes = numbers(cfg, "rates"), numbers(cfg, "input_scales"), len(progress["classes"])
    if cfg.method == "deeplab":
        return DeepLab(backbone, num_classes, rates, True, scales, cfg.frozen_bn)         # [D11]
    net = ScaleProtoSeg(backbone, cfg.depth, rates, cfg.method == "protoseg", scales, cfg.frozen_bn,
                        progress["prototype_class"], progress["prototype_scale"], num_classes)
    if progress["phase"].startswith("group"):
        net.start_groups(cfg.groups)
    return net


# ---- a training step -----------------------------------------------------------------------------------------

def losses_of(model, net, x, labels, phase, cfg):
    """The weighted terms of the loss of a phase for x (B,3,H,W), labels (B,H,W): dict of scalars to be summed.

    Every size of the input is compared with labels at its own grid; the terms are means over the sizes. Labels
    shrink, logits do not grow.
    """
    with run.autocast(x.device, cfg.amp):
        outputs = model(x)
    losses = dict(ce=0.0)
    for logits, d2 in outputs:
        small, share = nearest_label(labels, logits.shape[2:]), 1 / len(outputs)
        total = F.cross_entropy(logits.float(), small, ignore_index=255, reduction="sum")
        losses["ce"] += share * total / (small != 255).sum().clamp(min=1)                 # 0 if all is void
        if d2 is not None and phase in ("warmup", "joint") and cfg.w_diversity:            # later d2 is fixed
            loss = diversity_loss(d2, small, net.prototype_class, net.prototype_scale, net.pairs)
            losses["diversity"] = losses.get("diversity", 0.0) + share * cfg.w_diversity * loss
    if phase == "finetune":
        losses["l1"] = cfg.w_l1 * off_class_l1(net.last_layer.weight, net.prototype_class)
    if phase.startswith("group"):
        losses["l1"] = cfg.w_l1_group * off_class_l1(net.groups.last_layer.weight, net.groups.class_of_group)
        losses["entropy"] = cfg.w_entropy * entropy_loss(net.groups.weights, net.groups.members)
    return losses


def train_step(model, net, optimizer, scheduler, x, labels, phase, cfg):
    """One iteration; returns the terms of the loss, detached, on the device. model: net, or DDP around it.

    The batch goes through in parts of --micro-batch images, whose gradients add up.
    """
    sums, size = {}, cfg.micro_batch or len(x)
    parts = list(zip(x.split(size), labels.split(size)))
    optimizer.zero_grad(set_to_none=True)
    for k, (part, target) in enumerate(parts, 1):
        with contextlib.nullcontext() if model is net or k == len(parts) else model.no_sync():          # DDP: once
            losses = losses_of(model, net, part, target, phase, cfg)
            (sum(losses.values()) * (len(part) / len(x))).backward()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.detach() * (len(part) / len(x))
    optimizer.step()
    scheduler.step()
    if phase.startswith("group"):
        net.groups.to_simplex()
    return sums


def build_optimizer(net, phase, cfg, device):
    """A fresh Adam for the phase over what it trains (Sec. 6), and its schedule; nothing else gets a gradient."""
    net.requires_grad_(False)
    bn = {id(p) for p in norm_parameters(net.backbone)}
    backbone = [p for p in net.backbone.parameters() if not (cfg.frozen_bn and id(p) in bn)]
    aspp = dict(params=list(net.aspp.parameters()), lr=cfg.lr, weight_decay=cfg.weight_decay)           # [D3]
    prototypes = [dict(params=[net.prototypes], lr=cfg.lr)] if isinstance(net, ScaleProtoSeg) else []
    if phase == "warmup":
        groups = [aspp, *prototypes]
    elif phase == "joint":
        groups = [dict(params=backbone, lr=cfg.backbone_lr, weight_decay=cfg.weight_decay), aspp, *prototypes]
    elif phase == "finetune":
        groups = [dict(params=[net.last_layer.weight], lr=cfg.finetune_lr)]
    elif phase == "group_warmup":
        groups = [dict(params=[net.groups.weights], lr=cfg.group_lr)]
    else:
        groups = [dict(params=[net.groups.weights, net.groups.last_layer.weight], lr=cfg.group_lr)]
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    net.frozen = phase != "joint"
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.999), fused=device.type == "cuda")
    power = 0.9 if phase.endswith("joint") else 0.0                   # 0: constant
    return optimizer, run.poly_schedule(optimizer, max(getattr(cfg, phase), 1), power)


# ---- projection, duplicates, pruning (released code) ---------------------------------------------------------

class Source(NamedTuple):
    """Where a projected prototype comes from: cell (row, column) of the feature map of a training image."""
    image: int                                                       # its number in the projection split
    row: int
    column: int
    distance: float                                                  # squared, from the prototype before


@torch.no_grad()
def project_prototypes(net, loader, device):
    """Every prototype becomes the nearest pixel feature of its own class and scale in the images of the loader.

    loader: batches with image (1,3,h,w), mask (1,H,W), index, in order; each goes through the network once. All
    distances are to the old prototypes, which move after the last image; of equal ones the first wins. Returns a
    Source for each of the P; where no pixel has the class Source(-1, -1, -1, inf), and the prototype stays [D4].
    """
    net.eval()
    P, D = net.prototypes.shape
    moved = net.prototypes.clone()
    best = torch.full((P,), math.inf, device=device)
    where = torch.full((P, 3), -1, device=device)                    # image, row, column
    for batch in tqdm(loader, desc="project", leave=False, disable=None):
        x = batch["image"].to(device, memory_format=torch.channels_last)
        z = net.maps(x)[-1].float().sigmoid()                        # (1,S*D,h,w) [D14]
        d2 = prototype_distances(z, net.prototypes, net.prototype_scale)[0]               # (P,h,w)
        labels = nearest_label(batch["mask"].to(device), d2.shape[1:])                    # (1,h,w)
        d2 = d2.masked_fill(labels != net.prototype_class[:, None, None], math.inf)
        nearest, cell = d2.flatten(1).min(1)                         # (P,)
        row, column = cell // d2.shape[2], cell % d2.shape[2]
        patch = z.unflatten(1, (-1, D))[0, net.prototype_scale, :, row, column]           # (P,D)
        closer = nearest < best
        best = torch.where(closer, nearest, best)
        moved = torch.where(closer[:, None], patch, moved)
        image = torch.full_like(row, int(batch["index"]))
        where = torch.where(closer[:, None], torch.stack([image, row, column], 1), where)
    net.prototypes.copy_(moved)
    return [Source(*place, distance) for place, distance in zip(where.tolist(), best.tolist())]


def remove_duplicates(prototypes, prototype_class, prototype_scale):
    """Indices (int64, rising) that are left when of equal vectors of one class and scale only the first stays."""
    keys = torch.stack([prototype_class, prototype_scale], 1).to(prototypes.dtype)        # exact below 2^24
    rows = torch.cat([keys, prototypes.detach()], 1).cpu()
    _, kind = rows.unique(dim=0, return_inverse=True)
    index = torch.arange(len(kind))
    first = torch.full_like(index[:int(kind.max()) + 1], len(kind)).scatter_reduce(0, kind, index, "amin")
    return first.sort().values.to(prototypes.device)


@torch.no_grad()
def prune_prototypes(net, loader, device, neighbours=6, least=3):
    """ProtoSeg's rule: True for a prototype with at least `least` of its nearest images' patches in its class.

    An image offers its one nearest cell that is not void [D7]; the `neighbours` nearest images count. A patch is
    of the class if any of its pixels is. loader as in project_prototypes -> (P,) bool.
    """
    net.eval()
    distance, hit = [], []
    for batch in tqdm(loader, desc="prune", leave=False, disable=None):
        d2 = net.distances(net.maps(batch["image"].to(device, memory_format=torch.channels_last))[-1])[0]  # (P,h,w)
        mask = batch["mask"].to(device)
        void = nearest_label(mask, d2.shape[1:]) == 255              # (1,h,w)
        nearest, cell = d2.masked_fill(void, math.inf).flatten(1).min(1)                  # (P,)
        other = int(net.prototype_class.max()) + 1                   # void, and classes without prototypes
        inside = torch.zeros(other + 1, *mask.shape[1:], device=device).scatter_(0, mask.clamp(max=other), 1)
        inside = F.adaptive_max_pool2d(inside, d2.shape[1:]).flatten(1)                   # (C+1,h*w)
        present = inside[net.prototype_class, cell].bool()
        distance.append(nearest)
        hit.append(present & nearest.isfinite())
    distance, hit = torch.stack(distance), torch.stack(hit)          # (images,P)
    near = distance.topk(min(neighbours, len(distance)), dim=0, largest=False).indices
    return hit.gather(0, near).sum(0) >= min(least, len(distance))


# ---- training ------------------------------------------------------------------------------------------------

def to_device(batch, device):
    cuda = device.type == "cuda"                                     # only there are batches in pinned memory
    x = batch["image"].to(device, non_blocking=cuda, memory_format=torch.channels_last)
    return x, batch["mask"].to(device, non_blocking=cuda)


def open_sets(cfg):
    """{"train", "project", "val", "test"}: SegmentationSets."""
    splits = dict(train=cfg.train_split, project=cfg.project_split or cfg.train_split, val=cfg.val_split,
                  test=cfg.test_split)
    opened = {split: datasets.open_dataset(cfg.dataset, cfg.data, split) for split in dict.fromkeys(splits.values())}
    return {use: opened[split] for use, split in splits.items()}


def test_loader(data, cfg, device, rank=0, world=1):
    """Whole images as they are tested, one a batch."""
    view = loaders.TestView(data, cfg.test_size, cfg.test_square)
    return loaders.eval_loader(view, cfg.workers, device, rank, world)


def native_loader(data, cfg, device):
    """Whole images in their own size: projection and analysis."""
    return loaders.eval_loader(loaders.TestView(data, 0), cfg.workers, device)


def train_phase(net, phase, sets, progress, cfg, device, rank, world):
    """One phase of PHASES with its log and checkpoints; starts where progress says, or does nothing if it is done."""
    phases, out, total = PHASES[cfg.method], Path(cfg.out), getattr(cfg, phase)
    if phases.index(progress["phase"]) > phases.index(phase):
        return
    optimizer, scheduler = build_optimizer(net, phase, cfg, device)
    model, parts = run.distribute(net, device, world), dict(model=net, optimizer=optimizer, scheduler=scheduler)
    if progress["phase"] == phase and progress["iteration"]:
        run.load_checkpoint(out / "last.pt", parts, device)
    else:
        progress |= dict(phase=phase, iteration=0, sums={})
    start, offset, sums = progress["iteration"], progress["offset"], progress["sums"]
    view = training_view(sets["train"], cfg)
    loader = loaders.train_loader(view, cfg.batch_size, cfg.seed, offset + start, offset + total, cfg.workers,
                                  device, rank, world)
    began = time.perf_counter() - progress["seconds"]
    model.train()
    torch.backends.cudnn.benchmark = True                            # here alone: whole images differ in size
    bar = tqdm(loader, total=total, initial=start, desc=phase, leave=False, disable=True if rank else None)
    for iteration, batch in enumerate(bar, start + 1):
        for name, value in train_step(model, net, optimizer, scheduler, *to_device(batch, device), phase, cfg).items():
            sums[name] = sums.get(name, 0.0) + value                 # stays on the device: no sync per step
        saves = iteration % cfg.save_every == 0 or iteration == total
        evaluates = iteration % cfg.eval_every == 0 or iteration == total
        if saves or evaluates:
            means = mean_losses(sums, (iteration - 1) % cfg.eval_every + 1, phase, iteration)
        if evaluates:
            sums.clear()
            torch.backends.cudnn.benchmark = False
            log_row(net, sets["val"], progress, means, iteration, scheduler.get_last_lr()[0],
                    time.perf_counter() - began, cfg, device, rank, world)
            model.train()
            torch.backends.cudnn.benchmark = True
        if saves:
            run.share_buffers(net)
            progress |= dict(iteration=iteration, seconds=time.perf_counter() - began)
            run.save_checkpoint(out / "last.pt", parts, progress)
    torch.backends.cudnn.benchmark = False
    if not total:                                                    # nothing learns, but last.pt knows new groups
        run.save_checkpoint(out / "last.pt", parts, progress)
    progress |= dict(offset=offset + total, iteration=0, sums={})


def mean_losses(sums, steps, phase, iteration):
    """{name: sum on the device} -> {name: mean as a float} (rank 0 logs its own). UserError if one is not finite."""
    means = {name: float(value) / steps for name, value in sums.items()}
    if not all(map(math.isfinite, means.values())):
        raise UserError(f"the loss is not finite ({means}) by iteration {iteration} of {phase}: lower --lr, or use "
                        "--amp off; --resume goes back to the last good checkpoint.")
    return means


def log_row(net, val_set, progress, means, iteration, lr, seconds, cfg, device, rank, world):
    """Evaluate the network as it stands on val [D9], print, one more row of log.csv."""
    run.share_buffers(net)
    loader = test_loader(val_set, cfg, device, rank, world)
    score = evaluate(net, loader, val_set.num_classes, cfg, device, rank, stages=False)["final"]
    row = dict(phase=progress["phase"], iteration=iteration, lr=lr)
    row |= {key: means.get(key, "") for key in ("ce", "diversity", "l1", "entropy")}
    row |= dict(val_miou=score["miou"], val_pixel_acc=score["pixel_acc"], seconds=seconds)
    progress["log"].append(row)
    if rank == 0:
        run.write_csv(Path(cfg.out) / "log.csv", progress["log"])
        texts = [f"{name} {value:.3f}" for name, value in means.items()]
        texts += [f"{cfg.val_split} mIoU {score['miou']:.1f}", run.duration(seconds)]
        tqdm.write(f"{progress['phase']} {iteration}: {', '.join(texts)}")


def project(net, sets, progress, cfg, device, rank, world):
    """The end of stage 1's training: projection, absent classes [D4], duplicates, ProtoSeg's pruning.

    What the report needs goes into progress. All ranks do the same and end with rank 0's prototypes.
    """
    phases, out, start = PHASES[cfg.method], Path(cfg.out), time.perf_counter()
    if phases.index(progress["phase"]) > phases.index("project"):
        return
    if progress["phase"] == "project":
        run.load_checkpoint(out / "last.pt", dict(model=net), device)
        return
    net.requires_grad_(False)
    loader = native_loader(sets["project"], cfg, device)
    sources, total = project_prototypes(net, loader, device), len(net.prototypes)
    if dist.is_initialized():
        dist.broadcast(net.prototypes.data, 0)                       # near ties may differ between GPUs
    moved = torch.tensor([source.image >= 0 for source in sources], device=device)
    absent = sorted(set(net.prototype_class[~moved].tolist()))
    if not moved.any():
        raise UserError(f"no pixel of the {cfg.project_split or cfg.train_split} split is labelled at the stride of "
                        "the network, so no prototype can be projected: check the masks.")
    distinct = remove_duplicates(net.prototypes, net.prototype_class, net.prototype_scale)
    index = distinct[moved[distinct]]
    net.keep(index)
    counts = dict(prototypes_at_first=total, absent_classes=[progress["classes"][c] for c in absent],
                  of_absent_classes=int((~moved).sum()), duplicates=int(moved.sum()) - len(index), pruned=0)
    if cfg.method == "protoseg":
        kept = prune_prototypes(net, loader, device).to(torch.uint8)
        if dist.is_initialized():
            dist.broadcast(kept, 0)
        kept = kept.bool()
        if not kept.any():
            raise UserError("ProtoSeg's pruning left no prototype: train longer (--schedule, --joint).")
        counts["pruned"] = int((~kept).sum())
        net.keep(kept.nonzero()[:, 0])
        index = index[kept]
    progress |= dict(phase="project", iteration=0, counts=counts, sources=[list(sources[p]) for p in index.tolist()],
                     prototype_class=net.prototype_class.tolist(), prototype_scale=net.prototype_scale.tolist(),
                     seconds=progress["seconds"] + time.perf_counter() - start)
    if rank == 0:
        print(f"projected {total} prototypes onto training images; {len(index)} left: {counts['duplicates']} "
              f"duplicates, {counts['pruned']} pruned, {counts['of_absent_classes']} of classes without a training "
              f"pixel{' (' + ', '.join(counts['absent_classes']) + ')' if absent else ''}", flush=True)
    log_row(net, sets["val"], progress, {}, 0, 0.0, progress["seconds"], cfg, device, rank, world)
    run.save_checkpoint(out / "last.pt", dict(model=net), progress)


def training_view(data, cfg):
    return loaders.TrainView(data, 0, cfg.crop, (cfg.scale_min, cfg.scale_max), photometric=False,
                             crop_retries=0)


def stage1_of(cfg, classes):
    """--stage1: (model's state, progress) at the end of another run's stage 1. UserError if it does not fit."""
    other = run.read_config(Config, cfg.stage1)
    for name in ("method", "dataset", "train_split", "project_split", "backbone", "output_stride", "unet_width",
                 "rates", "depth", "input_scales", "frozen_bn"):
        if getattr(other, name) != getattr(cfg, name):
            raise UserError(f"--stage1 {cfg.stage1} was trained with --{name.replace('_', '-')} "
                            f"{getattr(other, name)}, not {getattr(cfg, name)}: use that run's settings.")
    saved = run.read_checkpoint(Path(cfg.stage1) / "stage1.pt")
    if saved["progress"]["classes"] != list(classes):
        raise UserError(f"--stage1 {cfg.stage1} knows other classes than this data set: pass the --data of that run.")
    return saved["model"], saved["progress"]


def prepare(cfg, sets, device, rank):
    """(net, progress): new, from --stage1, or resumed. Makes the run folder once the model stands."""
    last, classes = Path(cfg.out) / "last.pt", list(sets["train"].classes)
    prototype_class, prototype_scale = first_prototypes(cfg, len(classes))
    progress = dict(phase="warmup", iteration=0, offset=0, seconds=0.0, log=[], sums={}, classes=classes,
                    prototype_class=prototype_class, prototype_scale=prototype_scale)
    resumes, state = cfg.resume and last.exists(), None              # killed before the first: start again
    if resumes:
        progress = read_progress(cfg, classes)
    elif cfg.stage1:
        state, progress = stage1_of(cfg, classes)
    torch.manual_seed(cfg.seed)
    net = build_model(cfg, progress, "none" if resumes or state else cfg.weights)
    if resumes:
        run.load_checkpoint(last, dict(model=net), torch.device("cpu"))
    elif state:
        net.load_state_dict(state)
        progress |= dict(phase="group_warmup", iteration=0)           # stage 1 is done
    run.start_run(cfg, rank)
    torch.manual_seed(cfg.seed + 1 + rank)
    return net.to(device, memory_format=torch.channels_last), progress


def read_progress(cfg, classes=None):
    """The progress in OUT/last.pt. UserError: none, of another script, or of other classes than these."""
    path = Path(cfg.out) / "last.pt"
    progress = run.read_checkpoint(path)["progress"]
    if not {"phase", "classes", "offset"} <= set(progress):
        raise UserError(f"{path} is not a checkpoint of this script: pass the --out of one of its runs.")
    if classes is not None and progress["classes"] != list(classes):
        raise UserError(f"the run in {cfg.out} knows {len(progress['classes'])} classes and {cfg.dataset} in "
                        f"{cfg.data} has {len(classes)}, or other names: pass the --data of that run.")
    return progress


def train(cfg, device, rank=0, world=1):
    """All phases of the method, then the report. Returns what metrics.json holds (None on other ranks than 0)."""
    sets, out = open_sets(cfg), Path(cfg.out)
    parts = open_parts(sets["test"], cfg.parts)                      # a wrong --parts is told now, not at the end
    if parts is not None:
        parts.keypoints(next(i for i in range(len(sets["test"])) if parts.has(i)))
    net, progress = prepare(cfg, sets, device, rank)
    announce(net, sets, progress, cfg, device, rank, world)
    for phase in PHASES[cfg.method]:
        if phase == "project":
            project(net, sets, progress, cfg, device, rank, world)
            continue
        if phase.startswith("group") and net.groups is None:
            net.start_groups(cfg.groups, cfg.seed)
        train_phase(net, phase, sets, progress, cfg, device, rank, world)
        if phase == "finetune" and progress["phase"] == phase and cfg.method == "scaleprotoseg":
            run.save_checkpoint(out / "stage1.pt", dict(model=net), progress)
    return report(net, cfg, sets, progress, device, rank, world)


def announce(net, sets, progress, cfg, device, rank, world):
    """Expected time and peak memory, measured on one iteration of the joint phase; changes nothing.

    Iterations in which nothing but a last layer or groups learn count as a forward pass.
    """
    left = cfg.warmup + cfg.joint - progress["offset"] - progress["iteration"]
    if left <= 0 or progress["phase"] not in ("warmup", "joint"):
        return
    later = sum(getattr(cfg, phase) for phase in PHASES[cfg.method][3:])
    images = later * cfg.batch_size + (left + later) // cfg.eval_every * len(sets["val"]) + len(sets["test"])
    optimizer, scheduler = build_optimizer(net, "joint", cfg, device)
    parts, view = dict(model=net, optimizer=optimizer, scheduler=scheduler), training_view(sets["train"], cfg)
    net.train()
    torch.backends.cudnn.benchmark = True
    run.announce(lambda batch: train_step(net, net, optimizer, scheduler, *to_device(batch, device), "joint", cfg),
                 lambda: default_collate([view[(i % len(view), i)] for i in range(cfg.batch_size // world)]),
                 parts, left, images, cfg, device, rank, world)


# ---- evaluation: IoU -----------------------------------------------------------------------------------------

@torch.inference_mode()
def evaluate(net, loader, num_classes, cfg, device, rank=0, stages=True):
    """{stage: rates in percent (common/metrics.py)} over the split, summed over ranks; one pass for all stages.

    stages=False: only "final", the network as it predicts. Logits are resized to the label bilinearly, then argmax;
    void pixels do not count.
    """
    net.eval()
    matrices = {}
    for batch in tqdm(loader, desc="evaluate", leave=False, disable=True if rank else None):
        x, labels = to_device(batch, device)
        logits = net.readouts(x, cfg) if stages else {"final": net.final_logits(x, cfg)}
        for name, maps in logits.items():
            matrix = matrices.setdefault(name, ConfusionMatrix(num_classes, device))
            matrix.update(labels, upsample(maps, labels.shape[1:]).argmax(1))
    for matrix in matrices.values():
        matrix.all_reduce()
    return {name: matrix.summary() for name, matrix in matrices.items()}


def upsample(maps, size, mode="bilinear"):
    """(B,F,h,w) -> (B,F,*size) float32."""
    return F.interpolate(maps.float(), size, mode=mode, align_corners=False)


# ---- evaluation: parts (Sec. 6; formulas: released code) [D8] ------------------------------------------------

def used_prototypes(net, alpha):
    """(P,) bool: in stage 2 those with a weight of alpha or more in some group, before it all."""
    used = torch.ones_like(net.prototype_class, dtype=torch.bool)
    if net.groups is None:
        return used
    members, weights = net.groups.members, threshold_groups(net.groups.weights, alpha)    # (C,N), (C,G,N)
    used[members[members >= 0]] = (weights > 0).any(1)[members >= 0]
    return used


def part_presence(similarity, class_mask, keypoints, num_parts, quantile=0.8, over="class"):
    """Do prototypes light up on the keypoints of parts in one image?

    similarity (P,H,W) of P prototypes of a class at the image's size, class_mask (H,W) bool, keypoints (K,3): part
    id 1..Q, x, y -> present (P,Q) bool: some keypoint of the part lies on an active pixel; exists (Q,) bool: the
    image has a keypoint of it. Active: above the quantile and inside the class. The quantile of a map runs over
    the pixels of the class ("class", ours) or, to compare, over the whole map multiplied by the mask ("image") [D8].
    """
    pixels = similarity[:, class_mask] if over == "class" else (similarity * class_mask).flatten(1)       # (P,n)
    part, x, y = keypoints.long().unbind(1)
    exists = torch.zeros(num_parts, dtype=torch.bool, device=similarity.device)
    exists[part - 1] = True
    present = torch.zeros(len(similarity), num_parts, dtype=torch.int64, device=similarity.device)
    if not pixels.shape[1] or not len(part):
        return present.bool(), exists
    active = similarity[:, y, x] > row_quantile(pixels, quantile)[:, None]                # (P,K)
    active = active & class_mask[y, x]
    present.index_add_(1, part - 1, active.long())
    return present > 0, exists


def row_quantile(values, q):
    """Quantile of every row (R,n) -> (R,), linear between neighbours; torch.quantile stops at 16 million values."""
    if values.device.type == "mps":                                  # old torch lacks kthvalue there
        return row_quantile(values.cpu(), q).to("mps")
    place = q * (values.shape[1] - 1)
    low = int(place)
    below = values.kthvalue(low + 1, 1).values
    above = values.kthvalue(min(low + 2, values.shape[1]), 1).values
    return torch.lerp(below, above, place - low)


@torch.no_grad()
def part_scores(net, data, parts, cfg, device):
    """Consistency and stability in percent for every quantile and as their mean (native image size).

    Consistency: share of the prototypes in use that light up on one and the same part in more than 80 % of the
    images that show this part. Stability: share of (image, class, prototype) whose parts stay the same under
    noise N(0, 0.2) on the normalised image. Both over classes with parts.
    """
    generator, used = torch.Generator().manual_seed(cfg.seed), used_prototypes(net, cfg.threshold)
    quantiles, shape = numbers(cfg, "quantiles"), (len(used), parts.num_parts)
    hits = torch.zeros(len(quantiles), *shape, device=device)        # images in which p lights up on q
    seen = torch.zeros(shape, device=device)                         # images of p's class that show q
    stable, pairs = torch.zeros(len(quantiles)), 0
    view = loaders.TestView(data, 0)
    for i in tqdm(range(len(data)), desc="parts", leave=False, disable=None):
        if not parts.has(i):
            continue
        sample, keypoints = view[i], parts.keypoints(i).to(device)   # (K,4)
        x, mask = sample["image"][None].to(device), sample["mask"].to(device)
        noise = 0.2 * torch.randn(x.shape, generator=generator).to(device)
        both = [net.similarity(image) for image in (x, x + noise)]
        for c in parts.classes:
            own = ((net.prototype_class == c) & used).nonzero()[:, 0]
            points = keypoints[keypoints[:, 0] == c, 1:]
            if not len(own) or not len(points) or not (mask == c).any():
                continue
            maps = [F.interpolate(s[:, own], mask.shape, mode="nearest")[0] for s in both]
            for k, q in enumerate(quantiles):
                (clean, exists), (noisy, _) = (part_presence(s, mask == c, points, parts.num_parts, q) for s in maps)
                hits[k, own] += clean
                stable[k] += (clean == noisy).all(1).sum().cpu()
            seen[own] += exists
            pairs += len(own)
    scored = seen.sum(1) > 0
    if not pairs:
        return dict(consistency=None, stability=None)
    rates = (hits / seen.clamp(min=1))[:, scored].amax(2)            # (quantiles, prototypes)
    consistency, stability = 100 * (rates > 0.8).float().mean(1), 100 * stable / pairs
    return dict(consistency=consistency.mean().item(), stability=stability.mean().item(),
                consistency_by_quantile=dict(zip(cfg.quantiles, consistency.tolist())),
                stability_by_quantile=dict(zip(cfg.quantiles, stability.tolist())))


@torch.no_grad()
def part_purity(net, data, parts, cfg, device, most=10):
    """Beyond the paper: is a prototype one part? In percent, over the prototypes in use of classes with parts.

    purity: of the `most` images in which it is most similar to a pixel of its class, the share that holds the
    same part at that pixel, whichever part is the most frequent. largest_part: the share of the part that covers
    most of the class; chance lies above it, as purity takes the most frequent of ten. Needs part maps.
    """
    used, similarity, part = used_prototypes(net, cfg.threshold), [], []
    area = torch.zeros(data.num_classes, parts.num_parts + 1)        # pixels of each part in each class
    view = loaders.TestView(data, cfg.test_size, cfg.test_square)
    for i in tqdm(range(len(data)), desc="purity", leave=False, disable=None):
        part_map = parts.part_map(i) if parts.has(i) else None
        if part_map is None:
            continue
        sample = view[i]
        s = net.similarity(sample["image"][None].to(device))[0].cpu()                     # (P,h,w)
        labels = nearest_label(sample["mask"][None], s.shape[1:])[0]
        ids = nearest_label(part_map[None].long(), s.shape[1:])[0].flatten()
        s = s.masked_fill(labels != net.prototype_class.cpu()[:, None, None], -1.0).flatten(1)
        highest, cell = s.max(1)
        similarity.append(highest)
        part.append(ids[cell])
        known = labels.flatten() < data.num_classes
        area.view(-1).index_add_(0, labels.flatten()[known] * area.shape[1] + ids[known], torch.ones(int(known.sum())))
    if not part:
        return {}
    similarity, part = torch.stack(similarity), torch.stack(part)    # (images,P)
    value, top = similarity.topk(min(most, len(part)), dim=0)
    shown = F.one_hot(part.gather(0, top), area.shape[1]) * (value >= 0)[..., None]       # (most,P,Q+1); 0 is no part
    share = shown.sum(0)[:, 1:].amax(1) / (value >= 0).sum(0).clamp(min=1)                # (P,)
    chance = (area[:, 1:].amax(1) / area.sum(1).clamp(min=1))[net.prototype_class.cpu()]
    counted = used.cpu() & torch.isin(net.prototype_class.cpu(), torch.tensor(parts.classes)) & (value[0] >= 0)
    if not counted.any():
        return {}
    return dict(purity=100 * share[counted].mean().item(), largest_part=100 * chance[counted].mean().item())


def scale_shares(net, similarity, c, alpha=0.0):
    """How much each scale adds to the logit of class c through its own groups: (P,h,w) -> (S,h,w).

    A group's product h_g G_g is split in proportion to its members' parts of the exponent, w_m g_proto(m).
    """
    groups, num_groups = net.groups, net.groups.weights.shape[1]
    real = groups.members[c] >= 0                                    # (N,)
    members = groups.members[c][real]                                # (n,)
    parts = threshold_groups(groups.weights[c][:, real], alpha)[..., None, None] * similarity[members]  # (G,n,h,w)
    exponent = parts.sum(1, keepdim=True)
    own = slice(c * num_groups, (c + 1) * num_groups)
    products = groups.last_layer.weight[c, own, None, None] * exponent[:, 0].exp()        # (G,h,w)
    share = (products[:, None] * parts / exponent.clamp_min(1e-9)).sum(0)                 # (n,h,w)
    return share.new_zeros(len(net.aspp), *share.shape[1:]).index_add(0, net.prototype_scale[members], share)


def rank_correlation(a, b):
    """Spearman's: correlation of the ranks of a and b (n,), equal values share a rank; None if one does not vary."""
    ranks = []
    for values in (a, b):
        _, place, count = values.unique(return_inverse=True, return_counts=True)
        ranks.append((count.cumsum(0) - (count - 1) / 2)[place])
    if len(a) < 3 or min(rank.std() for rank in ranks) == 0:
        return None
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


@torch.no_grad()
def size_and_scale(net, data, parts, cfg, device):
    """Beyond the paper, where objects are known (toy scenes): are small ones explained by small fields of view?

    For every object of which at least half is classified right: its size in pixels, and the scale that adds most to
    its class's logit, summed over the object. size_scale_correlation: Spearman's over all objects (1 = the larger,
    the larger the field of view). size_scale_within_class: the mean over classes, as some classes are all small.
    """
    rows = []                                                        # class, size, scale
    view = loaders.TestView(data, cfg.test_size, cfg.test_square)
    for i in tqdm(range(len(data)), desc="objects", leave=False, disable=None):
        objects = parts.object_map(i)
        if objects is None:
            return {}
        sample = view[i]
        mask, objects = sample["mask"], objects.long()
        similarity = net.similarity(sample["image"][None].to(device))
        prediction = upsample(net.logits(similarity, cfg.threshold), mask.shape).argmax(1)[0].cpu()
        for number in objects.unique().tolist():
            inside = objects == number
            c = int(mask[inside][0])
            if number == 0 or (prediction[inside] == c).float().mean() < 0.5 or net.groups.members[c, 0] < 0:
                continue
            shares = upsample(scale_shares(net, similarity[0], c, cfg.threshold)[None], mask.shape)[0].cpu()
            rows.append((c, int(inside.sum()), int(shares[:, inside].sum(1).argmax())))
    if not rows:
        return {}
    c, size, scale = torch.tensor(rows).T
    within = [rank_correlation(size[c == k], scale[c == k]) for k in c.unique()]
    within = [value for value in within if value is not None]
    return dict(size_scale_correlation=rank_correlation(size, scale), objects=len(rows),
                size_scale_within_class=sum(within) / len(within) if within else None,
                objects_by_scale=torch.bincount(scale, minlength=len(net.aspp)).tolist())


# ---- evaluation: groups (Sec. 9, 10, 12) ---------------------------------------------------------------------

def sparsity(net, cfg):
    """Tables 7, 8 and 10: prototypes in use, prototypes of a group on average, mean |w| of the last layer, and the
    parameters that come on top of the backbone and ASPP: used prototypes, group weights that are not 0, last layer."""
    used, P, D = used_prototypes(net, cfg.threshold), *net.prototypes.shape
    if net.groups is None:
        weight = net.last_layer.weight
        return dict(prototypes=P, mean_abs_weight=float(weight.detach().abs().mean()),
                    extra_parameters=P * D + weight.numel())
    weights, head = threshold_groups(net.groups.weights, cfg.threshold), net.groups.last_layer.weight
    alive = (net.groups.members >= 0).any(1)                         # classes with groups
    per_group = (weights > 0).sum(2)[alive].float()
    return dict(prototypes=int(used.sum()), group_average=float(per_group.mean()),
                mean_abs_weight=float(head.detach().abs().mean()),
                extra_parameters=int(used.sum()) * D + int((weights > 0).sum()) + head.numel())


def group_overlap(activation, percentile=95):
    """Table 9 for one image: activation (R,G,H,W) of the groups of R classes -> (intersection, union) in pixels.

    Every map is binarised above its own percentile over the image; the counts are sums over classes and pairs of
    groups. Sums over the images give the overlap: intersection / union.
    """
    maps = activation.flatten(2)                                     # (R,G,n)
    active = (maps > row_quantile(maps.flatten(0, 1), percentile / 100).view(*maps.shape[:2], 1)).float()
    both = active @ active.transpose(1, 2)                           # (R,G,G) pixels active in both
    i, j = torch.triu_indices(maps.shape[1], maps.shape[1], 1, device=maps.device)
    one = active.sum(2)                                              # (R,G)
    intersection = both[:, i, j].sum()
    return intersection, (one[:, i] + one[:, j]).sum() - intersection


@torch.no_grad()
def mean_overlap(net, data, cfg, device):
    """Table 9: overlap of a class's groups over the images that hold the class, in percent."""
    total, groups = torch.zeros(2, dtype=torch.float64), net.groups
    filled = (groups.weights >= cfg.threshold).any(2).flatten()[:, None, None]            # others are 1 everywhere
    for batch in tqdm(test_loader(data, cfg, device), desc="overlap", leave=False, disable=None):
        x, mask = to_device(batch, device)
        present = [c for c in mask.unique().tolist() if c != 255 and groups.members[c, 0] >= 0]
        if present:
            activation = groups.activations(net.similarity(x), cfg.threshold)[0] * filled                 # (C*G,h,w)
            activation = activation.unflatten(0, (-1, groups.weights.shape[1]))[present]
            total += torch.stack(group_overlap(upsample(activation, mask.shape[1:], "bicubic"))).cpu().double()
    return float(100 * total[0] / total[1]) if total[1] > 0 else None


@torch.no_grad()
def images_per_second(net, data, cfg, device):
    """Table 10 "It/s": whole test images from input to labels, the clock read when the device is done."""
    sample = loaders.TestView(data, cfg.test_size, cfg.test_square)[0]
    x = sample["image"][None].to(device, memory_format=torch.channels_last)
    net.eval()

    def label():
        return upsample(net.final_logits(x, cfg), sample["mask"].shape).argmax(1)
    return 1 / run.measured_speed(label, {}, device, repeats=11)


# ---- evaluation: quasi-equivariant prototypes (Sec. 11) ------------------------------------------------------

@torch.no_grad()
def equivariance(net, data, cfg, device, quantiles=(0.6, 0.7), least=0.5, least_cells=10):
    """Eq. (10): prototypes of two scales that light up alike when the image is scaled to make up for their rates.

    With r(s) = rate s / rate 1, prototype i of scale s sees the image shrunk by r(s'), prototype j of s' > s sees it
    shrunk by r(s); both maps go to the larger one's grid and are binarised at a quantile p_th over the class's cells.
    A pair is quasi-equivariant if the mean IoU over the images of the class [D12] is above `least`; pairs that share
    a prototype merge into a group. Returns {p_th: dict} with Fig. 7's ratios in percent and the pairs (i, j, IoU).
    """
    rates, P = numbers(cfg, "rates"), len(net.prototypes)
    factors = [rate / rates[0] for rate in rates]
    iou, seen = torch.zeros(len(quantiles), P, P, device=device), torch.zeros(P, P, device=device)
    count = min(cfg.equivariance, len(data))
    chosen = Subset(loaders.TestView(data, 0), [k * len(data) // count for k in range(count)])
    loader = loaders.eval_loader(chosen, cfg.workers, device)
    for batch in tqdm(loader, desc="equivariance", leave=False, disable=None):
        x, mask = to_device(batch, device)
        maps = [net.similarity(downscaled(x, f))[0] for f in factors]    # (P,h,w) for each size of the image
        for s in range(len(rates)):
            for t in range(s + 1, len(rates)):
                larger = maps[s]                                     # of the image shrunk by r(s): for scale t
                smaller = upsample(maps[t][None], larger.shape[1:])[0]                    # by r(t): for scale s
                labels = nearest_label(mask, larger.shape[1:])[0]
                for c in [c for c in labels.unique().tolist() if (labels == c).sum() >= least_cells]:
                    own = net.prototype_class == c
                    i, j = ((own & (net.prototype_scale == k)).nonzero()[:, 0] for k in (s, t))
                    if len(i) and len(j):
                        a, b = smaller[i][:, labels == c], larger[j][:, labels == c]      # (n_i,cells), (n_j,cells)
                        seen[i[:, None], j] += 1
                        for k, q in enumerate(quantiles):
                            iou[k, i[:, None], j] += pairwise_iou(a >= row_quantile(a, q)[:, None],
                                                                  b >= row_quantile(b, q)[:, None])
    iou = (iou / seen.clamp(min=1)).cpu()
    return {f"{q:g}": equivariance_ratios(net, iou[k], least) for k, q in enumerate(quantiles)}


def downscaled(x, factor):
    return x if factor == 1 else F.interpolate(x, scale_factor=1 / factor, mode="bilinear", antialias=True)


def pairwise_iou(a, b):
    """IoU of every row of a (n,k) bool with every row of b (m,k) bool -> (n,m)."""
    a, b = a.float(), b.float()
    both = a @ b.T
    return both / (a.sum(1)[:, None] + b.sum(1) - both).clamp(min=1)


def equivariance_ratios(net, iou, least):
    """iou (P,P) on the CPU -> the ratios of Fig. 7 in percent and the pairs found."""
    pairs = [(i, j, float(iou[i, j])) for i, j in (iou > least).nonzero().tolist()]
    group = list(range(len(iou)))                                    # merged: all members bear the smallest number
    for i, j, _ in pairs:
        a, b = group[i], group[j]
        group = [min(a, b) if g in (a, b) else g for g in group]
    paired = {p for pair in pairs for p in pair[:2]}
    num_groups, classes = len({group[p] for p in paired}), {int(net.prototype_class[p]) for p in paired}
    known = net.prototype_class.unique().numel()                     # classes with prototypes
    return dict(groups=num_groups, groups_to_learned_groups=100 * num_groups / (known * net.groups.weights.shape[1]),
                prototypes_in_groups=100 * len(paired) / len(iou), classes_with_groups=100 * len(classes) / known,
                pairs=sorted(pairs, key=lambda pair: -pair[2]))


# ---- report --------------------------------------------------------------------------------------------------

def report(net, cfg, sets, progress, device, rank, world):
    """Final evaluation on the test split, metrics.json and figures/ (rank 0 writes). Returns the metrics."""
    data, out = sets["test"], Path(cfg.out)
    scores = evaluate(net, test_loader(data, cfg, device, rank, world), data.num_classes, cfg, device, rank)
    if rank:
        return None
    final = list(scores.values())[-1]
    if all(rate is None for rate in final["iou"]):
        raise UserError(f"no pixel of the {cfg.test_split} split is labelled, so there is nothing to score: check "
                        "its masks, or choose another --test-split.")
    metrics = {key: final[key] for key in ("miou", "macc", "pixel_acc")}
    metrics |= dict(iou=dict(zip(data.classes, final["iou"])), absent=[data.classes[c] for c in final["absent"]])
    for stage, score in scores.items():
        iou = dict(zip(data.classes, score["iou"]))
        metrics[stage] = dict(miou=score["miou"], pixel_acc=score["pixel_acc"], iou=iou)
    if cfg.method != "deeplab":
        metrics |= progress["counts"] | sparsity(net, cfg) | analyse(net, cfg, sets, device)
    metrics |= dict(images_per_second=images_per_second(net, data, cfg, device), split=cfg.test_split,
                    preset=cfg.preset, method=cfg.method, seed=cfg.seed, threshold=cfg.threshold,
                    iterations={phase: getattr(cfg, phase) for phase in PHASES[cfg.method] if phase != "project"},
                    seconds=round(progress["seconds"], 1), device=device.type, processes=world,
                    parameters=sum(p.numel() for p in net.parameters()))
    run.write_json(out / "metrics.json", metrics)
    draw_figures(net, cfg, sets, progress, metrics, device)
    stages = ", ".join(f"{name} {score['miou']:.1f}" for name, score in scores.items())
    more = "" if cfg.method == "deeplab" else f"; {metrics['prototypes']} prototypes"
    more += f", {metrics['group_average']:.1f} a group" if "group_average" in metrics else ""
    print(f"{cfg.test_split} mIoU: {stages}{more}; see {out}/metrics.json and {out}/figures")
    return metrics


def analyse(net, cfg, sets, device):
    """The measures of interpretability that the data allow, as entries of metrics.json."""
    net.eval()
    data, found = sets["test"], {}
    parts = open_parts(data, cfg.parts)
    if parts is not None:
        found |= part_scores(net, data, parts, cfg, device) | part_purity(net, data, parts, cfg, device)
        if net.groups is not None:
            found |= size_and_scale(net, data, parts, cfg, device)
    if net.groups is not None:
        found["group_overlap"] = mean_overlap(net, data, cfg, device)
        if cfg.equivariance:
            found["equivariance"] = equivariance(net, sets["project"], cfg, device)
    return found


# ---- figures -------------------------------------------------------------------------------------------------

FIGURE_CLASSES, WIDTH = 20, 400                                      # classes with figures; pixels of a picture


class Drawing(NamedTuple):
    """What the figures of a run need. sources: the images that prototypes were projected to."""
    net: nn.Module
    cfg: Config
    progress: dict
    test: datasets.SegmentationSet
    sources: datasets.SegmentationSet
    device: torch.device


class Tile(NamedTuple):
    """Pictures of a projected prototype, uint8 (3,h,w)."""
    patch: torch.Tensor                                              # what it was projected to, the cell framed
    boxed: torch.Tensor                                              # the whole image, a frame around the patch
    heat: torch.Tensor                                               # its activation on this image
    caption: str                                                     # "p12, car, rate 6"


def shrink(image):
    """uint8 (3,H,W), at most WIDTH wide: a figure shows no more, and heat maps of large images are slow."""
    return image if image.shape[2] <= WIDTH else resize(image, [round(WIDTH * image.shape[1] / image.shape[2]), WIDTH])


def framed(image, box):
    """shrink() of the image with a frame that is still seen: at least 3 % of the width on a side."""
    least, frame = 3 * image.shape[2] // 100, []
    for low, high in (box[:2], box[2:]):
        middle, half = (low + high) / 2, max(high - low, least) / 2
        frame += [middle - half, middle + half]
    return shrink(figures.draw_box(image, frame, width=max(2, image.shape[2] // 120)))


def heat(image, values, vmax=None):
    """Heat map from 0 to vmax, or to the values' 99th percentile: one cell of 9.2 would leave the rest black."""
    values = values.cpu()
    return figures.heatmap(shrink(image), values, vmin=0,
                           vmax=float(row_quantile(values.flatten()[None], 0.99)) if vmax is None else vmax)


def cell_block(cell, grid, size):
    """y0, y1, x0, x1 in pixels of an image (H,W) of a cell (row, column) in a grid (h,w), ends exclusive."""
    return [edge for k in (0, 1) for edge in (cell[k] * size[k] // grid[k], -(-(cell[k] + 1) * size[k] // grid[k]))]


def region_box(similarity, cell, mask, margin=5):
    """y0, y1, x0, x1 of what a map (h,w) points at around a cell, in pixels of mask (H,W) bool, ends exclusive.

    The connected region above the map's 95th percentile inside the mask that touches the cell, and `margin` pixels
    (released code).
    """
    H, W = mask.shape
    values = upsample(similarity[None, None], (H, W), "bicubic")[0, 0].cpu() * mask
    active = values > row_quantile(values.flatten()[None], 0.95)[0]
    y0, y1, x0, x1 = cell_block(cell, similarity.shape, (H, W))
    active[y0:y1, x0:x1] = True
    regions = torch.from_numpy(connected_components(active.to(torch.uint8).numpy()))
    y, x = (regions == regions[y0, x0]).nonzero().T
    return (max(int(y.min()) - margin, 0), min(int(y.max()) + 1 + margin, H),
            max(int(x.min()) - margin, 0), min(int(x.max()) + 1 + margin, W))


def read_sample(data, i):
    """Image uint8 (3,H,W), label (H,W) and network input (1,3,H,W) of one picture in its own size."""
    image, mask = data.read(i)
    return image, mask.long(), transforms.normalise(image)[None]


def network_input(image, cfg, device):
    """uint8 (3,H,W) -> (1,3,h,w) as tested."""
    fit = transforms.resize_to_square if cfg.test_square else transforms.resize_to_short_side
    return transforms.normalise(fit(image, cfg.test_size))[None].to(device)


def predict_labels(net, image, cfg, device):
    """uint8 (3,H,W) -> class ids (H,W) uint8 on the CPU."""
    logits = net.final_logits(network_input(image, cfg, device), cfg)
    return upsample(logits, image.shape[1:]).argmax(1)[0].to(torch.uint8).cpu()


def exemplars(data, most=FIGURE_CLASSES):
    """{class id: number of the image that shows most of it}, for the `most` classes with the most pixels."""
    counts = torch.stack([torch.bincount(data.read_mask(i).flatten(), minlength=256)[:data.num_classes]
                          for i in range(len(data))])                # (images,C)
    order = counts.sum(0).argsort(descending=True, stable=True)[:most].tolist()
    return {c: int(counts[:, c].argmax()) for c in sorted(order) if counts[:, c].any()}


def class_file(d, c):
    return d.progress["classes"][c].replace(" ", "-").replace("/", "-")


def caption_of(d, p):
    scale = f", rate {d.cfg.rates[int(d.net.prototype_scale[p])]}" if d.cfg.method == "scaleprotoseg" else ""
    return f"p{p}, {d.progress['classes'][int(d.net.prototype_class[p])]}{scale}"


@torch.no_grad()
def prototype_tiles(d, which):
    """{p: Tile} for the prototypes `which`."""
    by_image, tiles = {}, {}
    for p in which:
        by_image.setdefault(d.progress["sources"][p][0], []).append(p)
    for i, members in by_image.items():
        image, mask, x = read_sample(d.sources, i)
        similarity = d.net.similarity(x.to(d.device))[0].cpu()
        for p in members:
            cell = d.progress["sources"][p][1:3]
            y0, y1, x0, x1 = box = region_box(similarity[p], cell, mask == int(d.net.prototype_class[p]))
            marked = figures.draw_box(image, cell_block(cell, similarity.shape[1:], mask.shape), width=1)
            tiles[p] = Tile(shrink(marked[:, y0:y1, x0:x1]), framed(image, box), heat(image, similarity[p]),
                            caption_of(d, p))
    return tiles


def members_of(net, c, g, alpha):
    """[(prototype, weight)] of group g of class c, heaviest first; weights below alpha are left out."""
    weights, members = threshold_groups(net.groups.weights[c, g], alpha).tolist(), net.groups.members[c].tolist()
    return sorted([(p, w) for p, w in zip(members, weights) if p >= 0 and w > 0], key=lambda pair: -pair[1])


def draw_figures(net, cfg, sets, progress, metrics, device):
    """All figures of a run; the README says what each shows."""
    net.eval()
    d, folder = Drawing(net, cfg, progress, sets["test"], sets["project"], device), Path(cfg.out) / "figures"
    draw_examples(d, folder)
    if cfg.method == "deeplab":
        return
    shown = exemplars(d.test)
    tiles = prototype_tiles(d, [p for p, c in enumerate(net.prototype_class.tolist()) if c in shown])
    draw_prototypes(d, shown, tiles, folder)
    draw_nearest_patches(d, shown, tiles, folder)
    draw_nearest_prototypes(d, tiles, folder)
    if net.groups is not None:
        for c, i in shown.items():
            draw_groups(d, c, i, tiles, folder)
    if "equivariance" in metrics:
        draw_equivariance(d, metrics["equivariance"], tiles, folder)


def label_cells(d, image, name, label, prediction):
    """A row: image, label, prediction; and the classes to be named below."""
    cells = [(shrink(image), name), (shrink(figures.overlay(image, label)), "label"),
             (shrink(figures.overlay(image, prediction)), "prediction")]
    return cells, {*label.unique().tolist(), *prediction.unique().tolist()} - {255}


def legend_of(d, present):
    return {c: d.progress["classes"][c] for c in sorted(present)}


def draw_examples(d, folder):
    """examples.png: images, labels, predictions."""
    rows, present = [], set()
    for i in sorted({round(k * (len(d.test) - 1) / 3) for k in range(4)}):
        image, label = d.test.read(i)
        cells, ids = label_cells(d, image, d.test.name_of(i), label, predict_labels(d.net, image, d.cfg, d.device))
        rows.append(cells)
        present |= ids
    figures.save_grid(folder / "examples.png", rows, title=f"{d.cfg.test_split} images", legend=legend_of(d, present))


def draw_prototypes(d, shown, tiles, folder):
    """prototypes-CLASS.png: a row for each scale; every prototype in its source image, and its activation there."""
    used = used_prototypes(d.net, d.cfg.threshold).tolist()
    for c in shown:
        rows = []
        for s in range(len(d.cfg.rates)):
            row = []
            for p in sorted(tiles):
                if (int(d.net.prototype_class[p]), int(d.net.prototype_scale[p])) == (c, s):
                    row += [(tiles[p].boxed, tiles[p].caption + ("" if used[p] else " (in no group)")),
                            (tiles[p].heat, "activation")]
            rows += [row[k:k + 6] for k in range(0, len(row), 6)]
        if rows:
            figures.save_grid(folder / f"prototypes-{class_file(d, c)}.png", rows, cell=170,
                              title=f"Prototypes of {d.progress['classes'][c]}: the training image that each is a "
                              "patch of, and its activation there")


@torch.no_grad()
def draw_groups(d, c, i, tiles, folder):
    """groups-CLASS.png (Fig. 11 to 13, 26): every group on the test image i, its members, weights, activations."""
    image, mask = d.test.read(i)
    similarity, name = d.net.similarity(network_input(image, d.cfg, d.device))[0], d.test.classes[c]
    only = [torch.where(ids == c, ids, 255) for ids in (mask, predict_labels(d.net, image, d.cfg, d.device))]
    cells, _ = label_cells(d, image, d.test.name_of(i), *only)
    rows = [cells, *group_rows(d, [c], image, similarity, tiles)]
    figures.save_grid(folder / f"groups-{class_file(d, c)}.png", rows, cell=160,
                      title=f"The groups of {name}: activation (logarithm), and the members that add most: patch, "
                      "weight x similarity at their strongest cell")


def group_rows(d, classes, image, similarity, tiles, most=3, cell=None):
    """Rows for save_grid: activation of a group on an image, then the `most` members that add most: patch, activation.

    All group maps have one colour scale, and all members' maps one. cell: say the numbers there, not the highest.
    """
    groups, num_groups = d.net.groups, d.net.groups.weights.shape[1]
    activation = groups.activations(similarity[None], d.cfg.threshold)[0]                 # (C*G,h,w)

    def adds(p, w):                                                  # to the group's exponent, there or at most
        return w * float(similarity[p].max() if cell is None else similarity[(p, *cell)])
    which = [(c, g, sorted(members_of(d.net, c, g, d.cfg.threshold), key=lambda member: -adds(*member)))
             for c in classes for g in range(num_groups)]
    top = float(activation[torch.isin(groups.class_of_group.cpu(), torch.tensor(classes))].max().log())
    top_member = max([float(similarity[p].max()) for _, _, members in which for p, _ in members[:most]], default=1.0)
    rows, most_text = [], "at most " if cell is None else ""
    for c, g, members in which:
        f = c * num_groups + g
        weight, name = float(groups.last_layer.weight[c, f]), f"{d.progress['classes'][c]}, group {g + 1}"
        value = float(activation[f].max() if cell is None else activation[(f, *cell)])
        row = [(heat(image, activation[f].log(), top),
                f"{name}: {weight:.2f} x {most_text}{value:.1f} = {weight * value:.2f}")]
        for p, w in members[:most]:
            value = float(similarity[p].max() if cell is None else similarity[(p, *cell)])
            row += [(tiles[p].patch, tiles[p].caption),
                    (heat(image, similarity[p], top_member), f"weight {w:.2f} x {most_text}{value:.2f}")]
        if len(members) > most:
            row[-1] = (row[-1][0], f"{row[-1][1]}; {len(members) - most} more members")
        rows.append(row)
    return rows


def prototype_rows(d, which, image, similarity, tiles, cell=None):
    """The same for ProtoSeg, which has no groups: a row for each prototype."""
    top, rows = max([float(similarity[p].max()) for p in which], default=1.0), []
    for p in which:
        c = int(d.net.prototype_class[p])
        value = float(similarity[p].max() if cell is None else similarity[(p, *cell)])
        weight = float(d.net.last_layer.weight[c, p])
        rows.append([(tiles[p].boxed, tiles[p].caption), (heat(image, similarity[p], top),
                     f"{weight:.2f} x {'at most ' if cell is None else ''}{value:.2f} = {weight * value:.2f}")])
    return rows


@torch.no_grad()
def draw_nearest_patches(d, shown, tiles, folder, most=3):
    """nearest_patches.png (Fig. 14 to 19): a prototype of each class, and its nearest patches in test images."""
    used, chosen = used_prototypes(d.net, d.cfg.threshold).tolist(), []
    for c in shown:                                                  # the heaviest in the groups, or the first
        weight = Counter({p: 0.0 for p in sorted(tiles) if int(d.net.prototype_class[p]) == c and used[p]})
        for g in range(d.net.groups.weights.shape[1] if d.net.groups is not None else 0):
            weight.update(dict(members_of(d.net, c, g, d.cfg.threshold)))
        chosen += [p for p, _ in weight.most_common(1)]
    best = [d.net.similarity(read_sample(d.test, i)[2].to(d.device))[0, chosen].flatten(1).amax(1).cpu()
            for i in tqdm(range(len(d.test)), desc="nearest patches", leave=False, disable=None)]
    top, rows = torch.stack(best).topk(min(most, len(best)), dim=0).indices, []           # (most,classes)
    for k, p in enumerate(chosen):
        row = [(tiles[p].boxed, tiles[p].caption), (tiles[p].heat, "activation")]
        for i in top[:, k].tolist():
            image, mask, x = read_sample(d.test, i)
            s = d.net.similarity(x.to(d.device))[0, p].cpu()
            cell = divmod(int(s.argmax()), s.shape[1])
            label = int(nearest_label(mask[None], s.shape)[(0, *cell)])
            row += [(framed(image, region_box(s, cell, torch.ones_like(mask, dtype=torch.bool))),
                     "void" if label == 255 else f"on {d.test.classes[label]}"),
                    (heat(image, s), f"up to {s.max():.1f}")]
        rows.append(row)
    if rows:
        figures.save_grid(folder / "nearest_patches.png", rows, cell=130,
                          title=f"Prototypes and their nearest patches in {d.cfg.test_split} images (Fig. 14 to 19)")


@torch.no_grad()
def draw_nearest_prototypes(d, tiles, folder, images=2, patches=3):
    """nearest_prototypes-N.png (Fig. 20 to 25): random patches of an image and the prototypes nearest to each."""
    generator, used = torch.Generator().manual_seed(d.cfg.seed), used_prototypes(d.net, d.cfg.threshold)
    for n in range(images):
        i = int(torch.randint(len(d.test), (), generator=generator))
        image, mask, x = read_sample(d.test, i)
        similarity = d.net.similarity(x.to(d.device))[0]             # (P,h,w)
        labels = nearest_label(mask[None], similarity.shape[1:])[0]
        rows, everywhere = [], torch.ones_like(mask, dtype=torch.bool)
        for _ in range(patches):
            cell = [int(torch.randint(side, (), generator=generator)) for side in labels.shape]
            here = similarity[:, cell[0], cell[1]].masked_fill(~used, -1)
            order = here.topk(min(3, int(used.sum()))).indices.tolist()
            tiles = tiles | prototype_tiles(d, [p for p in order if p not in tiles])      # of classes without figures
            label = int(labels[cell[0], cell[1]])
            row = [(framed(image, cell_block(cell, labels.shape, mask.shape)),
                    "void" if label == 255 else d.test.classes[label])]
            for p in order:
                box = region_box(similarity[p].cpu(), cell, everywhere)
                row += [(tiles[p].boxed, tiles[p].caption), (framed(image, box), f"similarity {here[p]:.1f}")]
            rows.append(row)
        figures.save_grid(folder / f"nearest_prototypes-{n + 1}.png", rows, cell=150,
                          title=f"Random patches of {d.test.name_of(i)}, the prototypes nearest to them, and the "
                          "region around the patch that each of these lights up (Fig. 20 to 25)")


@torch.no_grad()
def draw_equivariance(d, found, tiles, folder, most=8):
    """equivariance.png (Fig. 7): the ratios. equivariant_pairs.png (Fig. 8 to 10): pairs, each on its own size."""
    ratios = ("groups_to_learned_groups", "prototypes_in_groups", "classes_with_groups")
    series = {f"p_th = {q}": [r[name] for name in ratios] for q, r in found.items()}
    figures.save_bars(folder / "equivariance.png", series, ["groups / learned groups", "prototypes in a group",
                      "classes with a group"], title="Quasi-equivariant prototypes (Fig. 7)")
    best, quantile = {}, min(found)
    for i, j, iou in found[quantile]["pairs"]:                       # the best of each class
        best.setdefault(int(d.net.prototype_class[i]), (i, j, iou))
    rates, rows = numbers(d.cfg, "rates"), []
    for c, (i, j, iou) in list(best.items())[:most]:
        image, mask, x = read_sample(d.sources, d.progress["sources"][j][0])              # an image of the class
        tiles, row = tiles | prototype_tiles(d, [p for p in (i, j) if p not in tiles]), []
        for p, other in ((i, j), (j, i)):
            factor = rates[int(d.net.prototype_scale[other])] / rates[0]                  # the other's ratio
            s = upsample(d.net.similarity(downscaled(x, factor).to(d.device))[:, [p]], mask.shape)[0, 0].cpu()
            bright = (mask == c) & (s >= row_quantile(s[mask == c][None], float(quantile)))
            row += [(tiles[p].boxed, tiles[p].caption),
                    (shrink(torch.where(bright, image, image // 3)), f"image shrunk by {factor:g}, IoU {iou:.2f}")]
        rows.append(row)
    if rows:
        figures.save_grid(folder / "equivariant_pairs.png", rows, cell=180, title="Quasi-equivariant pairs: either "
                          "prototype, and its most active part of the class (bright) (Fig. 8 to 10)")


# ---- why? explanations of a trained run ----------------------------------------------------------------------

@torch.no_grad()
def explain_cell(net, similarity, c, cell, alpha=0.0):
    """Why does a cell (row, column) have its logit of class c? similarity (P,h,w) -> dict of plain numbers.

    logit = sum of the contributions of own + constant + others, exactly as the network computes it. Of an own group:
    contribution = weight x activation, activation = exp(sum over members of weight x similarity). The groups of other
    classes have activation 1 where they see nothing: constant = the sum of their weights, others = the sum of
    weight x (activation - 1), against = the three that lower the logit most. ProtoSeg: prototypes in place of
    groups, similarities in place of activations; constant = 0.
    """
    s = similarity[:, cell[0], cell[1]]                              # (P,)
    if net.groups is None:
        weight, value, nothing, owner = net.last_layer.weight[c], s, torch.zeros_like(s), net.prototype_class
    else:
        groups = net.groups
        weight, owner = groups.last_layer.weight[c], groups.class_of_group
        value = groups.activations(s[None, :, None, None], alpha)[0, :, 0, 0]             # (C*G,)
        nothing = (groups.members >= 0).any(1)[owner].to(value.dtype)                     # 1, or 0 without members
    own, num_own = owner == c, 0 if net.groups is None else net.groups.weights.shape[1]
    terms, others = weight * value, weight * (value - nothing)
    parts = [dict(weight=float(weight[f]), activation=float(value[f]), contribution=float(terms[f]),
                  **(dict(group=f - c * num_own, members=[
                      dict(prototype=p, scale=int(net.prototype_scale[p]), weight=w, similarity=float(s[p]))
                      for p, w in members_of(net, c, f - c * num_own, alpha)]) if num_own else dict(prototype=f)))
             for f in own.nonzero()[:, 0].tolist()]
    lowest = others.masked_fill(own, math.inf).argsort()[:3].tolist()
    return dict(logit=float(terms.sum()), own=parts, constant=float((weight * nothing)[~own].sum()),
                others=float(others[~own].sum()),
                against=[{"class": int(owner[f]), "contribution": float(others[f])} for f in lowest
                         if others[f] < 0])


@torch.no_grad()
def explain(cfg, device):
    """--explain IMAGE: OUT/explanations/NAME-CLASS.png and .json. Returns the numbers."""
    d, path = load_run(cfg, device), Path(cfg.explain)
    classes, image = d.progress["classes"], files.read_image(path)
    similarity = d.net.similarity(network_input(image, cfg, device))[0]                   # (P,h,w)
    logits = d.net.logits(similarity[None], cfg.threshold)[0]        # (C,h,w)
    (H, W), (h, w) = image.shape[1:], logits.shape[1:]
    c = class_id(cfg.class_, classes, "--class") if cfg.class_ else None
    if cfg.pixel:
        x, y = numbers(cfg, "pixel")
        if not (0 <= x < W and 0 <= y < H):
            raise UserError(f"--pixel {x} {y} lies outside {path}, which is {W} x {H}: give x and y inside it.")
        cell = y * h // H, x * w // W
        c = int(logits[:, cell[0], cell[1]].argmax()) if c is None else c
    else:
        c = int(torch.bincount(logits.argmax(0).flatten()).argmax()) if c is None else c
        cell = divmod(int(logits[c].argmax()), w)
    y0, y1, x0, x1 = block = cell_block(cell, (h, w), (H, W))
    found = {"class": classes[c], "predicted": classes[int(logits[:, cell[0], cell[1]].argmax())],
             "x": (x0 + x1) // 2, "y": (y0 + y1) // 2} | explain_cell(d.net, similarity, c, cell, cfg.threshold)
    for part in found["against"]:
        part["class"] = classes[part["class"]]
    target = Path(cfg.out) / "explanations" / f"{path.stem}-{class_file(d, c)}"
    prediction = predict_labels(d.net, image, cfg, device)
    cells = [(framed(image, block), "the pixel"), (shrink(figures.overlay(image, prediction)), "prediction"),
             (figures.heatmap(shrink(image), logits[c]), f"logit of {classes[c]}")]
    if d.net.groups is None:
        which = [part["prototype"] for part in sorted(found["own"], key=lambda part: -part["contribution"])[:6]]
        rows = prototype_rows(d, which, image, similarity, prototype_tiles(d, which), cell)
    else:
        which = {member["prototype"] for part in found["own"] for member in part["members"]}
        rows = group_rows(d, [c], image, similarity, prototype_tiles(d, sorted(which)), cell=cell)
    figures.save_grid(f"{target}.png", [cells, *rows], cell=170, title=explanation_text(found),
                      legend=legend_of(d, prediction.unique().tolist()))
    run.write_json(f"{target}.json", found)
    print(f"{explanation_text(found)}; see {target}.png")
    return found


def explanation_text(found):
    terms = [(f"group {part['group'] + 1}" if "group" in part else f"p{part['prototype']}", part["contribution"])
             for part in found["own"]] + [("constant", found["constant"]), ("other classes", found["others"])]
    against = ", ".join(f"{part['class']} {part['contribution']:.2f}" for part in found["against"])
    return (f"{found['class']} at x {found['x']}, y {found['y']} (predicted: {found['predicted']}): logit "
            f"{found['logit']:.2f} = " + " ".join(f"{value:+.2f} ({name})" for name, value in terms)
            + (f"; most against it: {against}" if against else ""))


def class_id(name, classes, option):
    if name not in classes:
        raise UserError(f"{option} {name}: this run knows no such class; it knows {', '.join(classes)}.")
    return classes.index(name)


@torch.no_grad()
def failures(cfg, device, most=3):
    """--failure CLASS (Sec. 17): OUT/failures/CLASS-N.png for the test images with the most wrong pixels of the class,
    missed or invented, among those with an IoU of the class below --failure-iou. Returns the list."""
    d, found = load_run(cfg, device), []
    c = class_id(cfg.failure, d.progress["classes"], "--failure")
    for i in tqdm(range(len(d.test)), desc="failures", leave=False, disable=None):
        if not (d.test.read_mask(i) == c).any():
            continue
        image, mask = d.test.read(i)
        prediction = predict_labels(d.net, image, cfg, device)
        own, said = mask == c, (prediction == c) & (mask != 255)
        iou = float((own & said).sum() / (own | said).sum())
        if iou < cfg.failure_iou:
            wrong = torch.bincount(torch.cat([prediction[own & ~said], mask[said & ~own]]).long(),
                                   minlength=d.test.num_classes)
            found.append(dict(image=i, name=d.test.name_of(i), iou=iou, wrong=int(wrong.sum()),
                              confused_with=int(wrong.argmax())))
    found = sorted(found, key=lambda row: -row["wrong"])
    if not found:
        print(f"no {cfg.test_split} image with {cfg.failure} has an IoU below {cfg.failure_iou:g}: raise it.")
    for n, row in enumerate(found[:most], 1):
        path = Path(cfg.out) / "failures" / f"{class_file(d, c)}-{n}.png"
        draw_failure(d, c, row, path)
        print(f"{row['name']}: IoU {100 * row['iou']:.0f} %, confused with {d.test.classes[row['confused_with']]}; "
              f"see {path}")
    return found


def draw_failure(d, c, row, path):
    """Fig. 27 to 35: label and prediction, then the groups (ProtoSeg: prototypes) of both classes on the image."""
    image, mask = d.test.read(row["image"])
    cells, present = label_cells(d, image, row["name"], mask, predict_labels(d.net, image, d.cfg, d.device))
    similarity, both = d.net.similarity(network_input(image, d.cfg, d.device))[0], [c, row["confused_with"]]
    own = torch.isin(d.net.prototype_class.cpu(), torch.tensor(both)).nonzero()[:, 0].tolist()
    if d.net.groups is not None:
        rows = group_rows(d, both, image, similarity, prototype_tiles(d, own), most=2)
    else:
        strongest = sorted(own, key=lambda p: -float(similarity[p].max()))
        which = [p for k in both for p in [p for p in strongest if int(d.net.prototype_class[p]) == k][:3]]
        rows = prototype_rows(d, which, image, similarity, prototype_tiles(d, which))
    figures.save_grid(path, [cells, *rows], cell=170, legend=legend_of(d, present),
                      title=f"{d.test.classes[c]}: IoU {100 * row['iou']:.0f} %, most often confused with "
                      f"{d.test.classes[row['confused_with']]} (Sec. 17)")


# ---- use a trained run ---------------------------------------------------------------------------------------

def load_network(cfg, device, classes=None):
    """The network of the run in cfg.out in eval mode, and its progress. classes: those it must know, if given."""
    progress = read_progress(cfg, classes)
    if "sources" not in progress and cfg.method != "deeplab":
        raise UserError(f"the run in {cfg.out} has not come to the projection yet: let it finish (--resume).")
    net = build_model(cfg, progress).to(device, memory_format=torch.channels_last)
    run.load_checkpoint(Path(cfg.out) / "last.pt", dict(model=net), device)
    last = PHASES[cfg.method][-1]
    if (progress["phase"], progress["iteration"]) != (last, getattr(cfg, last)):
        print(f"note: the run in {cfg.out} is not finished: {progress['phase']}, iteration {progress['iteration']}")
    return net.eval(), progress


def load_run(cfg, device):
    """The run in cfg.out, to explain or draw it."""
    if cfg.method == "deeplab":
        raise UserError(f"the run in {cfg.out} is a plain network, which has no prototypes to explain it with: pass a "
                        "run of scaleprotoseg or protoseg.")
    test, source = (datasets.open_dataset(cfg.dataset, cfg.data, split)
                    for split in (cfg.test_split, cfg.project_split or cfg.train_split))
    net, progress = load_network(cfg, device, test.classes)
    return Drawing(net, cfg, progress, test, source, device)


def evaluate_run(cfg, device, rank, world):
    """--eval-only: the run in OUT on --test-split, into metrics.json and figures/ again."""
    sets = open_sets(cfg)
    net, progress = load_network(cfg, device, sets["test"].classes)
    return report(net, cfg, sets, progress, device, rank, world)


def predict(cfg, device):
    """--predict: for every image OUT/predictions/NAME.png (class ids, palette) and NAME_overlay.png."""
    net, progress = load_network(cfg, device)
    classes, folder = progress["classes"], Path(cfg.out) / "predictions"
    for path in tqdm(files.list_images(cfg.predict), desc="predict", disable=None):
        image = files.read_image(path)
        ids = predict_labels(net, image, cfg, device)
        figures.save_prediction(folder, path.stem, image, ids)
        share = 100 * torch.bincount(ids.flatten().long(), minlength=len(classes)) / ids.numel()
        top = [f"{classes[c]} {share[c]:.0f} %" for c in share.topk(min(3, len(share))).indices if share[c] > 0]
        tqdm.write(f"{path}: {', '.join(top)} -> {folder / path.stem}_overlay.png")


# ---- tables of the paper -------------------------------------------------------------------------------------

PAPER = {                                                            # table -> data set -> row -> what is printed
    5: {"EM": {"protoseg 1": 77.63, "protoseg 2": 78.92, "scaleprotoseg 1": 77.97, "scaleprotoseg 2": 79.29}},
    7: {"Pascal": {0.0: (133, 4.00, 72.11), 0.05: (131, 3.70, 72.26), 0.1: (126, 3.21, 72.12)},
        "Cityscapes": {0.0: (114, 3.68, 69.20), 0.05: (111, 3.39, 69.22), 0.1: (109, 3.10, 69.03)},
        "ADE20K": {0.0: (1168, 4.53, 34.03), 0.05: (1132, 4.08, 34.32), 0.1: (1067, 3.48, 34.16)}},
    8: {"Pascal": {"off": (146, 5.59, 72.22), "on": (131, 3.70, 72.26)},
        "Cityscapes": {"off": (132, 5.79, 69.22), "on": (111, 3.39, 69.22)},
        "ADE20K": {"off": (1405, 6.06, 33.40), "on": (1132, 4.08, 34.32)}},
    9: {"Pascal": {"off": 47.45, "on": 28.29}, "Cityscapes": {"off": 61.65, "on": 43.48},
        "ADE20K": {"off": 50.25, "on": 42.74}},
    10: {"Pascal": {"protoseg": (0.527, 12100, 20.7), "scaleprotoseg": (0.063, 9100, 15.6)},
         "Cityscapes": {"protoseg": (0.523, 9900, 52.5), "scaleprotoseg": (0.071, 7600, 5.1)},
         "ADE20K": {"protoseg": (0.503, 238200, 51.9), "scaleprotoseg": (0.437, 135400, 14.5)}},
}
GROUP_COLUMNS = {"prototypes": "prototypes", "of a group": "group_average", "mIoU": "miou"}
TABLES = {                                                           # table -> what it is about, our columns
    5: ("three methods; on EM two random cuts. The paper: mIoU, mean of 3 runs, no plain network", {"mIoU": "miou"}),
    7: ("thresholds of the group weights", GROUP_COLUMNS),
    8: ("entropy loss of the groups, off and on", GROUP_COLUMNS),
    9: ("overlap of a class's groups, entropy loss off and on", {"group overlap": "group_overlap"}),
    10: ("last layer and cost: mean abs w, parameters beyond DeepLabv2, images a second (ours: one, synchronised)",
         {"mean abs w": "mean_abs_weight", "parameters": "extra_parameters", "images/s": "images_per_second"}),
}


def run_table(cfg, device, rank, world):
    """--table: every row as a run in OUT/rows/, then OUT/tableN.md. Finished rows are kept, so tables share them."""
    rows = Path(cfg.out) / "rows"

    def row(name, **changes):
        row_cfg = replace(cfg, table=0, out=str(rows / name.replace(" ", "-")), **changes)
        if rank == 0:
            print(f"row {name} in {row_cfg.out}", flush=True)
        return run.finished_row(train, row_cfg, device, rank, world)

    if cfg.table == 5:
        cuts = {"": {}}
        if cfg.dataset == "em":
            cuts = {f" {k}": dict(train_split=f"train-{k}", val_split=f"val-{k}", test_split=f"val-{k}")
                    for k in (1, 2)}
        found = {method + cut: row(method + cut, method=method, **splits)
                 for method in ("deeplab", "protoseg", "scaleprotoseg") for cut, splits in cuts.items()}
    elif cfg.table == 10:
        found = {method: row(method, method=method) for method in ("protoseg", "scaleprotoseg")}
    else:
        method, first = dict(method="scaleprotoseg"), str(rows / "scaleprotoseg")
        with_entropy = row("scaleprotoseg", **method)
        if cfg.table == 7:
            found = thresholds(replace(cfg, out=first, **method), device, rank, world)
        else:
            found = {"off": row("entropy off", w_entropy=0.0, stage1=first, **method), "on": with_entropy}
            if rank == 0:
                draw_entropy(cfg, rows, device)
    if rank == 0:
        text = "\n".join(table_lines(cfg, found, device)) + "\n"
        with run.replacing(Path(cfg.out) / f"table{cfg.table}.md") as file:
            file.write(text)
        print(f"\n{text}\nwritten to {cfg.out}/table{cfg.table}.md")
    return found


def thresholds(cfg, device, rank, world):
    """Table 7: the run in cfg.out with other thresholds; nothing is trained again."""
    net, _ = load_network(cfg, device)
    data, found = datasets.open_dataset(cfg.dataset, cfg.data, cfg.test_split), {}
    for alpha in (0.0, 0.05, 0.1):                                   # Table 7
        changed = replace(cfg, threshold=alpha)
        loader = test_loader(data, cfg, device, rank, world)
        scores = evaluate(net, loader, data.num_classes, changed, device, rank, stages=False)
        found[alpha] = dict(miou=scores["final"]["miou"]) | sparsity(net, changed)
    return found


@torch.no_grad()
def draw_entropy(cfg, rows, device, most=6):
    """Fig. 6: OUT/entropy.png, the groups of some classes without (left) and with (right) the entropy loss."""
    runs = {name: load_run(replace(cfg, method="scaleprotoseg", out=str(rows / folder)), device)
            for name, folder in (("off", "entropy-off"), ("on", "scaleprotoseg"))}
    lines, data = [], runs["on"].test
    for c, i in list(exemplars(data).items())[-most:]:
        image, _, x = read_sample(data, i)
        line = [(shrink(image), data.classes[c])]
        for name, d in runs.items():
            activation = d.net.groups.activations(d.net.similarity(x.to(device)), cfg.threshold)[0].log()
            own = activation.unflatten(0, (-1, cfg.groups))[c]       # (G,h,w)
            line += [(heat(image, s, float(own.max())), f"entropy {name}, group {g}") for g, s in enumerate(own, 1)]
        lines.append(line)
    figures.save_grid(Path(cfg.out) / "entropy.png", lines, cell=150,
                      title="Group activations (logarithm) without and with the entropy loss (Fig. 6)")


def table_lines(cfg, found, device):
    """Markdown of a table: our numbers, then the paper's. found: row -> metrics."""
    (about, columns), paper = TABLES[cfg.table], PAPER[cfg.table]
    lines = [f"Table {cfg.table}: {about}. Ours: preset {cfg.preset}, {cfg.joint} joint and {cfg.group_joint} group "
             f"iterations, seed {cfg.seed}, {device.type}.\n",
             "| " + " | ".join(["row", *columns, *[f"paper {name}" for name in paper]]) + " |",
             "|" + "---|" * (1 + len(columns) + len(paper))]
    for name, metrics in found.items():
        printed = [rows.get(name, ()) for rows in paper.values()]
        cells = [number_text(metrics.get(key)) for key in columns.values()]
        cells += [" / ".join(map(number_text, p if isinstance(p, tuple) else (p,))) or "-" for p in printed]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def number_text(value):
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}" if value < 1 else f"{value:.2f}"


def main(cfg):
    """Returns what the task returns, for use from Python."""
    check_config(cfg)
    device, rank, world = run.setup(cfg.device, cfg.seed)
    torch.backends.cudnn.benchmark = False                           # train_phase switches it on
    if cfg.table:
        return run_table(cfg, device, rank, world)
    if cfg.eval_only:
        return evaluate_run(cfg, device, rank, world)
    for task, asked in ((predict, cfg.predict), (explain, cfg.explain), (failures, cfg.failure)):
        if asked:
            return None if rank else task(cfg, device)
    return train(cfg, device, rank, world)


if __name__ == "__main__":                                           # guard: worker processes import this file
    run.run_script(main, Config, PRESETS, __doc__)
