"""protopool.py beyond its formulas and what all scripts promise (test_contract.py): its phases and when they
end, the numbers of a run, explanations, ensembles, tables, augmentation, its own mistakes, and the GPU."""
import copy
import math
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import protopool
from commands import SHORT, assert_same_run, call, done, files, log_of, mistake, numbers, read, same
from common import images, protopool_figures, run
from common.transforms import warp

CPU = torch.device("cpu")
MACHINE = run.Machine(CPU)
both_readings = pytest.mark.parametrize("reading", ["paper", "official"])
pytestmark = pytest.mark.usefixtures("few_toys")


def config(out, *argv):
    return run.parse_config(protopool.Config, protopool.PRESETS,
                            ["--out", str(out), *SHORT["protopool"], *map(str, argv)])


@pytest.fixture(scope="module")
def linear_and_official(few_toys, tmp_path_factory):
    """Two more short runs; never write into them."""
    runs = [tmp_path_factory.mktemp(name) for name in ("linear", "official")]
    for out, argv in zip(runs, (("--classifier", "linear"), ("--reading", "official"))):
        ended = call("protopool", "--out", out, *SHORT["protopool"], *argv)
        assert (ended.returncode, ended.stderr) == (0, "")              # no progress bar into a pipe
    return runs


def begin(cfg):
    """Where train() begins: the plain classifier and ProtoPool on one backbone, data, progress."""
    sets = protopool.open_splits(cfg)
    progress = dict(phase="start", epoch=0, iteration=0, stale=0, best=math.inf, seconds=0.0, log=[], sums={},
                    film=protopool_figures.new_film(), classes=sets["train"].classes)
    torch.manual_seed(0)
    run.start_run(cfg, MACHINE)
    return *protopool.build_models(progress, cfg, CPU), sets, progress


def opened(out):
    """A finished run: network, data, progress."""
    sets = protopool.open_splits(config(out))
    net, progress = protopool.load_run(config(out), CPU, sets)
    return net, sets, progress


def clean(data, i):
    return images.CleanView(data, 32)[i][0][None]


# ---- phases ----

@both_readings
@pytest.mark.parametrize("batch", [1, 6])
def test_each_phase_moves_what_it_trains_and_nothing_else(tmp_path, reading, batch):
    """Frozen backbones keep their statistics too [D16]. official fine-tunes on mixed images [D7]."""
    cfg = config(tmp_path, "--reading", reading, "--batch-size", batch, "--mixup")
    plain, net, sets, progress = begin(cfg)
    learning = {"add_on_layers", "prototypes", "q"}
    for phase, expected in dict(pretrain={"backbone", "add_on_layers"}, patches={"prototypes"},
                                warmup=learning, joint=learning | {"backbone"},
                                project={"prototypes", "q", "fixed"}, finetune={"last_layer"}).items():
        before = copy.deepcopy(net.state_dict())
        if phase == "project":
            protopool.project(net, sets, progress, cfg, MACHINE)
        elif phase == "patches":                                        # [D20]
            protopool.start_from_patches(net, sets, progress, cfg, MACHINE)
        else:
            protopool.train_phase(plain if phase == "pretrain" else net, phase, sets, progress, cfg, MACHINE)
        moved = {name for name, value in net.state_dict().items() if not same(value, before[name])}
        assert {name.split(".")[0] for name in moved} == expected, phase
        assert any("running_mean" in name for name in moved) == ("backbone" in expected)
        if phase == "warmup":
            changed = net.q.argmax(-1) != before["q"].argmax(-1)
            assert progress["log"][-1]["slots_changed"] == changed.sum()
    epochs = [f"{row['phase']} {row['epoch']}" for row in progress["log"]]
    assert epochs == ["pretrain 1", "warmup 1", "joint 1", "joint 2", "finetune 1", "finetune 2"]
    frames = progress["film"]["frames"]                                 # Fig. 5
    assert all(torch.allclose(frame["y"].sum(1), torch.ones(2)) for frame in frames)


