"""What all four scripts promise to their users, said once for all of them.

A run leaves its files; the seed decides it; interrupted anywhere and resumed it ends with the numbers of
an uninterrupted one; two processes are one; --eval-only repeats the metrics; --predict writes ids and
overlays; a table keeps its finished rows; a mistake is one sentence, exit code 2, and nothing is lost.
"""
import importlib
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

from commands import (ENV, ROOT, SCRIPTS, SHORT, assert_same_run, copy_of, done, files, interrupt, log_of,
                      mistake, numbers, read, same)
from common import run

every_script = pytest.mark.parametrize("name", SCRIPTS)
pytestmark = pytest.mark.usefixtures("few_toys")


# ---- a run ----

LOSSES = {"cbp_occl": {"ce", "occl"}, "protopool": {"ce", "cluster", "separation", "orth", "l1"},
          "scaleprotoseg": {"ce", "diversity", "l1", "entropy"},
          "pfa_scribble": {"pce", "con_local", "con_global"}}
FACTS = {"preset": "toy", "seed": 0, "split": "test", "finished": True, "device": "cpu", "processes": 1}


@every_script
def test_a_run_leaves_its_files_its_numbers_and_one_line_about_time_and_memory(trained, name):
    out = trained(name)
    assert {"config.json", "log.csv", "metrics.json", "last.pt"} <= files(out)
    assert not [path for path in files(out) if path.endswith((".tmp", ".part"))]
    metrics = read(out / "metrics.json")
    assert {name: metrics[name] for name in FACTS} == FACTS and metrics["seconds"] > 0
    rows = log_of(out)
    assert len(rows) >= 2 and LOSSES[name] <= set(rows[0])
    for row in rows:
        assert all(np.isfinite(float(row[loss])) for loss in LOSSES[name] if row[loss])
    first = next(line for line in (out / "printed.txt").read_text().splitlines() if " steps of " in line)
    assert "s a step" in first and "GiB" in first and "amp off" in first


@every_script
def test_figures_are_pictures_that_show_something(trained, name):
    pictures = sorted((trained(name) / "figures").rglob("*.png"))
    assert len(pictures) >= 2
    for path in pictures:
        with Image.open(path) as image:
            assert image.mode == "RGB" and min(image.size) >= 40 and max(image.size) <= 4000, path
            assert any(low < high for low, high in image.getextrema()), path


@every_script
def test_the_seed_decides_and_announcing_the_time_changes_nothing(trained, no_figures, tmp_path, name):
    done(name, "--out", tmp_path / "again", *SHORT[name])
    assert_same_run(trained(name), tmp_path / "again")
    done(name, "--out", tmp_path / "other", *SHORT[name], "--seed", 1)
    assert log_of(tmp_path / "other") != log_of(trained(name))


@every_script
def test_eval_only_repeats_the_metrics(trained, no_figures, tmp_path, name):
    out = copy_of(trained(name), tmp_path / "run")
    done(name, "--out", out, "--eval-only")
    assert same(numbers(read(out / "metrics.json")), numbers(read(trained(name) / "metrics.json")))


@pytest.mark.parametrize("name", ["cbp_occl", "scaleprotoseg", "pfa_scribble"])
def test_predict_writes_ids_and_overlay_at_the_images_own_size(trained, tmp_path, name):
    out = copy_of(trained(name), tmp_path / "run")
    sizes = {"photo0": (90, 70), "photo1": (64, 131)}
    for k, (stem, (width, height)) in enumerate(sizes.items()):
        pixels = np.random.default_rng(k).integers(0, 255, (height, width, 3), dtype=np.uint8)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{stem}.png")
    done(name, "--out", out, "--predict", tmp_path / "photos")
    assert len(files(out / "predictions")) == 4
    for stem, size in sizes.items():
        with Image.open(out / "predictions" / f"{stem}.png") as ids:
            assert ids.size == size and ids.mode == "P" and np.asarray(ids).max() < 14
        with Image.open(out / "predictions" / f"{stem}_overlay.png") as overlay:
            assert overlay.size == size and overlay.mode == "RGB"


# ---- interrupted and resumed ----

KILLS = {"cbp_occl": (1, 3, 3), "protopool": (2, 3, 3, 3, 3, 4), "scaleprotoseg": (3, 5, 5, 5, 5),
         "pfa_scribble": (2, 3, 4, 6, 5)}              # steps after a start: one kill in each phase at least


@every_script
def test_a_run_killed_in_each_phase_and_resumed_ends_like_an_uninterrupted_one(trained, no_figures, tmp_path,
                                                                               name):
    argv, stopped = SHORT[name], set()
    for steps in KILLS[name]:
        stopped.add(interrupt(name, steps, "--out", tmp_path, *argv)[-1])
        assert not (tmp_path / "metrics.json").exists()
        argv = ["--resume"]
    interrupt(name, "report", "--out", tmp_path, "--resume")
    done(name, "--out", tmp_path, "--resume")
    assert_same_run(trained(name), tmp_path)
    assert len(stopped) == dict(cbp_occl=1).get(name, 3)               # kinds of steps by their losses


