"""What is special to pfa_scribble.py for its users; test_contract.py has what all scripts promise.

Phases follow from the strokes; full masks teach nothing; every mode of Table 4 is scored as counted by hand;
classifier and scores of one's own; --predict, --draw, --baseline; tables and figures of the paper; processes
share memory and labels; GPUs. Sec. 3 itself is in test_pfa_scribble_equations.py.
"""
import re
import shutil
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import pfa_scribble as pfa
from commands import (SHORT, assert_same_run, copy_of, done, files, interrupt, log_of, mistake, numbers,
                      read, same)
from common import figures, loaders, pfa_figures, run, speed, tables, toy_scenes
from common.metrics import ConfusionMatrix, mean_average_precision
from data.toy_scenes import write_scenes
from test_pfa_scribble_equations import normal, pixel_net, settings, some_scribbles
from trees import write

CPU, NAME, CLASSES, N = torch.device("cpu"), "pfa_scribble", toy_scenes.CLASSES, 14
SHORT, FILTERS = SHORT[NAME], [f"filter_{T}" for T in (0, 45, 100, 500, 1000)]
TOLD = [f"{path}{end}" for path in ("plain", "local", "global") for end in ("", "_restricted")][1:]
OFFICIAL = "--reading official --augment global --slots 2 --iterations 27".split()
pytestmark = pytest.mark.usefixtures("few_toys")


