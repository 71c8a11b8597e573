"""What is special to pfa_scribble.py for its users; test_contract.py has what all scripts promise.

Phases follow from the strokes; full masks teach nothing; every mode of Table 4 is scored as counted by hand;
the image classifier and scores of one's own; --predict, --draw, --baseline; tables and figures of the paper;
several processes share memory and labels; GPUs. Sec. 3 itself is in test_pfa_scribble_equations.py.
"""
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import pfa_scribble as pfa
from commands import (ENV, ROOT, SHORT, assert_same_run, call, copy_of, done, files, log_of, mistake, numbers,
                      read, same)
from common import figures, loaders, pfa_figures, run, speed, tables, toy_scenes, transforms
from common.image_classifier import build_classifier, read_scores
from common.metrics import ConfusionMatrix, mean_average_precision
from common.strokes import painted_strokes
from data.toy_scenes import write_scenes
from test_pfa_scribble_equations import (enlarge, normal, pixel_net, slow_augment, slow_conv, slow_prototypes,
                                         softmax, some_scribbles)

CPU, NAME, CLASSES, N = torch.device("cpu"), "pfa_scribble", toy_scenes.CLASSES, 14
SHORT, FILTERS = SHORT[NAME], ["filter_0", "filter_100", "filter_500", "filter_1000"]
pytestmark = pytest.mark.usefixtures("few_toys")


