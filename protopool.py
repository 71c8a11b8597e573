"""ProtoPool: class slots filled from one shared pool of part prototypes, in one file.

Paper  D. Rymarczyk, L. Struski, M. Gorszczak, K. Lewandowska, J. Tabor, B. Zielinski, "Interpretable image
       classification with differentiable prototypes assignment", ECCV 2022. "Supp." is its supplement.
Idea   A logit is the sum of the K slots of its class. A slot is a distribution over M prototypes that all
       classes share; Gumbel-softmax turns it into a choice of one. A prototype scores by how much its best
       patch stands out from the rest of the image (focal similarity), and it ends as a patch of a training
       image: this looks like that.
Found  With the paper's start chance fills the slots. On toy birds q first hears L_orth 430 times louder than
       the cross-entropy; then tau falls 185-fold, and no choice changes after the second epoch. Images choose
       if prototypes start as training patches (0.3 times; [D20]) and tau falls slowly [D21]: see preset toy.

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
tau      temperature_of()    scalar     1, then 1 / sqrt(3.4e4 epoch), 0.001 from epoch 30     Supp. 8
eta      noise               C,K,M      standard Gumbel samples, the same for a whole batch    Sec. 3
g_p(z)   log_similarity()    B,M,h,w    log((d2 + 1) / (d2 + eps)), d2 = |z - p|^2             footnote 5
g_p      focal_similarity()  B,M        maximum over cells - mean over cells                   Eq. (1)
g_k      slot_similarity()   B,C,K      sum_i y_k^i g_pi                                       Sec. 3
w_h      last_layer.weight   C,C*K      1 from a class's own slots, else 0, until fine-tuning  Supp. 8
p <- z   project_prototypes  M,D        the nearest patch of the classes that hold it          Eq. (3)
L_orth   orthogonality_loss  scalar     slots of a class take different prototypes             Eq. (2)
L_clst   cluster_cost        scalar     an own prototype is near                               Supp. 8
L_sep    separation_cost     scalar     the others are far (its weight is negative)            Supp. 8
L_l1     finetune_losses     scalar     L1 norm of w_h off the own slots, after projection     Supp. 8

Where the print is silent, contradicts itself, or differs from the authors' released code ([D*] marks the
line). The code produced the published numbers: --reading official takes its side in D1 to D10 and D15 and
projects the last weights [D12]; with --select-on-test it also stops as the code does.
[D1] The paper mixes the prototypes' similarities by y; the code mixes distances and takes logarithms last.
[D2] Eq. (1) subtracts the mean similarity; the code the similarity of the mean distance.
[D3] Supp. 8 prints softmax(q / tau + eta); the code has softmax(2 (q / tau + eta)), with another tau.
[D4] Eq. (2) is about distributions; the code puts in the logits q, and the sum over all pairs i != j.
[D5] At test time the paper takes y > 0.5 as 1, and a slot may stay empty; the code in effect the largest q.
     Our y has tau = 0.001 and no noise, even without Gumbel-softmax: softmax(q) leaves most slots empty.
[D6] Table 6 halves the learning rates every 5 epochs; the code divides them by 10.
[D7] Table 6 fine-tunes for 15 epochs at 1e-4; the code for 25 at 5e-5, x0.95 every 5, with decay and mix-up.
     The paper does not say on what: we take the clean images, whose similarities are computed once.
[D8] Supp. 8 draws all but the last layer by Xavier normal; the code the add-on layer by Kaiming normal and
     the prototypes uniformly from [0, 1).
[D9] Table 5 reads as one chain with vertical flips. The code has one of the three warps and left-right flips
     only, and stores 30 changed copies of every image, as ProtoPNet does: hence --passes-per-epoch. The skew
     of "< 45 degrees" is a tilt that changes a side by up to a fifth. Our batches are always full.
[D10] Table 6 has 10 epochs of warm-up without decay; the code trains 9, and decays the add-on layer.
[D11] Table 6 decays the "prototypical pool" too; the code leaves prototypes and q alone, and so do we in
     both readings: a q whose softmax is saturated has no other gradient, and Adam would walk it to 0.
[D12] We stop the joint phase by the cross-entropy of a validation split, and project the best weights. The
     code stops by loss and accuracy of the test split, counts from the warm-up on, and projects the last.
[D13] A sigmoid follows the 1x1 convolution, as in the code and in ProtoPNet; the paper does not mention it.
[D14] The text starts at tau = 1, the formula at infinity: tau = 1 in epoch 0.
[D15] Mix-up "50% : 50%" is Beta(0.5, 0.5), as in the code; there L_clst and L_sep see the first image only.
[D16] Batch norm stays in eval mode while the backbone is frozen; the code lets its statistics drift.
[D17] Prototypes in nobody's slot are pruned at the projection; the code overwrites them with zeros.
[D18] Toy birds have no pretrained backbone: a plain classifier is trained first (one with --weights slowly).
[D19] CUB is cut to its boxes, test images too, as ProtoPNet prepared it. Cars are whole: no source says.
[D20] --prototypes-from patches, ours: [D18] trains the add-on layer too, under a maximum over its cells, and
     greedy k-means++ chooses patches of its map. A larger --w-orth goes with it, against repeated slots, and
     a backbone whose cells see a part and not the whole bird: what they see else names the class.
[D21] --tau geometric, ours: from 1 to 0.001 over the warm-up and half of the joint phase, a bit every step.
     Preset toy has [D20] and [D21] in both readings.
[D22] L_clst, L_sep: a class that repeats a prototype has fewer than K of its own; the code fills them up.
[D23] Fine-tuning leaves weights below 0: a slot of another class begins at 0 and mostly speaks against, and
     Adam's steps are as long for a small gradient. --positive, ours, puts them back to 0 after every step.
[D24] --prototype-noise, ours: a training step sees the prototypes with normal noise of this size, so that
     what is learned does not hang on where exactly one lies, which the projection changes.
"""

import copy
import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.lr_scheduler import StepLR
from tqdm import tqdm

from common import figures, images, protopool_figures, run, speed
from common.backbones import EXTRACTORS, build_extractor, check_side
from common.classification import (PlainClassifier, clean_loader, evaluate, open_splits, steps_per_epoch,
                                   training_batches, training_view)
from common.files import list_images
from common.loaders import BatchesFrom, to_device
from common.metrics import activation_box, activation_boxes, sharing  # noqa: F401: boxes for callers
from common.patches import spread_patches, training_patches
from common.protopool_page import PAGE
from common.report import write_report
from common.run import RunConfig, UserError, opt
from common.tables import Table, beside_paper, check_rows, train_from, train_rows, write_table
from common.transforms import coin, uniform, warp_matrix


# ---- options and recipes ----------------------------------------------------------------------------------

