"""The networks below each paper's own head: common/{backbones,mit,heads,weights}.py.

Held here: the published numbers of parameters; every pair has its shapes; MiT's block, every head with its
gradients, dilated networks and U-Net equal a computation from their bare tensors; weights of every release
load whole, or one sentence refuses them. Nothing is downloaded; on "meta", networks have shapes alone.
"""
import math
import re
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torchvision.models.feature_extraction import create_feature_extractor

from common import heads
from common.backbones import GOES_WITH, TinyBackbone, build_dense, build_extractor, build_network
from common.mit import MixBlock
from trees import message, saved

FINE = dict(last_stride=1)


def on_meta(build, *args, **options):
    with torch.device("meta"):
        return build(*args, **options)


@pytest.mark.parametrize("backbone, head, options, rest, millions", [   # rest: e.g. a classifier
    *[(f"mit_b{i}", "segformer", {}, 257 * 150, millions)
      for i, millions in enumerate(("3.754", "13.717", "24.762", "44.638", "61.408", "82.008"))],
    ("mit_b1", "mlp", FINE, 257 * 21, "13.682645"), ("mit_b3", "mlp", FINE, 257 * 21, "44.603349"),
    ("swin_t", "upernet", {}, 513 * 150, "60"), ("swin_s", "upernet", {}, 513 * 150, "81"),
    ("swin_b", "upernet", {}, 513 * 150, "121"), ("convnext_tiny", "upernet", {}, 513 * 150, "60"),
    ("convnext_small", "upernet", {}, 513 * 150, "82"), ("convnext_base", "upernet", {}, 513 * 150, "122"),
    ("resnet101", "deeplabv2", {}, -2050 * 256, "42.500160"), ("tiny", "segformer", {}, 0, "0.3"),
    ("resnet101", "deeplabv3plus", {}, 257 * 21 + 123_776, "59.47")])   # the last: the larger stem of V1c
def test_networks_have_the_published_number_of_parameters(backbone, head, options, rest, millions):
    network = on_meta(build_network, backbone, head, 150, **options)
    total = sum(p.numel() for p in network.parameters()) + rest
    assert f"{total / 1e6:.{len(millions.partition('.')[2])}f}" == millions


@pytest.mark.parametrize("backbone, head, options", [
    *[(name, head, {}) for head, names in GOES_WITH.items() for name in names
      if name in ("mit_b0", "mobilenet_v2", "tiny", "resnet50", "swin_t", "convnext_tiny")],
    ("mit_b0", "mlp", FINE), ("resnet50", "deeplabv3plus", dict(output_stride=16)),
    ("mobilenet_v2", "fcn", dict(output_stride=16, head_channels=9))])