def quick(*argv):
    """A command that must succeed, without figures and announced time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pfa_figures, "draw_figures", lambda *args: None)
        patch.setattr(speed, "announce", lambda *args: None)
        return done(NAME, *argv)


def settings(*argv, preset="toy"):
    return run.parse_config(pfa.Config, pfa.PRESETS, ["--preset", preset, "--out", "unused", *map(str, argv)])


def load(out):
    return pfa.load_run(replace(run.read_config(pfa.Config, out), out=str(out)), CPU)[0]


def ids_in(path):
    return np.array(Image.open(path))


def save(path, array):
    Image.fromarray(array.astype(np.uint8)).save(path)
    return path


def scene(k):
    """Test picture k: a dict of image (H,W,3), mask and scribbles (H,W), uint8."""
    return toy_scenes.make_scene(0, toy_scenes.scene_index("test", k))


def scores_in(out):
    return dict(np.load(out / "class_scores-test.npz"))


@pytest.fixture(scope="module")
def runs(trained, tmp_path_factory):
    """Folders of three runs, which nobody may change; the first has all phases and a classifier."""
    folders = {"base": trained(NAME)}
    more = dict(local=["--augment", "local", "--no-train-classifier"], pce=["--method", "pce"])
    for name, flags in more.items():
        folders[name] = tmp_path_factory.mktemp(name)
        quick("--out", folders[name], *SHORT, *flags)
    return folders


@pytest.fixture(scope="module")
def base(runs):
    return runs["base"]


@pytest.fixture(scope="module")
def folder(few_toys, tmp_path_factory):
    """The toy pictures as files. Full masks of train and test are others; the strokes are the same."""
    root = tmp_path_factory.mktemp("folder")
    write_scenes(root, 0, toy_scenes.SPLITS)
    for path in (root / "masks").glob("t*/*.png"):
        save(path, (ids_in(path) + 3) % N)
    return root


def on(folder):
    return ["--dataset", "folder", "--data", folder, "--scribbles", "scribbles"]


@pytest.fixture(scope="module")
def official(folder, tmp_path_factory):
    """The other reading on data in which nobody drew a taxi, train picture 3 has strokes of the background
    alone and 5 none at all, test picture 1 has another name and the last one no label."""
    root = Path(shutil.copytree(folder, tmp_path_factory.mktemp("official") / "data"))
    for path in (root / "scribbles" / "train").iterdir():
        ids = ids_in(path)
        kept = (ids != CLASSES.index("taxi")) & ((ids == 0) | (path.stem != "0003")) & (path.stem != "0005")
        save(path, np.where(kept, ids, 255))
    for kind in ("images", "masks"):
        (root / kind / "test" / "0001.png").rename(root / kind / "test" / "file.png")
    save(root / "masks" / "test" / "file.png", np.full((128, 128), 255))
    flags = [*on(root), "--reading", "official", "--augment", "global", "--slots", 2, "--iterations", 20]
    (root / "said.txt").write_text(done(NAME, "--out", root.parent / "run", *SHORT, *flags))
    return root.parent / "run"


# ---- phases, and what a run learns from ----

@pytest.mark.parametrize("which, missing", [("base", []), ("official", ["taxi"])])
def test_phases_and_memory_of_a_run_follow_from_its_strokes(which, missing, base, official):
    """Counters of the classes in every training crop, by the official reading in every whole image."""
    out = base if which == "base" else official
    (net, cfg), metrics, rows = load(out), read(out / "metrics.json"), log_of(out)
    train, count, phases = pfa.open_sets(cfg)["train"], Counter(), []
    occurs = {c for i in range(len(train)) for c in train.read_mask(i).unique().tolist()} - {255}
    view = loaders.ScribbleView(train, 0, cfg.crop, (0.5, 2.0), 10.0, True)
    for batch in loaders.train_loader(view, cfg.batch_size, cfg.seed, 0, cfg.iterations, 0, CPU):
        full = all(count[c] >= cfg.slots for c in occurs)
        phases.append("warmup" if len(phases) < cfg.warmup else "global" if full else "local")
        for mask, classes in zip(batch["mask"], batch["classes"]):
            whole = classes.nonzero().flatten().tolist() if which == "official" else []
            if phases[-1] != "warmup":
                count.update({0, *mask.unique().tolist(), *whole} - {255})
    assert metrics["phases"] == Counter(phases) and set(phases) == {"warmup", "local", "global"}
    assert metrics["iterations_until_bank_full"] == phases.index("global")
    assert net.memory.count.tolist() == [min(cfg.slots, count[c]) for c in range(N)]
    assert [name for name, there in zip(CLASSES, net.occurs) if not there] == missing
    assert [row["phase"] for row in rows] == [phases[int(row["iteration"]) - 1] for row in rows]
    assert all((row["val_local"] != "") == (which == "base") for row in rows)
    assert rows[-1]["val_global"] and not rows[0]["con_global"]


def test_the_first_loss_of_a_run_is_that_of_its_first_crops(tmp_path):
    """Sec. 4.2: resized by 0.5 to 2, turned by up to 10 degrees, blurred [D14]."""
    quick("--out", tmp_path, *SHORT, "--method", "pce", "--iterations", 1)
    cfg = load(tmp_path).cfg
    view = loaders.ScribbleView(pfa.open_sets(cfg)["train"], 0, 64, (0.5, 2.0), 10.0, True)
    batch = next(iter(loaders.train_loader(view, 4, 0, 0, 1, 0, CPU)))
    torch.manual_seed(0)
    net = pfa.build_model(cfg, N).train()
    torch.manual_seed(1)                                                # of the dropout
    loss = pfa.partial_cross_entropy(net(batch["image"])[1], batch["mask"])
    assert float(log_of(tmp_path)[0]["pce"]) == pytest.approx(loss.item(), rel=1e-4)


def test_a_run_says_what_nobody_drew_and_when_a_phase_begins(base, official):
    said, told = (official.parent / "data" / "said.txt").read_text(), (base / "printed.txt").read_text()
    for words in ("1 of 8 scribble masks label nothing, such as 0005", "of the pixels of 8 training images",
                  "1 of 8 scribble masks label background alone, such as 0003",
                  "no training image has a stroke of taxi"):
        assert words in said
    until = read(base / "metrics.json")["iterations_until_bank_full"]
    assert f"from iteration {until + 1} on: phase global (memory full after {until} iterations" in told
    assert (official / "figures" / "attention_matrix.png").exists()     # though the last picture has no label


@pytest.mark.parametrize("augment, paths", [("both", ["local"]), ("global", [])])
def test_a_memory_full_with_the_last_iteration_gives_no_global_prediction(folder, tmp_path, augment, paths):
    """Nothing has ever been trained on it: no scores, no log, no --predict."""
    flags = ["--augment", augment, "--iterations", 8, "--eval-every", 8, "--no-train-classifier"]
    for argv in ([*SHORT, *flags], ["--eval-only"]):
        assert "memory never filled in time" in quick("--out", tmp_path, *argv)
        metrics, net = read(tmp_path / "metrics.json"), load(tmp_path).net
        assert net.memory_full() and net.paths() == paths and metrics["iterations_until_bank_full"] is None
        assert all(list(rates) == paths for mode, rates in metrics["miou"].items() if mode != "plain")
    assert metrics["phases"] == dict(warmup=3, local=5) and log_of(tmp_path)[0]["val_global"] == ""
    argv = ["--out", tmp_path, "--predict", folder / "images" / "val", "--infer", "filter"]
    assert "local prediction" in done(NAME, *argv) if paths else "no prototypes" in mistake(NAME, *argv)


def test_neither_network_nor_classifier_learns_from_full_masks(base, folder, tmp_path):
    """Other full masks in train and test: the same weights and scores of classes, and other rates."""
    quick("--out", tmp_path, *SHORT, *on(folder))
    for name in ("last.pt", "classifier.pt"):
        assert same(*(run.read_checkpoint(out / name)["model"] for out in (tmp_path, base)))
    assert all(np.array_equal(row, scores_in(base)[name]) for name, row in scores_in(tmp_path).items())
    assert read(tmp_path / "metrics.json")["miou"]["plain"] != read(base / "metrics.json")["miou"]["plain"]
    usual, full = (pfa.open_sets(settings(*on(folder), "--method", method)) for method in ("pfa", "full"))
    assert np.array_equal(full["train"].read_mask(2), ids_in(folder / "masks" / "train" / "0002.png"))
    for flag, value in (("--scribble-drop", 0.6), ("--scribble-shrink", 1)):
        weak = pfa.open_sets(settings(*on(folder), flag, value))
        less, more = (torch.stack([sets["train"].read_mask(i) < 255 for i in range(8)]).sum()
                      for sets in (weak, usual))
        assert 0 < less < 0.7 * more
        assert torch.equal(weak["test"].read_mask(0), usual["test"].read_mask(0))


@pytest.mark.parametrize("split, value", dict(train=3, val=3, trainaug=5).items())
def test_voc_scribble_is_always_scored_on_full_masks(tmp_path, split, value):
    """Whatever the split: it trains on strokes of 7 and scores on masks of 3, trainaug's of 5."""
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    for name, images in dict(train="b", val="b", trainaug="a\nb").items():
        (tmp_path / "ImageSets" / "Segmentation" / f"{name}.txt").write_text(images)
    kinds = dict(JPEGImages=0, ScribbleLabels=7, SegmentationClass=3, SegmentationClassAug=5)
    for kind, ids in kinds.items():
        (tmp_path / kind).mkdir()
        for name in "b" if ids == 3 else "ab":
            picture, ending = (np.full((36, 40), ids), "png") if ids else (np.zeros((36, 40, 3)), "jpg")
            save(tmp_path / kind / f"{name}.{ending}", picture)
    for method, learned in dict(pfa=7, full=5).items():
        flags = ["--data", tmp_path, "--test-split", split, "--method", method]
        sets = pfa.open_sets(settings(*flags, preset="voc-b1"))
        found = {name: sets[name].read_mask(0).unique().tolist() for name in sets}
        assert found == dict(train=[learned], val=[3], test=[value])


