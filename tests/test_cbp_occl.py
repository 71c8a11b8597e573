"""cbp_occl.py beyond its equations and what all scripts promise (test_contract.py): what its run tells, the
rates of every layer, rows from elsewhere (Table 5), its tables, its own mistakes, and the GPU."""
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import cbp_occl
from commands import SHORT, call, copy_of, done, files, log_of, mistake, numbers, read
from common import cbp_occl_measures, run, toy_scenes
from test_cbp_occl_equations import config

CPU = torch.device("cpu")
FIGURES = ("examples", "similarity_map", "f1_by_frequency", "feature_cosines", "lookalikes")
pytestmark = pytest.mark.usefixtures("few_toys")


def test_a_run_leaves_what_the_readme_promises(trained):
    out = trained("cbp_occl")
    figures = {f"figures/{name}.png" for name in FIGURES}
    others = {"config.json", "log.csv", "metrics.json", "last.pt", "report.html"}
    assert files(out) - {"printed.txt"} == others | figures
    metrics, rows = read(out / "metrics.json"), log_of(out)
    rates = [rate for rate in metrics["iou"].values() if rate is not None]
    assert metrics["miou"] == pytest.approx(np.mean(rates)) and {"macc", "pixel_acc", "f1"} <= set(metrics)
    assert metrics["class_separability"] == pytest.approx(0, abs=1e-4)           # Table 8, row 1
    assert metrics["norm_pixel_correlation"] is None and metrics["iterations"] == 6
    assert -1 < metrics["other_cosine"] < metrics["own_cosine"] < 1
    assert metrics["trainable_parameters"] == metrics["parameters"] - 64 * len(metrics["iou"])
    assert [int(row["iteration"]) for row in rows] == [3, 6] and {"miou", "macc", "pixel_acc"} <= set(rows[0])


def test_measures_of_the_two_ambiguities_by_hand():
    """17 of 18 classes have an F1, rarest first in 15 groups; rows are as long as their classes are big."""
    pixels, names = torch.arange(18, 0, -1) * 10, [f"c{c}" for c in range(18)]
    rates = dict(iou=[float(c) for c in range(18)], f1=[100.0 - c for c in range(17)] + [None])
    found = cbp_occl_measures.analyse(torch.eye(18) * pixels[:, None], config(), rates, pixels, names)
    assert found["norm_pixel_correlation"] == pytest.approx(1) and found["training_pixels"]["c0"] == 180
    pairs = cbp_occl.datasets.LOOKALIKES["toy_scenes"]
    assert found["lookalike_iou_sums"] == {f"c{a} + c{b}": a + b for a, b in pairs}
    assert [len(group["classes"]) for group in found["f1_rarest_first"]] == [2, 2] + [1] * 13
    assert found["f1_rarest_first"][0] == dict(classes=["c16", "c15"], f1=84.5)


