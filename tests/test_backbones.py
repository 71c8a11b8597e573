"""The networks below each paper's own head: common/{backbones,mit,heads,weights}.py.

Held here: the published numbers of parameters; every pair has its shapes; MiT's block, every head with its
gradients, dilated networks and U-Net equal a computation from their bare tensors; weights of every release
load whole, or one sentence refuses them. Nothing is downloaded; on "meta", networks have shapes alone.
"""
import math
import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from common import heads
from common.backbones import EXTRACTORS, GOES_WITH, TinyBackbone, build_dense, build_extractor, build_network
from common.mit import MixBlock, MixTransformer
from common.weights import load_mit_weights
from trees import message

PAIRS = [(backbone, head, {}) for head, names in GOES_WITH.items() for backbone in names
         if head != "mlp" or backbone not in ("mit_b3", "mit_b4", "mit_b5")]        # those: as with segformer
DILATED, FINE = ("fcn", "deeplabv2", "deeplabv3plus"), dict(last_stride=1)


def on_meta(build, *args, **options):
    with torch.device("meta"):
        return build(*args, **options)


def image_on_meta(*shape):
    return torch.empty(*shape, device="meta")


# ---- sizes and shapes ------------------------------------------------------------------------------------

DEEP_STEM = 9 * (3 * 64 + 64 * 64 + 64 * 128) - 49 * 3 * 64             # three 3x3 instead of one 7x7
DEEP_REST = 64 * (64 + 256) + 2 * (64 + 64 + 128 - 64)                  # layer1 reads 64 channels more; norms


@pytest.mark.parametrize("backbone, head, options, rest, millions", [   # rest: e.g. a classifier
    ("mit_b0", "segformer", {}, 257 * 150, "3.754"), ("mit_b1", "segformer", {}, 257 * 150, "13.717"),
    ("mit_b2", "segformer", {}, 257 * 150, "24.762"), ("mit_b3", "segformer", {}, 257 * 150, "44.638"),
    ("mit_b4", "segformer", {}, 257 * 150, "61.408"), ("mit_b5", "segformer", {}, 257 * 150, "82.008"),
    ("mit_b1", "mlp", FINE, 257 * 21, "13.682645"), ("mit_b3", "mlp", FINE, 257 * 21, "44.603349"),
    ("swin_t", "upernet", {}, 513 * 150, "60"), ("swin_s", "upernet", {}, 513 * 150, "81"),
    ("swin_b", "upernet", {}, 513 * 150, "121"), ("convnext_tiny", "upernet", {}, 513 * 150, "60"),
    ("convnext_small", "upernet", {}, 513 * 150, "82"), ("convnext_base", "upernet", {}, 513 * 150, "122"),
    ("resnet101", "deeplabv2", {}, -2050 * 256, "42.500160"), ("tiny", "segformer", {}, 0, "0.3"),
    ("resnet50", "deeplabv2", {}, -2050 * 256, "23.508032"),
    ("mobilenet_v2", "deeplabv2", {}, -322 * 256, "1.811712"),
    ("resnet101", "deeplabv3plus", {}, 257 * 21 + DEEP_STEM + DEEP_REST, "59.47")])
def test_networks_have_the_published_number_of_parameters(backbone, head, options, rest, millions):
    network = on_meta(build_network, backbone, head, 150, **options)
    total = sum(p.numel() for p in network.parameters()) + rest
    assert f"{total / 1e6:.{len(millions.partition('.')[2])}f}" == millions


@pytest.mark.parametrize("backbone, head, options", PAIRS + [("mit_b1", "mlp", FINE)] + [
    (name, head, dict(output_stride=16, head_channels=9)) for name in ("resnet50", "mobilenet_v2")
    for head in DILATED])