# ---- evaluation ----

def slow_ids(net, image, path, present=None):
    """Prediction of an image (H,W,3) with the prototypes of the classes present (N,) bool: ids (H,W)."""
    x = (image - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    with torch.no_grad():
        features, logits = net(torch.from_numpy(x).float().permute(2, 0, 1)[None].contiguous())
    features, logits = features.double().numpy(), logits.double().numpy()
    if path != "plain":
        keys = net.memory.bank[present].flatten(0, 1).double().numpy()  # one slot, filled
        if path == "local":
            k, present = int(0.08 * logits[0, 0].size), present.numpy()
            keys = slow_prototypes(features, softmax(logits, 1), present[None], k)[0, present]
        weights = {name: value.detach().double().numpy() for name, value in net.named_parameters()}
        logits = slow_conv(weights, "classifier", slow_augment(features, [keys], weights))
    return torch.from_numpy(enlarge(logits, image.shape[:2])[0].argmax(0))


def test_every_mode_is_scored_as_counted_by_hand(base):
    """With an augmenter so strong that the choice of the classes decides pixels."""
    predictor, scores = load(base), {name: torch.from_numpy(row) for name, row in scores_in(base).items()}
    net, cfg = predictor
    with torch.no_grad():
        net.augmenter.expand.weight.mul_(6)
        net.augmenter.project_prototype.weight.mul_(6)
    modes, counted = [*FILTERS, "classifier", "oracle"], defaultdict(lambda: ConfusionMatrix(N))
    for k, row in enumerate(scores.values()):
        image, labels = scene(k)["image"], torch.from_numpy(scene(k)["mask"])
        plain = slow_ids(net, image, "plain")
        counted["plain", "plain"].update(labels[None], plain[None])
        for mode, present in pfa.class_sets(plain, N, modes, labels, row, 0.1).items():
            for path in ("local", "global"):
                counted[mode, path].update(labels[None], slow_ids(net, image, path, present)[None])
    found = pfa.evaluate(predictor, pfa.open_sets(cfg)["test"], run.Machine(CPU), modes, scores)
    expected = {key: matrix.summary()["miou"] for key, matrix in counted.items()}
    assert {(mode, path) for mode, paths in found.items() for path in paths} == set(expected)
    for (mode, path), miou in expected.items():
        assert found[mode][path]["miou"] == pytest.approx(miou, abs=0.1), (mode, path)
    assert len({round(miou, 2) for miou in expected.values()}) >= 5     # modes differ


def test_class_sets_by_hand():
    """More than T pixels, scores above the threshold; the background is always there."""
    plain = torch.tensor([[1, 1, 1, 2], [2, 4, 4, 4]])                  # 3 pixels of 1, 2 of 2, 3 of 4
    labels, scores = torch.tensor([[255, 3], [3, 255]]), torch.tensor([1.0, 0.5, 0.51, 0.2, 0.9])
    expected = dict(filter_0=[0, 1, 2, 4], filter_2=[0, 1, 4], filter_3=[0], scores=[0, 2, 4],
                    classifier=[0, 2, 4], oracle=[0, 3])
    sets = pfa.class_sets(plain, 5, list(expected), labels, scores, 0.5)
    assert {mode: present.nonzero()[:, 0].tolist() for mode, present in sets.items()} == expected


def test_scores_of_a_run_and_its_summary(base, runs):
    metrics, said = read(base / "metrics.json"), (base / "printed.txt").read_text()
    assert list(metrics["miou"]) == ["plain", *FILTERS, "classifier", "oracle"]
    for mode, paths in metrics["iou"].items():
        for path, rates in paths.items():
            known = [rate for rate in rates.values() if rate is not None]
            assert list(rates) == CLASSES and metrics["miou"][mode][path] == pytest.approx(np.mean(known))
    told = {mode: "local {local:.1f}, global {global:.1f}".format(**metrics["miou"][mode])
            for mode in (*FILTERS, "oracle")}
    assert f"TRUE CLASSES GIVEN (oracle: an upper bound, not a result): {told['oracle']}" in said
    for mode in FILTERS:                                                # filters that agree share a line
        assert re.search(rf"more than [\d or]*\b{mode[7:]}\b[\d or]* predicted pixels: {told[mode]}\n", said)
    assert f"test mIoU: plain {metrics['miou']['plain']['plain']:.1f}" in said and "classifier (mAP" in said
    local, pce = (read(runs[name] / "metrics.json") for name in ("local", "pce"))
    assert (metrics["headline"], local["headline"]) == ("classifier", "filter_500")      # never the oracle
    assert list(local["miou"]) == ["plain", *FILTERS, "oracle"] and list(local["miou"]["oracle"]) == ["local"]
    assert list(pce["miou"]) == ["plain"] and pce["phases"] == dict(pce=14)
    assert not (runs["pce"] / "classifier.pt").exists()


def test_options_of_the_evaluation_reach_a_finished_run(base, tmp_path):
    out, first = copy_of(base, tmp_path / "run"), read(base / "metrics.json")

    def again(*flags):
        quick("--out", out, "--eval-only", *flags)
        return read(out / "metrics.json")
    nobody = again("--score-threshold", 1)["miou"]["classifier"]        # no score is above: background alone
    assert nobody == again("--filter", 99999)["miou"]["filter_99999"] != first["miou"]["classifier"]
    val, row = again("--test-split", "val")["miou"], log_of(base)[-1]   # log.csv: the filter, no true classes
    assert [val["plain"]["plain"], val["filter_500"]["local"], val["filter_500"]["global"]] == pytest.approx(
        [float(row[f"val_{path}"]) for path in ("plain", "local", "global")])
    assert again("--test-size", 64)["miou"] != first["miou"] and read(out / "config.json")["test_size"] == 0
    assert load(base).of_image(torch.zeros(3, 128, 160, dtype=torch.uint8)).features.shape[2:] == (32, 40)
    assert numbers(again()) == numbers(first)


# ---- classes from a classifier, or scores of one's own ----

def test_mean_average_precision_by_hand_and_over_the_classes_that_have_strokes(official):
    scores = torch.tensor([[0.9, 0.1], [0.5, 0.1], [0.5, 0.7], [0.1, 0.1]])
    truth = torch.tensor([[True, False], [False, True], [True, False], [False, False]])
    # class 0: hits at ranks 1 and 3; class 1: the first of three ties is a miss, so its hit has rank 3
    assert mean_average_precision(scores, truth) == pytest.approx(100 * ((1 + 2 / 3) / 2 + 1 / 3) / 2)
    learned, rows = [c for c in range(1, N) if CLASSES[c] != "taxi"], scores_in(official)
    masks = [ids_in(official.parent / "data" / "masks" / "test" / f"{name}.png") for name in rows]
    truth = torch.tensor([[bool((mask == c).any()) for c in learned] for mask in masks])
    expected = mean_average_precision(torch.tensor(np.stack(list(rows.values())))[:, learned], truth)
    assert read(official / "metrics.json")["class_map"] == pytest.approx(expected)


def test_a_classifier_may_follow_and_is_the_one_that_a_run_trains_at_once(base, runs, tmp_path):
    out = copy_of(runs["local"], tmp_path / "run")
    quick("--out", out, "--eval-only", "--train-classifier")
    metrics, first = read(out / "metrics.json"), read(base / "metrics.json")
    assert (metrics["headline"], metrics["class_map"]) == ("classifier", first["class_map"])
    mine, theirs = (run.read_checkpoint(folder / "classifier.pt")["model"] for folder in (out, base))
    assert same(mine, theirs) and (out / "last.pt").read_bytes() == (runs["local"] / "last.pt").read_bytes()
    net = build_classifier(load(out).cfg, N).eval()
    net.load_state_dict(mine)
    for k, row in enumerate(scores_in(out).values()):                   # of the whole picture, made square
        image = torch.from_numpy(scene(k)["image"]).permute(2, 0, 1)
        x = transforms.normalise(transforms.resize_whole(image, 32, square=True))[None]
        assert row.tolist() == pytest.approx([1, *net(x)[0].sigmoid().tolist()], abs=1e-6)


def test_a_classifier_goes_on_where_it_was_interrupted(base, tmp_path, monkeypatch):
    out, loss, steps = copy_of(base, tmp_path / "run"), F.binary_cross_entropy_with_logits, []
    for name in ("metrics.json", "classifier.pt", "class_scores-test.npz"):
        (out / name).unlink()

    def stopping(*args):
        steps.append(0)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return loss(*args)
    monkeypatch.setattr(F, "binary_cross_entropy_with_logits", stopping)
    assert call(NAME, "--out", out, "--resume").returncode == 130 and (out / "classifier.pt").exists()
    quick("--out", out, "--resume")
    assert len(steps) == 4 + 3                                          # 5 steps, saved after 2
    assert_same_run(base, out)


def test_scores_of_ones_own_with_or_without_the_background(base, official, tmp_path, capsys):
    out, first = copy_of(base, tmp_path / "run"), read(base / "metrics.json")
    short = {name: row[1:].astype(np.float64) for name, row in scores_in(base).items()}
    np.savez(tmp_path / "short.npz", unused=np.zeros(3), **short)
    for path in (base / "class_scores-test.npz", tmp_path / "short.npz"):
        quick("--out", out, "--eval-only", "--class-scores", path)
        metrics = read(out / "metrics.json")
        assert metrics["headline"] == "scores" and metrics["miou"]["scores"] == first["miou"]["classifier"]
        assert metrics["class_map"] == first["class_map"]
    assert set(scores_in(official)) == {"0000", "file", "0002"}         # numpy.savez would refuse such a name
    np.savez(tmp_path / "logits.npz", a=np.arange(N))
    assert read_scores(tmp_path / "logits.npz", ["a"], N)["a"].tolist() == [1, *range(1, N)]
    assert "scores from 1 to 13; if they are logits, apply a sigmoid" in capsys.readouterr().out


@pytest.mark.parametrize("row, words", [
    (None, "lacks 1 of 3 images, such as 0001"), (np.zeros(N - 2), "14 finite"), (np.zeros((1, N)), "0001"),
    (np.full(N, np.nan), "finite"), (np.array(["a"] * N), "0001"), (np.array([None] * N), "cannot be read"),
    ("npy", "cannot be read"), ("gone", "cannot be read")], ids=str)
def test_wrong_scores_are_one_sentence_before_anything_is_written(tmp_path, row, words):
    path, rows = tmp_path / "scores.npz", {"0000": np.zeros(N), "0001": row, "0002": np.zeros(N)}
    if not isinstance(row, str):
        np.savez(path, **{name: value for name, value in rows.items() if value is not None})
    elif row == "npy":
        np.save(path.open("wb"), np.zeros(N))
    said = mistake(NAME, "--out", tmp_path / "out", *SHORT, "--class-scores", path)
    assert f"--class-scores {path}" in said and words in said and not (tmp_path / "out").exists()


# ---- predict, draw, baseline ----

@pytest.mark.parametrize("which, infer, path", [
    ("base", "plain", "plain"), ("base", "filter", "global"), ("base", "classifier", "global"),
    ("base", "scores", "global"), ("local", "filter", "local"), ("pce", "plain", "plain")])
def test_predict_writes_the_last_prediction(which, infer, path, base, runs, folder, tmp_path):
    out = copy_of(runs[which], tmp_path / "run")
    flags = ["--class-scores", base / "class_scores-test.npz"] if infer == "scores" else []
    said = done(NAME, "--out", out, "--predict", folder / "images" / "test", "--infer", infer, *flags)
    assert f"{path} prediction" in said and (infer == "plain" or f"classes by the {infer}" in said)
    net, mode = load(out).net, "filter_500" if infer == "filter" else infer
    for k, row in enumerate(scores_in(base).values()):
        expected = slow_ids(net, scene(k)["image"], "plain")
        if infer != "plain":
            present = pfa.class_sets(expected, N, [mode], None, torch.from_numpy(row), 0.1)[mode]
            expected = slow_ids(net, scene(k)["image"], path, present)
        found = ids_in(out / "predictions" / f"{k:04d}.png")
        assert (found != expected.numpy()).sum() <= 2                   # on a border: other order of sums


def test_predict_and_draw_say_what_is_missing(base, runs, folder, tmp_path):
    image, ids = folder / "images" / "test" / "0001.png", np.full((128, 128), 255)
    for which, infer, words in (("pce", "filter", "no prototypes; use --infer plain"),
                                ("local", "classifier", "--train-classifier"),
                                ("base", "oracle", "oracle"), ("base", "scores", "--class-scores")):
        assert words in mistake(NAME, "--out", runs[which], "--predict", image, "--infer", infer)
    small = save(tmp_path / "small.png", np.zeros((31, 51, 3)))
    wrong = {"128 x 127": ids[1:], "figures/colours.png": ids, "25": ids // 10,
             "no stroke": np.zeros((128, 128, 3))}
    for words, drawn in wrong.items():
        assert words in mistake(NAME, "--out", base, "--draw", image, save(tmp_path / "drawn.png", drawn))
    for argv, words in ((["--draw", image, "gone.png"], "gone.png"), (["--draw", image], "two files"),
                        (["--draw", small, small], "51 x 31"), (["--predict", small], "51 x 31")):
        assert words in mistake(NAME, "--out", base, *argv)
    saved, out = run.read_checkpoint(base / "last.pt"), copy_of(base, tmp_path / "run")
    saved["progress"]["iteration"] = 6
    torch.save(saved, out / "last.pt")
    assert "is not finished: iteration 6 of 14" in done(NAME, "--out", out, "--predict", image)


@pytest.mark.parametrize("which", ["base", "local", "pce"])
def test_draw_adapts_a_copy_of_the_run_to_painted_strokes(which, base, runs, folder, tmp_path):
    """Painted on the image in the colours of colours.png; a note if the background has no stroke."""
    out, file = copy_of(runs[which], tmp_path / "run"), folder / "images" / "test" / "0001.png"
    colours, ids, before = figures.palette(N).numpy(), scene(1)["scribbles"], (out / "last.pt").read_bytes()
    ids = np.where((ids == 0) & (which == "local"), 255, ids)
    painted = np.where(ids[..., None] < 255, colours[np.minimum(ids, N - 1)], ids_in(file))
    said = done(NAME, "--out", out, "--draw", file, save(tmp_path / "painted.png", painted))
    shares = re.search(r"(\d+) % of the stroke pixels .* (\d+) % after 40 steps", said)
    first, after = map(int, shares.groups())
    written = ids_in(out / "drawings" / "0001.png")
    assert after == pytest.approx(100 * (written == ids)[ids < 255].mean(), abs=0.51) and after > first
    assert ("note: no stroke of background" in said) == (which == "local")
    assert files(out / "drawings") == {"0001.png", "0001_overlay.png", "0001_before_after.png"}
    swatches = ids_in(base / "figures" / "colours.png")
    assert all((swatches == colour).all(2).sum() >= 100 for colour in colours)
    assert (out / "last.pt").read_bytes() == before


def test_a_painted_pixel_has_the_class_of_a_colour_close_by(tmp_path):
    """At most 40 away in each of R, G, B; what shines through, and what the image shows too, is no stroke."""
    colour, white = figures.palette(5)[1].tolist(), (255, 255, 255)
    inwards = [-1 if value > 127 else 1 for value in colour]
    near, far = ([value + step * k for value, step in zip(colour, inwards)] for k in (40, 41))
    pixels = [(*colour, 255), (*near, 255), (*far, 255), (*colour, 127), (*white, 255), (*colour, 255)]
    image = torch.full((3, 1, 6), 90, dtype=torch.uint8)
    image[:, 0, 5] = torch.tensor(colour)
    assert painted_strokes(save(tmp_path / "p.png", np.array([pixels])), image, 5).tolist() == [
        [1, 1, 255, 255, 255, 255]]


@pytest.mark.parametrize("paths", [[], ["local"], ["global"]])
@pytest.mark.parametrize("steps, rate", [(1, 1e-3), (2, 1e-12)])        # 1e-12: the weights stand still
def test_drawing_steps_along_the_loss_of_the_strokes_at_the_pictures_own_size(base, paths, steps, rate):
    """L_pce of the plain and the augmented prediction, enlarged; step 2 is mirrored. Buffers stay."""
    x, scribbles = normal(1, 3, 32, 44).float(), torch.full((1, 71, 90), 255)
    for c, (row, column) in enumerate([(0, 3), (70, 40), (33, 89), (50, 0)]):
        scribbles[0, row, column:column + 17], scribbles[0, 5 + 9 * c:9 + 11 * c, 60 - c] = c, c
    net, cfg = load(base)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    pfa.adapt(net, x, scribbles, paths, replace(cfg, draw_steps=steps, draw_lr=rate))
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())
    for name, p in net.named_parameters() if steps == 1 else ():        # AdamW's first step is the rate
        expected = (1e-4 if "backbone" in name else 1e-3) if name in found else 0
        assert (p - before[name]).abs().max().item() == pytest.approx(expected, rel=0.05)
    net.load_state_dict(before)
    net.zero_grad()
    seen, labels = (x, scribbles) if steps == 1 else (x.flip(3), scribbles.flip(2))
    present, (features, logits) = pfa.classes_in(labels, N), net(seen)
    prototypes = pfa.extract_prototypes(features, logits.softmax(1), present)
    made = [logits, *net.augmented(features, prototypes, present, paths).values()]
    sum(pfa.partial_cross_entropy(maps, labels) for maps in made).backward()
    for name, p in net.named_parameters():
        assert (p.grad is None) == (name not in found) and ("augmenter.fuse.weight" in found) == bool(paths)
        if p.grad is not None:
            assert torch.allclose(found[name], p.grad, rtol=1e-3, atol=1e-5 * p.grad.abs().max() + 1e-9), name