@dataclass
class Config(RunConfig):
    dataset: str = opt("toy_birds", "reader of --data", choices=images.DATASETS)
    full_images: bool = opt(False, "cub: take whole pictures, not cut to their bounding boxes [D19]")
    val_fraction: float = opt(0.1, "share of training images for early stopping", at_least=0, at_most=0.5)
    select_on_test: bool = opt(False, "stop and choose on the test split, as the authors did; optimistic")
    backbone: str = opt("resnet34", "network before the 1x1 add-on layer", choices=EXTRACTORS)
    weights: str = opt("imagenet", "of the backbone: imagenet (a download), file, URL, or none", source=True)
    size: int = opt(224, "images are resized to size x size; below 32 no feature map is left", at_least=32)
    classifier: str = opt("protopool", "linear = an ordinary linear layer on the same backbone, same budget",
                          choices=("protopool", "linear"))
    reading: str = opt("paper", "official = the released code where it differs, see the [D*] above",
                       choices=("paper", "official"))
    prototypes: int = opt(202, "M, size of the pool; those in no slot are pruned at the projection", above=0)
    slots: int = opt(10, "K, slots of a class", above=0)
    depth: int = opt(256, "D, channels of features and prototypes", above=0)
    prototypes_from: str = opt("random", "start: random, or training patches far from each other, once "
                               "--pretrain-epochs are over [D20]", choices=("random", "patches"))
    tau: str = opt(None, "how the temperature falls, see temperature() (default: as in the reading)",
                   choices=("paper", "official", "geometric"))
    prototype_noise: float = opt(0.0, "standard deviation of noise in training [D24]", at_least=0)
    gumbel: bool = opt(True, "off = plain softmax in training (Table 4)")
    focal: bool = opt(True, "off = maximum alone, as in ProtoPNet (Table 4)")
    w_cluster: float = opt(0.8, "weight of L_clst", at_least=0)
    w_separation: float = opt(-0.08, "weight of L_sep, negative: it drives the others away", at_most=0)
    w_orth: float = opt(1.0, "weight of L_orth", at_least=0)
    w_l1: float = opt(1e-4, "weight of the L1 norm of the last layer's off-class weights", at_least=0)
    batch_size: int = opt(80, "images of a step, over all GPUs; if memory runs out, halve it and all "
                          "learning rates", above=0)
    passes_per_epoch: int = opt(30, "passes over the training images that make an epoch [D9]: schedule, "
                                "temperature and early stopping count in epochs", above=0)
    pretrain_epochs: int = opt(0, "epochs as a plain classifier at first [D18]", at_least=0, schedule=True)
    warmup_epochs: int = opt(None, "epochs, backbone frozen (10; official 9)", at_least=0, schedule=True)
    joint_epochs: int = opt(60, "epochs of the whole network, at most", at_least=0, schedule=True)
    patience: int = opt(12, "joint training stops after so many epochs without a lower val loss", above=0)
    finetune_epochs: int = opt(None, "epochs, last layer alone (15; official 25)", at_least=0, schedule=True)
    lr: float = opt(1.5e-3, "Adam learning rate of add-on layer and prototypes", above=0)
    slot_lr: float = opt(1.5e-3, "learning rate of q: raise it where an epoch has few steps", above=0)
    backbone_lr: float = opt(5e-5, "learning rate of the backbone in the joint phase", above=0)
    weight_decay: float = opt(1e-3, "of backbone and add-on layer in the joint phase [D11]", at_least=0)
    add_on_decay: float = opt(None, "of the add-on layer (default: 0 in the warm-up [D10], then as above); "
                              "some hundred images want 0.03, or it learns them by heart", at_least=0)
    lr_step: int = opt(5, "joint epochs between two cuts of the learning rates", above=0)
    lr_gamma: float = opt(None, "factor of a cut (default 0.5; official 0.1)", above=0)
    finetune_lr: float = opt(None, "learning rate of the last layer (default 1e-4; official 5e-5)", above=0)
    positive: bool = opt(False, "keep the last layer's weights at 0 or above in fine-tuning [D23]")
    augment: str = opt(None, "chain = all of Table 5, single = one of its warps, flip = left-right only "
                       "(default chain; official single)", choices=("chain", "single", "flip", "none"))
    mixup: bool = opt(True, "mix-up in training (Table 5)")
    finetune_mixup: bool = opt(None, "mix-up in fine-tuning too: slow, as every step then runs the whole "
                               "network (default no; official yes)")
    eval_only: bool = opt(False, "evaluate and draw the run in OUT again and stop", uses_run=True)
    explain: str = opt("", "image or folder, cut out as the training images are: explain the predictions of "
                       "the run in OUT (Fig. 6) and stop", uses_run=True)
    compare: list = opt((), "two classes: draw what they share in run OUT (Fig. 1) and stop", uses_run=True)
    ensemble: list = opt((), "run folders: accuracy of the mean probabilities (OUT/ensemble/)", runtime=True)
    table: str = opt("", "train every row of Table 3 or 4 or of Fig. 11a or 11b on the chosen preset",
                     choices=("", "3", "4", "11a", "11b"), runtime=True)

    def __post_init__(self):
        """What was not given comes from the reading; check_options refuses one that does not exist."""
        for name, value in READINGS.get(self.reading, {}).items():
            if getattr(self, name) is None:
                setattr(self, name, value)


READINGS = {                                                         # [D6] [D7] [D9] [D10]
    "paper": dict(warmup_epochs=10, finetune_epochs=15, finetune_lr=1e-4, lr_gamma=0.5, augment="chain",
                  finetune_mixup=False, tau="paper"),
    "official": dict(warmup_epochs=9, finetune_epochs=25, finetune_lr=5e-5, lr_gamma=0.1, augment="single",
                     finetune_mixup=True, tau="official"),
}
CUB = dict(dataset="cub", prototypes=202, depth=256)                 # Sec. 4, Supp. 8
CARS = dict(dataset="cars", prototypes=195, depth=128)
PRESETS = {
    "toy": dict(backbone="tiny_local", weights="none", size=96, prototypes=36, slots=5, depth=64,
                batch_size=40, passes_per_epoch=4, pretrain_epochs=4, warmup_epochs=8, joint_epochs=4,
                finetune_epochs=10, prototypes_from="patches", tau="geometric", w_orth=1.5, slot_lr=0.01,
                backbone_lr=5e-4, augment="flip", mixup=False, workers=0),             # ours
    "cub-small": CUB | dict(backbone="mobilenet_v2", prototypes=120, depth=128, batch_size=20,
                            passes_per_epoch=4, warmup_epochs=8, joint_epochs=6, lr=5e-4, slot_lr=0.02,
                            backbone_lr=1e-4, add_on_decay=0.03, w_cluster=0.1, w_separation=-0.01,
                            tau="geometric", prototype_noise=0.03, augment="single", mixup=False),     # ours
    "cub-r34": CUB,
    "cub-r50-inat": CUB | dict(backbone="resnet50_inat"),            # --weights: the BBN checkpoint
    "cub-r152": CUB | dict(backbone="resnet152"),
    "cub-d121": CUB | dict(backbone="densenet121"),
    "cub-d161": CUB | dict(backbone="densenet161"),
    "cars-r34": CARS,
    "cars-r50": CARS | dict(backbone="resnet50"),
    "cars-d121": CARS | dict(backbone="densenet121", prototypes=202),              # as printed in Table 7
}


