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

build_extractor and build_dense give a backbone without a head: one map of 1/32 or about 1/8 of the sides.

    channels         tiny  mobilenet_v2  resnet34  larger ResNets  densenet121  densenet161  unet
    build_extractor  48    1280          512       2048            1024         2208         -
    build_dense      64    320           -         2048            -            -            64

Sources: SegFormer (Xie et al. 2021), UPerNet (Xiao et al. 2018), FCN (Long et al. 2015), DeepLabv2 and
DeepLabv3+ (both Chen et al. 2018; the ResNets of build_dense are DeepLabv2's), U-Net (Ronneberger et al.
2015). mlp and the DeepLab heads serve PFA (Chan et al. 2024), with 256 channels for every MiT. Beyond that
the widths of heads, initialisation, drop rates and auxiliary heads are mmsegmentation's. Departures from it:
- ResNet is torchvision's, with a 7x7 stem; mmsegmentation's FCN uses ResNet-V1c, whose stem is three 3x3
  convolutions, for which torchvision has no weights.
- The first block of a dilated mobilenet_v2 stage keeps the dilation of the stage before it, as ResNet's
  does: pretrained filters then see the neighbours that they were trained on. The ResNets of build_dense
  dilate it too, as DeepLabv2 does, but stride in its 3x3 convolution and not in the 1x1 before it: that is
  where torchvision trained them.
- Swin and ConvNeXt do not pad the image: if a side is no multiple of 4, up to 3 rows or columns are lost.
Pretrained MiT weights are NVIDIA's, for non-commercial use only.
"""
import bisect
from collections import OrderedDict
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torchvision.models.convnext import LayerNorm2d
from tqdm import tqdm

from common.heads import (DeepLabv2Head, DeepLabv3PlusHead, FCNHead, MLPHead, SegFormerHead, UPerHead,
                          auxiliary_head, conv_bn_relu, double_conv)
from common.mit import MIT, MixTransformer, init_weights, set_drop_path
from common import run
from common.run import UserError
from common.transforms import ENOUGH
from common.weights import load_mit_weights, load_weights  # noqa: F401, goes with MixTransformer

CHANNELS = {                                                   # of the four levels
    "resnet50": (256, 512, 1024, 2048), "resnet101": (256, 512, 1024, 2048),
    "swin_t": (96, 192, 384, 768), "swin_s": (96, 192, 384, 768), "swin_b": (128, 256, 512, 1024),
    "convnext_tiny": (96, 192, 384, 768), "convnext_small": (96, 192, 384, 768),
    "convnext_base": (128, 256, 512, 1024),
    "mobilenet_v2": (24, 32, 96, 320), "tiny": (32, 48, 64, 64),
}
DROP_PATH = {name: 0.1 for name in MIT} | {
    "swin_t": 0.3, "swin_s": 0.3, "swin_b": 0.3,
    "convnext_tiny": 0.4, "convnext_small": 0.3, "convnext_base": 0.4,
}
TRANSFORMERS, RESNETS = (*MIT, "mobilenet_v2", "tiny"), ("resnet50", "resnet101", "mobilenet_v2")
GOES_WITH = {
    "segformer": TRANSFORMERS, "fcn": RESNETS,
    "upernet": ("swin_t", "swin_s", "swin_b", "convnext_tiny", "convnext_small", "convnext_base",
                "mobilenet_v2"),
    "mlp": TRANSFORMERS, "deeplabv2": RESNETS, "deeplabv3plus": RESNETS,
}
DILATED = ("fcn", "deeplabv2", "deeplabv3plus")                # heads whose backbone has an output_stride
EXTRACTORS = ("tiny", "tiny_local", "mobilenet_v2", "resnet34", "resnet50", "resnet50_inat", "resnet152",
              "densenet121", "densenet161")
DENSE = ("resnet101", "resnet50", "mobilenet_v2", "unet", "tiny")


# ---- other backbones -------------------------------------------------------------------------------------

class TorchvisionBackbone(nn.Module):
    """A torchvision classifier cut in four: images (B,3,H,W) -> list of four maps (B,dims[i],h_i,w_i).

    Swin and ConvNeXt get a LayerNorm on each level, as in mmsegmentation; in their stages[i], [0] is the
    stem or the downsampling and [1] holds the blocks.
    """

    def __init__(self, net, name):
        super().__init__()
        self.dims = CHANNELS[name]
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
    """torchvision's network from scratch; ResNets and mobilenet_v2 dilated for output_stride 8 or 16."""
    if name.startswith("resnet"):
        dilated = [False, output_stride <= 8, output_stride <= 16]
        return torchvision.models.get_model(name, weights=None, replace_stride_with_dilation=dilated)
    net = torchvision.models.get_model(name, weights=None)
    if name == "mobilenet_v2":
        dilate(net, output_stride)
    return net