def test_a_baseline_adds_a_column_and_a_wrong_one_is_a_sentence(runs, folder, tmp_path):
    out, widths, new = copy_of(runs["local"], tmp_path / "run"), [], ["--out", tmp_path / "out", *SHORT]
    for flags in ([], ["--baseline", runs["pce"]]):
        done(NAME, "--out", out, "--eval-only", *flags)
        widths.append(Image.open(out / "figures" / "examples.png").width)
        assert numbers(read(out / "metrics.json")) == numbers(read(runs["local"] / "metrics.json"))
    assert widths[1] > widths[0] + 250
    assert "holds no run" in mistake(NAME, *new, "--baseline", tmp_path / "gone")
    more = Path(shutil.copytree(folder, tmp_path / "data"))
    (more / "classes.txt").write_text("\n".join([*CLASSES, "cloud"]))
    assert "data have 15" in mistake(NAME, *new, *on(more), "--baseline", runs["pce"])
    (more / "classes.txt").write_text("meadow")
    for path in more.glob("*s/*/*.png"):
        save(path, ids_in(path) * (path.parts[-3] == "images"))
    assert "one class" in mistake(NAME, *new, *on(more)) and not (tmp_path / "out").exists()


# ---- tables and figures of the paper ----

def test_table_2_figure_6_and_table_4_share_their_rows(tmp_path):
    """Rows are trained once, wherever the folder is; Table 4 evaluates one again when scores come later."""
    argv = [*SHORT, "--iterations", 5, "--eval-every", 5, "--warmup", 1, "--no-train-classifier"]

    def trained_by(out, *flags):
        quick("--out", out, *argv, *flags)
        return {path.parent.name: path.stat().st_mtime_ns for path in (out / "rows").glob("*/last.pt")}
    folders = ["method-pce", "augment-local", "augment-global", "pce-local", "pfa"]
    two = trained_by(tmp_path, "--table", 2)
    assert set(two) == set(folders) and Image.open(tmp_path / "components.png").width >= 5 * 256   # Fig. 4
    for name, cells in zip(folders, read(tmp_path / "table2.json").values()):
        miou = read(tmp_path / "rows" / name / "metrics.json")["miou"]
        filtered, oracle = miou.get("filter_500", {}), miou.get("oracle", {})
        assert [value for value, in cells.values()] == [miou["plain"]["plain"], *(
            rates.get(path) for rates in (filtered, oracle) for path in ("local", "global"))]
    assert list(pfa.TABLES[2].paper.values()) == [[67.5, None, None], [75.7, 76.9, None], [76.0, None, 77.4],
                                                  [76.4, 77.7, 77.1], [76.8, 77.3, 77.9]]
    six = trained_by(tmp_path, "--figure", 6)
    assert two.items() <= six.items() and (tmp_path / "figure6.png").exists()
    assert set(six) - set(two) == {f"augment-local_top_fraction-{p}" for p in (0.01, 0.02, 0.04, 0.16, 0.32)}
    np.savez(tmp_path / "s.npz", **{f"{k:04d}": np.linspace(0, 1, N) for k in range(3)})
    moved = Path(shutil.move(tmp_path / "rows", tmp_path / "moved" / "rows")).parent
    assert trained_by(moved, "--table", 4, "--class-scores", tmp_path / "s.npz") == six
    four = read(moved / "table4.json")
    assert list(four) == ["plain", *FILTERS, "scores", "oracle (true classes given)"]
    assert four["scores"]["mAP"][0] > 0
    assert [v for v, in pfa.TABLES[4].paper.values()] == [76.8, 74.1, 75.2, 75.7, 74.3, 77.9, 77.9, 80.4]


