"""common/{backbones,mit,heads,weights}.py: shapes, the arithmetic of MiT and of the heads, weights.

Nothing is downloaded. Networks whose values do not matter are built on torch's "meta" device, which knows
shapes but holds no numbers.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.utils.flop_counter import FlopCounterMode

from common import backbones, heads
from common.backbones import DENSE, EXTRACTORS, GOES_WITH, build_dense, build_extractor, build_network
from common.mit import MixBlock, MixTransformer
from common.run import UserError
from common.weights import load_mit_weights

PAIRS = [(backbone, head) for head, names in GOES_WITH.items() for backbone in names
         if head != "mlp" or backbone not in ("mit_b2", "mit_b3", "mit_b4", "mit_b5")]   # as with segformer
MIT_BLOCKS = ((2, 2, 2, 2), (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 18, 3), (3, 8, 27, 3), (3, 6, 40, 3))


WIDE = ("fcn", "upernet")                                # 512 channels and an auxiliary head; the others: 256


def build_on_meta(backbone, head, **options):
    with torch.device("meta"):
        return build_network(backbone, head, 150, **options)


def gmacs(compute):
    """Billions of multiply-adds of convolutions and linear layers, attention's products left out."""
    with FlopCounterMode(display=False) as counter:
        compute()
    flops = counter.get_flop_counts()["Global"]                         # torch counts 2 per multiply-add
    return sum(n for op, n in flops.items() if "attention" not in str(op) and "bmm" not in str(op)) / 2e9


def count(module):
    return sum(p.numel() for p in module.parameters())


def shapes_of(state):
    return {name: tuple(value.shape) for name, value in state.items()}


def small_mit(**options):
    return MixTransformer((8, 16, 24, 32), (1, 2, 1, 1), (1, 2, 3, 4), (8, 4, 2, 1), **options)


# ---- size ------------------------------------------------------------------------------------------------

def mit_parameters(size):
    """Every parameter of MiT-B`size`, counted from the table in the SegFormer paper."""
    dims = (32, 64, 160, 256) if size == 0 else (64, 128, 320, 512)
    total, before = 0, 3
    for c, blocks, reduction, kernel in zip(dims, MIT_BLOCKS[size], (8, 4, 2, 1), (7, 3, 3, 3)):
        patch = kernel ** 2 * before * c + c + 2 * c
        attention = 4 * (c * c + c) + (reduction ** 2 * c * c + c + 2 * c if reduction > 1 else 0)
        ffn = (c * 4 * c + 4 * c) + (9 * 4 * c + 4 * c) + (4 * c * c + c)
        total += patch + blocks * (attention + ffn + 4 * c) + 2 * c
        before = c
    return total


@pytest.mark.parametrize("size, encoder, millions", [
    (0, 3_319_392, 3.754), (1, 13_151_424, 13.717), (2, 24_196_288, 24.762),
    (3, 44_072_128, 44.638), (4, 60_842_688, 61.408), (5, 81_443_008, 82.008)])
def test_segformer_has_the_published_number_of_parameters(size, encoder, millions):
    network = build_on_meta(f"mit_b{size}", "segformer")
    assert count(network.backbone) == mit_parameters(size) == encoder
    dims = (32, 64, 160, 256) if size == 0 else (64, 128, 320, 512)
    head = sum(dims) * 256 + 4 * 2 * 256 + 4 * 256 * 256 + 2 * 256
    assert count(network.head) == head
    assert round((count(network) + 256 * 150 + 150) / 1e6, 3) == millions   # with a 150-class 1x1 classifier


@pytest.mark.parametrize("backbone, millions", [
    ("swin_t", 60), ("swin_s", 81), ("swin_b", 121),
    ("convnext_tiny", 60), ("convnext_small", 82), ("convnext_base", 122)])
def test_upernet_has_the_size_printed_in_the_swin_and_convnext_papers(backbone, millions):
    network = build_on_meta(backbone, "upernet")
    assert round((count(network) + 512 * 150 + 150) / 1e6) == millions   # their count includes the aux head


def test_segformer_b5_takes_75_gmac_at_512():
    network = build_on_meta("mit_b5", "segformer").eval()
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, 512, 512, device="meta"))
    gmac = counter.get_total_flops() / 2 / 1e9 + 128 * 128 * 256 * 150 / 1e9   # torch counts 2 per MAC
    assert gmac == pytest.approx(75.1, rel=0.01)


@pytest.mark.parametrize("size, parameters, gmac, published", [
    (0, 3_719_541, None, None), (1, 13_682_645, 19.35, 19.4), (2, 24_727_509, None, None),
    (3, 44_603_349, 44.38, 44.5), (4, 61_373_909, None, None), (5, 81_974_229, 72.70, 72.9)])
def test_pfa_segformers_have_the_parameters_and_gmacs_of_table_3(size, parameters, gmac, published):
    """PFA prints 13.6, 44.6 and 82.0 M for B1, B3 and B5; for 21 classes and a 512x512 image."""
    network = build_on_meta(f"mit_b{size}", "mlp", last_stride=1).eval()
    assert count(network) + 256 * 21 + 21 == parameters
    if gmac:
        images = torch.empty(1, 3, 512, 512, device="meta")
        as_released = gmacs(lambda: mlp_as_released(network.head, network.backbone(images)))
        as_released += 128 * 128 * 256 * 21 / 1e9
        assert as_released == pytest.approx(gmac, abs=0.006)
        assert as_released == pytest.approx(published, rel=0.003)


def test_the_mlp_head_saves_the_fusion_on_the_fine_grid():
    network, images = build_on_meta("mit_b1", "mlp").eval(), torch.empty(1, 3, 512, 512, device="meta")
    as_released = gmacs(lambda: mlp_as_released(network.head, network.backbone(images)))
    assert as_released + 128 * 128 * 256 * 21 / 1e9 == pytest.approx(13.3, abs=0.06)   # with last_stride 2
    fusion = 128 * 128 * 4 * 256 * 256 / 1e9
    assert as_released - gmacs(lambda: network(images)) == pytest.approx(fusion, abs=0.1)


def test_deeplabv3plus_has_the_size_of_the_usual_one_with_a_deep_stem():
    """That is 59.47 M parameters; 95.7 GMAC at output stride 16 and 267 at 8 for a 512x512 image."""
    network = build_on_meta("resnet101", "deeplabv3plus")
    assert count(network.backbone) == 42_500_160                        # ResNet-101 without its classifier
    stem = 9 * (3 * 64 + 64 * 64 + 64 * 128) - 49 * 3 * 64              # three 3x3 instead of the 7x7
    layer1 = 64 * (64 + 256)                                            # which then reads 64 channels more
    norms = 2 * (64 + 64 + 128 - 64)
    parameters = count(network) + stem + layer1 + norms + 256 * 21 + 21
    assert round(parameters / 1e6, 2) == 59.47
    images = torch.empty(1, 3, 512, 512, device="meta")
    rest = (256 * 256 * stem + 128 * 128 * (layer1 + 256 * 21)) / 1e9
    for output_stride, published, digits in ((16, 95.7, 1), (8, 267, 0)):
        network = build_on_meta("resnet101", "deeplabv3plus", output_stride=output_stride).eval()
        assert round(gmacs(lambda: network(images)) + rest, digits) == published


def test_deeplabv2_adds_one_1x1_convolution_and_its_norm():
    for backbone, body, width in (("resnet101", 42_500_160, 2048), ("resnet50", 23_508_032, 2048),
                                  ("mobilenet_v2", 1_811_712, 320)):
        network = build_on_meta(backbone, "deeplabv2")
        assert count(network.backbone) == body and count(network.head) == width * 256 + 2 * 256


def test_tiny_is_tiny_and_as_wide_as_its_head():
    network = build_network("tiny", "segformer", 10)
    assert 200_000 < count(network) < 400_000
    assert network.channels == network.backbone.dims[3] == 64


