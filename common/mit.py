"""Mix Transformer: the encoder of SegFormer (Xie et al. 2021, Section 3.1), and the initialisation.

Maps travel as (B,h,w,C): LayerNorm and Linear act on the last dimension, and the permutation to (B,C,h,w)
for a convolution is a view in channels_last order. Parameters are named as in the original release, which
also uses two eps: 1e-6 in the blocks and at the end of a stage, torch's 1e-5 after strided convolutions.
"""
from collections import OrderedDict

import torch.nn as nn
import torch.nn.functional as F
from torchvision.ops import StochasticDepth

MIT = {                                                        # channels and blocks of the four stages
    "mit_b0": ((32, 64, 160, 256), (2, 2, 2, 2)),
    "mit_b1": ((64, 128, 320, 512), (2, 2, 2, 2)),
    "mit_b2": ((64, 128, 320, 512), (3, 4, 6, 3)),
    "mit_b3": ((64, 128, 320, 512), (3, 4, 18, 3)),
    "mit_b4": ((64, 128, 320, 512), (3, 8, 27, 3)),
    "mit_b5": ((64, 128, 320, 512), (3, 6, 40, 3)),
}


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
        self.dwconv = nn.Sequential(OrderedDict(dwconv=dwconv))         # named as in the release
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
    1/16 and 1/32 of the image's sides, rounded up. drop_path: see set_drop_path. Sides below 29 pixels are
    too small for sr_ratios of (8, 4, 2, 1).
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
        x = x.permute(0, 2, 3, 1)                                       # (B,H,W,3)
        levels = []
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
        fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
        nn.init.ones_(module.weight)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
