"""ProtoPool: class slots filled from one shared pool of part prototypes, in one file.

Paper  D. Rymarczyk, L. Struski, M. Gorszczak, K. Lewandowska, J. Tabor, B. Zielinski, "Interpretable image
       classification with differentiable prototypes assignment", ECCV 2022. "Supp." is its supplement.
Idea   A logit is the sum of the K slots of its class. A slot is a distribution over M prototypes that all
       classes share; Gumbel-softmax turns it into a choice of one. A prototype scores by how much its best
       patch stands out from the rest of the image (focal similarity), and it ends as a patch of a training
       image: this looks like that.

Try    python protopool.py                                         # toy birds, under two minutes on a CPU
Train  python protopool.py --preset cub-r50-inat --data CUB_200_2011 --weights BBN_CHECKPOINT.pth
       torchrun --nproc-per-node 4 protopool.py --preset cars-r34 --data stanford_cars
Look   python protopool.py --explain bird.jpg --out runs/protopool-toy   # what made it that class (Fig. 6)
       python protopool.py --table 4                               # the paper's ablation, on toy birds

symbol   here                shape      meaning                                                paper
f        features()          B,D,h,w    backbone and 1x1 add-on layer                          Sec. 3
p_i      prototypes          M,D        the pool                                               Sec. 3
q        q                   C,K,M      logits of the slots' distributions                     Sec. 3
y        assignment          C,K,M      Gumbel-softmax of q; it is the q_k of Eq. (2)          Supp. 8
tau      temperature()       scalar     1, then 1 / sqrt(3.4e4 epoch), 0.001 from epoch 30     Supp. 8
eta      noise               C,K,M      standard Gumbel samples, one table a batch             Sec. 3
g_p(z)   log_similarity()    B,M,h,w    log((d2 + 1) / (d2 + eps)), d2 = |z - p|^2             footnote 5
g_p      focal_similarity()  B,M        maximum over cells - mean over cells                   Eq. (1)
g_k      slot_similarity()   B,C,K      sum_i y_k^i g_pi                                       Sec. 3
w_h      last_layer.weight   C,C*K      1 from own slots, else 0, until it is fine-tuned       Supp. 8
p <- z   project_prototypes  M,D        the nearest patch of the classes that hold it          Eq. (3)
L_orth   orthogonality_loss  scalar     slots of a class take different prototypes             Eq. (2)
L_clst   cluster_cost        scalar     an own prototype is near                               Supp. 8
L_sep    separation_cost     scalar     the others are far (its weight is negative)            Supp. 8
L_l1     in finetune()       scalar     L1 norm of w_h off the own slots, after projection     Supp. 8

Where the print is silent, contradicts itself, or differs from the authors' released code ([D*] marks the
line). The code produced the published numbers: --reading official takes its side in D1 to D10 and D15 and
projects the last weights [D12]; with --select-on-test it also stops as the code does.
[D1] The paper mixes the prototypes' similarities by y; the code mixes distances and takes logarithms last.
[D2] Eq. (1) subtracts the mean similarity; the code the similarity of the mean distance.
[D3] Supp. 8 prints softmax(q / tau + eta); the code has softmax(2 (q / tau + eta)), with another tau.
[D4] Eq. (2) is about distributions; the code puts in the logits q, and the sum over all pairs i != j.
[D5] At test time the paper takes y > 0.5 as 1, so that a slot may stay empty; the code takes y at tau = 1e-4,
     in effect the largest q. We take the final tau of 0.001 and no noise, in validation and without
     Gumbel-softmax too (softmax(q) itself would leave most slots empty).
[D6] Table 6 halves the learning rates every 5 epochs; the code divides them by 10.
[D7] Table 6 fine-tunes for 15 epochs at 1e-4; the code for 25 at 5e-5, x0.95 every 5, with decay and mix-up.
     The paper does not say on what: we take the clean images, whose similarities are computed once.
[D8] Supp. 8 has Xavier normal for all but the last layer; the code draws the add-on layer by Kaiming and the
     prototypes uniformly from [0, 1).
[D9] Table 5 reads as one chain with vertical flips; ProtoPNet's data preparation, which the code uses, applies
     one of the three warps and flips left-right only. It stores 30 copies an image, hence --passes-per-epoch.
     Skew "< 45 degrees" is a tilt that changes a side by up to a fifth.
[D10] Table 6 has 10 epochs of warm-up without decay; the code trains 9, and decays the add-on layer.
[D11] Table 6 decays the "prototypical pool" too; the code leaves prototypes and q alone, and so do we in both
     readings: a q whose softmax is saturated has no other gradient, and Adam would walk it to 0 in full steps.
[D12] Early stopping looks at the cross-entropy of a validation split of the training images, whose accuracy is
     too coarse where it is small; the code looks at loss and accuracy of the test split. Projected are the best
     weights; in the code the last.
[D13] A sigmoid follows the 1x1 convolution, as in the code and in ProtoPNet; the paper names the convolution.
[D14] The text starts at tau = 1, the formula at infinity: tau = 1 in epoch 0.
[D15] Mix-up "50% : 50%" is Beta(0.5, 0.5), as in the code. Both images enter L_clst and L_sep with their
     shares; in the code the first only.
[D16] Batch norm stays in eval mode while the backbone is frozen; the code lets its statistics drift.
[D17] Prototypes in nobody's slot are pruned at the projection; the code overwrites them with zeros.
[D18] Toy birds have no pretrained backbone: --pretrain-epochs trains it as a plain classifier first.
[D19] CUB is cut to its bounding boxes, test images too, as in ProtoPNet's preparation. Cars are read whole:
     neither paper nor code says.
"""

import math
import os
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import default_collate
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

from common import figures, files, images, loaders, metrics, run, transforms
from common.backbones import EXTRACTORS, build_extractor
from common.run import RunConfig, UserError, opt


# ---- options and recipes -----------------------------------------------------------------------------------

@dataclass
class Config(RunConfig):
    dataset: str = opt("toy_birds", "reader of --data", choices=images.DATASETS)
    full_images: bool = opt(False, "cub: whole pictures, not cut to their bounding boxes [D19]")
    val_fraction: float = opt(0.1, "share of every class's training images kept for early stopping")
    select_on_test: bool = opt(False, "stop and choose on the test split, as the authors did; optimistic")
    backbone: str = opt("resnet34", "network before the 1x1 add-on layer", choices=EXTRACTORS)
    weights: str = opt("imagenet", "of the backbone: imagenet (torchvision downloads them), a file, a URL, or "
                       "none", runtime=True)
    size: int = opt(224, "images are resized to size x size")
    classifier: str = opt("protopool", "linear = an ordinary linear layer on the same backbone, same budget",
                          choices=("protopool", "linear"))
    reading: str = opt("paper", "official = the released code where it differs, [D*] at the top of the file",
                       choices=("paper", "official"))
    prototypes: int = opt(202, "M, size of the pool; those in no slot are pruned at the projection")
    slots: int = opt(10, "K, slots of a class")
    depth: int = opt(256, "D, channels of features and prototypes")
    gumbel: bool = opt(True, "off = plain softmax in training (Table 4)")
    focal: bool = opt(True, "off = maximum alone, as in ProtoPNet (Table 4)")
    w_cluster: float = opt(0.8, "weight of L_clst")
    w_separation: float = opt(-0.08, "weight of L_sep, negative")
    w_orth: float = opt(1.0, "weight of L_orth")
    w_l1: float = opt(1e-4, "weight of the L1 norm of the last layer's off-class weights")
    batch_size: int = opt(80, "images an iteration, over all GPUs; halve it if memory runs out, and rates too")
    passes_per_epoch: int = opt(30, "passes over the training images that make an epoch [D9]: schedule, "
                                "temperature and early stopping count in epochs")
    pretrain_epochs: int = opt(0, "epochs as a plain classifier before all else [D18]", schedule=True)
    warmup_epochs: int = opt(None, "epochs with a frozen backbone (default 10; official 9)", schedule=True)
    joint_epochs: int = opt(60, "epochs of the joint phase at most; early stopping comes first", schedule=True)
    patience: int = opt(12, "the joint phase stops after so many epochs without a lower validation loss")
    finetune_epochs: int = opt(None, "epochs of the last layer alone (default 15; official 25)", schedule=True)
    lr: float = opt(1.5e-3, "Adam learning rate of add-on layer and prototypes")
    slot_lr: float = opt(1.5e-3, "learning rate of q; the paper's 2,247 steps at tau = 1 move q by 3: raise it "
                         "where an epoch has few steps, or the slots freeze before they have learned anything")
    backbone_lr: float = opt(5e-5, "learning rate of the backbone in the joint phase")
    weight_decay: float = opt(1e-3, "of backbone and add-on layer in the joint phase [D11]")
    add_on_decay: float = opt(None, "of the add-on layer in both phases (default: none in the warm-up [D10], "
                              "then --weight-decay); some hundred images want 0.03, or it learns them by heart")
    lr_step: int = opt(5, "joint epochs between two cuts of the learning rates")
    lr_gamma: float = opt(None, "factor of a cut (default 0.5; official 0.1)")
    finetune_lr: float = opt(None, "learning rate of the last layer (default 1e-4; official 5e-5)")
    augment: str = opt(None, "chain = all of Table 5, single = one of its warps, flip = left-right only "
                       "(default chain; official single)", choices=("chain", "single", "flip", "none"))
    mixup: bool = opt(True, "mix-up in training (Table 5)")
    finetune_mixup: bool = opt(None, "mix-up in fine-tuning too, which makes it run through the whole network "
                               "(default no; official yes)")
    eval_only: bool = opt(False, "evaluate and draw the run in OUT again and stop", runtime=True, uses_run=True)
    explain: str = opt("", "image or folder, cut out as the training images are: explain the predictions of the "
                       "run in OUT (Fig. 6) and stop", runtime=True, uses_run=True)
    compare: list = opt((), "two class names: draw what they share in the run in OUT (Fig. 1) and stop",
                        runtime=True, uses_run=True)
    ensemble: list = opt((), "run folders: accuracy of the mean of their probabilities, into OUT/ensemble/",
                         runtime=True)
    table: str = opt("", "train every row of Table 3 or 4 or of Fig. 11a or 11b on the chosen preset",
                     runtime=True, choices=("", "3", "4", "11a", "11b"))

    def __post_init__(self):
        """What was not given comes from the reading."""
        for name, value in READINGS[self.reading].items():
            if getattr(self, name) is None:
                setattr(self, name, value)