def test_shapes_of_every_pair(backbone, head, options):
    network, wide = on_meta(build_network, backbone, head, 150, **options), head in ("fcn", "upernet")
    channels = 64 if backbone == "tiny" else 512 if wide and backbone != "mobilenet_v2" else 256
    channels, last = options.get("head_channels", channels), 16 if options or backbone == "tiny" else 32
    strides = (4, 8, 8, 8) if head in DILATED and not options else (4, 8, 16, last)
    stride = strides[3] if head in ("fcn", "deeplabv2") else 4
    whole, seen = math.floor if backbone.startswith(("swin", "convnext")) else math.ceil, []
    network.backbone.register_forward_hook(lambda module, args, levels: seen.append(levels))
    for height, width, training in ((101, 77, True), (360, 480, False)):
        features, aux_logits = network.train(training)(torch.empty(2, 3, height, width, device="meta"))
        levels = [tuple(level.shape[1:]) for level in seen.pop()]
        sizes = [(whole(height / s), whole(width / s)) for s in strides]
        assert features.shape == (2, channels, whole(height / stride), whole(width / stride))
        assert levels == [(d, *size) for d, size in zip(network.backbone.dims, sizes)] or whole is math.floor
        aux = (2, 150, *levels[2][1:]) if wide and training else None   # the auxiliary head only trains
        assert aux == (aux_logits if aux_logits is None else aux_logits.shape)
    assert (network.channels, network.stride) == (channels, stride)


@pytest.mark.parametrize("backbone", ["swin_t", "convnext_tiny"])
def test_every_level_of_swin_and_convnext_is_normalised(backbone):
    with torch.no_grad():
        for level in build_network(backbone, "upernet", 5).eval().backbone(torch.randn(1, 3, 64, 64)):
            assert level.mean(1).abs().max() < 1e-3 and (level.std(1, correction=0) - 1).abs().max() < 1e-2


def test_mix_block_equals_a_written_out_computation():
    torch.manual_seed(0)
    block = MixBlock(dim=8, heads=2, sr_ratio=2, mlp_ratio=4).double().eval().requires_grad_(False)
    for p in block.parameters():
        nn.init.normal_(p, std=0.5)
    norm1, norm2, norm = ((lambda x, n=n, eps=eps: F.layer_norm(x, (8,), n.weight, n.bias, eps))
                          for n, eps in ((block.norm1, 1e-6), (block.norm2, 1e-6), (block.attn.norm, 1e-5)))
    attn, mlp, image = block.attn, block.mlp, torch.randn(1, 6, 5, 8, dtype=torch.float64)
    x, y = image[0].flatten(0, 1), norm1(image[0])                      # (30,8), (6,5,8)
    reduced = torch.stack([torch.einsum("abc,dcab->d", y[2 * i:2 * i + 2, 2 * j:2 * j + 2], attn.sr.weight)
                           for i in range(3) for j in range(2)]) + attn.sr.bias     # the fifth column is left
    kv = norm(reduced) @ attn.kv.weight.T + attn.kv.bias                # (6,16)
    q, k, v = y.flatten(0, 1) @ attn.q.weight.T + attn.q.bias, kv[:, :8], kv[:, 8:]
    mixed = [torch.softmax(q[:, h] @ k[:, h].T / 2, 1) @ v[:, h] for h in (slice(0, 4), slice(4, 8))]
    x = x + torch.cat(mixed, 1) @ attn.proj.weight.T + attn.proj.bias
    y = F.pad((norm2(x) @ mlp.fc1.weight.T + mlp.fc1.bias).view(6, 5, 32), (0, 0, 1, 1, 1, 1))
    conv = mlp.dwconv.dwconv                                            # (32,1,3,3)
    y = sum(y[i:i + 6, j:j + 5] * conv.weight[:, 0, i, j] for i, j in np.ndindex(3, 3)) + conv.bias
    y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))                     # exact GELU
    x = x + y.flatten(0, 1) @ mlp.fc2.weight.T + mlp.fc2.bias
    torch.testing.assert_close(block(image)[0].flatten(0, 1), x)


@pytest.mark.parametrize("backbone, head, options, rate, blocks", [
    ("mit_b0", "mlp", {}, 0.1, 8), ("swin_t", "upernet", {}, 0.3, 12), ("swin_b", "upernet", {}, 0.3, 24),
    ("convnext_tiny", "upernet", {}, 0.4, 18), ("convnext_small", "upernet", {}, 0.3, 36),
    ("convnext_base", "upernet", {}, 0.4, 36), ("swin_t", "upernet", dict(drop_path=0.1), 0.1, 12)])
