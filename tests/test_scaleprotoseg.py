"""scaleprotoseg.py as its users meet it, where test_contract.py says nothing: three methods, what becomes of
prototypes in a run, explanations that sum to the logit, measures by hand, --stage1, tables, its own mistakes.
Formulas, training steps, projection and the paper's recipes are in test_scaleprotoseg_equations.py.
"""
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import scaleprotoseg as sps
from commands import SHORT, done, files, interrupt, log_of, mistake, numbers, read, same
from common import datasets, loaders, run, toy_scenes, transforms
from common import scaleprotoseg_measures as measures
from common.files import read_image
from test_scaleprotoseg_equations import nearest_exact, normal, slow_logits, stub_net, uniform

NAME, CPU = "scaleprotoseg", torch.device("cpu")
SOURCE = Path(sps.__file__).read_text(encoding="utf-8")
CLASSES = ("sky", "tall house", "bird", "ghost", "kite")
TOY = partial(run.make_config, sps.Config, sps.PRESETS, "toy")
every_method = pytest.mark.parametrize("method", sps.PHASES)
pytestmark = pytest.mark.usefixtures("few_toys")


# ---- data and runs ----

def make_pictures(root, classes=CLASSES):
    """Data set `folder` of 51 x 37 pictures, the first of train and test void all over. In train there is no
    ghost, and of birds one pixel, in picture 2, under the centre of cell (4,6); in test there is no kite."""
    for split, things in (("train", (1, 4)), ("val", (1, 4)), ("test", (1, 2, 3))):
        for k in range(4):
            image = np.random.default_rng([k, len(split)]).integers(90, 150, (37, 51, 3), dtype=np.uint8)
            mask = np.full((37, 51), 255 if split != "val" and k == 0 else 0, np.uint8)
            for n, c in enumerate(things if k else ()):
                mask[4 + k:16 + 3 * k, 16 * n:16 * n + 12] = c
                image[mask == c] = 60 * c
            if split == "train" and k == 2:
                mask[16, 25] = 2
            for kind, pixels in (("images", image), ("masks", mask)):
                (root / kind / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(root / kind / split / f"{k}.png")
    (root / "classes.txt").write_text("\n".join(classes))
    return root


def load(out):
    """(net, progress, cfg) of a run."""
    cfg = run.read_config(sps.Config, out)
    return *sps.load_network(cfg, CPU), cfg


def on(data, *flags):
    return [*SHORT[NAME], "--dataset", "folder", "--data", data, *flags]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def base(pictures, tmp_path_factory):
    """A run of every phase on the pictures."""
    out = tmp_path_factory.mktemp("base")
    (out / "printed.txt").write_text(done(NAME, "--out", out, *on(pictures, "--equivariance", 20)))
    return out


@pytest.fixture(scope="module")
def runs(trained, tmp_path_factory):
    """{method: a run of it on toy scenes}; the others were interrupted in their last phase and resumed."""
    folders = {NAME: trained(NAME)}
    for method, step in (("protoseg", 11), ("deeplab", 7)):
        out = folders[method] = tmp_path_factory.mktemp(method)
        interrupt(NAME, step, "--out", out, *SHORT[NAME], "--method", method, "--protoseg-prototypes", 4)
        done(NAME, "--out", out, "--resume")
    return folders


# ---- a run of each method ----

STAGE_1 = ["stage1_projected", "stage1_finetuned"]
PICTURES = {"examples.png", "prototypes", "nearest_patches.png", "nearest_prototypes"}
TERMS = dict(warmup="ce diversity", joint="ce diversity", project="", finetune="ce l1",
             group_warmup="ce l1 entropy", group_joint="ce l1 entropy")


@pytest.mark.parametrize("method, stages, figures", [
    (NAME, STAGE_1 + ["stage2", "stage2_thresholded"], PICTURES | {"groups"}),
    ("protoseg", STAGE_1, PICTURES), ("deeplab", ["plain"], {"examples.png"})])
def test_a_run_leaves_the_scores_and_figures_of_its_method(runs, tmp_path, method, stages, figures):
    metrics = read(runs[method] / "metrics.json")
    assert metrics["iterations"] == {phase: 4 for phase in sps.PHASES[method] if phase != "project"}
    assert metrics["miou"] == metrics[stages[-1]]["miou"] and metrics["images_per_second"] > 0.1
    for stage in (metrics, *(metrics[name] for name in stages)):
        rates = [rate for rate in stage["iou"].values() if rate is not None]
        assert list(stage["iou"]) == [*toy_scenes.CLASSES] and stage["miou"] == pytest.approx(np.mean(rates))
    assert ("pruned" in metrics, "group_overlap" in metrics) == (method != "deeplab", method == NAME)
    assert method != NAME or {"consistency", "stability", "purity", "largest_part"} <= set(metrics)
    shutil.copytree(runs[method], tmp_path / "run", ignore=shutil.ignore_patterns("figures"))
    done(NAME, "--out", tmp_path / "run", "--resume")                   # a finished run repeats its report
    assert same(numbers(read(tmp_path / "run" / "metrics.json")), numbers(metrics))
    assert {re.sub("-.*", "", name) for name in files(runs[method] / "figures")} == figures


def test_figures_show_classes_of_the_test_pictures_and_rows_the_losses_of_their_phase(base):
    drawn, pairs = files(base / "figures"), read(base / "metrics.json")["equivariance"]["0.6"]["pairs"]
    assert {name for name in drawn if name.startswith(("groups", "prototypes"))} == {
        *(f"groups-{name}.png" for name in ("sky", "tall-house", "bird", "ghost")),
        *(f"prototypes-{name}.png" for name in ("sky", "tall-house", "bird"))}            # there is no ghost
    assert "equivariance.png" in drawn and ("equivariant_pairs.png" in drawn) == bool(pairs)
    rows = log_of(base)
    expected = [(phase, k) for phase in TERMS for k in (["0"] if phase == "project" else ["3", "4"])]
    assert [(row["phase"], row["iteration"]) for row in rows] == expected
    for row in rows:
        assert " ".join(x for x in ("ce", "diversity", "l1", "entropy") if row[x]) == TERMS[row["phase"]]
    assert rows[1]["lr"] == rows[0]["lr"] and float(rows[3]["lr"]) < float(rows[2]["lr"])     # constant; poly


def test_after_projection_every_prototype_is_a_patch_of_its_class(base, pictures):
    """There is no ghost, and a single pixel of a bird: its two prototypes of a scale fall together."""
    (net, progress, _), metrics = load(base), read(base / "metrics.json")
    data = datasets.open_dataset("folder", str(pictures), "train")
    for p, (image, row, column, _) in enumerate(progress["sources"]):
        pixels, mask = data.read(image)
        with torch.no_grad():
            z = net.maps(transforms.normalise(pixels)[None])[-1].sigmoid()[0].unflatten(0, (2, 6))
        assert nearest_exact(mask[None], *z.shape[2:])[0, row, column] == net.prototype_class[p]
        assert torch.allclose(z[net.prototype_scale[p], :, row, column], net.prototypes[p], atol=1e-5)
    birds = (net.prototype_class == 2).nonzero()[:, 0].tolist()
    assert net.prototype_scale[birds].tolist() == [0, 1]
    assert [progress["sources"][p][:3] for p in birds] == [[2, 4, 6]] * 2
    assert metrics["absent_classes"] == ["ghost"] and metrics["of_absent_classes"] == 4
    assert metrics["duplicates"] >= 2 and len(net.prototypes) == 20 - 4 - metrics["duplicates"]
    assert "4 of classes without a training pixel (ghost)" in (base / "printed.txt").read_text()
    assert metrics["absent"] == ["kite"] and (net.groups.members[3] == -1).all()


def test_pruned_prototypes_leave_a_run_of_protoseg(runs):
    metrics, (net, progress, _) = read(runs["protoseg"] / "metrics.json"), load(runs["protoseg"])
    dropped = metrics["of_absent_classes"] + metrics["duplicates"] + metrics["pruned"]
    assert metrics["pruned"] > 0 and metrics["prototypes_at_first"] == 14 * 4 == dropped + len(net.prototypes)
    assert metrics["prototypes"] == len(net.prototypes) == len(progress["sources"])
    data = datasets.open_dataset("toy_scenes", "", "train")
    loader = loaders.eval_loader(loaders.TestView(data, 0), 0, CPU)
    assert sps.prune_prototypes(net, loader, CPU).all()                 # nothing is left to prune


@pytest.mark.parametrize("phases, more", [
    (["group_warmup", "group_joint"], ["--rates", 1, "--micro-batch", 3]),        # a bird has one prototype
    (["warmup", "finetune", "group_warmup"],                                     # as in the preset em
     ["--backbone", "unet", "--unet-width", 4, "--output-stride", 8])])
def test_phases_of_no_iterations_are_passed_over(pictures, tmp_path, no_figures, phases, more):
    none = [word for phase in phases for word in (f"--{phase.replace('_', '-')}", 0)]
    done(NAME, "--out", tmp_path, *on(pictures, *none, *more))
    assert {row["phase"] for row in log_of(tmp_path)} == set(TERMS) - set(phases)
    before = numbers(read(tmp_path / "metrics.json"))
    done(NAME, "--out", tmp_path, "--eval-only")
    assert same(numbers(read(tmp_path / "metrics.json")), before)


def test_stage_1_of_another_run_is_taken_over(trained, tmp_path, no_figures):
    """With the same stage 2 it ends as that run, even if interrupted; rows of the log are means since the
    last one. Another entropy weight changes the groups alone."""
    first, flags = trained(NAME), [*SHORT[NAME], "--stage1", trained(NAME)]
    interrupt(NAME, 5, "--out", tmp_path / "same", *flags, "--eval-every", 1)
    done(NAME, "--out", tmp_path / "same", "--resume")
    assert same(numbers(read(tmp_path / "same" / "metrics.json")), numbers(read(first / "metrics.json")))
    done(NAME, "--out", tmp_path / "other", *flags, "--w-entropy", 3)
    a, b, other = (run.read_checkpoint(out / "last.pt")["model"]
                   for out in (first, tmp_path / "same", tmp_path / "other"))
    changed = {name for name in a if not torch.equal(a[name], other[name])}
    assert same(a, b) and changed == {"groups.weights", "groups.last_layer.weight"}
    assert log_of(tmp_path / "other")[:7] == log_of(first)[:7]
    rows = [float(row["ce"]) for row in log_of(tmp_path / "same") if row["phase"] == "group_joint"]
    mean, last = (float(row["ce"]) for row in log_of(first) if row["phase"] == "group_joint")
    assert (mean, last) == pytest.approx((np.mean(rows[:3]), rows[3]), rel=1e-5)


def test_another_split_and_another_threshold_need_no_other_run(base, tmp_path, no_figures):
    """A threshold above all weights leaves groups without members, which can be evaluated too."""
    out, before = shutil.copytree(base, tmp_path / "run"), read(base / "metrics.json")

    def evaluated(*flags):
        done(NAME, "--out", out, "--eval-only", *flags)
        return read(out / "metrics.json")
    metrics = evaluated("--test-split", "val")
    assert metrics["split"] == "val" and metrics["miou"] == pytest.approx(float(log_of(base)[-1]["val_miou"]))
    metrics = evaluated("--threshold", 0.3)
    assert metrics["stage2"] == before["stage2"] and metrics["group_average"] < before["group_average"]
    saved = run.read_checkpoint(base / "last.pt")
    saved["model"]["groups.weights"].clamp_(max=0.5)
    torch.save(saved, out / "last.pt")
    metrics = evaluated("--threshold", 0.6)
    assert metrics["prototypes"] == metrics["group_average"] == 0


def test_failure_finds_the_pictures_in_which_a_class_is_missed_or_invented(base, pictures, runs):
    """Predictions are the argmax of the logits at the picture's own size."""
    net, _, cfg = load(base)
    done(NAME, "--out", base, "--predict", pictures / "images" / "test")
    masks, said = ([np.asarray(Image.open(path / f"{k}.png")).astype(int) for k in range(4)]
                   for path in (pictures / "masks" / "test", base / "predictions"))
    for k in range(4):
        x = transforms.normalise(read_image(pictures / "images" / "test" / f"{k}.png"))[None]
        logits = torch.from_numpy(slow_logits(net, x, cfg.threshold)[1])[None]
        expected = F.interpolate(logits, (37, 51), mode="bilinear").argmax(1)[0].numpy()
        assert (said[k] == expected).mean() > 0.995                     # float32 at the borders
    for name in ("sky", "ghost"):
        c, expected = CLASSES.index(name), []
        for k in range(1, 4):
            own, found = masks[k] == c, said[k] == c
            wrong = np.bincount([*said[k][own & ~found], *masks[k][found & ~own]], minlength=5)
            expected.append((k, wrong.sum(), (own & found).sum() / (own | found).sum(), wrong.argmax()))
        rows = sps.main(replace(cfg, failure=name, failure_iou=1.0))
        assert [(row["image"], row["wrong"], pytest.approx(row["iou"]), row["confused_with"]) for row in rows
                ] == sorted((row for row in expected if row[2] < 1), key=lambda row: -row[1])
        assert {f"{name}-{n}.png" for n in range(1, len(rows) + 1)} <= files(base / "failures")
    assert "no test image with kite" in done(NAME, "--out", base, "--failure", "kite", "--failure-iou", 1)
    assert "IoU" in done(NAME, "--out", runs["protoseg"], "--failure", "grass", "--failure-iou", 1)


# ---- explanations ----

@pytest.mark.parametrize("method, alpha", [(NAME, 0.0), (NAME, 0.3), ("protoseg", 0.0)])
def test_contributions_sum_to_the_logit(method, alpha, base, runs):
    """And each is weight x activation, of the class's own groups (ProtoSeg: prototypes) in order. A class
    that lost its prototypes is explained by the others."""
    net, _, _ = load(base if method == NAME else runs[method])
    x = normal(1, 3, 50, 70).float()
    similarity, logits, activation = slow_logits(net, x, alpha)
    s, lengths = net.similarity(x)[0].detach(), set()
    for c, cell in ((c, cell) for c in range(len(logits)) for cell in ((0, 0), (7, 11), (12, 17))):
        own = (net.prototype_class == c).nonzero()[:, 0].tolist()
        found = sps.explain_cell(net, s, c, cell, alpha)
        total = sum(part["contribution"] for part in found["own"]) + found["constant"] + found["others"]
        assert found["logit"] == pytest.approx(logits[c][cell], rel=1e-3, abs=1e-2)
        assert total == pytest.approx(found["logit"], rel=1e-4, abs=1e-3)
        values = activation[c] if method == NAME else similarity[own]
        for part, value in zip(found["own"], values, strict=True):
            assert part["contribution"] == pytest.approx(part["weight"] * part["activation"], rel=1e-5)
            assert part["activation"] == pytest.approx(value[cell], rel=1e-3, abs=1e-3)
            for m in part.get("members", []):
                p = m["prototype"]
                assert p in own and m["weight"] >= alpha and m["scale"] == net.prototype_scale[p]
        lengths.add(len(own))
    assert 0 in lengths and len(lengths) > 1


WEIGHTS = [[[0.96, 0.04, 0.0], [0.5, 0.3, 0.2]], [[0.0, 1.0, 0.0], [0.02, 0.98, 0.0]],
           [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]       # class 3 has none
HEAD = np.arange(32).reshape(4, 8) / 10 - 1.5


def grouped_net(weights=WEIGHTS, head=HEAD, cls=(0, 0, 0, 1, 1, 2)):
    """Prototypes of the given classes, groups with these weights (C,G,N) and last layer (C,C*G)."""
    net = stub_net(uniform(len(cls), 5), cls, [0] * len(cls), len(weights)).eval()
    net.start_groups(len(weights[0]))
    net.groups.weights.data.copy_(torch.as_tensor(weights))
    net.groups.last_layer.weight.data.copy_(torch.as_tensor(head))
    return net


def test_an_explanation_by_hand():
    """Class 0 has groups that speak against it, which are no other class's."""
    s = torch.tensor([2.0, 1.0, 3.0, 0.5, 1.5, 4.0])[:, None, None]
    found = sps.explain_cell(grouped_net(), s, 0, (0, 0), alpha=0.05)
    activation = np.exp([1.92, 1.9, 1.5, 1.47, 4.0, 4.0])               # without 0.04 and 0.02
    own, others = HEAD[0, :2] * activation[:2], HEAD[0, 2:6] * (activation[2:] - 1)
    assert [part["contribution"] for part in found["own"]] == pytest.approx(own.tolist(), rel=1e-5)
    assert [len(part["members"]) for part in found["own"]] == [1, 3]
    sums = found["constant"], found["others"]
    assert sums == pytest.approx((HEAD[0, 2:6].sum(), others.sum()), rel=1e-5)
    assert [part["contribution"] for part in found["against"]] == pytest.approx(sorted(others)[:3], rel=1e-5)
    assert [part["class"] for part in found["against"]] == [2, 2, 1]


def test_explain_takes_the_pixel_and_class_that_are_asked_for(base, pictures):
    """Else the class that fills the picture, or that of the pixel, and the strongest pixel of the class."""
    image = pictures / "images" / "test" / "2.png"                      # 51 x 37: 13 x 10 cells
    logits = slow_logits(load(base)[0], transforms.normalise(read_image(image))[None], 0.05)[1]
    most = CLASSES[np.bincount(logits.argmax(0).flatten()).argmax()]
    for name, pixel, cell in (*((name, (), ()) for name in ("", "bird", "ghost", "tall house")),
                              ("kite", (50, 36), (9, 12)), ("kite", (0, 5), (1, 0)), ("", (2, 36), (9, 0))):
        asked = [*(["--class", name] if name else []), *(["--pixel", *pixel] if pixel else [])]
        printed = done(NAME, "--out", base, "--explain", image, *asked)
        expected = name or (CLASSES[logits[(..., *cell)].argmax()] if cell else most)
        strongest = logits[CLASSES.index(expected)]
        cell = cell or divmod(int(strongest.argmax()), 13)
        path = base / "explanations" / f"2-{expected.replace(' ', '-')}.json"
        found = read(path)
        assert found["class"] == expected and found["predicted"] == CLASSES[logits[(..., *cell)].argmax()]
        assert (found["y"] * 10 // 37, found["x"] * 13 // 51) == cell
        assert found["logit"] == pytest.approx(strongest[cell], rel=1e-3, abs=1e-2)
        assert f"{expected} at x {found['x']}, y {found['y']}" in printed
        assert min(Image.open(path.with_suffix(".png")).size) > 200


# ---- measures and Eq. (10) on hand-made networks ----

class Masks(list):
    """A data set: masks (H,W) on black images."""

    def read(self, i):
        return torch.zeros(3, *self[i].shape, dtype=torch.uint8), self[i].to(torch.uint8)


def seen_as(net, maps):
    """net.similarity returns maps[0] (P,h,w), then maps[1], ..."""
    calls = iter(maps)
    net.similarity = lambda x: next(calls)[None]
    return net


def parts_of(classes, points=(), maps=None):
    """Part labels of 3 parts. points: {image: rows of class, part, x, y}; maps: {image: part map (H,W)}."""
    return SimpleNamespace(classes=classes, num_parts=3, has=lambda i: i in (maps or points),
                           keypoints=lambda i: torch.tensor(points[i], dtype=torch.float32).reshape(-1, 4),
                           part_map=lambda i: maps and maps[i].to(torch.uint8))


@pytest.mark.parametrize("alpha, used, kept", [(0.05, [0, 1, 2, 4, 5], 8), (0.0, [0, 1, 2, 3, 4, 5], 10),
                                               (0.3, [0, 1, 4, 5], 7)])
def test_sparsity_by_hand(alpha, used, kept):
    """Groups of class 3, which has no prototypes, do not count in the average. In stage 1 all are in use."""
    net, cfg = grouped_net(), TOY(threshold=alpha)
    assert net.used(alpha).nonzero()[:, 0].tolist() == used
    assert measures.sparsity(net, cfg) == pytest.approx(
        dict(prototypes=len(used), group_average=kept / 6, mean_abs_weight=np.abs(HEAD).mean(),
             extra_parameters=len(used) * 5 + kept + 32))
    net.groups = None
    assert measures.sparsity(net, cfg) == pytest.approx(
        dict(prototypes=6, mean_abs_weight=(6 + 18 * 0.5) / 24, extra_parameters=6 * 5 + 24))


def lit(*parts_of_prototype):
    """(P,4,5): each prototype is 5 on the cells of its parts, of 2 x 2 pixels, and 0 elsewhere."""
    maps = torch.zeros(len(parts_of_prototype), 4, 5)
    for p, parts in enumerate(parts_of_prototype):
        for q in parts:
            maps[(p, *{1: (0, 1), 2: (2, 3), 3: (3, 0)}[q])] = 5
    return maps


def test_consistency_and_stability_by_hand():
    """p0 is on part 1 in 5 of 5 pictures, p1 on part 2 in 4 of 5: not more than 80 %, p2 on part 3 in all 3
    that have it; p3 belongs to a class without parts, and picture 5 has no labels. Under noise p0 loses its
    part in picture 1, p2 gains one in picture 4. Prototypes in no group do not count."""
    data, cfg = Masks(torch.zeros(8, 10).long() for _ in range(6)), TOY(quantiles=[0.7, 0.9, 0.99])
    for mask in data:
        mask[:2, 6:], mask[:2, 5:6] = 1, 255
    parts = parts_of((0, 2), {i: [(0, 1, 3, 1), (0, 2, 7, 4)] + [(0, 3, 0, 7)] * (i < 3) for i in range(5)})
    clean = [lit([1], [2], [3], [1])] * 3 + [lit([1], [2], [], [1]), lit([1], [], [], [1])]
    noisy = [clean[0], lit([], [2], [3], [1]), *clean[2:4], lit([1], [], [2], [1])]
    net, calls = stub_net(uniform(4, 5), [0, 0, 0, 1], [0] * 4, 4), iter(range(10))
    net.similarity = lambda x: (noisy if x.std((2, 3)).max() > 0.1 else clean)[next(calls) // 2][None]
    found = measures.part_scores(net, data, parts, cfg, CPU)
    for name, expected in (("consistency", (200 / 3, 200 / 3, 0)), ("stability", (260 / 3, 260 / 3, 100))):
        assert found[name] == pytest.approx(np.mean(expected))          # above 99 % of the class is nothing
        assert found[f"{name}_by_quantile"] == pytest.approx(dict(zip(("0.7", "0.9", "0.99"), expected)))
    for weights, value in (([0.5, 0.0, 0.5], 200 / 3), ([0.02, 0.98, 0.0], 0)):
        net = grouped_net([[weights], [[1.0, 0, 0]], [[0.0] * 3], [[0.0] * 3]], np.ones((4, 4)), (0, 0, 0, 1))
        net = seen_as(net, [maps for maps in clean for _ in range(2)])
        assert measures.part_scores(net, data, parts, cfg, CPU)["consistency"] == pytest.approx(value)
    for bare in (parts_of((0,), {0: []}), parts_of((2,), {0: [(2, 1, 1, 1)]})):
        net = seen_as(net, clean)
        assert measures.part_scores(net, data, bare, cfg, CPU) == dict(consistency=None, stability=None)
        assert measures.part_purity(net, data, bare, cfg, CPU) == {}


def test_purity_by_hand():
    """p0 is highest at part 1, 1, 2, 1 of its class, with similarity 4, 3, 2, 1; p1 outside of its class."""
    data = Masks(torch.zeros(4, 4, dtype=torch.int64) for _ in range(4))
    part_map = torch.tensor([[1, 1, 2, 2], [1, 1, 2, 2], [1, 1, 3, 3], [0, 0, 0, 0]])
    maps = torch.zeros(4, 2, 4, 4)
    maps[:, 0, 3, 3] = maps[:, 1, 0, 0] = 9                             # not their class
    for i, (row, column) in enumerate([(0, 0), (1, 1), (0, 3), (2, 0)]):
        data[i][3], maps[i, 0, row, column], maps[i, 1, 3, i] = 1, 4 - i, 1
    without_1 = part_map * (part_map != 1)                              # "no part" is no part
    for labels, most, purity, largest in ((part_map, 10, 75, 6), (part_map, 3, 200 / 3, 6),
                                          (part_map, 2, 100, 6), (without_1, 10, 25, 4)):
        net = seen_as(stub_net(uniform(2, 5), [0, 1], [0, 0], 4), maps)
        parts = parts_of((0,), maps={i: labels for i in range(4)})
        found = measures.part_purity(net, data, parts, TOY(), CPU, most)
        assert found == pytest.approx(dict(purity=purity, largest_part=100 * largest / 12))


def test_overlap_of_groups_is_one_ratio_over_all_pictures():
    """Two groups of class 0: the same map in picture 0, and apart in picture 1; class 1 is in no picture. Of
    0..99 five are above the 95th percentile. Groups that the threshold emptied overlap nowhere."""
    count = torch.arange(100.0)
    maps = torch.stack([count, count.roll(-2), count.flip(0)]).reshape(1, 3, 10, 10)
    assert [float(x) for x in measures.group_overlap(torch.cat([maps, maps]))] == [2 * 3, 2 * (7 + 10 + 10)]
    masks, right = torch.zeros(2, 10, 40, dtype=torch.int64), torch.arange(400).view(10, 40) / 100
    masks[1, :, 30:] = 255
    seen = [torch.stack([right] * 4), torch.stack([right, -right, right, right]) + 4]
    for weights, expected in (([[1.0, 0.0], [0.0, 1.0]], 100 * 20 / (20 + 40)), ([[0.5, 0.5]] * 2, None)):
        net = seen_as(grouped_net([weights] * 2, np.ones((2, 4)), (0, 0, 1, 1)), seen)
        overlap = measures.mean_overlap(net, Masks(masks), TOY(threshold=0.6), CPU)
        assert overlap == (expected and pytest.approx(expected))


def equivariance_of(cls, scale, masks, seen, cfg, **limits):
    """The script's equivariance of a network that sees ramps on cells of 4 pixels: to the "right", "left",
    "up" or "down" for every prototype, as seen says of one image after the other. And the images' widths."""
    widths, calls = [], iter(seen)

    def similarity(x):
        widths.append(x.shape[3])
        rows, columns = torch.meshgrid(*(torch.arange(float(n // 4)) for n in x.shape[2:]), indexing="ij")
        ramps = dict(right=columns, left=-columns, down=rows, up=-rows)
        return torch.stack([ramps[name] for name in next(calls).split()])[None]

    net = stub_net(uniform(len(cls), 5), cls, scale, 4)
    net.start_groups(3)
    net.similarity = similarity
    return sps.equivariance(net, Masks(masks), cfg, CPU, **limits), widths


@pytest.mark.parametrize("rates, half", [([1, 2], 80), ([6, 12], 80), ([1, 4], 40)])
def test_equivariant_prototypes_light_up_alike_when_the_size_makes_up_for_their_rates(rates, half):
    """p0 of scale 0 looks at the picture shrunk by the rate of scale 1, p1, p2 of scale 1 at it as it is. p3
    belongs to another class. Quantiles are over the class."""
    mask = torch.zeros(80, 160, dtype=torch.int64)
    mask[:, :20] = 255
    found, widths = equivariance_of([0, 0, 0, 1], [0, 1, 1, 1], [mask] * 2, [
        "down right left right", "right up up up"] * 2, TOY(rates=rates))
    assert widths == [160, half] * 2
    for quantile in ("0.6", "0.7"):
        assert found[quantile] == dict(
            pairs=[(0, 1, pytest.approx(1))], groups=1, groups_to_learned_groups=pytest.approx(100 / 6),
            prototypes_in_groups=50, classes_with_groups=50)


@pytest.mark.parametrize("cells, mean", [(10, 2 / 3), (9, 3 / 4)])
def test_equivariance_is_a_mean_over_pictures_with_ten_cells_of_the_class(cells, mean):
    """p1 agrees in two of three pictures of the class, p2 in one; one more picture has 9 cells of it. With
    --equivariance 5 every second picture is looked at."""
    masks = [torch.full((80, 160), int(i % 2 or i > 4)) for i in range(10)]
    masks[8][8:20, 8:20] = 0
    seen = ["down right left", "right up up"] * 5
    seen[4] = "down left right"                                         # the third of the five
    found, _ = equivariance_of([0, 0, 0], [0, 1, 1], masks, seen, TOY(rates=[1, 2], equivariance=5),
                               least_cells=cells)
    assert found["0.7"]["pairs"] == [(0, 1, pytest.approx(mean, abs=1e-5))]


def test_pairs_that_share_a_prototype_merge_into_groups():
    net = stub_net(uniform(10, 5), [0, 0, 0, 0, 0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2, 0, 1, 0, 1], 4)
    net.start_groups(3)
    iou = torch.zeros(10, 10)
    for i, j in ((1, 3), (0, 2), (0, 5), (6, 7)):                       # 1-3-5-0-2 and 6-7
        iou[i, j] = 0.75
    iou[3, 5], iou[8, 9] = 0.875, 0.5                                   # 0.5 is not above; the best is first
    found = measures.equivariance_ratios(net, iou, 0.5)
    assert [pair[:2] for pair in found.pop("pairs")] == [(3, 5), (0, 2), (0, 5), (1, 3), (6, 7)]
    assert found == pytest.approx(dict(groups=2, groups_to_learned_groups=100 * 2 / 9,
                                       prototypes_in_groups=70, classes_with_groups=200 / 3))


def test_part_files_bring_consistency_stability_and_purity(tmp_path, no_figures):
    """Without --parts nothing of parts is measured; files of another size are named."""
    label = np.full((24, 40), 7, np.uint8)
    label[4:16, 6:30], label[:3] = 26, 1                                # road, a car, void
    ids = np.where(label == 26, 2600001 + (np.arange(40) > 11), label).astype(np.int32)
    for name, pixels in (("leftImg8bit/{}/x/x_{}_leftImg8bit.png", np.stack([label] * 3, 2)),
                         ("gtFine/{}/x/x_{}_gtFine_labelIds.png", label),
                         ("parts/{}/x/x_{}_gtFinePanopticParts.tif", ids),
                         ("wrong/{}/x/x_{}_gtFinePanopticParts.tif", ids[1:])):
        for path in (tmp_path / name.format(split, k) for split in ("train", "val") for k in range(2)):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    out, data = tmp_path / "out", ["--dataset", "cityscapes", "--data", tmp_path, "--test-split", "val"]
    done(NAME, "--out", out, *SHORT[NAME], *data, "--batch-size", 2)
    assert not {"consistency", "stability", "purity"} & set(read(out / "metrics.json"))
    done(NAME, "--out", out, "--eval-only", "--parts", tmp_path / "parts" / "val")
    metrics = read(out / "metrics.json")
    assert 0 <= metrics["consistency"] <= 100 and metrics["purity"] >= 50
    assert metrics["largest_part"] == pytest.approx(100 * 4 / 6)        # columns of the car, at stride 4
    said = mistake(NAME, "--out", out, "--eval-only", "--parts", tmp_path / "wrong" / "val")
    assert all(words in said for words in ("x_0_gtFinePanopticParts.tif", "40 x 23", "40 x 24"))


# ---- part files, tables, mistakes ----

def test_tables_share_rows_and_stand_beside_the_papers_numbers(pictures, tmp_path):
    none = ["--warmup", 1, "--joint", 1, "--finetune", 1, "--group-warmup", 1, "--group-joint", 1]
    tables, stamps = {}, []
    for number in (8, 7, 9, 10):
        done(NAME, "--out", tmp_path, *on(pictures, *none), "--table", number)
        tables[number] = (tmp_path / f"table{number}.md").read_text()
        stamps.append({path.parent.name: path.stat().st_mtime_ns for path in tmp_path.glob("rows/*/last.pt")})
    assert set(stamps[0]) == {NAME, "entropy-off"} and stamps[0] == stamps[1] == stamps[2]
    assert stamps[3] == stamps[0] | {"protoseg": stamps[3]["protoseg"]}
    on_, off = (read(tmp_path / "rows" / name / "metrics.json") for name in (NAME, "entropy-off"))
    assert on_["stage1_finetuned"] == off["stage1_finetuned"] and (tmp_path / "entropy.png").exists()
    assert read(tmp_path / "rows" / "entropy-off" / "config.json")["w_entropy"] == 0
    net, _, cfg = load(tmp_path / "rows" / NAME)
    used = measures.sparsity(net, replace(cfg, threshold=0.1))["prototypes"]

    def cells(metrics):
        return f"{metrics['prototypes']} | {metrics['group_average']:.2f} | {metrics['miou']:.2f}"
    for number, row in (
            (8, f"off | {cells(off)} | 146 / 5.59 / 72.22 | 132 / 5.79 / 69.22 | 1405 / 6.06 / 33.40"),
            (8, f"on | {cells(on_)} | 131 / 3.70 / 72.26 | 111 / 3.39 / 69.22 | 1132 / 4.08 / 34.32"),
            (7, f"0.05 | {cells(on_)} | 131 / 3.70 / 72.26 | 111 / 3.39 / 69.22"), (7, f"0.1 | {used} |"),
            (7, "126 / 3.21 / 72.12 | 109 / 3.10 / 69.03 | 1067 / 3.48 / 34.16"),
            (9, f"off | {off['group_overlap']:.2f} | 47.45 | 61.65 | 50.25"),
            (9, f"on | {on_['group_overlap']:.2f} | 28.29 | 43.48 | 42.74"),
            (10, "0.527 / 12100 / 20.70 | 0.523 / 9900 / 52.50 | 0.503 / 238200 / 51.90"),
            (10, "0.063 / 9100 / 15.60 | 0.071 / 7600 / 5.10 | 0.437 / 135400 / 14.50")):
        assert row in tables[number]
    em = sps.TABLES[5].paper
    assert [em[row] for row in sps.EM_CUTS if row in em] == [(77.63,), (78.92,), (77.97,), (79.29,)]
    assert len(sps.EM_CUTS) == 6 and sps.EM_CUTS["protoseg 2"] == dict(
        method="protoseg", train_split="train-2", val_split="val-2", test_split="val-2")


@pytest.mark.parametrize("argv, words", [
    (["--scale-min", 1.5, "--scale-max", 0.5], ["--scale-max 0.5", "--scale-min 1.5"]),
    (["--rates", 2, 1], ["--rates 2 1"]), (["--rates", 1, 1], ["--rates 1 1"]),
    (["--pixel", 3], ["--pixel 3"]), (["--pixel", 3, 4], ["--pixel", "--explain"]),
    (["--class", "car"], ["--class", "--explain"]),
    (["--stage1", "x", "--method", "protoseg"], ["--stage1", "protoseg"]),
    (["--stage1", "nowhere"], ["nowhere", "holds no run"]), (["--failure", "car"], ["holds no run"]),
    (["--parts", "somewhere"], ["--parts", "toy_scenes"]), (["--test-split", "exam"], ["exam"]),
    (["--project-split", "exam"], ["exam"]), (["--test-square"], ["--test-square", "--test-size"])])
def test_mistakes_are_one_sentence_before_anything_is_written(tmp_path, argv, words):
    said = mistake(NAME, "--out", tmp_path / "out", *SHORT[NAME], *argv)
    assert all(word in said for word in words) and not (tmp_path / "out").exists(), said


def test_mistakes_with_a_run(base, runs, pictures, tmp_path, no_figures):
    image = pictures / "images" / "test" / "2.png"
    for out, argv, words in (
            (base, ["--explain", image, "--pixel", 51, 0], "51 x 37"),
            (base, ["--explain", image, "--pixel", 0, -1], "51 x 37"),
            (base, ["--explain", image, "--class", "unicorn"], "it knows sky, tall house"),
            (base, ["--failure", "unicorn"], "it knows sky, tall house"),
            (base, ["--explain", "gone.png"], "gone.png"),
            (runs["deeplab"], ["--explain", image], "plain network"),
            (runs["deeplab"], ["--failure", "car"], "plain network")):
        assert words in mistake(NAME, "--out", out, *argv)
    for stage1, argv, words in (
            (base, ["--depth", 7], "--depth 6, not 7"), (base, ["--rates", 1, 3], "--rates"),
            (base, ["--frozen-bn"], "--frozen-bn"), (base, ["--input-scales", 0.5], "--input-scales"),
            (base, ["--backbone", "unet"], "--backbone"), (base, ["--output-stride", 8], "--output-stride"),
            (base, ["--data", make_pictures(tmp_path / "more", CLASSES + ("cloud",))], "5 classes"),
            (base, ["--dataset", "toy_scenes", "--data", ""], "--dataset folder"),
            (runs["protoseg"], [], "--method protoseg")):
        assert words in mistake(NAME, "--out", tmp_path / "out", *on(pictures, "--stage1", stage1, *argv))
        assert not (tmp_path / "out").exists()
    for path in (tmp_path / "more").glob("masks/t*/*.png"):             # void all over
        Image.new("L", (51, 37), 255).save(path)
    assert "no pixel of the train split" in mistake(NAME, "--out", tmp_path / "out", *on(tmp_path / "more"))
    (tmp_path / "more" / "classes.txt").write_text("\n".join(CLASSES))
    assert "--test-split" in mistake(NAME, "--out", base, "--eval-only", "--data", tmp_path / "more")


def test_a_run_before_its_projection_is_told_to_go_on(pictures, tmp_path, no_figures):
    """Also in the folder of a finished run, whose stage 1 is moved aside with it."""
    done(NAME, "--out", tmp_path, *on(pictures))
    interrupt(NAME, 7, "--out", tmp_path, *on(pictures), "--seed", 1)
    for argv in (["--explain", pictures / "images/test/2.png"], ["--failure", "sky"], ["--eval-only"]):
        assert "--resume" in mistake(NAME, "--out", tmp_path, *argv)
    assert "stage1.pt" in mistake(NAME, "--out", tmp_path / "next", *on(pictures), "--stage1", tmp_path)
    assert (tmp_path / "previous-1" / "stage1.pt").exists() and not (tmp_path / "next").exists()


def test_names_of_the_symbol_table_are_in_the_body_and_the_method_pastes_into_a_notebook():
    header, body = SOURCE.split('"""', 2)[1:]
    table = header[header.index("symbol "):header.index("Phases:")]
    symbols = re.findall(r"^\S+(?: \S+)?  +(\w+(?:\.\w+)?)", table, re.M)[1:]
    assert len(symbols) >= 10 and all(name.split(".")[-1] in body for name in symbols)
    names = dict(torch=torch, nn=nn, F=F)
    exec(SOURCE[SOURCE.index("# ---- prototypes and pixels"):SOURCE.index("def first_prototypes")], names)
    backbone = nn.Conv2d(3, 7, 3, stride=8, padding=1)
    backbone.channels = 7
    net = names["ScaleProtoSeg"](backbone, 5, [1, 2], False, (), True, [0, 0, 1, 1] * 2, [0] * 4 + [1] * 4, 2)
    logits, d2 = net.train()(torch.randn(2, 3, 48, 64))[0]
    small = names["nearest_label"](torch.randint(2, (2, 48, 64)), logits.shape[2:])
    diversity = names["diversity_loss"](d2, small, net.prototype_class, net.prototype_scale)
    (F.cross_entropy(logits, small) + diversity).backward()
    assert net.prototypes.grad.any()


@pytest.mark.gpu
@every_method
def test_gpu_a_run_trains_in_bf16_resumes_and_explains(pictures, tmp_path, method):
    flags = on(pictures, "--device", "cuda", "--method", method)
    done(NAME, "--out", tmp_path, *flags)
    assert read(tmp_path / "metrics.json")["device"].startswith("cuda")
    done(NAME, "--out", tmp_path, "--resume")
    if method != "deeplab":
        done(NAME, "--out", tmp_path, "--explain", pictures / "images" / "test" / "2.png")