READINGS = {                                                         # [D6] [D7] [D9] [D10]
    "paper": dict(warmup_epochs=10, finetune_epochs=15, finetune_lr=1e-4, lr_gamma=0.5, augment="chain",
                  finetune_mixup=False),
    "official": dict(warmup_epochs=9, finetune_epochs=25, finetune_lr=5e-5, lr_gamma=0.1, augment="single",
                     finetune_mixup=True),
}
CUB = dict(dataset="cub", prototypes=202, depth=256)                 # Sec. 4, Supp. 8
CARS = dict(dataset="cars", prototypes=195, depth=128)
PRESETS = {
    "toy": dict(backbone="tiny", weights="none", size=96, prototypes=30, slots=5, depth=64, batch_size=40,
                passes_per_epoch=4, pretrain_epochs=4, warmup_epochs=3, joint_epochs=8, finetune_epochs=10,
                slot_lr=0.02, backbone_lr=5e-4, augment="flip", mixup=False, workers=0),           # ours
    "cub-small": CUB | dict(backbone="mobilenet_v2", prototypes=40, depth=128, batch_size=20, passes_per_epoch=4,
                            warmup_epochs=8, joint_epochs=4, lr=5e-4, slot_lr=0.02, backbone_lr=1e-4,
                            add_on_decay=0.03, w_cluster=0.1, w_separation=-0.01, augment="single",
                            mixup=False),                            # ours: 20 classes or so, a CPU or small GPU
    "cub-r34": CUB,
    "cub-r50-inat": CUB | dict(backbone="resnet50_inat"),            # --weights: the BBN checkpoint
    "cub-r152": CUB | dict(backbone="resnet152"),
    "cub-d121": CUB | dict(backbone="densenet121"),
    "cub-d161": CUB | dict(backbone="densenet161"),
    "cars-r34": CARS,
    "cars-r50": CARS | dict(backbone="resnet50"),
    "cars-d121": CARS | dict(backbone="densenet121", prototypes=202),              # as printed in Table 7
}
PHASES = ("start", "pretrain", "warmup", "joint", "project", "finetune")           # in this order: train()


def check_config(cfg):
    """UserError for a setting that cannot work, before anything is read or written."""
    for name in ("batch_size", "size", "prototypes", "slots", "depth", "passes_per_epoch", "patience", "lr",
                 "slot_lr", "backbone_lr", "lr_step", "lr_gamma", "finetune_lr"):
        if getattr(cfg, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be above 0.")
    for name in ("weight_decay", "add_on_decay", "workers", "pretrain_epochs", "warmup_epochs", "joint_epochs",
                 "finetune_epochs", "w_cluster", "w_orth", "w_l1"):
        if (getattr(cfg, name) or 0) < 0:                            # --add-on-decay may be None
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must not be negative.")
    if cfg.size < 32:
        raise UserError(f"--size {cfg.size}: must be 32 at least, or the backbones leave no feature map.")
    if cfg.w_separation > 0:
        raise UserError(f"--w-separation {cfg.w_separation}: must not be positive, or the prototypes of other "
                        "classes are drawn near; the paper has -0.08.")
    if cfg.slots > cfg.prototypes:
        raise UserError(f"--slots {cfg.slots} with --prototypes {cfg.prototypes}: a class cannot hold more "
                        "prototypes than the pool has; raise --prototypes or lower --slots.")
    if cfg.compare and len(cfg.compare) != 2:
        raise UserError(f"--compare {' '.join(cfg.compare)}: give two class names, quoted if they hold blanks.")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if cfg.batch_size % world:
        raise UserError(f"--batch-size {cfg.batch_size} for {world} processes: choose a multiple of {world}.")


# ---- slots: which class holds which prototype (Sec. 3, Supp. 8) ----------------------------------------------

def temperature(epoch, reading="paper"):
    """tau of Supp. 8: 1 at epoch 0 [D14], 1 / sqrt(3.4e4 epoch) below epoch 30, then 0.001.

    official [D3]: 0.001 / sqrt(min(epoch, 30) / 30), infinity at epoch 0.
    """
    if reading == "official":
        return 0.001 / math.sqrt(min(epoch, 30) / 30) if epoch else math.inf
    return 1.0 if epoch == 0 else 1 / math.sqrt(3.4e4 * epoch) if epoch < 30 else 0.001


def gumbel_noise(q):
    """Standard Gumbel samples in the shape of q: -log of exponential samples (0 would give infinity)."""
    return -torch.empty_like(q).exponential_().clamp_min(1e-30).log()


def assign(q, tau, noise=None, reading="paper"):
    """Distribution of every slot, softmax(q / tau + noise) over the M prototypes. (C,K,M) -> (C,K,M).

    Supp. 8: tau does not divide the noise, so that the noise loses its influence as tau falls.
    official [D3]: softmax(2 (q / tau + noise)), and softmax(q) without noise at tau = infinity.
    """
    if reading == "official" and math.isinf(tau):
        return q.softmax(-1)
    logits = q / tau if noise is None else q / tau + noise
    return (logits * 2 if reading == "official" else logits).softmax(-1)


def harden(assignment):
    """Sec. 4: entries above 0.5 become 1, others 0; a slot that has no such entry stays empty. Any shape."""
    return (assignment > 0.5).to(assignment.dtype)


# ---- similarity of an image to the prototypes (Sec. 3) ------------------------------------------------------

def squared_distances(features, prototypes):
    """d2[b,m,h,w] = |features[b,:,h,w] - prototypes[m]|^2: (B,D,H,W), (M,D) -> (B,M,H,W) float32.

    Expanded, so that no (B,M,D,H,W) exists. Float32 also under autocast, and a matrix product, for which torch
    leaves TF32 off (cuDNN's convolutions have it on): near d2 = 0 the logarithm feels errors of eps = 1e-4. At
    D = 256 a prototype that is a patch scores 9.2; errors of TF32 (1e-2) or bfloat16 (0.1) make that 4 or 2.5.
    """
    with torch.autocast(features.device.type, enabled=False):
        z, p = features.float().flatten(2), prototypes.float()       # (B,D,H*W), (M,D)
        d2 = (z * z).sum(1, keepdim=True) - 2 * (p @ z) + (p * p).sum(1)[:, None]            # (B,M,H*W)
        return d2.clamp_min(0).unflatten(2, features.shape[2:])


def log_similarity(d2, eps=1e-4):
    """g_p(z) of footnote 5: log((d2 + 1) / (d2 + eps)), from 9.21 at d2 = 0 down to 0. Same shape."""
    return torch.log((d2 + 1) / (d2 + eps))


def focal_similarity(d2, focal=True):
    """Eq. (1): g_p = max - mean of g_p(z) over the cells. (B,M,H,W) -> (B,M). focal=False: max alone."""
    similarity = log_similarity(d2).flatten(2)                       # (B,M,H*W)
    return similarity.amax(2) - similarity.mean(2) if focal else similarity.amax(2)


def slot_similarity(d2, assignment, reading="paper", focal=True):
    """g_k = sum_i y_k^i g_pi of every slot. (B,M,H,W), (C,K,M) -> (B,C,K).

    official: y mixes nearest and mean distances [D1], and the logarithms come last [D2].
    """
    y = assignment.flatten(0, 1).T                                   # (M,C*K)
    if reading == "official":
        cells = d2.flatten(2)
        nearest, mean = log_similarity(torch.stack([cells.amin(2), cells.mean(2)]) @ y)      # (B,C*K) each
        slots = nearest - mean if focal else nearest
    else:
        slots = focal_similarity(d2, focal) @ y                      # (B,C*K)
    return slots.unflatten(1, assignment.shape[:2])


# ---- losses (Sec. 3, Supp. 8) -------------------------------------------------------------------------------

def orthogonality_loss(x, reading="paper"):
    """Eq. (2): cosines of a class's slots, summed over pairs i < j and classes, / (C K). (C,K,M) -> scalar.

    Over all i, j the sum is |sum_k x_k / |x_k||^2: no K x K matrix. official [D4]: pairs i != j of logits x.
    """
    unit, slots = F.normalize(x, dim=2), x.shape[:2].numel()
    all_pairs = unit.sum(1).square().sum()                           # i = j included
    if reading == "official":
        return all_pairs / slots - 1
    return (all_pairs - unit.square().sum()) / 2 / slots


def own_prototypes(assignment):
    """(C,M) bool: the K prototypes of each class with the largest assignment summed over its slots."""
    held = assignment.detach().sum(1)                                # (C,M)
    return torch.zeros_like(held, dtype=torch.bool).scatter_(1, held.topk(assignment.shape[1]).indices, True)


def cluster_cost(min_d2, labels, assignment):
    """L_clst: squared distance of the nearest patch to the nearest own prototype, mean over the batch.

    min_d2 (B,M): minimum over the cells; labels (B,). No gradient reaches the assignment. As in ProtoPNet.
    """
    own = own_prototypes(assignment)[labels]                         # (B,M)
    return min_d2.masked_fill(~own, math.inf).amin(1).mean()


def separation_cost(min_d2, labels, assignment):
    """L_sep: the same for the nearest of the other prototypes. Positive: its weight is negative. 0 if K = M."""
    if assignment.shape[1] == assignment.shape[2]:
        return 0 * min_d2.sum()
    own = own_prototypes(assignment)[labels]                         # (B,M)
    return min_d2.masked_fill(own, math.inf).amin(1).mean()


# ---- model (Sec. 3, Fig. 3) ---------------------------------------------------------------------------------

class Classifier(nn.Module):
    """What ProtoPool and the plain baseline have in common: a backbone that can be frozen."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.frozen = backbone, False

    def train(self, mode=True):
        super().train(mode)
        self.backbone.train(mode and not self.frozen)                # [D16]
        return self


class PlainClassifier(Classifier):
    """Mean over the cells, linear layer. Returns logits (B,C) and, in the place of ProtoPool's others, None."""

    def __init__(self, backbone, num_classes):
        super().__init__(backbone)
        self.last_layer = nn.Linear(backbone.channels, num_classes)

    def forward(self, x, tau=None):
        return self.last_layer(self.backbone(x).mean((2, 3))), None, None


class ProtoPool(Classifier):
    """Images (B,3,H,W) -> logits (B,C), squared distance of the nearest patch (B,M), assignment (C,K,M).

    With tau: slots sampled for training, one table for the whole batch. Without: the hard slots of test time.
    """

    def __init__(self, backbone, num_classes, num_prototypes, slots, depth, reading="paper", gumbel=True,
                 focal=True):
        super().__init__(backbone)
        self.reading, self.gumbel, self.focal = reading, gumbel, focal
        self.add_on_layers = nn.Sequential(nn.Conv2d(backbone.channels, depth, 1), nn.Sigmoid())   # [D13]
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, depth))                         # p_i
        self.q = nn.Parameter(torch.empty(num_classes, slots, num_prototypes))
        self.register_buffer("fixed", torch.tensor(False))           # True: q is the 0/1 table of fix_slots
        self.last_layer = nn.Linear(num_classes * slots, num_classes, bias=False)                  # h
        nn.init.zeros_(self.add_on_layers[0].bias)
        fan_in, fan_out = num_prototypes * slots, num_classes * slots
        nn.init.normal_(self.q, std=math.sqrt(2 / (fan_in + fan_out)))                             # Xavier
        if reading == "official":                                                                  # [D8]
            nn.init.kaiming_normal_(self.add_on_layers[0].weight, mode="fan_out", nonlinearity="relu")
            nn.init.uniform_(self.prototypes)
        else:
            nn.init.xavier_normal_(self.add_on_layers[0].weight)
            nn.init.xavier_normal_(self.prototypes)
        self.last_layer.weight.data.copy_(self.own_slots())

    def own_slots(self):
        """(C,C*K): 1 where the slot belongs to the class."""
        num_classes, slots, _ = self.q.shape
        return torch.eye(num_classes, device=self.q.device).repeat_interleave(slots, dim=1)

    def features(self, x):
        """(B,3,H,W) -> (B,D,h,w), in (0, 1)."""
        return self.add_on_layers(self.backbone(x))

    def soft_assignment(self, tau, noise=None):
        """(C,K,M) in training: Gumbel-softmax, or plain softmax in the ablation of Table 4."""
        return assign(self.q, tau, noise, self.reading) if self.gumbel else self.q.softmax(-1)

    def hard_assignment(self):
        """(C,K,M) of 0/1 at test time [D5]."""
        if self.reading == "official":
            hard = F.one_hot(self.q.argmax(-1), self.q.shape[2]).to(self.q.dtype)
        else:
            hard = harden(assign(self.q, temperature(30)))
        return torch.where(self.fixed, self.q, hard)

    def slots(self, d2, tau=None):
        """(B,M,h,w) -> similarities of all slots (B,C*K), and the assignment that mixed them (C,K,M)."""
        y = self.hard_assignment() if tau is None else self.soft_assignment(tau, gumbel_noise(self.q))
        return slot_similarity(d2, y, self.reading, self.focal).flatten(1), y

    def forward(self, x, tau=None):
        z = self.features(x)                                         # (B,D,h,w), perhaps bfloat16
        with torch.autocast(x.device.type, enabled=False):           # float32: see squared_distances
            d2 = squared_distances(z, self.prototypes)               # (B,M,h,w)
            slots, y = self.slots(d2, tau)
            return self.last_layer(slots), d2.flatten(2).amin(2), y

    @torch.no_grad()
    def fix_slots(self):
        """Make the hard assignment permanent and prune the prototypes that no class holds [D17]; how many."""
        hard = self.hard_assignment()
        alive = hard.flatten(0, 1).any(0)                            # (M,)
        if not alive.any():
            raise UserError("every slot is empty after training, so there is nothing to project: train longer, "
                            "or raise --slot-lr.")
        self.prototypes, self.q = nn.Parameter(self.prototypes[alive]), nn.Parameter(hard[..., alive])
        self.fixed.fill_(True)
        return int((~alive).sum())


