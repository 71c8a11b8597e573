"""cbp_occl.py as its users meet it: training, resuming, several processes, tables, figures, mistakes."""
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cbp_occl
from commands import call
from common import run
from common.run import UserError

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def config(out, **flags):
    """The toy preset, a few steps long."""
    return run.make_config(cbp_occl.Config, cbp_occl.PRESETS, "toy", out=str(out), **{
        **dict(device="cpu", iterations=4, eval_every=2, save_every=2, batch_size=4, crop=64), **flags})


ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def script(*argv):
    return subprocess.run([sys.executable, "cbp_occl.py", *map(str, argv)], cwd=ROOT,
                          capture_output=True, text=True, env=ENV)


def files(path):
    return {str(p.relative_to(path)) for p in Path(path).rglob("*") if p.is_file()}


def numbers(metrics):
    return {k: v for k, v in metrics.items() if k != "seconds"}


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """One short run from the command line, read by many tests."""
    out = tmp_path_factory.mktemp("toy")
    done = script("--out", out, "--iterations", 6, "--eval-every", 3, "--save-every", 2, "--batch-size", 4,
                  "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return out, done


# ---- training ----

def test_a_run_leaves_what_the_readme_promises(toy_run):
    out, done = toy_run
    assert files(out) == {"config.json", "log.csv", "metrics.json", "last.pt", "figures/examples.png",
                          "figures/similarity_map.png", "figures/f1_by_frequency.png"}
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"miou", "macc", "pixel_acc", "iou", "seconds", "preset", "seed"} <= set(metrics)
    assert metrics["preset"] == "toy" and metrics["seed"] == 0 and metrics["split"] == "test"
    rates = [v for v in metrics["iou"].values() if v is not None]
    assert metrics["miou"] == pytest.approx(np.mean(rates)) and 0 <= min(rates) <= max(rates) <= 100
    assert metrics["class_separability"] == pytest.approx(0, abs=1e-4)           # Table 8, row 1
    assert metrics["trainable_parameters"] == metrics["parameters"] - 64 * len(metrics["iou"])
    rows = list(csv.DictReader(open(out / "log.csv")))
    assert [int(r["iteration"]) for r in rows] == [3, 6] and {"ce", "occl", "miou", "lr"} <= set(rows[0])
    assert done.stderr == ""                                           # no progress bar into a pipe
    first = next(line for line in done.stdout.splitlines() if not line.startswith("note"))
    assert "6 steps" in first and "s a step" in first and "GiB" in first


def test_figures_are_legible_pictures(toy_run):
    out, _ = toy_run
    for path in (out / "figures").iterdir():
        with Image.open(path) as image:
            assert image.mode == "RGB" and min(image.size) >= 200 and max(image.size) <= 2000
            assert len(image.getcolors(1 << 24)) > 5


@pytest.mark.parametrize("classifier", ["cbp", "ema", "gradient", "penalty", "learnable"])
def test_only_the_rows_that_should_move_do(classifier):
    torch.manual_seed(0)
    cfg = config("unused", classifier=classifier, weight_decay=0.5, lr=0.01, warmup=0)
    net = cbp_occl.build_model(cfg, 10)
    optimizer = cbp_occl.build_optimizer(net, cfg, CPU)
    scheduler = run.poly_schedule(optimizer, 100)
    before, stem = net.classifier.class_vectors().detach().clone(), next(net.parameters()).detach().clone()
    for _ in range(10):
        x, labels = torch.randn(2, 3, 64, 64), torch.randint(10, (2, 64, 64))
        cbp_occl.train_step(net, net, optimizer, scheduler, x, labels, cfg)
    after = net.classifier.class_vectors().detach()
    assert not torch.equal(stem, next(net.parameters()))
    assert torch.equal(before, after) == (classifier == "cbp")
    if classifier in ("cbp", "ema", "penalty"):                        # equal length T throughout
        assert torch.allclose(after.norm(dim=1), torch.full((10,), 2.0), atol=1e-5)
    rows = net.classifier.weight.flatten(1) if classifier == "learnable" else net.classifier.prototypes
    saved = [v for k, v in net.state_dict().items() if k.startswith("classifier.")]
    assert any(torch.equal(v.flatten(1) if v.ndim == 4 else v, rows) for v in saved)