def test_shapes_of_every_pair(backbone, head, options):
    network, wide = on_meta(build_network, backbone, head, 150, **options), head in ("fcn", "upernet")
    coarsest = 16 if options or backbone == "tiny" else 32
    if head in ("fcn", "deeplabv2", "deeplabv3plus"):
        coarsest = options.get("output_stride", 8)
    channels = {"tiny": 64, "mobilenet_v2": 256}.get(backbone, 512 if wide else 256)
    assert network.channels == options.get("head_channels", channels)
    assert network.stride == (coarsest if head in ("fcn", "deeplabv2") else 4)
    image = torch.empty(2, 3, *((96, 64) if head == "upernet" else (101, 77)), device="meta")
    levels, (features, aux_logits) = network.backbone(image), network(image)
    strides = [min(stride, coarsest) for stride in (4, 8, 16, 32)] + [network.stride]
    sizes = [[math.ceil(side / stride) for side in image.shape[2:]] for stride in strides]
    assert [[*y.shape[1:]] for y in levels] == [[d, *size] for d, size in zip(network.backbone.dims, sizes)]
    assert features.shape == (2, network.channels, *sizes[4])
    assert aux_logits is None if not wide else aux_logits.shape == (2, 150, *sizes[2])
    assert network.eval()(image[:1])[1] is None                         # the auxiliary head only trains
    if backbone in ("swin_t", "convnext_tiny"):                         # up to 3 rows or columns are lost
        assert network(image[:1, :, :-1, :-1])[0].shape == (1, 512, 23, 15)


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
                           for i in range(3) for j in range(2)]) + attn.sr.bias    # the fifth column is left
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
    ("mit_b0", "mlp", {}, 0.1, 8), ("convnext_tiny", "upernet", {}, 0.4, 18),
    ("swin_t", "upernet", {}, 0.3, 12), ("swin_t", "upernet", dict(drop_path=0.1), 0.1, 12)])
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
    for layer, std in ((mit.backbone.block4[0].mlp.fc1, 0.02), (fcn.aux_head[2], 0.01),
                       (mit.backbone.block4[0].mlp.dwconv[0], (2 / 9) ** 0.5),
                       (fcn.head.fuse[0], (2 / 9 / 256) ** 0.5), (mit.head.fuse, (2 / 256) ** 0.5)):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.05)
        assert layer.bias is None or not layer.bias.any()
    for value in mit.head.levels[0].parameters():                       # torch's default: uniform
        assert value.abs().max() <= 32 ** -0.5 and value.std().item() == pytest.approx(96 ** -0.5, rel=0.15)


def randomise(module):
    """Random weights and running statistics, so that no term can hide."""
    for value in module.state_dict().values():
        if value.ndim == 1:
            value.copy_(torch.rand(value.shape) + 0.1)
        elif value.ndim:
            value.copy_(torch.randn(value.shape) / value[0].numel() ** 0.5)
    return module