# ---- shapes ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("backbone, head", PAIRS)
def test_shapes_of_every_pair(backbone, head):
    network = build_on_meta(backbone, head)
    channels = 64 if backbone == "tiny" else 512 if head in WIDE and backbone != "mobilenet_v2" else 256
    stride = 8 if head in ("fcn", "deeplabv2") else 4
    whole = math.floor if backbone.startswith(("swin", "convnext")) else math.ceil
    assert (network.channels, network.stride) == (channels, stride)
    for height, width in ((101, 77), (360, 480)):
        images = torch.empty(2, 3, height, width, device="meta")
        features, aux_logits = network.train()(images)
        assert features.shape == (2, channels, whole(height / stride), whole(width / stride))
        if head not in WIDE:
            assert aux_logits is None and network.aux_head is None
        else:
            level3 = network.backbone(images)[2]
            assert aux_logits.shape == (2, 150, *level3.shape[2:])
    features, aux_logits = network.eval()(images)
    assert aux_logits is None                                           # the auxiliary head only trains

    images = torch.empty(1, 3, 128, 256, device="meta")
    dilated = head in ("fcn", "deeplabv2", "deeplabv3plus")
    strides = (4, 8, 8, 8) if dilated else (4, 8, 16, 16) if backbone == "tiny" else (4, 8, 16, 32)
    assert [tuple(level.shape[1:]) for level in network.backbone(images)] == [
        (dim, 128 // s, 256 // s) for dim, s in zip(network.backbone.dims, strides)]


@pytest.mark.parametrize("head, stride, size", [("fcn", 16, (7, 5)), ("deeplabv2", 16, (7, 5)),
                                                ("deeplabv3plus", 4, (26, 20))])
@pytest.mark.parametrize("backbone", ["resnet50", "resnet101", "mobilenet_v2"])
def test_output_stride_16(backbone, head, stride, size):
    network = build_on_meta(backbone, head, output_stride=16)
    assert network.stride == stride
    images = torch.empty(2, 3, 101, 77, device="meta")
    assert network(images)[0].shape[2:] == size
    sizes = [tuple(level.shape[2:]) for level in network.backbone(images)]
    assert sizes == [(26, 20), (13, 10), (7, 5), (7, 5)]


@pytest.mark.parametrize("height, width", [(101, 77), (512, 333), (32, 45)])
def test_last_stride_of_1_leaves_level_4_as_fine_as_level_3(height, width):
    network = build_on_meta("mit_b1", "mlp", last_stride=1)
    images = torch.empty(1, 3, height, width, device="meta")
    sizes = [(math.ceil(height / s), math.ceil(width / s)) for s in (4, 8, 16, 16)]
    assert [tuple(level.shape[1:]) for level in network.backbone(images)] == [
        (dim, *size) for dim, size in zip((64, 128, 320, 512), sizes)]
    assert network.stride == 4 and network(images)[0].shape == (1, 256, *sizes[0])


def test_head_channels_set_the_width_of_the_features():
    for backbone, head in (("mit_b1", "segformer"), ("mobilenet_v2", "fcn"), ("swin_t", "upernet"),
                           ("mit_b1", "mlp"), ("mobilenet_v2", "deeplabv2"), ("resnet50", "deeplabv3plus")):
        network = build_on_meta(backbone, head, head_channels=96)
        features, _ = network(torch.empty(2, 3, 64, 64, device="meta"))
        assert features.shape[1] == network.channels == 96


@pytest.mark.parametrize("backbone, head", [
    ("tiny", "segformer"), ("mit_b0", "segformer"), ("mobilenet_v2", "segformer"), ("mobilenet_v2", "fcn"),
    ("mobilenet_v2", "upernet"), ("resnet50", "fcn"), ("swin_t", "upernet"), ("convnext_tiny", "upernet"),
    ("tiny", "mlp"), ("mit_b0", "mlp"), ("mobilenet_v2", "mlp"), ("mobilenet_v2", "deeplabv2"),
    ("mobilenet_v2", "deeplabv3plus")])
def test_trains_in_channels_last_and_bf16_and_reaches_every_parameter(backbone, head):
    torch.manual_seed(0)
    network = build_network(backbone, head, 5, head_channels=32, drop_path=0.0)
    network = network.to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, aux_logits = network(images)
    loss = features.float().square().mean()
    if aux_logits is not None:
        loss = loss + aux_logits.float().square().mean()
    loss.backward()
    for name, p in network.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name


@pytest.mark.parametrize("backbone", ["swin_t", "convnext_tiny"])
def test_every_level_of_swin_and_convnext_is_normalised(backbone):
    torch.manual_seed(0)
    network = build_network(backbone, "upernet", 5, head_channels=8).eval()
    with torch.no_grad():
        for level in network.backbone(torch.randn(1, 3, 64, 64)):
            assert level.mean(1).abs().max() < 1e-3
            assert (level.std(1, correction=0) - 1).abs().max() < 1e-2


def test_memory_format_does_not_change_the_values():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 70, 90)
    for backbone in ("mit_b0", "tiny"):
        network = build_network(backbone, "segformer", 5).eval()
        with torch.no_grad():
            plain = network(images)[0]
            last = network.to(memory_format=torch.channels_last)(
                images.contiguous(memory_format=torch.channels_last))[0]
        torch.testing.assert_close(plain, last, rtol=1e-4, atol=1e-4)


# ---- MiT -------------------------------------------------------------------------------------------------

def layer_norm(x, norm, eps):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + eps) * norm.weight.detach().numpy() + norm.bias.detach().numpy()


def linear(x, layer):
    return x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


def test_mix_block_equals_a_written_out_computation():
    torch.manual_seed(0)
    block = MixBlock(dim=8, heads=2, sr_ratio=2, mlp_ratio=4).double().eval()
    for p in block.parameters():
        nn.init.normal_(p, std=0.5)
    x = torch.randn(1, 6, 5, 8, dtype=torch.float64)
    out = block(x).detach().numpy()[0]

    attn, mlp, x = block.attn, block.mlp, x.numpy()[0]                  # (6,5,8)
    y = layer_norm(x, block.norm1, 1e-6)
    kernel, bias = attn.sr.weight.detach().numpy(), attn.sr.bias.detach().numpy()  # (8,8,2,2)
    reduced = np.zeros((3, 2, 8))                                       # the fifth column is left over
    for i in range(3):
        for j in range(2):
            reduced[i, j] = np.einsum("abc,dcab->d", y[2 * i:2 * i + 2, 2 * j:2 * j + 2], kernel) + bias
    kv = linear(layer_norm(reduced, attn.norm, 1e-5), attn.kv).reshape(6, 16)
    q, k, v = linear(y, attn.q).reshape(30, 8), kv[:, :8], kv[:, 8:]
    mixed = np.zeros((30, 8))
    for h in (slice(0, 4), slice(4, 8)):
        scores = np.exp(q[:, h] @ k[:, h].T / math.sqrt(4))
        mixed[:, h] = scores / scores.sum(1, keepdims=True) @ v[:, h]
    x = x + linear(mixed, attn.proj).reshape(6, 5, 8)

    y = linear(layer_norm(x, block.norm2, 1e-6), mlp.fc1)                     # (6,5,32)
    padded = np.pad(y, ((1, 1), (1, 1), (0, 0)))
    kernel = mlp.dwconv.dwconv.weight.detach().numpy()[:, 0]            # (32,3,3)
    y = sum(padded[i:i + 6, j:j + 5] * kernel[:, i, j] for i in range(3) for j in range(3))
    y = y + mlp.dwconv.dwconv.bias.detach().numpy()
    y = 0.5 * y * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))        # exact GELU
    np.testing.assert_allclose(out, x + linear(y, mlp.fc2), rtol=1e-10, atol=1e-10)


def test_last_stride_of_1_keeps_the_parameters_and_doubles_the_last_map():
    plain, fine = small_mit(), small_mit(strides=(4, 2, 2, 1))
    assert shapes_of(plain.state_dict()) == shapes_of(fine.state_dict())
    images = torch.randn(1, 3, 64, 96)
    sizes = [(1, 8, 16, 24), (1, 16, 8, 12), (1, 24, 4, 6)]
    assert [tuple(y.shape) for y in plain(images)] == [*sizes, (1, 32, 2, 3)]
    assert [tuple(y.shape) for y in fine(images)] == [*sizes, (1, 32, 4, 6)]