def test_rows_of_the_other_tables_and_their_folders(base, tmp_path):
    cfg, weights = replace(settings(preset="voc-b1"), **pfa.USUAL_ROW), (0.005, 0.02, 0.05)
    shown = (pfa.TABLES[2], pfa.TABLES[5], *pfa.FIGURES.values())
    changes = [row for table in shown for row in table.rows.values()]
    rows = {table.title[:6]: [replace(cfg, **row) for row in table.rows.values()] for table in shown}
    assert [(c.w_local, c.w_local_first, c.w_global) for c in rows["Table "]] == [
        (0.01,) * 3, *((w, w, 0.01) for w in weights), *((0.01, 0.01, w) for w in weights)]
    assert [value for value, in pfa.TABLES[5].paper.values()] == [77.9, 77.7, 77.2, 76.8, 77.4, 77.6, 77.1]
    assert [(c.augment, c.slots) for c in rows["Fig. 5"]] == [("global", n) for n in (1, 2, 5, 10)]
    ratios = [*((d, 0) for d in (0, 0.25, 0.5, 0.75)), *((0, s) for s in (0.25, 0.5, 0.75, 1))]
    assert [(c.augment, c.scribble_drop, c.scribble_shrink) for c in rows["Fig. 8"]] == [
        (path, *ratio) for path in ("local", "global") for ratio in ratios]
    made = {(tables.folder_of_changes(row, cfg), repr(replace(cfg, **row))) for row in changes}
    assert len(made) == len(dict(made)) == len({row for _, row in made})     # one folder, one run
    results = {row: [read(base / "metrics.json")] for row in pfa.FIGURES[8].rows}
    pfa_figures.draw_curve(tmp_path / "figure8.png", results, pfa.best_rate, "Fig. 8")
    assert Image.open(tmp_path / "figure8.png").width > 200


