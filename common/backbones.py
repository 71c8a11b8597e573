"""Networks up to the last feature map; the classifier on top of it is each paper's own business.

    network = build_network("mit_b0", "segformer", num_classes=150, weights="mit_b0.pth")
    features, aux_logits = network(images)          # (B,256,H/4,W/4), None

    head           goes with                                           channels  stride   auxiliary head
    segformer      mit_b0 ... mit_b5, mobilenet_v2, tiny               256       4        none
    fcn            resnet50, resnet101, mobilenet_v2                   512       8 or 16  on level 3
    upernet        swin_t/s/b, convnext_tiny/small/base, mobilenet_v2  512       4        on level 3
    mlp            as segformer                                        256       4        none
    deeplabv2      as fcn                                              256       8 or 16  none
    deeplabv3plus  as fcn                                              256       4        none

segformer is mmsegmentation's all-MLP head, mlp the one of SegFormer's release. With last_stride=1 a MiT
becomes PFA's: level 4 is as fine as level 3.

mobilenet_v2 (for laptops and small GPUs) has 256 channels under every head, tiny (for toy pictures) 64.

    extractor = build_extractor("resnet34", weights="imagenet")
    features = extractor(images)                    # (B,512,H/32,W/32): no pooling, no classifier

tiny mobilenet_v2 resnet34 resnet50 resnet50_inat resnet152 densenet121 densenet161
48   1280         512      2048     2048          2048      1024        2208         channels

    dense = build_dense("resnet101", weights="imagenet")
    features = dense(images)                        # (B,2048,h,w), h about H/8: one fine map, no head

    backbone   resnet50, resnet101   mobilenet_v2   unet   tiny
    channels   2048                  320            64     64
    stride     8 or 16               8 or 16        1      4, 8 or 16

Sources: SegFormer (Xie et al. 2021), UPerNet (Xiao et al. 2018), FCN (Long et al. 2015), DeepLabv2 and
DeepLabv3+ (both Chen et al. 2018; the ResNets of build_dense are DeepLabv2's), U-Net (Ronneberger et al.
2015). mlp and the DeepLab heads serve PFA (Chan et al. 2024), which keeps SegFormer's head at 256 channels
for every MiT. Beyond that the widths of heads, initialisation, drop rates and auxiliary heads are
mmsegmentation's defaults. Departures from it:
- ResNet is torchvision's, with a 7x7 stem. mmsegmentation's FCN uses ResNet-V1c, whose stem is three 3x3
  convolutions; torchvision has no weights for that one.
- The first block of a dilated mobilenet_v2 stage keeps the dilation of the stage before it, as ResNet's
  does: pretrained filters then see the neighbours that they were trained on. The ResNets of build_dense
  dilate it too, as DeepLabv2 does, but stride in its 3x3 convolution and not in the 1x1 before it: that is
  where torchvision trained them.
- Swin and ConvNeXt do not pad the image: if a side is no multiple of 4, up to 3 rows or columns are lost.
Pretrained MiT weights are NVIDIA's, for non-commercial use only.
"""

import hashlib
import re
from collections import OrderedDict
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import StochasticDepth

from common.run import UserError

MIT = {                                                        # channels and blocks of the four stages
    "mit_b0": ((32, 64, 160, 256), (2, 2, 2, 2)),
    "mit_b1": ((64, 128, 320, 512), (2, 2, 2, 2)),
    "mit_b2": ((64, 128, 320, 512), (3, 4, 6, 3)),
    "mit_b3": ((64, 128, 320, 512), (3, 4, 18, 3)),
    "mit_b4": ((64, 128, 320, 512), (3, 8, 27, 3)),
    "mit_b5": ((64, 128, 320, 512), (3, 6, 40, 3)),
}
TORCHVISION = {                                                # channels of the four levels
    "resnet50": (256, 512, 1024, 2048), "resnet101": (256, 512, 1024, 2048),
    "swin_t": (96, 192, 384, 768), "swin_s": (96, 192, 384, 768), "swin_b": (128, 256, 512, 1024),
    "convnext_tiny": (96, 192, 384, 768), "convnext_small": (96, 192, 384, 768),
    "convnext_base": (128, 256, 512, 1024),
    "mobilenet_v2": (24, 32, 96, 320),
}
DROP_PATH = {name: 0.1 for name in MIT} | {
    "swin_t": 0.3, "swin_s": 0.3, "swin_b": 0.3,
    "convnext_tiny": 0.4, "convnext_small": 0.3, "convnext_base": 0.4,
}
GOES_WITH = {
    "segformer": (*MIT, "mobilenet_v2", "tiny"),
    "fcn": ("resnet50", "resnet101", "mobilenet_v2"),
    "upernet": ("swin_t", "swin_s", "swin_b", "convnext_tiny", "convnext_small", "convnext_base",
                "mobilenet_v2"),
    "mlp": (*MIT, "mobilenet_v2", "tiny"),
    "deeplabv2": ("resnet50", "resnet101", "mobilenet_v2"),
    "deeplabv3plus": ("resnet50", "resnet101", "mobilenet_v2"),
}
DILATED = ("fcn", "deeplabv2", "deeplabv3plus")                # heads whose backbone has an output_stride
EXTRACTORS = ("tiny", "mobilenet_v2", "resnet34", "resnet50", "resnet50_inat", "resnet152", "densenet121",
              "densenet161")