def test_ema_moves_present_classes_by_the_printed_rule():
    torch.manual_seed(1)
    W = cbp_occl.category_basis_prototypes(5, 8)
    head = cbp_occl.PrototypeClassifier(W.clone(), "ema", 2.0)
    category, present = torch.randn(5, 8), torch.tensor([True, False, True, True, False])
    head.ema_step(category, present, momentum=0.9)
    for i in range(5):
        w, s = W[i].double().numpy(), category[i].double().numpy()
        moved = 0.9 * w + 0.1 * 2 * s / np.linalg.norm(s)
        expected = 2 * moved / np.linalg.norm(moved) if present[i] else w
        assert np.allclose(head.prototypes[i].numpy(), expected, atol=1e-6)


def test_penalty_is_the_mean_squared_cosine():
    rows = torch.randn(4, 6, dtype=torch.float64)
    cosines = [float(a @ b / a.norm() / b.norm()) ** 2
               for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
    assert float(cbp_occl.penalty_loss(rows)) == pytest.approx(np.mean(cosines))
    assert cbp_occl.mean_abs_cosine(rows) == pytest.approx(np.mean(np.sqrt(cosines)))


def test_the_pixel_loss_is_cross_entropy_over_labelled_pixels():
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 8, 8))
    labels[0, :4] = 255
    up = torch.nn.functional.interpolate(logits, (8, 8), mode="bilinear").double().numpy()
    total = [-(up[b, labels[b, i, j], i, j] - np.log(np.exp(up[b, :, i, j]).sum()))
             for b in range(2) for i in range(8) for j in range(8) if labels[b, i, j] != 255]
    assert float(cbp_occl.pixel_loss(logits, labels)) == pytest.approx(np.mean(total), rel=1e-5)
    nothing = cbp_occl.pixel_loss(logits.requires_grad_(), torch.full_like(labels, 255))
    nothing.backward()
    assert nothing == 0 and not logits.grad.any()


def test_logits_have_no_bias_and_commute_with_upsampling():
    head = cbp_occl.PrototypeClassifier(cbp_occl.category_basis_prototypes(5, 8))
    features = torch.randn(1, 8, 6, 6)
    assert not head(torch.zeros(1, 8, 6, 6)).any()
    up = torch.nn.functional.interpolate(features, (12, 12), mode="bilinear")
    logits = torch.nn.functional.interpolate(head(features), (12, 12), mode="bilinear")
    assert torch.allclose(head(up), logits, atol=1e-5)
    assert torch.equal(head(10 * features).argmax(1), head(features).argmax(1))


def test_segformer_b0_with_cbp_has_38550_fewer_trainable_parameters():
    cfg = run.make_config(cbp_occl.Config, cbp_occl.PRESETS, "ade20k-segformer-b0", out="unused")
    nets = {name: cbp_occl.build_model(replace(cfg, classifier=name), 150) for name in ("cbp", "learnable")}
    count = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}
    assert count["learnable"] - count["cbp"] == 38550
    assert round(count["learnable"] / 1e6, 3) == 3.754