def test_table_3_counts_as_the_paper_and_asks_for_weights_before_the_first_training(base, tmp_path):
    cfg = settings("--weights", tmp_path, "--table", 3, preset="voc-b1")
    for name in ("mit_b1", "mit_b3", "mit_b5"):
        with pytest.raises(run.UserError, match=name):
            pfa.networks_of_table_3(cfg)
        (tmp_path / f"{name}.pth").touch()
    rows = pfa.networks_of_table_3(cfg)
    assert [row["method"] for row in rows.values()] == ["full", "pfa"] * 5
    assert rows["SegFormer MiT-B3 pfa"]["weights"] == str(tmp_path / "mit_b3.pth")
    assert rows["DeepLabv2 ResNet-101 full"]["weights"] == "imagenet"
    metrics = read(base / "metrics.json") | dict(iou=dict(plain=dict(plain=range(21))))
    compared = pfa.networks_compared(cfg, dict.fromkeys(rows, [metrics]))
    for name, printed in (("B1", [13.6, 19.4]), ("B3", [44.6, 44.5]), ("B5", [82.0, 72.9])):
        assert list(pfa.TABLES[3].paper[f"SegFormer MiT-{name}"])[:2] == printed
        assert list(compared[f"SegFormer MiT-{name}"][0].values()) == pytest.approx(
            [*printed, metrics["miou"]["plain"]["plain"], metrics["miou"]["classifier"]["global"]], rel=0.015)