DENSE = ("resnet101", "resnet50", "mobilenet_v2", "unet", "tiny")
HEAD_CHANNELS = {"segformer": 256, "fcn": 512, "upernet": 512, "mlp": 256, "deeplabv2": 256,
                 "deeplabv3plus": 256}
CLASSIFIER_KEYS = ("fc.", "classifier.", "head.", "decode_head.", "norm.")   # "norm.": before Swin's head


# ---- Mix Transformer (SegFormer, Section 3.1) ------------------------------------------------------------
# Maps travel as (B,h,w,C): LayerNorm and Linear act on the last dimension, and the permutation to (B,C,h,w)
# for a convolution is a view in channels_last order. Parameters are named as in the original release, which
# also uses two eps: 1e-6 in the blocks and at the end of a stage, torch's 1e-5 after strided convolutions.

def conv_on_last(conv, x):
    """Apply a convolution to a map with channels last: (B,h,w,C) -> (B,h',w',C')."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PatchEmbed(nn.Module):
    """Overlapping patches: strided convolution, LayerNorm. (B,h,w,C) -> (B,h/stride,w/stride,C')."""

    def __init__(self, in_dim, dim, kernel, stride):
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, kernel, stride, kernel // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        return self.norm(conv_on_last(self.proj, x))


class EfficientAttention(nn.Module):
    """Self-attention whose keys and values come from a map with sr_ratio times smaller sides (Eq. 2)."""

    def __init__(self, dim, heads, sr_ratio):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)                               # rows: keys, then values
        self.proj = nn.Linear(dim, dim)
        self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio) if sr_ratio > 1 else None
        self.norm = nn.LayerNorm(dim) if sr_ratio > 1 else None

    def forward(self, x):                                               # (B,h,w,C)
        B, h, w, C = x.shape
        q = self.q(x).reshape(B, h * w, self.heads, -1).transpose(1, 2)   # (B,heads,hw,C/heads)
        if self.sr is not None:
            x = self.norm(conv_on_last(self.sr, x))                     # (B,h/sr,w/sr,C)
        kv = self.kv(x).reshape(B, -1, 2, self.heads, C // self.heads)
        k, v = kv.permute(2, 0, 3, 1, 4)                                # (B,heads,hw/sr^2,C/heads) each
        x = F.scaled_dot_product_attention(q, k, v)                     # (B,heads,hw,C/heads)
        return self.proj(x.transpose(1, 2).reshape(B, h, w, C))


class MixFFN(nn.Module):
    """MLP with a 3x3 depthwise convolution, which tells positions apart (Eq. 3). Keeps (B,h,w,C)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.dwconv = nn.Sequential(OrderedDict(dwconv=dwconv))
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(conv_on_last(self.dwconv, self.fc1(x))))


class MixBlock(nn.Module):
    """Attention and Mix-FFN, each after a LayerNorm and beside a shortcut. Keeps (B,h,w,C)."""

    def __init__(self, dim, heads, sr_ratio, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = EfficientAttention(dim, heads, sr_ratio)
        self.drop_path = StochasticDepth(0.0, mode="row")               # set_drop_path gives the rate
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MixFFN(dim, mlp_ratio * dim)

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class MixTransformer(nn.Module):
    """SegFormer's encoder: images (B,3,H,W) -> list of four maps (B,dims[i],h_i,w_i).

    Every argument but the last two has one entry per stage. With the default strides the maps have 1/4, 1/8,
    1/16 and 1/32 of the image's sides, rounded up. drop_path is the drop rate of the last block, falling
    linearly to 0 at the first. Sides below 29 pixels are too small for sr_ratios of (8, 4, 2, 1).
    """

    def __init__(self, dims, depths, heads, sr_ratios, strides=(4, 2, 2, 2), mlp_ratio=4, drop_path=0.1):
        super().__init__()
        self.dims = tuple(dims)
        in_dims, kernels = (3, *dims[:3]), (7, 3, 3, 3)
        for i in range(4):
            blocks = [MixBlock(dims[i], heads[i], sr_ratios[i], mlp_ratio) for _ in range(depths[i])]
            setattr(self, f"patch_embed{i + 1}", PatchEmbed(in_dims[i], dims[i], kernels[i], strides[i]))
            setattr(self, f"block{i + 1}", nn.Sequential(*blocks))
            setattr(self, f"norm{i + 1}", nn.LayerNorm(dims[i], eps=1e-6))
        self.apply(init_weights)
        set_drop_path(self, drop_path)

    def forward(self, x):
        x, levels = x.permute(0, 2, 3, 1), []                           # (B,H,W,3)
        for i in "1234":
            x = getattr(self, "patch_embed" + i)(x)
            x = getattr(self, "norm" + i)(getattr(self, "block" + i)(x))
            levels.append(x.permute(0, 3, 1, 2))                        # (B,C,h,w), channels_last in memory
        return levels


def set_drop_path(model, rate):
    """Stochastic depth of a model's blocks, in order: linearly from 0 at the first to rate at the last."""
    drops = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    for i, drop in enumerate(drops):
        drop.p = rate * i / max(len(drops) - 1, 1)


def init_weights(module):
    """mmsegmentation's: convolutions Kaiming normal (fan out), Linear normal 0.02, norms 1, biases 0."""
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
        nn.init.ones_(module.weight)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


# ---- other backbones -------------------------------------------------------------------------------------

class TorchvisionBackbone(nn.Module):
    """A torchvision classifier cut in four: images (B,3,H,W) -> list of four maps (B,dims[i],h_i,w_i).

    Swin and ConvNeXt get a LayerNorm on each level, as in mmsegmentation; of their stages[i], [0] is the stem
    or the downsampling and [1] holds the blocks.
    """

    def __init__(self, net, name):
        super().__init__()
        self.dims = TORCHVISION[name]
        self.swin = name.startswith("swin")                             # its maps are (B,h,w,C)
        self.norms = nn.ModuleList(nn.Identity() for _ in self.dims)
        if name.startswith("resnet"):
            stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
            stages = [nn.Sequential(stem, net.layer1), net.layer2, net.layer3, net.layer4]
        elif name == "mobilenet_v2":                                    # without the last 1x1 conv to 1280
            stages = [nn.Sequential(*net.features[a:b]) for a, b in ((0, 4), (4, 7), (7, 14), (14, 18))]
        else:
            stages = [nn.Sequential(*net.features[a:a + 2]) for a in (0, 2, 4, 6)]
            eps = 1e-5 if self.swin else 1e-6
            self.norms = nn.ModuleList(LayerNorm2d(dim, eps=eps) for dim in self.dims)
        self.stages = nn.ModuleList(stages)

    def forward(self, x):
        levels = []
        for stage, norm in zip(self.stages, self.norms):
            x = stage(x)
            levels.append(norm(x.permute(0, 3, 1, 2) if self.swin else x))   # (B,C,h,w)
        return levels


def torchvision_classifier(name, output_stride):
    """torchvision's network from scratch; a ResNet or mobilenet_v2 is dilated if output_stride is 8 or 16."""
    if name.startswith("resnet"):
        dilated = [False, output_stride <= 8, output_stride <= 16]
        return torchvision.models.get_model(name, weights=None, replace_stride_with_dilation=dilated)
    net = torchvision.models.get_model(name, weights=None)
    if name == "mobilenet_v2":
        dilate(net, output_stride)
    return net


def dilate(net, output_stride):
    """Trade the strides beyond output_stride for dilation: the strided network's values on a finer grid.

    For a chain of 3x3 convolutions in which nothing else strides (mobilenet_v2, TinyBackbone); in place.
    """
    stride, dilation = 1, 1
    for conv in net.modules():
        if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
            conv.dilation, conv.padding = (dilation, dilation), (dilation, dilation)
            if conv.stride == (2, 2) and stride == output_stride:
                conv.stride, dilation = (1, 1), 2 * dilation            # the next 3x3 looks twice as far
            stride *= conv.stride[0]


def dilate_as_deeplab(resnet, output_stride):
    """Trade the strides of a ResNet beyond output_stride for dilation as DeepLabv2 does.

    In contrast to `dilate`, a layer that gives up its stride is dilated from its first block on. The pooling
    keeps a last window that is not full: the map has (H + 1) // output_stride + 1 rows. In place.
    """
    resnet.maxpool.ceil_mode = True
    stride, dilation = 4, 1
    for layer in (resnet.layer2, resnet.layer3, resnet.layer4):
        if stride < output_stride:
            stride *= 2
            continue
        dilation *= 2
        layer[0].conv2.stride = layer[0].downsample[0].stride = (1, 1)
        for block in layer:
            block.conv2.dilation = block.conv2.padding = (dilation, dilation)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut. Keeps (B,C,h,w)."""

    def __init__(self, dim):
        super().__init__()
        self.convs = nn.Sequential(conv_bn_relu(dim, dim, 3), nn.Conv2d(dim, dim, 3, padding=1, bias=False),
                                   nn.BatchNorm2d(dim))

    def forward(self, x):
        return F.relu(x + self.convs(x))


class TinyBackbone(nn.Module):
    """A small residual network for toy pictures of about 128x128 pixels, quick on a CPU.

    Images (B,3,H,W) -> list of four maps with 1/4, 1/8, 1/16 and 1/16 of the image's sides, rounded up.
    """

    def __init__(self):
        super().__init__()
        self.dims = (32, 48, 64, 64)
        self.stages = nn.ModuleList([
            nn.Sequential(conv_bn_relu(3, 16, 3, stride=2), conv_bn_relu(16, 32, 3, stride=2),
                          ResidualBlock(32)),
            nn.Sequential(conv_bn_relu(32, 48, 3, stride=2), ResidualBlock(48)),
            nn.Sequential(conv_bn_relu(48, 64, 3, stride=2), ResidualBlock(64)),
            nn.Sequential(conv_bn_relu(64, 64, 3), ResidualBlock(64)),
        ])
        self.apply(init_weights)

    def forward(self, x):
        levels = []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        return levels


class UNet(nn.Module):
    """U-Net with padded convolutions and BatchNorm: images (B,3,H,W) -> (B,64,H,W), of any size.

    The five levels have width, 2, 4, 8 and 16 * width channels. If a side is odd, its last pixel is pooled
    alone, and what comes back up is cropped: no made-up values next to the border.
    """

    def __init__(self, width):
        super().__init__()
        self.channels, self.stride = 64, 1
        widths = [width, 2 * width, 4 * width, 8 * width, 16 * width]
        self.down = nn.ModuleList(double_conv(a, b) for a, b in zip((3, *widths), widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * dim, dim, 2, stride=2) for dim in widths[:4])
        self.merge = nn.ModuleList(double_conv(2 * dim, dim) for dim in widths[:4])
        self.last = nn.Conv2d(width, self.channels, 1)
        self.apply(init_weights)

    def forward(self, x):
        skips = []
        for convs in self.down[:4]:
            skips.append(convs(x))
            x = F.max_pool2d(skips[-1], 2, ceil_mode=True)              # sides halved, rounded up
        x = self.down[4](x)                                             # (B,16w,H/16,W/16)
        for i in (3, 2, 1, 0):                                          # from coarse to fine
            h, w = skips[i].shape[2:]
            x = self.merge[i](torch.cat([skips[i], self.up[i](x)[:, :, :h, :w]], dim=1))
        return self.last(x)


def double_conv(in_channels, channels):
    """Twice: 3x3 convolution, BatchNorm, ReLU."""
    return nn.Sequential(conv_bn_relu(in_channels, channels, 3), conv_bn_relu(channels, channels, 3))


# ---- heads: four levels in, the feature map before dropout and classifier out ----------------------------

def conv_bn_relu(in_channels, channels, kernel, stride=1, dilation=1):
    """Convolution without bias, BatchNorm, ReLU."""
    conv = nn.Conv2d(in_channels, channels, kernel, stride, dilation * (kernel // 2), dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


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

    The paper's order (Eq. 4) is: project every level, resize, concatenate, fuse. All of that is linear, and
    resizing commutes with what acts on single pixels: the weights are multiplied first, so every level is
    projected and fused in one step, at its own size, and the concatenation is never built. Initialisation as
    released: torch's own for the projections, Kaiming normal (fan out) for the fusion.
    """

    def __init__(self, dims, channels):
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(dim, channels, 1) for dim in dims)   # with a bias
        self.fuse = nn.Conv2d(4 * channels, channels, 1, bias=False)    # reads levels 4, 3, 2, 1
        self.norm = nn.BatchNorm2d(channels)
        init_weights(self.fuse)

    def forward(self, levels):
        size, maps = levels[0].shape[2:], {}                            # size -> sum of the maps of that size
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
        self.convs = nn.Sequential(conv_bn_relu(dims[3], channels, 3), conv_bn_relu(channels, channels, 3))
        self.fuse = conv_bn_relu(dims[3] + channels, channels, 3)

    def forward(self, levels):
        return self.fuse(torch.cat([levels[3], self.convs(levels[3])], dim=1))