def test_presets_are_the_papers_recipes():
    def preset(name):
        return run.make_config(cbp_occl.Config, cbp_occl.PRESETS, name, out="unused")
    # Sec. 4.2: lambda, phi, T; Sec. 4.1: iterations, batch, crop
    table = {"ade20k-fcn-r101": (0.4, 0.1, 2), "ade20k-convnext_b": (1, 0.2, 2), "ade20k-swin_b": (1, 0.2, 1),
             "ade20k-segformer-b5": (1, 0.1, 1), "cocostuff10k-fcn-r101": (1, 0.3, 0.3),
             "cocostuff10k-convnext_b": (1, 0.3, 3), "cocostuff10k-swin_b": (1, 0.3, 2),
             "cocostuff10k-segformer-b0": (1, 0.1, 1), "ade20k-segformer-b0-40k": (1, 0.3, 2)}
    for name, expected in table.items():
        cfg = preset(name)
        assert (cfg.w_centroid, cfg.w_category, cfg.length) == expected, name
        assert (cfg.batch_size, cfg.crop, cfg.size, cfg.tau) == (16, 512, 512, 0.07)
        assert cfg.iterations == (40000 if name.endswith("40k") else
                                  160000 if name.startswith("ade") else 80000)
    assert (preset("ade20k-fcn-r101").optimizer, preset("ade20k-convnext_b").optimizer) == ("sgd", "adamw")
    for name in cbp_occl.PRESETS:
        cbp_occl.check_config(preset(name))


def test_optimizer_groups_follow_mmsegmentation():
    def rates(preset, classes=150):
        cfg = run.make_config(cbp_occl.Config, cbp_occl.PRESETS, preset, out="unused")
        net = cbp_occl.build_model(cfg, classes)
        groups = cbp_occl.build_optimizer(net, cfg, CPU).param_groups
        found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
        assert len(found) == sum(len(g["params"]) for g in groups) == len(list(net.parameters()))  # each once
        return {name: found[id(p)] for name, p in net.named_parameters()}
    b0 = rates("ade20k-segformer-b0")
    assert b0["network.backbone.block1.0.attn.q.weight"] == (6e-5, 0.01)
    assert b0["network.backbone.block1.0.attn.q.bias"] == (6e-5, 0.01)          # biases decay, as there
    assert b0["network.backbone.block1.0.norm1.weight"] == (6e-5, 0.0)
    assert {round(v[0], 9) for k, v in b0.items() if k.startswith('network.head')} == {6e-4}
    convnext = rates("ade20k-convnext_b")
    lr = {k: v[0] for k, v in convnext.items()}
    stem = next(k for k in lr if k.startswith("network.backbone.stages.0.0."))
    block4 = next(k for k in lr if k.startswith("network.backbone.stages.3.1."))
    assert lr[stem] == pytest.approx(1e-4 * 0.9 ** 13) and lr[block4] == pytest.approx(1e-4 * 0.9 ** 9)
    assert {v[1] for k, v in convnext.items() if k.endswith(("bias", "layer_scale"))} == {0.0}
    assert {round(v[0], 9) for k, v in convnext.items() if k.startswith('network.head')} == {1e-4}


# ---- resume ----

def test_resume_after_kill_9_ends_with_the_numbers_of_an_uninterrupted_run(tmp_path):
    flags = ["--iterations", 40, "--eval-every", 15, "--save-every", 2, "--batch-size", 4, "--crop", 64,
             "--device", "cpu", "--warmup", 5]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert script("--out", whole, *flags).returncode == 0
    child = subprocess.Popen([sys.executable, "cbp_occl.py", *map(str, ["--out", killed, *flags])], cwd=ROOT,
                             env=ENV, stdout=subprocess.DEVNULL)
    while not (killed / "last.pt").exists() and child.poll() is None:
        time.sleep(0.02)
    time.sleep(0.3)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert run.read_checkpoint(killed / "last.pt")["progress"]["iteration"] < 40
    assert not (killed / "metrics.json").exists()
    done = script("--out", killed, "--resume")
    assert done.returncode == 0, done.stderr
    a, b = (run.read_checkpoint(p / "last.pt") for p in (whole, killed))
    assert set(a["model"]) == set(b["model"])
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    a, b = (json.loads((p / "metrics.json").read_text()) for p in (whole, killed))
    assert numbers(a) == numbers(b)
    a, b = (list(csv.DictReader(open(p / "log.csv"))) for p in (whole, killed))
    assert [numbers(r) for r in a] == [numbers(r) for r in b] and len(a) == 3