def cuts_of(net, name, used):
    """For load_weights: the used parts of a torchvision classifier, and these as build_network cuts them."""
    cut = name in CHANNELS and name != "tiny"
    return [used, *([TorchvisionBackbone(net, name)] if cut else [])]


def dilate(net, output_stride):
    """Trade the strides beyond output_stride for dilation: the strided network's values on a finer grid.
    For a chain of 3x3 convolutions in which nothing else strides (mobilenet_v2, TinyBackbone); in place."""
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
        second = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.convs = nn.Sequential(conv_bn_relu(dim, dim, 3), second, nn.BatchNorm2d(dim))

    def forward(self, x):
        return F.relu(x + self.convs(x))


class TinyBackbone(nn.Module):
    """A small residual network for toy pictures of about 128x128 pixels, quick on a CPU.
    Images (B,3,H,W) -> list of four maps with 1/4, 1/8, 1/16 and 1/16 of the image's sides, rounded up."""

    def __init__(self):
        super().__init__()
        self.dims = CHANNELS["tiny"]
        self.stages = nn.Sequential(
            nn.Sequential(conv_bn_relu(3, 16, 3, 2), conv_bn_relu(16, 32, 3, 2), ResidualBlock(32)),
            nn.Sequential(conv_bn_relu(32, 48, 3, 2), ResidualBlock(48)),
            nn.Sequential(conv_bn_relu(48, 64, 3, 2), ResidualBlock(64)),
            nn.Sequential(conv_bn_relu(64, 64, 3), ResidualBlock(64)))
        self.apply(init_weights)

    def forward(self, x):
        levels = [x]
        for stage in self.stages:
            levels.append(stage(levels[-1]))
        return levels[1:]


