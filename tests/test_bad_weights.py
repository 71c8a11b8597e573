"""Weights, costs, windows, sizes: what fits is used, and what does not is told before training."""
import argparse
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from commands import SHORT, mistake, same

from common import segmentation, speed, survey
from common.backbones import build_dense, build_extractor, build_network
from common.run import UserError
from trees import saved

whole, backbone_of = (lambda net: net), (lambda net: net.backbone)
tiny, mobile = partial(build_network, "tiny", "mlp", 3), partial(build_network, "mobilenet_v2", "fcn", 3)


@pytest.mark.parametrize("make, part, prefix", [
    (partial(build_dense, "unet", width=2), whole, "module."), (tiny, backbone_of, "module.backbone."),
    (mobile, backbone_of, "network.backbone."), (partial(build_extractor, "resnet34"), whole, "model.")])
def test_a_first_part_of_the_names_is_taken_off_and_said_so(tmp_path, capsys, make, part, prefix):
    """Also of the checkpoint of a run, whose backbone is cut and stands beside a head."""
    net = part(make())
    names = {prefix + name: value for name, value in net.state_dict().items()}
    path = saved(tmp_path, {"model": names | {"decode_head.bias": torch.ones(1)}, "progress": {"phase": ""}})
    assert same(part(make(weights=path)).state_dict(), net.state_dict())
    told = capsys.readouterr().out
    assert f"called {prefix}*" in told and "decode_head" in told
    with pytest.raises(UserError, match="another network"):
        build_network("mit_b0", "mlp", 3, weights=path)


@pytest.mark.parametrize("content, words", [
    (torch.nn.Linear(1, 1), "whole model"), ({"args": argparse.Namespace()}, "weights .argparse.Namespace"),
    (b"<!DOCTYPE html><html>", "web page"), (b"version https://git-lfs.github.com/spec/v1", "Git LFS"),
    (b"", "empty"), (b"\x00\x01garbage", "damaged"), ({"epoch": 3}, "no state dict"), ([], "no state dict"),
    ({name: value / 0 for name, value in tiny().backbone.state_dict().items()}, "nan or infinity")])
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path, content, words):
    path = saved(tmp_path, content)
    with pytest.raises(UserError, match=words) as caught:
        tiny(weights=path)
    said = str(caught.value)
    assert str(path) in said and said.isprintable() and "weights_only" not in said
    assert isinstance(content, bytes) or "infinity" in words or "save(model.state_dict(), path)" in said


def test_attention_counts_as_its_two_products():
    x = torch.randn(1, 2, 50, 16)
    assert speed.counted(lambda x: F.scaled_dot_product_attention(x, x, x), x)[1] == 2 * 2 * 50 * 50 * 16


@pytest.mark.parametrize("N", [5, 16, 35, 150])
@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("twice, aligned", [(True, False), (False, True), (False, False)])
def test_ids_are_those_of_all_classes_at_once(monkeypatch, N, order, twice, aligned):
    monkeypatch.setattr(segmentation, "MOST", 1)                        # 16 classes at once, the fewest
    for grid, x, size in (((13, 17), (51, 67), (133, 91)), ((9, 8), (33, 31), (33, 31))):
        logits = torch.randn(2, N, *grid).round(decimals=1).contiguous(memory_format=order)      # with ties
        maps = logits
        for target in (x, size)[not twice:]:
            maps = F.interpolate(maps, target, mode="bilinear", align_corners=aligned)
        windows = segmentation.in_windows(lambda x: logits, torch.zeros(2, 3, *x))
        assert torch.equal(segmentation.class_ids(windows, x, size, twice, aligned), maps.argmax(1))
        classes = torch.arange(N) % 3 > 0                               # none of the others can win
        found = segmentation.class_ids(windows, x, size, twice, aligned, classes)
        expected = maps.masked_fill(~classes[:, None, None], -math.inf).argmax(1)
        assert (found == expected).float().mean() > 0.999               # ties may fall otherwise


@pytest.mark.parametrize("height, width", [(70, 41), (32, 90), (33, 32)])
def test_windows_are_mmsegmentations_and_none_where_the_image_fits(height, width):
    """Its slide_inference, written out: grids of two thirds of a window, the last window moved inside."""
    def forward(x):                                                     # what it sees depends on the window
        maps = torch.cat([x, -x.flip(3), x.mean((2, 3), keepdim=True) + 0 * x], 1)
        return F.avg_pool2d(maps, 4, ceil_mode=True)
    x, size, window, stride, total, count = torch.randn(1, 3, height, width), (99, width), 32, 21, 0, 0
    for i in range(max(height - window + stride - 1, 0) // stride + 1):
        for j in range(max(width - window + stride - 1, 0) // stride + 1):
            bottom, right = min(i * stride + window, height), min(j * stride + window, width)
            top, left = max(bottom - window, 0), max(right - window, 0)
            logits = forward(x[:, :, top:bottom, left:right])
            logits = F.interpolate(logits, (bottom - top, right - left), mode="bilinear")
            margins = (left, width - right, top, height - bottom)
            total, count = total + F.pad(logits, margins), count + F.pad(torch.ones_like(logits), margins)
    maps = F.interpolate(total / count, size, mode="bilinear")
    windows = segmentation.in_windows(forward, x, window)
    for classes in (None, torch.arange(9) % 2 == 0):
        expected = maps.argmax(1) if classes is None else 2 * maps[:, ::2].argmax(1)
        found = segmentation.class_ids(windows, (height, width), size, classes=classes)
        assert (found == expected).float().mean() > 0.999
    assert len(segmentation.in_windows(forward, x, max(height, width))) == 1


@pytest.mark.parametrize("name, argv, words", [
    ("cbp_occl", "--backbone mit_b0 --crop 16", "--crop 16: mit_b0 needs 29"),
    ("cbp_occl", "--backbone mit_b0 --window 20", "--window 20: mit_b0 needs 29"),
    ("cbp_occl", "--size 20", "--size 20: too small"), ("cbp_occl", "--window 8", "--window 8: too small"),
    ("cbp_occl", "--floor 1", "above --lr"), ("scaleprotoseg", "--input-scales 0.001", "a crop of 48 to 0"),
    ("scaleprotoseg", "--batch-size 1 --crop 4 --output-stride 8", "one image at a time"),
    ("protopool", "--backbone resnet34 --weights none --batch-size 1", "--size 32: resnet34 needs 33"),
    ("pfa_scribble", "--classifier-backbone densenet121 --classifier-size 20", "densenet121 needs")])
def test_a_size_that_a_network_cannot_take_is_told_before_training(few_toys, tmp_path, name, argv, words):
    said = mistake(name, "--out", tmp_path / "out", *SHORT[name], *argv.split())
    assert words in said and not (tmp_path / "out").exists()


def test_an_image_that_is_too_small_for_the_network_is_named():
    cfg, data = SimpleNamespace(backbone="mit_b0", size=0), SimpleNamespace(paths=None, name_of=str)
    sizes, net = torch.tensor([[64, 64], [30, 20]]), build_network("mit_b0", "segformer", 2)
    with pytest.raises(UserError, match="^1 is 20 x 30 pixels at the network, but mit_b0 needs 29"):
        survey.check_images(data, sizes, cfg, net)
