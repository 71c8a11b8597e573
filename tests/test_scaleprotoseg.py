"""scaleprotoseg.py as its users meet it, beside test_contract.py: three methods, what becomes of prototypes,
--stage1, explanations that sum to the logit, measures and Eq. (10) by hand, tables, its own mistakes."""
import itertools
import re
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import scaleprotoseg as sps
from commands import (SHORT, assert_same_run, copy_of, done, files, interrupt, log_of, mistake, numbers,
                      read, same)
from common import datasets, run, scaleprotoseg_measures as measures, toy_scenes, transforms
from common.files import read_image
from test_scaleprotoseg_equations import nearest_exact, normal, slow_logits, stub_net, uniform
from trees import write

NAME, CPU = "scaleprotoseg", torch.device("cpu")
CLASSES = ("sky", "tall house", "bird", "ghost", "kite")
TOY = partial(run.make_config, sps.Config, sps.PRESETS, "toy")
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
            write(root, {f"images/{split}/{k}.png": image, f"masks/{split}/{k}.png": mask})
    return write(root, {"classes.txt": "\n".join(classes)})


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
    """{method: a run of it on toy scenes}"""
    folders = {NAME: trained(NAME)}
    for method in ("protoseg", "deeplab"):
        folders[method] = tmp_path_factory.mktemp(method)
        done(NAME, "--out", folders[method], *SHORT[NAME], "--method", method, "--protoseg-prototypes", 4)
    return folders


# ---- a run of each method ----

STAGE_1 = ["stage1_projected", "stage1_finetuned"]
ALL = {"examples.png", "learning.png"}
PICTURES = ALL | {"prototypes", "part_metrics.png", "nearest_patches.png", "nearest_prototypes"}
TERMS = dict(warmup="ce diversity", joint="ce diversity", project="", finetune="ce l1",
             group_warmup="ce l1 entropy", group_joint="ce l1 entropy")


@pytest.mark.parametrize("method, stages, figures", [
    (NAME, STAGE_1 + ["stage2", "stage2_thresholded"], PICTURES | {"groups"}),
    ("protoseg", STAGE_1, PICTURES), ("deeplab", ["plain"], ALL)])
def test_a_run_leaves_the_scores_and_figures_of_its_method(runs, method, stages, figures):
    metrics = read(runs[method] / "metrics.json")
    assert metrics["iterations"] == {phase: 4 for phase in sps.PHASES[method] if phase != "project"}
    assert metrics["miou"] == metrics[stages[-1]]["miou"] and metrics["images_per_second"] > 0.1
    for stage in (metrics, *(metrics[name] for name in stages)):
        rates = [rate for rate in stage["iou"].values() if rate is not None]
        assert list(stage["iou"]) == [*toy_scenes.CLASSES] and stage["miou"] == pytest.approx(np.mean(rates))
    assert ("pruned" in metrics, "group_overlap" in metrics) == (method != "deeplab", method == NAME)
    if method == NAME:
        assert {"part_metrics", "stability", "purity", "largest_part"} <= set(metrics)
    if method == "protoseg":                                            # may have pruned all that have parts
        dropped = metrics["of_absent_classes"] + metrics["duplicates"] + metrics["pruned"]
        assert metrics["pruned"] > 0 and metrics["prototypes"] + dropped == 14 * 4
    figures = figures if "part_metrics" in metrics else figures - {"part_metrics.png"}
    assert {re.sub("-.*", "", name) for name in files(runs[method] / "figures")} == figures