class UPerHead(nn.Module):
    """Pyramid pooling on level 4, then a feature pyramid over all levels (UPerNet): -> (B,channels,h_1,w_1).

    Raises UserError for a training batch of one image: BatchNorm cannot normalise its single pooled pixel.
    """

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

    DeepLabv2 classifies level 4 itself, by four dilated 3x3 convolutions whose logits are added up; this
    makes the map before that classifier narrow enough for prototypes.
    """

    def __init__(self, dims, channels):
        super().__init__()
        self.reduce = conv_bn_relu(dims[3], channels, 1)

    def forward(self, levels):
        return self.reduce(levels[3])


class DeepLabv3PlusHead(nn.Module):
    """DeepLabv3+: dilated convolutions side by side on level 4, then level 1: -> (B,channels,h_1,w_1).

    The rates are 6, 12 and 18 at output stride 16 and twice that at 8 (DeepLabv3, Section 3.3). Convolutions
    are ordinary, not separable in depth. Dropout2d(0.5) follows the projection of the pyramid.
    Raises UserError for a training batch of one image: BatchNorm cannot normalise its single pooled pixel.
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
        raise UserError(f"the {head} head cannot train on a batch of one image (BatchNorm would see a single "
                        "pixel): use a batch size of 2 or more per process")


def auxiliary_head(dim, num_classes):
    """An ordinary FCN classifier for level 3 and an auxiliary loss: (B,C,h,w) -> logits (B,N,h,w)."""
    head = nn.Sequential(conv_bn_relu(dim, 256, 3), nn.Dropout2d(0.1), nn.Conv2d(256, num_classes, 1))
    head.apply(init_weights)
    nn.init.normal_(head[-1].weight, std=0.01)
    return head