# ---- slots: which class holds which prototype (Sec. 3, Supp. 8) -------------------------------------------

def temperature(epoch, reading="paper"):
    """tau of Supp. 8: 1 at epoch 0 [D14], 1 / sqrt(3.4e4 epoch) below epoch 30, then 0.001.

    official [D3]: 0.001 / sqrt(min(epoch, 30) / 30), infinity at epoch 0.
    """
    if reading == "official":
        return 0.001 / math.sqrt(min(epoch, 30) / 30) if epoch else math.inf
    if epoch == 0:
        return 1.0
    return 1 / math.sqrt(3.4e4 * epoch) if epoch < 30 else 0.001


def gumbel_noise(q):
    """Standard Gumbel samples in the shape of q: -log of exponential samples (0 would give infinity)."""
    return -torch.empty_like(q).exponential_().clamp_min(1e-30).log()


def assign(q, tau, noise=None, reading="paper"):
    """Distribution of every slot, softmax(q / tau + noise) over the M prototypes. (C,K,M) -> (C,K,M).

    Supp. 8: tau does not divide the noise, so that the noise loses its influence as tau falls.
    official [D3]: softmax(2 (q / tau + noise)), and softmax(q) without noise at tau = infinity.
    """
    if math.isinf(tau):
        return q.softmax(-1)
    logits = q / tau if noise is None else q / tau + noise
    return (logits * 2 if reading == "official" else logits).softmax(-1)


def harden(assignment):
    """Sec. 4: entries above 0.5 become 1, others 0; a slot that has no such entry stays empty. Any shape."""
    return (assignment > 0.5).to(assignment.dtype)


# ---- similarity of an image to the prototypes (Sec. 3) ----------------------------------------------------

def squared_distances(features, prototypes):
    """d2[b,m,h,w] = |features[b,:,h,w] - prototypes[m]|^2: (B,D,H,W), (M,D) -> (B,M,H,W) float32.

    |z|^2 - 2 z.p + |p|^2, so that no (B,M,D,H,W) exists. Float32 also under autocast, and a matrix product,
    for which torch leaves TF32 off (cuDNN's convolutions have it on): near d2 = 0 the logarithm feels errors
    of 1e-4. A prototype that is a patch scores 9.2, but 4 with TF32's errors (1e-2), 2.5 with bfloat16's.
    """
    with torch.autocast(features.device.type, enabled=False):
        z = features.float().flatten(2)                              # (B,D,H*W)
        p = prototypes.float()                                       # (M,D)
        d2 = (z * z).sum(1, keepdim=True) - 2 * (p @ z) + (p * p).sum(1)[:, None]      # (B,M,H*W)
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
        nearest, mean = log_similarity(torch.stack([cells.amin(2), cells.mean(2)]) @ y)        # (B,C*K)
        slots = nearest - mean if focal else nearest
    else:
        slots = focal_similarity(d2, focal) @ y                      # (B,C*K)
    return slots.unflatten(1, assignment.shape[:2])


# ---- losses (Sec. 3, Supp. 8) -----------------------------------------------------------------------------

def orthogonality_loss(x, reading="paper"):
    """Eq. (2): cosines of a class's slots, summed over pairs i < j and classes, / (C K). (C,K,M) -> scalar.

    Over all i, j the sum is |sum_k x_k / |x_k||^2: no K x K matrix. official [D4]: pairs i != j of logits x.
    """
    unit = F.normalize(x, dim=2)
    slots = x.shape[0] * x.shape[1]                                  # C K
    all_pairs = unit.sum(1).square().sum()                           # i = j included
    if reading == "official":
        return all_pairs / slots - 1
    return (all_pairs - unit.square().sum()) / 2 / slots


def own_prototypes(assignment, reading="paper"):
    """(C,M) bool: the K prototypes of each class with the largest assignment summed over its slots, if that
    is half of the even share K / M or more: of a repeated prototype none is left for the K-th [D22]."""
    share = assignment.detach().sum(1)                               # (C,M)
    largest, index = share.topk(assignment.shape[1])                 # (C,K)
    enough = largest > (-1 if reading == "official" else 0.5 * share.mean(1, keepdim=True))
    return torch.zeros_like(share, dtype=torch.bool).scatter_(1, index, enough)


def cluster_cost(min_d2, labels, assignment, reading="paper"):
    """L_clst: squared distance of the nearest patch to the nearest own prototype, mean over the batch.

    min_d2 (B,M): minimum over the cells; labels (B,). No gradient reaches the assignment. As in ProtoPNet.
    """
    of_class = own_prototypes(assignment, reading)[labels]           # (B,M)
    return min_d2.masked_fill(~of_class, math.inf).amin(1).mean()


def separation_cost(min_d2, labels, assignment, reading="paper"):
    """L_sep: the same for the nearest of the other prototypes; its weight is negative. 0 if all are own."""
    of_class = own_prototypes(assignment, reading)[labels]           # (B,M)
    nearest = min_d2.masked_fill(of_class, math.inf).amin(1)
    return nearest.masked_fill(of_class.all(1), 0).mean()


# ---- model (Sec. 3, Fig. 3) -------------------------------------------------------------------------------