# ---- mistakes, several processes ----

@pytest.mark.parametrize("argv, words", [
    ("--scale-min 1.5 --scale-max 0.5", "--scale-max 0.5 is below"), ("--test-size 31", "--test-size 31"),
    ("--warmup 14", "--method pce"), ("--head deeplabv2", "mobilenet_v2"), ("--infer filter", "--predict"),
    ("--table 2 --figure 5", "two commands"), ("--scribble-drop 0.5 --method full", "--method full"),
    ("--scribble-shrink 0.5 --method full", "--method full"), ("--dataset ade20k", "voc_scribble"),
    ("--head deeplabv3plus --backbone mobilenet_v2 --batch-size 1", "--batch-size 1"),
    ("--dataset voc --data .", "--scribbles FOLDER"), ("--backbone mit_b1 --weights imagenet", "mit_b1")])
def test_mistakes_are_one_sentence_before_anything_is_written(tmp_path, argv, words):
    assert words in mistake(NAME, "--out", tmp_path / "out", *SHORT, *argv.split())
    assert not (tmp_path / "out").exists()


def memory_and_slopes(rank=0, world=1):
    """Of four batches: memory and slopes. Images 1 and 3 have few labels, in the last batch none."""
    net, cfg = pixel_net()
    model, found = run.distribute(net.eval(), run.Machine(CPU, rank, world)), []
    for seed, phase in [(seed, phase) for phase in ("local", "global") for seed in range(4)]:
        x, labels = normal(4, 3, 4, 4, seed=seed), some_scribbles(4, 7, 7, 4, seed)
        labels[1::2, :, :4 + seed] = 255
        x, labels = x[rank::world], labels[rank::world]
        net.zero_grad()
        made = pfa.predictions_of(model, net, x, pfa.classes_in(labels, 4), phase, cfg)
        sum(pfa.losses_of(made, labels, phase, cfg).values()).backward()
        found += [net.memory.bank.clone(), net.memory.count.clone()]
        found += [p.grad.clone() for p in net.parameters()]
    return found