def quick(*argv):
    """A command that must succeed, without figures and announced time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pfa_figures, "draw_figures", lambda *args: None)
        patch.setattr(speed, "announce", lambda *args: None)
        return done(NAME, *argv)


def results(*argv):
    """quick, and the metrics that it says it wrote: see run.for_results."""
    return read(re.search("see (.+/metrics.json)", quick(*argv))[1])


def load(out):
    return pfa.load_run(replace(run.read_config(pfa.Config, out), out=str(out)), CPU)[0]


def ids_in(path):
    return np.array(Image.open(path))


def change(path, array):
    write(path.parent, {path.name: array})
    return path


def scene(k):
    """Test picture k: a dict of image (H,W,3), mask and scribbles (H,W), uint8."""
    return toy_scenes.make_scene(0, toy_scenes.scene_index("test", k))


def scores_in(out):
    return dict(np.load(out / "class_scores-test.npz"))


@pytest.fixture(scope="module")
def runs(trained, tmp_path_factory):
    """Folders of three runs, which nobody may change; the first has all phases and a classifier."""
    more = dict(local=["--augment", "local", "--no-train-classifier"], pce=["--method", "pce"])
    folders = {name: tmp_path_factory.mktemp(name) for name in more}
    for name, out in folders.items():
        quick("--out", out, *SHORT, *more[name])
    return folders | {"base": trained(NAME)}


@pytest.fixture(scope="module")
def base(runs):
    return runs["base"]


@pytest.fixture(scope="module")
def folder(few_toys, tmp_path_factory):
    """The toy pictures as files. Full masks of train and test are others; the strokes are the same."""
    root = tmp_path_factory.mktemp("folder")
    write_scenes(root, 0, toy_scenes.SPLITS)
    for path in (root / "masks").glob("t*/*.png"):
        change(path, (ids_in(path) + 3) % N)
    return root


def on(folder):
    return ["--dataset", "folder", "--data", folder, "--scribbles", "scribbles"]


@pytest.fixture(scope="module")
def official(folder, tmp_path_factory):
    """The other reading on data in which nobody drew a taxi, train picture 3 has strokes of the background
    alone and 5 none at all; the last test picture has no label."""
    root = Path(shutil.copytree(folder, tmp_path_factory.mktemp("official") / "data"))
    for path in (root / "scribbles" / "train").iterdir():
        ids = ids_in(path)
        kept = (ids != CLASSES.index("taxi")) & ((ids == 0) | (path.stem != "0003")) & (path.stem != "0005")
        change(path, np.where(kept, ids, 255))
    change(root / "masks" / "test" / "0002.png", np.full((128, 128), 255))
    said = done(NAME, "--out", root.parent / "run", *SHORT, *on(root), *OFFICIAL)
    (root.parent / "run" / "printed.txt").write_text(said)
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
        later = "global" if all(count[c] >= cfg.slots for c in occurs) else "local"
        phases.append("warmup" if len(phases) < cfg.warmup else later)
        for mask, classes in zip(batch["mask"], batch["classes"]):
            whole = classes.nonzero().flatten().tolist() if which == "official" else []
            if phases[-1] != "warmup":
                count.update({0, *mask.unique().tolist(), *whole} - {255})
    assert metrics["phases"] == Counter(phases) and set(phases) == {"warmup", "local", "global"}
    assert metrics["iterations_until_bank_full"] == phases.index("global")
    assert net.memory.count.tolist() == [min(cfg.slots, count[c]) for c in range(N)]
    assert [name for name, there in zip(CLASSES, net.occurs) if not there] == missing
    assert [row["phase"] for row in rows] == [phases[int(row["iteration"]) - 1] for row in rows]
    assert rows[-1]["val_global"] and not rows[0]["con_global"]


def test_a_run_says_what_nobody_drew_and_when_a_phase_begins(base, official):
    said, told = ((out / "printed.txt").read_text() for out in (official, base))
    for words in ("1 of 8 training masks label nothing, such as 0005", "background alone, such as 0003",
                  "no labelled training pixel of taxi", "of the pixels of 8 training images"):
        assert words in said
    until = read(base / "metrics.json")["iterations_until_bank_full"]
    assert f"from iteration {until + 1} on: phase global (memory full after {until} iterations" in told


def test_an_official_run_resumes_and_a_split_without_labels_is_a_sentence(official, tmp_path):
    data = Path(shutil.copytree(official.parent / "data", tmp_path / "data"))
    interrupt(NAME, 26, "--out", tmp_path / "run", *SHORT, *on(data), *OFFICIAL)    # no iteration that asks
    quick("--out", tmp_path / "run", "--resume")
    assert_same_run(official, tmp_path / "run")
    for file in (data / "masks" / "val").iterdir():
        change(file, np.full((128, 128), 255))
    said = mistake(NAME, "--out", tmp_path / "run", "--eval-only", "--test-split", "val")
    assert "no pixel of the val split is labelled" in said


def test_a_memory_full_with_the_last_iteration_gives_no_global_prediction(folder, tmp_path):
    """Nothing has ever been trained on it: no scores, no log, no --predict."""
    flags = ["--iterations", 8, "--eval-every", 8, "--no-train-classifier"]
    assert "memory never filled in time" in quick("--out", tmp_path, *SHORT, *flags)
    metrics, net = read(tmp_path / "metrics.json"), load(tmp_path).net
    assert net.memory_full() and net.paths() == ["local"] and metrics["iterations_until_bank_full"] is None
    assert all(list(rates) == TOLD[:3] for mode, rates in metrics["miou"].items() if mode != "plain")
    assert metrics["phases"] == dict(warmup=3, local=5) and log_of(tmp_path)[0]["val_global"] == ""
    argv = ["--out", tmp_path, "--predict", folder / "images" / "val", "--infer", "filter"]
    assert "local prediction" in done(NAME, *argv)


def test_neither_network_nor_classifier_learns_from_full_masks(base, folder, tmp_path):
    """Other full masks in train and test: the same weights and scores of classes, and other rates."""
    quick("--out", tmp_path, *SHORT, *on(folder))
    for name in ("last.pt", "classifier.pt"):
        assert same(*(run.read_checkpoint(out / name)["model"] for out in (tmp_path, base)))
    assert all(np.array_equal(row, scores_in(base)[name]) for name, row in scores_in(tmp_path).items())
    assert read(tmp_path / "metrics.json")["miou"]["plain"] != read(base / "metrics.json")["miou"]["plain"]


def test_which_masks_a_run_reads(folder, tmp_path):
    """Strokes, which the options make weaker, or with --method full all pixels; scores are of full masks."""
    def train_masks(**flags):
        cfg = settings(dataset="folder", data=str(folder), scribbles="scribbles", **flags)
        return torch.stack([pfa.open_sets(cfg)["train"].read_mask(i) for i in range(8)])
    assert np.array_equal(train_masks(method="full")[2], ids_in(folder / "masks" / "train" / "0002.png"))
    for weaker in (train_masks(scribble_drop=0.6), train_masks(scribble_shrink=1.0)):
        assert 0 < (weaker < 255).sum() < 0.7 * (train_masks() < 255).sum()
    tree = {f"ImageSets/Segmentation/{split}.txt": "a" for split in ("trainaug", "train", "val")}
    tree |= {"JPEGImages/a.jpg": np.zeros((36, 40, 3)), "ScribbleLabels/a.png": np.full((36, 40), 7)}
    data = write(tmp_path, tree | {"SegmentationClass/a.png": np.full((36, 40), 3)})
    sets = pfa.open_sets(settings("voc-b1", data=str(data), test_split="train"))
    found = {name: sets[name].read_mask(0).unique().tolist() for name in sets}
    assert found == dict(train=[7], val=[3], test=[3])
    small = pfa.open_sets(settings("small", dataset="voc_scribble", data=str(data)))
    assert small["train"].read_mask(0).unique().tolist() == [7]
    small = pfa.open_sets(settings("small", data=str(folder)))["train"]
    assert torch.equal(small.read_mask(1), pfa.open_sets(settings())["train"].read_mask(1))


# ---- evaluation, classes from a classifier, scores of one's own ----

def test_every_mode_is_scored_as_counted_by_hand(base):
    """With an augmenter so strong that the choice of the classes decides pixels. What is restricted has the
    logits of all other classes far below; to the classes that are predicted, it changes nothing."""
    predictor, scores = load(base), {name: torch.from_numpy(row) for name, row in scores_in(base).items()}
    net, cfg = predictor
    for layer in (net.augmenter.expand, net.augmenter.project_prototype):
        layer.weight.data.mul_(6)
    modes, counted = [*FILTERS, "classifier", "oracle"], defaultdict(lambda: ConfusionMatrix(N))
    for k, row in enumerate(scores.values()):
        image, labels = scene(k)["image"], torch.from_numpy(scene(k)["mask"])[None]
        x = (image - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
        with torch.no_grad():
            features, logits = net(torch.from_numpy(x).float().permute(2, 0, 1)[None])
            plain, made = pfa.enlarge(logits, (128, 128)).argmax(1)[0], {("plain", "plain"): logits}
            for mode, present in pfa.class_sets(plain, N, modes, labels[0], row, 0.1).items():
                prototypes = pfa.extract_prototypes(features, logits.softmax(1), present[None])
                augmented = net.augmented(features, prototypes, present[None], pfa.PATHS)
                made |= {(mode, path): maps for path, maps in augmented.items()}
                for name, maps in dict(plain=logits, **augmented).items():
                    made[mode, f"{name}_restricted"] = maps + torch.where(present, 0, -1e9)[:, None, None]
        for key, maps in made.items():
            counted[key].update(labels, pfa.enlarge(maps, (128, 128)).argmax(1))
    found = pfa.evaluate(predictor, pfa.open_sets(cfg)["test"], run.Machine(CPU), modes, scores)
    miou = {(mode, path): rates["miou"] for mode, paths in found.items() for path, rates in paths.items()}
    expected = {key: matrix.summary()["miou"] for key, matrix in counted.items()}
    assert miou == pytest.approx(expected, abs=0.1)
    assert len({round(value, 2) for value in expected.values()}) >= 9   # modes differ
    assert found["filter_0"]["plain_restricted"] == found["plain"]["plain"]


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
    assert list(metrics["iou"]["classifier"]["global"]) == CLASSES
    told = ("plain {plain:.1f} (restricted {plain_restricted:.1f}), local {local:.1f} (restricted "
            "{local_restricted:.1f}), global {global:.1f} (restricted {global_restricted:.1f})")
    told = told.format(**metrics["miou"]["plain"], **metrics["miou"]["oracle"])
    assert f"TRUE CLASSES GIVEN (oracle: an upper bound, not a result): {told}" in said
    assert f"test mIoU: plain {metrics['miou']['plain']['plain']:.1f}" in said and "classifier (mAP" in said
    local, pce = (read(runs[name] / "metrics.json") for name in ("local", "pce"))
    assert (metrics["headline"], local["headline"]) == ("classifier", "filter_45")       # never the oracle
    assert list(local["miou"]["oracle"]) == TOLD[:3] and list(metrics["miou"]["oracle"]) == TOLD
    assert list(pce["miou"]) == list(metrics["miou"]) and pce["phases"] == dict(pce=14)
    assert list(pce["iou"]["classifier"]) == TOLD[:1] and pce["class_map"] == metrics["class_map"]


def test_options_of_the_evaluation_reach_a_finished_run(base, tmp_path):
    out, first = copy_of(base, tmp_path / "run"), read(base / "metrics.json")

    def again(*flags):
        return results("--out", out, "--eval-only", *flags)
    nobody = again("--score-threshold", 1)["miou"]["classifier"]        # no score is above: background alone
    assert nobody == again("--filter", 99999)["miou"]["filter_99999"] != first["miou"]["classifier"]
    val, row = again("--test-split", "val")["miou"], log_of(base)[-1]   # log.csv: no true classes
    assert [val["plain"]["plain"], *val["filter_45"].values()] == pytest.approx(
        [float(row[f"val_{name}"]) for name in ("plain", *TOLD)])
    assert again("--test-size", 64)["miou"] != first["miou"] and read(out / "config.json")["test_size"] == 0
    assert numbers(again()) == numbers(first)


def test_mean_average_precision_by_hand_and_over_the_classes_that_have_strokes(official):
    scores = torch.tensor([[0.9, 0.1], [0.5, 0.1], [0.5, 0.7], [0.1, 0.1]])
    truth = torch.tensor([[True, False], [False, True], [True, False], [False, False]])
    # class 0: hits at ranks 1 and 3; class 1: the first of three ties is a miss, so its hit has rank 3
    assert mean_average_precision(scores, truth) == pytest.approx(100 * ((1 + 2 / 3) / 2 + 1 / 3) / 2)
    learned, rows = [c for c in range(1, N) if CLASSES[c] != "taxi"], scores_in(official)
    masks = [ids_in(official.parent / "data" / "masks" / "test" / f"{name}.png") for name in rows]
    truth = torch.tensor([[(mask == c).any().item() for c in learned] for mask in masks])
    expected = mean_average_precision(torch.tensor(np.stack(list(rows.values())))[:, learned], truth)
    assert read(official / "metrics.json")["class_map"] == pytest.approx(expected)


def test_a_classifier_may_follow_and_is_the_one_that_a_run_trains_at_once(base, runs, tmp_path):
    out = copy_of(runs["local"], tmp_path / "run")
    metrics, first = results("--out", out, "--eval-only", "--train-classifier"), read(base / "metrics.json")
    assert (metrics["headline"], metrics["class_map"]) == ("classifier", first["class_map"])
    mine, theirs = (run.read_checkpoint(folder / "classifier.pt")["model"] for folder in (out, base))
    assert same(mine, theirs) and (out / "last.pt").read_bytes() == (runs["local"] / "last.pt").read_bytes()


def test_a_classifier_goes_on_where_it_was_interrupted(base, tmp_path, monkeypatch):
    out, three_steps = copy_of(base, tmp_path / "run"), iter([F.binary_cross_entropy_with_logits] * 3)
    for name in ("metrics.json", "classifier.pt", "class_scores-test.npz"):
        (out / name).unlink()
    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(F, "binary_cross_entropy_with_logits", lambda *args: next(three_steps)(*args))
        quick("--out", out, "--resume")
    assert run.read_checkpoint(out / "classifier.pt")["progress"]["iteration"] == 2
    quick("--out", out, "--resume")
    assert_same_run(base, out)


def test_scores_of_ones_own_may_lack_the_background_but_no_image_and_no_class(base, tmp_path):
    out, path, rows = copy_of(base, tmp_path / "run"), tmp_path / "scores.npz", scores_in(base)
    for first in (0, 1):
        np.savez(path, unused=np.zeros(3), **{name: row[first:] for name, row in rows.items()})
        found = results("--out", out, "--eval-only", "--class-scores", path)
        assert found["miou"]["scores"] == read(base / "metrics.json")["miou"]["classifier"]
        assert found["headline"] == "scores"
    for wrong, words in (({"0000": rows["0000"], "0002": rows["0002"]}, "lacks 1 of 3 images, such as 0001"),
                         ({name: row[2:] for name, row in rows.items()}, "14 finite"),
                         (rows | {"0001": rows["0001"][1:]}, "(13,) for 0001")):
        np.savez(path, **wrong)
        said = mistake(NAME, "--out", tmp_path / "new", *SHORT, "--class-scores", path)
        assert f"--class-scores {path}" in said and words in said and not (tmp_path / "new").exists()
    said = mistake(NAME, "--out", tmp_path / "new", *SHORT, "--class-scores", base / "log.csv")
    assert "holds something else" in said and "pickle" not in said


# ---- predict, draw, baseline ----

@pytest.mark.parametrize("which, infer, mode, path", [
    ("base", "plain", "plain", "plain"), ("base", "classifier", "classifier", "global"),
    ("base", "scores", "classifier", "global"), ("local", "filter", "filter_45", "local")])
def test_predict_writes_what_was_scored(base, runs, folder, tmp_path, which, infer, mode, path):
    out, counted = copy_of(runs[which], tmp_path / "run"), ConfusionMatrix(N)
    flags = ["--infer", infer, "--class-scores", base / "class_scores-test.npz"]
    said = done(NAME, "--out", out, "--predict", folder / "images" / "test", *flags)
    assert f"{path} prediction" in said and (infer == "plain" or f"classes by the {infer}" in said)
    for k in range(3):
        ids = ids_in(out / "predictions" / f"{k:04d}.png")
        counted.update(torch.from_numpy(scene(k)["mask"])[None], torch.from_numpy(ids)[None].long())
    scored = read(out / "metrics.json")["miou"][mode][path]
    assert counted.summary()["miou"] == pytest.approx(scored, abs=0.1)


def test_predict_and_draw_say_what_is_missing(base, runs, folder, tmp_path):
    image, ids = folder / "images" / "test" / "0001.png", np.full((128, 128), 255)
    for which, infer, words in (("pce", "filter", "no prototypes; use --infer plain"),
                                ("local", "classifier", "--train-classifier"),
                                ("base", "scores", "--class-scores FILE")):
        assert words in mistake(NAME, "--out", runs[which], "--predict", image, "--infer", infer)
    Image.open(image).save(tmp_path / "d.jpg", quality=90)
    assert "d.jpg is a JPEG file" in mistake(NAME, "--out", base, "--draw", image, tmp_path / "d.jpg")
    for words, strokes in (("128 x 127", ids[1:]), ("figures/colours.png", ids), ("25", ids // 10),
                           ("100 % of", ids_in(tmp_path / "d.jpg"))):
        assert words in mistake(NAME, "--out", base, "--draw", image, change(tmp_path / "d.png", strokes))
    assert "give two files" in mistake(NAME, "--out", base, "--draw", image)
    small = change(tmp_path / "small.png", np.zeros((31, 51, 3)))
    assert "51 x 31" in mistake(NAME, "--out", base, "--predict", small)


@pytest.mark.parametrize("which", ["base", "local", "pce"])
def test_draw_adapts_a_copy_of_the_run_to_painted_strokes(runs, folder, tmp_path, which):
    """In the colours of colours.png; says how it read them, with a note if the background has no stroke."""
    out, file = copy_of(runs[which], tmp_path / "run"), folder / "images" / "test" / "0001.png"
    colours, ids = figures.palette(CLASSES).numpy(), scene(1)["scribbles"]
    before = (out / "last.pt").read_bytes()
    ids = np.where((ids == 0) & (which == "local"), 255, ids)
    painted = np.where(ids[..., None] < 255, colours[np.minimum(ids, N - 1)], ids_in(file))
    said = done(NAME, "--out", out, "--draw", file, change(tmp_path / "painted.png", painted))
    shares = re.search(r"(\d+) % of the stroke pixels .* (\d+) % after 40 steps", said)
    first, after = map(int, shares.groups())
    right = (ids_in(out / "drawings" / "0001.png") == ids)[ids < 255]
    assert after == pytest.approx(100 * right.mean(), abs=0.51) and after > first
    assert ("note: no stroke of background" in said) == (which == "local")
    ends = ("", "_strokes", "_overlay", "_before_after")
    assert files(out / "drawings") == {f"0001{end}.png" for end in ends}
    assert np.array_equal(ids_in(out / "drawings" / "0001_strokes.png"), ids)
    told = [f"{name} {(ids == c).sum()} px" for c, name in enumerate(CLASSES) if (ids == c).any()]
    assert f"strokes: {', '.join(told)}\n" in said
    assert (out / "last.pt").read_bytes() == before


def test_a_baseline_adds_a_column_and_a_wrong_one_is_a_sentence(runs, tmp_path):
    out, widths = copy_of(runs["local"], tmp_path / "run"), []
    for flags in ([], ["--baseline", runs["pce"]]):
        done(NAME, "--out", out, "--eval-only", *flags)
        widths.append(Image.open(out / "figures" / "examples.png").width)
    assert widths[1] > widths[0] + 250
    assert "holds no run" in mistake(NAME, "--out", tmp_path / "new", *SHORT, "--baseline", tmp_path)
    assert not (tmp_path / "new").exists()


# ---- tables and figures of the paper ----

def test_table_2_figure_6_and_table_4_share_their_rows(tmp_path):
    """Rows are trained once, wherever the folder is; Table 4 evaluates one again when scores come later."""
    def trained_by(out, *flags):
        quick("--out", out, *SHORT, "--iterations", 5, "--warmup", 1, "--no-train-classifier", *flags)
        return {path.parent.name: path.stat().st_mtime_ns for path in (out / "rows").glob("*/last.pt")}
    folders = ["method-pce", "augment-local", "augment-global", "pce-local", "pfa"]
    two = trained_by(tmp_path, "--table", 2)
    assert set(two) == set(folders) and Image.open(tmp_path / "components.png").width >= 5 * 256   # Fig. 4
    for name, cells in zip(folders, read(tmp_path / "table2.json").values()):
        miou = read(tmp_path / "rows" / name / "metrics.json")["miou"]
        expected = [miou[mode].get(name) for mode in ("filter_45", "oracle") for name in TOLD]
        assert [value for value, in cells.values()] == [miou["plain"]["plain"], *expected]
    six = trained_by(tmp_path, "--figure", 6)
    assert two.items() <= six.items() and (tmp_path / "figure6.png").exists()
    np.savez(tmp_path / "s.npz", **{f"{k:04d}": np.linspace(0, 1, N) for k in range(3)})
    moved = Path(shutil.move(tmp_path / "rows", tmp_path / "moved" / "rows")).parent
    assert trained_by(moved, "--table", 4, "--class-scores", tmp_path / "s.npz") == six
    modes, four = ["plain", *FILTERS, "scores", "oracle (true classes given)"], read(moved / "table4.json")
    assert list(four) == modes + [f"strokes alone, {mode}" for mode in modes]
    miou = read(moved / "rows" / "method-pce" / "metrics.json")["miou"]         # strokes, same classes
    cells = [[miou["plain"]["plain"]], [miou["scores"]["plain_restricted"]], *[[None]] * 4]
    assert [four["strokes alone, scores"][name] for name in ("plain", *TOLD)] == cells


def test_printed_numbers_and_rows_of_the_tables_and_their_folders():
    assert list(pfa.TABLES[2].paper.values()) == [[67.5, None, None], [75.7, 76.9, None], [76.0, None, 77.4],
                                                  [76.4, 77.7, 77.1], [76.8, 77.3, 77.9]]
    assert [v for v, in pfa.TABLES[4].paper.values()] == [76.8, 74.1, 75.2, 75.7, 74.3, 77.9, 77.9, 80.4]
    assert [v for v, in pfa.TABLES[5].paper.values()] == [77.9, 77.7, 77.2, 76.8, 77.4, 77.6, 77.1]
    cfg = replace(settings("voc-b1"), **pfa.USUAL_ROW)
    changes = [row for table in (pfa.TABLES[2], pfa.TABLES[5], *pfa.FIGURES.values())
               for row in table.rows.values()]
    five = [replace(cfg, **row) for row in pfa.TABLES[5].rows.values()]
    assert [c.w_local for c in five] == [0.01, 0.005, 0.02, 0.05, 0.01, 0.01, 0.01]
    assert [c.w_global for c in five] == [0.01, 0.01, 0.01, 0.01, 0.005, 0.02, 0.05]
    made = {(tables.folder_of_changes(row, cfg), repr(replace(cfg, **row))) for row in changes}
    assert len(made) == len(dict(made)) == len({row for _, row in made})     # one folder, one run


def test_figure_8_has_its_controls_and_deviations_over_the_seeds(tmp_path, monkeypatch):
    panels, results, draw = {}, {}, figures.curve_pieces
    monkeypatch.setattr(figures, "curve_pieces", lambda *args: panels.update({args[2]: args}) or draw(*args))
    for row, changes in pfa.FIGURES[8].rows.items():
        rates = {name: 40 for name in TOLD if name.startswith(("plain", changes.get("augment", "plain")))}
        results[row] = [dict(headline="h", miou=dict(plain=dict(plain=mIoU), h=rates)) for mIoU in (30, 36)]
    pfa_figures.draw_curves(tmp_path / "figure8.png", results, "")
    names = {"plain", *(name.replace("_", " ") for name in TOLD), "strokes alone", "strokes alone restricted"}
    for kind, x in (("drop", [0, 0.25, 0.5, 0.75]), ("shrink", [0, 0.25, 0.5, 0.75, 1])):
        means, ratios, _, _, spread = panels[kind]
        assert ratios == x and set(means) == names and means["global"] == [40] * len(x)
        assert means["strokes alone"] == means["plain"] == [33] * len(x)
        assert spread["plain"] == pytest.approx([18 ** 0.5] * len(x)) and not any(spread["global"])


def test_table_3_counts_as_the_paper_and_asks_for_weights_before_the_first_training(base, tmp_path):
    cfg = settings("voc-b1", weights=str(tmp_path), table=3)
    for name in ("mit_b1", "mit_b3", "mit_b5"):
        with pytest.raises(run.UserError, match=name):
            pfa.networks_of_table_3(cfg)
        (tmp_path / f"{name}.pth").touch()
    rows = pfa.networks_of_table_3(cfg)
    assert rows["SegFormer MiT-B3 pfa"]["weights"] == str(tmp_path / "mit_b3.pth")
    metrics = read(base / "metrics.json") | dict(iou=dict(plain=dict(plain=range(21))))
    compared = pfa.networks_compared(cfg, dict.fromkeys(rows, [metrics]))
    for name, printed in (("B1", [13.6, 19.4]), ("B3", [44.6, 44.5]), ("B5", [82.0, 72.9])):
        assert list(pfa.TABLES[3].paper[f"SegFormer MiT-{name}"])[:2] == printed
        row, = compared[f"SegFormer MiT-{name}"]
        assert [row["parameters"], row["multiply_adds"]] == pytest.approx(printed, rel=0.015)


# ---- mistakes, several processes, GPUs ----

@pytest.mark.parametrize("argv, words", [
    ("--scale-min 1.5 --scale-max 0.5", "--scale-max 0.5 is below"), ("--test-size 31", "--test-size 31"),
    ("--warmup 14", "--method pce"), ("--head deeplabv2", "mobilenet_v2"), ("--infer filter", "--predict"),
    ("--table 2 --figure 5", "separate commands"), ("--scribble-drop 0.5 --method full", "--method full"),
    ("--dataset voc --data .", "--scribbles FOLDER"),
    ("--head deeplabv3plus --backbone mobilenet_v2 --batch-size 1", "--batch-size 1")])
def test_mistakes_are_one_sentence_before_anything_is_written(tmp_path, argv, words):
    assert words in mistake(NAME, "--out", tmp_path / "out", *SHORT, *argv.split())
    assert not (tmp_path / "out").exists()


def memory_and_slopes(rank=0, world=1):
    """After four batches. Images 1 and 3 have few labels, in the last batch none."""
    net, cfg = pixel_net()
    model = run.distribute(net.eval(), run.Machine(CPU, rank, world))
    for seed in range(4):
        x, labels = normal(4, 3, 4, 4, seed=seed), some_scribbles(4, 7, 7, 4, seed)
        labels[1::2, :, :4 + seed] = 255
        x, labels = x[rank::world], labels[rank::world]
        made = pfa.predictions_of(model, net, x, pfa.classes_in(labels, 4), "global", cfg)
        sum(pfa.losses_of(made, labels, "global", cfg).values()).backward()
    return [net.memory.bank, net.memory.count, *(p.grad for p in net.parameters())]


def one_of_two(rank, folder):
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(memory_and_slopes(rank, 2), folder / f"{rank}.pt")


def test_two_processes_share_the_memory_and_the_labels(tmp_path):
    """The memory is that of one process, in the order of the images; L_pce is a mean over all labels."""
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)
    alone = memory_and_slopes()
    for rank in (0, 1):
        shared = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert len(shared) == len(alone)
        assert all(torch.allclose(theirs, mine, rtol=1e-6) for theirs, mine in zip(shared, alone))


def net_after(steps, device, phase, **flags):
    """(net, terms) after training steps of a phase, of which the fourth may not wait for the device."""
    cfg, device = settings(slots=2, **flags), torch.device(device)
    torch.manual_seed(0)
    net = pfa.build_model(cfg, 5)
    net.memory.bank.copy_(F.normalize(torch.rand_like(net.memory.bank), dim=2))
    net.memory.count.fill_(2 if phase == "global" else 1)
    model = pfa.wrap(net.to(device, memory_format=torch.channels_last), phase, cfg, run.Machine(device))
    net.dropout.eval()                                                  # its random numbers differ
    optimizer = pfa.build_optimizer(net, cfg, device)
    labels = torch.where(normal(3, 32, 32) < -1, torch.arange(3)[:, None, None], 255)
    batch = [part.to(device) for part in (normal(3, 3, 32, 32).float(), labels, torch.ones(3, 5) > 0)]
    try:
        for step in range(steps):
            if step == 3:
                torch.cuda.set_sync_debug_mode("error")
            terms = pfa.train_step(model, net, *optimizer, *batch, phase, cfg)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return net, terms


@pytest.mark.gpu
@pytest.mark.parametrize("phase", ["warmup", "local", "global"])
def test_gpu_a_step_in_bf16_never_waits_and_one_in_float32_is_that_of_the_cpu(phase, monkeypatch):
    for reading in ("paper", "official"):
        net, terms = net_after(4, "cuda", phase, reading=reading, amp="bf16")
        assert all(torch.isfinite(value).all() for value in (*terms.values(), *net.parameters()))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    (cpu, mine), (cuda, theirs) = (net_after(1, device, phase, amp="off") for device in ("cpu", "cuda"))
    assert all(theirs[name].item() == pytest.approx(value.item(), rel=1e-4) for name, value in mine.items())
    assert torch.allclose(cuda.memory.bank.cpu(), cpu.memory.bank, atol=1e-4)
    for (name, p), q in zip(cpu.named_parameters(), cuda.parameters(), strict=True):
        if p.grad is not None:
            tolerance = 1e-4 * p.grad.abs().max().item() + 1e-7
            assert torch.allclose(q.grad.cpu(), p.grad, rtol=1e-3, atol=tolerance), name


@pytest.mark.gpu
def test_gpu_a_run_in_bf16_passes_through_every_phase_and_is_used(folder, tmp_path):
    done(NAME, "--out", tmp_path, *SHORT, "--device", "cuda")
    metrics, image = read(tmp_path / "metrics.json"), folder / "images" / "test" / "0001.png"
    assert metrics["device"] == "cuda" and set(metrics["phases"]) == {"warmup", "local", "global"}
    for argv in (["--resume"], ["--predict", image, "--infer", "classifier"],
                 ["--draw", image, change(tmp_path / "strokes.png", scene(1)["scribbles"])]):
        done(NAME, "--out", tmp_path, *argv)