@pytest.mark.parametrize("method, step", [("protoseg", 11), ("deeplab", 7)])
def test_a_resumed_ancestor_ends_like_an_uninterrupted_run(runs, tmp_path, no_figures, method, step):
    interrupt(NAME, step, "--out", tmp_path, *SHORT[NAME], "--method", method, "--protoseg-prototypes", 4)
    done(NAME, "--out", tmp_path, "--resume")
    assert_same_run(runs[method], tmp_path)


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
    distance, cls = np.array([source[3] for source in progress["sources"]]), net.prototype_class.numpy()
    assert {name: entry["distance"] for name, entry in metrics["projection"].items()} == {
        CLASSES[c]: pytest.approx(np.median(distance[cls == c])) for c in (0, 1, 2, 4)}
    assert measures.moved_far([(0, 0, 0, d) for d in (1, 1, 1, 4, 4.1)]) == {4: 4.1}


def test_phases_of_no_iterations_are_passed_over(pictures, tmp_path, no_figures):
    """Some in the preset em, with its backbone; here the last phase too. Prototypes of one scale. The log
    prior is that of the training masks; the ghost, which is in none, has that of a pixel."""
    none = ["--warmup", 0, "--finetune", 0, "--group-joint", 0, "--log-prior"]
    unet = ["--backbone", "unet", "--unet-width", 4, "--output-stride", 8, "--rates", 1, "--micro-batch", 3]
    interrupt(NAME, 2, "--out", tmp_path, *on(pictures, *none, *unet))
    done(NAME, "--out", tmp_path, "--resume")
    masks = np.stack([np.asarray(Image.open(pictures / f"masks/train/{k}.png")) for k in range(4)])
    pixels = np.bincount(masks[masks < 255], minlength=5).clip(1)
    assert load(tmp_path)[0].log_prior.numpy() == pytest.approx(np.log(pixels / pixels.sum()), rel=1e-5)
    assert {row["phase"] for row in log_of(tmp_path)} == {"joint", "project", "group_warmup"}
    before = numbers(read(tmp_path / "metrics.json"))
    done(NAME, "--out", tmp_path, "--eval-only")
    assert same(numbers(read(tmp_path / "metrics.json")), before)


def test_stage_1_of_another_run_is_taken_over(trained, tmp_path, no_figures):
    """With the same stage 2 it ends as that run, with other settings other groups. The log has means."""
    first, flags = trained(NAME), [*SHORT[NAME], "--stage1", trained(NAME)]
    interrupt(NAME, 5, "--out", tmp_path / "same", *flags, "--eval-every", 1)
    done(NAME, "--out", tmp_path / "same", "--resume")
    ours, theirs = (read(out / "metrics.json") | dict(settings={}) for out in (tmp_path / "same", first))
    assert same(numbers(ours), numbers(theirs))
    done(NAME, "--out", tmp_path / "other", *flags, "--w-entropy", 3)
    a, b, other = (run.read_checkpoint(out / "last.pt")["model"]
                   for out in (first, tmp_path / "same", tmp_path / "other"))
    changed = {name for name in a if not torch.equal(a[name], other[name])}
    assert same(a, b) and changed == {"groups.weights", "groups.last_layer.weight"}
    rows = [float(row["ce"]) for row in log_of(tmp_path / "same") if row["phase"] == "group_joint"]
    mean, last = (float(row["ce"]) for row in log_of(first) if row["phase"] == "group_joint")
    assert (mean, last) == pytest.approx((np.mean(rows[:3]), rows[3]), rel=1e-5)


def test_a_threshold_above_all_weights_leaves_groups_without_members(base, tmp_path, no_figures):
    out = shutil.copytree(base, tmp_path / "run")
    saved = run.read_checkpoint(base / "last.pt")
    saved["model"]["groups.weights"].clamp_(max=0.5)
    torch.save(saved, out / "last.pt")
    assert "without a prototype" in done(NAME, "--out", out, "--eval-only", "--threshold", 0.6)
    metrics = read(out / "eval-test-threshold-0.6" / "metrics.json")
    assert metrics["prototypes"] == metrics["group_average"] == 0