# ---- the whole network -----------------------------------------------------------------------------------

class SegmentationNetwork(nn.Module):
    """.backbone, .head, .aux_head (or None), .channels of the features, .stride of the features in pixels."""

    def __init__(self, backbone, head, aux_head, channels, stride):
        super().__init__()
        self.backbone, self.head, self.aux_head = backbone, head, aux_head
        self.channels, self.stride = channels, stride

    def forward(self, x):
        """Images (B,3,H,W) -> features (B,channels,h,w), aux_logits (B,N,h',w') or None.

        h = H / stride, rounded up (Swin, ConvNeXt: down). Any size from 32 pixels a side will do. aux_logits
        are None in evaluation and under heads without an auxiliary head.
        """
        levels = self.backbone(x)
        aux_logits = self.aux_head(levels[2]) if self.aux_head is not None and self.training else None
        return self.head(levels), aux_logits


def build_network(backbone, head, num_classes, head_channels=0, weights="none", output_stride=8,
                  drop_path=None, last_stride=2):
    """A SegmentationNetwork by the names of its parts (the table at the top of this file).

    num_classes    for the auxiliary classifier only
    head_channels  width of the features; 0 = the default in the table
    weights        "none" (from scratch), "imagenet" (torchvision's IMAGENET1K_V1, downloaded by torchvision),
                   or path or http(s) URL of a state dict of the backbone, with or without its classifier
    output_stride  of level 4, 8 or 16: for the heads fcn, deeplabv2 and deeplabv3plus only
    drop_path      stochastic depth rate of the last block; None = mmsegmentation's for the backbone
    last_stride    of MiT's last patch embedding: 1 leaves level 4 at 1/16 of the image's sides, as PFA does

    Raises UserError for what does not go together, and for weights that cannot be read or do not fit.
    """
    if backbone not in GOES_WITH.get(head, ()):
        table = "; ".join(f"{name} with {', '.join(backbones)}" for name, backbones in GOES_WITH.items())
        raise UserError(f"head {head} does not go with backbone {backbone}; choose one of: {table}")
    if head in DILATED and output_stride not in (8, 16):
        raise UserError(f"output stride {output_stride} is not available: the {head} head takes 8 or 16")
    if drop_path and backbone not in DROP_PATH:
        raise UserError(f"{backbone} has no blocks to drop: leave drop_path at 0 or unset")
    if last_stride not in (1, 2):
        raise UserError(f"last stride {last_stride} is not available: MiT backbones take 1 or 2")
    if last_stride != 2 and backbone not in MIT:
        raise UserError(f"last stride {last_stride} is for MiT backbones only: leave it at 2 for {backbone}")
    drop_path = DROP_PATH.get(backbone, 0.0) if drop_path is None else drop_path
    channels = head_channels or {"mobilenet_v2": 256, "tiny": 64}.get(backbone, HEAD_CHANNELS[head])

    if backbone in MIT:
        body = MixTransformer(*MIT[backbone], heads=(1, 2, 5, 8), sr_ratios=(8, 4, 2, 1),
                              strides=(4, 2, 2, last_stride), drop_path=drop_path)
        load_weights(body, weights, backbone)
    elif backbone == "tiny":
        body = TinyBackbone()
        load_weights(body, weights, backbone)
    else:
        net = torchvision_classifier(backbone, output_stride if head in DILATED else 32)
        load_weights(net, weights, backbone)                            # before cutting: the keys still fit
        set_drop_path(net, drop_path)
        body = TorchvisionBackbone(net, backbone)

    heads = {"segformer": SegFormerHead, "fcn": FCNHead, "upernet": UPerHead, "mlp": MLPHead,
             "deeplabv2": DeepLabv2Head,
             "deeplabv3plus": partial(DeepLabv3PlusHead, output_stride=output_stride)}
    decoder = heads[head](body.dims, channels)
    if head != "mlp":                                                   # it initialises itself
        decoder.apply(init_weights)
    aux_head = auxiliary_head(body.dims[2], num_classes) if head in ("fcn", "upernet") else None
    stride = output_stride if head in ("fcn", "deeplabv2") else 4
    return SegmentationNetwork(body, decoder, aux_head, channels, stride)


