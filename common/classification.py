"""Image classification around a method: the splits of a run, batches of them, accuracy.

cfg: the options of the run. A view is a data set as a network sees it, see common/images.py.
"""
from functools import partial

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import BatchSampler

from common.images import CleanView, TrainView, open_images, training_input
from common.loaders import make_loader, to_device, train_loader
from common.run import UserError


def open_splits(cfg):
    """{"train", "val", "test"}. Val is taken from the training images unless --select-on-test."""
    splits = ("train", "test") if cfg.select_on_test else ("train", "val", "test")
    fraction = 0.0 if cfg.select_on_test else cfg.val_fraction
    sets = {split: open_images(cfg.dataset, cfg.data, split, cfg.seed, fraction, cfg.full_images)
            for split in splits}
    if sets["train"].num_classes < 2:
        raise UserError(f"{cfg.dataset} in {cfg.data} has a single class: a classifier needs two or more.")
    return {"val": sets["test"]} | sets


def clean_loader(data, cfg, device, rank=0, world=1):
    """Loader of the images in order, not augmented: x (B,3,size,size), labels int64 (B,).

    Every batch has cfg.batch_size images, but the last may be smaller; rank r of w gets the images r::w.
    """
    batches = BatchSampler(range(rank, len(data), world), cfg.batch_size, drop_last=False)
    return make_loader(CleanView(data, cfg.size), batches, cfg.workers, device)


def steps_per_epoch(sets, cfg):
    """An epoch is cfg.passes_per_epoch passes over the training images."""
    return max(1, cfg.passes_per_epoch * len(sets["train"]) // cfg.batch_size)


def training_view(sets, cfg, augment):
    """Training images, changed by augment(image, kind), kind = --augment."""
    return TrainView(sets["train"], cfg.size, partial(augment, kind=cfg.augment))


def training_batches(view, start, stop, cfg, machine):
    """Iterator over the augmented batches x, labels of the iterations start..stop-1, on the device."""
    loader = train_loader(view, cfg.batch_size, cfg.seed, start, stop, cfg.workers, *machine)
    return (training_input(batch, machine.device) for batch in loader)


class PlainClassifier(nn.Module):
    """The baseline: mean over the cells of a backbone's map, or maximum over those of add-on layers on it,
    then a linear layer. Images (B,3,H,W) -> logits (B,C), None, None: as many as a network of prototypes."""

    def __init__(self, backbone, num_classes, add_on_layers=None):
        super().__init__()
        self.backbone, self.add_on_layers = backbone, add_on_layers
        channels = add_on_layers[0].out_channels if add_on_layers else backbone.channels
        self.last_layer = nn.Linear(channels, num_classes)

    def forward(self, x, tau=None):                                    # tau: for a network with slots
        z = self.backbone(x)
        pooled = self.add_on_layers(z).amax((2, 3)) if self.add_on_layers else z.mean((2, 3))
        return self.last_layer(pooled), None, None


@torch.inference_mode()
def evaluate(net, loader, device):
    """Top-1 accuracy in percent and mean cross-entropy over the split, all processes together.

    net(x) returns the logits (B,C) first; net is left in eval mode.
    """
    net.eval()
    sums = torch.zeros(3, device=device)                             # hits, cross-entropy, images
    for batch in loader:
        x, labels = to_device(batch, device)
        logits = net(x)[0]                                           # float32: autocast is for training
        hits = (logits.argmax(1) == labels).sum()
        ce = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([hits, ce, torch.ones_like(labels).sum()])
    if dist.is_initialized():
        dist.all_reduce(sums)
    hits, ce, count = sums.tolist()
    return dict(accuracy=100 * hits / count, ce=ce / count)