@both_readings
def test_joint_training_stops_with_patience_and_projects_the_weights_of_its_reading(tmp_path, reading):
    """The loss on val decides. paper: its best weights are projected; official: the last [D12]. A run that is
    interrupted while it waits goes on waiting."""
    argv = ("--reading", reading, "--patience", 2, "--lr", 0.05, "--backbone-lr", 0.05, "--tau", "paper",
            "--joint-epochs")
    cfg = config(tmp_path / "whole", *argv, 12)
    _, net, sets, progress = begin(cfg)
    protopool.train_phase(net, "joint", sets, progress, cfg, MACHINE)
    losses = [row["val_ce"] for row in progress["log"]]
    best = int(np.argmin(losses))
    assert len(losses) == best + 3 < 12                                 # two epochs without a lower one
    protopool.project(net, sets, progress, cfg, MACHINE)
    net.prototypes.data = progress["prototypes_before"]
    found = protopool.evaluate(net, protopool.clean_loader(sets["val"], cfg, CPU), CPU)["ce"]
    chosen, other = (best, -1) if reading == "paper" else (-1, best)
    assert abs(found / losses[chosen] - 1) < 1e-3 < abs(found / losses[other] - 1)

    cfg = config(tmp_path / "cut", *argv, 12)
    _, net, sets, progress = begin(cfg)
    protopool.train_phase(net, "joint", sets, progress, config(cfg.out, *argv, best + 2), MACHINE)
    progress |= run.read_progress(cfg.out)
    _, net = protopool.build_models(progress, cfg, CPU)
    protopool.train_phase(net, "joint", sets, progress, cfg, MACHINE)
    assert [row["val_ce"] for row in progress["log"]] == losses


def test_fine_tuning_without_mix_up_works_on_the_slots_of_the_clean_images(tmp_path):
    """Computed once; a batch holds every image's own label. With mix-up every step runs the network [D7]."""
    cfg = config(tmp_path)
    _, net, sets, _ = begin(cfg)
    with torch.no_grad():
        slots = torch.cat([net.eval().slot_scores(clean(sets["train"], i)) for i in range(12)])
    batches = list(protopool.slot_batches(net, sets, 0, 4, cfg, MACHINE))
    found = torch.cat([batch[0] for batch in batches])
    nearest = torch.cdist(found, slots).argmin(1)
    assert torch.allclose(found, slots[nearest], atol=1e-4) and nearest.bincount().tolist() == [2] * 12
    assert torch.cat([batch[1] for batch in batches]).tolist() == [sets["train"].labels[i] for i in nearest]
    assert all(torch.equal(labels, others) and lam == 1 for _, labels, others, lam in batches)
    mixed = list(protopool.slot_batches(net, sets, 0, 4, config(tmp_path, "--finetune-mixup"), MACHINE))
    assert all(0 < lam < 1 and sorted(labels) == sorted(others) for _, labels, others, lam in mixed)
    assert torch.cdist(torch.cat([batch[0] for batch in mixed]), slots).amin(1).max() > 1e-3
    for argv in ((), ("--positive",)):
        cfg = config(tmp_path, "--finetune-lr", 0.5, *argv)
        _, net, sets, progress = begin(cfg)
        protopool.train_phase(net, "finetune", sets, progress, cfg, MACHINE)
        assert (net.last_layer.weight.min() < 0) == (not argv)          # [D23]


def photos(folder):
    """A folder of noise: two classes, three training and one test image each."""
    for name in ("train/ant/1", "train/ant/2", "train/bee/1", "train/bee/2", "test/ant/0", "test/bee/0"):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32, 32), 90).save(path)
    return [*SHORT["protopool"], "--dataset", "imagefolder", "--data", folder, "--batch-size", 2], path


def test_the_test_split_is_read_for_the_report_alone(tmp_path):
    """A broken test image shows when all is trained; with --select-on-test it is for validation, and nothing
    is set apart from the training images."""
    argv, path = photos(tmp_path / "data")
    path.write_bytes(path.read_bytes()[:300])
    assert str(path) in mistake("protopool", "--out", tmp_path / "run", *argv)
    progress = run.read_checkpoint(tmp_path / "run" / "last.pt")["progress"]
    assert (progress["phase"], progress["epoch"]) == ("finetune", 2)
    assert str(path) in mistake("protopool", "--out", tmp_path / "other", *argv, "--select-on-test")
    assert not (tmp_path / "other" / "last.pt").exists()
    sets = protopool.open_splits(config(tmp_path, "--select-on-test"))
    assert sets["val"] is sets["test"] and len(sets["train"]) == 24