def test_drop_path_rises_linearly_over_all_blocks():
    def rates(network):
        return [m.p for m in network.modules() if isinstance(m, torchvision.ops.StochasticDepth)]
    assert rates(small_mit(drop_path=0.4)) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert rates(build_on_meta("mit_b0", "segformer")) == pytest.approx(np.linspace(0, 0.1, 8))
    for name, rate, blocks in (("swin_t", 0.3, 12), ("swin_b", 0.3, 24), ("convnext_tiny", 0.4, 18),
                               ("convnext_small", 0.3, 36), ("convnext_base", 0.4, 36)):
        assert rates(build_on_meta(name, "upernet")) == pytest.approx(np.linspace(0, rate, blocks))
    assert rates(build_on_meta("swin_t", "upernet", drop_path=0.1)) == pytest.approx(np.linspace(0, 0.1, 12))


def test_drop_path_drops_whole_images_and_only_in_training():
    torch.manual_seed(0)
    block = MixBlock(8, 2, 1, 4)
    block.drop_path.p = 0.5
    x = torch.randn(64, 4, 4, 8)
    kept = (block(x) == x).flatten(1).all(1)                            # both branches dropped: 1 in 4
    assert 4 < kept.sum() < 30
    assert not (block.eval()(x) == x).flatten(1).all(1).any()


def test_initialisation_is_that_of_mmsegmentation():
    torch.manual_seed(0)
    state = build_network("mit_b0", "segformer", 5).state_dict()
    block = "backbone.block4.0.mlp."
    assert state[block + "fc1.weight"].std() == pytest.approx(0.02, rel=0.02)
    assert state[block + "fc1.bias"].abs().max() == 0
    assert state[block + "dwconv.dwconv.weight"].std() == pytest.approx(math.sqrt(2 / 9), rel=0.05)
    assert state["head.fuse.0.weight"].std() == pytest.approx(math.sqrt(2 / 256), rel=0.02)
    assert "head.fuse.0.bias" not in state
    state = build_network("mobilenet_v2", "fcn", 50).state_dict()
    assert state["head.fuse.0.weight"].std() == pytest.approx(math.sqrt(2 / (9 * 256)), rel=0.02)
    assert state["aux_head.2.weight"].std() == pytest.approx(0.01, rel=0.05)
    assert state["aux_head.2.bias"].abs().max() == 0


def test_the_mlp_head_starts_as_released():
    torch.manual_seed(0)
    head = build_network("mit_b0", "mlp", 5).head.requires_grad_(False)
    for conv, dim in zip(head.levels, (32, 64, 160, 256)):              # torch's default for a Linear
        bound = 1 / math.sqrt(dim)
        for value in (conv.weight, conv.bias):
            assert value.abs().max() <= bound
            assert value.std() == pytest.approx(bound / math.sqrt(3), rel=0.15)
    assert head.fuse.weight.std() == pytest.approx(math.sqrt(2 / 256), rel=0.02) and head.fuse.bias is None
    assert (head.norm.weight == 1).all() and (head.norm.bias == 0).all()


def test_heads_keep_the_names_in_checkpoints_of_earlier_versions():
    def units(*names):
        parts = ("0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked")
        return {f"{name}.{part}" for name in names for part in parts}

    four = [f"levels.{i}" for i in range(4)]
    pools = [f"pools.{i}.1" for i in range(4)]
    pyramid = [f"{part}.{i}" for part in ("laterals", "smooth") for i in range(3)]
    for head, names in ((heads.SegFormerHead, units(*four, "fuse")),
                        (heads.FCNHead, units("convs.0", "convs.1", "fuse")),
                        (heads.UPerHead, units(*pools, *pyramid, "bottleneck", "fuse"))):
        assert set(head((4, 6, 8, 10), 5).state_dict()) == names


# ---- heads -----------------------------------------------------------------------------------------------

def randomise(module):
    """Random weights and running statistics, so that no term of a head can hide."""
    for value in module.state_dict().values():
        if value.ndim == 1:
            value.copy_(torch.rand(value.shape) + 0.1)
        elif value.ndim == 4:
            value.copy_(torch.randn(value.shape) / value[0].numel() ** 0.5)


def unit(x, layers):
    """What convolution + BatchNorm + ReLU do in evaluation, from the bare tensors."""
    conv = layers[0]
    return norm_relu(F.conv2d(x, conv.weight, padding=conv.weight.shape[-1] // 2), layers[1])


def norm_relu(x, norm):
    """BatchNorm in evaluation and ReLU."""
    scale = norm.weight / torch.sqrt(norm.running_var + 1e-5)
    shift = norm.bias - norm.running_mean * scale
    return torch.clamp(x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1), min=0)


def upsample(x, height, width):
    """Bilinear with pixel centres (not corners) aligned, one axis after the other."""
    for axis, size in ((2, height), (3, width)):
        n = x.shape[axis]
        at = ((torch.arange(size, dtype=x.dtype) + 0.5) * n / size - 0.5).clamp(0, n - 1)
        low = at.floor().long()
        part = (at - low).view((-1, 1) if axis == 2 else (-1,))
        x = x.index_select(axis, low) * (1 - part) + x.index_select(axis, (low + 1).clamp(max=n - 1)) * part
    return x


def head_and_levels(head, dims=(4, 6, 8, 10), channels=5):
    torch.manual_seed(0)
    head = head(dims, channels).double().eval().requires_grad_(False)
    randomise(head)
    sizes = ((13, 11), (7, 6), (4, 3), (2, 2))
    return head, [torch.randn(2, dim, *size, dtype=torch.float64) for dim, size in zip(dims, sizes)]


def test_segformer_head_equals_a_written_out_computation():
    head, levels = head_and_levels(heads.SegFormerHead)
    maps = [upsample(unit(x, layers), 13, 11) for x, layers in zip(levels, head.levels)]
    torch.testing.assert_close(head(levels), unit(torch.cat(maps, 1), head.fuse))


def mlp_as_released(head, levels):
    """The mlp head in the order of its paper: project, resize, concatenate, fuse (Eq. 4)."""
    size = levels[0].shape[2:]
    c1, c2, c3, c4 = (F.conv2d(x, conv.weight, conv.bias) for x, conv in zip(levels, head.levels))
    c2, c3, c4 = (F.interpolate(x, size, mode="bilinear", align_corners=False) for x in (c2, c3, c4))
    y = F.conv2d(torch.cat([c4, c3, c2, c1], 1), head.fuse.weight)
    norm = head.norm
    y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=head.training)
    return F.relu(y)


def test_mlp_head_equals_a_written_out_computation():
    """In numpy and without a batch norm of torch's; the last two levels of different and of the same size."""
    head, levels = head_and_levels(heads.MLPHead)
    for sizes in (None, (4, 3)):
        if sizes:
            levels[3] = torch.randn(2, 10, *sizes, dtype=torch.float64)
        maps = [np.einsum("bchw,dc->bdhw", x.numpy(), conv.weight[:, :, 0, 0].numpy())
                + conv.bias.numpy()[:, None, None] for x, conv in zip(levels, head.levels)]
        maps = np.concatenate([upsample(torch.from_numpy(x), 13, 11).numpy() for x in maps[::-1]], 1)
        y = np.einsum("bchw,dc->bdhw", maps, head.fuse.weight[:, :, 0, 0].numpy())
        mean, var, weight, bias = (value.numpy()[:, None, None] for value in (
            head.norm.running_mean, head.norm.running_var, head.norm.weight, head.norm.bias))
        expected = np.maximum((y - mean) / np.sqrt(var + 1e-5) * weight + bias, 0)
        assert (expected > 0).mean() > 0.1
        np.testing.assert_allclose(head(levels).numpy(), expected, rtol=1e-10, atol=1e-10)