def test_features_are_compared_with_the_rows_as_occl_sees_them():
    """Means over two of three images, in loops; no image has class 0. Then look-alikes by hand."""
    torch.manual_seed(0)
    conv, rows, vectors = nn.Conv2d(3, 5, 4, stride=4), torch.randn(14, 5), {}
    data = cbp_occl.datasets.open_split(config(), "test")
    data.scenes = [(image, torch.where(mask == 0, 255, mask)) for image, mask in map(data.read, range(3))]
    for image, mask in (data.read(0), data.read(2)):
        features = conv(cbp_occl.segmentation.network_input(image))[0].detach()
        for i, j in np.ndindex(32, 32):
            vectors.setdefault(int(mask[4 * i, 4 * j]), []).append(features[:, i, j])
    found = cbp_occl_measures.features_of(
        lambda x: (F.conv2d(conv(x), rows[:, :, None, None]), conv(x), None), data, config(size=0), CPU,
        lambda labels, size: labels[:, ::labels.shape[1] // size[0], ::labels.shape[2] // size[1]], most=2)
    cosines = torch.full((14, 14), torch.nan)
    for c in set(vectors) - {255}:
        mean, own = torch.stack(vectors[c]).mean(0), [(rows @ x).argmax() == c for x in vectors[c]]
        cosines[c] = F.cosine_similarity(mean[None], rows)
        assert torch.allclose(found.centroids[c], mean, atol=1e-5) and found.confusion[c, c] == sum(own)
        assert 0 < len(found.pixels[c]) <= 2 * 40 and found.confusion[c].sum() == len(own)
    expected = [np.nanmean(cosines[torch.eye(14) == k]) for k in (1, 0)]
    found_cosines = cbp_occl_measures.centroid_cosines(found, rows)
    assert list(found_cosines.values()) == pytest.approx(expected, abs=1e-5) and 0 not in vectors
    for shown, pairs in (((6, 8, 9), [(8, 9)]), ((6, 8), [(6, 8)]), ((8,), [])):       # house, car, taxi
        confused = torch.zeros(14, 14).index_fill(0, torch.tensor(shown), 1.0) * torch.eye(14)[6]
        assert cbp_occl_measures.lookalikes(data, found._replace(confusion=confused)) == pairs


def test_a_baseline_stands_beside_the_run_in_every_figure(trained, tmp_path):
    out, other, drawn = copy_of(trained("cbp_occl"), tmp_path / "a"), tmp_path / "b", []
    done("cbp_occl", "--out", other, *SHORT["cbp_occl"], "--classifier", "learnable", "--w-centroid", 0)
    for flags in ([], ["--baseline", other]):
        done("cbp_occl", "--out", out, "--eval-only", *flags)
        drawn.append([Image.open(out / "figures" / f"{name}.png") for name in FIGURES])
    for name, alone, both in zip(FIGURES, *drawn):                      # F1 gets more bars, not more width
        assert both.tobytes() != alone.tobytes() and (both.width > alone.width + 200 or "f1" in name), name
    assert numbers(read(out / "metrics.json")) == numbers(read(trained("cbp_occl") / "metrics.json"))
    (other / "metrics.json").unlink()
    for argv, words in (([*SHORT["cbp_occl"], "--baseline", tmp_path], "holds no run"),
                        ([*SHORT["cbp_occl"], "--baseline", other], "not finished"),
                        (["--table", 3, "--baseline", other], "--baseline")):
        said = mistake("cbp_occl", "--out", tmp_path / "new", *argv)
        assert words in said and str(tmp_path) in said and not (tmp_path / "new").exists()


def test_optimizer_groups_follow_mmsegmentation():
    """MiT decays its biases, ConvNeXt does not; its rate falls by 0.9 a group of layers; SGD decays all."""
    def rates(preset, kind, **flags):
        net = cbp_occl.build_model(config(preset, **flags), 20)
        optimizer = cbp_occl.build_optimizer(net, config(preset, **flags), CPU)
        assert type(optimizer) is kind and optimizer.defaults.get("momentum", 0.9) == 0.9
        found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
        assert len(found) == len(list(net.parameters()))
        return {name.removeprefix("network."): found[id(p)] for name, p in net.named_parameters()}
    b0 = rates("ade20k-segformer-b0", torch.optim.AdamW)
    block = "backbone.block1.0."
    assert b0[f"{block}attn.q.weight"] == b0[f"{block}attn.q.bias"] == (6e-5, 0.01)
    assert b0[f"{block}norm1.weight"] == (6e-5, 0.0)
    convnext = rates("ade20k-convnext_b", torch.optim.AdamW)
    for prefix, power in (("backbone.stages.0.0.", 13), ("backbone.stages.3.1.", 9), ("head", 0)):
        found = {round(v[0], 9) for k, v in convnext.items() if k.startswith(prefix)}
        assert found == {round(1e-4 * 0.9 ** power, 9)}
    assert {v[1] for k, v in convnext.items() if k.endswith(("bias", "layer_scale"))} == {0.0}
    assert {round(v[0], 9) for k, v in b0.items() if k.startswith("head")} == {6e-4}
    sgd = rates("toy", torch.optim.SGD, optimizer="sgd", lr=0.01, weight_decay=5e-4)
    assert set(sgd.values()) == {(0.01, 5e-4)}


def test_rows_from_a_file(tmp_path):
    rows = np.random.default_rng(0).normal(size=(14, 64)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    np.save(tmp_path / "thin.npy", rows[:, :5])

    def vectors(name, **flags):
        cfg = config(prototypes=str(tmp_path / name), **flags)
        rows = cbp_occl.initial_rows(cfg, None, CPU)
        return cbp_occl.build_model(cfg, 14, "none", rows).classifier.prototypes
    expected = cbp_occl.category_basis_prototypes(14, 64, 2.0, torch.tensor(rows))
    assert torch.allclose(vectors("rows.npy"), expected)
    assert torch.equal(vectors("rows.npy", orthogonal=False, equal=False), torch.tensor(rows))
    with pytest.raises(run.UserError, match=r"thin.npy.*\(14, 5\).*--head-channels"):
        vectors("thin.npy")


def test_masked_rows_are_the_backbones_class_means():
    torch.manual_seed(0)
    net = cbp_occl.build_network("tiny", "segformer", 3, 0, "none").eval()
    batches = [dict(image=torch.randn(1, 3, 64, 64), mask=torch.randint(3, (1, 64, 64))) for _ in range(2)]
    batches[0]["mask"][:, :20] = 255
    means, members = cbp_occl.class_means_of_backbone(net, batches, 3, CPU), {0: [], 1: [], 2: [], 255: []}
    for batch in batches:
        deep = net.backbone(batch["image"])[-1][0].detach()
        for i, j in np.ndindex(*deep.shape[1:]):
            step = 64 // deep.shape[1]
            members[int(batch["mask"][0, i * step, j * step])].append(deep[:, i, j])
    assert torch.allclose(means, torch.stack([torch.stack(members[c]).mean(0) for c in range(3)]), atol=1e-4)


def test_tables_write_the_papers_numbers_and_leave_out_what_cannot_run(tmp_path, monkeypatch):
    monkeypatch.setattr(toy_scenes, "SPLITS", dict(train=40, val=1, test=6))            # all classes occur
    monkeypatch.setattr(cbp_occl, "SWEEP", (0, 0.3, 1))
    sweeps = [f"{symbol} = {weight}" for symbol in ("lambda", "phi") for weight in (0, 0.3, 1)]
    monkeypatch.setitem(cbp_occl.FIGURES, 4, ("", sweeps))
    np.save(tmp_path / "clip.npy", np.random.default_rng(0).normal(size=(14, 24)))
    for command, words in {
            "table 5": ["not run (needs --prototypes", "| 30.3 | 41.7 |"], "table 6": ["car + taxi"],
            f"table 5 --prototypes {tmp_path}/clip.npy": ["20 channels, masked ones 64, CLIP 24"],
            "table 8": ["| CS |", "| 34.6 | 46.1 |"], "table 10": ["35.0 +- 0.2"],
            "figure 4": ["| 34.2 | - |"]}.items():
        flags = ["--iterations", 1, "--head-channels", 20, *f"--{command}".split()]
        ended = call("cbp_occl", "--out", tmp_path, *SHORT["cbp_occl"], *flags)
        assert (ended.returncode, ended.stderr) == (0, "")              # no progress bar into a pipe
        text = (tmp_path / f"{''.join(command.split()[:2])}.md").read_text()
        assert all(word in text for word in words), text
    rows = {path.parent.name: read(path) for path in tmp_path.glob("rows/*/config.json")}
    assert [rows[name]["head_channels"] for name in ("CBP-+-OCCL", "CLIP", "masked")] == [20, 24, 64]
    sweeps = {name for name in rows if name.startswith(("lambda", "phi"))}         # the others: CBP + OCCL
    assert sweeps == {"lambda0", "lambda0.3", "phi0", "phi1"} and rows["phi1"]["w_category"] == 1
    assert {"figure4.png", *(f"figures/table6_{name}.png" for name in FIGURES[:3])} <= files(tmp_path)
    values = read(tmp_path / "table8.json")
    assert abs(values["CBP + OCCL"]["CS"][0]) < 1e-4 < abs(values["not orthogonal"]["CS"][0])
    assert read(tmp_path / "rows" / "masked" / "metrics.json")["mean_abs_cosine"] > 0.1
    assert len(read(tmp_path / "table10.json")["CBP + OCCL"]["mIoU"]) == 4              # its four seeds


def test_profile_compares_with_the_baseline(tmp_path):
    done("cbp_occl", "--out", tmp_path, "--device", "cpu", "--profile", "--batch-size", 2, "--crop", 64)
    found = read(tmp_path / "profile.json")
    assert found["baseline"]["parameters"] - found["CBP + OCCL"]["parameters"] == 14            # no bias
    assert found["CBP + OCCL"]["gflops"] == pytest.approx(found["baseline"]["gflops"], rel=1e-3)


def test_the_walkthrough_is_the_papers_equations_by_hand(tmp_path, monkeypatch):
    """Two classes, six pixels, tau 0.5, lambda 1, phi 0.3: every loss that is printed, in numpy."""
    monkeypatch.chdir(tmp_path)
    printed = dict(re.findall(r"(L_[vc]\d) +([\d.]+)\n", done("cbp_occl", "--walkthrough")))
    assert not files(tmp_path)
    v = np.array([[[2, 0, 1], [1, 2, 0]], [[1, 2, 1], [0.5, 1.5, 0.5]]])             # view, class
    w = np.array([[2, 1, 2], [-7, 10, 2]])                                          # a_2 - 8/9 a_1, times 9

    def cos(a, b):
        return a @ b / np.sqrt(a @ a * (b @ b))
    for x in range(2):
        for name, p, n in (("L_v", [cos(v[0, i], v[1, i]) for i in range(2)],
                            [cos(v[x, i], v[:, 1 - i].mean(0)) for i in range(2)]),
                           ("L_c", [cos(v[x, i], w[i]) for i in range(2)],
                            [cos(v[x, i], w[1 - i]) for i in range(2)])):
            p, n = np.exp(np.array([p, n]) / 0.5)
            assert float(printed[f"{name}{x + 1}"]) == pytest.approx(np.mean(-np.log(p / (p + n))), abs=6e-4)
    assert len(printed) == 4


@pytest.mark.parametrize("argv, words", [
    (["--preset", "ade20k-segformer-b0", "--weights", "none", "--data", "nowhere"], ["nowhere"]),
    (["--preset", "camvid"], ["--data"]), (["--test-split", "exam"], ["exam"]),
    (["--batch-size", "1"], ["--batch-size 1"]), (["--head-channels", "8"], ["--head-channels"]),
    (["--prototypes", "gone.npy"], ["gone.npy"]), (["--init", "masked"], ["no training pixel", "random"]),
    (["--prototypes", "TMP/same.npy", "--no-orthogonal"], ["same.npy has rows that are zero or point"]),
    (["--prototypes", "TMP/zero.npy", "--no-orthogonal", "--no-equal"], ["zero.npy has rows"]),
    (["--prototypes", "TMP/flat.npy"], ["flat.npy", "shape (1, 14)"]),
    (["--prototypes", "a.npy", "--init", "masked"], ["--prototypes", "--init masked"]),
    (["--classifier", "learnable", "--init", "masked"], ["--classifier learnable", "--init masked"]),
    (["--stage-decay", "0.9"], ["--stage-decay", "tiny"]),
])
def test_mistakes_of_its_own(tmp_path, argv, words):
    for name, row in (("same", 1.0), ("zero", 0.0)):
        np.save(tmp_path / f"{name}.npy", np.concatenate([np.eye(12, 16), np.full((2, 16), row)]))
    np.save(tmp_path / "flat.npy", np.ones(14))
    argv = [word.replace("TMP", str(tmp_path)) for word in argv]
    sentence = mistake("cbp_occl", "--out", tmp_path / "out", "--device", "cpu", *argv)
    assert all(word in sentence for word in words) and not (tmp_path / "out").exists(), sentence


@pytest.mark.gpu
def test_gpu_occl_equals_cpu():
    torch.manual_seed(0)
    features, labels = torch.randn(2, 16, 20, 20), torch.randint(6, (2, 40, 40))
    rows = cbp_occl.category_basis_prototypes(6, 16)
    cpu, gpu = (float(cbp_occl.occl_loss(features.to(device), labels.to(device), rows.to(device), 1.0, 0.3))
                for device in ("cpu", "cuda"))
    assert gpu == pytest.approx(cpu, rel=1e-4)


@pytest.mark.gpu
def test_gpu_trains_in_bf16_and_resumes(tmp_path):
    done("cbp_occl", "--out", tmp_path, *SHORT["cbp_occl"], "--device", "cuda")
    assert read(tmp_path / "metrics.json")["device"] == "cuda"
    done("cbp_occl", "--out", tmp_path, "--resume")