def test_failure_finds_the_pictures_in_which_a_class_is_missed_or_invented(base, pictures):
    """By what --predict says, worst first."""
    done(NAME, "--out", base, "--predict", pictures / "images" / "test")
    masks, said = ([np.asarray(Image.open(path / f"{k}.png")).astype(int) for k in range(4)]
                   for path in (pictures / "masks" / "test", base / "predictions"))
    for name in ("sky", "ghost"):
        c, expected = CLASSES.index(name), []
        for k in range(1, 4):
            own, found = masks[k] == c, said[k] == c
            wrong = np.bincount([*said[k][own & ~found], *masks[k][found & ~own]], minlength=5)
            expected.append((k, wrong.sum(), (own & found).sum() / (own | found).sum(), wrong.argmax()))
        rows = sps.main(replace(run.read_config(sps.Config, base), failure=name, failure_iou=1.0))
        assert [(row["image"], row["wrong"], pytest.approx(row["iou"]), row["confused_with"]) for row in rows
                ] == sorted((row for row in expected if row[2] < 1), key=lambda row: -row[1])
        assert {f"{name}-{n}.png" for n in range(1, len(rows) + 1)} <= files(base / "failures")
    assert "no test image with kite" in done(NAME, "--out", base, "--failure", "kite", "--failure-iou", 1)


# ---- explanations ----

@pytest.mark.parametrize("method, alpha", [(NAME, 0.0), (NAME, 0.3), ("protoseg", 0.0)])
def test_contributions_sum_to_the_margin(method, alpha, base, runs):
    """Of any two classes, of which one, the ghost, lost its prototypes."""
    net, _, _ = load(base if method == NAME else runs[method])
    x = normal(1, 3, 50, 70).float()
    logits, s = slow_logits(net, x, alpha)[1], net.similarity(x)[0].detach()
    for (c, other), cell in itertools.product(((0, 1), (3, 0), (2, 3)), ((0, 0), (7, 11), (12, 17))):
        found = measures.explain_cell(net, s, c, other, cell, alpha)
        terms = [part["contribution"] for part in found["own"] + found["rival"]]
        for margin in (found["margin"], sum(terms) + found["constant"] + found["others"]):
            assert margin == pytest.approx(logits[(c, *cell)] - logits[(other, *cell)], rel=1e-3, abs=1e-2)