def test_drop_path_rises_linearly_and_drops_images_in_training_only(backbone, head, options, rate, blocks):
    network = on_meta(build_network, backbone, head, 5, **options)
    rates = [m.p for m in network.modules() if isinstance(m, torchvision.ops.StochasticDepth)]
    assert rates == pytest.approx([rate * i / (blocks - 1) for i in range(blocks)])
    torch.manual_seed(0)
    block, x = MixBlock(8, 2, 1, 4), torch.randn(64, 4, 4, 8)
    block.drop_path.p = 0.5
    assert 4 < (block(x) == x).flatten(1).all(1).sum() < 30             # both branches dropped: 1 in 4
    assert not (block.eval()(x) == x).flatten(1).all(1).any()


def test_initialisation_is_that_of_mmsegmentation_and_of_the_mlp_heads_release():
    torch.manual_seed(0)
    mit, fcn = build_network("mit_b0", "mlp", 5), build_network("mobilenet_v2", "fcn", 50)
    ffn, last = mit.backbone.block4[0].mlp, fcn.aux_head[2]
    for layer, std in ((ffn.fc1, 0.02), (ffn.dwconv[0], (2 / 9) ** 0.5), (last, 0.01),
                       (fcn.head.fuse[0], (2 / 9 / 256) ** 0.5), (mit.head.fuse, (2 / 256) ** 0.5)):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.05)
        assert layer.bias is None or not layer.bias.any()
    for conv, dim in zip(mit.head.levels, (32, 64, 160, 256)):          # torch's default for a Linear
        for value in (conv.weight, conv.bias):
            assert value.std().item() == pytest.approx((3 * dim) ** -0.5, rel=0.15)
            assert value.abs().max() <= dim ** -0.5


def randomise(module):
    """Random weights and running statistics, so that no term can hide."""
    for value in module.state_dict().values():
        if value.ndim == 1:
            value.copy_(torch.rand(value.shape) + 0.1)
        elif value.ndim:
            value.copy_(torch.randn(value.shape) / value[0].numel() ** 0.5)
    return module


def norm_relu(x, norm):
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-5).relu()