class ProtoPool(nn.Module):
    """Images (B,3,H,W) -> logits (B,C), squared distance of the nearest patch (B,M), assignment (C,K,M).

    With tau: slots sampled for training, the same for the whole batch. Without: the hard slots of test time.
    """

    def __init__(self, backbone, num_classes, num_prototypes, slots, depth, reading="paper", gumbel=True,
                 focal=True, noise=0.0):
        super().__init__()
        self.backbone = backbone
        self.reading, self.gumbel, self.focal, self.noise = reading, gumbel, focal, noise
        self.add_on_layers = nn.Sequential(nn.Conv2d(backbone.channels, depth, 1), nn.Sigmoid())     # [D13]
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, depth))         # p_i
        self.q = nn.Parameter(torch.empty(num_classes, slots, num_prototypes))
        self.register_buffer("fixed", torch.tensor(False))           # True: q is the 0/1 table of fix_slots
        self.last_layer = nn.Linear(num_classes * slots, num_classes, bias=False)      # h
        nn.init.zeros_(self.add_on_layers[0].bias)
        nn.init.normal_(self.q, std=math.sqrt(2 / (slots * (num_prototypes + num_classes))))       # Xavier
        if reading == "official":                                    # [D8]
            nn.init.kaiming_normal_(self.add_on_layers[0].weight, mode="fan_out", nonlinearity="relu")
            nn.init.uniform_(self.prototypes)
        else:
            nn.init.xavier_normal_(self.add_on_layers[0].weight)
            nn.init.xavier_normal_(self.prototypes)
        self.last_layer.weight.data.copy_(self.own_slots())

    def own_slots(self):
        """(C,C*K): 1 where the slot belongs to the class."""
        return torch.eye(len(self.q), device=self.q.device).repeat_interleave(self.q.shape[1], dim=1)

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

    def forward(self, x, tau=None):
        p = self.prototypes                                          # (M,D)
        if tau is not None and self.noise:                           # [D24]
            p = p + self.noise * torch.randn_like(p)
        d2 = squared_distances(self.features(x), p)                  # (B,M,h,w)
        with torch.autocast(x.device.type, enabled=False):           # float32: see squared_distances
            y = self.hard_assignment() if tau is None else self.soft_assignment(tau, gumbel_noise(self.q))
            slots = slot_similarity(d2, y, self.reading, self.focal).flatten(1)    # (B,C*K)
            return self.last_layer(slots), d2.flatten(2).amin(2), y

    @torch.no_grad()
    def slot_scores(self, x):
        """Similarities of the hard slots of test time: (B,3,H,W) -> (B,C*K)."""
        d2 = squared_distances(self.features(x), self.prototypes)
        return slot_similarity(d2, self.hard_assignment(), self.reading, self.focal).flatten(1)

    @torch.no_grad()
    def similarity_maps(self, x):
        """g_p(z) of every cell to every prototype: (B,3,H,W) -> (B,M,h,w)."""
        return log_similarity(squared_distances(self.features(x), self.prototypes))

    def held(self):
        """Which class holds which prototype in one of its hard slots: (C,M) bool."""
        return self.hard_assignment().amax(1) > 0.5

    @torch.no_grad()
    def fix_slots(self):
        """Make the hard slots permanent, prune the prototypes that no class holds [D17], return how many."""
        hard = self.hard_assignment()
        alive = hard.flatten(0, 1).any(0)                            # (M,)
        if not alive.any():
            raise UserError("every slot is empty after training, so there is nothing to project: train "
                            "longer, or raise --slot-lr.")
        self.prototypes = nn.Parameter(self.prototypes[alive])
        self.q = nn.Parameter(hard[..., alive])
        self.fixed.fill_(True)
        return int((~alive).sum())


# ---- a training step (Table 5: mix-up) --------------------------------------------------------------------

def mix(x, labels, alpha=0.5):
    """Mix-up [D15]: lam x + (1 - lam) x[order], lam ~ Beta(alpha, alpha). -> x, the others' labels, lam."""
    lam = torch.distributions.Beta(alpha, alpha).sample().item()     # drawn on the CPU: no synchronisation
    order = torch.randperm(len(x), device=x.device)
    return lam * x + (1 - lam) * x[order], labels[order], lam


def mixed_cost(cost, labels, others, lam):
    """A cost of mixed images: lam cost(labels) + (1 - lam) cost(labels of the images mixed in)."""
    return cost(labels) if lam == 1 else lam * cost(labels) + (1 - lam) * cost(others)


def losses_of(model, x, labels, tau, cfg):
    """The weighted terms of the loss (Supp. 8) for x (B,3,S,S), labels (B,): {name: scalar}; add them up."""
    official = cfg.reading == "official"
    x, others, lam = mix(x, labels) if cfg.mixup else (x, labels, 1.0)
    with run.autocast(x.device, cfg.amp):
        logits, min_d2, y = model(x, tau)                            # (B,C), (B,M), (C,K,M)
    losses = dict(ce=mixed_cost(lambda target: F.cross_entropy(logits, target), labels, others, lam))
    if y is not None:
        lam = 1.0 if official else lam                               # [D15]
        near = mixed_cost(lambda target: cluster_cost(min_d2, target, y, cfg.reading), labels, others, lam)
        far = mixed_cost(lambda target: separation_cost(min_d2, target, y, cfg.reading), labels, others, lam)
        slots = getattr(model, "module", model).q if official else y               # [D4]
        losses |= dict(cluster=cfg.w_cluster * near, separation=cfg.w_separation * far,
                       orth=cfg.w_orth * orthogonality_loss(slots, cfg.reading))
    return losses


def finetune_losses(net, model, slots, labels, others, lam, cfg):
    """Terms of the loss after the projection [D7]: model, the last layer, learns alone. slots (B,C*K)."""
    logits = model(slots)                                            # (B,C)
    off_class = net.last_layer.weight * (1 - net.own_slots())        # (C,C*K)
    return dict(ce=mixed_cost(lambda target: F.cross_entropy(logits, target), labels, others, lam),
                l1=cfg.w_l1 * off_class.abs().sum())


def update(optimizer, losses, amp="off"):
    """One step down the sum of the losses; returns them detached, on the device."""
    optimizer.zero_grad(set_to_none=True)
    run.backward(sum(losses.values()), optimizer, amp)               # as loss.backward()
    run.step(optimizer)                                              # as optimizer.step(); see --amp fp16
    return {name: value.detach() for name, value in losses.items()}


def train_step(model, optimizer, x, labels, tau, cfg):
    """One iteration up to the projection; returns the terms of the loss."""
    return update(optimizer, losses_of(model, x, labels, tau, cfg), cfg.amp)


def build_optimizer(net, phase, cfg, device):
    """Adam, and its scheduler with one step an epoch, for every phase of Table 6."""
    official = cfg.reading == "official"
    if phase == "finetune":                                          # [D7]
        optimizer = torch.optim.Adam(net.last_layer.parameters(), lr=cfg.finetune_lr,
                                     weight_decay=cfg.weight_decay if official else 0.0)
        return optimizer, StepLR(optimizer, 5, 0.95 if official else 1.0)
    joint = phase == "joint"
    decay = cfg.weight_decay if joint else 0.0
    add_on = net.last_layer
    add_on_decay = cfg.weight_decay if phase == "warmup" and official else decay   # [D10]
    groups = []
    if isinstance(net, ProtoPool):
        add_on = net.add_on_layers
        add_on_decay = add_on_decay if cfg.add_on_decay is None else cfg.add_on_decay
        groups = [dict(params=[net.prototypes], lr=cfg.lr), dict(params=[net.q], lr=cfg.slot_lr)]     # [D11]
    elif net.add_on_layers:                                          # [D20]
        groups = [dict(params=net.add_on_layers.parameters(), lr=cfg.lr)]
    if phase != "warmup":
        rate = cfg.backbone_lr if joint or cfg.weights != "none" else cfg.lr       # [D18]
        groups += [dict(params=net.backbone.parameters(), lr=rate, weight_decay=decay)]
    groups += [dict(params=add_on.parameters(), lr=cfg.lr, weight_decay=add_on_decay)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.999), fused=device.type == "cuda")
    return optimizer, StepLR(optimizer, cfg.lr_step, cfg.lr_gamma if joint else 1.0)         # [D6]


