"""Heads: the four levels of a backbone in, the feature map before dropout and classifier out.

The table in common/backbones.py says which backbones each goes with, and what it departs from.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from common.mit import init_weights
from common.run import UserError


def conv_bn_relu(in_channels, channels, kernel, stride=1, dilation=1):
    """Convolution without bias, BatchNorm, ReLU."""
    conv = nn.Conv2d(in_channels, channels, kernel, stride, dilation * (kernel // 2), dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def double_conv(in_channels, channels):
    """Twice: 3x3 convolution, BatchNorm, ReLU."""
    return nn.Sequential(conv_bn_relu(in_channels, channels, 3), conv_bn_relu(channels, channels, 3))


def resize(x, size):
    """Bilinear, corners not aligned: (B,C,h,w) -> (B,C,*size)."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class SegFormerHead(nn.Module):
    """All-MLP head (SegFormer, Eq. 4, in mmsegmentation's form with BatchNorm): -> (B,channels,h_1,w_1)."""

    def __init__(self, dims, channels):
        super().__init__()
        self.levels = nn.ModuleList(conv_bn_relu(dim, channels, 1) for dim in dims)
        self.fuse = conv_bn_relu(4 * channels, channels, 1)

    def forward(self, levels):
        size = levels[0].shape[2:]
        maps = [resize(conv(x), size) for conv, x in zip(self.levels, levels)]
        return self.fuse(torch.cat(maps, dim=1))                        # 4 x channels -> channels


class MLPHead(nn.Module):
    """SegFormer's all-MLP head as released, BatchNorm after the fusion only: -> (B,channels,h_1,w_1).

    The paper (Eq. 4) projects every level, resizes, concatenates and fuses. All of that is linear, and
    resizing commutes with what acts on single pixels: here the weights are multiplied first, every level is
    projected and fused in one step at its own size, and the concatenation is never built.
    """

    def __init__(self, dims, channels):
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(dim, channels, 1) for dim in dims)   # with a bias
        self.fuse = nn.Conv2d(4 * channels, channels, 1, bias=False)    # reads levels 4, 3, 2, 1
        self.norm = nn.BatchNorm2d(channels)
        init_weights(self.fuse)                                         # as released

    def forward(self, levels):
        size = levels[0].shape[2:]
        maps = {}                                                       # size -> sum of maps of that size
        fuse = self.fuse.weight.flatten(1).chunk(4, dim=1)              # (E,E) for levels 4, 3, 2, 1
        for x, conv, part in zip(levels, self.levels, reversed(fuse)):
            y = F.conv2d(x, (part @ conv.weight.flatten(1))[:, :, None, None], part @ conv.bias)
            maps[x.shape[2:]] = maps[x.shape[2:]] + y if x.shape[2:] in maps else y
        total = maps.pop(size)
        for y in maps.values():
            total = total + resize(y, size)
        return F.relu(self.norm(total), inplace=True)


class FCNHead(nn.Module):
    """Two 3x3 convolutions on level 4, concatenation with level 4, a third one: -> (B,channels,h_4,w_4)."""

    def __init__(self, dims, channels):
        super().__init__()
        self.convs = double_conv(dims[3], channels)
        self.fuse = conv_bn_relu(dims[3] + channels, channels, 3)

    def forward(self, levels):
        return self.fuse(torch.cat([levels[3], self.convs(levels[3])], dim=1))