def test_kill_9_loses_at_most_what_came_after_the_last_checkpoint(tmp_path):
    flags = "--iterations 40 --eval-every 15 --save-every 2 --batch-size 4 --crop 64 --device cpu"
    command = [sys.executable, "cbp_occl.py", *flags.split(), "--out", str(tmp_path / "killed")]
    child = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "last.pt").exists() and child.poll() is None:
        time.sleep(0.02)
    time.sleep(0.2)
    child.send_signal(signal.SIGKILL)
    child.wait()
    iteration = run.read_checkpoint(tmp_path / "killed" / "last.pt")["progress"]["iteration"]
    assert 0 < iteration < 40 and not (tmp_path / "killed" / "metrics.json").exists()
    assert iteration % 2 == 0


# ---- several processes ----

TWO = """
import importlib, json, sys, torch, torch.distributed as dist
from common import pfa_figures, protopool_figures, run, scaleprotoseg_figures, speed, toy_birds, toy_scenes
toy_scenes.SPLITS, toy_birds.SPLITS = dict(train=8, val=2, test=3), dict(train=24, test=12)
speed.announce = lambda *args: None
pfa_figures.draw_figures = scaleprotoseg_figures.draw_figures = lambda *args: None
protopool_figures.draw_run = lambda *args: []

def watch(script, name, out):
    step = script.train_step

    def checked(model, *rest):
        terms = step(model, *rest)
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            net = model.module
            state = [*net.parameters(), *([net.memory.bank] if name == "pfa_scribble" else [])]
            mine = torch.cat([part.detach().flatten().double() for part in state])
            both = [torch.empty_like(mine) for _ in range(2)]
            dist.all_gather(both, mine)
            assert torch.equal(both[0], both[1]), "weights differ between processes"
            with open(f"{out}.steps{dist.get_rank()}", "a") as file:
                file.write("x")
        return terms
    script.train_step = checked

if __name__ == "__main__":
    dist.destroy_process_group = lambda: None                          # the next run goes on with this group
    for name, out, argv in json.load(open(sys.argv[1])):
        script = importlib.import_module(name)
        watch(script, name, out)
        sys.argv = [f"{name}.py", "--out", out, *argv]
        run.run_script(script.main, script.Config, script.PRESETS)
"""
MORE = {"cbp_occl": ["--classifier", "ema"], "pfa_scribble": ["--no-train-classifier"]}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """{script: its run with two processes}, all four in one launch."""
    folder = tmp_path_factory.mktemp("two")
    runs = [(name, str(folder / name), [*SHORT[name], *MORE.get(name, [])]) for name in SCRIPTS]
    (folder / "two.py").write_text(TWO)
    (folder / "runs.json").write_text(json.dumps(runs))
    argv = ["--standalone", "--nproc-per-node", "2", str(folder / "two.py"), str(folder / "runs.json")]
    ended = subprocess.run([sys.executable, "-m", "torch.distributed.run", *argv], cwd=ROOT, env=ENV,
                           capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder


@every_script
def test_two_processes_train_the_same_weights_and_evaluate_as_one(two_processes, no_figures, name):
    out = two_processes / name
    steps = [Path(f"{out}.steps{rank}").read_text() for rank in (0, 1)]
    assert steps[0] == steps[1] and len(steps[0]) >= 4
    two = read(out / "metrics.json")
    assert len(run.read_checkpoint(out / "last.pt")["rng"]) == 2
    done(name, "--out", out, "--eval-only")
    one = read(out / "metrics.json")
    assert (two.pop("processes"), one.pop("processes")) == (2, 1) and same(numbers(one), numbers(two))


# ---- tables ----

@pytest.mark.parametrize("name, number, flags, row", [
    ("cbp_occl", 6, "--iterations 2", "CBP + OCCL"),
    ("protopool", 3, "--pretrain-epochs 1 --joint-epochs 1 --finetune-epochs 1", "ProtoPool"),
    ("scaleprotoseg", 5, "--joint 2", "scaleprotoseg"),
    ("pfa_scribble", 5, "--no-train-classifier --iterations 5", "both")])
def test_a_table_has_a_value_a_seed_and_keeps_what_is_done(no_figures, tmp_path, name, number, flags, row):
    command = ["--out", tmp_path, *SHORT[name], "--table", number, *flags.split(), "--seeds", 2]
    done(name, *command)
    text = (tmp_path / f"table{number}.md").read_text()
    values = read(tmp_path / f"table{number}.json")
    assert "+-" in text and row in values and "paper" in text
    column = next(iter(values[row].values()))
    mean, deviation = np.mean(column), np.std(column, ddof=1)
    assert len(column) == 2 and any(f"{mean:.{k}f} +- {deviation:.{k}f}" in text for k in (1, 2)), text
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").rglob("last.pt")}
    first, second = sorted(path.parent for path in stamps)[:2]
    (first / "metrics.json").unlink()                                  # as if interrupted in the last moment
    shutil.rmtree(second)
    done(name, *command)
    assert (tmp_path / f"table{number}.md").read_text() == text
    assert {path for path in stamps if path.stat().st_mtime_ns != stamps[path]} == {second / "last.pt"}


# ---- mistakes ----

def outside(field):
    """Values that an option's limits exclude."""
    beyond = dict(above=0, at_least=-1, below=0, at_most=1)             # how far from the limit
    limits = {name: field.metadata[name] for name in beyond}
    return [limit + beyond[name] for name, limit in limits.items() if limit is not None]


@every_script
def test_every_option_refuses_values_outside_its_limits_and_choices(name):
    script = importlib.import_module(name)
    checked = 0
    for field in fields(script.Config):
        for value in [*outside(field), *(["no such"] if field.metadata["choices"] else [])]:
            value = [value] if field.type is list else value
            with pytest.raises(run.UserError, match=run.flag_of(field.name)):
                run.make_config(script.Config, script.PRESETS, "toy", out="unused", **{field.name: value})
            checked += 1
    assert checked >= 20
    numeric = [f for f in fields(script.Config) if f.type in (int, float) and f.name != "seed"]
    assert [f.name for f in numeric if not outside(f) and not f.metadata["choices"]] == []


@every_script
@pytest.mark.parametrize("argv, words", [
    (["--schedule", 0], ["--schedule 0"]), (["--preset", "none"], ["--preset"]),
    (["--iteration", 3], ["--help"]), (["--lr", "fast"], ["--lr", "fast"]), (["--table", 99], ["--table"]),
    (["--data", "somewhere"], ["somewhere"]), (["--weights", "gone.pth"], ["gone.pth"]),
    (["--seeds", 2], ["--seeds 2", "--table"]), (["--resume"], ["holds no run"]),
    (["--eval-only"], ["holds no run"]),
])
def test_a_mistake_is_one_sentence_before_anything_is_written(tmp_path, name, argv, words):
    sentence = mistake(name, "--out", tmp_path / "out", *SHORT[name], *argv)
    assert all(word in sentence for word in words), sentence
    assert not (tmp_path / "out").exists()


@every_script
def test_a_batch_must_split_over_the_processes(tmp_path, monkeypatch, name):
    monkeypatch.setenv("WORLD_SIZE", "2")
    sentence = mistake(name, "--out", tmp_path / "out", *SHORT[name], "--batch-size", 5)
    assert "--batch-size 5" in sentence and "multiple of 2" in sentence and not (tmp_path / "out").exists()


@every_script
def test_a_loss_that_is_not_finite_stops_the_run(no_figures, tmp_path, name):
    sentence = mistake(name, "--out", tmp_path, *SHORT[name], "--lr", "1e30")
    assert "not finite" in sentence and "--lr" in sentence and not (tmp_path / "metrics.json").exists()


@every_script
def test_checkpoints_and_settings_of_other_scripts_are_refused(trained, no_figures, tmp_path, name):
    for folder in ("foreign", "broken", "larger", "other"):
        (tmp_path / folder).mkdir()
        shutil.copy(trained(name) / "config.json", tmp_path / folder)
    run.save_checkpoint(tmp_path / "foreign" / "last.pt", dict(model=nn.Linear(2, 2)), dict(step=3, log=[]))
    (tmp_path / "broken" / "last.pt").write_bytes(b"half a file")
    saved = run.read_checkpoint(trained(name) / "last.pt")
    saved["model"]["more.weight"] = torch.ones(1)
    torch.save(saved, tmp_path / "larger" / "last.pt")
    run.write_json(tmp_path / "other" / "config.json", dict(preset="toy", colour="red"))
    for folder, words in (("foreign", "not a checkpoint of this script"), ("broken", "cannot be read"),
                          ("larger", "does not fit this model"), ("other", "not a config of this script")):
        for option in ("--eval-only", "--resume"):
            before = files(tmp_path / folder)
            sentence = mistake(name, "--out", tmp_path / folder, option)
            assert words in sentence and str(tmp_path / folder) in sentence
            assert files(tmp_path / folder) == before


@every_script
def test_a_run_of_other_classes_is_refused_and_left_as_it_was(trained, no_figures, tmp_path, name):
    out = copy_of(trained(name), tmp_path / "run")
    saved = run.read_checkpoint(out / "last.pt")
    saved["progress"]["classes"] = [f"thing {k}" for k in range(len(saved["progress"]["classes"]))]
    torch.save(saved, out / "last.pt")
    before = {path: (out / path).read_bytes() for path in files(out)}
    for option in ("--eval-only", "--resume"):
        sentence = mistake(name, "--out", out, option)
        assert str(out) in sentence and "thing 0" in sentence, sentence
        assert {path: (out / path).read_bytes() for path in files(out)} == before