def test_resume_of_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path):
    cfg = config(tmp_path / "a")
    expected = cbp_occl.train(cfg, run.Machine(CPU))
    run.start_run(replace(cfg, out=str(tmp_path / "b")), run.Machine(CPU))
    resumed = cbp_occl.train(replace(cfg, out=str(tmp_path / "b"), resume=True), run.Machine(CPU))
    assert numbers(resumed) == numbers(expected)


# ---- several processes ----

TWO = """
import sys, torch, torch.distributed as dist
import cbp_occl
from common import run
step = cbp_occl.train_step
def checked(model, net, *rest):
    out = step(model, net, *rest)
    mine = torch.cat([p.detach().flatten() for p in net.parameters()])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    assert torch.equal(both[0], both[1]), "weights differ between ranks"
    open(f"{sys.argv[1]}.steps{dist.get_rank()}", "a").write("x")
    return out
cbp_occl.train_step = checked
cfg = run.make_config(cbp_occl.Config, cbp_occl.PRESETS, "toy", out=sys.argv[1], device="cpu", iterations=4,
                      eval_every=2, save_every=2, batch_size=4, crop=64, classifier=sys.argv[2])
cbp_occl.main(cfg)
dist.destroy_process_group()
"""


def torchrun(*argv):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc-per-node", "2", *map(str, argv)],
                          cwd=ROOT, capture_output=True, text=True, env=ENV)


@pytest.mark.parametrize("classifier", ["cbp", "ema"])
def test_two_processes_train_the_same_weights_and_evaluate_as_one(tmp_path, classifier):
    (tmp_path / "two.py").write_text(TWO)
    out = tmp_path / "out"
    done = torchrun(tmp_path / "two.py", out, classifier)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(Path(f"{out}.steps0").read_text()) >= 4 and len(Path(f"{out}.steps1").read_text()) >= 4
    two = json.loads((out / "metrics.json").read_text())
    assert two.pop("processes") == 2
    one = script("--out", out, "--eval-only", "--device", "cpu")
    assert one.returncode == 0, one.stderr
    one = json.loads((out / "metrics.json").read_text())
    assert one.pop("processes") == 1
    assert numbers(one) == numbers(two)
    assert len(run.read_checkpoint(out / "last.pt")["rng"]) == 2


# ---- use ----

def test_eval_only_repeats_the_metrics(toy_run):
    out, _ = toy_run
    before = json.loads((out / "metrics.json").read_text())
    done = script("--out", out, "--eval-only")
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "metrics.json").read_text()) == before


def test_predict_writes_ids_and_overlay_at_the_images_own_size(toy_run, tmp_path):
    out, _ = toy_run
    (tmp_path / "photos").mkdir()
    for i, size in enumerate([(90, 70), (64, 131)]):
        pixels = np.random.default_rng(i).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"photo{i}.png")
    done = script("--out", out, "--predict", tmp_path / "photos")
    assert done.returncode == 0, done.stderr
    for i, size in enumerate([(90, 70), (64, 131)]):
        with Image.open(out / "predictions" / f"photo{i}.png") as ids:
            assert ids.size == size and ids.mode == "P" and np.asarray(ids).max() < 64
        with Image.open(out / "predictions" / f"photo{i}_overlay.png") as overlay:
            assert overlay.size == size and overlay.mode == "RGB"


def test_table_keeps_the_rows_that_were_trained(tmp_path):
    cfg = config(tmp_path, table=10, iterations=2)
    cbp_occl.main(cfg)
    table = (tmp_path / "table10.md").read_text()
    folders = [tmp_path / "rows" / f"CBP-+-OCCL{ending}" for ending in ("", "-seed1", "-seed2", "-seed3")]
    rates = [json.loads((folder / "metrics.json").read_text())["miou"] for folder in folders]
    values = json.loads((tmp_path / "table10.json").read_text())["CBP + OCCL"]["mIoU"]
    assert values == rates and len(set(rates)) == 4                    # a value a seed
    assert f"{np.mean(rates):.1f} +- {np.std(rates, ddof=1):.1f}" in table and "35.0 +- 0.2" in table
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "rows").rglob("last.pt")}
    (folders[1] / "metrics.json").unlink()                             # as if interrupted in the last moment
    (folders[2] / "last.pt").unlink()
    cbp_occl.main(cfg)
    assert (tmp_path / "table10.md").read_text() == table
    assert all(p.stat().st_mtime_ns == t for p, t in stamps.items() if "seed2" not in str(p))