def test_mlp_head_learns_as_if_every_map_were_built():
    head, levels = head_and_levels(heads.MLPHead)
    head.train().requires_grad_(True)
    levels = [x.requires_grad_(True) for x in levels]
    inputs = [*head.parameters(), *levels]
    target = torch.rand(2, 5, 13, 11, dtype=torch.float64)
    got, expected = (torch.autograd.grad((target * compute(levels)).sum(), inputs)
                     for compute in (head, partial(mlp_as_released, head)))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    for (name, _), a in zip(head.named_parameters(), got):              # BatchNorm takes biases away
        assert a.abs().max() > 1e-3 or name.endswith(".bias"), name


@pytest.mark.parametrize("head", [heads.DeepLabv2Head,
                                  partial(heads.DeepLabv3PlusHead, output_stride=16)])
def test_gradients_reach_every_parameter_of_the_deeplab_heads(head):
    torch.manual_seed(0)
    head = head((4, 6, 8, 10), 16)
    out = head([torch.randn(4, dim, side, side) for dim, side in zip((4, 6, 8, 10), (40, 40, 20, 20))])
    (out * torch.rand_like(out)).sum().backward()
    for name, p in head.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 1e-3, name


def dilated_unit(x, layers, rate):
    """Nine shifted copies of the map, `rate` pixels apart, then BatchNorm and ReLU."""
    h, w = x.shape[2:]
    padded, weight = F.pad(x, (rate,) * 4), layers[0].weight
    x = sum(torch.einsum("bchw,dc->bdhw", padded[:, :, i * rate:i * rate + h, j * rate:j * rate + w],
                         weight[:, :, i, j]) for i in range(3) for j in range(3))
    return norm_relu(x, layers[1])


def test_deeplabv2_head_is_a_1x1_convolution_on_level_4():
    head, levels = head_and_levels(heads.DeepLabv2Head)
    torch.testing.assert_close(head(levels), unit(levels[3], head.reduce))


@pytest.mark.parametrize("output_stride, rates", [(16, (6, 12, 18)), (8, (12, 24, 36))])
def test_deeplabv3plus_head_equals_a_written_out_computation(output_stride, rates):
    head, levels = head_and_levels(partial(heads.DeepLabv3PlusHead, output_stride=output_stride))
    low, top = levels[0], torch.randn(2, 10, 38, 21, dtype=torch.float64)   # some taps of every rate hit it
    pooled = unit(top.mean((2, 3), keepdim=True), head.pool[1]) * torch.ones(38, 21, dtype=torch.float64)
    dilated = [dilated_unit(top, layers, rate) for layers, rate in zip(head.branches[1:], rates)]
    x = unit(torch.cat([unit(top, head.branches[0]), *dilated, pooled], 1), head.project[0])
    low = unit(low, head.low)
    assert low.shape[1] == 48
    x = torch.cat([F.interpolate(x, (13, 11), mode="bilinear", align_corners=False), low], 1)
    expected = unit(unit(x, head.refine[0]), head.refine[1])
    torch.testing.assert_close(head([levels[0], *levels[1:3], top]), expected)
    assert expected.std() > 0.01


def test_deeplabv3plus_drops_half_of_the_projected_channels_in_training_only():
    torch.manual_seed(0)
    head, seen = heads.DeepLabv3PlusHead((4, 6, 8, 10), 64, output_stride=16), []
    head.refine.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, :64].detach()))
    levels = [torch.randn(16, dim, side, side) for dim, side in zip((4, 6, 8, 10), (16, 8, 4, 4))]
    head(levels)
    head.eval()(levels)
    dropped, dead = ((x == 0).flatten(2).all(2).float().mean() for x in seen)
    assert dropped - dead == pytest.approx(0.5, abs=0.05) and dead < 0.1


def test_fcn_head_equals_a_written_out_computation():
    head, levels = head_and_levels(heads.FCNHead)
    y = unit(unit(levels[3], head.convs[0]), head.convs[1])
    torch.testing.assert_close(head(levels), unit(torch.cat([levels[3], y], 1), head.fuse))