class UPerHead(nn.Module):
    """UPerNet: pyramid pooling on level 4, then a feature pyramid over all levels: -> (B,channels,h_1,w_1).
    Raises UserError for a training batch of one image."""

    def __init__(self, dims, channels):
        super().__init__()
        self.pools = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(n), conv_bn_relu(dims[3], channels, 1))
                                   for n in (1, 2, 3, 6))
        self.bottleneck = conv_bn_relu(dims[3] + 4 * channels, channels, 3)
        self.laterals = nn.ModuleList(conv_bn_relu(dim, channels, 1) for dim in dims[:3])
        self.smooth = nn.ModuleList(conv_bn_relu(channels, channels, 3) for _ in dims[:3])
        self.fuse = conv_bn_relu(4 * channels, channels, 3)

    def forward(self, levels):
        top = levels[3]
        refuse_one_image("upernet", self.training, top)
        pooled = [resize(pool(top), top.shape[2:]) for pool in self.pools]
        x = self.bottleneck(torch.cat([top, *pooled], dim=1))
        maps = [x]
        for i in (2, 1, 0):                                             # from coarse to fine
            x = self.laterals[i](levels[i]) + resize(x, levels[i].shape[2:])
            maps.insert(0, self.smooth[i](x))
        return self.fuse(torch.cat([resize(y, levels[0].shape[2:]) for y in maps], dim=1))


class DeepLabv2Head(nn.Module):
    """A 1x1 convolution on level 4: -> (B,channels,h_4,w_4).
    DeepLabv2 classifies level 4 itself (DilatedClassifier); this makes it narrow enough for prototypes."""

    def __init__(self, dims, channels):
        super().__init__()
        self.reduce = conv_bn_relu(dims[3], channels, 1)

    def forward(self, levels):
        return self.reduce(levels[3])


class DilatedClassifier(nn.Module):
    """DeepLabv2's: four dilated 3x3 convolutions, summed. (B,channels,h,w) -> (B,N,h,w)."""

    def __init__(self, channels, num_classes):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, num_classes, 3, padding=rate, dilation=rate)
                                   for rate in (6, 12, 18, 24))
        for conv in self.convs:
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)

    def forward(self, x):
        return sum(conv(x) for conv in self.convs)


class DeepLabv3PlusHead(nn.Module):
    """DeepLabv3+: dilated convolutions side by side on level 4, then level 1: -> (B,channels,h_1,w_1).

    The rates are 6, 12 and 18 at output stride 16 and twice that at 8 (DeepLabv3, Section 3.3). Convolutions
    are ordinary, not separable in depth. Raises UserError for a training batch of one image.
    """

    def __init__(self, dims, channels, output_stride):
        super().__init__()
        rates = [16 // output_stride * rate for rate in (6, 12, 18)]
        self.branches = nn.ModuleList([conv_bn_relu(dims[3], channels, 1),
                                       *(conv_bn_relu(dims[3], channels, 3, dilation=r) for r in rates)])
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv_bn_relu(dims[3], channels, 1))
        self.project = nn.Sequential(conv_bn_relu(5 * channels, channels, 1), nn.Dropout2d(0.5))
        self.low = conv_bn_relu(dims[0], 48, 1)
        self.refine = double_conv(channels + 48, channels)

    def forward(self, levels):
        low, top = levels[0], levels[3]
        refuse_one_image("deeplabv3plus", self.training, top)
        pooled = self.pool(top).expand(-1, -1, *top.shape[2:])
        x = self.project(torch.cat([*(branch(top) for branch in self.branches), pooled], dim=1))
        return self.refine(torch.cat([resize(x, low.shape[2:]), self.low(low)], dim=1))


def refuse_one_image(head, training, x):
    """UserError if the head is to train on a batch of one image, whose pooled map has a single pixel."""
    if training and len(x) == 1:
        raise UserError(f"the {head} head cannot train on a batch of one image (BatchNorm would see one "
                        "pixel): use a batch size of 2 or more per process")


def auxiliary_head(dim, num_classes):
    """An ordinary FCN classifier for level 3 and an auxiliary loss: (B,C,h,w) -> logits (B,N,h,w)."""
    head = nn.Sequential(conv_bn_relu(dim, 256, 3), nn.Dropout2d(0.1), nn.Conv2d(256, num_classes, 1))
    head.apply(init_weights)
    nn.init.normal_(head[-1].weight, std=0.01)
    return head