# ---- networks for image classification -------------------------------------------------------------------

def build_extractor(backbone, weights="none"):
    """One of EXTRACTORS: images (B,3,H,W) -> features (B,channels,h,w); .channels of the features.

    h, w = H, W / 32, rounded up (7 for 224; DenseNet: 1 less for some sizes); tiny: H, W / 8, rounded up.
    These are torchvision's networks up to the global pooling, DenseNet's last ReLU included; tiny is the
    first two stages of TinyBackbone; resnet50_inat is a resnet50 for weights from iNaturalist 2017.

    weights: as in build_network. A file for resnet50_inat is the checkpoint of BBN (Zhou et al. 2020),
    BBN.iNaturalist2017.res50.180epoch.best_model.pth, of which the conventional branch is used.
    Raises UserError for another backbone, and for weights that cannot be read or do not fit.
    """
    if backbone not in EXTRACTORS:
        raise UserError(f"backbone {backbone} is not available: choose one of {', '.join(EXTRACTORS)}")
    if backbone == "tiny":
        net = TinyBackbone()
        load_weights(net, weights, backbone)
        extractor = nn.Sequential(*net.stages[:2])
        extractor.channels = net.dims[1]
        return extractor
    net = torchvision.models.get_model(backbone.removesuffix("_inat"), weights=None)
    load_weights(net, weights, backbone)
    parts = OrderedDict(net.named_children())
    classifier = parts.popitem()[1]                                     # the last of its parts
    parts.pop("avgpool", None)                                          # ResNet's; the others pool in forward
    if backbone.startswith("densenet"):
        parts["relu"] = nn.ReLU(inplace=True)                           # in forward too
    extractor = nn.Sequential(parts)
    extractor.channels = (classifier[-1] if backbone == "mobilenet_v2" else classifier).in_features
    return extractor


