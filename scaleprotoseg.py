"""ScaleProtoSeg: multi-scale part prototypes for semantic segmentation, then sparse groups of them.

Paper  H. Porta, E. Dalsasso, D. Marcos, D. Tuia, "Multi-Scale Grouped Prototypes for Interpretable Semantic
       Segmentation", WACV 2025. Sections 6 to 17 are its supplement; what only the main text or the code
       says is marked "code" (released: github.com/eceo-epfl/ScaleProtoSeg), from which we took it.
Idea   DeepLabv2 looks at a pixel through four convolutions with growing fields of view and sums them. Kept
       apart, each scale gets prototypes of its own: vectors that are patches of training images. A pixel is
       a car because it looks like such patches. Stage 2 freezes the prototypes and mixes the dozen of a
       class into three sparse groups: a logit is explained by three parts, each of about four prototypes.

Try    python scaleprotoseg.py                                # toy scenes, about 2 min on a CPU
Train  python scaleprotoseg.py --preset cityscapes --data CITYSCAPES --parts gtFinePanopticParts
       torchrun --nproc-per-node 2 scaleprotoseg.py --preset ade20k --data ADEChallengeData2016
       python scaleprotoseg.py --method protoseg              # its ancestor; deeplab = the plain network
Look   python scaleprotoseg.py --explain photo.jpg --class car --against taxi --out runs/scaleprotoseg-toy
       python scaleprotoseg.py --failure bird --out runs/scaleprotoseg-toy        # why is this class missed?
       python scaleprotoseg.py --table 8                      # stage 2 with and without the entropy loss

symbol     here               shape     meaning                                            source
p_{s,i}    prototypes         P,D       prototypes, each of one class and one scale        Sec. 11
f_s(x)     features           B,S*D,h,w sigmoid of the ASPP maps, scale s = channels sD..  code
g_proto    log_similarity     B,P,h,w   ln((d2 + 1) / (d2 + 1e-4))                         code
w_h_proto  last_layer         C,P       stage 1: similarities -> logits                    Sec. 12
L_J        diversity_loss     scalar    prototypes of a class and scale light up elsewhere Sec. 6, code
L_L1       off_class_l1       scalar    the last layer leans on its own classes' columns   Sec. 6, 12
w_{g,c}    groups.weights     C,G,N     group g of class c, a row on the simplex           Sec. 9
G_{c,g}    group_activations  B,C*G,h,w exp of the weighted sum of similarities            code
w_h_group  groups.last_layer  C,C*G     stage 2: group activations -> logits               Sec. 12
L_ent      entropy_loss       scalar    few prototypes in a group                          Sec. 9, code
alpha      threshold          scalar    smaller group weights are dropped after training   Sec. 9, Table 7
p_th       quantiles          2         above it a map is active: do two scales agree?     Sec. 11, Eq. (10)

Phases: warmup -> joint -> project -> finetune (stage 1), group_warmup -> group_joint (stage 2). An
"iteration" is an optimizer step on the whole batch (10 images).

Where we do something else, or had to choose ([D*] marks the line):
[D1] ResNet-101 has the stride of a block on its 3x3 convolution (torchvision), not on its first 1x1 (Caffe).
[D2] The diversity loss takes the class's own pixels. ProtoSeg's code is off by one: class c's pixels train
     class c+1. So a ProtoSeg trained here is not the one of the printed tables.
[D3] Weight decay acts on backbone and ASPP only (code); Sec. 6 does not say on what.
[D4] A class without a pixel in the projection images cannot be projected: its prototypes are dropped and the
     run says so. The code moves them all to one corner of the first image.
[D5] A class without prototypes has no groups; its logit comes from the other classes' groups alone.
[D6] EM: entropy weight 0.25 as printed in Sec. 7; the code has 0.05. The two cuts are ours (seeds 1 and 2).
     The U-Net has batch norm, as in the code; Sec. 7 says the original one, which has none.
[D7] ProtoSeg's pruning leaves void pixels out on all data sets (the code forgets to on three of them).
[D8] Consistency and stability binarise above quantiles over the pixels of the class; 0.7, 0.8, 0.9 are ours:
     the paper's are not known. The background has no keypoint (in the code it has), and images in which a
     class has none are left out. All classes of Pascal with parts count; the code drops cow. A part that
     fewer than 5 images show does not count for consistency. The curve, ceiling and chance are ours.
[D9] Validation sees whole images; the code crops and scales them at random. The last weights are kept.
[D10] Where the backbone is frozen batch norm is in eval mode, also where it is trained (U-Net, tiny).
[D11] The plain network has the budget and the optimizer of the others (Adam, no CRF); the printed 71.40 and
     77.69 are of DeepLabv2's own recipe (SGD; the latter with a CRF at the end, as in Table 6).
[D12] Sec. 11 leaves open how IoUs are averaged: ours is a mean over the images that hold the class in 10 or
     more cells of the common grid; of fewer cells any two maps pick the same. We take --equivariance images
     of the projection split, the paper all training images.
[D13] Toy scenes have no pretrained backbone: tiny is trained from scratch in the joint phase.
[D14] Projection and analyses are in float32; all else on CUDA is in bfloat16 up to the ASPP maps.
[D15] A loss is a mean over a batch of 10; in the code over 2 images, five times (as with --micro-batch 2).
"""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common import datasets, files, loaders, run, segmentation, speed, survey
from common import scaleprotoseg_figures as gallery, scaleprotoseg_measures as measures
from common.backbones import DENSE, build_dense, check_sides, norm_parameters
from common.loaders import of_all_ranks, to_device
from common.parts import check_parts
from common.report import write_report
from common.run import RunConfig, UserError, opt
from common.scaleprotoseg_measures import part_presence     # noqa: F401 (others import it from this file)
from common.scaleprotoseg_page import PAGE
from common.tables import Table, beside_paper, check_rows, row_configs, train_rows, write_table


# ---- options and recipes ---------------------------------------------------------------------------------