def unit(x, layers, rate=1):
    """Convolution without bias, BatchNorm in evaluation, ReLU."""
    weight, norm = layers[0].weight, layers[1]
    x = F.conv2d(x, weight, padding=rate * (weight.shape[-1] // 2), dilation=rate)
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-5).relu()


def resized(x, like):
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


def joined(maps, layers):
    """Concatenated at the size of the first, and fused."""
    return unit(torch.cat([resized(x, maps[0]) for x in maps], 1), layers)


def written_out(head, levels, rates):
    """What a head makes of the four levels, from its tensors."""
    low, top = levels[0], levels[3]
    if isinstance(head, heads.DeepLabv2Head):
        return unit(top, head.reduce)
    if isinstance(head, heads.FCNHead):
        return joined([top, unit(unit(top, head.convs[0]), head.convs[1])], head.fuse)
    if isinstance(head, heads.SegFormerHead):
        return joined([unit(x, conv) for x, conv in zip(levels, head.levels)], head.fuse)
    if isinstance(head, heads.MLPHead):                                 # in the order of SegFormer's Eq. 4
        maps = [F.conv2d(x, conv.weight, conv.bias) for x, conv in zip(levels, head.levels)]
        maps = torch.cat([resized(x, low) for x in maps[::-1]], 1)
        return unit(maps, (head.fuse, head.norm))
    if isinstance(head, heads.UPerHead):
        pools = [unit(F.adaptive_avg_pool2d(top, n), pool[1]) for n, pool in zip((1, 2, 3, 6), head.pools)]
        x = joined([top, *pools], head.bottleneck)
        maps = [x]
        for level, lateral, smooth in list(zip(levels, head.laterals, head.smooth))[::-1]:
            x = unit(level, lateral) + resized(x, level)
            maps.insert(0, unit(x, smooth))
        return joined(maps, head.fuse)
    pooled = unit(top.mean((2, 3), keepdim=True), head.pool[1]) * torch.ones_like(top[:, :1])
    branches = [unit(top, layers, rate) for layers, rate in zip(head.branches, (1, *rates))]
    x = unit(torch.cat([*branches, pooled], 1), head.project[0])
    return unit(unit(torch.cat([resized(x, low), unit(low, head.low)], 1), head.refine[0]), head.refine[1])


@pytest.mark.parametrize("head, last, options, rates", [
    (heads.SegFormerHead, (2, 2), {}, ()), (heads.MLPHead, (2, 2), {}, ()), (heads.MLPHead, (4, 3), {}, ()),
    (heads.FCNHead, (4, 3), {}, ()), (heads.UPerHead, (2, 2), {}, ()), (heads.DeepLabv2Head, (4, 3), {}, ()),
    (heads.DeepLabv3PlusHead, (38, 21), dict(output_stride=16), (6, 12, 18)),
    (heads.DeepLabv3PlusHead, (38, 21), dict(output_stride=8), (12, 24, 36))])
def test_every_head_and_its_gradients_equal_a_written_out_computation(head, last, options, rates):
    torch.manual_seed(0)
    head = randomise(head((4, 6, 8, 10), 5, **options).double().eval())
    sizes = ((4, 13, 11), (6, 7, 6), (8, 4, 3), (10, *last))
    levels = [torch.randn(2, *size, dtype=torch.float64, requires_grad=True) for size in sizes]
    got, expected = head(levels), written_out(head, levels, rates)
    torch.testing.assert_close(got, expected)
    assert (expected > 0).double().mean() > 0.1 and expected.std() > 0.01
    inputs, weights = [*head.parameters(), *levels], torch.rand(expected.shape, dtype=torch.float64)
    torch.testing.assert_close(*[torch.autograd.grad(y, inputs, weights, allow_unused=True)
                                 for y in (got, expected)])


def test_deeplabv2s_classifier_sums_four_dilations():
    net, x = randomise(heads.DilatedClassifier(3, 2)), torch.randn(1, 3, 51, 30)
    torch.testing.assert_close(net(x), sum(F.conv2d(x, conv.weight, conv.bias, padding=rate, dilation=rate)
                                           for conv, rate in zip(net.convs, (6, 12, 18, 24), strict=True)))


def released(name):
    """The network whose weights are published under this name, here with random ones."""
    own = {"tiny": TinyBackbone, "mit_b0": lambda: build_network("mit_b0", "mlp", 5).backbone}
    return randomise(own.get(name, partial(torchvision.models.get_model, name))()).eval()


@pytest.mark.parametrize("name, head, last, output_stride", [
    ("tiny", "", "stages.3", 4), ("tiny", "", "stages.3", 8), ("mobilenet_v2", "", "features.17", 16),
    ("mobilenet_v2", "fcn", "features.17", 8), ("resnet50", "fcn", "layer4", 8)])
def test_dilated_networks_have_the_strided_values_on_a_finer_grid(tmp_path, name, head, last, output_stride):
    torch.manual_seed(3)
    net, image = released(name), torch.randn(1, 3, 97, 70)
    options = dict(weights=saved(tmp_path, net.state_dict()), output_stride=output_stride)
    if head:
        fine = build_network(name, head, 3, **options).eval().backbone(image)[3]
    else:
        fine = build_dense(name, **options).eval()(image)
    coarse = create_feature_extractor(net, [last])(image)[last]
    step = (16 if name == "tiny" else 32) // output_stride
    assert fine.shape[2:] == (math.ceil(97 / output_stride), math.ceil(70 / output_stride))
    assert (fine[:, :, ::step, ::step] - coarse).abs().max() < 1e-4 * coarse.abs().max()


@pytest.mark.parametrize("output_stride, dilations, cells", [(8, (2, 4), (65, 41)), (16, (1, 2), (33, 21))])
def test_dense_resnet_dilates_every_block_of_a_layer_as_deeplab_does(output_stride, dilations, cells):
    dense = randomise(build_dense("resnet50", output_stride=output_stride)).eval()
    net = torchvision.models.resnet50(replace_stride_with_dilation=[False, output_stride == 8, True]).eval()
    net.load_state_dict(dense.state_dict(), strict=False)
    net.maxpool.ceil_mode = True                                        # a last window that is not full
    for layer, dilation in zip((net.layer3, net.layer4), dilations):
        layer[0].conv2.dilation = layer[0].conv2.padding = (dilation, dilation)     # not the one before
    image = torch.randn(1, 3, 47, 58)
    torch.testing.assert_close(dense(image), create_feature_extractor(net, ["layer4"])(image)["layer4"])
    assert (dense.channels, dense.stride) == (2048, output_stride)
    for side in (512, 513):                                             # (H + 1) // stride + 1
        assert dense.to("meta")(torch.empty(1, 3, side, 321, device="meta")).shape == (1, 2048, *cells)


def test_unet_equals_a_written_out_computation_at_odd_sizes():
    torch.manual_seed(4)
    unet, skips = randomise(build_dense("unet", width=2).double().eval()), []
    x = images = torch.randn(2, 3, 39, 22, dtype=torch.float64)
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


def bbn(resnet):
    """As BBN saves a ResNet-50: layer4.2 twice, as two branches, and another classifier."""
    own = {k.replace("layer4.2", "cb_block"): v for k, v in resnet.items() if not k.startswith("fc.")}
    rare = {k.replace("cb_", "rb_"): torch.zeros_like(v) for k, v in own.items() if k.startswith("cb_")}
    state = {f"module.backbone.{name}": value for name, value in (own | rare).items()}
    return state | {"module.classifier.weight": torch.zeros(9, 8)}


@pytest.mark.parametrize("name, convert, pool, shape", [                # convert: to the names in its file
    ("resnet50_inat", bbn, "avgpool", (2048, 2, 3)), ("mobilenet_v2", dict, "classifier", (1280, 2, 3)),
    ("densenet121", lambda state: {re.sub(r"(r\d+\.\w+)(\d\.)", r"\1.\2", k): v for k, v in state.items()
                                   if "num_batches" not in k}, "classifier", (1024, 2, 3)),
    ("tiny", lambda state: {"state_dict": state, "epoch": 180}, "stages.2", (48, 8, 12))])
def test_extractors_give_what_the_next_part_of_a_released_network_sees(tmp_path, name, convert, pool, shape):
    net, seen = released(name.removesuffix("_inat")), []
    extractor = build_extractor(name, saved(tmp_path, convert(net.state_dict()))).eval()
    net.get_submodule(pool).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        features, _ = extractor(x := torch.randn(2, 3, 64, 96)), net(x)
    assert features.shape == (2, *shape) and extractor.channels == shape[0]
    features = features if seen[0].ndim == 4 else features.mean((2, 3))     # DenseNet's last ReLU included
    torch.testing.assert_close(features, seen[0], rtol=1e-4, atol=1e-4)


# ---- pretrained weights, and what is refused -------------------------------------------------------------

def huggingface(state):
    """Some of a MiT's tensors under HuggingFace's names, where keys and values stand apart."""
    names = {"patch_embed3.norm": "patch_embeddings.2.layer_norm", "norm4": "layer_norm.3",
             "block2.1.norm1": "block.1.1.layer_norm_1", "block2.1.attn.q": "block.1.1.attention.self.query",
             "block2.1.attn.sr": "block.1.1.attention.self.sr", "block2.1.mlp.fc2": "block.1.1.mlp.dense2",
             "block2.1.attn.norm": "block.1.1.attention.self.layer_norm",
             "block2.1.attn.proj": "block.1.1.attention.output.dense"}
    for kind in ("weight", "bias"):
        for ours, theirs in names.items():
            state[f"segformer.encoder.{theirs}.{kind}"] = state.pop(f"{ours}.{kind}")
        for half, value in zip(("key", "value"), state.pop(f"block2.1.attn.kv.{kind}").chunk(2)):
            state[f"segformer.encoder.block.1.1.attention.self.{half}.{kind}"] = value
    return state | {"decode_head.batch_norm.bias": torch.ones(3), "head.bias": torch.zeros(1000)}


MIT = partial(build_network, "mit_b0", "mlp", 5, head_channels=8)


@pytest.mark.parametrize("build, name, convert", [
    (MIT, "mit_b0", huggingface), (partial(build_network, "swin_t", "upernet", 5), "swin_t", dict)])
def test_a_file_fills_the_backbone_that_it_belongs_to(tmp_path, build, name, convert):
    own = released(name).state_dict()
    body = build(weights=saved(tmp_path, convert(dict(own)))).backbone
    loaded = [*getattr(body, "stages", body).state_dict().values()]
    expected = [value for key, value in own.items() if not key.startswith(("head.", "norm."))]
    assert len(loaded) == len(expected) and all(map(torch.equal, loaded, expected))


@pytest.mark.parametrize("build, name, change, words", [
    (MIT, "mit_b0", lambda state: {k.replace("block1.", "block5."): v for k, v in state.items()},
     r"40 missing: (block1\S+ ){4}block1\S+ \.\.\.; 40 unexpected: (block5\S+ ){4}block5\S+ \.\.\.\)"),
    (MIT, "mit_b0", lambda state: state | {"norm3.bias": torch.zeros(7)}, "1 of another shape: norm3.bias"),
    (MIT, "tiny", lambda state: {"layers.0.0.projection.weight": torch.zeros(8)}, "mmsegmentation")])
def test_a_file_that_does_not_belong_is_named_and_refused(tmp_path, build, name, change, words):
    path = saved(tmp_path, change(released(name).state_dict()))
    said = message(build, weights=path)
    assert str(path) in said and re.search(words, said)


def test_a_url_fills_a_network_and_has_a_cache_entry_of_its_own(monkeypatch):
    state = released("tiny").state_dict()
    download = Mock(return_value={"model": state})
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    for site in "ab":
        loaded = build_dense("tiny", f"https://{site}.org/model.bin?x=1").state_dict()
        assert all(torch.equal(loaded[name], state[name]) for name in loaded)
    message(build_extractor, "resnet34", "imagenet")                    # these are not its weights
    calls = [(url, given["file_name"], given["weights_only"]) for _, (url,), given in download.mock_calls]
    (_, first, safe), (_, second, _), (url, name, _) = calls
    assert first != second and first.endswith("_model.bin") and safe
    assert url == f"https://download.pytorch.org/models/{name}" and name.startswith("resnet34-")


@pytest.mark.parametrize("build, args, options, words", [
    (build_network, ("swin_t", "fcn", 5), {},
     "the head fcn goes with resnet50, .*, not with swin_t"),
    (build_network, ("resnet50", "fcn", 5), dict(output_stride=4), "stride 4 .* the fcn head takes 8 or 16"),
    (build_network, ("tiny", "mlp", 5), FINE, "last stride 1 is for MiT .*: leave it at 2 for tiny"),
    (build_network, ("resnet50", "fcn", 5), dict(drop_path=0.1), "resnet50 has no blocks to drop"),
    *[(lambda head: build_network("mobilenet_v2", head, 5)(torch.ones(1, 3, 64, 64)), (head,), {},
       f"the {head} head .* batch size of 2") for head in ("upernet", "deeplabv3plus")],
    (build_dense, ("vgg16",), {}, "vgg16 .* choose one of resnet101, resnet50, mobilenet_v2, unet, tiny"),
    (build_dense, ("unet",), dict(output_stride=16), "stride 16 .* unet takes one of 1, 8"),
    (build_dense, ("tiny",), dict(width=32), "width 32 .* unet takes 1 or more, others 64"),
    (build_network, ("mit_b3", "mlp", 5), dict(weights="imagenet"), "mit_b3.pth .*nvidia/mit-b3"),
    (build_extractor, ("resnet50_inat",), dict(weights="imagenet"), "iNaturalist.*best_model.pth"),
    (build_extractor, ("tiny",), dict(weights="model.safetensors"), "another package")])
def test_what_does_not_exist_or_go_together_is_one_sentence(build, args, options, words):
    assert re.search(words, on_meta(message, build, *args, **options))