# ---- networks for a head of the paper's own ---------------------------------------------------------------

def build_dense(backbone, weights="none", output_stride=8, width=64):
    """One of DENSE: images (B,3,H,W) -> one map (B,channels,h,w), without a head; .channels and .stride.

    h = H / stride, rounded up; ResNets: (H + 1) // stride + 1, which is 65 for 512 and for 513. w likewise.
    ResNets end with layer4, mobilenet_v2 before its last 1x1 convolution, tiny with its fourth stage.

    weights        as in build_network; a file for unet is the state dict of a unet of the same width
    output_stride  the stride: 8 or 16, tiny also 4. The stride of unet is 1: say 1, or leave it at 8
    width          channels of unet's first level; 64 for all others, whose widths are fixed

    Raises UserError for another backbone, output_stride or width, and for weights that cannot be read or do
    not fit.
    """
    if backbone not in DENSE:
        raise UserError(f"backbone {backbone} is not available: choose one of {', '.join(DENSE)}")
    strides = {"unet": (1, 8), "tiny": (4, 8, 16)}.get(backbone, (8, 16))
    if output_stride not in strides:
        choice = ("1, or 8 (the default), which also gives 1" if backbone == "unet" else
                  ", ".join(map(str, strides[:-1])) + f" or {strides[-1]}")
        raise UserError(f"output stride {output_stride} is not available: {backbone} takes {choice}")
    if width < 1 or width != 64 and backbone != "unet":
        raise UserError(f"width {width} is not available for {backbone}: " + (
            "give 1 or more" if backbone == "unet" else "leave it at 64, it is unet's alone"))
    net = (UNet(width) if backbone == "unet" else TinyBackbone() if backbone == "tiny" else
           torchvision_classifier(backbone, 32))
    load_weights(net, weights, backbone)                                # before cutting: the keys still fit
    if backbone == "unet":
        return net
    if backbone == "tiny":
        dilate(net, output_stride)
        parts, channels = [("stages", nn.Sequential(*net.stages))], net.dims[3]
    elif backbone == "mobilenet_v2":
        dilate(net, output_stride)
        parts, channels = [("features", net.features[:18])], net.features[17].out_channels
    else:
        dilate_as_deeplab(net, output_stride)
        parts, channels = list(net.named_children())[:-2], net.fc.in_features   # without avgpool and fc
    dense = nn.Sequential(OrderedDict(parts))
    dense.channels, dense.stride = channels, output_stride
    return dense