def test_tables_write_the_papers_numbers_beside_ours(tmp_path):
    cfg = config(tmp_path, iterations=2)
    for table, words in {5: ["not run (needs --prototypes", "| 30.3 | 41.7 |"],
                         8: ["| CS |", "| 34.6 | 46.1 |"], 6: ["car + taxi"]}.items():
        cbp_occl.main(replace(cfg, table=table))
        text = (tmp_path / f"table{table}.md").read_text()
        assert all(word in text for word in words), text
    saved = json.loads((tmp_path / "rows" / "not-orthogonal" / "metrics.json").read_text())
    assert saved["class_separability"] != 0


def test_profile_compares_with_the_baseline(tmp_path):
    cfg = config(tmp_path, profile=True, batch_size=2, crop=64)
    cbp_occl.main(cfg)
    found = json.loads((tmp_path / "profile.json").read_text())
    bias = cbp_occl.datasets.NUM_CLASSES["toy_scenes"]                 # one a class
    assert found["baseline"]["parameters"] - found["CBP + OCCL"]["parameters"] == bias
    assert found["CBP + OCCL"]["gflops"] == pytest.approx(found["baseline"]["gflops"], rel=1e-3)


# ---- prototypes from elsewhere ----

def test_prototypes_from_a_file(tmp_path):
    classes = cbp_occl.datasets.NUM_CLASSES["toy_scenes"]
    rows = np.random.default_rng(0).normal(size=(classes, 64)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    train_set = cbp_occl.datasets.open_dataset("toy_scenes", "", "train")
    cfg = config(tmp_path, prototypes=str(tmp_path / "rows.npy"))

    def model(settings):
        given = cbp_occl.initial_rows(settings, train_set, CPU)
        return cbp_occl.build_model(settings, classes, "none", given)

    W = model(cfg).classifier.class_vectors()
    assert torch.allclose(W @ W.T, 4 * torch.eye(classes), atol=1e-5)
    assert torch.allclose(W[0], 2 * torch.nn.functional.normalize(torch.tensor(rows[0]), dim=0))
    raw = replace(cfg, orthogonal=False, equal=False)
    W = model(raw).classifier.class_vectors()
    assert torch.equal(W, torch.tensor(rows))
    np.save(tmp_path / "rows.npy", rows[:, :5])
    with pytest.raises(UserError, match=r"rows.npy.*\(\d+, 5\).*--head-channels"):
        model(cfg)


def test_masked_rows_are_the_backbones_class_means():
    torch.manual_seed(0)
    net = cbp_occl.build_network("tiny", "segformer", 3, 0, "none").eval()
    batches = [dict(image=torch.randn(1, 3, 64, 64), mask=torch.randint(3, (1, 64, 64))) for _ in range(2)]
    batches[0]["mask"][:, :20] = 255
    means = cbp_occl.class_means_of_backbone(net, batches, 3, CPU)
    total, count = np.zeros((3, means.shape[1])), np.zeros(3)
    for batch in batches:
        deep = net.backbone(batch["image"])[-1][0].detach().double().numpy()
        step = 64 // deep.shape[1]
        for i in range(deep.shape[1]):
            for j in range(deep.shape[2]):
                c = int(batch["mask"][0, i * step, j * step])
                if c != 255:
                    total[c] += deep[:, i, j]
                    count[c] += 1
    assert np.allclose(means.numpy(), total / count[:, None], atol=1e-4)


# ---- mistakes ----

@pytest.mark.parametrize("argv, words", [
    (["--data", "nowhere", "--preset", "ade20k-segformer-b0", "--weights", "none"], ["nowhere"]),
    (["--preset", "camvid"], ["--data"]),
    (["--batch-size", "1"], ["--batch-size 1"]), (["--length", "-1"], ["--length -1.0"]),
    (["--schedule", "0"], ["--schedule"]), (["--tau", "0"], ["--tau 0.0"]),
    (["--out", "OUT", "--eval-only"], ["holds no run"]),
    (["--out", "OUT", "--predict", "nothing.png"], ["holds no run"]),
    (["--head-channels", "8"], ["--head-channels"]), (["--backbone", "vgg"], ["vgg"]),
    (["--backbone", "swin_t", "--head", "fcn"], ["swin_t", "fcn"]),
    (["--weights", "gone.pth"], ["gone.pth"]), (["--prototypes", "gone.npy"], ["gone.npy"]),
    (["--prototypes", "a.npy", "--init", "masked"], ["--prototypes", "--init masked"]),
    (["--table", "2"], ["--table"]), (["--test-split", "exam"], ["exam"]),
    (["--device", "cuda"] if not torch.cuda.is_available() else ["--device", "x"], ["--device"]),
])
def test_mistakes_are_one_sentence_and_exit_code_2(tmp_path, argv, words):
    out = tmp_path / "out"
    done = call(cbp_occl, *["--out", out] * ("OUT" not in argv), *[out if a == "OUT" else a for a in argv])
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") <= 8 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert not out.exists()                                            # nothing half-written


def test_predict_with_a_broken_image_names_it(toy_run, tmp_path):
    out, _ = toy_run
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    done = script("--out", out, "--predict", tmp_path / "broken.jpg")
    assert done.returncode == 2 and "broken.jpg" in done.stderr and "Traceback" not in done.stderr


# ---- the header ----

def test_every_departure_and_equation_of_the_header_is_marked_in_the_body():
    source = (ROOT / "cbp_occl.py").read_text(encoding="utf-8")
    header, body = source.split('"""', 2)[1:]
    departures = re.findall(r"^(\[D\d+\])", header, re.M)
    assert departures == [f"[D{i}]" for i in range(1, len(departures) + 1)]
    unmarked = [mark for mark in departures if mark not in body]
    assert not unmarked
    assert all(f"Eq. ({n})" in body for n in (3, 4, 5, 6, 7, 8))


# ---- copying out ----

def test_prototypes_losses_and_model_paste_into_a_notebook():
    source = (ROOT / "cbp_occl.py").read_text()
    span = source[source.index("# ---- prototypes"):source.index("# ---- model")]
    names = dict(torch=torch, nn=torch.nn, F=torch.nn.functional)
    exec(span, names)
    W = names["category_basis_prototypes"](5, 8)
    loss = names["occl_loss"](torch.randn(2, 8, 6, 6), torch.randint(5, (2, 12, 12)), W, 1.0, 0.3)
    assert torch.isfinite(loss)


# ---- GPU ----

@pytest.mark.gpu
def test_gpu_occl_equals_cpu():
    torch.manual_seed(0)
    features, labels = torch.randn(2, 16, 20, 20), torch.randint(6, (2, 40, 40))
    W = cbp_occl.category_basis_prototypes(6, 16)
    cpu = cbp_occl.occl_loss(features, labels, W, 1.0, 0.3)
    gpu = cbp_occl.occl_loss(features.to("cuda"), labels.to("cuda"), W.to("cuda"), 1.0, 0.3)
    assert float(gpu) == pytest.approx(float(cpu), rel=1e-4)


@pytest.mark.gpu
def test_gpu_trains_in_bf16_and_resumes(tmp_path):
    cbp_occl.main(config(tmp_path, device="cuda"))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["device"] == "cuda"
    cbp_occl.main(replace(config(tmp_path, device="cuda"), resume=True))