def test_a_patch_stays_the_patch_whatever_becomes_of_the_training_images(tmp_path):
    """A new file moves the numbers of all others, and some to val; without data --explain shows the same."""
    (argv, picture), out = photos(tmp_path / "data"), tmp_path / "run"
    done("protopool", "--out", out, *argv)
    metrics = read(out / "metrics.json")
    done("protopool", "--out", out, "--explain", picture)
    explained = (out / "explanations" / "0.png").read_bytes()
    shutil.copy(picture, tmp_path / "data" / "train" / "ant" / "0.png")
    done("protopool", "--out", out, "--eval-only")
    assert same(numbers(read(out / "metrics.json")), numbers(metrics))
    saved = run.read_checkpoint(out / "last.pt")
    source = saved["progress"]["sources"][0]["image"]
    (tmp_path / "data" / source).unlink()
    assert f"{source}, which prototype p0" in mistake("protopool", "--out", out, "--eval-only")
    (tmp_path / "data").rename(tmp_path / "gone")
    done("protopool", "--out", out, "--explain", tmp_path / "gone" / "test" / "bee" / "0.png")
    assert (out / "explanations" / "0.png").read_bytes() == explained
    other = shutil.copytree(out, tmp_path / "other")                    # counts and classes alone agree
    run.write_json(other / "config.json", read(out / "config.json") | dict(data=str(tmp_path / "moved")))
    shutil.copytree(tmp_path / "gone", tmp_path / "data")
    shutil.copytree(tmp_path / "gone", tmp_path / "moved")
    (tmp_path / "moved" / "test" / "bee" / "0.png").rename(tmp_path / "moved" / "test" / "bee" / "1.png")
    assert "test images differ" in mistake("protopool", "--out", tmp_path, "--ensemble", out, other)
    saved["progress"]["sources"] = [[0, 1, 1, 0.5]]                     # as earlier versions kept it
    torch.save(saved, out / "last.pt")
    for option in ("--eval-only", "--resume"):
        assert "train again" in mistake("protopool", "--out", out, option, "--data", tmp_path / "gone")


def test_the_plain_classifier_trains_for_the_same_epochs_and_resumes(linear_and_official, tmp_path):
    out = linear_and_official[0]
    metrics, copied = read(out / "metrics.json"), shutil.copytree(out, tmp_path / "run")
    assert metrics["epochs"] == dict(pretrain=1, warmup=1, joint=2) and "prototypes_used" not in metrics
    for option in ("--eval-only", "--resume"):
        (copied / "metrics.json").unlink()
        done("protopool", "--out", copied, option)
        assert_same_run(out, copied)


# ---- the numbers of a run ----

FIGURES = {"prototypes-01.png", "classes-01.png", "shared_pair.png", "shared_prototype.png", "focal.png",
           "classes_per_prototype.png", "class_graph.png", "class_graph.csv", "assignment.png",
           "assignment_histogram.png", "slot_over_time.png", "slots_over_time.png", "focal_histogram.png",
           *(f"explanation-{k}.png" for k in (1, 2, 3))}


def test_a_run_leaves_what_the_readme_promises(trained):
    out = trained("protopool")
    others = {"config.json", "log.csv", "metrics.json", "last.pt", "best.pt", "printed.txt", "report.html"}
    figures = {f"figures/{name}" for name in FIGURES}
    assert {path for path in files(out) if path[-7:] != "-02.png"} == others | figures
    metrics, rows = read(out / "metrics.json"), log_of(out)
    assert (metrics["reading"], metrics["chosen_on"]) == ("paper", "validation split")
    assert metrics["epochs"] == dict(pretrain=1, warmup=1, joint=2, finetune=2)
    assert all(row["cluster"] and row["orth"] for row in rows if row["phase"] in ("warmup", "joint"))
    assert all(row["l1"] and row["lr"] == "0.0001" for row in rows if row["phase"] == "finetune")