# ---- pretrained weights ----------------------------------------------------------------------------------

def load_weights(net, weights, backbone):
    """Fill a backbone, before it is cut, from what `weights` of build_network stands for."""
    if weights == "none":
        return
    state = read_state_dict(locate_weights(str(weights), backbone))
    if backbone in MIT:
        load_mit_weights(net, state, source=weights)
    elif backbone == "resnet50_inat":
        load_fitting(net, conventional_branch(state), source=weights)
    elif backbone.startswith("densenet"):                               # norm.1 in the files, norm1 by now
        state = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", name): value
                 for name, value in state.items()}
        load_fitting(net, state, source=weights)
    else:
        load_fitting(net, state, source=weights)


def locate_weights(weights, backbone):
    """The path or URL behind `weights`; UserError if there is none."""
    if weights == "imagenet" and backbone in torchvision.models.list_models():
        return torchvision.models.get_model_weights(backbone).IMAGENET1K_V1.url
    if weights == "imagenet" and backbone in MIT:
        raise UserError(f"torchvision has no ImageNet weights for {backbone}: give the path or URL of the "
                        f"original {backbone}.pth or of pytorch_model.bin from HuggingFace's "
                        f"nvidia/{backbone.replace('_', '-')}")
    if weights == "imagenet" and backbone == "resnet50_inat":
        raise UserError("resnet50_inat has weights from iNaturalist 2017, not ImageNet: give the path or URL "
                        "of BBN.iNaturalist2017.res50.180epoch.best_model.pth, or none")
    if weights == "imagenet":
        raise UserError(f"there are no ImageNet weights for {backbone}: train it from scratch (weights none)")
    if weights.split("?")[0].endswith(".safetensors"):
        raise UserError(f"{weights}: reading .safetensors would take another package; use the .bin or .pth "
                        "file of the same model")
    if not weights.startswith(("http://", "https://")) and not Path(weights).is_file():
        raise UserError(f"{weights}: no such file; weights are none, imagenet, or the path or http(s) URL of "
                        "a state dict")
    return weights