# ---- projection (Eq. 3) -----------------------------------------------------------------------------------

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
    prototypes, which move after the last image; of equal ones the first wins. Returns a Source for each of
    the M; a prototype that no class holds stays as it is: Source(-1, -1, -1, inf).
    """
    model.eval()
    held = model.held()                                              # (C,M)
    moved = model.prototypes.clone()                                 # (M,D)
    best = torch.full((len(moved),), math.inf, device=device)
    place = torch.full((len(moved), 3), -1, device=device)           # image, row, column
    first = 0                                                        # number of the batch's first image
    for x, labels in loader:
        z = model.features(x.to(device)).float()                     # (B,D,h,w)
        d2 = squared_distances(z, model.prototypes)                  # (B,M,h,w)
        d2 = d2.masked_fill(~held[labels.to(device)][..., None, None], math.inf)
        nearest, cell = d2.transpose(0, 1).flatten(1).min(1)         # (M,) over images and cells
        b, row, column = torch.unravel_index(cell, (len(x), *d2.shape[2:]))
        closer = nearest < best
        best = torch.where(closer, nearest, best)
        moved = torch.where(closer[:, None], z[b, :, row, column], moved)
        place = torch.where(closer[:, None], torch.stack([first + b, row, column], 1), place)
        first += len(x)
    model.prototypes.copy_(moved)
    return [Source(*where, distance) for where, distance in zip(place.tolist(), best.tolist())]


# ---- the phases of Table 6 --------------------------------------------------------------------------------

PHASES = ("start", "pretrain", "warmup", "joint", "project", "finetune")           # in this order: train()


def reached(progress, phase):
    """Is the run in this phase, or past it?"""
    return PHASES.index(progress["phase"]) >= PHASES.index(phase)


def temperature_of(phase, epoch, cfg):
    """Temperature so many epochs into a phase, or fractions of one; they count from the warm-up's start on
    (official: from 1 [D10]). geometric [D21]: 1 to 0.001 over the warm-up and half of the joint phase."""
    epoch += cfg.warmup_epochs if phase == "joint" else 0
    if cfg.tau == "geometric":
        return 0.001 ** min(1.0, epoch / (cfg.warmup_epochs + cfg.joint_epochs / 2 or 1))
    return temperature(int(epoch) + (cfg.tau == "official"), cfg.tau)


def project(net, sets, progress, cfg, machine):
    """Fix the slots, prune, project; what the report needs goes into progress. All processes end alike."""
    if reached(progress, "project"):
        if progress["phase"] == "project":
            run.load_checkpoint(Path(cfg.out) / "last.pt", dict(model=net), machine.device)
        return
    log = run.Log(cfg.out, progress, machine)
    tau = temperature_of("joint", max(progress["epoch"] - 1, 0), cfg)
    order = protopool_figures.renumber(net.held().any(0).cpu(), progress["film"])  # pruned: the last numbers
    soft = net.soft_assignment(tau).detach().cpu()[..., order]       # of the weights that are projected
    pruned = net.fix_slots()
    before = net.prototypes.detach().cpu().clone()
    sources = project_prototypes(net, clean_loader(sets["train"], cfg, machine.device), machine.device)
    if torch.distributed.is_initialized():
        torch.distributed.broadcast(net.prototypes.data, 0)          # near ties may differ between GPUs
    if machine.rank == 0:
        print(f"projected {len(sources)} prototypes onto training patches; pruned {pruned}", flush=True)
    progress |= dict(phase="project", epoch=0, soft=soft, pruned=pruned, prototypes_before=before,
                     num_prototypes=len(sources),
                     sources=protopool_figures.keep_sources(net, sets["train"], sources, cfg.size))
    log.save("last.pt", dict(model=net))


def slot_batches(net, sets, start, stop, cfg, machine):
    """Iterator over slots (B,C*K), labels, labels mixed in, lam. Without mix-up the network runs once."""
    if cfg.finetune_mixup:                                           # [D7]
        for x, labels in training_batches(training_view(sets, cfg, augment), start, stop, cfg, machine):
            x, others, lam = mix(x, labels)
            yield net.slot_scores(x), labels, others, lam
        return
    loader = clean_loader(sets["train"], cfg, machine.device)
    slots = torch.cat([net.slot_scores(to_device(batch, machine.device)[0]) for batch in loader])  # (N,C*K)
    labels = torch.tensor(sets["train"].labels, device=machine.device)             # (N,)
    for batch in BatchesFrom(len(labels), cfg.batch_size, cfg.seed, start, stop, *machine[1:]):
        index = torch.tensor([i for i, _ in batch]).to(machine.device, non_blocking=True)
        yield slots[index], labels[index], labels[index], 1.0


def train_phase(net, phase, sets, progress, cfg, machine):
    """Any phase but the projection: evaluates and saves after every epoch, and starts where progress says.

    joint stops after cfg.patience epochs without a lower loss on val, and ends with the best weights [D12].
    """
    if reached(progress, phase) and progress["phase"] != phase:
        return
    finetune = phase == "finetune"
    frozen = phase in ("warmup", "finetune")                         # the backbone
    net.requires_grad_(not finetune)
    net.backbone.requires_grad_(not frozen)
    if isinstance(net, ProtoPool):
        net.last_layer.requires_grad_(finetune)                      # 0 and 1 until it is fine-tuned
    model = run.distribute(net.last_layer if finetune else net, machine)
    optimizer, scheduler = build_optimizer(net, phase, cfg, machine.device)
    parts = dict(model=net, optimizer=optimizer, scheduler=scheduler)
    if progress["phase"] == phase:
        run.load_checkpoint(Path(cfg.out) / "last.pt", parts, machine.device)
    else:
        progress |= dict(phase=phase, epoch=0, stale=0, best=math.inf)
    epochs = getattr(cfg, f"{phase}_epochs")
    steps = steps_per_epoch(sets, cfg)
    start = progress["iteration"]
    stop = start + (epochs - progress["epoch"]) * steps
    if finetune:
        batches = slot_batches(net, sets, start, stop, cfg, machine)
    else:
        batches = training_batches(training_view(sets, cfg, augment), start, stop, cfg, machine)
    val_loader = clean_loader(sets["val"], cfg, *machine)
    log = run.Log(cfg.out, progress, machine)
    while progress["epoch"] < epochs and progress["stale"] < cfg.patience:
        net.train(not finetune)
        net.backbone.train(not frozen)                               # [D16]
        for step in tqdm(range(steps), desc=phase, leave=False, disable=machine.quiet):
            tau = temperature_of(phase, progress["epoch"] + step / steps, cfg)
            if finetune:
                log.add(update(optimizer, finetune_losses(net, model, *next(batches), cfg)))
                if cfg.positive:
                    net.last_layer.weight.data.clamp_(min=0)
            else:
                protopool_figures.film(net, progress, phase, tau)
                log.add(train_step(model, optimizer, *next(batches), tau, cfg))
        run.share_buffers(net)
        score = evaluate(net, val_loader, machine.device)
        changed = protopool_figures.slots_changed(net, progress)     # "" where none learns
        progress |= dict(epoch=progress["epoch"] + 1, iteration=progress["iteration"] + steps)
        log.row(f"{phase} {progress['epoch']}",
                before=dict(phase=phase, epoch=progress["epoch"], lr=scheduler.get_last_lr()[-1]),
                after=dict(val_accuracy=score["accuracy"], val_ce=score["ce"], slots_changed=changed),
                text=f"val accuracy {score['accuracy']:.1f}{f', {changed} slots changed' * (changed != '')}",
                losses=("ce", "cluster", "separation", "orth", "l1"))
        scheduler.step()
        if phase == "joint":
            progress["stale"] += 1
            if score["ce"] < progress["best"]:
                progress |= dict(best=score["ce"], stale=0)
                run.save_checkpoint(Path(cfg.out) / "best.pt", dict(model=net), {})
        log.save("last.pt", parts)
    if phase == "joint" and progress["epoch"] and cfg.reading == "paper":          # [D12]
        run.load_checkpoint(Path(cfg.out) / "best.pt", dict(model=net), machine.device)


def train(cfg, machine, until=""):
    """All phases of Table 6 (or the pretraining alone), and the report -> what metrics.json holds, in rank 0.

    progress, in every checkpoint: phase, epoch (finished in this phase), iteration (over all phases), best
    (cross-entropy on val), stale (epochs since), film (Fig. 5), classes, what run.Log keeps; from the
    projection on also num_prototypes, soft (C,K,M), pruned, prototypes_before (M,D), sources (keep_sources).
    """
    sets = open_splits(cfg)
    resumes = cfg.resume and (Path(cfg.out) / "last.pt").exists()    # killed before the first: start again
    progress = dict(phase="start", epoch=0, iteration=0, stale=0, best=math.inf, seconds=0.0, log=[],
                    sums={}, film=protopool_figures.new_film(), classes=sets["train"].classes,
                    images=run.code_of_names(sets["train"]))
    if resumes:
        progress |= read_progress(cfg.out, progress["classes"], sets["train"])
    torch.manual_seed(cfg.seed)
    plain, net = build_models(progress, cfg, machine.device, "none" if resumes else cfg.weights)
    run.start_run(cfg, machine)
    torch.manual_seed(cfg.seed + 1 + machine.rank)                   # processes differ in noise, mix-up
    announce(net, sets, progress, cfg, machine)
    train_phase(plain, "pretrain", sets, progress, cfg, machine)     # [D18]
    if until == "pretrain":
        return None
    start_from_patches(net, sets, progress, cfg, machine)
    train_phase(net, "warmup", sets, progress, cfg, machine)
    train_phase(net, "joint", sets, progress, cfg, machine)
    if cfg.classifier == "protopool":
        project(net, sets, progress, cfg, machine)
        train_phase(net, "finetune", sets, progress, cfg, machine)
    return report(net, sets, progress, cfg, machine)


# ==== from here on: data, evaluation, using a trained run, the paper's tables ==============================

def check_config(cfg):
    """UserError for a setting that cannot work, before anything is read or written."""
    run.check_options(cfg)
    run.check_batch_size(cfg.batch_size)
    extractor = partial(build_extractor, cfg.backbone)
    check_side(extractor, cfg.size, "--size", cfg.backbone, run.batch_of_process(cfg))
    if cfg.slots > cfg.prototypes:
        raise UserError(f"--slots {cfg.slots} with --prototypes {cfg.prototypes}: a class cannot hold more "
                        "prototypes than the pool has; raise --prototypes or lower --slots.")
    if cfg.prototypes_from == "patches" and not cfg.pretrain_epochs:
        raise UserError("--prototypes-from patches with --pretrain-epochs 0: give it some epochs.")


def augment(image, kind):
    """Table 5: uint8 (3,S,S) -> the same, and the matrix (3,3) of one projective warp for training_input.

    chain: rotation +-15 degrees, skew (probability 1/2), shear +-10 degrees, both flips (1/2 each).
    single: one of the three warps, left-right flip [D9]. flip: left-right flip. none: the image.
    """
    mirrored = coin()
    if kind in ("flip", "none"):
        return image.flip(-1) if mirrored and kind == "flip" else image, torch.eye(3)
    upside_down = coin() and kind == "chain"
    angle = math.radians(uniform(-15, 15))
    slope = math.tan(math.radians(uniform(-10, 10)))
    c, s = math.cos(angle), math.sin(angle)                          # matrices: output -> input, in [-1, 1]
    rotation = torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    shear = torch.tensor([[1, slope, 0], [0, 1, 0], [0, 0, 1]])
    shear = shear.T if coin() else shear                             # along x or along y
    skew = torch.eye(3)
    skew[2, :2] = torch.rand(2) * 0.4 - 0.2                          # the plane tilts
    if kind == "chain":
        matrix = rotation @ (skew if coin() else torch.eye(3)) @ shear
    else:
        matrix = (rotation, skew, shear)[torch.randint(3, ()).item()]
    return image, warp_matrix(matrix, mirrored, upside_down)


def start_from_patches(net, sets, progress, cfg, machine):
    """[D20]: the pool becomes patches of training images, the same in all processes and in a resumed run."""
    if cfg.prototypes_from == "random" or cfg.classifier == "linear" or reached(progress, "warmup"):
        return
    loader = clean_loader(sets["train"], cfg, machine.device)
    patches = training_patches(net.eval().features, loader, machine.device, cfg.seed)
    net.prototypes.data.copy_(spread_patches(patches, cfg.prototypes, cfg.seed))
    if torch.distributed.is_initialized():
        torch.distributed.broadcast(net.prototypes.data, 0)          # sums may differ between GPUs


def build_models(progress, cfg, device, weights="none"):
    """The plain classifier, and the network that --classifier names, on the same backbone."""
    backbone = build_extractor(cfg.backbone, weights)
    num_classes = len(progress["classes"])
    net = plain = PlainClassifier(backbone, num_classes)
    if cfg.classifier == "protopool":                                # fewer prototypes once they are pruned
        net = ProtoPool(backbone, num_classes, progress.get("num_prototypes", cfg.prototypes), cfg.slots,
                        cfg.depth, cfg.reading, cfg.gumbel, cfg.focal, cfg.prototype_noise)
        if cfg.prototypes_from == "patches":                         # [D20]
            plain = PlainClassifier(backbone, num_classes, net.add_on_layers)
    return [model.to(device, memory_format=torch.channels_last) for model in (plain, net)]


def announce(net, sets, progress, cfg, machine):
    """One line before training: steps at most, expected time, memory. Leaves the network as it was."""
    steps = steps_per_epoch(sets, cfg)
    epochs = cfg.pretrain_epochs + cfg.warmup_epochs + cfg.joint_epochs - progress["iteration"] // steps
    if epochs <= 0 or reached(progress, "project"):
        return
    optimizer, _ = build_optimizer(net.train(), "joint", cfg, machine.device)
    step = partial(train_step, net, optimizer, tau=temperature_of("joint", 0, cfg), cfg=cfg)
    speed.announce(lambda batch: step(*images.training_input(batch, machine.device)),
                   training_view(sets, cfg, augment), dict(model=net, optimizer=optimizer), epochs * steps,
                   epochs * len(sets["val"]), cfg, machine)


def report(net, sets, progress, cfg, machine):
    """The test split, read for the first time: metrics.json, figures/. -> metrics, in the first process."""
    loader = clean_loader(sets["test"], cfg, *machine)
    result = dict(accuracy=evaluate(net, loader, machine.device)["accuracy"])
    if isinstance(net, ProtoPool):                                   # Table 3: how it was before
        earlier = copy.deepcopy(net)
        earlier.last_layer.weight.data.copy_(net.own_slots())
        result["accuracy_after_projection"] = evaluate(earlier, loader, machine.device)["accuracy"]
        earlier.prototypes.data.copy_(progress["prototypes_before"])
        result["accuracy_before_projection"] = evaluate(earlier, loader, machine.device)["accuracy"]
    if machine.rank:
        return None
    result |= run.facts(cfg, net, progress, machine, "classifier", "reading") | dict(
        split="test", chosen_on="test split: optimistic" if cfg.select_on_test else "validation split",
        epochs=dict(Counter(row["phase"] for row in progress["log"])), finished=True)
    line = f"test accuracy {result['accuracy']:.1f}"
    if isinstance(net, ProtoPool):
        weight = net.last_layer.weight.detach()
        truth, names, true = protopool_figures.truth_metrics(net, sets["test"], progress["sources"], cfg)
        explain = partial(explanation, net, progress["classes"], cfg.size)
        result |= truth | sharing(net.hard_assignment().cpu()) | dict(
            prototypes_pruned=progress["pruned"], negative_weights=int((weight < 0).sum()),
            off_class_weight=weight[net.own_slots() == 0].abs().mean().item(),
            explanations=protopool_figures.draw_run(net, sets, progress, names, true, explain, cfg))
        line += (f" (before projection {result['accuracy_before_projection']:.1f}, right after it "
                 f"{result['accuracy_after_projection']:.1f}); look into {cfg.out}/figures")
    run.write_json(Path(cfg.out) / "metrics.json", result)
    print(f"{line}; see {cfg.out}/metrics.json")
    write_report(cfg.out, PAGE)
    return result


@torch.no_grad()
def explanation(net, classes, size, image, name):
    """Fig. 6 in numbers, for an image uint8 (3,H,W): the terms of the logit; own slots + rest = logit."""
    x = images.network_input(image, size, net.prototypes.device)
    similarity = net.slot_scores(x)[0].cpu().double()                # (C*K,)
    weight = net.last_layer.weight.cpu().double()                    # (C,C*K)
    logits = weight @ similarity
    c = int(logits.argmax())
    chosen = net.hard_assignment()[c].cpu()                          # (K,M)
    terms = []
    for k in chosen.any(1).nonzero().flatten().tolist():             # an empty slot adds nothing
        slot = c * len(chosen) + k
        score, w = similarity[slot].item(), weight[c, slot].item()
        terms.append(dict(prototype=int(chosen[k].argmax()), similarity=score, weight=w, product=score * w))
    terms.sort(key=lambda term: -term["product"])
    total = sum(term["product"] for term in terms)
    rest = logits[c].item() - total
    return dict(image=name, prediction=classes[c], probability=logits.softmax(0)[c].item(), slots=terms,
                own=total, rest=rest, logit=total + rest)


# ---- use trained runs -------------------------------------------------------------------------------------

def read_progress(out, classes=None, data=None):
    """progress in OUT/last.pt, see train(); UserError: no such run, one of other classes, or an old one."""
    progress = run.read_progress(out, ("phase", "stale"), classes, data)
    if not all(isinstance(source, dict) for source in progress.get("sources", ())):
        raise UserError(f"the run in {out} was made by an earlier version, which did not keep the patches "
                        "of its prototypes: train again.")
    return progress


def load_run(cfg, device, sets=None):
    """The trained network of the run in cfg.out, in eval mode, and its progress; UserError if there is none.
    sets: its data, if they are open."""
    progress = read_progress(cfg.out, sets and sets["train"].classes)
    figures.know_classes(progress["classes"])
    if cfg.eval_only:                                                # before minutes of evaluation
        protopool_figures.places_of(progress.get("sources", ()), sets, cfg.data)
    phase, epoch = progress["phase"], progress["epoch"]
    linear = cfg.classifier == "linear"
    if linear and not cfg.eval_only:
        raise UserError(f"the run in {cfg.out} is a plain classifier, which has no prototypes: train one "
                        "with --classifier protopool.")
    if linear:
        finished = phase == "joint" and (epoch >= cfg.joint_epochs or progress["stale"] >= cfg.patience)
    else:
        finished = reached(progress, "project") and epoch >= cfg.finetune_epochs
    if not finished:
        raise UserError(f"the run in {cfg.out} stopped in epoch {epoch} of phase {phase}: --resume it.")
    _, net = build_models(progress, cfg, device)
    file = "best.pt" if linear and cfg.reading == "paper" else "last.pt"           # see train_phase [D12]
    run.load_checkpoint(Path(cfg.out) / file, dict(model=net), device)
    return net.eval().requires_grad_(False), progress


def show(cfg, device):
    """--explain: OUT/explanations/ (Fig. 6), NAME.png and NAME.json. --compare: OUT/figures/ (Fig. 1)."""
    paths = list_images(cfg.explain) if cfg.explain else []
    sets = open_splits(cfg) if cfg.compare else None                 # an explanation needs no data
    net, progress = load_run(cfg, device, sets)
    if cfg.compare:
        protopool_figures.compare(net, sets["train"], progress["sources"], cfg)
    if cfg.explain:
        explain = partial(explanation, net, progress["classes"], cfg.size)
        protopool_figures.explain_files(paths, net, progress["sources"], progress["classes"], explain, cfg)


@torch.inference_mode()
def evaluate_ensemble(cfg, device):
    """--ensemble (Table 1, "Ex"; the paper does not say how): accuracy of the mean of the probabilities, and
    how alike the runs share prototypes (Fig. 9, 13). Writes OUT/ensemble/."""
    folder = Path(cfg.out) / "ensemble"
    test_sets = []
    probabilities = []                                               # (N,C) of each run
    held_by = {}                                                     # {run: (C,M)}
    for out in cfg.ensemble:
        member = replace(run.read_config(Config, out), out=out, workers=cfg.workers, eval_only=False)
        member = replace(member, data=cfg.data or member.data)
        sets = open_splits(member)
        net, _ = load_run(member, device, sets)
        test_sets.append(sets["test"])
        first, data = test_sets[0], test_sets[-1]
        if (data.classes, data.ids()) != (first.classes, first.ids()):
            raise UserError(f"--ensemble {out}: its test images differ from those of {cfg.ensemble[0]}.")
        batches = (to_device(batch, device) for batch in clean_loader(data, member, device))
        chances = torch.cat([net(x)[0].softmax(1).cpu() for x, _ in batches])
        if any(torch.equal(chances, other) for other in probabilities):
            raise UserError(f"--ensemble {out}: this run, or a copy of it, is named before: name it once.")
        probabilities.append(chances)
        held_by[str(out)] = net.held().cpu()
    probabilities.append(torch.stack(probabilities).mean(0))
    hits = [chance.argmax(1) == torch.tensor(first.labels) for chance in probabilities]
    *accuracies, accuracy = [100 * hit.float().mean().item() for hit in hits]
    paper = {"CUB, 3 models": 87.5, "CUB, 5 models": 87.6, "Cars, 3 models": 91.1, "Cars, 5 models": 91.6}
    result = dict(runs=list(cfg.ensemble), accuracies=accuracies, accuracy=accuracy, paper=paper)
    run.write_json(folder / "metrics.json", result)
    protopool_figures.draw_counts(held_by, folder / "classes_per_prototype.png")
    protopool_figures.draw_class_graph(held_by, first.classes, folder, first.variants)
    text = ", ".join(f"{rate:.1f}" for rate in accuracies)
    print(f"test accuracy of the runs {text}; of their mean probabilities {accuracy:.1f}; see {folder}")
    write_report(folder, PAGE)
    return result


# ---- tables of the paper ----------------------------------------------------------------------------------

COLUMNS = {"before projection": "accuracy_before_projection", "right after it": "accuracy_after_projection",
           "fine-tuned": "accuracy", "prototypes used": "prototypes_used", "empty slots": "empty_slots",
           "repeated slots": "repeated_slots", "true slots": "true_slots",
           "graph correlation": "graph_correlation"}
TABLE3 = {"cub-r34": (80.8, 80.3), "cub-r50-inat": (85.9, 85.5), "cub-r152": (81.2, 81.5),
          "cars-r34": (89.1, 89.3), "cars-r50": (88.4, 88.9)}        # preset: printed before and after it
TABLE4 = beside_paper("Table 4: what each novelty adds", COLUMNS, ("paper CUB", "paper Cars"), {
    "ProtoPool": ({}, 85.5, 88.9),                                   # the paper's numbers: ResNet-50
    "w/o orthogonality": (dict(w_orth=0.0), 82.4, 86.8),
    "w/o Gumbel-softmax": (dict(gumbel=False), 80.3, 64.5),
    "w/o both": (dict(gumbel=False, w_orth=0.0), 65.1, 30.8),
    "w/o focal similarity": (dict(focal=False), 85.3, 88.8)})


def table_of(cfg):
    """The table that --table names. For CUB, Fig. 11's rows are 50 to 505 prototypes and 4 to 14 slots."""
    if cfg.table == "4":
        return TABLE4
    if cfg.table == "3":
        return Table("Table 3: the projection", {"ProtoPool": {}}, COLUMNS, ("paper before", "paper after"),
                     {"ProtoPool": TABLE3.get(cfg.preset, (None, None))})
    if cfg.table == "11a":
        option, plateau = "prototypes", 200
        sizes = {max(cfg.slots, round(k * cfg.prototypes)) for k in (0.25, 0.5, 0.75, 1, 1.5, 2, 2.5)}
    else:
        option, plateau = "slots", 10
        sizes = {min(cfg.prototypes, max(1, round(k * cfg.slots))) for k in (0.4, 0.6, 0.8, 1, 1.2, 1.4)}
    return Table(f"Fig. {cfg.table}: number of {option}; the paper's curve is flat from about {plateau} on",
                 {f"{size} {option}": {option: size} for size in sorted(sizes)}, COLUMNS)