def test_the_three_accuracies_and_the_patches(trained):
    """Before the projection, right after it, with the last layer's new weights. A prototype is the patch of
    the training image that it names, and was among the best weights before."""
    out = trained("protopool")
    metrics, (net, sets, progress) = read(out / "metrics.json"), opened(out)
    assert metrics["distinct_patches"] == len(net.prototypes.unique(dim=0))          # equal rows, one patch
    for m, source in enumerate(progress["sources"]):
        i = sets["train"].ids().index(source["image"])
        image, x, (p, before) = sets["train"].read(i)[0], clean(sets["train"], i), (
            net.prototypes[m], progress["prototypes_before"][m])
        z = net.features(x)[0, :, source["row"], source["column"]]
        assert torch.allclose(p, z, atol=1e-4) and source["label"] == sets["train"].labels[i]
        assert source["distance"] == pytest.approx((z - before).square().sum().item(), abs=1e-3)
        y0, y1, x0, x1 = protopool.activation_box(net.similarity_maps(x)[0, m], image.shape[1:])
        assert torch.equal(source["patch"], image[:, y0:y1, x0:x1])
    best = run.read_checkpoint(out / "best.pt")["model"]
    alive = protopool.harden(protopool.assign(best["q"], 0.001)).flatten(0, 1).any(0)
    assert torch.equal(progress["prototypes_before"], best["prototypes"][alive])
    assert torch.equal(progress["soft"].argmax(-1), net.q.argmax(-1))   # the same numbers in all figures
    swapped = dict(train=sets["val"], val=sets["train"])                # as a new image may move one to val
    places = protopool_figures.places_of(progress["sources"], swapped, "")
    assert [data.id_of(i) for data, i in places] == [source["image"] for source in progress["sources"]]
    assert not torch.equal(net.last_layer.weight, net.own_slots())
    for name in ("accuracy", "accuracy_after_projection", "accuracy_before_projection"):
        logits = torch.cat([net(clean(sets["test"], i))[0] for i in range(12)])
        hits = logits.argmax(1) == torch.tensor(sets["test"].labels)
        assert metrics[name] == pytest.approx(100 * hits.double().mean().item())
        if name == "accuracy_after_projection":
            net.prototypes.data = progress["prototypes_before"]
        net.last_layer.weight.data = net.own_slots()


def test_the_numbers_of_sharing_are_those_of_the_slots(trained):
    out = trained("protopool")
    metrics, saved = read(out / "metrics.json"), run.read_checkpoint(out / "last.pt")
    table, weight = saved["model"]["q"].numpy(), saved["model"]["last_layer.weight"]     # fixed: 0/1, (C,K,M)
    assert set(np.unique(table)) <= {0, 1} and table.sum(2).max() == 1
    holds = [set(np.flatnonzero(table[c].any(0))) for c in range(12)]
    counts, filled = [sum(m in held for held in holds) for m in range(table.shape[2])], int(table.sum())
    pairs = [len(holds[a] & holds[b]) for a in range(12) for b in range(a)]
    assert min(counts) > 0                                              # the dead are pruned
    own = torch.eye(12).repeat_interleave(2, 1).bool()
    expected = dict(classes_of_each_prototype=counts, prototypes_used=len(counts), slots_in_all=24,
                    prototypes_pruned=24 - len(counts), classes_per_prototype=np.mean(counts),
                    empty_slots=24 - filled, repeated_slots=filled - sum(map(len, holds)),
                    shared_per_class_pair=np.mean(pairs), negative_weights=int((weight < 0).sum()),
                    off_class_weight=weight[~own].abs().mean().item())
    assert all(metrics[name] == pytest.approx(value) for name, value in expected.items())