WEIGHTS = [[[0.96, 0.04, 0.0], [0.3, 0.5, 0.2]], [[0.0, 1.0, 0.0], [0.02, 0.98, 0.0]],
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
    """Class 0 against class 1; the groups of class 2 are the others, class 3 has none. Without groups."""
    s, net = torch.tensor([2.0, 1.0, 3.0, 0.5, 1.5, 4.0])[:, None, None], grouped_net()
    net.log_prior = torch.tensor([0.7, 0.2, 9.0, 9.0])
    found = measures.explain_cell(net, s, 0, 1, (0, 0), 0.05)
    activation = np.exp([1.92, 1.7, 1.5, 1.47, 4.0, 4.0])               # without 0.04 and 0.02
    weight = (HEAD[0] - HEAD[1])[:6]
    terms, parts = weight * (activation - 1), found["own"] + found["rival"]
    assert [part["contribution"] for part in parts] == pytest.approx(terms[:4].tolist(), rel=1e-5)
    members = [[member["prototype"] for member in part["members"]] for part in parts]
    assert members == [[0], [1, 0, 2], [4], [4]]                        # the heaviest first
    assert [part["group"] for part in parts] == [0, 1, 0, 1]
    assert found["constant"] == pytest.approx(weight.sum() + 0.7 - 0.2, rel=1e-5)
    assert found["others"] == pytest.approx(terms[4:].sum(), rel=1e-5)
    assert measures.explain_cell(net, s, 3, 0, (0, 0))["own"] == []
    net.groups, net.log_prior = None, None                              # last layer: 1 and -1/2
    found = measures.explain_cell(net, s, 0, 1, (0, 0))
    terms = {part["prototype"]: part["contribution"] for part in found["own"] + found["rival"]}
    assert terms == {0: 3.0, 1: 1.5, 2: 4.5, 3: -0.75, 4: -2.25} and found["margin"] == 6


def test_explain_takes_the_pixel_and_class_that_are_asked_for(base, pictures):
    """Else the class that fills the picture, or that of the pixel, and the strongest pixel of the class; it
    is held against the next best there."""
    image = pictures / "images" / "test" / "2.png"                      # 51 x 37: 13 x 10 cells
    logits = slow_logits(load(base)[0], transforms.normalise(read_image(image))[None], 0.05)[1]
    most = CLASSES[np.bincount(logits.argmax(0).flatten()).argmax()]
    for name, pixel, cell in (("", (), ()), ("tall house", (), ()), ("kite", (50, 36), (9, 12)),
                              ("", (2, 36), (9, 0))):
        asked = [*(["--class", name] if name else []), *(["--pixel", *pixel] if pixel else [])]
        printed = done(NAME, "--out", base, "--explain", image, *asked)
        expected = name or (CLASSES[logits[(..., *cell)].argmax()] if cell else most)
        strongest = logits[CLASSES.index(expected)]
        cell = cell or divmod(int(strongest.argmax()), 13)
        path = base / "explanations" / f"2-{expected.replace(' ', '-')}.json"
        found = read(path)
        assert found["class"] == expected and found["predicted"] == CLASSES[logits[(..., *cell)].argmax()]
        assert (found["y"] * 10 // 37, found["x"] * 13 // 51) == cell and path.with_suffix(".png").exists()
        assert found["logit"] == pytest.approx(strongest[cell], rel=1e-3, abs=1e-2)
        assert f"{expected} at x {found['x']}, y {found['y']}" in printed
        order = [CLASSES[k] for k in (-logits[(..., *cell)]).argsort() if CLASSES[k] != expected]
        assert found["against"] == order[0] and f"logit of {expected} - logit of {order[0]} = " in printed
        printed = done(NAME, "--out", base, "--explain", image, *asked, "--against", order[2])
        path = path.with_stem(f"{path.stem}-not-{order[2].replace(' ', '-')}")
        margin, *terms = [float(term) for term in re.findall(r"[ +](-?\d+\.\d\d) [(=]", printed)]
        found = read(path)
        exact = [part["contribution"] for part in found["own"] + found["rival"]]
        exact += [found["others"], found["constant"]]
        assert margin == pytest.approx(found["margin"], abs=0.006) and path.with_suffix(".png").exists()
        assert sum(terms) == pytest.approx(margin, abs=1e-6)            # as printed, each rounded up or down
        assert max(abs(a - b) for a, b in zip(terms, exact, strict=True)) < 0.01


def test_a_baseline_tells_of_the_same_pixel_and_classes(runs, pictures, tmp_path):
    image = pictures / "images/test/1.png"
    asked = ["--explain", image, "--class", "sky", "--pixel", 9, 20, "--against", "car"]
    grouped, ancestor = (copy_of(runs[name], tmp_path / name) for name in (NAME, "protoseg"))
    done(NAME, "--out", grouped, *asked, "--baseline", ancestor)
    done(NAME, "--out", ancestor, *asked)
    both, alone = (read(out / "explanations/1-sky-not-car.json") for out in (grouped, ancestor))
    assert both.pop("baseline") == alone and "prototype" in alone["own"][0] and "group" in both["own"][0]


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
    return SimpleNamespace(classes=classes, num_parts=3, has=lambda i: i in (points or maps),
                           keypoints=lambda i: torch.tensor(points[i], dtype=torch.float32).reshape(-1, 4),
                           part_map=lambda i: maps and maps[i].to(torch.uint8))


@pytest.mark.parametrize("alpha, used, kept", [(0.05, [0, 1, 2, 4, 5], 8), (0.0, [0, 1, 2, 3, 4, 5], 10)])
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
    with pytest.raises(run.UserError, match="--parts somewhere"):        # measured where there are labels
        measures.analyse(net, SimpleNamespace(name="voc"), TOY(parts="somewhere"), CPU)


def test_consistency_and_stability_by_hand():
    """p0 is on part 1 in 5 of 5 pictures, p1 on part 2 in 4 of 5: not more than 80 %, p2 on part 3 in all 3
    that have it, too few to count; p3 is in no group, p4 of a class without parts, picture 5 has no labels.
    Under noise p0 loses its part in picture 1, p2 gains one in picture 4."""
    data, cfg = Masks(torch.zeros(8, 10).long() for _ in range(6)), TOY(quantiles=[0.7, 0.9, 0.99])
    for mask in data:
        mask[:2, 6:], mask[:2, 5:6] = 1, 255
    points = [(0, 1, 3, 1), (0, 2, 7, 4), (0, 2, 9, 0)]                 # the last lies on another class
    parts = parts_of((0, 2), {i: points + [(0, 3, 0, 7)] * (i < 3) for i in range(5)})
    lit = torch.zeros(4, 4, 5)                                          # maps of no part, of part 1, 2, 3
    lit[1, 0, 1] = lit[2, 2, 3] = lit[3, 3, 0] = lit[0, 0, 4] = 5
    clean = [lit[[1, 2, 3, 1, 1]]] * 3 + [lit[[1, 2, 0, 1, 1]], lit[[1, 0, 0, 1, 1]]]
    noisy = [clean[0], lit[[0, 2, 3, 1, 1]], *clean[2:4], lit[[1, 0, 2, 1, 1]]]
    net = grouped_net([[[0.4, 0.3, 0.3, 0]], [[1.0, 0, 0, 0]]], np.ones((2, 2)), (0, 0, 0, 0, 1))
    calls = iter(range(10))
    net.similarity = lambda x: (noisy if x.std((2, 3)).max() > 0.1 else clean)[next(calls) // 2][None]
    found = measures.part_scores(net, data, parts, cfg, CPU)
    for name, expected in (("consistency", (100 / 3, 100 / 3, 0)), ("stability", (260 / 3, 260 / 3, 100))):
        assert found[name] == pytest.approx(np.mean(expected))          # above 99 % of the class is nothing
        assert found[f"{name}_by_quantile"] == pytest.approx(dict(zip(("0.7", "0.9", "0.99"), expected)))
    assert [*found["part_metrics"]] == ["0.5", "0.6", "0.7", "0.8", "0.9"]
    for scores in found["part_metrics"].values():                       # no part lit: p2, p1 and p2
        assert 0 <= scores.pop("consistency_chance") <= scores.pop("hit_rate_chance") <= 100
        assert scores == pytest.approx(dict(
            consistency=100 / 3, hit_rate=100 * (1 + 0.8 + 0) / 3, stability=260 / 3,
            stability_empty=200 / 15, consistency_ceiling=None, hit_rate_ceiling=None))
    net, bare = seen_as(net, clean), parts_of((2,), {0: [(2, 1, 1, 1)]})        # a class without prototypes
    assert measures.part_scores(net, data, bare, cfg, CPU) == dict(consistency=None, stability=None)
    assert measures.part_purity(net, data, bare, cfg, CPU) == {}


def test_the_ceiling_is_what_true_parts_reach_on_the_grid_and_random_maps_reach_less():
    """Rows of 4 cells, the left half part 1, the right half part 2, the centre of each in an inner cell: the
    mean over neighbours, twice, is 5/6, 2/3, 1/3, 1/6 for one. Above the median are two columns, above
    higher quantiles the outer one or none. A random map is above q in a share 1 - q of the pictures."""
    part_map = torch.tensor([[1, 2]] * 16).repeat_interleave(8, 1)
    parts = parts_of((0,), {i: [(0, 1, 4, 8), (0, 2, 11, 8)] for i in range(60)}, [part_map] * 60)
    net = seen_as(stub_net(uniform(9, 5), [0] * 9, [0] * 9, 1), [torch.zeros(9, 4, 4)] * 120)
    found = measures.part_scores(net, Masks([0 * part_map] * 60), parts, TOY(), CPU)
    for q, scores in found["part_metrics"].items():
        assert (scores["hit_rate"], scores["consistency_chance"]) == (0, 0)
        assert scores["hit_rate_ceiling"] == scores["consistency_ceiling"] == 100 * (q == "0.5")
        assert scores["hit_rate_chance"] == pytest.approx(100 * (1 - float(q)), abs=15)


def test_purity_by_hand():
    """p0 is highest at part 1, 1, 2, 1 of its class, with similarity 4, 3, 2, 1; p1 outside of its class."""
    data = Masks(torch.zeros(4, 4, dtype=torch.int64) for _ in range(4))
    part_map = torch.tensor([[1, 1, 2, 2], [1, 1, 2, 2], [1, 1, 3, 3], [0, 0, 0, 0]])
    maps = torch.zeros(4, 2, 4, 4)
    maps[:, 0, 3, 3] = maps[:, 1, 0, 0] = 9                             # not their class
    for i, (row, column) in enumerate([(0, 0), (1, 1), (0, 3), (2, 0)]):
        data[i][3], maps[i, 0, row, column], maps[i, 1, 3, i] = 1, 4 - i, 1
    without_1 = part_map * (part_map != 1)                              # "no part" is no part
    for labels, purity, largest in ((part_map, 75, 50), (without_1, 25, 100 / 3)):
        net = seen_as(stub_net(uniform(2, 5), [0, 1], [0, 0], 4), maps)
        parts = parts_of((0,), maps={i: labels for i in range(4)})
        found = measures.part_purity(net, data, parts, TOY(), CPU)
        assert found == pytest.approx(dict(purity=purity, largest_part=largest))


def test_overlap_of_groups_is_one_ratio_over_all_pictures():
    """Two groups of class 0: the same map in picture 0, and apart in picture 1; class 1 is in no picture. Of
    400 pixels 20 are above the 95th percentile. Groups that the threshold emptied overlap nowhere."""
    masks, right = torch.zeros(2, 10, 40, dtype=torch.int64), torch.arange(400).view(10, 40) / 100
    masks[1, :, 30:] = 255
    seen = [torch.stack([right] * 4), torch.stack([right, -right, right, right]) + 4]
    for weights, expected in (([[1.0, 0.0], [0.0, 1.0]], 100 * 20 / (20 + 40)), ([[0.5, 0.5]] * 2, None)):
        net = seen_as(grouped_net([weights] * 2, np.ones((2, 4)), (0, 0, 1, 1)), seen)
        overlap = measures.mean_overlap(net, Masks(masks), TOY(threshold=0.6), CPU)
        assert overlap == (expected and pytest.approx(expected))


def test_equivariant_prototypes_light_up_alike_when_the_size_makes_up_for_their_rates(monkeypatch):
    """p0 of scale 0 looks at the picture shrunk by the rate of scale 1; p1, p2, p3 of scale 1 look at it as
    it is, all at ramps. p1, p2 agree with p0 in two of three pictures with 10 cells of their class, p3 in
    one; the fourth has 9. p4 belongs to another class. Pairs that share p0 are one group. Beside them a map
    that rises upwards, independent of p0: sets of a share a of the cells have the IoU a^2 / (2 a - a^2)."""
    masks = [torch.full((80, 160), int(i % 2 or i > 4)) for i in range(8)]       # every second is looked at
    masks[6][8:20, 8:20] = 0
    widths, calls = [], iter(["down right right left right", "right up up up up"] * 2
                             + ["down left left right right", "right up up up up"] * 2)

    def similarity(x):
        widths.append(x.shape[3])
        rows, columns = torch.meshgrid(*(torch.arange(float(n // 4)) for n in x.shape[2:]), indexing="ij")
        ramps = dict(right=columns, left=-columns, down=rows, up=-rows)
        return torch.stack([ramps[name] for name in next(calls).split()])[None]

    net = stub_net(uniform(5, 5), [0, 0, 0, 0, 1], [0, 1, 1, 1, 1], 4)
    net.start_groups(3)
    net.similarity = similarity
    monkeypatch.setattr(measures, "random_maps", lambda count, size, *_: -torch.arange(float(
        size[0]))[:, None].expand(count, *size))
    found = measures.equivariance(net, Masks(masks), TOY(rates=[6, 12], equivariance=4), CPU)
    ends = measures.most_active(torch.tensor([[[1.0, 2, 3], [9, 5, 4]]]), torch.arange(6)[None] != 3, [0.5])
    assert ends.tolist() == [[[0, 0, 1, 0, 1, 1]]]                      # of five cells, the median too
    assert widths == [160, 80] * 4 and list(found) == ["0.6", "0.7"]
    pairs = [(0, 1, pytest.approx(2 / 3)), (0, 2, pytest.approx(2 / 3))]
    for entry, a in zip(found.values(), (0.4, 0.3)):
        assert entry == dict(pairs=pairs, groups=1, groups_to_learned_groups=pytest.approx(100 / 6),
                             prototypes_in_groups=60, classes_with_groups=50, above_chance=100,
                             mean_iou=pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3), pairs_by_chance=0,
                             chance_iou=pytest.approx(a * a / (2 * a - a * a)))


# ---- tables, mistakes ----

def test_tables_share_rows_and_stand_beside_the_papers_numbers(pictures, tmp_path):
    short = ["--warmup", 1, "--joint", 1, "--finetune", 1, "--group-warmup", 1, "--group-joint", 1]
    tables, stamps = {}, []
    for number in (8, 7, 9, 10):
        done(NAME, "--out", tmp_path, *on(pictures, *short), "--table", number)
        tables[number] = (tmp_path / f"table{number}.md").read_text()
        stamps.append({path.parent.name: path.stat().st_mtime for path in tmp_path.glob("rows/*/last.pt")})
    assert set(stamps[0]) == {NAME, "entropy-off"} and stamps[0] == stamps[1] == stamps[2]
    assert stamps[3] == stamps[0] | {"protoseg": stamps[3]["protoseg"]}
    on_, off = (read(tmp_path / "rows" / name / "metrics.json") for name in (NAME, "entropy-off"))
    assert on_["stage1_finetuned"] == off["stage1_finetuned"] and (tmp_path / "entropy.png").exists()
    net, _, cfg = load(tmp_path / "rows" / NAME)
    used = measures.sparsity(net, replace(cfg, threshold=0.1))["prototypes"]
    for number, row in (
            (8, f"off | {off['prototypes']} | {off['group_average']:.2f} | {off['miou']:.2f} | "
                "146 / 5.59 / 72.22 | 132 / 5.79 / 69.22 | 1405 / 6.06 / 33.40"),
            (8, f"{on_['miou']:.2f} | 131 / 3.70 / 72.26 | 111 / 3.39 / 69.22 | 1132 / 4.08 / 34.32"),
            (7, "133 / 4.00 / 72.11 | 114 / 3.68 / 69.20 | 1168 / 4.53 / 34.03"), (7, f"0.1 | {used} |"),
            (7, "126 / 3.21 / 72.12 | 109 / 3.10 / 69.03 | 1067 / 3.48 / 34.16"),
            (9, f"off | {off['group_overlap']:.2f} | 47.45 | 61.65 | 50.25"),
            (9, f"on | {on_['group_overlap']:.2f} | 28.29 | 43.48 | 42.74"),
            (10, "0.527 / 12100 / 20.70 | 0.523 / 9900 / 52.50 | 0.503 / 238200 / 51.90"),
            (10, "0.063 / 9100 / 15.60 | 0.071 / 7600 / 5.10 | 0.437 / 135400 / 14.50")):
        assert row in tables[number]
    assert [*sps.TABLES[5].paper.values()] == [(77.63,), (78.92,), (77.97,), (79.29,)]


@pytest.mark.parametrize("argv, words", [
    (["--scale-min", 1.5, "--scale-max", 0.5], ["--scale-max 0.5", "--scale-min 1.5"]),
    (["--rates", 1, 1], ["--rates 1 1"]), (["--pixel", 3, 4, 5], ["--pixel 3 4 5"]),
    (["--class", "car"], ["--class", "--explain"]), (["--against", "car"], ["--against", "--explain"]),
    (["--stage1", "x", "--method", "protoseg"], ["--stage1", "protoseg"]),
    (["--stage1", "nowhere"], ["holds no run"]), (["--test-square"], ["--test-square", "--test-size"]),
    (["--parts", "somewhere"], ["--parts", "toy_scenes"]), (["--project-split", "exam"], ["exam"])])
def test_mistakes_are_one_sentence_before_anything_is_written(tmp_path, argv, words):
    said = mistake(NAME, "--out", tmp_path / "out", *SHORT[NAME], *argv)
    assert all(word in said for word in words) and not (tmp_path / "out").exists(), said


def test_mistakes_with_a_run(base, runs, pictures, tmp_path, no_figures):
    image, out, begun = pictures / "images/test/2.png", tmp_path / "out", tmp_path / "begun"
    interrupt(NAME, 7, "--out", begun, *on(pictures))                   # before its projection
    more = make_pictures(tmp_path / "more", CLASSES + ("cloud",))
    for folder, argv, words in (
            (base, ["--explain", image, "--pixel", 51, 0], "51 x 37"),
            (base, ["--explain", image, "--class", "unicorn"], "it knows sky, tall house"),
            (base, ["--explain", image, "--against", "unicorn"], "--against unicorn"),
            (base, ["--explain", image, "--class", "sky", "--against", "sky"], "name another one"),
            (base, ["--explain", image, "--baseline", runs["protoseg"]], "knows other classes"),
            (base, ["--explain", image, "--baseline", tmp_path / "none"], "holds no run"),
            (runs["deeplab"], ["--explain", image], "plain network"),
            (begun, ["--failure", "sky"], "--resume"), (begun, ["--eval-only"], "--resume")):
        assert words in mistake(NAME, "--out", folder, *argv)
    for stage1, argv, words in (
            (base, ["--depth", 7], "--depth 6, not 7"), (base, ["--data", more], "(5) than the data (6)"),
            (runs["protoseg"], [], "--method protoseg"), (begun, [], "stage1.pt")):
        assert words in mistake(NAME, "--out", out, *on(pictures, "--stage1", stage1, *argv))
    for values, words in (([0, 1, 2, 3], "pruning left no prototype"), ([255] * 4, "no pixel is labelled")):
        for k, value in enumerate(values):                              # one class, or void, all over
            Image.new("L", (51, 37), value).save(more / f"masks/train/{k}.png")
        assert words in mistake(NAME, "--out", out, *on(more, "--method", "protoseg"))


@pytest.mark.gpu
@pytest.mark.parametrize("method", sps.PHASES)
def test_gpu_a_run_trains_in_bf16_resumes_and_explains(pictures, tmp_path, method):
    flags = on(pictures, "--device", "cuda", "--method", method)
    done(NAME, "--out", tmp_path, *flags)
    assert read(tmp_path / "metrics.json")["device"].startswith("cuda")
    done(NAME, "--out", tmp_path, "--resume")
    if method != "deeplab":
        done(NAME, "--out", tmp_path, "--explain", pictures / "images" / "test" / "2.png")