def main(cfg):
    """Returns what the task returns, for use from Python; a table {row: [metrics, one a seed]}."""
    check_config(cfg)
    machine = run.setup(cfg.device, cfg.seed)
    if cfg.table:
        table = table_of(cfg)
        check_rows(table.rows, cfg, check_config, ("classifier",))
        later = ("w_orth", "gumbel", "focal")                        # options after the pretraining [D18]
        if cfg.prototypes_from == "random":                          # else the add-on layer knows them [D20]
            later += ("prototypes", "slots")
        row = partial(train_from, partial(train, until="pretrain"), later, train, cfg)
        results = train_rows(table.rows, cfg, row if cfg.pretrain_epochs else train, machine)
        about = f"reading {cfg.reading}, test accuracy in %"
        write_table(cfg.table, table._replace(digits={"graph correlation": 2}), results, cfg, machine, about)
        if machine.rank == 0:
            protopool_figures.draw_table(table, results, partial(load_run, device=machine.device), cfg)
        write_report(cfg.out, PAGE)
        return results
    if cfg.explain or cfg.compare or cfg.ensemble:
        task = evaluate_ensemble if cfg.ensemble else show
        return None if machine.rank else task(cfg, machine.device)
    if cfg.eval_only:
        sets = open_splits(cfg)
        net, progress = load_run(cfg, machine.device, sets)
        return report(net, sets, progress, cfg, machine)
    return train(cfg, machine)


if __name__ == "__main__":                                           # worker processes import this file
    run.run_script(main, Config, PRESETS, __doc__)