def test_birds_tell_whether_the_explanation_is_true(trained):
    """Purity: of the ten test images most similar to a prototype, the share whose box holds the same part."""
    out = trained("protopool")
    metrics, (net, sets, _) = read(out / "metrics.json"), opened(out)
    for name in ("purity_by_chance", "consistency", "consistency_home", "consistency_guests", "stability",
                 "box_area", "true_slots"):
        assert 0 <= metrics[name] <= 100, name
    assert 0 <= metrics["variant_purity"] <= metrics["purity"] + 1e-4
    similarity, inside = [], []
    for i in range(12):
        maps, places = net.similarity_maps(clean(sets["test"], i))[0], sets["test"].part_locations(i) / 3
        similarity.append((maps.amax((1, 2)) - maps.mean((1, 2))).numpy())
        inside.append([[bool(v) and y0 <= y < y1 and x0 <= x < x1 for x, y, v in places.tolist()]
                       for y0, y1, x0, x1 in (protopool.activation_box(map, 32) for map in maps)])
    order, inside = np.argsort(-np.array(similarity), 0, kind="stable")[:10], np.array(inside)
    purity = [inside[order[:, m], m].mean(0).max() for m in range(order.shape[1])]
    assert metrics["purity"] == pytest.approx(100 * np.mean(purity), abs=1.0)
    assert metrics["parts_per_box"] == pytest.approx(inside.sum(2).mean(), abs=0.02)


# ---- explanations, comparisons, ensembles ----

def test_an_explanation_adds_up_to_the_logit(trained):
    """own + rest = logit; a term is a filled slot of the predicted class, the largest product first."""
    net, sets, progress = opened(trained("protopool"))
    torch.manual_seed(0)
    net.last_layer.weight.data += 0.3 * torch.randn(12, 24)             # negative weights, others' slots
    net.q.data[:3, 0] = 0                                               # empty slots
    for i in range(4):
        facts = protopool.explanation(net, progress["classes"], 32, sets["test"].read(i)[0], "")
        logits, slots = net(clean(sets["test"], i))[0][0], net.slot_scores(clean(sets["test"], i))[0]
        c, weight = int(logits.argmax()), net.last_layer.weight
        own = [(int(net.q[c, k].argmax()), slots[2 * c + k].item(), weight[c, 2 * c + k].item())
               for k in range(2) if net.q[c, k].any()]
        expected = sorted(((m, g, w, g * w) for m, g, w in own), key=lambda term: -term[3])
        names = ("prototype", "similarity", "weight", "product")
        assert np.allclose([[term[name] for name in names] for term in facts["slots"]], expected, atol=1e-4)
        assert facts["prediction"] == progress["classes"][c]
        assert facts["probability"] == pytest.approx(logits.softmax(0)[c].item(), abs=1e-5)
        assert facts["own"] == pytest.approx(sum(term[3] for term in expected), abs=1e-4)
        assert facts["own"] + facts["rest"] == pytest.approx(facts["logit"], abs=1e-9)
        assert facts["logit"] == pytest.approx(logits[c].item(), abs=1e-4)


def test_pictures_are_explained_and_classes_compared(trained, tmp_path):
    out, pictures = shutil.copytree(trained("protopool"), tmp_path / "run"), tmp_path / "pictures"
    pictures.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (50, 37, 4), dtype=np.uint8)
    for name, image in (("clear", pixels), ("grey", pixels[..., 0])):   # transparent; without colours
        Image.fromarray(image).save(pictures / f"{name}.png")
    printed = done("protopool", "--out", out, "--explain", pictures)
    assert files(out / "explanations") == {"grey.png", "grey.json", "clear.png", "clear.json"}
    for name in ("grey", "clear"):
        facts = read(out / "explanations" / f"{name}.json")
        assert facts["image"] == f"{name}.png" and f"= {facts['logit']:.2f}" in printed
    printed = done("protopool", "--out", out, "--compare", "lake_wren", "dune_lark")
    assert "pair-lake_wren-dune_lark" in printed
    for path in ("figures/pair-lake_wren-dune_lark.png", "explanations/grey.png", "explanations/clear.png"):
        with Image.open(out / path) as drawn:
            assert drawn.mode == "RGB" and min(drawn.size) > 100
    shutil.copy(pictures / "grey.png", pictures / "grey.jpg")           # would be written over the first
    before = files(out)
    assert "rename" in mistake("protopool", "--out", out, "--explain", pictures) and files(out) == before