# ---- augmentation and mix-up (Table 5) ----------------------------------------------------------------------

def augment(image, kind):
    """Table 5 as a single projective warp, cut so that no border shows. uint8 (3,S,S) -> uint8 (3,S,S).

    chain: rotation +-15 degrees, skew (probability 1/2), shear +-10 degrees, both flips (1/2 each).
    single: one of the three warps, left-right flip [D9]. flip: left-right flip. none: the image.
    """
    if kind == "none":
        return image
    flips = torch.tensor([1 - 2 * transforms.coin(),                 # along x
                          1 - 2 * (transforms.coin() and kind == "chain")])              # along y
    matrix = torch.eye(3)                                            # output -> input, coordinates in [-1, 1]
    if kind != "flip":
        angle = math.radians(transforms.uniform(-15, 15))
        c, s, k = math.cos(angle), math.sin(angle), math.tan(math.radians(transforms.uniform(-10, 10)))
        rotation = torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]])
        shear = torch.tensor([[1, k, 0], [0, 1, 0], [0, 0, 1]])
        shear = shear.T if transforms.coin() else shear              # along x or along y
        skew = torch.eye(3)
        skew[2, :2] = torch.rand(2) * 0.4 - 0.2                      # the plane tilts
        if kind == "chain":
            matrix = rotation @ (skew if transforms.coin() else matrix) @ shear
        else:
            matrix = (rotation, skew, shear)[torch.randint(3, ()).item()]
    line = torch.linspace(-1, 1, image.shape[-1])
    y, x = torch.meshgrid(line, line, indexing="ij")
    grid = torch.stack([x, y, torch.ones_like(x)], -1) @ matrix.T    # (S,S,3)
    grid = grid[..., :2] / grid[..., 2:]
    corners = grid[[0, 0, -1, -1], [0, -1, 0, -1]].abs().max()
    grid = flips * grid / corners.clamp(min=1)                       # zooms in until they are inside
    return F.grid_sample(image[None].float(), grid[None], align_corners=True)[0].round().to(torch.uint8)


def mix(x, labels, alpha=0.5):
    """Mix-up [D15]: lam x + (1 - lam) x[order], lam ~ Beta(alpha, alpha). -> x, the others' labels, lam."""
    lam = torch.distributions.Beta(alpha, alpha).sample().item()     # drawn on the CPU: no synchronisation
    order = torch.randperm(len(x), device=x.device)
    return lam * x + (1 - lam) * x[order], labels[order], lam


# ---- a training step ----------------------------------------------------------------------------------------

def losses_of(model, x, labels, tau, cfg):
    """The weighted terms of the loss (Supp. 8) for x (B,3,S,S), labels (B,): dict of scalars to be summed."""
    x, others, lam = mix(x, labels) if cfg.mixup else (x, labels, 1.0)
    with run.autocast(x.device, cfg.amp):
        logits, min_d2, y = model(x, tau)

    def mixed(cost):
        return lam * cost(labels) + (1 - lam) * cost(others) if cfg.mixup else cost(labels)

    losses = dict(ce=mixed(lambda target: F.cross_entropy(logits, target)))
    if y is not None:
        official = cfg.reading == "official"
        both = (lambda cost: cost(labels)) if official else mixed    # [D15]
        losses["cluster"] = cfg.w_cluster * both(lambda target: cluster_cost(min_d2, target, y))
        losses["separation"] = cfg.w_separation * both(lambda target: separation_cost(min_d2, target, y))
        slots = getattr(model, "module", model).q if official else y                                   # [D4]
        losses["orth"] = cfg.w_orth * orthogonality_loss(slots, cfg.reading)
    return losses


def train_step(model, optimizer, x, labels, tau, cfg):
    """One iteration; returns the terms of the loss, detached, on the device."""
    losses = losses_of(model, x, labels, tau, cfg)
    optimizer.zero_grad(set_to_none=True)
    sum(losses.values()).backward()
    optimizer.step()
    return {name: value.detach() for name, value in losses.items()}


def build_optimizer(net, phase, cfg, device):
    """Adam, and its scheduler with one step an epoch, for pretrain, warmup and joint: Table 6."""
    if isinstance(net, ProtoPool):
        parts = {"backbone": net.backbone, "add_on": net.add_on_layers}
        pool = [dict(params=[net.prototypes], lr=cfg.lr), dict(params=[net.q], lr=cfg.slot_lr)]        # [D11]
    else:
        parts, pool = {"backbone": net.backbone, "add_on": net.last_layer}, []
    rates = {"backbone": cfg.backbone_lr if phase == "joint" else cfg.lr, "add_on": cfg.lr}
    decays = dict.fromkeys(parts, cfg.weight_decay if phase == "joint" else 0.0)
    if phase == "warmup":
        del parts["backbone"]
        decays["add_on"] = cfg.weight_decay if cfg.reading == "official" else 0.0                      # [D10]
    if pool and cfg.add_on_decay is not None:
        decays["add_on"] = cfg.add_on_decay
    groups = pool + [dict(params=part.parameters(), lr=rates[name], weight_decay=decays[name])
                     for name, part in parts.items()]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.999), fused=device.type == "cuda")
    gamma = cfg.lr_gamma if phase == "joint" else 1.0                # [D6]
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, cfg.lr_step, gamma)