class UNet(nn.Module):
    """U-Net with padded convolutions and BatchNorm: images (B,3,H,W) -> (B,64,H,W), of any size.

    The five levels have width, 2, 4, 8 and 16 * width channels. If a side is odd, its last pixel is pooled
    alone, and what comes back up is cropped.
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


# ---- the whole network -----------------------------------------------------------------------------------

class SegmentationNetwork(nn.Module):
    """.backbone, .head, .aux_head (or None), .channels of the features, .stride of the features (pixels)."""

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
    weights        "none" (from scratch), "imagenet" (torchvision's IMAGENET1K_V1, which is downloaded),
                   or path or http(s) URL of a state dict of the backbone, with or without its classifier
    output_stride  of level 4, 8 or 16: for the heads fcn, deeplabv2 and deeplabv3plus only
    drop_path      stochastic depth rate of the last block; None = mmsegmentation's for the backbone
    last_stride    of MiT's last patch embedding: 1 leaves level 4 at 1/16 of the image's sides, as PFA does

    Raises UserError for what does not go together, and for weights that cannot be read or do not fit.
    """
    if backbone not in GOES_WITH.get(head, ()):
        known = GOES_WITH.get(head)
        raise UserError(f"the head {head} goes with {', '.join(known)}, not with {backbone}" if known else
                        f"there is no head {head}: choose one of {', '.join(GOES_WITH)}")
    if head in DILATED and output_stride not in (8, 16):
        raise UserError(f"output stride {output_stride} is not available: the {head} head takes 8 or 16")
    if drop_path and backbone not in DROP_PATH:
        raise UserError(f"{backbone} has no blocks to drop: leave drop_path at 0 or unset")
    if last_stride not in (1, 2):
        raise UserError(f"last stride {last_stride} is not available: MiT backbones take 1 or 2")
    if last_stride != 2 and backbone not in MIT:
        raise UserError(f"last stride {last_stride} is for MiT backbones only: leave it at 2 for {backbone}")
    drop_path = DROP_PATH.get(backbone, 0.0) if drop_path is None else drop_path
    usual = 512 if head in ("fcn", "upernet") else 256
    channels = head_channels or {"mobilenet_v2": 256, "tiny": 64}.get(backbone, usual)

    if backbone in MIT:
        body = MixTransformer(*MIT[backbone], heads=(1, 2, 5, 8), sr_ratios=(8, 4, 2, 1),
                              strides=(4, 2, 2, last_stride))
    elif backbone == "tiny":
        body = TinyBackbone()
    else:
        body = torchvision_classifier(backbone, output_stride if head in DILATED else 32)
    set_drop_path(body, drop_path)
    if backbone in MIT or backbone == "tiny":
        load_weights(body, weights, backbone)
    else:
        net, body = body, TorchvisionBackbone(body, backbone)
        load_weights(net, weights, backbone, cuts=[body])

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
    first two stages of TinyBackbone, of which a cell sees 63 pixels a side; tiny_local lacks the last block,
    and a cell sees 31; resnet50_inat is a resnet50 for the checkpoint of BBN (Zhou et al. 2020),
    BBN.iNaturalist2017.res50.180epoch.best_model.pth, of which it takes the conventional branch.

    weights: as in build_network. Raises UserError for another backbone, and for weights that cannot be
    read or do not fit.
    """
    if backbone not in EXTRACTORS:
        raise UserError(f"backbone {backbone} is not available: choose one of {', '.join(EXTRACTORS)}")
    name = backbone.removesuffix("_inat")
    is_tiny = name in ("tiny", "tiny_local")
    net = TinyBackbone() if is_tiny else torchvision.models.get_model(name, weights=None)
    if is_tiny:
        second = net.stages[1] if name == "tiny" else net.stages[1][:1]
        extractor = nn.Sequential(net.stages[0], second)
        extractor.channels = net.dims[1]
        load_weights(net, weights, backbone, cuts=[extractor])
        return extractor
    parts = OrderedDict(net.named_children())
    classifier = parts.popitem()[1]                                     # the last of its parts
    parts.pop("avgpool", None)                                          # ResNet's; others pool in forward
    if backbone.startswith("densenet"):
        parts["relu"] = nn.ReLU(inplace=True)                           # in forward too
    extractor = nn.Sequential(parts)
    load_weights(net, weights, backbone, cuts=cuts_of(net, backbone, extractor))
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
        raise UserError(f"output stride {output_stride} is not available: {backbone} takes one of "
                        f"{', '.join(map(str, strides))}")
    if width < 1 or (width != 64 and backbone != "unet"):
        raise UserError(f"width {width} is not available for {backbone}: unet takes 1 or more, others 64")
    if backbone == "unet":
        dense = UNet(width)
        load_weights(dense, weights, backbone)
        return dense
    net = TinyBackbone() if backbone == "tiny" else torchvision_classifier(backbone, 32)
    if backbone.startswith("resnet"):
        dilate_as_deeplab(net, output_stride)
        dense = nn.Sequential(OrderedDict(list(net.named_children())[:-2]))     # without avgpool and fc
    else:
        dilate(net, output_stride)
        parts = dict(stages=net.stages) if backbone == "tiny" else dict(features=net.features[:18])
        dense = nn.Sequential(OrderedDict(parts))
    load_weights(net, weights, backbone, cuts=cuts_of(net, backbone, dense))
    dense.channels = CHANNELS[backbone][3]
    dense.stride = output_stride
    return dense


# ---- how small an image may be ----------------------------------------------------------------------------

def fits(net, height, width, batch=1):
    """Does a batch of images of this size go through the network? In training mode batch norm may object."""
    x = torch.zeros(batch, 3, height, width)
    try:
        with torch.no_grad():
            net(x)
    except (RuntimeError, ValueError):                   # of a convolution, and of batch norm
        return False
    return True


def least_side(net, batch=1):
    """The smallest side of a square image that goes through the network, at most ENOUGH."""
    return 1 + bisect.bisect_left(range(1, ENOUGH), True, key=lambda side: fits(net, side, side, batch))


def check_side(build, side, option, name, batch=0):
    """UserError if side x side pixels are too few for the network that build() returns: to train on `batch`
    images at once, or with 0 to evaluate. Tried out, as the images are so small; the RNG stays as it was."""
    if side >= ENOUGH:
        return
    with torch.random.fork_rng(devices=[]):
        net = build().train(batch > 0)
        if side and fits(net, side, side, max(1, batch)):
            return
        least = least_side(net, max(1, batch))
    alone = " to train on one image at a time (batch norm)" if batch == 1 else ""
    raise UserError(f"{option} {side}: {name} needs {least} pixels or more{alone}.")


def check_sides(build, cfg):
    """check_side for --crop, --window and --input-scales."""
    sides = [("crop", cfg.crop, run.batch_of_process(cfg))]             # 0 images: not trained on
    if cfg.window:
        sides.append(("window", cfg.window, 0))
    for scale in (1, *getattr(cfg, "input_scales", ())):
        for name, side, images in sides:
            shrunk = f"--input-scales {scale:g} shrinks a {name} of {side} to" if scale != 1 else f"--{name}"
            check_side(build, int(side * scale), shrunk, cfg.backbone, images)
    if 0 < cfg.window < 32:
        raise UserError(f"--window {cfg.window}: too small to tell anything from: take 32 or more, best the "
                        "size of the crops.")
    if 0 < getattr(cfg, "size", 0) < 32:
        raise UserError(f"--size {cfg.size}: too small to tell anything from: take 32 or more, or 0 for "
                        "images as they are.")


# ---- what optimizers have to know of a backbone's parts ---------------------------------------------------

def parameter_groups(net, backbone, lr, head_lr, weight_decay, stage_decay=1.0, decay_all=False):
    """Learning rate and weight decay of every parameter of net, by mmsegmentation's rules: optimizer groups.

    backbone: the part of net that learns with lr; all else learns head_lr times faster. decay_all: without
    exemptions (SGD); else LayerNorm and Swin's position tables do not decay (AdamW). stage_decay, if not 1,
    is for ConvNeXt: lr x stage_decay^k, k = 13 for stem and downsampling and 12 - i for stage i; what is 1-d
    and layer_scale do not decay then either.
    """
    path_of = {module: name.split(".") for name, module in backbone.named_modules()}    # stages.i.(0|1)...
    groups = {}
    for module in net.modules():
        for name, parameter in module.named_parameters(recurse=False):
            rate = lr
            if module not in path_of:
                rate = lr * head_lr
            elif stage_decay != 1 and path_of[module][0] == "stages":
                _, stage, part = path_of[module][:3]
                rate = lr * stage_decay ** (13 if part == "0" else 12 - int(stage))
            exempt = isinstance(module, nn.LayerNorm) or name == "relative_position_bias_table"
            if stage_decay != 1:
                exempt = exempt or parameter.ndim == 1 or name == "layer_scale"
            decay = 0.0 if exempt and not decay_all else weight_decay
            groups.setdefault((rate, decay), []).append(parameter)
    return [dict(params=params, lr=rate, weight_decay=decay) for (rate, decay), params in groups.items()]


def norm_parameters(backbone, kinds=(nn.BatchNorm2d, nn.SyncBatchNorm)):
    """Weights and biases of the norms of these kinds: list, in the order of the backbone's parameters."""
    return [parameter for module in backbone.modules() if isinstance(module, kinds)
            for parameter in module.parameters()]


@torch.no_grad()
def class_means_of_backbone(network, loader, num_classes, device):
    """Mean of the last level of network.backbone over the pixels of each class -> (N,C4) on the CPU, 0 for a
    class without a pixel. loader: whole images, one a batch; labels shrink to the level by nearest."""
    total = 0
    network.eval()
    for batch in tqdm(loader, desc="class means", leave=False, disable=None):
        deepest = network.backbone(batch["image"].to(device))[-1].float()                # (1,C4,h,w)
        labels = F.interpolate(batch["mask"][:, None].to(device).float(), deepest.shape[2:], mode="nearest")
        pixels = deepest.permute(0, 2, 3, 1).flatten(0, 2)                               # (h*w,C4)
        pixels = torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1)                  # the ones count
        sums = pixels.new_zeros(num_classes + 1, pixels.shape[1])                        # last row: ignored
        total += sums.index_add(0, labels.flatten().long().clamp(max=num_classes), pixels)
    return (total[:-1, :-1] / total[:-1, -1:].clamp(min=1)).cpu()