def test_an_ensemble_averages_probabilities(trained, linear_and_official, tmp_path):
    runs, chances = (trained("protopool"), linear_and_official[1]), []
    done("protopool", "--out", tmp_path, "--ensemble", *runs, "--device", "cpu")
    for out in runs:
        sets = protopool.open_splits(run.read_config(protopool.Config, out))
        net, _ = protopool.load_run(run.read_config(protopool.Config, out), CPU)
        chances.append(torch.cat([net(clean(sets["test"], i))[0].softmax(1) for i in range(12)]))
    labels = torch.tensor(sets["test"].labels)
    hits = [100 * (chance.argmax(1) == labels).double().mean().item() for chance in (*chances, sum(chances))]
    result = read(tmp_path / "ensemble" / "metrics.json")
    assert [*result["accuracies"], result["accuracy"]] == pytest.approx(hits)
    assert files(tmp_path / "ensemble") == {"metrics.json", "classes_per_prototype.png", "class_graph.png",
                                            "class_graph.csv", "report.html"}


def test_tables_change_what_they_say_and_print_the_papers_numbers(tmp_path):
    """Table 3: before and after the projection. Table 4: ResNet-50 on CUB and Cars. Fig. 11: its ticks."""
    def table(number, preset="cub-r34"):
        return protopool.table_of(run.parse_config(protopool.Config, protopool.PRESETS,
                                                   ["--preset", preset, "--table", number]))
    printed = {"cub-r34": (80.8, 80.3), "cub-r50-inat": (85.9, 85.5), "cub-r152": (81.2, 81.5),
               "cars-r34": (89.1, 89.3), "cars-r50": (88.4, 88.9), "toy": (None, None)}
    assert {name: table("3", name).paper["ProtoPool"] for name in printed} == printed
    assert list(table("3").columns.values())[:3] == [
        "accuracy_before_projection", "accuracy_after_projection", "accuracy"]
    rows = {"ProtoPool": ({}, 85.5, 88.9), "w/o orthogonality": (dict(w_orth=0), 82.4, 86.8),
            "w/o Gumbel-softmax": (dict(gumbel=False), 80.3, 64.5),
            "w/o both": (dict(gumbel=False, w_orth=0), 65.1, 30.8),
            "w/o focal similarity": (dict(focal=False), 85.3, 88.8)}
    assert {name: (changes, *table("4").paper[name]) for name, changes in table("4").rows.items()} == rows
    assert [row["slots"] for row in table("11b").rows.values()] == [4, 6, 8, 10, 12, 14]
    sizes = [row["prototypes"] for row in table("11a").rows.values()]
    assert (sizes[0], sizes[-1]) == (50, 505) and 202 in sizes


def test_rows_of_a_table_share_a_pretraining_and_end_like_runs_of_their_own(no_figures, tmp_path):
    argv = [*SHORT["protopool"], "--joint-epochs", 1, "--finetune-epochs", 1]
    done("protopool", "--out", tmp_path, *argv, "--table", 4)
    assert {f"figure{n}.png" for n in (2, 14, 15, 17)} <= files(tmp_path)
    done("protopool", "--out", tmp_path / "alone", *argv, "--no-gumbel", "--w-orth", 0)
    assert_same_run(tmp_path / "alone", tmp_path / "rows" / "no-both")
    rows = tmp_path / "rows"
    assert len({path.read_text().splitlines()[1] for path in rows.glob("*/log.csv")}) == 1    # its time too
    assert len(list(rows.iterdir())) == 6 and not list(rows.rglob("previous-*"))
    cfg = config(tmp_path, "--table", "11b")
    table = protopool.table_of(cfg)
    protopool_figures.draw_table(table, {row: [dict(accuracy=50.0)] for row in table.rows}, None, cfg)
    assert "figure11b.png" in files(tmp_path)