def test_upernet_head_equals_a_written_out_computation():
    head, (a, b, c, d) = head_and_levels(heads.UPerHead)
    pools = []
    for n, pool in zip((1, 2, 3, 6), head.pools):
        bins = [range(i * 2 // n, -(-(i + 1) * 2 // n)) for i in range(n)]   # adaptive bins of a 2x2 map
        means = torch.stack([torch.stack([d[:, :, list(r)][..., list(s)].mean((2, 3)) for s in bins], -1)
                             for r in bins], -2)
        pools.append(upsample(unit(means, pool[1]), 2, 2) if n < 6 else
                     F.interpolate(unit(means, pool[1]), (2, 2), mode="bilinear", align_corners=False))
    p4 = unit(torch.cat([d, *pools], 1), head.bottleneck)
    p3 = unit(c, head.laterals[2]) + upsample(p4, 4, 3)
    p2 = unit(b, head.laterals[1]) + upsample(p3, 7, 6)
    p1 = unit(a, head.laterals[0]) + upsample(p2, 13, 11)
    maps = [unit(p1, head.smooth[0]), unit(p2, head.smooth[1]), unit(p3, head.smooth[2]), p4]
    expected = unit(torch.cat([upsample(y, 13, 11) for y in maps], 1), head.fuse)
    torch.testing.assert_close(head([a, b, c, d]), expected)


@pytest.mark.parametrize("head", ["upernet", "deeplabv3plus"])
def test_heads_that_pool_name_the_remedy_for_a_batch_of_one(head):
    network = build_network("mobilenet_v2", head, 5, head_channels=8)
    with pytest.raises(UserError, match=f"the {head} head .* batch size of 2"):
        network(torch.randn(1, 3, 64, 64))
    assert network.eval()(torch.randn(1, 3, 64, 64))[0].shape == (1, 8, 16, 16)


# ---- dilation --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet50"])
def test_dilated_backbone_equals_the_strided_one_where_both_have_values(name):
    torch.manual_seed(0)
    strided = getattr(torchvision.models, name)().eval()
    images = torch.randn(1, 3, 97, 70)
    with torch.no_grad():
        coarse = backbones.TorchvisionBackbone(strided, name).eval()(images)[3]
        for output_stride in (8, 16):
            net = backbones.torchvision_classifier(name, output_stride)
            net.load_state_dict(strided.state_dict())
            fine = backbones.TorchvisionBackbone(net, name).eval()(images)[3]
            step = 32 // output_stride
            assert fine.shape[2:] == (math.ceil(97 / output_stride), math.ceil(70 / output_stride))
            error = (fine[:, :, ::step, ::step] - coarse).abs().max()
            assert error < 1e-4 * coarse.abs().max()


# ---- what goes together ----------------------------------------------------------------------------------

@pytest.mark.parametrize("backbone, head", [("swin_t", "fcn"), ("tiny", "upernet"), ("resnet50", "segformer"),
                                            ("mit_b0", "uper"), ("mit_b9", "segformer"), ("resnet101", "mlp"),
                                            ("mit_b1", "deeplabv2"), ("tiny", "deeplabv3plus")])
def test_wrong_pairs_list_what_goes_together(backbone, head):
    with pytest.raises(UserError) as error:
        build_network(backbone, head, 5)
    for part in (backbone, head, "segformer with mit_b0", "fcn with resnet50", "upernet with swin_t", "tiny",
                 "mlp with mit_b0", "deeplabv2 with resnet50", "deeplabv3plus with resnet50"):
        assert part in str(error.value)


def test_wrong_strides_and_drop_path_are_named():
    for head in ("fcn", "deeplabv2", "deeplabv3plus"):
        with pytest.raises(UserError, match=f"output stride 4 .* the {head} head takes 8 or 16"):
            build_on_meta("resnet50", head, output_stride=4)
    for last_stride in (0, 3, 4):
        with pytest.raises(UserError, match=f"last stride {last_stride} is not available: .* 1 or 2"):
            build_on_meta("mit_b0", "mlp", last_stride=last_stride)
    for backbone, head in (("tiny", "mlp"), ("mobilenet_v2", "segformer"), ("resnet101", "deeplabv2")):
        with pytest.raises(UserError, match=f"last stride 1 is for MiT .* leave it at 2 for {backbone}"):
            build_on_meta(backbone, head, last_stride=1)
    with pytest.raises(UserError, match="resnet50 has no blocks to drop"):
        build_on_meta("resnet50", "fcn", drop_path=0.1)


# ---- pretrained MiT --------------------------------------------------------------------------------------

def original_checkpoint(dims=(8, 16, 24, 32), depths=(1, 2, 1, 1)):
    """A random state dict with the names and shapes of the original release, its classifier included."""
    torch.manual_seed(1)
    shapes, before = {}, 3
    for s, (c, depth, reduction, kernel) in enumerate(zip(dims, depths, (8, 4, 2, 1), (7, 3, 3, 3)), 1):
        shapes |= {f"patch_embed{s}.proj.weight": (c, before, kernel, kernel),
                   f"patch_embed{s}.proj.bias": (c,),
                   f"patch_embed{s}.norm.weight": (c,), f"patch_embed{s}.norm.bias": (c,),
                   f"norm{s}.weight": (c,), f"norm{s}.bias": (c,)}
        for j in range(depth):
            weights = {"norm1": (c,), "norm2": (c,),
                       "attn.q": (c, c), "attn.kv": (2 * c, c), "attn.proj": (c, c),
                       "mlp.fc1": (4 * c, c), "mlp.dwconv.dwconv": (4 * c, 1, 3, 3), "mlp.fc2": (c, 4 * c)}
            if reduction > 1:
                weights |= {"attn.sr": (c, c, reduction, reduction), "attn.norm": (c,)}
            for name, shape in weights.items():
                shapes |= {f"block{s}.{j}.{name}.weight": shape, f"block{s}.{j}.{name}.bias": shape[:1]}
        before = c
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    return state | {"head.weight": torch.randn(1000, dims[3]), "head.bias": torch.randn(1000)}


def huggingface_checkpoint(original):
    """The same tensors under HuggingFace's names, written from its naming and not from ours."""
    parts = {"attn.q": "attention.self.query", "attn.proj": "attention.output.dense",
             "attn.sr": "attention.self.sr", "attn.norm": "attention.self.layer_norm",
             "norm1": "layer_norm_1", "norm2": "layer_norm_2",
             "mlp.fc1": "mlp.dense1", "mlp.fc2": "mlp.dense2", "mlp.dwconv.dwconv": "mlp.dwconv.dwconv"}
    state = {}
    for name, value in original.items():
        part, kind = name.rsplit(".", 1)
        if part == "head":
            state[f"classifier.{kind}"] = value
            continue
        stage = int(part.split(".")[0][-1]) - 1
        if part.startswith("patch_embed"):
            inner = "proj" if part.endswith("proj") else "layer_norm"
            state[f"segformer.encoder.patch_embeddings.{stage}.{inner}.{kind}"] = value
        elif part.startswith("norm"):
            state[f"segformer.encoder.layer_norm.{stage}.{kind}"] = value
        else:
            _, block, inner = part.split(".", 2)
            prefix = f"segformer.encoder.block.{stage}.{block}."
            if inner == "attn.kv":
                half = len(value) // 2
                state[f"{prefix}attention.self.key.{kind}"] = value[:half]
                state[f"{prefix}attention.self.value.{kind}"] = value[half:]
            else:
                state[f"{prefix}{parts[inner]}.{kind}"] = value
    return state


def test_mit_loads_original_and_huggingface_names():
    original = original_checkpoint()
    hf = huggingface_checkpoint(original)
    without_prefix = {name.removeprefix("segformer."): value for name, value in hf.items()}
    headless = {name: value for name, value in original.items() if "head" not in name}
    decoder = {"decode_head.classifier.bias": torch.zeros(3), "decode_head.batch_norm.bias": torch.ones(3)}
    for state in (original, headless, hf, without_prefix, hf | decoder):
        names = list(state)
        model = small_mit()
        load_mit_weights(model, state)
        assert list(state) == names                                     # the caller's dict is left alone
        loaded = model.state_dict()
        assert set(loaded) == {name for name in original if not name.startswith("head.")}
        assert all(torch.equal(loaded[name], original[name]) for name in loaded)


def test_names_of_the_real_sizes_are_those_of_the_release():
    for size, tensors in ((0, 176), (2, 332)):
        dims = (32, 64, 160, 256) if size == 0 else (64, 128, 320, 512)
        with torch.device("meta"):
            released = original_checkpoint(dims, MIT_BLOCKS[size])
        own = build_on_meta(f"mit_b{size}", "segformer").backbone.state_dict()
        assert len(own) == tensors
        assert shapes_of(own) == {k: v for k, v in shapes_of(released).items() if "head" not in k}


def changed(state, name, value):
    return {k: v for k, v in state.items() if k != name} | ({} if value is None else {name: value})


@pytest.mark.parametrize("make, words", [
    (lambda s: original_checkpoint(depths=(1, 2, 3, 1)), ["40 unexpected: block3.1."]),   # deeper
    (lambda s: original_checkpoint(depths=(1, 1, 1, 1)), ["missing: block2.1."]),   # shallower
    (lambda s: original_checkpoint(dims=(16, 32, 48, 64)), ["of another shape: patch_embed1."]),   # wider
    (lambda s: changed(s, "norm3.bias", None), ["1 missing: norm3.bias"]),
    (lambda s: changed(s, "norm5.bias", torch.zeros(1)), ["1 unexpected: norm5.bias"]),
    (lambda s: changed(s, "norm3.bias", torch.zeros(7)), ["1 of another shape: norm3.bias"]),
    (lambda s: changed(huggingface_checkpoint(s),
                       "segformer.encoder.block.0.0.attention.self.key.bias", None),
     ["1 missing: block1.0.attn.kv.bias", "1 unexpected: block1.0.attn.value.bias"]),
    (lambda s: {"layers.0.0.projection.weight": torch.zeros(8, 3, 7, 7)}, ["mmsegmentation"]),
    (lambda s: {}, ["missing", " ..."])])
def test_mit_refuses_other_networks_whole(make, words):
    model = small_mit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_mit_weights(model, make(original_checkpoint()))
    for word in words:
        assert word in str(error.value)
    assert str(error.value).count(", ") < 20                            # five names of a kind, not all
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- pretrained weights by file, name and URL --------------------------------------------------------------

@pytest.fixture(scope="module")
def mobilenet():
    torch.manual_seed(2)
    return torchvision.models.mobilenet_v2().state_dict()


@pytest.mark.parametrize("head", ["segformer", "fcn", "upernet"])
def test_a_torchvision_file_fills_the_backbone(tmp_path, mobilenet, head):
    features = {name: value for name, value in mobilenet.items() if not name.startswith("classifier")}
    uncounted = {name: value for name, value in features.items() if "num_batches" not in name}
    path = tmp_path / "weights.pth"
    for state in (mobilenet, features, uncounted, {"state_dict": mobilenet}, {"model": features, "epoch": 3}):
        torch.save(state, path)
        network = build_network("mobilenet_v2", head, 5, head_channels=8, weights=str(path))
        loaded = [value for value in network.backbone.state_dict().values() if value.is_floating_point()]
        expected = [value for name, value in features.items()
                    if value.is_floating_point() and not name.startswith("features.18.")]
        assert len(loaded) == len(expected) and all(torch.equal(a, b) for a, b in zip(loaded, expected))


def test_mit_and_tiny_load_from_files(tmp_path):
    for name in ("mit_b0", "tiny"):
        first = build_network(name, "segformer", 5, head_channels=8)
        torch.save(first.backbone.state_dict(), tmp_path / f"{name}.pth")
        second = build_network(name, "segformer", 5, head_channels=8, weights=tmp_path / f"{name}.pth")
        for a, b in zip(first.backbone.state_dict().values(), second.backbone.state_dict().values()):
            assert torch.equal(a, b)
    with pytest.raises(UserError, match="tiny.pth.*missing"):
        build_network("mit_b0", "segformer", 5, weights=str(tmp_path / "tiny.pth"))


def test_files_that_do_not_serve_are_named(tmp_path, mobilenet):
    path = tmp_path / "weights.pth"

    def message(weights=path, backbone="mobilenet_v2"):
        with pytest.raises(UserError) as error:
            build_network(backbone, "segformer", 5, weights=str(weights))
        assert str(weights) in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    assert "no such file" in message()
    path.write_bytes(b"<html>not found</html>")
    assert "cannot read" in message()
    torch.save(mobilenet, path)
    path.write_bytes(path.read_bytes()[:5000])                          # a download that broke off
    assert "cannot read" in message()
    torch.save(nn.Linear(2, 2), path)                                   # a pickled module: never unpickled
    assert "cannot read" in message()
    for wrong in ([torch.zeros(2)], {"epoch": 3}, {"state_dict": {"a": "b"}}):
        torch.save(wrong, path)
        assert "holds no state dict" in message()
    torch.save({"_conv_stem.weight": torch.zeros(32, 3, 3, 3)}, path)
    assert "unexpected: _conv_stem.weight" in message() and "312" not in message()
    assert "another package" in message(tmp_path / "model.safetensors")


def test_imagenet_weights_exist_for_torchvision_networks_only():
    with pytest.raises(UserError, match="mit_b3.pth.*nvidia/mit-b3"):
        build_network("mit_b3", "segformer", 5, weights="imagenet")
    with pytest.raises(UserError, match="no ImageNet weights for tiny"):
        build_network("tiny", "segformer", 5, weights="imagenet")


@pytest.mark.parametrize("backbone, head", [
    ("resnet50", "fcn"), ("swin_t", "upernet"), ("convnext_tiny", "upernet"), ("mobilenet_v2", "segformer")])
def test_imagenet_means_torchvisions_own_file(monkeypatch, backbone, head):
    asked = []

    def download(url, file_name=None, map_location=None, weights_only=False):
        asked.append(url)
        assert weights_only
        state = getattr(torchvision.models, backbone)().state_dict()
        return {k: torch.full_like(v, 0.25) if v.is_floating_point() else v for k, v in state.items()
                if not k.startswith(("fc.", "head.", "norm.", "classifier."))}

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    network = build_network(backbone, head, 5, head_channels=8, weights="imagenet")
    assert len(asked) == 1 and asked[0].startswith(f"https://download.pytorch.org/models/{backbone}-")
    assert all((p == 0.25).all() for p in network.backbone.stages.parameters())
    assert not any((p == 0.25).any() for p in network.head.parameters())


def test_urls_are_cached_apart_and_failures_name_them(monkeypatch):
    names = []

    def download(url, file_name=None, map_location=None, weights_only=False):
        assert weights_only
        names.append(file_name)
        raise OSError("HTTP Error 404: Not Found")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    for size in (0, 1):
        url = f"https://example.org/mit-b{size}/pytorch_model.bin"
        with pytest.raises(UserError) as error:
            build_network("mit_b0", "segformer", 5, weights=url)
        assert url in str(error.value) and "404" in str(error.value)
    assert names[0] != names[1] and all(name.endswith("_pytorch_model.bin") for name in names)


# ---- networks for image classification ---------------------------------------------------------------------

EXTRACTOR_CHANNELS = {"tiny": 48, "mobilenet_v2": 1280, "resnet34": 512, "resnet50": 2048,
                      "resnet50_inat": 2048, "resnet152": 2048, "densenet121": 1024, "densenet161": 2208}


@pytest.mark.parametrize("name", EXTRACTORS)
def test_extractors_have_their_channels_and_stride(name):
    with torch.device("meta"):
        extractor = build_extractor(name)
        shapes = [tuple(extractor(torch.randn(2, 3, side, side)).shape) for side in (64, 224)]
    channels, stride = EXTRACTOR_CHANNELS[name], 8 if name == "tiny" else 32
    assert extractor.channels == channels and len(EXTRACTORS) == len(EXTRACTOR_CHANNELS)
    assert shapes == [(2, channels, side // stride, side // stride) for side in (64, 224)]
    assert not any(isinstance(module, nn.Linear) for module in extractor.modules())


def classifier_with_random_statistics(name):
    """torchvision's network in eval mode, its BatchNorms no longer the identity."""
    torch.manual_seed(3)
    net = torchvision.models.get_model(name).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return net


@pytest.mark.parametrize("name, pool", [("resnet34", "avgpool"), ("mobilenet_v2", "classifier"),
                                        ("densenet121", "classifier")])
def test_the_pooled_features_are_what_torchvisions_classifier_sees(tmp_path, name, pool):
    net = classifier_with_random_statistics(name)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    extractor, seen = build_extractor(name, str(tmp_path / "w.pth")).eval(), []
    getattr(net, pool).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        features = extractor(x := torch.randn(2, 3, 64, 96))
        net(x)
    expected, = seen                                                    # ResNet: (B,C,h,w); others: (B,C)
    assert torch.allclose(features if pool == "avgpool" else features.mean((2, 3)), expected, atol=1e-5)
    assert features.std() > 0.01


def test_densenet_ends_with_a_relu(tmp_path):
    net = classifier_with_random_statistics("densenet121")
    torch.save({"state_dict": net.state_dict()}, tmp_path / "w.pth")
    extractor = build_extractor("densenet121", tmp_path / "w.pth").eval()
    with torch.no_grad():
        before = net.features(x := torch.randn(1, 3, 64, 64))
        assert torch.equal(extractor(x), F.relu(before)) and (before < 0).any()


def test_tiny_is_the_first_two_stages_of_the_backbone(tmp_path):
    body = build_network("tiny", "segformer", 3).backbone.eval()
    torch.save(body.state_dict(), tmp_path / "tiny.pth")
    extractor = build_extractor("tiny", tmp_path / "tiny.pth").eval()
    x = torch.randn(2, 3, 40, 56)
    assert torch.equal(extractor(x), body(x)[1]) and extractor(x).shape == (2, 48, 5, 7)


# Weights of the wide networks are compared by name on small stand-ins of the same depth.

@pytest.fixture
def narrow(monkeypatch):
    """torchvision's ResNets and DenseNets, as deep as ever but with few channels: their files are small."""
    model = torchvision.models.get_model
    blocks = {"densenet121": (6, 12, 24, 16), "densenet161": (6, 12, 36, 24)}

    def get_model(name, weights=None, **options):
        if name in blocks:
            return torchvision.models.DenseNet(4, blocks[name], num_init_features=8)
        if name.startswith("resnet") and name != "resnet34":
            options["width_per_group"] = 8
        return model(name, weights=weights, **options)

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    return get_model


def bbn_checkpoint(resnet):
    """A ResNet-50's state dict as BBN saves it: layer4.2 twice, as two branches, and another classifier."""
    state = {}
    for name, value in resnet.items():
        if name.startswith("layer4.2."):
            rest = name.split(".", 2)[2]
            state[f"module.backbone.cb_block.{rest}"] = value
            state[f"module.backbone.rb_block.{rest}"] = torch.zeros_like(value)
        elif not name.startswith("fc."):
            state[f"module.backbone.{name}"] = value
    return state | {"module.classifier.weight": torch.zeros(9, 8), "module.classifier.bias": torch.zeros(9)}


def test_the_inaturalist_checkpoint_of_bbn_fills_resnet50(tmp_path, narrow):
    resnet = narrow("resnet50").state_dict()
    for state in (bbn_checkpoint(resnet), {"state_dict": bbn_checkpoint(resnet), "epoch": 180}):
        torch.save(state, tmp_path / "bbn.pth")
        loaded = build_extractor("resnet50_inat", tmp_path / "bbn.pth").state_dict()
        assert set(loaded) == {name for name in resnet if not name.startswith("fc.")}
        assert all(torch.equal(value, resnet[name]) for name, value in loaded.items())


def test_old_densenet_names_are_understood(tmp_path, narrow):
    state = narrow("densenet121").state_dict()
    old = {name.replace(".norm1.", ".norm.1.").replace(".norm2.", ".norm.2.").replace(".conv1.", ".conv.1.")
           .replace(".conv2.", ".conv.2."): value for name, value in state.items()
           if not name.endswith("num_batches_tracked")}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    for saved in (old, state):
        torch.save(saved, tmp_path / "w.pth")
        loaded = build_extractor("densenet121", tmp_path / "w.pth").state_dict()
        assert set(loaded) == {name for name in state if not name.startswith("classifier.")}
        assert all(torch.equal(loaded[name], state[name]) for name in loaded)


def test_wrong_extractors_and_files_are_one_sentence(tmp_path, narrow):
    path = tmp_path / "w.pth"

    def message(backbone, weights):
        with pytest.raises(UserError) as error:
            build_extractor(backbone, weights)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "vgg" in message("vgg", "none") and "densenet161" in message("vgg", "none")
    assert "iNaturalist" in (said := message("resnet50_inat", "imagenet")) and "best_model.pth" in said
    assert "no ImageNet weights for tiny" in message("tiny", "imagenet")
    assert "no such file" in message("resnet50_inat", str(tmp_path / "gone.pth"))
    resnet, densenet = narrow("resnet50").state_dict(), narrow("densenet121").state_dict()
    bbn = bbn_checkpoint(resnet)
    last = "features.denseblock4.denselayer16.conv2.weight"
    for backbone, state, words in [
            ("resnet50_inat", resnet, ["missing: conv1.weight"]), ("resnet50", bbn, ["unexpected: module."]),
            ("resnet34", resnet, ["unexpected"]), ("resnet152", resnet, ["missing: layer2.4."]),
            ("densenet161", densenet, ["missing: features.denseblock3."]),
            ("densenet121", changed(densenet, last, None), [f"1 missing: {last}"]),
            ("densenet121", changed(densenet, "features.norm5.bias", torch.zeros(3)), ["1 of another shape"]),
            ("resnet50_inat", changed(bbn, "module.backbone.cb_block.conv3.weight", None),
             ["1 missing: layer4.2.conv3.weight"])]:
        torch.save(state, path)
        said = message(backbone, path)
        assert str(path) in said and all(word in said for word in words), said


@pytest.mark.parametrize("name", ["resnet34", "resnet50", "resnet152", "densenet121", "densenet161",
                                  "mobilenet_v2"])
def test_imagenet_weights_of_extractors_are_torchvisions(monkeypatch, name):
    asked = []

    def download(url, **options):
        asked.append(url)
        raise OSError("no connection")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    with pytest.raises(UserError, match="no connection"), torch.device("meta"):
        build_extractor(name, "imagenet")
    assert len(asked) == 1 and asked[0].startswith(f"https://download.pytorch.org/models/{name}-")


# ---- networks for a head of the paper's own ----------------------------------------------------------------

DEEPLAB_SIDES = {161: 21, 241: 31, 257: 33, 321: 41, 385: 49, 512: 65, 513: 65, 683: 86, 1024: 129, 2048: 257}


def dense_on_meta(backbone, **options):
    with torch.device("meta"):
        return build_dense(backbone, **options)


def random_dense(backbone, **options):
    """A network in evaluation whose weights and running statistics are random, float64."""
    torch.manual_seed(4)
    dense = build_dense(backbone, **options).double().eval().requires_grad_(False)
    randomise(dense)
    return dense


@pytest.mark.parametrize("backbone", ["resnet50", "resnet101"])
def test_dense_resnets_have_deeplabs_feature_map_sizes(backbone):
    dense = dense_on_meta(backbone)
    assert (dense.channels, dense.stride) == (2048, 8)
    sides = list(DEEPLAB_SIDES) if backbone == "resnet50" else [1024, 513]
    for height, width in zip(sides, sides[1:] + sides[:1]):
        features = dense(torch.empty(1, 3, height, width, device="meta"))
        assert features.shape == (1, 2048, DEEPLAB_SIDES[height], DEEPLAB_SIDES[width])
    dense = dense_on_meta(backbone, output_stride=16)
    assert (dense.channels, dense.stride) == (2048, 16)
    assert dense(torch.empty(2, 3, 513, 321, device="meta")).shape == (2, 2048, 33, 21)


@pytest.mark.parametrize("output_stride, strides, dilations", [(8, (1, 2, 1, 1), (1, 1, 2, 4)),
                                                              (16, (1, 2, 2, 1), (1, 1, 1, 2))])
def test_every_block_of_a_dilated_resnet_layer_is_dilated(output_stride, strides, dilations):
    dense = dense_on_meta("resnet101", output_stride=output_stride)
    layers = [dense.layer1, dense.layer2, dense.layer3, dense.layer4]
    assert [len(layer) for layer in layers] == [3, 4, 23, 3]
    for layer, stride, dilation in zip(layers, strides, dilations):
        for i, block in enumerate(layer):
            conv = block.conv2
            assert conv.dilation == conv.padding == (dilation, dilation)
            assert conv.stride == ((stride, stride) if i == 0 else (1, 1))
            assert block.conv1.stride == block.conv3.stride == (1, 1)
        assert layer[0].downsample[0].stride == (stride, stride)


def deeplab_resnet50(state, x, strides, dilations):
    """DeepLabv2's ResNet-50 in evaluation from the bare tensors, with the stride in the 3x3 convolution."""
    def conv(x, name, norm, **options):
        x = F.conv2d(x, state[name + ".weight"], **options)
        scale = state[norm + ".weight"] / torch.sqrt(state[norm + ".running_var"] + 1e-5)
        shift = state[norm + ".bias"] - state[norm + ".running_mean"] * scale
        return x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)

    x = conv(x, "conv1", "bn1", stride=2, padding=3).clamp(min=0)
    x = F.max_pool2d(F.pad(x, (1, 2, 1, 2), value=-math.inf), 3, 2)     # a window more than without ceil_mode
    for layer, (blocks, stride, dilation) in enumerate(zip((3, 4, 6, 3), strides, dilations), 1):
        for i in range(blocks):
            name, step = f"layer{layer}.{i}.", stride if i == 0 else 1
            y = conv(x, name + "conv1", name + "bn1").clamp(min=0)
            y = conv(y, name + "conv2", name + "bn2", stride=step, padding=dilation, dilation=dilation)
            y = conv(y.clamp(min=0), name + "conv3", name + "bn3")
            if i == 0:
                x = conv(x, name + "downsample.0", name + "downsample.1", stride=step)
            x = (x + y).clamp(min=0)
    return x


@pytest.mark.parametrize("output_stride, strides, dilations", [(8, (1, 2, 1, 1), (1, 1, 2, 4)),
                                                              (16, (1, 2, 2, 1), (1, 1, 1, 2))])
def test_dense_resnet_equals_a_written_out_computation(narrow, output_stride, strides, dilations):
    dense = random_dense("resnet50", output_stride=output_stride)
    images = torch.randn(1, 3, 47, 58, dtype=torch.float64)             # 7 and 8 rows more than 8 * a number
    features = dense(images)
    assert features.shape[2:] == ((7, 8) if output_stride == 8 else (4, 4))
    expected = deeplab_resnet50(dense.state_dict(), images, strides, dilations)
    torch.testing.assert_close(features, expected)
    assert features.std() > 0


def test_dense_mobilenet_is_the_strided_one_on_a_finer_grid(tmp_path):
    net = classifier_with_random_statistics("mobilenet_v2")
    torch.save(net.state_dict(), tmp_path / "w.pth")
    images = torch.randn(1, 3, 97, 70)
    with torch.no_grad():
        coarse = net.features[:18](images)                              # stride 32, before the conv to 1280
        for output_stride, size in ((8, (13, 9)), (16, (7, 5))):
            dense = build_dense("mobilenet_v2", tmp_path / "w.pth", output_stride).eval()
            fine, step = dense(images), 32 // output_stride
            assert (dense.channels, dense.stride) == (320, output_stride) and fine.shape == (1, 320, *size)
            error = (fine[:, :, ::step, ::step] - coarse).abs().max()
            assert error < 1e-4 * coarse.abs().max()


def test_dense_tiny_at_16_is_the_backbone_and_finer_ones_have_its_values():
    torch.manual_seed(5)
    plain = build_network("tiny", "segformer", 3).backbone.eval()
    initial = {name: value.clone() for name, value in plain.state_dict().items()}
    images = torch.rand(2, 3, 70, 91)
    for output_stride, size in ((16, (5, 6)), (8, (9, 12)), (4, (18, 23))):
        torch.manual_seed(5)
        dense, step = build_dense("tiny", output_stride=output_stride).eval(), 16 // output_stride
        assert (dense.channels, dense.stride) == (64, output_stride)
        state = dense.state_dict()
        assert list(state) == list(initial)
        assert all(torch.equal(value, initial[name]) for name, value in state.items())
        randomise(plain)
        dense.load_state_dict(plain.state_dict())
        fine, coarse = dense(images), plain(images)[3]
        assert fine.shape == (2, 64, *size)
        torch.testing.assert_close(fine[:, :, ::step, ::step], coarse, rtol=1e-4, atol=1e-4)
        assert output_stride < 16 or torch.equal(fine, coarse)


def test_unet_has_the_size_and_shapes_of_the_paper():
    unet = dense_on_meta("unet")
    pairs = ((3, 64), (64, 128), (128, 256), (256, 512), (512, 1024),   # down
             (128, 64), (256, 128), (512, 256), (1024, 512))            # after each concatenation
    convs = sum(9 * a * b + 9 * b * b + 2 * 2 * b for a, b in pairs)    # no bias, two BatchNorms
    ups = sum(4 * 2 * b * b + b for b in (64, 128, 256, 512))
    assert count(unet) == convs + ups + 64 * 64 + 64 == 31_041_728
    assert (unet.channels, unet.stride) == (64, 1)
    seen = {}
    for name in ("down", "up", "merge"):
        for i, part in enumerate(getattr(unet, name)):
            part.register_forward_hook(lambda m, args, out, at=(name, i): seen.update({at: out.shape[1:]}))
    assert unet(torch.empty(2, 3, 512, 512, device="meta")).shape == (2, 64, 512, 512)
    for i in range(5):
        level = (64 * 2 ** i, 512 // 2 ** i, 512 // 2 ** i)
        assert seen["down", i] == level and (i == 4 or seen["up", i] == seen["merge", i] == level)
    assert count(dense_on_meta("unet", width=32)) < count(unet) / 3.9


def test_unet_keeps_any_size():
    unet = build_dense("unet", width=2).eval()
    for size in ((1, 1), (16, 15), (17, 32), (33, 47), (101, 77)):
        assert unet(torch.rand(1, 3, *size)).shape == (1, 64, *size)


def pool_by_two(x):
    """2x2 maxima; those of an odd last row or column are over what there is."""
    h, w = x.shape[2:]
    x = F.pad(x, (0, w % 2, 0, h % 2), value=-math.inf)
    return torch.stack([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]).amax(0)


def test_unet_equals_a_written_out_computation():
    unet = random_dense("unet", width=2)
    images = torch.randn(2, 3, 39, 22, dtype=torch.float64)
    x, skips = images, []
    for i, convs in enumerate(unet.down):
        x = unit(unit(pool_by_two(x) if i else x, convs[0]), convs[1])
        skips.append(x)
    assert [tuple(skip.shape[1:]) for skip in skips] == [(2, 39, 22), (4, 20, 11), (8, 10, 6), (16, 5, 3),
                                                         (32, 3, 2)]
    for up, convs, skip in reversed(list(zip(unet.up, unet.merge, skips))):
        fine = torch.einsum("bchw,cdij->bdhiwj", x, up.weight).flatten(4, 5).flatten(2, 3)
        fine = (fine + up.bias.view(-1, 1, 1))[:, :, :skip.shape[2], :skip.shape[3]]
        x = unit(unit(torch.cat([skip, fine], 1), convs[0]), convs[1])
    expected = F.conv2d(x, unet.last.weight, unet.last.bias)
    torch.testing.assert_close(unet(images), expected)
    assert expected.std() > 0.01


@pytest.mark.parametrize("backbone", [name for name in DENSE if name != "resnet101"])
def test_gradients_reach_every_parameter_of_a_dense_network(backbone, narrow):
    torch.manual_seed(0)
    dense = build_dense(backbone, width=4 if backbone == "unet" else 64).to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 48, 56).contiguous(memory_format=torch.channels_last)
    dense(images).square().mean().backward()
    for name, p in dense.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name


@pytest.mark.parametrize("backbone", DENSE)
def test_a_file_fills_a_dense_network(tmp_path, narrow, backbone):
    torch.manual_seed(6)
    width = 4 if backbone == "unet" else 64
    source = {"unet": lambda: build_dense("unet", width=4), "tiny": backbones.TinyBackbone}.get(
        backbone, lambda: narrow(backbone))().state_dict()
    torch.save(source, tmp_path / "w.pth")
    loaded = build_dense(backbone, tmp_path / "w.pth", width=width).state_dict()
    assert set(loaded) == {name for name in source
                           if not name.startswith(("fc.", "classifier.", "features.18."))}
    assert all(torch.equal(value, source[name]) for name, value in loaded.items())


def test_weights_that_a_dense_network_refuses(tmp_path, narrow):
    path = tmp_path / "w.pth"

    def message(backbone, weights, **options):
        with pytest.raises(UserError) as error:
            build_dense(backbone, weights, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no ImageNet weights for unet" in message("unet", "imagenet")
    assert "no ImageNet weights for tiny" in message("tiny", "imagenet")
    assert "no such file" in message("resnet101", str(path))
    unet = build_dense("unet", width=4).state_dict()
    for backbone, state, words in [
            ("resnet101", narrow("resnet50").state_dict(), "missing: layer3.6."),
            ("resnet50", narrow("resnet101").state_dict(), "unexpected: layer3.6."),
            ("tiny", unet, "missing: stages.0."), ("unet", backbones.TinyBackbone().state_dict(), "missing"),
            ("unet", build_dense("unet", width=5).state_dict(), "of another shape: down.0."),
            ("unet", changed(unet, "last.bias", None), "1 missing: last.bias")]:
        torch.save(state, path)
        said = message(backbone, path, width=4 if backbone == "unet" else 64)
        assert str(path) in said and words in said, said


@pytest.mark.parametrize("backbone", ["resnet101", "mobilenet_v2"])
def test_imagenet_weights_of_dense_networks_are_torchvisions(monkeypatch, backbone):
    asked = []

    def download(url, **options):
        asked.append(url)
        raise OSError("no connection")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    with pytest.raises(UserError, match="no connection"):
        dense_on_meta(backbone, weights="imagenet")
    assert len(asked) == 1 and asked[0].startswith(f"https://download.pytorch.org/models/{backbone}-")


@pytest.mark.parametrize("backbone, options, words", [
    ("vgg16", {}, "vgg16 is not available: choose one of resnet101, resnet50, mobilenet_v2, unet, tiny"),
    ("resnet101", {"output_stride": 4}, "output stride 4 is not available: resnet101 takes one of 8, 16"),
    ("resnet50", {"output_stride": 32}, "output stride 32 is not available: resnet50 takes one of 8, 16"),
    ("mobilenet_v2", {"output_stride": 4}, "mobilenet_v2 takes one of 8, 16"),
    ("tiny", {"output_stride": 2}, "output stride 2 is not available: tiny takes one of 4, 8, 16"),
    ("unet", {"output_stride": 16}, "output stride 16 is not available: unet takes one of 1, 8"),
    ("unet", {"width": 0}, "width 0 is not available for unet: unet takes 1 or more"),
    ("tiny", {"width": 32}, "width 32 is not available for tiny: unet takes 1 or more, others 64")])
def test_dense_options_that_do_not_exist_are_one_sentence(backbone, options, words):
    with pytest.raises(UserError) as error:
        dense_on_meta(backbone, **options)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_unet_may_be_asked_for_its_own_stride():
    assert dense_on_meta("unet", output_stride=1).stride == dense_on_meta("unet", output_stride=8).stride == 1