TWO = """import sys, torch, torch.distributed as dist
from test_pfa_scribble import memory_and_slopes
dist.init_process_group("gloo")
torch.save(memory_and_slopes(dist.get_rank(), 2), f"{sys.argv[1]}/found{dist.get_rank()}.pt")
"""


def test_two_processes_share_the_memory_and_the_labels(tmp_path):
    """The memory is that of one process, in the order of the images; L_pce is a mean over all labels."""
    (tmp_path / "two.py").write_text(TWO)
    argv = ["--standalone", "--nproc-per-node", "2", str(tmp_path / "two.py"), str(tmp_path)]
    ended = subprocess.run([sys.executable, "-m", "torch.distributed.run", *argv], cwd=ROOT, env=ENV,
                           capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    for rank in (0, 1):
        kept = torch.load(tmp_path / f"found{rank}.pt", weights_only=True)
        for mine, theirs in zip(memory_and_slopes(), kept, strict=True):
            assert torch.allclose(theirs, mine, rtol=1e-6)


# ---- GPUs ----

def net_after(steps, device, phase, **flags):
    """(net, terms) after training steps of a phase, of which the fourth may not wait for the device."""
    cfg = run.make_config(pfa.Config, pfa.PRESETS, "toy", out="unused", slots=2, **flags)
    torch.manual_seed(0)
    net, device = pfa.build_model(cfg, 5), torch.device(device)
    net.memory.bank.copy_(F.normalize(torch.rand_like(net.memory.bank), dim=2))
    net.memory.count.fill_(2 if phase == "global" else 1)
    model = pfa.wrap(net.to(device, memory_format=torch.channels_last), phase, cfg, run.Machine(device))
    net.dropout.eval()                                                  # its random numbers differ
    optimizer = pfa.build_optimizer(net, cfg, device)
    labels = torch.where(normal(3, 32, 32) < -1, torch.arange(3)[:, None, None], 255)
    batch = [t.to(device) for t in (normal(3, 3, 32, 32).float(), labels, torch.ones(3, 5, dtype=torch.bool))]
    for step in range(steps):
        if step == 3:
            torch.cuda.set_sync_debug_mode("error")
        terms = pfa.train_step(model, net, *optimizer, *batch, phase, cfg)
    return net, terms


@pytest.mark.gpu
@pytest.mark.parametrize("phase", ["warmup", "local", "global"])
def test_gpu_a_step_in_bf16_never_waits_and_one_in_float32_is_that_of_the_cpu(phase, monkeypatch):
    for reading in ("paper", "official"):
        try:
            net, terms = net_after(4, "cuda", phase, reading=reading, amp="bf16")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.isfinite(value).all() for value in (*terms.values(), *net.parameters()))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    (cpu, mine), (cuda, theirs) = (net_after(1, device, phase, amp="off") for device in ("cpu", "cuda"))
    assert all(theirs[name].item() == pytest.approx(value.item(), rel=1e-4) for name, value in mine.items())
    assert torch.allclose(cuda.memory.bank.cpu(), cpu.memory.bank, atol=1e-4)
    for (name, p), q in zip(cpu.named_parameters(), cuda.parameters()):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            tolerance = 1e-4 * p.grad.abs().max().item() + 1e-7
            assert torch.allclose(q.grad.cpu(), p.grad, rtol=1e-3, atol=tolerance), name


@pytest.mark.gpu
def test_gpu_a_run_in_bf16_passes_through_every_phase_and_is_used(folder, tmp_path):
    done(NAME, "--out", tmp_path, *SHORT, "--device", "cuda")
    metrics, image = read(tmp_path / "metrics.json"), folder / "images" / "test" / "0001.png"
    assert metrics["device"] == "cuda" and set(metrics["phases"]) == {"warmup", "local", "global"}
    for argv in (["--resume"], ["--predict", image, "--infer", "classifier"],
                 ["--draw", image, save(tmp_path / "strokes.png", scene(1)["scribbles"])]):
        done(NAME, "--out", tmp_path, *argv)