@dataclass
class Config(RunConfig):
    method: str = opt("scaleprotoseg", "protoseg = one summed scale, no groups; deeplab = plain network",
                      choices=("scaleprotoseg", "protoseg", "deeplab"))
    dataset: str = opt("cityscapes", "reader of --data", choices=datasets.DATASETS)
    ignore: int = opt(None, "folder: value of unlabelled pixels in masks, besides 255 (data/README.md)",
                      at_least=0, at_most=255)
    train_split: str = opt("train", "split that is trained on")
    project_split: str = opt("", "split that prototypes are projected to (default: --train-split)")
    val_split: str = opt("val", "split that is evaluated while training")
    test_split: str = opt("val", "split that is evaluated at the end and by --eval-only", evaluation=True)
    parts: str = opt("", "part annotations of the test split (data/README.md); toy: none", runtime=True)
    backbone: str = opt("resnet101", "network before the ASPP", choices=DENSE)
    weights: str = opt("imagenet", "backbone weights: imagenet (downloaded), file, URL or none", source=True)
    log_prior: bool = opt(False, "ours: a logit gets the log of its class's share of the training pixels")
    frozen_bn: bool = opt(True, "batch norm keeps its pretrained statistics and scales (Sec. 6)")
    output_stride: int = opt(8, "pixels a side of a cell of the feature map; the U-Net has 1", above=0)
    unet_width: int = opt(64, "channels of the U-Net's first level; 16 for a CPU", above=0)
    rates: list = opt((6, 12, 18, 24), "dilations of the ASPP, one a scale, rising", each=int, at_least=1)
    depth: int = opt(64, "D, channels of a scale's features and of its prototypes", above=0)
    input_scales: list = opt((), "further sizes of the image, as factors", each=float, above=0, below=4)
    crop: int = opt(513, "training crop in pixels; lower it if memory runs out", above=0)
    scale_min: float = opt(0.5, "smallest factor by which training images are resized at random", above=0)
    scale_max: float = opt(1.5, "largest factor by which training images are resized at random", above=0)
    test_size: int = opt(0, "short side of test images; 0 = the image's own", at_least=0)
    test_square: bool = opt(False, "test images are resized to test-size x test-size (Pascal)")
    window: int = opt(0, segmentation.WINDOW + ". Explanations and measures of prototypes see whole images",
                      at_least=0, evaluation=True)
    batch_size: int = opt(10, "images an iteration, over all GPUs", above=0)
    micro_batch: int = opt(0, "images at once on a GPU, to save memory; 0 = the whole batch", at_least=0)
    prototypes: int = opt(3, "K, prototypes of a class and scale", above=0)
    protoseg_prototypes: int = opt(10, "prototypes of a class with --method protoseg", above=0)
    groups: int = opt(3, "G, groups of a class", above=0)
    warmup: int = opt(3000, "iterations in which ASPP and prototypes learn", schedule=True, at_least=0)
    joint: int = opt(30000, "iterations in which all convolutions learn too", schedule=True, at_least=0)
    finetune: int = opt(2000, "iterations in which the last layer learns", schedule=True, at_least=0)
    group_warmup: int = opt(2000, "iterations in which group weights learn", schedule=True, at_least=0)
    group_joint: int = opt(30000, "iterations in which their last layer learns", schedule=True, at_least=0)
    lr: float = opt(2.5e-4, "Adam learning rate of ASPP, prototypes; poly decay in the joint steps", above=0)
    backbone_lr: float = opt(2.5e-5, "learning rate of the backbone", above=0)
    finetune_lr: float = opt(1e-5, "learning rate of the last layer", above=0)
    group_lr: float = opt(2.5e-4, "learning rate of stage 2", above=0)
    weight_decay: float = opt(5e-4, "weight decay of convolutions [D3]", at_least=0)
    w_diversity: float = opt(0.25, "lambda_J, weight of the diversity loss", at_least=0)
    w_l1: float = opt(1e-4, "lambda_L1 in fine-tuning, of the last layer's off-class weights", at_least=0)
    w_l1_group: float = opt(1e-3, "lambda_L1 in stage 2, of its last layer's off-class weights", at_least=0)
    w_entropy: float = opt(0.05, "lambda_ent, of the entropy loss: higher = sparser groups", at_least=0)
    threshold: float = opt(0.05, "alpha: smaller group weights are dropped after training", at_least=0,
                           below=1, evaluation=True)
    quantiles: list = opt((0.7, 0.8, 0.9), "binarisations that consistency and stability are means of [D8]",
                          each=float, above=0, below=1, evaluation=True)
    equivariance: int = opt(3000, "projection images that are searched for quasi-equivariant prototypes at "
                            "the end (Sec. 11) [D12]; 0 = not at all", runtime=True, at_least=0)
    eval_every: int = opt(5000, "iterations between evaluations, rows of log.csv", schedule=True, above=0)
    save_every: int = opt(1000, "iterations between checkpoints: what --resume loses", above=0, runtime=True)
    stage1: str = opt("", "run folder: take over its stage 1 and train only the groups anew", runtime=True)
    eval_only: bool = opt(False, "evaluate and draw the run in OUT again and stop", uses_run=True)
    predict: str = opt("", "image or folder: index PNGs, overlays into OUT/predictions", uses_run=True)
    explain: str = opt("", "image: draw why a pixel of it has one class and not another", uses_run=True)
    class_: str = opt("", "class that --explain explains (default: the predicted one)", runtime=True)
    pixel: list = opt((), "x y to explain (default: the strongest of the class)", each=int, runtime=True)
    against: str = opt("", "class that it is held against (default: the next best there)", runtime=True)
    baseline: str = opt("", "run folder, of ProtoSeg say, that --explain shows as well", runtime=True)
    failure: str = opt("", "class whose worst test images are drawn (Sec. 17)", uses_run=True)
    failure_iou: float = opt(0.2, "epsilon_IoU of Sec. 17: images below it fail", at_least=0, at_most=1,
                             runtime=True)
    table: int = opt(0, "train and evaluate this table's rows", choices=(0, 5, 7, 8, 9, 10), runtime=True)


SHORT = dict(backbone="mobilenet_v2", crop=321, batch_size=8, warmup=200, finetune=200, group_warmup=200,
             lr=1e-3, backbone_lr=1e-4, finetune_lr=1e-3, group_lr=0.02, eval_every=500, save_every=200)
MULTISCALE = dict(input_scales=[0.5, 0.75], crop=321)                # Sec. 6: {0.5, 0.75, 1}
LARGE = dict(w_l1=1e-5, w_l1_group=1e-4, w_entropy=0.25, protoseg_prototypes=12)          # many classes
PRESETS = {                                                          # Sec. 6 to 8; stage 2: Sec. 6
    "toy": dict(dataset="toy_scenes", test_split="test", backbone="tiny", weights="none", frozen_bn=False,
                output_stride=4, rates=[1, 2, 3, 4], depth=16, crop=96, batch_size=16, warmup=50, joint=600,
                finetune=100, group_warmup=50, group_joint=300, lr=5e-3, backbone_lr=5e-3, finetune_lr=1e-3,
                group_lr=0.02, w_entropy=0.1, eval_every=200, save_every=200, workers=0),        # ours [D13]
    "camvid": SHORT | dict(dataset="camvid", test_split="test", joint=4000, group_joint=1000),    # ours
    "cityscapes": dict(),
    "pascal": MULTISCALE | dict(dataset="voc", train_split="trainaug", project_split="train", test_size=513,
                                test_square=True, finetune=6000),
    "pascal-small": SHORT | dict(dataset="voc", test_size=513, test_square=True, joint=3000,
                                 group_joint=800),                                                # ours
    "ade20k": LARGE | dict(dataset="ade20k", crop=512, test_size=512, scale_max=2.0, warmup=6000,
                           joint=60000, finetune=4000),
    "cocostuff": LARGE | MULTISCALE | dict(dataset="cocostuff164k", warmup=6000, joint=100000,
                                           finetune=4000),
    "em": dict(dataset="em", train_split="train-1", val_split="val-1", test_split="val-1", backbone="unet",
               weights="none", frozen_bn=False, crop=512, batch_size=2, warmup=0, joint=10000,
               finetune=10000, group_warmup=0, group_joint=10000, lr=1e-4, backbone_lr=1e-4, group_lr=5e-5,
               w_l1_group=1e-4, w_entropy=0.25, eval_every=2000),                                 # [D6]
}
PHASES = {                                                           # what a method goes through
    "scaleprotoseg": ("warmup", "joint", "project", "finetune", "group_warmup", "group_joint"),
    "protoseg": ("warmup", "joint", "project", "finetune"),
    "deeplab": ("warmup", "joint"),
}


def check_config(cfg):
    """UserError for a setting that cannot work, before anything is read or written."""
    run.check_options(cfg)
    run.check_batch_size(cfg.batch_size)
    if cfg.scale_max < cfg.scale_min:
        raise UserError(f"--scale-max {cfg.scale_max} is below --scale-min {cfg.scale_min}: swap them.")
    if cfg.test_square and not cfg.test_size:
        raise UserError("--test-square needs the side of the square: add --test-size.")
    if cfg.rates != sorted(set(cfg.rates)):
        raise UserError(f"--rates {' '.join(map(str, cfg.rates))}: give each once, rising.")
    if cfg.pixel and len(cfg.pixel) != 2:
        raise UserError(f"--pixel {' '.join(map(str, cfg.pixel))}: give x and y, two whole numbers.")
    if (cfg.class_ or cfg.pixel or cfg.against or cfg.baseline) and not cfg.explain:
        raise UserError("--class, --pixel, --against and --baseline go with --explain IMAGE.")
    plain = replace(cfg, method="deeplab", input_scales=[])
    check_sides(lambda: build_model(plain, dict(classes=["any"])), cfg)
    if cfg.stage1 and cfg.method != "scaleprotoseg":
        raise UserError(f"--stage1 with --method {cfg.method}: only scaleprotoseg has a stage 2.")


# ---- prototypes and pixels (Sec. 11; the rest: code) -----------------------------------------------------