# ---- phases (Table 6) ---------------------------------------------------------------------------------------

def to_device(batch, device):
    cuda = device.type == "cuda"                                     # only there are batches in pinned memory
    x = batch[0].to(device, non_blocking=cuda, memory_format=torch.channels_last)
    return x, batch[1].to(device, non_blocking=cuda)


def open_sets(cfg):
    """{"train", "val", "test"}. Val is taken from the training images unless --select-on-test [D12]."""
    splits = ("train", "test") if cfg.select_on_test else ("train", "val", "test")
    fraction = 0.0 if cfg.select_on_test else cfg.val_fraction
    sets = {split: images.open_images(cfg.dataset, cfg.data, split, cfg.seed, fraction, cfg.full_images)
            for split in splits}
    if sets["train"].num_classes < 2:
        raise UserError(f"{cfg.dataset} in {cfg.data} has a single class: a classifier needs two or more.")
    return {"val": sets["test"]} | sets


def clean_loader(data, cfg, device, rank=0, world=1):
    """Images in order, not augmented: for evaluation, projection, cached fine-tuning."""
    view = images.CleanView(data, cfg.size)
    return images.eval_loader(view, cfg.batch_size, cfg.workers, device, rank, world)


def training_view(data, cfg):
    return images.TrainView(data, cfg.size, partial(augment, kind=cfg.augment))


def training_batches(data, start, stop, cfg, device, rank, world):
    """Iterator over the augmented batches of the iterations start..stop-1, on the device."""
    loader = loaders.train_loader(training_view(data, cfg), cfg.batch_size, cfg.seed, start, stop,
                                  cfg.workers, device, rank, world)
    return (to_device(batch, device) for batch in loader)