def unit(x, layers, rate=1):
    """Convolution without bias, BatchNorm in evaluation, ReLU."""
    weight = layers[0].weight
    return norm_relu(F.conv2d(x, weight, padding=rate * (weight.shape[-1] // 2), dilation=rate), layers[1])


def resized(x, like):
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


def joined(maps, layers):
    """Concatenated at the size of the first, and fused."""
    return unit(torch.cat([resized(x, maps[0]) for x in maps], 1), layers)


def segformer(head, levels):
    return joined([unit(x, conv) for x, conv in zip(levels, head.levels)], head.fuse)


def mlp(head, levels):
    """In the order of the paper: project, resize, concatenate, fuse (SegFormer, Eq. 4)."""
    maps = [F.conv2d(x, conv.weight, conv.bias) for x, conv in zip(levels, head.levels)]
    maps = torch.cat([resized(x, maps[0]) for x in maps[::-1]], 1)
    return norm_relu(F.conv2d(maps, head.fuse.weight), head.norm)


def fcn(head, levels):
    return joined([levels[3], unit(unit(levels[3], head.convs[0]), head.convs[1])], head.fuse)


def upernet(head, levels):
    pools = [unit(F.adaptive_avg_pool2d(levels[3], n), pool[1]) for n, pool in zip((1, 2, 3, 6), head.pools)]
    x = joined([levels[3], *pools], head.bottleneck)
    maps = [x]
    for level, lateral, smooth in list(zip(levels, head.laterals, head.smooth))[::-1]:
        x = unit(level, lateral) + resized(x, level)
        maps.insert(0, unit(x, smooth))
    return joined(maps, head.fuse)


def deeplabv2(head, levels):
    return unit(levels[3], head.reduce)


def deeplabv3plus(head, levels, rates):
    low, top = levels[0], levels[3]
    pooled = unit(top.mean((2, 3), keepdim=True), head.pool[1]) * torch.ones_like(top[:, :1])
    branches = [unit(top, layers, rate) for layers, rate in zip(head.branches, (1, *rates))]
    x = unit(torch.cat([*branches, pooled], 1), head.project[0])
    return unit(unit(torch.cat([resized(x, low), unit(low, head.low)], 1), head.refine[0]), head.refine[1])


@pytest.mark.parametrize("head, written_out, last, options", [
    (heads.SegFormerHead, segformer, (2, 2), {}), (heads.MLPHead, mlp, (2, 2), {}),
    (heads.MLPHead, mlp, (4, 3), {}), (heads.FCNHead, fcn, (4, 3), {}), (heads.UPerHead, upernet, (2, 2), {}),
    (heads.DeepLabv2Head, deeplabv2, (4, 3), {}),
    (heads.DeepLabv3PlusHead, partial(deeplabv3plus, rates=(6, 12, 18)), (38, 21), dict(output_stride=16)),
    (heads.DeepLabv3PlusHead, partial(deeplabv3plus, rates=(12, 24, 36)), (38, 21), dict(output_stride=8))])
def test_every_head_and_its_gradients_equal_a_written_out_computation(head, written_out, last, options):
    torch.manual_seed(0)
    head = randomise(head((4, 6, 8, 10), 5, **options).double().eval())
    sizes = ((4, 13, 11), (6, 7, 6), (8, 4, 3), (10, *last))
    levels = [torch.randn(2, *size, dtype=torch.float64, requires_grad=True) for size in sizes]
    got, expected = head(levels), written_out(head, levels)
    torch.testing.assert_close(got, expected)
    assert (expected > 0).double().mean() > 0.1 and expected.std() > 0.01
    inputs, weights = [*head.parameters(), *levels], torch.rand(expected.shape, dtype=torch.float64)
    gradients = [torch.autograd.grad(y, inputs, weights, allow_unused=True) for y in (got, expected)]
    torch.testing.assert_close(*gradients)


def test_deeplabv2s_classifier_sums_four_dilations_and_deeplabv3plus_drops_half_its_channels_in_training():
    net, x = randomise(heads.DilatedClassifier(3, 2)), torch.randn(1, 3, 51, 30)
    torch.testing.assert_close(net(x), sum(F.conv2d(x, conv.weight, conv.bias, padding=rate, dilation=rate)
                                           for conv, rate in zip(net.convs, (6, 12, 18, 24), strict=True)))
    project = heads.DeepLabv3PlusHead((4, 6, 8, 10), 64, output_stride=16).project
    for training, low, high in ((True, 0.45, 0.6), (False, 0, 0.1)):
        y = project.train(training)(torch.randn(16, 5 * 64, 4, 4))
        assert low <= (y == 0).flatten(2).all(2).float().mean() <= high


def saved(content, folder):
    torch.save(content, folder / "w.pth")
    return folder / "w.pth"


def body_of(net):
    """Up to the last map: without pooling and classifier, mobilenet_v2 also without its conv to 1280."""
    features = getattr(net, "stages", getattr(net, "features", None))
    return nn.Sequential(*list(net.children())[:-2]) if features is None else features[:18]


@pytest.mark.parametrize("name, output_stride", [("mobilenet_v2", 8), ("mobilenet_v2", 16), ("resnet50", 8),
                                                 ("resnet50", 16), ("tiny", 4), ("tiny", 8), ("tiny", 16)])
def test_dilated_networks_have_the_strided_ones_values_on_a_finer_grid(tmp_path, name, output_stride):
    torch.manual_seed(3)
    net = (TinyBackbone() if name == "tiny" else torchvision.models.get_model(name)).eval()
    start, images, found = [v.clone() for v in net.state_dict().values()], torch.randn(1, 3, 97, 70), []
    options = dict(weights=saved(randomise(net).state_dict(), tmp_path), output_stride=output_stride)
    if name != "tiny":
        found.append(build_network(name, "fcn", 3, head_channels=8, **options).eval().backbone(images)[3])
    if name != "resnet50":                                              # build_dense's differ, see below
        dense = build_dense(name, **options).eval()
        found.append(dense(images))
        assert (dense.channels, dense.stride) == (found[-1].shape[1], output_stride)
    coarse, step = body_of(net)(images), (16 if name == "tiny" else 32) // output_stride
    for fine in found:
        assert fine.shape[2:] == (math.ceil(97 / output_stride), math.ceil(70 / output_stride))
        assert (fine[:, :, ::step, ::step] - coarse).abs().max() < 1e-4 * coarse.abs().max()
    torch.manual_seed(3)
    again = build_dense("tiny", output_stride=min(output_stride, 16)).state_dict().values()
    assert name != "tiny" or all(map(torch.equal, start, again))        # the same start whatever the stride


@pytest.mark.parametrize("output_stride, dilations, cells", [(8, (2, 4), 65), (16, (1, 2), 33)])
def test_dense_resnet_dilates_every_block_of_a_layer_as_deeplab_does(output_stride, dilations, cells):
    torch.manual_seed(4)
    dense = randomise(build_dense("resnet50", output_stride=output_stride)).eval()
    net = torchvision.models.resnet50(replace_stride_with_dilation=[False, output_stride == 8, True]).eval()
    net.load_state_dict(dense.state_dict(), strict=False)
    net.maxpool.ceil_mode = True                                        # a last window that is not full
    for layer, dilation in zip((net.layer3, net.layer4), dilations):
        layer[0].conv2.dilation = layer[0].conv2.padding = (dilation, dilation)     # not the one before
    torch.testing.assert_close(dense(images := torch.randn(1, 3, 47, 58)), body_of(net)(images))
    for side in (512, 513):                                             # (H + 1) // stride + 1
        out = on_meta(build_dense, "resnet50", output_stride=output_stride)(image_on_meta(1, 3, side, 321))
        assert out.shape == (1, dense.channels, cells, 41 if output_stride == 8 else 21)
    assert (dense.channels, dense.stride) == (2048, output_stride)


@pytest.mark.parametrize("height, width", [(39, 22), (1, 1), (16, 15)])
def test_unet_equals_a_written_out_computation_at_any_size(height, width):
    torch.manual_seed(4)
    unet, skips = randomise(build_dense("unet", width=2).double().eval()), []
    x = images = torch.randn(2, 3, height, width, dtype=torch.float64)
    for i, convs in enumerate(unet.down):
        if i:                                                           # 2x2 maxima over what there is
            x = F.max_pool2d(F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), value=-math.inf), 2)
        x = unit(unit(x, convs[0]), convs[1])
        skips.append(x)
    for up, convs, skip in list(zip(unet.up, unet.merge, skips))[::-1]:
        fine = torch.einsum("bchw,cdij->bdhiwj", x, up.weight).flatten(4, 5).flatten(2, 3)
        fine = (fine + up.bias.view(-1, 1, 1))[:, :, :skip.shape[2], :skip.shape[3]]
        x = unit(unit(torch.cat([skip, fine], 1), convs[0]), convs[1])
    torch.testing.assert_close(unet(images), F.conv2d(x, unet.last.weight, unet.last.bias))
    assert [skip.shape[1] for skip in skips] == [2, 4, 8, 16, 32] and (unet.channels, unet.stride) == (64, 1)
    assert sum(p.numel() for p in on_meta(build_dense, "unet").parameters()) == 31_041_728


@pytest.mark.parametrize("name, channels", [*zip(EXTRACTORS, (48, 1280, 512, 2048, 2048, 2048, 1024, 2208))])
def test_extractors_have_their_channels_and_stride(name, channels):
    extractor, cells = on_meta(build_extractor, name), 28 if name == "tiny" else 7
    assert extractor(image_on_meta(2, 3, 224, 224)).shape == (2, extractor.channels, cells, cells)
    assert extractor.channels == channels


@pytest.mark.parametrize("name, pool", [("resnet34", "avgpool"), ("mobilenet_v2", "classifier"),
                                        ("densenet121", "classifier"), ("tiny", "stages.2")])
def test_extractors_give_what_the_networks_own_classifier_or_next_stage_sees(tmp_path, name, pool):
    net = TinyBackbone() if name == "tiny" else torchvision.models.get_model(name)
    extractor, seen = build_extractor(name, saved(randomise(net).state_dict(), tmp_path)).eval(), []
    net.eval().get_submodule(pool).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        features, _ = extractor(x := torch.randn(2, 3, 64, 96)), net(x)
    features = features if seen[0].ndim == 4 else features.mean((2, 3))     # DenseNet's last ReLU included
    torch.testing.assert_close(features, seen[0], rtol=1e-4, atol=1e-4)


TABLE = ("segformer with mit_b0.*; fcn with resnet50.*; upernet with swin_t.*; mlp with mit_b0.*; "
         "deeplabv2 with resnet50.*; deeplabv3plus with resnet50")


@pytest.mark.parametrize("build, args, options, words", [
    *[(build_network, pair, {}, f"head {pair[1]} does not go with backbone {pair[0]}; .*{TABLE}")
      for pair in (("swin_t", "fcn", 5), ("mit_b0", "uper", 5), ("resnet101", "mlp", 5))],
    *[(build_network, ("resnet50", head, 5), dict(output_stride=4), f"4 .* the {head} head takes 8 or 16")
      for head in DILATED],
    (build_network, ("mit_b0", "mlp", 5), dict(last_stride=3), "last stride 3 is not available: .* 1 or 2"),
    (build_network, ("tiny", "mlp", 5), FINE, "last stride 1 is for MiT .*: leave it at 2 for tiny"),
    (build_network, ("resnet50", "fcn", 5), dict(drop_path=0.1), "resnet50 has no blocks to drop"),
    (build_extractor, ("vgg",), {}, "vgg is not available: choose one of tiny, mobilenet_v2.*densenet161"),
    (build_dense, ("vgg16",), {}, "vgg16 .* choose one of resnet101, resnet50, mobilenet_v2, unet, tiny"),
    (build_dense, ("resnet50",), dict(output_stride=32), "stride 32 .* resnet50 takes one of 8, 16"),
    (build_dense, ("tiny",), dict(output_stride=2), "stride 2 .* tiny takes one of 4, 8, 16"),
    (build_dense, ("unet",), dict(output_stride=16), "stride 16 .* unet takes one of 1, 8"),
    (build_dense, ("unet",), dict(width=0), "width 0 .* unet takes 1 or more"),
    (build_dense, ("tiny",), dict(width=32), "width 32 .* others 64"),
    (build_network, ("mit_b3", "mlp", 5), dict(weights="imagenet"), "mit_b3.pth .*nvidia/mit-b3"),
    (build_dense, ("unet",), dict(weights="imagenet"), "no ImageNet weights for unet"),
    (build_extractor, ("resnet50_inat",), dict(weights="imagenet"), "iNaturalist.*best_model.pth"),
    (build_extractor, ("tiny",), dict(weights="gone.pth"), "gone.pth: no such file"),
    (build_extractor, ("tiny",), dict(weights="model.safetensors"), "another package")])
def test_what_does_not_exist_or_go_together_is_one_sentence(build, args, options, words):
    assert re.search(words, on_meta(message, build, *args, **options))


@pytest.mark.parametrize("head", ["upernet", "deeplabv3plus"])
def test_heads_that_pool_name_the_remedy_for_a_batch_of_one(head):
    network = build_network("mobilenet_v2", head, 5, head_channels=8)
    assert re.search(f"the {head} head .* batch size of 2", message(network, torch.randn(1, 3, 64, 64)))
    assert network.eval()(torch.randn(1, 3, 64, 64))[0].shape == (1, 8, 16, 16)


# ---- pretrained weights ----------------------------------------------------------------------------------

HUGGINGFACE = {
    "patch_embed": "patch_embeddings", "block": "block", "norm": "layer_norm", "proj": "proj", "": "",
    "attn.q": "attention.self.query", "attn.proj": "attention.output.dense", "attn.sr": "attention.self.sr",
    "attn.norm": "attention.self.layer_norm", "norm1": "layer_norm_1", "norm2": "layer_norm_2",
    "mlp.fc1": "mlp.dense1", "mlp.fc2": "mlp.dense2", "mlp.dwconv.dwconv": "mlp.dwconv.dwconv"}


def mit_state():
    state = randomise(build_network("mit_b0", "mlp", 5).backbone).state_dict()
    return state | {"head.weight": torch.zeros(1000, 256), "head.bias": torch.zeros(1000)}


def huggingface(original, prefix="segformer."):
    """The same tensors under HuggingFace's names, written from its naming and not from ours."""
    state = {"classifier.bias": torch.zeros(1000), "decode_head.batch_norm.bias": torch.ones(3)}
    for name, value in original.items():
        part, stage, block, layer, kind = re.fullmatch(r"([a-z_]+)(\d?)(\.\d+)?\.?(.*)\.(\w+)", name).groups()
        keys = ["attention.self.key", "attention.self.value"] if layer == "attn.kv" else [HUGGINGFACE[layer]]
        if part != "head":
            place = f"{prefix}encoder.{HUGGINGFACE[part]}.{int(stage) - 1}{block or ''}."
            for key, half in zip(keys, value.chunk(len(keys))):
                state[f"{place}{key}.{kind}".replace("..", ".")] = half
    return state


def bbn(resnet):
    """A ResNet-50's state dict as BBN saves it: layer4.2 twice, as two branches, and another classifier."""
    state = {"module.classifier.weight": torch.zeros(9, 8)}
    for name, value in resnet.items():
        if name.startswith("layer4.2."):
            state[f"module.backbone.cb_block.{name[9:]}"] = value
            state[f"module.backbone.rb_block.{name[9:]}"] = torch.zeros_like(value)
        elif not name.startswith("fc."):
            state[f"module.backbone.{name}"] = value
    return state


def old_densenet(state):
    return {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", k): v for k, v in state.items()}


def wrapped(state):
    return {"state_dict": state, "epoch": 180}


def bare(state):
    return {"model": {k: v for k, v in state.items() if not re.match("classifier|.*num_batches", k)}}


def changed(state, name, value=None):
    return {k: v for k, v in state.items() if k != name} | ({} if value is None else {name: value})


def source_of(name):
    """A random state dict of this network, under the names of its release."""
    if name == "mit_b0":
        return mit_state()
    own = {"unet": partial(build_dense, "unet", width=4), "tiny": TinyBackbone}
    return randomise(own.get(name, partial(torchvision.models.get_model, name))()).state_dict()


def network(backbone, head="mlp"):
    return partial(build_network, backbone, head, 5, head_channels=8)


def extractor(name):
    return partial(build_extractor, name)


MIT, MOBILENET = network("mit_b0"), network("mobilenet_v2")
TINY, DENSENET = extractor("tiny"), extractor("densenet121")


@pytest.mark.parametrize("build, source, convert", [
    (MIT, "mit_b0", dict), (MIT, "mit_b0", huggingface), (MIT, "mit_b0", partial(huggingface, prefix="")),
    (MOBILENET, "mobilenet_v2", dict), (MOBILENET, "mobilenet_v2", bare), (network("tiny"), "tiny", dict),
    (network("swin_t", "upernet"), "swin_t", dict), (extractor("resnet50_inat"), "resnet50", bbn),
    (network("convnext_tiny", "upernet"), "convnext_tiny", dict), (DENSENET, "densenet121", dict),
    (DENSENET, "densenet121", old_densenet), (partial(build_dense, "resnet50"), "resnet50", dict),
    (partial(build_dense, "unet", width=4), "unet", dict), (partial(build_dense, "tiny"), "tiny", wrapped)])
def test_a_file_fills_the_network_that_it_belongs_to(tmp_path, build, source, convert):
    own, rest = source_of(source), ("fc.", "classifier.", "head.", "norm.", "features.18.")   # classifiers
    net = build(weights=saved(convert(own), tmp_path))
    body = getattr(net, "backbone", net)
    loaded = [v for v in getattr(body, "stages", body).state_dict().values() if v.ndim]
    expected = [v for k, v in own.items() if v.ndim and not k.startswith(rest)]
    assert len(loaded) == len(expected) and all(torch.equal(a, b) for a, b in zip(loaded, expected))


@pytest.mark.parametrize("build, source, change, words", [
    (MIT, "mit_b0", lambda s: {k.replace("block1.", "block5."): v for k, v in s.items()},
     r"40 missing: (block1\S+ ){4}block1\S+ \.\.\.; 40 unexpected: (block5\S+ ){4}block5\S+ \.\.\.\)"),
    (MIT, "mit_b0", lambda s: changed(s, "norm3.bias"), r"1 missing: norm3.bias\)"),
    (MIT, "mit_b0", lambda s: changed(s, "norm3.bias", torch.zeros(7)), "1 of another shape: norm3.bias"),
    (MIT, "mit_b0",
     lambda s: changed(huggingface(s), "segformer.encoder.block.0.0.attention.self.key.bias"),
     "1 missing: block1.0.attn.kv.bias; 1 unexpected: block1.0.attn.value.bias"),
    (MIT, "tiny", lambda s: {"layers.0.0.projection.weight": torch.zeros(8)}, "mmsegmentation"),
    (extractor("resnet50_inat"), "resnet50", dict, "missing: conv1.weight"),
    (extractor("resnet50"), "resnet50", bbn, "unexpected: module."),
    (extractor("densenet161"), "densenet121", dict, "missing: features.denseblock3."),
    (partial(build_dense, "unet", width=5), "unet", dict, "of another shape: down.0."),
    (TINY, "tiny", lambda s: nn.Linear(2, 2), "cannot read"),         # a pickle is never run
    (TINY, "tiny", list, "holds no state dict"), (TINY, "tiny", None, "cannot read"),
    (TINY, "tiny", lambda s: {"epoch": 3}, "holds no state dict")])
def test_a_file_that_does_not_belong_is_named_and_refused(tmp_path, build, source, change, words):
    path = saved(change(source_of(source)) if change else source_of(source), tmp_path)
    if change is None:                                                  # a download that broke off
        path.write_bytes(path.read_bytes()[:5000])
    said = message(build, weights=path)
    assert str(path) in said and re.search(words, said)


def test_nothing_is_loaded_where_one_tensor_does_not_fit():
    model, other = (MixTransformer((8, 8, 8, 8), (1, 2, 1, 1), (1, 2, 4, 4), (8, 4, 2, 1)) for _ in range(2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    message(load_mit_weights, model, changed(randomise(other).state_dict(), "norm4.bias"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_url_fills_a_network_too(monkeypatch):
    state = randomise(TinyBackbone()).state_dict()
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **options: {"model": state})
    loaded = build_dense("tiny", "https://a.org/tiny.pth").state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in loaded)


TORCHVISION = "https://download.pytorch.org/models/"


@pytest.mark.parametrize("build, weights, start", [
    *[(extractor(name), "imagenet", TORCHVISION + name) for name in ("resnet34", "resnet152", "densenet161")],
    (partial(build_dense, "resnet101"), "imagenet", TORCHVISION + "resnet101"),
    (network("swin_t", "upernet"), "imagenet", TORCHVISION + "swin_t"),
    *[(MIT, f"https://{site}.org/model.bin?x=1", f"https://{site}.org/") for site in "ab"]])
def test_downloads_name_their_url_when_they_fail_and_are_cached_apart(monkeypatch, build, weights, start):
    def download(url, file_name=None, map_location=None, weights_only=False):
        raise OSError(f"asked {url} {file_name} {weights_only}")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    url, name, safe = re.search(r"asked (\S+) (\S+) (\w+)", on_meta(message, build, weights=weights)).groups()
    assert url.startswith(start) and safe == "True"                     # others: a hash before the name
    assert name in url if weights == "imagenet" else re.fullmatch(r"\w{8}_model\.bin", name)