def read_state_dict(source):
    """The state dict (names and tensors, on the CPU) in a file or behind a URL, else UserError."""
    try:
        if source.startswith(("http://", "https://")):
            name = source.split("?")[0].rsplit("/", 1)[-1]
            if not source.startswith("https://download.pytorch.org/"):  # many are called pytorch_model.bin:
                name = hashlib.sha256(source.encode()).hexdigest()[:8] + "_" + name   # one cache entry each
            state = torch.hub.load_state_dict_from_url(source, file_name=name, map_location="cpu",
                                                       weights_only=True)
        else:
            state = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:                       # whatever pickle, zip, disk or network may come up with
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{source}: cannot read these weights ({reason}); check the file or the connection, "
                        f"delete a broken download from {torch.hub.get_dir()}/checkpoints, or give a path")
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{source}: holds no state dict (names and tensors); write one with "
                        "torch.save(model.state_dict(), path)")
    return state


def load_mit_weights(model, state_dict, source="state dict"):
    """Load a MixTransformer from tensors named as in the original release or by HuggingFace, all or none.

    Classifier and decoder (head.*, classifier.*, decode_head.*) are left out. HuggingFace's "segformer." in
    front may be absent; its separate keys and values are joined into kv.
    Raises UserError if a name or shape does not fit.
    """
    if any(re.match(r"(backbone\.)?layers\.\d\.[012]\.", name) for name in state_dict):
        raise UserError(f"{source}: these names (layers.0.0.projection ...) are mmsegmentation's; use the "
                        "original mit_b*.pth or HuggingFace's nvidia/mit-b* instead")
    state = {original_mit_name(name): value for name, value in state_dict.items()}
    for key in [name for name in state if ".attn.key." in name]:
        value = key.replace(".key.", ".value.")
        if value in state and state[value].shape == state[key].shape:
            state[key.replace(".key.", ".kv.")] = torch.cat([state.pop(key), state.pop(value)])
    load_fitting(model, state, source)


def original_mit_name(name):
    """segformer.encoder.block.0.1.attention.self.query.bias -> block1.1.attn.q.bias; other names stay."""
    match = re.match(r"(?:segformer\.)?encoder\.(patch_embeddings|block|layer_norm)\.(\d+)\.(.+)", name)
    if match is None:
        return name
    part = {"patch_embeddings": "patch_embed", "block": "block", "layer_norm": "norm"}[match[1]]
    stage, rest = int(match[2]) + 1, match[3]                               # they count stages from 0
    for theirs, ours in (("attention.self.query", "attn.q"), ("attention.self.", "attn."),
                         ("attention.output.dense", "attn.proj"), ("mlp.dense", "mlp.fc"),
                         ("layer_norm_", "norm"), ("layer_norm", "norm")):
        rest = rest.replace(theirs, ours)
    return f"{part}{stage}.{rest}"


def conventional_branch(state):
    """The ResNet-50 in a checkpoint of BBN under torchvision's names.

    module.backbone.cb_block is the last block of layer4. What does not start with module.backbone. (the
    classifier) and module.backbone.rb_block (the branch for rare classes) are left out.
    """
    prefix = "module.backbone."
    names = [name for name in state if name.startswith(prefix) and not name.startswith(prefix + "rb_block.")]
    return {re.sub("^cb_block", "layer4.2", name.removeprefix(prefix)): state[name] for name in names}


def load_fitting(model, state, source):
    """Load state into model if all names and shapes fit, classifiers aside; else load nothing, UserError."""
    own = {name: value for name, value in model.state_dict().items() if not name.startswith(CLASSIFIER_KEYS)}
    state = {name: value for name, value in state.items() if not name.startswith(CLASSIFIER_KEYS)}
    differing = {
        "missing": [name for name in own if name not in state and not name.endswith("num_batches_tracked")],
        "unexpected": [name for name in state if name not in own],
        "of another shape": [name for name in own if name in state and state[name].shape != own[name].shape],
    }
    problems = [f"{len(names)} {what}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
                for what, names in differing.items() if names]
    if problems:
        raise UserError(f"{source}: these weights belong to another network, nothing was loaded "
                        f"({'; '.join(problems)}); choose the backbone that they were made for")
    model.load_state_dict(state, strict=False)     # only classifiers and BatchNorm's counters can be missing