def steps_per_epoch(data, cfg):
    return max(1, cfg.passes_per_epoch * len(data) // cfg.batch_size)


def temperature_of(phase, epoch, cfg):
    """Temperature of an epoch; they count from the start of the warm-up (official: from 1 [D10])."""
    first = (cfg.warmup_epochs if phase == "joint" else 0) + (cfg.reading == "official")
    return temperature(first + epoch, cfg.reading)


def train_phase(net, phase, sets, progress, cfg, device, rank, world):
    """pretrain, warmup or joint, with evaluation and checkpoint after every epoch; starts where progress says.

    joint stops after cfg.patience epochs without a lower loss on val, and leaves the best weights in net [D12].
    """
    if PHASES.index(progress["phase"]) > PHASES.index(phase):
        return
    out, epochs, steps = Path(cfg.out), getattr(cfg, f"{phase}_epochs"), steps_per_epoch(sets["train"], cfg)
    net.frozen = phase == "warmup"
    net.requires_grad_(True)
    net.backbone.requires_grad_(not net.frozen)
    if isinstance(net, ProtoPool):
        net.last_layer.requires_grad_(False)                         # fixed until it is fine-tuned
    model = run.distribute(net, device, world)
    optimizer, scheduler = build_optimizer(net, phase, cfg, device)
    parts = dict(model=net, optimizer=optimizer, scheduler=scheduler)
    if progress["phase"] == phase:
        run.load_checkpoint(out / "last.pt", parts, device)
    else:
        progress |= dict(phase=phase, epoch=0, stale=0, best=math.inf)
    start = progress["iteration"]
    stop = start + (epochs - progress["epoch"]) * steps
    batches = training_batches(sets["train"], start, stop, cfg, device, rank, world)
    val_loader = clean_loader(sets["val"], cfg, device, rank, world)
    began = time.perf_counter() - progress["seconds"]
    while progress["epoch"] < epochs and progress["stale"] < cfg.patience:
        tau, sums = temperature_of(phase, progress["epoch"], cfg), {}
        model.train()
        for _ in tqdm(range(steps), desc=phase, leave=False, disable=True if rank else None):
            for name, value in train_step(model, optimizer, *next(batches), tau, cfg).items():
                sums[name] = sums.get(name, 0.0) + value             # stays on the device: no sync per step
        run.share_buffers(net)
        score, rate = evaluate(net, val_loader, device), scheduler.get_last_lr()[-1]
        scheduler.step()
        if isinstance(net, ProtoPool):
            progress["slot"].append(net.soft_assignment(tau)[0, 0].tolist())                           # Fig. 5
        if phase == "joint":
            progress["stale"] = 0 if score["ce"] < progress["best"] else progress["stale"] + 1
            if progress["stale"] == 0:
                progress["best"] = score["ce"]
                run.save_checkpoint(out / "best.pt", dict(model=net), {})
        end_epoch(progress, phase, steps, sums, score, rate, began, parts, out, rank)
    if phase == "joint" and progress["epoch"] and cfg.reading == "paper":                              # [D12]
        run.load_checkpoint(out / "best.pt", dict(model=net), device)


def end_epoch(progress, phase, steps, sums, score, rate, began, parts, out, rank):
    """Progress, log.csv, a printed line, last.pt. UserError if a loss is not finite (rank 0 logs its own)."""
    means = {name: float(value) / steps for name, value in sums.items()}
    if not all(map(math.isfinite, means.values())):
        raise UserError(f"the loss is not finite ({means}) in epoch {progress['epoch'] + 1} of phase {phase}: "
                        "start again with a lower --lr or --slot-lr, or with --amp off.")
    progress |= dict(epoch=progress["epoch"] + 1, iteration=progress["iteration"] + steps,
                     seconds=time.perf_counter() - began)
    row = dict(phase=phase, epoch=progress["epoch"], lr=rate)
    row |= dict(val_accuracy=score["accuracy"], val_ce=score["ce"])
    row |= {name: means.get(name, "") for name in ("ce", "cluster", "separation", "orth", "l1")}
    progress["log"].append(row | dict(seconds=progress["seconds"]))
    if rank == 0:
        run.write_csv(out / "log.csv", progress["log"])
        tqdm.write(f"{phase} {progress['epoch']}: " + ", ".join(f"{k} {v:.3f}" for k, v in means.items())
                   + f", val accuracy {score['accuracy']:.1f}, {run.duration(progress['seconds'])}")
    run.save_checkpoint(out / "last.pt", parts, progress)


class Source(NamedTuple):
    """Where a projected prototype comes from: cell (row, column) of the feature map of a training image."""
    image: int                                                       # its number in the training split
    row: int
    column: int
    distance: float                                                  # squared, from the prototype before


@torch.no_grad()
def project_prototypes(model, loader, device):
    """Eq. (3): every prototype becomes the nearest patch in the training images of the classes that hold it.

    loader: (x (B,3,S,S), labels (B,)), in order, not augmented; one pass. All distances are to the old
    prototypes, which move after the last image; of equal ones the first wins. Returns a Source for each of the
    M; a prototype that no class holds stays as it is: Source(-1, -1, -1, inf).
    """
    model.eval()
    held = model.hard_assignment().amax(1) > 0.5                     # (C,M)
    moved = model.prototypes.clone()                                 # (M,D)
    best = torch.full((len(moved),), math.inf, device=device)
    where = torch.full((len(moved), 3), -1, device=device)           # image, row, column
    seen = 0
    for x, labels in loader:
        z = model.features(x.to(device)).float()                     # (B,D,h,w)
        d2 = squared_distances(z, model.prototypes)                  # (B,M,h,w)
        d2 = d2.masked_fill(~held[labels.to(device)][..., None, None], math.inf)
        nearest, cell = d2.transpose(0, 1).flatten(1).min(1)         # (M,) over images and cells
        b, row, column = torch.unravel_index(cell, (len(x), *d2.shape[2:]))
        closer = nearest < best
        best = torch.where(closer, nearest, best)
        moved = torch.where(closer[:, None], z[b, :, row, column], moved)
        where = torch.where(closer[:, None], torch.stack([b + seen, row, column], 1), where)
        seen += len(x)
    model.prototypes.copy_(moved)
    return [Source(*place, distance) for place, distance in zip(where.tolist(), best.tolist())]


def project(net, sets, progress, cfg, device, rank):
    """Fix the slots, prune, project; what the report needs goes into progress. All ranks end with rank 0's."""
    if PHASES.index(progress["phase"]) >= PHASES.index("project"):
        if progress["phase"] == "project":
            run.load_checkpoint(Path(cfg.out) / "last.pt", dict(model=net), device)
        return
    start, tau = time.perf_counter(), temperature_of("joint", max(progress["epoch"] - 1, 0), cfg)
    soft = net.soft_assignment(tau).detach().cpu()                   # of the weights that are projected
    pruned, before = net.fix_slots(), net.prototypes.detach().cpu().clone()
    sources = project_prototypes(net, clean_loader(sets["train"], cfg, device), device)
    if dist.is_initialized():
        dist.broadcast(net.prototypes.data, 0)                       # near ties may differ between GPUs
    progress |= dict(phase="project", epoch=0, soft=soft, pruned=pruned, prototypes_before=before,
                     num_prototypes=len(sources), sources=[list(source) for source in sources],
                     seconds=progress["seconds"] + time.perf_counter() - start)
    if rank == 0:
        print(f"projected {len(sources)} prototypes onto training patches; pruned {pruned} that no class held",
              flush=True)
    run.save_checkpoint(Path(cfg.out) / "last.pt", dict(model=net), progress)


@torch.no_grad()
def fixed_slots(net, x):
    """(B,3,S,S) -> (B,C*K) similarities of the slots of test time."""
    return net.slots(squared_distances(net.features(x), net.prototypes))[0]


def slot_batches(net, data, start, stop, cfg, device, rank, world):
    """Iterator over slots (B,C*K), labels, labels mixed in, lam: fine-tuning's iterations start..stop-1.

    Without mix-up the network runs once over the clean training images; the rest is look-ups.
    """
    if cfg.finetune_mixup:                                           # [D7]
        for x, labels in training_batches(data, start, stop, cfg, device, rank, world):
            x, others, lam = mix(x, labels)
            yield fixed_slots(net, x), labels, others, lam
        return
    batches = (to_device(batch, device) for batch in clean_loader(data, cfg, device))
    slots, labels = map(torch.cat, zip(*[(fixed_slots(net, x), labels) for x, labels in batches]))
    for batch in loaders.BatchesFrom(len(labels), cfg.batch_size, cfg.seed, start, stop, rank, world):
        index = torch.tensor([i for i, _ in batch]).to(device, non_blocking=True)
        yield slots[index], labels[index], labels[index], 1.0


def finetune(net, sets, progress, cfg, device, rank, world):
    """Table 6, after projection: the last layer alone, cross-entropy + L1 of its off-class weights [D7]."""
    out, steps, official = Path(cfg.out), steps_per_epoch(sets["train"], cfg), cfg.reading == "official"
    net.eval().requires_grad_(False)
    head = net.last_layer.requires_grad_(True)
    model = run.distribute(head, device, world)
    optimizer = torch.optim.Adam(head.parameters(), lr=cfg.finetune_lr,
                                 weight_decay=cfg.weight_decay if official else 0.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.95 if official else 1.0)
    parts = dict(model=net, optimizer=optimizer, scheduler=scheduler)
    if progress["phase"] == "finetune":
        run.load_checkpoint(out / "last.pt", parts, device)
    else:
        progress |= dict(phase="finetune", epoch=0)
    off_class, start = 1 - net.own_slots(), progress["iteration"]    # (C,C*K)
    stop = start + (cfg.finetune_epochs - progress["epoch"]) * steps
    batches = slot_batches(net, sets["train"], start, stop, cfg, device, rank, world)
    val_loader = clean_loader(sets["val"], cfg, device, rank, world)
    began = time.perf_counter() - progress["seconds"]
    while progress["epoch"] < cfg.finetune_epochs:
        sums = {}
        for _ in tqdm(range(steps), desc="finetune", leave=False, disable=True if rank else None):
            slots, labels, others, lam = next(batches)
            logits = model(slots)
            ce = lam * F.cross_entropy(logits, labels) + (1 - lam) * F.cross_entropy(logits, others)
            losses = dict(ce=ce, l1=cfg.w_l1 * (head.weight * off_class).abs().sum())
            optimizer.zero_grad(set_to_none=True)
            sum(losses.values()).backward()
            optimizer.step()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.detach()
        score, rate = evaluate(net, val_loader, device), scheduler.get_last_lr()[0]
        scheduler.step()
        end_epoch(progress, "finetune", steps, sums, score, rate, began, parts, out, rank)


def train(cfg, device, rank=0, world=1):
    """All phases of Table 6, then the report. Returns what metrics.json holds (None on other ranks than 0).

    progress, in every checkpoint: phase, epoch (finished in this phase), iteration (over all phases), seconds,
    best (cross-entropy on val), stale (epochs since), log (rows), slot (Fig. 5), classes, num_prototypes; from
    the projection on also soft (C,K,M), pruned, prototypes_before (M,D), sources.
    """
    sets, last = open_sets(cfg), Path(cfg.out) / "last.pt"
    resumes = cfg.resume and last.exists()                           # killed before the first: start again
    progress = read_progress(cfg, sets) if resumes else dict(
        phase="start", epoch=0, iteration=0, seconds=0.0, stale=0, best=math.inf, log=[], slot=[],
        classes=sets["train"].classes, num_prototypes=cfg.prototypes)
    torch.manual_seed(cfg.seed)
    backbone = build_extractor(cfg.backbone, "none" if resumes else cfg.weights)
    plain = PlainClassifier(backbone, sets["train"].num_classes)     # net has the same backbone
    net = plain if cfg.classifier == "linear" else build_pool(backbone, progress, cfg)
    run.start_run(cfg, rank)
    for module in (plain, net):
        module.to(device, memory_format=torch.channels_last)
    torch.manual_seed(cfg.seed + 1 + rank)                           # noise and mix-up differ between ranks
    announce(net, sets, progress, cfg, device, rank, world)
    train_phase(plain, "pretrain", sets, progress, cfg, device, rank, world)                           # [D18]
    train_phase(net, "warmup", sets, progress, cfg, device, rank, world)
    train_phase(net, "joint", sets, progress, cfg, device, rank, world)
    if cfg.classifier == "protopool":
        project(net, sets, progress, cfg, device, rank)
        finetune(net, sets, progress, cfg, device, rank, world)
    return report(net, sets, progress, cfg, device, rank, world)


def build_pool(backbone, progress, cfg):
    """num_prototypes: fewer than cfg.prototypes once they are pruned."""
    return ProtoPool(backbone, len(progress["classes"]), progress["num_prototypes"], cfg.slots, cfg.depth,
                     cfg.reading, cfg.gumbel, cfg.focal)


def read_progress(cfg, sets=None):
    """progress of OUT/last.pt; UserError if it is no run of this script, or has other classes than the data."""
    path = Path(cfg.out) / "last.pt"
    progress = run.read_checkpoint(path)["progress"]
    if not {"phase", "num_prototypes", "classes"} <= set(progress):
        raise UserError(f"{path} is not a checkpoint of this script: pass the --out of one of its runs.")
    if sets and sets["train"].classes != progress["classes"]:
        raise UserError(f"the run in {cfg.out} knows {len(progress['classes'])} classes and {cfg.dataset} in "
                        f"{cfg.data} has {len(sets['train'].classes)}, or other names: pass that run's --data.")
    return progress


def announce(net, sets, progress, cfg, device, rank, world):
    """Before training one line: steps at most, expected time, memory. Leaves the network as it was."""
    view, steps = training_view(sets["train"], cfg), steps_per_epoch(sets["train"], cfg)
    epochs = cfg.pretrain_epochs + cfg.warmup_epochs + cfg.joint_epochs - progress["iteration"] // steps
    if epochs <= 0 or PHASES.index(progress["phase"]) >= PHASES.index("project"):
        return
    optimizer, _ = build_optimizer(net, "joint", cfg, device)
    net.train()

    def step(batch):
        return train_step(net, optimizer, *to_device(batch, device), temperature_of("joint", 0, cfg), cfg)

    def read_batch():
        return default_collate([view[(i % len(view), i)] for i in range(cfg.batch_size // world)])

    parts = dict(model=net, optimizer=optimizer)
    run.announce(step, read_batch, parts, epochs * steps, epochs * len(sets["val"]), cfg, device, rank, world)


# ---- evaluation ---------------------------------------------------------------------------------------------

@torch.inference_mode()
def evaluate(net, loader, device):
    """Top-1 accuracy in percent and mean cross-entropy over the split, all ranks together."""
    net.eval()
    sums = torch.zeros(3, device=device)                             # hits, cross-entropy, images
    for batch in loader:
        x, labels = to_device(batch, device)
        logits = net(x)[0]                                           # float32: autocast is for training
        hits, ce = (logits.argmax(1) == labels).sum(), F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([hits, ce, torch.ones_like(labels).sum()])
    if dist.is_initialized():
        dist.all_reduce(sums)
    hits, ce, count = sums.tolist()
    return dict(accuracy=100 * hits / count, ce=ce / count)


def accuracies_by_stage(net, progress, loader, device):
    """Table 3: test accuracy before the projection, after it, and at the end with the fine-tuned last layer."""
    prototypes, weight = net.prototypes.detach().clone(), net.last_layer.weight.detach().clone()
    stages = {"accuracy_before_projection": (progress["prototypes_before"], net.own_slots()),
              "accuracy_after_projection": (prototypes, net.own_slots()), "accuracy": (prototypes, weight)}
    result = {}
    for name, (p, w) in stages.items():                              # the last stage is the net as it came
        net.prototypes.data.copy_(p)
        net.last_layer.weight.data.copy_(w)
        result[name] = evaluate(net, loader, device)["accuracy"]
    return result


def sharing(net):
    """Which class holds which prototype, bool (C,M) on the CPU, and its numbers for metrics.json."""
    hard = net.hard_assignment().cpu()                               # (C,K,M)
    held = hard.amax(1) > 0.5
    graph = held.float() @ held.float().T                            # (C,C) prototypes that two classes share
    pairs = graph[torch.ones_like(graph).triu(1) > 0]
    slots, filled = hard.shape[:2].numel(), int(hard.sum())
    return held, dict(
        prototypes_used=int(held.any(0).sum()), slots_in_all=slots, empty_slots=slots - filled,
        repeated_slots=filled - int(held.sum()), classes_per_prototype=held.sum(0).float().mean().item(),
        classes_of_each_prototype=held.sum(0).tolist(), shared_per_class_pair=pairs.mean().item())


def report(net, sets, progress, cfg, device, rank, world):
    """The test split, read for the first time; rank 0 writes metrics.json and figures/. Returns the metrics."""
    loader = clean_loader(sets["test"], cfg, device, rank, world)
    pools = isinstance(net, ProtoPool)
    accuracies = (accuracies_by_stage(net, progress, loader, device) if pools else
                  dict(accuracy=evaluate(net, loader, device)["accuracy"]))
    if rank:
        return None
    result = accuracies | dict(
        split="test", chosen_on="test split: optimistic" if cfg.select_on_test else "validation split",
        preset=cfg.preset, classifier=cfg.classifier, reading=cfg.reading, seed=cfg.seed,
        epochs=dict(Counter(row["phase"] for row in progress["log"])), seconds=round(progress["seconds"], 1),
        device=device.type, processes=world, parameters=sum(p.numel() for p in net.parameters()))
    line = f"test accuracy {result['accuracy']:.1f}"
    if pools:
        weight, own = net.last_layer.weight.detach(), net.own_slots() > 0
        result |= sharing(net)[1] | dict(
            prototypes_pruned=progress["pruned"], negative_weights=int((weight < 0).sum()),
            off_class_weight=weight[~own].abs().mean().item())
        truth, names = truth_metrics(net, sets["test"], cfg, device) if sets["test"].part_names else ({}, {})
        explanations = draw_figures(net, sets, progress, names, cfg, device)
        result |= truth | dict(explanations=explanations)
        line += (f" (before projection {result['accuracy_before_projection']:.1f}, right after it "
                 f"{result['accuracy_after_projection']:.1f}), {result['prototypes_used']} prototypes for "
                 f"{result['slots_in_all']} slots; look into {cfg.out}/figures")
    run.write_json(Path(cfg.out) / "metrics.json", result)
    print(f"{line}; see {cfg.out}/metrics.json")
    return result


# ---- is the explanation true? (beyond the paper) ------------------------------------------------------------
# Where the parts of the test images are annotated, the box of a prototype's activation holds them or not.

def activation_boxes(maps, size, percentile=95):
    """Smallest boxes around the pixels at or above the percentile of each map. (n,h,w) -> int64 (n,4).

    Boxes are y0, y1, x0, x1, ends exclusive. Maps are upsampled bicubically to size = (height, width), as in
    ProtoPNet.
    """
    height, width = size
    maps = maps.float() - maps.float().amin((1, 2), keepdim=True)    # a flat map stays exactly flat
    big = F.interpolate(maps[None], (height, width), mode="bicubic", align_corners=False)[0]           # (n,H,W)
    place = percentile / 100 * (height * width - 1)                  # numpy's linear interpolation
    top = big.flatten(1).topk(height * width - int(place), dim=1).values                               # falling
    threshold = torch.lerp(top[:, -1], top[:, max(-2, -top.shape[1])], place - int(place))
    inside, ends = big >= threshold[:, None, None], []
    for lines in (inside.any(2).int(), inside.any(1).int()):         # rows (n,H), columns (n,W)
        ends += [lines.argmax(1), lines.shape[1] - lines.flip(1).argmax(1)]
    return torch.stack(ends, 1)


def activation_box(map, size, percentile=95):
    """activation_boxes of one map (h,w); size: an int or (height, width). Returns the ints y0, y1, x0, x1."""
    size = (size, size) if isinstance(size, int) else tuple(size)
    return tuple(activation_boxes(map[None], size, percentile)[0].tolist())


@torch.inference_mode()
def observe(net, data, own, cfg, device, noise=0.2):
    """Every image of a split as the prototypes see it, in pixels of the network's input, on the CPU.

    own (N,M) bool: prototypes of the image's class. Returns similarities g_p (N,M), activation boxes (N,M,4), the
    boxes of the own prototypes on the noisy image (N,M,4), part locations (N,P,3): x, y, visible.
    """
    size, generator = (cfg.size, cfg.size), torch.Generator().manual_seed(0)
    similarity, boxes, noisy, points = [], [], [], []
    for i in tqdm(range(len(data)), desc="parts", leave=False, disable=None):
        image, _ = data.read(i)
        x = network_input(image, cfg, device)
        x = torch.cat([x, x + noise * torch.randn(x.shape, generator=generator).to(device)])
        d2 = squared_distances(net.features(x), net.prototypes)      # (2,M,h,w): clean, noisy
        similarity.append(focal_similarity(d2[:1], net.focal)[0].cpu())
        boxes.append(activation_boxes(log_similarity(d2[0]), size).cpu())
        noisy.append(torch.zeros_like(boxes[-1]))
        if own[i].any():
            noisy[-1][own[i]] = activation_boxes(log_similarity(d2[1, own[i].to(device)]), size).cpu()
        scale = torch.tensor([cfg.size / image.shape[2], cfg.size / image.shape[1], 1])
        points.append(data.part_locations(i) * scale)
    return [torch.stack(part) for part in (similarity, boxes, noisy, points)]


def truth_metrics(net, data, cfg, device):
    """Purity, consistency, stability (common/metrics.py) in percent; and {prototype: "part share"} as a name.

    purity_by_chance: the same boxes laid on other images. On toy birds also variant_purity (the same part in
    the same variant), and how many variants a prototype shows, with purity of at least one half, that two of
    the variant's species hold.
    """
    labels, held = torch.tensor(data.labels), sharing(net)[0]        # (N,), (C,M)
    own = held[labels]                                               # (N,M)
    similarity, boxes, noisy, points = observe(net, data, own, cfg, device)
    inside, visible = metrics.points_in_boxes(boxes, points), points[..., 2] > 0                 # (N,M,P), (N,P)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    best, part = metrics.part_shares(inside, similarity).max(1)      # (M,)
    area = (boxes[..., 1] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 2]) / cfg.size ** 2     # (N,M)
    result = dict(
        purity=100 * best.mean().item(),
        purity_by_chance=100 * metrics.part_shares(
            metrics.points_in_boxes(boxes, points[order]), similarity).amax(1).mean().item(),
        consistency=metrics.part_consistency(inside, visible, own),
        stability=metrics.part_stability(inside, metrics.points_in_boxes(noisy, points), own),
        box_area=100 * area.mean().item(), parts_per_box=inside.sum(2).float().mean().item())
    names = {m: f"{data.part_names[p]} {100 * b:.0f} %"
             for m, (p, b) in enumerate(zip(part.tolist(), best.tolist()))}
    if data.variants is not None:
        variants = torch.as_tensor(data.variants)                    # (C,P)
        count = int(variants.max()) + 1
        looks = F.one_hot(variants[labels], count).bool()            # (N,P,V)
        best, look = metrics.part_shares((inside[..., None] & looks[:, None]).flatten(2), similarity).max(1)
        part, variant = look // count, look % count                  # (M,)
        holders = (held & (variants[:, part] == variant)).sum(0)     # (M,) classes with m and its variant
        found = (best >= 0.5) & (holders >= 2)
        result |= dict(variant_purity=100 * best.mean().item(), variants=int(looks.any(0).sum()),
                       variants_found_shared=len(set(look[found].tolist())))
    return result, names


# ---- figures ------------------------------------------------------------------------------------------------

def network_input(image, cfg, device):
    """uint8 (3,H,W) -> float32 (1,3,S,S), as images.CleanView does."""
    return transforms.normalise(resize(image, [cfg.size, cfg.size], antialias=True))[None].to(device)


@torch.inference_mode()
def similarity_maps(net, image, cfg, device):
    """log_similarity of the cells of an image uint8 (3,H,W) to all prototypes: (M,h,w) on the CPU."""
    z = net.features(network_input(image, cfg, device))
    return log_similarity(squared_distances(z, net.prototypes))[0].cpu()


def patch_of(image, map):
    """The patch of an image uint8 (3,H,W) where a map (h,w) is highest."""
    y0, y1, x0, x1 = activation_box(map, image.shape[1:])
    return image[:, y0:y1, x0:x1]


def prototype_patches(net, train_set, progress, cfg, device):
    """The patch that every prototype was projected onto: list of M uint8 (3,h,w)."""
    found = [train_set.read(source[0])[0] for source in progress["sources"]]
    return [patch_of(image, similarity_maps(net, image, cfg, device)[m]) for m, image in enumerate(found)]


def draw_figures(net, sets, progress, names, cfg, device):
    """All figures of a run; returns the numbers of three explained test images. names: {prototype: part}."""
    net.eval()
    folder, train_set, test_set, held = Path(cfg.out) / "figures", sets["train"], sets["test"], sharing(net)[0]
    patches = prototype_patches(net, train_set, progress, cfg, device)
    draw_prototypes(net, train_set, progress, held, names, patches, folder, cfg, device)
    pictures = [train_set.read(train_set.labels.index(c))[0] for c in range(train_set.num_classes)]
    draw_sharing(train_set.classes, held, patches, pictures, folder)
    draw_assignment(progress, folder)
    draw_focal(net, test_set, held, folder, cfg, device)
    explanations = []
    for k in range(3):
        i = (2 * k + 1) * len(test_set) // 6                         # spread over the split
        image, label = test_set.read(i)
        title = f"{test_set.name_of(i)}; label: {test_set.classes[label]}"
        explanations.append(explain_image(net, image, title, train_set.classes, patches,
                                          folder / f"explanation-{k + 1}.png", cfg, device))
    return explanations


@torch.inference_mode()
def draw_prototypes(net, train_set, progress, held, names, patches, folder, cfg, device, page=20):
    """prototypes-NN.png: patch, box and heat map on its source, patches of the five nearest images (Supp. 9)."""
    loader = clean_loader(train_set, cfg, device)
    d2 = torch.cat([squared_distances(net.features(x.to(device)), net.prototypes).flatten(2).amin(2).cpu()
                    for x, _ in loader])                             # (N,M)
    sources = [source[0] for source in progress["sources"]]
    d2[sources, list(range(len(sources)))] = math.inf                      # the source has columns of its own
    near = d2.topk(min(5, len(d2) - 1), dim=0, largest=False).indices                            # (5,M)
    maps = {i: similarity_maps(net, train_set.read(i)[0], cfg, device)
            for i in {*sources, *near.flatten().tolist()}}
    rows = []
    for m, i in enumerate(sources):
        image, label = train_set.read(i)
        name = f"p{m}, {names[m]}" if names else f"p{m}"
        row = [(patches[m], f"{name}, in {int(held[:, m].sum())} classes"),
               (figures.draw_box(image, activation_box(maps[i][m], image.shape[1:])), train_set.classes[label]),
               (figures.heatmap(image, maps[i][m]), f"similarity up to {maps[i][m].max():.2f}")]
        for j in near[:, m].tolist():
            other, label = train_set.read(j)
            row.append((patch_of(other, maps[j][m]), train_set.classes[label]))
        rows.append(row)
    for start in range(0, len(rows), page):
        path = folder / f"prototypes-{start // page + 1:02d}.png"
        figures.save_grid(path, rows[start:start + page], cell=140,
                          title="Prototypes: patch, box and activation; patches of the nearest training images")


def draw_sharing(classes, held, patches, pictures, folder, page=12):
    """Fig. 7, 1, 8, 9, 13: which classes hold which prototypes. held bool (C,M); a picture of each class."""
    captions = [f"p{m}, in {count} classes" for m, count in enumerate(held.sum(0).tolist())]
    rows = [[(pictures[c], name)] + [(patches[m], captions[m]) for m in held[c].nonzero().flatten().tolist()]
            for c, name in enumerate(classes)]
    for start in range(0, len(rows), page):
        figures.save_grid(folder / f"classes-{start // page + 1:02d}.png", rows[start:start + page], cell=120,
                          title="Characteristics of the classes (Fig. 7)")
    graph = draw_class_graph({"": held}, classes, folder)
    if graph.any():
        a, b = divmod(int(graph.argmax()), len(classes))
        draw_pair(a, b, classes, held, patches, pictures, folder / "shared_pair.png")
    m = int(held.sum(0).argmax())
    owners = held[:, m].nonzero().flatten().tolist()
    cells = [(patches[m], f"p{m}")] + [(pictures[c], classes[c]) for c in owners]
    figures.save_grid(folder / "shared_prototype.png", [cells[k:k + 7] for k in range(0, len(cells), 7)],
                      cell=140, title=f"Prototype p{m} and the {len(owners)} classes that hold it (Fig. 8)")
    draw_counts({"prototypes": held}, folder / "classes_per_prototype.png")


def draw_class_graph(held_by, classes, folder):
    """Fig. 13: prototypes that two classes share, mean over runs: a matrix, returned (C,C), and an edge list."""
    graphs = torch.stack([(held.float() @ held.float().T).fill_diagonal_(0) for held in held_by.values()])
    std, mean = torch.std_mean(graphs, 0, correction=0)              # (C,C)
    figures.save_matrix(folder / "class_graph.png", mean, classes, vmin=0, vmax=max(1.0, mean.max().item()),
                        title="Prototypes that two classes share (Fig. 13)")
    edges = []
    for a, b in mean.triu(1).nonzero().tolist():
        common = [(held[a] & held[b]).nonzero().flatten().tolist() for held in held_by.values()]
        edges.append(dict(class_a=classes[a], class_b=classes[b], shared=mean[a, b].item(), std=std[a, b].item(),
                          prototypes="; ".join(" ".join(f"p{m}" for m in members) for members in common)))
    nothing = dict(class_a="", class_b="", shared=0, std=0, prototypes="")
    run.write_csv(folder / "class_graph.csv", edges or [nothing])
    return mean


def draw_counts(held_by, path):
    """Fig. 9: how many prototypes are held by 1, 2, ... classes. held_by: {run: held (C,M)}."""
    counts = {name: torch.bincount(held.sum(0), minlength=len(held) + 1)[1:] for name, held in held_by.items()}
    most = 1 + max(int(count.nonzero().max()) for count in counts.values())
    figures.save_bars(path, {name: count[:most].tolist() for name, count in counts.items()},
                      [str(n + 1) for n in range(most)], unit="prototypes",
                      title="How many classes hold a prototype (Fig. 9)")


def draw_pair(a, b, classes, held, patches, pictures, path):
    """Fig. 1: the prototypes of class a alone, of both, and of class b alone."""
    groups = ((pictures[a], f"only {classes[a]}", held[a] & ~held[b]), (None, "both", held[a] & held[b]),
              (pictures[b], f"only {classes[b]}", held[b] & ~held[a]))
    rows = [[None if picture is None else (picture, caption)]
            + [(patches[m], f"p{m}, {caption}") for m in who.nonzero().flatten().tolist()]
            for picture, caption, who in groups]
    figures.save_grid(path, [row for row in rows if any(row)], cell=140,
                      title=f"{classes[a]} and {classes[b]}: own and shared prototypes (Fig. 1)")


def draw_assignment(progress, folder):
    """Fig. 14, 15, 5: the distributions of the slots at the end of training, and one slot over time."""
    soft, classes = progress["soft"], progress["classes"]            # (C,K,M) with all prototypes of the pool
    some = torch.randperm(len(soft), generator=torch.Generator().manual_seed(0))[:10].sort().values.tolist()
    columns = [f"{classes[c]} {k}" for c in some for k in range(soft.shape[1])]
    figures.save_matrix(folder / "assignment.png", soft[some].flatten(0, 1).T,
                        [str(m) for m in range(soft.shape[2])], columns, vmin=0, vmax=1,
                        title=f"Slots of {len(some)} classes before they are fixed; rows: prototypes (Fig. 14)")
    figures.save_histogram(folder / "assignment_histogram.png", {"y": soft.flatten()}, low=0, high=1, log=True,
                           title="Values of the slots' distributions (Fig. 15)")
    if progress["slot"]:
        slot = torch.tensor(progress["slot"])                        # (epochs,M)
        times = {"start": 0, "middle": len(slot) // 2, "end": len(slot) - 1}
        some = slot.amax(0).topk(min(12, slot.shape[1])).indices.sort().values
        figures.save_bars(folder / "slot_over_time.png",
                          {f"{name}: epoch {e + 1}": slot[e, some].tolist() for name, e in times.items()},
                          [str(m) for m in some.tolist()], unit="probability",
                          title=f"Slot 0 of {classes[0]}: its most likely prototypes of the pool (Fig. 5)")


@torch.inference_mode()
def draw_focal(net, data, held, folder, cfg, device, most=1000):
    """Fig. 2, 4: maximum and mean of a similarity map on five images; Fig. 17: similarities with and without."""
    count, rows, values = min(most, len(data)), [], {"focal": [], "max only": []}
    chosen = [k * len(data) // count for k in range(count)]          # spread over the split
    for k, i in enumerate(tqdm(chosen, desc="focal", leave=False, disable=None)):
        image, label = data.read(i)
        d2 = squared_distances(net.features(network_input(image, cfg, device)), net.prototypes)  # (1,M,h,w)
        focal = focal_similarity(d2)[0].cpu()                        # (M,)
        values["focal"].append(focal)
        values["max only"].append(focal_similarity(d2, focal=False)[0].cpu())
        if k in [j * count // 5 for j in range(5)] and held[label].any():
            m = int(focal.masked_fill(~held[label], -1).argmax())    # the strongest of its own class
            map = log_similarity(d2[0, m]).cpu()
            rows.append([(image, data.classes[label]), (figures.heatmap(image, map, opacity=1.0), f"p{m}"),
                         (figures.heatmap(image, map),
                          f"max {map.max():.2f} - mean {map.mean():.2f} = {map.max() - map.mean():.2f}")])
    figures.save_grid(folder / "focal.png", rows, cell=200, title="The strongest own prototype (Fig. 2, 4)")
    figures.save_histogram(folder / "focal_histogram.png", {name: torch.cat(v) for name, v in values.items()},
                           title=f"Similarity of {count} test images to all prototypes (Fig. 17)")


@torch.inference_mode()
def explain_image(net, image, name, classes, patches, path, cfg, device):
    """Fig. 6 for an image uint8 (3,H,W): PNG at path; returns its numbers. own slots + rest = logit."""
    maps = similarity_maps(net, image, cfg, device)                  # (M,h,w)
    slots = fixed_slots(net, network_input(image, cfg, device))[0].cpu().double()           # (C*K,)
    weight = net.last_layer.weight.cpu().double()                    # (C,C*K)
    logits = weight @ slots
    c, per_class = int(logits.argmax()), net.q.shape[1]
    hard, own = net.hard_assignment()[c].cpu(), range(c * per_class, (c + 1) * per_class)        # (K,M)
    terms = [dict(prototype=int(hard[k].argmax()), similarity=slots[s].item(), weight=weight[c, s].item(),
                  product=(slots[s] * weight[c, s]).item()) for k, s in enumerate(own) if hard[k].any()]
    terms.sort(key=lambda term: -term["product"])
    total = sum(term["product"] for term in terms)
    rest, chance = logits[c].item() - total, logits.softmax(0)[c].item()
    rows = [[(image, name), (image, f"prediction: {classes[c]} ({100 * chance:.0f} %)")]]
    brightest = max([maps[term["prototype"]].max().item() for term in terms], default=1.0)       # one scale for all
    for term in terms:
        m = term["prototype"]
        box = activation_box(maps[m], image.shape[1:])
        rows.append([(patches[m], f"prototype p{m}"), (figures.draw_box(image, box), "looks like this part"),
                     (figures.heatmap(image, maps[m], vmin=0, vmax=brightest),
                      f"{term['similarity']:.2f} x {term['weight']:.2f} = {term['product']:.2f}")])
    title = f"Why {classes[c]}? own slots {total:.2f} + rest {rest:.2f} = logit {total + rest:.2f}"
    figures.save_grid(path, rows, cell=180, title=title)
    return dict(image=name, prediction=classes[c], probability=chance, slots=terms, own=total, rest=rest,
                logit=total + rest)


# ---- use trained runs ---------------------------------------------------------------------------------------

def load_run(cfg, device):
    """The trained network of the run in cfg.out, its data and its progress; UserError if there is none."""
    sets, linear = open_sets(cfg), cfg.classifier == "linear"
    progress = read_progress(cfg, sets)
    if linear and not cfg.eval_only:
        raise UserError(f"the run in {cfg.out} is a plain classifier, which has no prototypes: train one with "
                        "--classifier protopool.")
    phase, epoch = progress["phase"], progress["epoch"]
    stopped = epoch >= cfg.joint_epochs or progress["stale"] >= cfg.patience
    projected = PHASES.index(phase) >= PHASES.index("project")
    if not (phase == "joint" and stopped if linear else projected and epoch >= cfg.finetune_epochs):
        raise UserError(f"the run in {cfg.out} stopped in epoch {epoch} of phase {phase}: finish it with "
                        "--resume.")
    backbone = build_extractor(cfg.backbone)
    net = PlainClassifier(backbone, len(progress["classes"])) if linear else build_pool(backbone, progress, cfg)
    net = net.to(device, memory_format=torch.channels_last)
    best = linear and cfg.reading == "paper"                         # as train_phase leaves it [D12]
    run.load_checkpoint(Path(cfg.out) / ("best.pt" if best else "last.pt"), dict(model=net), device)
    return net.eval().requires_grad_(False), sets, progress


def explain(cfg, device):
    """--explain: for every image OUT/explanations/NAME.png (Fig. 6) and NAME.json."""
    paths = files.list_images(cfg.explain)
    names = Counter(path.stem for path in paths)
    if names and max(names.values()) > 1:
        raise UserError(f"--explain {cfg.explain} holds several images called {names.most_common(1)[0][0]}: "
                        "their explanations would have the same name, so rename all but one.")
    net, sets, progress = load_run(cfg, device)
    patches = prototype_patches(net, sets["train"], progress, cfg, device)
    folder = Path(cfg.out) / "explanations"
    for path in paths:
        facts = explain_image(net, files.read_image(path), path.name, progress["classes"], patches,
                              folder / f"{path.stem}.png", cfg, device)
        run.write_json(folder / f"{path.stem}.json", facts)
        print(f"{path}: {facts['prediction']} ({100 * facts['probability']:.0f} %) because "
              + " + ".join(f"{term['product']:.2f} (p{term['prototype']})" for term in facts["slots"])
              + f" + rest {facts['rest']:.2f} = {facts['logit']:.2f} -> {folder / path.stem}.png")


def compare(cfg, device):
    """--compare A B: OUT/figures/pair-A-B.png (Fig. 1)."""
    net, sets, progress = load_run(cfg, device)
    classes, train_set = progress["classes"], sets["train"]
    for name in cfg.compare:
        if name not in classes:
            raise UserError(f"--compare {name!r}: no such class; the run knows {', '.join(classes[:20])}"
                            f"{' ...' if len(classes) > 20 else ''}.")
    a, b = (classes.index(name) for name in cfg.compare)
    if a == b:
        raise UserError(f"--compare {cfg.compare[0]!r} twice: give two different classes.")
    pictures = {c: train_set.read(train_set.labels.index(c))[0] for c in (a, b)}
    path = Path(cfg.out) / "figures" / f"pair-{classes[a]}-{classes[b]}.png".replace(" ", "_").replace("/", "_")
    patches = prototype_patches(net, train_set, progress, cfg, device)
    draw_pair(a, b, classes, sharing(net)[0], patches, pictures, path)
    print(f"drawn to {path}")


@torch.inference_mode()
def evaluate_ensemble(cfg, device):
    """--ensemble (Table 1, "Ex"; the paper does not say how): test accuracy of the mean of the runs'
    probabilities, and how alike the runs share prototypes (Fig. 9, 13). Writes OUT/ensemble/."""
    folder, chances, held_by = Path(cfg.out) / "ensemble", [], {}
    for out in cfg.ensemble:
        member = run.read_config(Config, out)
        member = replace(member, out=out, data=cfg.data or member.data, workers=cfg.workers, eval_only=False)
        net, sets, progress = load_run(member, device)
        if chances and (classes, labels.tolist()) != (progress["classes"], sets["test"].labels):
            raise UserError(f"--ensemble {out}: its data differ from those of {cfg.ensemble[0]}.")
        classes, labels = progress["classes"], torch.tensor(sets["test"].labels)
        batches = (to_device(batch, device)[0] for batch in clean_loader(sets["test"], member, device))
        chances.append(torch.cat([net(x)[0].softmax(1).cpu() for x in batches]))                 # (N,C)
        held_by[str(out)] = sharing(net)[0]                          # (C,M)
    hits = [(c.argmax(1) == labels).float().mean().item() for c in (*chances, torch.stack(chances).mean(0))]
    paper = {"CUB, 3 models": 87.5, "CUB, 5 models": 87.6, "Cars, 3 models": 91.1, "Cars, 5 models": 91.6}
    result = dict(runs=list(cfg.ensemble), accuracies=[100 * h for h in hits[:-1]], accuracy=100 * hits[-1],
                  paper=paper)
    draw_counts(held_by, folder / "classes_per_prototype.png")
    draw_class_graph(held_by, classes, folder)
    run.write_json(folder / "metrics.json", result)
    print(f"test accuracy of the runs {', '.join(f'{a:.1f}' for a in result['accuracies'])}; of the mean of "
          f"their probabilities {result['accuracy']:.1f}; see {folder}")
    return result


# ---- tables of the paper ------------------------------------------------------------------------------------

ROWS = {                                                             # what a row of Table 4 changes in a preset
    "ProtoPool": {},
    "w/o orthogonality": dict(w_orth=0.0),
    "w/o Gumbel-softmax": dict(gumbel=False),
    "w/o both": dict(gumbel=False, w_orth=0.0),
    "w/o focal similarity": dict(focal=False),
}
TABLE3 = {"cub-r34": (80.8, 80.3), "cub-r50-inat": (85.9, 85.5), "cub-r152": (81.2, 81.5),
          "cars-r34": (89.1, 89.3), "cars-r50": (88.4, 88.9)}        # accuracy before and after the projection
TABLE4 = {"ProtoPool": (85.5, 88.9), "w/o orthogonality": (82.4, 86.8), "w/o Gumbel-softmax": (80.3, 64.5),
          "w/o both": (65.1, 30.8), "w/o focal similarity": (85.3, 88.8)}        # CUB, Cars; ResNet-50
FIGURE11 = {"11a": (0.25, 0.5, 0.75, 1, 1.5, 2, 2.5), "11b": (0.4, 0.6, 0.8, 1, 1.2, 1.4)}   # times M, times K


def rows_of_table(cfg):
    """{row: settings that it changes}. For CUB, Fig. 11's rows are 50 to 505 prototypes and 4 to 14 slots."""
    if cfg.table == "11a":
        sizes = sorted({max(cfg.slots, round(cfg.prototypes * times)) for times in FIGURE11["11a"]})
        return {f"{size} prototypes": dict(prototypes=size) for size in sizes}
    if cfg.table == "11b":
        sizes = sorted({min(cfg.prototypes, max(1, round(cfg.slots * times))) for times in FIGURE11["11b"]})
        return {f"{size} slots": dict(slots=size) for size in sizes}
    return ROWS if cfg.table == "4" else {"ProtoPool": {}}


def run_table(cfg, device, rank, world):
    """--table: every row as a run in OUT/rows/, then OUT/tableN.md. Rows that are done are kept."""
    out, found = Path(cfg.out), {}
    for name, changes in rows_of_table(cfg).items():
        row_out = out / "rows" / name.replace("w/o", "no").replace(" ", "-")
        if rank == 0:
            print(f"row {name} in {row_out}", flush=True)
        row_cfg = replace(cfg, table="", out=str(row_out), **changes)
        found[name] = run.finished_row(train, row_cfg, device, rank, world)
    if rank == 0:
        text = "\n".join(table_lines(cfg, found, device)) + "\n"
        with run.replacing(out / f"table{cfg.table}.md") as file:
            file.write(text)
        print(f"\n{text}\nwritten to {out}/table{cfg.table}.md")
    return found


def table_lines(cfg, found, device):
    """Markdown of a table: ours, and the paper's numbers. found: row -> metrics."""
    about = {"3": "Table 3: the projection", "4": "Table 4: what each novelty adds",
             "11a": "Fig. 11a: number of prototypes; the paper's curve is flat from about 200 on",
             "11b": "Fig. 11b: number of slots; the paper's curve is flat from about 10 on"}[cfg.table]
    keys = ("accuracy_before_projection", "accuracy_after_projection", "accuracy", "prototypes_used",
            "empty_slots", "repeated_slots")
    paper = {"3": ("paper before", "paper after"), "4": ("paper CUB", "paper Cars")}.get(cfg.table, ())
    columns = ("row", "before projection", "right after it", "fine-tuned", *keys[3:], *paper)
    lines = [f"{about}. Preset {cfg.preset}, reading {cfg.reading}, seed {cfg.seed}, test accuracy in percent, "
             f"{device.type}.\n", f"| {' | '.join(columns).replace('_', ' ')} |", "|" + "---|" * len(columns)]
    for name, m in found.items():
        known = {"3": TABLE3.get(cfg.preset, ("-", "-")), "4": TABLE4.get(name)}.get(cfg.table, ())
        cells = [f"{m[key]:.1f}" if key.startswith("acc") else str(m[key]) for key in keys]
        lines.append(f"| {' | '.join([name, *cells, *map(str, known)])} |")
    return lines


def main(cfg):
    """Returns what the task returns, for use from Python."""
    check_config(cfg)
    device, rank, world = run.setup(cfg.device, cfg.seed)
    if cfg.table and cfg.classifier == "linear":
        raise UserError("--table trains ProtoPool's rows: leave --classifier linear out.")
    if cfg.table:
        return run_table(cfg, device, rank, world)
    if cfg.explain or cfg.compare or cfg.ensemble:
        task = explain if cfg.explain else compare if cfg.compare else evaluate_ensemble
        return None if rank else task(cfg, device)
    if cfg.eval_only:
        return report(*load_run(cfg, device), cfg, device, rank, world)
    return train(cfg, device, rank, world)


if __name__ == "__main__":                                           # guard: worker processes import this file
    run.run_script(main, Config, PRESETS, __doc__)