def prototype_distances(features, prototypes, prototype_scale, table=None):
    """d2[b,p,y,x] = |f_s(x)[b,:,y,x] - p|^2 with s the scale of p, >= 0.

    features (B,S*D,h,w), prototypes (P,D), prototype_scale (P,) int64 -> (B,P,h,w) float32. One batched
    product, of each scale with its own prototypes. table (S,N): members_by_key of the scales, -1 where a
    scale has fewer than N; a training step passes it in, as making it waits for the GPU. Neither autocast
    nor the TF32 of convolutions: where a pixel equals a prototype, an error of 1e-2 turns g = 9.2 into 4.6.
    """
    with torch.autocast(features.device.type, enabled=False):
        if table is None:
            table = members_by_key(prototype_scale, features.shape[1] // prototypes.shape[1])
        z = features.float().flatten(2).unflatten(1, (len(table), -1))                    # (B,S,D,h*w)
        p = prototypes.float().index_select(0, table.flatten().clamp(min=0))              # (S*N,D)
        p = p.unflatten(0, table.shape)                              # (S,N,D)
        d2 = (-2 * p) @ z + z.square().sum(2, keepdim=True) + p.square().sum(2, keepdim=True)
        place = table.flatten().argsort()[-len(prototypes):]         # where prototypes 0, 1, ... stand
        d2 = d2.flatten(1, 2).index_select(1, place)                 # (B,P,h*w)
        return d2.clamp_min(0).unflatten(2, features.shape[2:])


def log_similarity(d2, eps=1e-4):
    """g_proto = ln((d2 + 1) / (d2 + eps)): ln(1 / eps) = 9.21 at d2 = 0, falling to 0. Same shape."""
    return torch.log((d2 + 1) / (d2 + eps))


def nearest_label(labels, size):
    """Labels (B,H,W) -> (B,h,w), same dtype: of each cell the pixel under its centre (nearest-exact)."""
    return F.interpolate(labels[:, None].float(), size, mode="nearest-exact")[:, 0].to(labels.dtype)


# ---- losses of stage 1 (Sec. 6) --------------------------------------------------------------------------

def members_by_key(key, num_keys):
    """The items that have each key: key (P,) int64 -> (num_keys,N), rising numbers, then -1; N is the most
    items of one key, at least 1. Key (1, 0, 1) gives ((1, -1), (0, 2))."""
    count = torch.bincount(key, minlength=num_keys)
    order = key.argsort(stable=True)                                 # items of key 0, then of key 1, ...
    begin = count.cumsum(0) - count                                  # where each key begins in `order`
    column = torch.arange(len(key), device=key.device) - begin[key[order]]  # 0, 1, ... for each key
    table = torch.full((num_keys, max(1, int(count.max()))), -1, device=key.device)
    table[key[order], column] = order
    return table


def pair_table(prototype_class, prototype_scale):
    """(C,S,K): prototypes of each class and scale, -1 where there are fewer than K."""
    num_classes, num_scales = (int(ids.max()) + 1 for ids in (prototype_class, prototype_scale))
    table = members_by_key(prototype_class * num_scales + prototype_scale, num_classes * num_scales)
    return table.unflatten(0, (num_classes, num_scales))


def diversity_loss(d2, labels, prototype_class, prototype_scale, table=None):
    """L_J: mean of exp(-J) over images b, classes c in them, scales s, pairs i < j of c's prototypes of s.

    J = (KL(p_i|p_j) + KL(p_j|p_i)) / 2 with p_i = softmax of the squared distances of prototype i over the
    pixels of class c in image b [D2]: 1 if both light up alike, 0 if elsewhere. d2 (B,P,h,w), labels (B,h,w)
    with 255 ignored, prototype_class and prototype_scale (P,) int64 -> scalar. A class with one pixel is
    left out; no term at all gives 0 and zero gradient. table: pair_table, which a training step passes in,
    as making it waits for the GPU. No loop: a pixel belongs to a segment (b, c), sums run over segments, and
    the softmax's normalisers cancel in J = sum over the segment's pixels of (p_i - p_j)(d_i - d_j) / 2.
    """
    table = pair_table(prototype_class, prototype_scale) if table is None else table      # (C,S,K)
    num_classes, num_scales, K = table.shape
    B = len(d2)
    label = labels.flatten(1).long()                                 # (B,h*w)
    inside = label < num_classes                                     # neither void nor without prototypes
    label = torch.where(inside, label, 0)
    image = torch.arange(B, device=d2.device)[:, None]
    segment = torch.where(inside, num_classes * image + label, B * num_classes).flatten() # last: left out

    # softmax over the pixels of a segment, for the S*K prototypes of the pixel's class
    members = table.flatten(1).clamp(min=0)[label]                   # (B,h*w,S*K)
    d = d2.flatten(2).transpose(1, 2).gather(2, members).flatten(0, 1)                    # (B*h*w,S*K)
    zeros = d.new_zeros(B * num_classes + 1, d.shape[1])
    index = segment[:, None].expand_as(d)
    highest = zeros.scatter_reduce(0, index, d.detach(), "amax", include_self=False)
    d = d - highest.index_select(0, segment)
    mass = d.exp()
    p = mass / zeros.index_add(0, segment, mass).index_select(0, segment)

    # column (i,j) of `difference` is 1 at i and -1 at j: x @ difference = x_i - x_j, quicker than x[..., i]
    i, j = torch.triu_indices(K, K, 1, device=d.device)
    difference = (F.one_hot(i, K) - F.one_hot(j, K)).T.to(d.dtype)   # (K,pairs)
    p, d = (x.view(-1, num_scales, K) @ difference for x in (p, d))  # (B*h*w,S,pairs)
    J = d.new_zeros(len(zeros), *d.shape[1:]).index_add(0, segment, 0.5 * p * d)[:-1]     # (B*C,S,pairs)
    pixels = d.new_zeros(len(zeros)).index_add(0, segment, d.new_ones(len(segment)))[:-1]
    is_pair = (table[..., i] >= 0) & (table[..., j] >= 0)            # (C,S,pairs)
    valid = (pixels >= 2)[:, None, None] & is_pair.repeat(B, 1, 1)
    return torch.where(valid, (-J).exp(), 0).sum() / valid.sum().clamp(min=1)


def off_class_l1(weight, class_of_column):
    """L_L1: sum of |w| where the row is not the column's class: weight (C,F), class_of_column (F,)."""
    return (weight.abs() * (1 - F.one_hot(class_of_column, len(weight)).T)).sum()


# ---- groups, stage 2 (Sec. 9, 13; formulas: code) --------------------------------------------------------

def project_simplex(w):
    """The nearest point (Euclid) with entries >= 0 and sum 1, for every row of w (...,n) -> same shape.

    It is max(w - theta, 0): theta by sorting (Held et al. 1974, Duchi et al. 2008), all rows at once.
    """
    falling = w.sort(-1, descending=True).values
    count = torch.arange(1, w.shape[-1] + 1, device=w.device)
    theta = (falling.cumsum(-1) - 1) / count                         # if `count` entries stay positive
    last = (falling > theta).sum(-1, keepdim=True) - 1
    return (w - theta.gather(-1, last)).clamp_min(0)


def group_activations(similarity, weights, members):
    """G_{c,g} = exp(sum_m w_{g,c}[m] g_proto(member m of c)): a weighted geometric mean, from 1 to 1e4.

    similarity (B,P,h,w), weights (C,G,N), members (C,N) int64, -1 = none -> (B,C*G,h,w) float32, by class.
    A weight at -1 counts nothing; a class without members has activation 1.
    """
    C, G, N = weights.shape
    with torch.autocast(similarity.device.type, enabled=False):      # 0.01 more in the exponent is 1 %
        weights = weights.float() * (members >= 0)[:, None]          # (C,G,N)
        s = similarity.float().flatten(2)                            # (B,P,h*w)
        member = members.clamp(min=0)
        if C * s.shape[1] <= 8192:                                   # one product is quicker than many
            rows = weights.new_zeros(C * G, s.shape[1])              # (C*G,P), weights at their prototypes
            rows = rows.scatter_add(1, member.repeat_interleave(G, dim=0), weights.flatten(0, 1))
            exponent = rows @ s                                      # (B,C*G,h*w)
        else:
            of_class = s[:, member.flatten()].unflatten(1, (C, N))   # (B,C,N,h*w)
            exponent = (weights @ of_class).flatten(1, 2)
        return exponent.exp().unflatten(2, similarity.shape[2:])


def entropy_loss(weights, members):
    """L_ent: mean over rows of -sum_m w ln(w + 1e-5) / ln(members); weights (C,G,N), members (C,N).

    Rows of classes with fewer than two members are left out (the code divides by ln 1 = 0 there).
    """
    is_member = members >= 0                                         # (C,N)
    count = is_member.sum(1)
    log_weights = (weights + 1e-5).clamp_min(1e-5).log()
    entropy = -(weights * log_weights * is_member[:, None]).sum(2)   # (C,G)
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
        self.register_buffer("members", members_by_key(prototype_class, num_classes))     # (C,N)
        is_member = (self.members >= 0)[:, None]                     # (C,1,N)
        bound = is_member.sum(2, keepdim=True).clamp(min=1).rsqrt()  # nn.Linear's: 1 / sqrt(members)
        draw = torch.rand(num_classes, num_groups, self.members.shape[1])
        self.weights = nn.Parameter((2 * draw - 1) * bound)          # w_{g,c}
        class_of_group = torch.arange(num_classes).repeat_interleave(num_groups)          # (C*G,)
        self.last_layer = nn.Linear(len(class_of_group), num_classes, bias=False)         # w_h_group
        self.register_buffer("class_of_group", class_of_group)
        self.last_layer.weight.data.copy_(initial_head(class_of_group, num_classes))
        self.to_simplex()

    @torch.no_grad()
    def to_simplex(self):
        """After every optimizer step: rows back on the simplex of their class's members."""
        no_member = (self.members < 0)[:, None]                      # (C,1,N)
        low = self.weights.masked_fill(no_member, -1e4)              # so low that the projection makes it 0
        self.weights.copy_(project_simplex(low).masked_fill(no_member, 0))   # but where a class has none

    def activations(self, similarity, alpha=0.0):
        """(B,P,h,w) -> (B,C*G,h,w); weights below alpha count as 0, classes without groups have 0 [D5]."""
        weights = threshold_groups(self.weights, alpha)
        has_groups = (self.members >= 0).any(1)[self.class_of_group, None, None]
        return group_activations(similarity, weights, self.members) * has_groups

    def members_of(self, c, g, alpha):
        """[(prototype, weight)] of group g of class c, heaviest first; weights below alpha are left out."""
        pairs = zip(self.members[c].tolist(), threshold_groups(self.weights[c, g], alpha).tolist())
        return sorted([(p, w) for p, w in pairs if p >= 0 and w > 0], key=lambda pair: -pair[1])

    def forward(self, similarity, alpha=0.0):
        return on_maps(self.last_layer.weight, self.activations(similarity, alpha))


def initial_head(class_of_column, num_classes):
    """(C,F): 1 for the column's own class, -0.5 for the others."""
    return F.one_hot(class_of_column, num_classes).T * 1.5 - 0.5


def on_maps(weight, maps):
    """A linear layer at every pixel: (C,F), (B,F,h,w) -> (B,C,h,w)."""
    return (weight @ maps.flatten(2)).unflatten(2, maps.shape[2:])


# ---- model (Sec. 6; code) --------------------------------------------------------------------------------

class DeepLab(nn.Module):
    """Backbone and ASPP. As it is, DeepLabv2: the ASPP maps are summed and are the logits.

    forward(x (B,3,H,W)) -> list of (logits (B,C,h,w), None). In training one entry for each size of the
    input, the image's own first, and the maximum of all; in eval mode the maximum only.
    """
    stages = ("plain",)                                              # predictions that metrics.json tells of

    def __init__(self, backbone, num_channels, rates, summed=True, input_scales=(), frozen_bn=True):
        super().__init__()
        self.backbone, self.summed, self.input_scales = backbone, summed, input_scales
        self.frozen_bn = frozen_bn
        self.frozen = False                                          # True: the backbone is not trained now
        self.register_buffer("log_prior", None)                      # (C,) with --log-prior
        self.aspp = nn.ModuleList(nn.Conv2d(backbone.channels, num_channels, 3, padding=rate, dilation=rate)
                                  for rate in rates)
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
        maps = [self.one_size(x)]
        largest = maps[0]
        for scale in self.input_scales:
            smaller = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
            maps.append(self.one_size(smaller))
            grown = F.interpolate(maps[-1], largest.shape[2:], mode="bilinear", align_corners=False)
            largest = torch.maximum(largest, grown)
        return [*maps, largest] if self.training and self.input_scales else [largest]

    def with_prior(self, logits):
        """(B,C,h,w) -> the same, plus the log prior of each class if there is one."""
        return logits if self.log_prior is None else logits + self.log_prior[:, None, None]

    def forward(self, x):
        return [(self.with_prior(maps), None) for maps in self.maps(x)]

    @torch.no_grad()
    def final_logits(self, x, cfg):
        """(B,3,H,W) -> (B,C,h,w) float32 in eval mode, as the network predicts."""
        with run.autocast(x.device, cfg.amp):
            return self(x)[-1][0].float()


class ScaleProtoSeg(DeepLab):
    """ASPP maps -> similarities to prototypes -> logits, by the last layer or, in stage 2, by the groups.
    forward(x) -> list as in DeepLab, of (logits (B,C,h,w), d2 (B,P,h,w))."""

    def __init__(self, backbone, depth, rates, summed, input_scales, frozen_bn, prototype_class,
                 prototype_scale, num_classes):
        super().__init__(backbone, depth, rates, summed, input_scales, frozen_bn)
        self.prototypes = nn.Parameter(torch.rand(len(prototype_class), depth))  # in [0, 1], as features
        self.register_buffer("prototype_class", torch.as_tensor(prototype_class))         # (P,)
        self.register_buffer("prototype_scale", torch.as_tensor(prototype_scale))         # (P,)
        self.register_buffer("of_scale", None, persistent=False)     # (S,N) prototypes of each scale
        self.register_buffer("pairs", None, persistent=False)        # (C,S,K) ... of each class and scale
        self.make_tables()
        self.last_layer = nn.Linear(len(prototype_class), num_classes, bias=False)        # w_h_proto
        self.last_layer.weight.data.copy_(initial_head(self.prototype_class, num_classes))
        self.groups = None                                           # until stage 2

    def make_tables(self):
        """What a training step looks up about the prototypes, made anew whenever some are dropped."""
        self.of_scale = members_by_key(self.prototype_scale, 1 if self.summed else len(self.aspp))
        self.pairs = pair_table(self.prototype_class, self.prototype_scale)

    def distances(self, maps):
        """(B,S*D,h,w) before the sigmoid -> d2 (B,P,h,w) float32."""
        z = maps.float().sigmoid()
        return prototype_distances(z, self.prototypes, self.prototype_scale, self.of_scale)

    def similarity(self, x, amp="off"):
        """Images (B,3,H,W) -> g_proto (B,P,h,w) in eval mode."""
        with run.autocast(x.device, amp):
            maps = self.maps(x)[-1]
        return log_similarity(self.distances(maps))

    def logits(self, similarity, alpha=0.0):
        """(B,P,h,w) -> (B,C,h,w), by the groups if there are any."""
        if self.groups is not None:
            return self.with_prior(self.groups(similarity, alpha))
        return self.with_prior(on_maps(self.last_layer.weight, similarity))

    def forward(self, x):
        d2 = [self.distances(maps) for maps in self.maps(x)]
        with torch.autocast(x.device.type, enabled=False):           # float32: see prototype_distances
            return [(self.logits(log_similarity(d)), d) for d in d2]

    @torch.no_grad()
    def final_logits(self, x, cfg):
        return self.logits(self.similarity(x, cfg.amp), cfg.threshold)

    @property
    def stages(self):
        """Stage 1 with the first and the fine-tuned last layer; stage 2 before and after the threshold."""
        groups = ("stage2", "stage2_thresholded") if self.groups is not None else ()
        return ("stage1_projected", "stage1_finetuned", *groups)

    @torch.no_grad()
    def logits_of_stages(self, x, cfg):
        """(B,3,H,W) -> the logits (B,C,h,w) of each of `stages`, a list."""
        similarity = self.similarity(x, cfg.amp)
        head = initial_head(self.prototype_class, len(self.last_layer.weight))
        logits = [on_maps(head, similarity), on_maps(self.last_layer.weight, similarity)]
        if self.groups is not None:
            logits += [self.groups(similarity), self.groups(similarity, cfg.threshold)]
        return [self.with_prior(maps) for maps in logits]

    @torch.no_grad()
    def keep(self, index):
        """Only the prototypes index (int64) stay, in this order."""
        self.prototypes = nn.Parameter(self.prototypes[index])
        self.prototype_class = self.prototype_class[index]
        self.prototype_scale = self.prototype_scale[index]
        self.last_layer.weight = nn.Parameter(self.last_layer.weight[:, index])
        self.make_tables()

    def start_groups(self, num_groups, seed=0):
        """New groups, drawn on the CPU by the seed alone."""
        torch.manual_seed(seed)
        groups = Groups(self.prototype_class.cpu(), len(self.last_layer.weight), num_groups)
        self.groups = groups.to(self.prototypes.device)

    def used(self, alpha):
        """(P,) bool: the prototypes with a weight of alpha or more in some group; in stage 1 all."""
        used = torch.ones_like(self.prototype_class, dtype=torch.bool)
        if self.groups is not None:
            is_member = self.groups.members >= 0                     # (C,N)
            weights = threshold_groups(self.groups.weights, alpha)   # (C,G,N)
            used[self.groups.members[is_member]] = (weights > 0).any(1)[is_member]
        return used


# ---- a training step -------------------------------------------------------------------------------------

def losses_of(model, net, x, labels, phase, cfg):
    """The weighted terms of the loss of a phase, means over the sizes of the input: dict of scalars.
    x (B,3,H,W), labels (B,H,W): labels shrink to the grid of the logits, logits do not grow."""
    with run.autocast(x.device, cfg.amp):
        outputs = model(x)
    share = 1 / len(outputs)
    losses = dict(ce=0.0)
    for logits, d2 in outputs:
        small = nearest_label(labels, logits.shape[2:])
        total = F.cross_entropy(logits.float(), small, ignore_index=255, reduction="sum")
        losses["ce"] += share * total / (small != 255).sum().clamp(min=1)                 # 0 if all is void
        if d2 is not None and phase in ("warmup", "joint") and cfg.w_diversity:           # later d2 is fixed
            loss = diversity_loss(d2, small, net.prototype_class, net.prototype_scale, net.pairs)
            losses["diversity"] = losses.get("diversity", 0.0) + share * cfg.w_diversity * loss
    if phase == "finetune":
        losses["l1"] = cfg.w_l1 * off_class_l1(net.last_layer.weight, net.prototype_class)
    if phase.startswith("group"):
        groups = net.groups
        losses["l1"] = cfg.w_l1_group * off_class_l1(groups.last_layer.weight, groups.class_of_group)
        losses["entropy"] = cfg.w_entropy * entropy_loss(groups.weights, groups.members)
    return losses


def train_step(model, net, optimizer, scheduler, x, labels, phase, cfg):
    """One iteration; returns the terms of the loss, detached, on the device. model: net, or DDP around it.
    The batch goes through in parts of --micro-batch images, whose gradients add up."""
    sums = {}
    size = cfg.micro_batch or len(x)                                 # [D15]
    parts = list(zip(x.split(size), labels.split(size)))
    optimizer.zero_grad(set_to_none=True)
    for k, (part, target) in enumerate(parts, 1):
        model.require_backward_grad_sync = k == len(parts)           # DDP: processes exchange gradients once
        share = len(part) / len(x)
        losses = losses_of(model, net, part, target, phase, cfg)
        run.backward(sum(losses.values()) * share, optimizer, cfg.amp)          # as loss.backward()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.detach() * share
    run.step(optimizer)                                              # as optimizer.step(); see --amp fp16
    scheduler.step()
    if phase.startswith("group"):
        net.groups.to_simplex()
    return sums


def build_optimizer(net, phase, cfg, device):
    """A fresh Adam over what the phase trains (Sec. 6), and its schedule; nothing else gets a gradient."""
    net.requires_grad_(False)
    if phase in ("warmup", "joint"):
        groups = [dict(params=list(net.aspp.parameters()), lr=cfg.lr, weight_decay=cfg.weight_decay)]  # [D3]
        if isinstance(net, ScaleProtoSeg):
            groups.append(dict(params=[net.prototypes], lr=cfg.lr))
        if phase == "joint":
            fixed = {id(p) for p in norm_parameters(net.backbone)} if cfg.frozen_bn else ()
            backbone = [p for p in net.backbone.parameters() if id(p) not in fixed]
            groups.insert(0, dict(params=backbone, lr=cfg.backbone_lr, weight_decay=cfg.weight_decay))
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
    power = 0.9 if phase.endswith("joint") else 0.0                  # 0: constant
    return optimizer, run.poly_schedule(optimizer, max(getattr(cfg, phase), 1), power)


# ---- projection (code) -----------------------------------------------------------------------------------

class Source(NamedTuple):
    """Where a projected prototype comes from: cell (row, column) of the feature map of a training image."""
    image: int                                                       # its number in the projection split
    row: int
    column: int
    distance: float                                                  # squared, from the prototype before


@torch.no_grad()
def project_prototypes(net, loader, device):
    """Every prototype becomes the nearest pixel feature of its own class and scale in the loader's images.

    loader: batches with image (1,3,h,w), mask (1,H,W), index, in order, this process's share; each goes
    through the network once. All distances are to the old prototypes, which move after the last image; of
    equal ones the first image's first cell wins, whatever the number of processes. Returns P Sources; where
    no pixel has the class Source(-1, -1, -1, inf), and the prototype stays [D4].
    """
    net.eval()
    P, D = net.prototypes.shape
    moved = net.prototypes.clone()
    best = torch.full((P,), math.inf, device=device)
    places = torch.full((P, 3), -1, device=device)                   # image, row, column
    for batch in tqdm(loader, desc="project", leave=False, disable=None):
        x, mask = to_device(batch, device, "image", "mask")
        z = net.maps(x)[-1].float().sigmoid()                        # (1,S*D,h,w) [D14]
        d2 = prototype_distances(z, net.prototypes, net.prototype_scale)[0]               # (P,h,w)
        labels = nearest_label(mask, d2.shape[1:])                   # (1,h,w)
        d2 = d2.masked_fill(labels != net.prototype_class[:, None, None], math.inf)
        nearest, cell = d2.flatten(1).min(1)                         # (P,)
        row, column = cell // d2.shape[2], cell % d2.shape[2]
        patch = z.unflatten(1, (-1, D))[0, net.prototype_scale, :, row, column]           # (P,D)
        closer = nearest < best
        best = torch.where(closer, nearest, best)
        moved = torch.where(closer[:, None], patch, moved)
        image = torch.full_like(row, int(batch["index"]))
        places = torch.where(closer[:, None], torch.stack([image, row, column], 1), places)
    best, places, moved = (of_all_ranks(x[None]) for x in (best, places, moved))          # (world,P,...)
    image = places[..., 0].float().masked_fill(best > best.amin(0), math.inf)
    winner = image.argmin(0), torch.arange(P, device=device)         # of the nearest ones the lowest number
    net.prototypes.copy_(moved[winner])
    return [Source(*place, distance) for place, distance in zip(places[winner].tolist(),
                                                                best[winner].tolist())]


def remove_duplicates(prototypes, prototype_class, prototype_scale):
    """Indices (int64, rising) that stay: of equal vectors of a class and scale only the first."""
    first = {}                                                       # (class, scale, vector) -> an index
    vectors = map(tuple, prototypes.tolist())
    for p, key in enumerate(zip(prototype_class.tolist(), prototype_scale.tolist(), vectors)):
        first.setdefault(key, p)
    return torch.tensor(list(first.values()), dtype=torch.int64, device=prototypes.device)


# ---- training --------------------------------------------------------------------------------------------
# progress, a dict in every checkpoint, tells what is done. train and train_phase keep phase (of PHASES),
# iteration (done in it) and offset (iterations of the phases before); run.Log keeps log, sums and seconds;
# log_row val_iou, {iteration over all phases: of each class}; project writes prototype_class,
# prototype_scale, sources (a Source each) and counts (what was dropped).

def train(cfg, machine):
    """All phases of the method, then the report. Returns what metrics.json holds (None where rank > 0)."""
    if cfg.stage1 and not cfg.resume:
        cfg = settings_with_stage1(cfg)
    sets = open_sets(cfg)
    net, progress = prepare(cfg, sets, machine)
    view = loaders.TrainView(sets["train"], 0, cfg.crop, (cfg.scale_min, cfg.scale_max), photometric=False,
                             crop_retries=0)
    announce(net, view, sets, progress, cfg, machine)
    log = run.Log(cfg.out, progress, machine)
    phases = PHASES[cfg.method]
    for phase in phases[phases.index(progress["phase"]):]:
        if phase == "project":
            project(net, sets, log, cfg, machine)
            continue
        if phase.startswith("group") and net.groups is None:
            net.start_groups(cfg.groups, cfg.seed)
        train_phase(net, phase, view, sets["val"], log, cfg, machine)
        progress["offset"] += getattr(cfg, phase)
        if phase == "finetune" and cfg.method == "scaleprotoseg":
            run.save_checkpoint(Path(cfg.out) / "stage1.pt", dict(model=net), progress)   # for --stage1
    return report(net, cfg, sets, progress, machine)


def train_phase(net, phase, view, val, log, cfg, machine):
    """The iterations of one phase, with log and checkpoints; a resumed one goes on where it stood."""
    progress = log.progress
    total = getattr(cfg, phase)
    optimizer, scheduler = build_optimizer(net, phase, cfg, machine.device)
    model = run.distribute(net, machine)
    parts = dict(model=net, optimizer=optimizer, scheduler=scheduler)
    if progress["phase"] != phase:
        progress |= dict(phase=phase, iteration=0)
    elif progress["iteration"]:
        run.load_checkpoint(Path(cfg.out) / "last.pt", parts, machine.device)
    start, offset = progress["iteration"], progress["offset"]
    loader = loaders.train_loader(view, cfg.batch_size, cfg.seed, offset + start, offset + total,
                                  cfg.workers, *machine)
    model.train()
    torch.backends.cudnn.benchmark = True                            # only here: whole images differ in size
    bar = tqdm(loader, total=total, initial=start, desc=phase, leave=False, disable=machine.quiet)
    for iteration, batch in enumerate(bar, start + 1):
        x, labels = to_device(batch, machine.device, "image", "mask")
        log.add(train_step(model, net, optimizer, scheduler, x, labels, phase, cfg))
        if run.due(iteration, cfg.eval_every, total):
            log_row(net, val, log, iteration, scheduler.get_last_lr()[0], cfg, machine)
        if run.due(iteration, cfg.save_every, total):
            log.save("last.pt", parts, iteration=iteration)
    torch.backends.cudnn.benchmark = False
    if not total:                                                    # nothing learns, but groups are new
        log.save("last.pt", parts, iteration=0)


# ==== from here on: what surrounds the loop, evaluation, using a trained run, the paper's tables ==========

def open_sets(cfg):
    """{"train", "project", "val", "test"}: SegmentationSets. A wrong --parts is told now, not at the end."""
    splits = dict(train=cfg.train_split, project=cfg.project_split or cfg.train_split, val=cfg.val_split,
                  test=cfg.test_split)
    names = dict.fromkeys(splits.values())                           # every split is opened once
    opened = {name: datasets.open_split(cfg, name) for name in names}
    check_parts(opened[cfg.test_split], cfg)
    return {use: opened[name] for use, name in splits.items()}


def first_prototypes(cfg, num_classes):
    """Class and scale of every prototype, two lists of P: scale by scale, in a scale class by class."""
    multiscale = cfg.method == "scaleprotoseg"
    num_scales, each = (len(cfg.rates), cfg.prototypes) if multiscale else (1, cfg.protoseg_prototypes)
    prototype_class = torch.arange(num_classes).repeat_interleave(each).repeat(num_scales)
    prototype_scale = torch.arange(num_scales).repeat_interleave(num_classes * each)
    return prototype_class.tolist(), prototype_scale.tolist()


def build_model(cfg, progress, weights="none"):
    """The network of cfg.method for what progress says of classes, prototypes and groups."""
    width = dict(width=cfg.unet_width) if cfg.backbone == "unet" else {}                  # [D6]
    backbone = build_dense(cfg.backbone, weights, cfg.output_stride, **width)             # [D1]
    num_classes = len(progress["classes"])
    if cfg.method == "deeplab":
        net = DeepLab(backbone, num_classes, cfg.rates, True, cfg.input_scales, cfg.frozen_bn)      # [D11]
    else:
        net = ScaleProtoSeg(backbone, cfg.depth, cfg.rates, cfg.method == "protoseg", cfg.input_scales,
                            cfg.frozen_bn, progress["prototype_class"], progress["prototype_scale"],
                            num_classes)
        if progress["phase"].startswith("group"):
            net.start_groups(cfg.groups)
    if cfg.log_prior:
        net.log_prior = torch.zeros(num_classes)                     # see prepare; a checkpoint has it
    return net


def prepare(cfg, sets, machine):
    """(net, progress): new, from --stage1, or resumed. Makes the run folder once the model stands."""
    classes = list(sets["train"].classes)
    last = Path(cfg.out) / "last.pt"
    resumes = cfg.resume and last.exists()                           # killed before the first: start again
    torch.manual_seed(cfg.seed)
    if resumes:
        progress = run.read_progress(cfg.out, ("phase", "offset"), classes, sets["train"])
        net = build_model(cfg, progress)
    elif cfg.stage1:
        net, progress = stage1_of(cfg, classes)
    else:
        prototype_class, prototype_scale = first_prototypes(cfg, len(classes))
        progress = dict(phase="warmup", iteration=0, offset=0, seconds=0.0, log=[], sums={}, classes=classes,
                        prototype_class=prototype_class, prototype_scale=prototype_scale)
        net = build_model(cfg, progress, cfg.weights)
    if not resumes:
        progress |= dict(pixels=survey.survey(sets["train"], sets.values(), cfg, machine, net=net),
                         images=run.code_of_names(sets["train"]))
        if cfg.log_prior:
            pixels = progress["pixels"].clamp(min=1)                 # a class without any counts as one
            net.log_prior = (pixels / pixels.sum()).log()
    run.start_run(cfg, machine)
    torch.manual_seed(cfg.seed + 1 + machine.rank)
    if resumes:
        run.load_checkpoint(last, dict(model=net), torch.device("cpu"))
    return net.to(machine.device, memory_format=torch.channels_last), progress


STAGE2 = ("preset", "method", "schedule", "groups", "group_warmup", "group_joint", "group_lr", "w_l1_group",
          "w_entropy", "micro_batch", "eval_every")                  # options that are stage 2's own


def settings_with_stage1(cfg):
    """--stage1: cfg with the settings of the run whose stage 1 is taken over, but its own for stage 2.
    UserError for a flag that contradicts them."""
    other = run.read_config(Config, cfg.stage1)
    if Path(cfg.stage1).resolve() == Path(cfg.out).resolve():
        raise UserError(f"--stage1 {cfg.stage1} is --out too, from where its stage 1 would be moved aside: "
                        "name another --out.")
    if other.method != cfg.method:
        raise UserError(f"--stage1 {cfg.stage1} was trained with --method {other.method}: no stage 2 goes "
                        "with it; name a run of scaleprotoseg.")
    theirs = {f.name: getattr(other, f.name) for f in fields(cfg)
              if not f.metadata["runtime"] and f.name not in STAGE2}
    for name, value in theirs.items():
        if name in getattr(cfg, "given", ()) and getattr(cfg, name) != value:
            raise UserError(f"--stage1 {cfg.stage1} was trained with {run.flag_of(name)} {value}, not "
                            f"{getattr(cfg, name)}: leave the flag out.")
    return replace(cfg, **theirs)


def stage1_of(cfg, classes):
    """--stage1: (net, progress) as another run's stage 1 left them. UserError if it does not fit."""
    saved = run.read_checkpoint(Path(cfg.stage1) / "stage1.pt")
    run.check_classes(saved["progress"]["classes"], classes, cfg.stage1)
    net = build_model(cfg, saved["progress"])
    net.load_state_dict(saved["model"])
    return net, saved["progress"] | dict(phase="group_warmup", iteration=0)


def announce(net, view, sets, progress, cfg, machine):
    """Expected time and peak memory, measured on one iteration of the joint phase; changes nothing."""
    left = cfg.warmup + cfg.joint - progress["offset"] - progress["iteration"]
    if left <= 0:
        return
    later = sum(getattr(cfg, phase) for phase in PHASES[cfg.method][3:])     # each about a forward pass
    images = later * cfg.batch_size + (left + later) // cfg.eval_every * len(sets["val"]) + len(sets["test"])
    optimizer, scheduler = build_optimizer(net, "joint", cfg, machine.device)

    def step(batch):
        x, labels = to_device(batch, machine.device, "image", "mask")
        train_step(net, net, optimizer, scheduler, x, labels, "joint", cfg)
    net.train()
    torch.backends.cudnn.benchmark = True
    parts = dict(model=net, optimizer=optimizer, scheduler=scheduler)
    speed.announce(step, view, parts, left, images, cfg, machine)


def log_row(net, data, log, iteration, lr, cfg, machine):
    """One more row of log.csv: the network as it stands, evaluated on val [D9]."""
    phase = log.progress["phase"]
    score = evaluate(net, data, ["final"], cfg, machine)["final"]
    by_iteration = log.progress.setdefault("val_iou", {})            # of equal ones the first: not projected
    by_iteration.setdefault(log.progress["offset"] + iteration, score["iou"])
    log.row(f"{phase} {iteration}", before=dict(phase=phase, iteration=iteration, lr=lr),
            after=dict(val_miou=score["miou"], val_pixel_acc=score["pixel_acc"]),
            text=f"{cfg.val_split} mIoU {score['miou']:.1f}", losses=("ce", "diversity", "l1", "entropy"))


def project(net, sets, log, cfg, machine):
    """The end of stage 1's training: projection, absent classes [D4], duplicates, ProtoSeg's pruning. Each
    process looks at its share of the images."""
    progress = log.progress
    if progress["phase"] == "project":                               # a resumed run has done it
        return
    net.requires_grad_(False)
    run.share_buffers(net)                                           # statistics of batch norm
    loader = loaders.eval_loader(loaders.TestView(sets["project"], 0), cfg.workers, *machine)
    sources = project_prototypes(net, loader, machine.device)
    moved = torch.tensor([source.image >= 0 for source in sources], device=machine.device)
    if not moved.any():
        raise UserError(f"no pixel of the {cfg.project_split or cfg.train_split} split is labelled at the "
                        "stride of the network, so no prototype can be projected: check the masks.")
    absent = [progress["classes"][c] for c in net.prototype_class[~moved].unique().tolist()]
    kept = remove_duplicates(net.prototypes, net.prototype_class, net.prototype_scale)
    kept = kept[moved[kept]]
    net.keep(kept)
    counts = dict(prototypes_at_first=len(sources), absent_classes=absent, pruned=0,
                  of_absent_classes=int((~moved).sum()), duplicates=int(moved.sum()) - len(kept))
    if cfg.method == "protoseg":
        passed = prune_prototypes(net, loader, machine.device)
        if not passed.any():
            raise UserError("ProtoSeg's pruning left no prototype: train longer (--schedule, --joint).")
        counts["pruned"] = int((~passed).sum())
        kept = kept[passed]
        net.keep(passed.nonzero()[:, 0])
    progress |= dict(phase="project", counts=counts, sources=[list(sources[p]) for p in kept.tolist()],
                     prototype_class=net.prototype_class.tolist(),
                     prototype_scale=net.prototype_scale.tolist())
    if machine.rank == 0:
        names = f" ({', '.join(absent)})" if absent else ""
        print(f"projected {len(sources)} prototypes onto training images; {len(kept)} left: "
              f"{counts['duplicates']} duplicates, {counts['pruned']} pruned, {counts['of_absent_classes']} "
              f"of classes without a training pixel{names}", flush=True)
    log_row(net, sets["val"], log, 0, 0.0, cfg, machine)
    log.save("last.pt", dict(model=net), iteration=0)


@torch.no_grad()
def prune_prototypes(net, loader, device, neighbours=6, least=3):
    """ProtoSeg's rule: True where `least` or more of a prototype's nearest patches are in its class.

    An image offers its one nearest cell that is not void [D7]; the `neighbours` nearest images count. A
    patch is in the class if any of its pixels is. loader as in project_prototypes -> (P,) bool, for all
    processes alike.
    """
    net.eval()
    other = int(net.prototype_class.max()) + 1                       # void, and classes without prototypes
    distance = torch.full((neighbours, len(net.prototypes)), math.inf, device=device)     # of the nearest
    hit, images = torch.zeros_like(distance), torch.zeros(1, device=device)               # images so far
    for batch in tqdm(loader, desc="prune", leave=False, disable=None):
        x, mask = to_device(batch, device, "image", "mask")
        d2 = net.distances(net.maps(x)[-1])[0]                       # (P,h,w)
        void = nearest_label(mask, d2.shape[1:]) == 255              # (1,h,w)
        nearest, cell = d2.masked_fill(void, math.inf).flatten(1).min(1)                  # (P,)
        inside = torch.zeros(other + 1, *mask.shape[1:], device=device).scatter_(0, mask.clamp(max=other), 1)
        inside = F.adaptive_max_pool2d(inside, d2.shape[1:]).flatten(1)                   # (C+1,h*w)
        found = inside[net.prototype_class, cell] * nearest.isfinite()
        distance, order = torch.cat([distance, nearest[None]]).sort(dim=0, stable=True)
        hit = torch.cat([hit, found[None]]).gather(0, order)[:neighbours]
        distance, images = distance[:neighbours], images + 1
    distance, hit, images = (of_all_ranks(x) for x in (distance, hit, images))            # (world*6,P)
    near = distance.topk(neighbours, dim=0, largest=False).indices
    return hit.gather(0, near).sum(0) >= images.sum().clamp(max=least)


# ---- evaluation ------------------------------------------------------------------------------------------

def evaluate(net, data, stages, cfg, machine):
    """{stage: rates in percent (common/metrics.py)} over a split, summed over processes. stages: net.stages,
    or one name for the network as it predicts. Logits are resized to the label; void never counts."""
    def predict(batch):
        x, = to_device(batch, machine.device, "image")
        windows = segmentation.in_windows(logits_of, x, cfg.window)
        sizes = x.shape[2:], batch["mask"].shape[1:]
        return {stage: segmentation.class_ids(segmentation.part_of(windows, k), *sizes)
                for k, stage in enumerate(stages)}

    def logits_of(x):
        return [net.final_logits(x, cfg)] if len(stages) == 1 else net.logits_of_stages(x, cfg)

    loader = loaders.eval_loader(measures.test_view(data, cfg), cfg.workers, *machine)
    return segmentation.evaluate(net, loader, data.num_classes, stages, predict, machine)


def report(net, cfg, sets, progress, machine):
    """Final evaluation on the test split, metrics.json and figures/ (rank 0 writes). Returns the metrics."""
    data, device = sets["test"], machine.device
    scores = evaluate(net, data, net.stages, cfg, machine)
    if machine.rank:
        return None
    cfg = run.for_results(cfg)
    final = segmentation.named_rates(scores[net.stages[-1]], data.classes, cfg.test_split)
    entries = {key: final[key] for key in ("miou", "macc", "pixel_acc", "iou", "absent")}
    for stage, score in scores.items():
        iou = dict(zip(data.classes, score["iou"]))
        entries[stage] = dict(miou=score["miou"], pixel_acc=score["pixel_acc"], iou=iou)
    if cfg.method != "deeplab":
        entries |= progress["counts"] | measures.projection(progress)
        entries |= measures.analyse(net, data, cfg, device)
        if net.groups is not None and cfg.equivariance:
            entries["equivariance"] = measures.equivariance(net, sets["project"], cfg, device)    # Eq. (10)
    iterations = {phase: getattr(cfg, phase) for phase in PHASES[cfg.method] if phase != "project"}
    entries |= run.facts(cfg, net, progress, machine, "method", "threshold") | dict(
        images_per_second=measures.images_per_second(net, data, cfg, device), split=cfg.test_split,
        iterations=iterations, finished=is_finished(cfg, progress))
    run.write_json(Path(cfg.out) / "metrics.json", entries)
    gallery.draw_figures(gallery.Drawing(net, cfg, progress, device, data, sets["project"]), entries)
    for line in measures.told(entries, cfg):
        print(line)
    text = ", ".join(f"{stage} {score['miou']:.1f}" for stage, score in scores.items())
    text += f"; {entries['prototypes']} prototypes" if "prototypes" in entries else ""
    text += f", {entries['group_average']:.1f} a group" if "group_average" in entries else ""
    print(f"{cfg.test_split} mIoU: {text}{segmentation.absent_classes(entries)}; see {cfg.out}/metrics.json "
          f"and {cfg.out}/figures")
    write_report(cfg.out, PAGE)
    return entries


def is_finished(cfg, progress):
    last = PHASES[cfg.method][-1]
    return progress["phase"] == last and progress["iteration"] == getattr(cfg, last)


# ---- use a trained run -----------------------------------------------------------------------------------

def load_network(cfg, device, classes=None):
    """The network of the run in cfg.out in eval mode, and its progress. classes: those it must know."""
    progress = run.read_progress(cfg.out, ("phase", "offset"), classes)
    if "sources" not in progress and cfg.method != "deeplab":
        raise UserError(f"the run in {cfg.out} has not come to its projection: let it finish (--resume).")
    net = build_model(cfg, progress).to(device, memory_format=torch.channels_last)
    run.load_checkpoint(Path(cfg.out) / "last.pt", dict(model=net), device)
    if not is_finished(cfg, progress):
        print(f"note: the run in {cfg.out} is unfinished: {progress['phase']} {progress['iteration']}")
    return net.eval(), progress


def load_run(cfg, device):
    """The run in cfg.out, to explain or draw it."""
    if cfg.method == "deeplab":
        raise UserError(f"the run in {cfg.out} is a plain network, which has no prototypes to explain it: "
                        "pass a run of scaleprotoseg or protoseg.")
    splits = (cfg.test_split, cfg.project_split or cfg.train_split)
    test, source_images = (datasets.open_split(cfg, split) for split in splits)
    net, progress = load_network(cfg, device, test.classes)
    return gallery.Drawing(net, cfg, progress, device, test, source_images)


def load_baseline(d):
    """The run of --baseline; UserError unless it knows the same classes as d."""
    path = d.cfg.baseline
    baseline = load_run(replace(run.read_config(Config, path), out=path), d.device)
    if baseline.classes != d.classes:
        raise UserError(f"--baseline {path} knows other classes than the run in {d.cfg.out}: name a run on "
                        "the same data.")
    return baseline


def predict(cfg, device):
    """--predict: for every image OUT/predictions/NAME.png (class ids, palette) and NAME_overlay.png."""
    net, progress = load_network(cfg, device)
    d = gallery.Drawing(net, cfg, progress, device)

    def predict_file(path):
        image = files.read_image(path)
        return image, d.predict(image)
    segmentation.predict_files(files.list_images(cfg.predict), predict_file, d.classes, cfg.out)


# ---- tables of the paper ---------------------------------------------------------------------------------

METHODS = {name: dict(method=name) for name in ("deeplab", "protoseg", "scaleprotoseg")}
OURS = METHODS["scaleprotoseg"]
EM_CUTS = {f"{name} {k}": dict(method=name, train_split=f"train-{k}", val_split=f"val-{k}",
                               test_split=f"val-{k}") for name in METHODS for k in (1, 2)}        # [D6]
NO_ENTROPY = OURS | dict(w_entropy=0.0)
SPARSE = {"prototypes": "prototypes", "of a group": "group_average", "mIoU": "miou"}
COST = {"mean abs w": "mean_abs_weight", "parameters": "extra_parameters", "images/s": "images_per_second"}
DIGITS = {"of a group": 2, "mIoU": 2, "group overlap": 2, "mean abs w": 3, "images/s": 2}
PAPER = ("paper Pascal", "paper Cityscapes", "paper ADE20K")
ON = ("131 / 3.70 / 72.26", "111 / 3.39 / 69.22", "1132 / 4.08 / 34.32")    # in the order of SPARSE
TABLES = {
    5: Table("Table 5: three methods (the paper: mean of 3 runs on EM, no plain network)", METHODS,
             {"mIoU": "miou"}, ("paper EM",), {"protoseg 1": (77.63,), "protoseg 2": (78.92,),
                                               "scaleprotoseg 1": (77.97,), "scaleprotoseg 2": (79.29,)}),
    7: beside_paper("Table 7: thresholds of the group weights", SPARSE, PAPER, {
        "0.0": (OURS, "133 / 4.00 / 72.11", "114 / 3.68 / 69.20", "1168 / 4.53 / 34.03"),
        "0.05": (OURS, *ON),
        "0.1": (OURS, "126 / 3.21 / 72.12", "109 / 3.10 / 69.03", "1067 / 3.48 / 34.16")}),
    8: beside_paper("Table 8: entropy loss of the groups, off and on", SPARSE, PAPER, {
        "off": (NO_ENTROPY, "146 / 5.59 / 72.22", "132 / 5.79 / 69.22", "1405 / 6.06 / 33.40"),
        "on": (OURS, *ON)}),
    9: beside_paper("Table 9: overlap of a class's groups, entropy loss off and on",
                    {"group overlap": "group_overlap"}, PAPER, {
        "off": (NO_ENTROPY, 47.45, 61.65, 50.25),
        "on": (OURS, 28.29, 43.48, 42.74)}),
    10: beside_paper("Table 10: last layer and cost: mean abs w, parameters beyond DeepLabv2, images a "
                     "second (ours: one, synchronised)", COST, PAPER, {
        "protoseg": (METHODS["protoseg"], "0.527 / 12100 / 20.70", "0.523 / 9900 / 52.50",
                     "0.503 / 238200 / 51.90"),
        "scaleprotoseg": (OURS, "0.063 / 9100 / 15.60", "0.071 / 7600 / 5.10", "0.437 / 135400 / 14.50")}),
}


def run_table(cfg, machine):
    """--table: its rows as runs in OUT/rows/, then OUT/tableN.md. Tables share rows, finished ones stay."""
    table = TABLES[cfg.table]._replace(digits=DIGITS)
    if cfg.table == 5 and cfg.dataset == "em":
        table = table._replace(rows=EM_CUTS)
    check_rows(table.rows, cfg, check_config, ["threshold"] * (cfg.table == 7))
    special = {7: thresholds, 8: entropy_rows, 9: entropy_rows}
    results = special.get(cfg.table, train_rows)(table.rows, cfg, train, machine)
    write_table(cfg.table, table, results, cfg, machine,
                f"{cfg.joint} joint and {cfg.group_joint} group iterations")
    if cfg.table == 5 and machine.rank == 0:
        first = {name: next(row_configs(name, row, cfg)).out for name, row in table.rows.items()}
        runs = {name: run.read_progress(out, ("phase",)) for name, out in first.items()}
        gallery.draw_learning(Path(cfg.out) / "learning.png", runs)
    write_report(cfg.out, PAGE)
    return results


def thresholds(rows, cfg, train, machine):
    """Table 7: the run of our method with other thresholds; nothing is trained again."""
    train_rows({"scaleprotoseg": OURS}, cfg, train, machine)
    data = datasets.open_split(cfg, cfg.test_split)
    results = {name: [] for name in rows}
    for row_cfg in row_configs("scaleprotoseg", OURS, cfg):
        net, _ = load_network(row_cfg, machine.device)
        for name in rows:
            changed = replace(row_cfg, threshold=float(name))
            score = evaluate(net, data, ["final"], changed, machine)["final"]
            results[name].append(dict(miou=score["miou"]) | measures.sparsity(net, changed))
    return results


def entropy_rows(rows, cfg, train, machine):
    """Tables 8, 9, Fig. 6: without the entropy loss groups are trained anew, on the same stage 1."""
    folders = dict(on="scaleprotoseg", off="entropy-off")

    def train_groups(row_cfg, machine):
        return train(replace(row_cfg, stage1=row_cfg.out.replace(folders["off"], folders["on"])), machine)

    on = train_rows({"on": rows["on"]}, cfg, train, machine, folders.get)
    off = train_rows({"off": rows["off"]}, cfg, train_groups, machine, folders.get)
    if machine.rank == 0:
        runs = {name: load_run(next(row_configs(name, OURS, cfg, folders.get)), machine.device)
                for name in ("off", "on")}
        gallery.draw_entropy(Path(cfg.out) / "entropy.png", runs)
    return off | on


def main(cfg):
    """Returns what the task returns, for use from Python."""
    check_config(cfg)
    machine = run.setup(cfg.device, cfg.seed)
    torch.backends.cudnn.benchmark = False                           # train_phase switches it on
    if cfg.table:
        return run_table(cfg, machine)
    if cfg.eval_only:
        sets = open_sets(cfg)
        net, progress = load_network(cfg, machine.device, sets["test"].classes)
        return report(net, cfg, sets, progress, machine)
    if not (cfg.predict or cfg.explain or cfg.failure):
        return train(cfg, machine)
    if machine.rank:
        return None
    if cfg.predict:
        return predict(cfg, machine.device)
    d = load_run(cfg, machine.device)
    if cfg.failure:
        return gallery.draw_failures(d)
    return gallery.explain(d, load_baseline(d) if cfg.baseline else None)


if __name__ == "__main__":                                           # worker processes import this file
    run.run_script(main, Config, PRESETS, __doc__)