@pytest.mark.parametrize("kind", ["chain", "single", "flip", "none"])
def test_augmentation_warps_flips_half_the_time_and_shows_no_border(kind):
    """Vertical flips in the chain alone. Outside the picture all would be black. The seed decides."""
    def augmented(image, count=300):
        torch.manual_seed(0)
        drawn = zip(*(protopool.augment(image, kind) for _ in range(count)))
        return warp(*map(torch.stack, drawn))
    white, image = torch.full((3, 33, 33), 255, dtype=torch.uint8), torch.zeros(3, 24, 24, dtype=torch.uint8)
    assert (augmented(white) == 255).all()
    image[0, :, :12], image[1, :12] = 200, 200                          # red is left, green is above
    red, green = augmented(image).float().unbind(1)[:2]
    mirrored = (red[..., 12:].mean((1, 2)) > red[..., :12].mean((1, 2))).float().mean()
    upside_down = (green[:, 12:].mean((1, 2)) > green[:, :12].mean((1, 2))).float().mean()
    assert mirrored == 0 if kind == "none" else 0.4 < mirrored < 0.6
    assert 0.4 < upside_down < 0.6 if kind == "chain" else upside_down == 0
    noise = torch.randint(0, 256, (3, 21, 21), dtype=torch.uint8)
    looks = {str(picture.byte().tolist()) for picture in augmented(noise, 40)}
    exact = [str(noise.tolist()), str(noise.flip(2).tolist())]
    assert looks == set(exact[:1 if kind == "none" else 2]) if kind in ("none", "flip") else len(looks) > 30


# ---- mistakes ----

@pytest.mark.parametrize("argv, words", [
    (["--dataset", "imagefolder"], ["--data"]), (["--preset", "cub-r34"], ["--data"]),
    (["--dataset", "imagefolder", "--data", "nowhere"], ["nowhere", "train/"]),
    (["--slots", "9", "--prototypes", "8"], ["--slots 9", "--prototypes 8"]),
    (["--prototypes-from", "patches", "--pretrain-epochs", "0"], ["--pretrain-epochs 0"]),
    (["--table", "4", "--classifier", "linear"], ["--table", "--classifier linear"]),
    (["--compare", "one", "two"], ["holds no run"]), (["--explain", "x.png"], ["holds no run"]),
    (["--ensemble", "nowhere"], ["nowhere holds no run"]),
])
def test_mistakes_of_its_own(tmp_path, argv, words):
    sentence = mistake("protopool", "--out", tmp_path / "out", "--device", "cpu", *argv)
    assert all(word in sentence for word in words) and not (tmp_path / "out").exists(), sentence


def test_runs_that_cannot_be_explained_compared_or_joined_are_named(trained, linear_and_official, tmp_path):
    out, linear, foreign = trained("protopool"), linear_and_official[0], trained("cbp_occl")
    cfg, birds = config(tmp_path / "cut"), ("--compare", "dune_lark", "lake_wren")
    _, net, sets, progress = begin(cfg)
    protopool.train_phase(net, "joint", sets, progress, cfg, MACHINE)   # killed before the projection
    other = shutil.copytree(out, tmp_path / "other")
    shutil.copy(linear / "last.pt", other)
    for folder, argv, words in (
            (out, ["--compare", "dune_lark", "dog"], "'dog'.*alder_robin, brook_finch"),
            (out, [*birds, "elm_warbler"], "two different class names"), (linear, birds, "plain classifier"),
            (out, ["--resume", "--slots", 3], "contradicts"), (other, ["--resume"], "does not fit"),
            (tmp_path, ["--ensemble", out, linear], re.escape(str(linear))),
            (tmp_path, ["--ensemble", out, f"{out}/"], "name it once"),
            (tmp_path, ["--ensemble", out, foreign], re.escape(str(foreign))),
            (cfg.out, ["--eval-only"], "phase joint.*--resume"), (cfg.out, birds, "phase joint.*--resume")):
        assert re.search(words, mistake("protopool", "--out", folder, *argv))


@pytest.mark.gpu
@both_readings
def test_gpu_a_run_trains_in_bf16_projects_resumes_and_explains(tmp_path, reading):
    argv = [*SHORT["protopool"], "--device", "cuda", "--reading", reading]
    done("protopool", "--out", tmp_path / "run", *argv)
    metrics = read(tmp_path / "run" / "metrics.json")
    assert metrics["device"] == "cuda" and metrics["prototypes_used"] > 0
    done("protopool", "--out", tmp_path / "run", "--resume")
    Image.effect_noise((40, 60), 90).save(tmp_path / "grey.png")
    done("protopool", "--out", tmp_path / "run", "--explain", tmp_path / "grey.png")
