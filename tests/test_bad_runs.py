"""What would go wrong in silence, or in a traceback, around a run: settings from Python and beside --table,
scores of other splits, a failed start, full disks, memory, float16. Masks: test_bad_data.py; weights:
test_bad_weights.py."""
import importlib
import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import cbp_occl
from commands import (SCRIPTS, SHORT, assert_same_run, call, copy_of, done, files, interrupt, log_of,
                      mistake, numbers, read, same)
from common import run, toy_scenes

pytestmark = pytest.mark.usefixtures("few_toys", "no_figures")
every_script = pytest.mark.parametrize("name", SCRIPTS)


# ---- settings ----

@every_script
@pytest.mark.parametrize("flags, words", [
    (dict(colour="red"), "no option colour"), (dict(batch_sise=3), "did you mean batch_size"),
    (dict(batch_size="many"), "--batch-size many: must be int"), (dict(batch_size=2.5), "--batch-size 2.5"),
    (dict(batch_size=True), "--batch-size True: must be int"),
    (dict(lr=float("nan")), "--lr nan"), (dict(lr=[1e-3]), "--lr .*must be float"),
    (dict(seed=2 ** 70), "--seed"), (dict(device="gpu"), "--device gpu: choose one of"),
    (dict(eval_only="no"), "--eval-only no: must be bool"), (dict(dataset="Toy"), "--dataset Toy: choose"),
    (dict(preset="Toy"), "preset 'Toy' does not exist"), (dict(data=None), "--data None: must be str")])
def test_settings_from_python_are_checked_as_those_of_the_command_line(name, flags, words):
    script = importlib.import_module(name)
    with pytest.raises(run.UserError, match=words):
        run.make_config(script.Config, script.PRESETS, **{"preset": "toy", **flags})


@every_script
def test_python_and_command_line_make_the_same_settings(trained, name, monkeypatch):
    """A run's own settings go with what works on it, and a notebook's run folder bears the script's name."""
    script = importlib.import_module(name)
    monkeypatch.setattr("sys.argv", ["colab_kernel_launcher.py"])
    cfg = run.make_config(script.Config, script.PRESETS, data=Path("here"), batch_size="6", seed=3.0)
    assert (cfg.out, cfg.data, cfg.batch_size, cfg.seed) == (f"runs/{name}-toy", "here", 6, 3)
    default = run.make_config(script.Config, script.PRESETS)
    option = dict(explain="x.png") if name == "protopool" else dict(predict=Path("x.png"))
    found = run.make_config(script.Config, script.PRESETS, out=trained(name), **option)
    assert found.batch_size == read(trained(name) / "config.json")["batch_size"] != default.batch_size


@pytest.mark.parametrize("name, argv, words", [
    ("cbp_occl", "--table 6 --classifier learnable", "--classifier learnable.*rows"),
    ("cbp_occl", "--table 3 --resume", "--resume and --table.*goes on by itself"),
    ("cbp_occl", "--predict x.png --eval-only", "--eval-only and --predict are separate"),
    ("cbp_occl", "--table 5 --prototypes ROWS", r"\(13, 64\) do not fit 14 classes"),
    ("protopool", "--table 4 --w-orth 0.5", "--w-orth 0.5.*rows"),
    ("scaleprotoseg", "--table 5 --method deeplab", "--method deeplab.*rows"),
    ("scaleprotoseg", "--table 7 --threshold 0.2", "--threshold 0.2.*rows"),
    ("pfa_scribble", "--table 2 --augment local", "--augment local.*rows")])
def test_a_table_takes_no_flag_that_its_rows_set_and_checks_all_rows_first(tmp_path, name, argv, words):
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(13, 64)))
    argv = argv.replace("ROWS", str(tmp_path / "rows.npy")).split()
    sentence = mistake(name, "--out", tmp_path / "out", *SHORT[name], *argv)
    assert re.search(words, sentence) and not (tmp_path / "out").exists(), sentence


def test_stage_1_brings_its_settings(trained, tmp_path):
    first = trained("scaleprotoseg")
    short = " ".join(SHORT["scaleprotoseg"]).replace("--crop 48", "").replace("--prototypes 2", "").split()
    done("scaleprotoseg", "--out", tmp_path, *short, "--stage1", first, "--w-entropy", 0.3)
    ours, theirs = read(tmp_path / "config.json"), read(first / "config.json")
    assert {key for key in ours if ours[key] != theirs[key]} == {"out", "stage1", "w_entropy"}


# ---- scores ----

@pytest.mark.parametrize("name", ["cbp_occl", "scaleprotoseg", "pfa_scribble"])
def test_scores_of_another_split_do_not_replace_those_of_the_run(trained, tmp_path, name):
    out = copy_of(trained(name), tmp_path / "run")
    before = (out / "metrics.json").read_bytes()
    done(name, "--out", out, "--eval-only", "--test-split", "val")
    assert (out / "metrics.json").read_bytes() == before
    other, own, last = read(out / "eval-val" / "metrics.json"), json.loads(before), log_of(out)[-1]
    assert (other["split"], own["split"]) == ("val", "test")
    miou = other["miou"]["plain"]["plain"] if name == "pfa_scribble" else other["miou"]
    assert miou == pytest.approx(float(last.get("val_plain") or last.get("val_miou") or last["miou"]))
    for window, equal in ((128, True), (48, False)):                    # the images have 128 pixels a side
        done(name, "--out", out, "--eval-only", "--window", window)
        assert (out / "metrics.json").read_bytes() == before
        assert (read(out / f"eval-test-window-{window}" / "metrics.json")["iou"] == own["iou"]) == equal
    done(name, "--out", out, "--eval-only")
    assert same(numbers(read(out / "metrics.json")), numbers(own))


@every_script
def test_a_run_that_changed_on_disk_is_told(trained, tmp_path, name):
    out = copy_of(trained(name), tmp_path / "run")
    saved, config = torch.load(out / "last.pt", weights_only=True), read(out / "config.json")
    saved["progress"]["images"] += 1                                   # as if an image had been added
    torch.save(saved, out / "last.pt")
    told = "began with other training images"
    assert told in done(name, "--out", out, "--resume")
    assert told not in done(name, "--out", out, "--eval-only")
    log = run.Log(out, dict(seconds=0, sums={}, log=[]), run.Machine(torch.device("cpu")))
    del config["batch_size"]
    run.write_json(out / "config.json", config)
    assert "config.json has no batch_size" in done(name, "--out", out, "--eval-only")
    run.write_json(out / "config.json", config | dict(lr="fast"))
    assert "config.json holds a wrong value: --lr fast" in mistake(name, "--out", out, "--eval-only")
    with pytest.raises(run.UserError, match="another run has begun in"):
        log.row("", {}, {}, "")
    run.start_run(run.make_config(cbp_occl.Config, cbp_occl.PRESETS, out=tmp_path / "new"), log.machine)
    run.write_json(tmp_path / "new" / "config.json", config)           # by another run
    run.undo_start()
    assert read(tmp_path / "new" / "config.json") == config
    with pytest.raises(run.UserError, match="cannot be written .*: choose another"):
        run.write_json(tmp_path / ("x" * 300), {})


# ---- what the machine refuses ----

def stop_with(monkeypatch, error):
    def add(log, losses):
        raise error
    monkeypatch.setattr(run.Log, "add", add)


@every_script
def test_a_failed_start_leaves_the_earlier_run_where_it_was(trained, tmp_path, monkeypatch, name):
    out = copy_of(trained(name), tmp_path / "run")
    (out / "mine.txt").write_text("notes")
    before = {path: (out / path).read_bytes() for path in files(out)}
    stop_with(monkeypatch, run.UserError("the first image is damaged."))
    for folder in (out, tmp_path / "new"):
        assert "first image" in mistake(name, "--out", folder, *SHORT[name])
    assert {path: (out / path).read_bytes() for path in files(out)} == before
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk without room")
def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays(trained, tmp_path):
    interrupt("cbp_occl", 5, "--out", tmp_path, *SHORT["cbp_occl"])
    before = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt.tmp").symlink_to("/dev/full")
    sentence = mistake("cbp_occl", "--out", tmp_path, "--resume")
    assert f"{tmp_path / 'last.pt'} cannot be written (No space left on device)" in sentence
    assert (tmp_path / "last.pt").read_bytes() == before
    assert files(tmp_path) <= {"config.json", "log.csv", "last.pt"}
    done("cbp_occl", "--out", tmp_path, "--resume")
    assert_same_run(trained("cbp_occl"), tmp_path)


def test_a_killed_loader_process_is_one_sentence(tmp_path, monkeypatch):
    def killed(*args):
        os.kill(os.getpid(), signal.SIGKILL)
    argv = [*SHORT["cbp_occl"], "--workers", 1]
    scene, first = toy_scenes.make_scene, os.getpid()
    monkeypatch.setattr(toy_scenes, "make_scene",
                        lambda *args: scene(*args) if os.getpid() == first else killed())
    sentence = mistake("cbp_occl", "--out", tmp_path, *argv)
    assert "loader process" in sentence and "--workers" in sentence and "--resume" in sentence


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 TB"),
                                   RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")])
def test_too_little_memory_names_the_batch_in_training_and_else_the_image(tmp_path, monkeypatch, error):
    def out_of_memory(*args):
        raise error
    with monkeypatch.context() as patch:
        stop_with(patch, error)
        assert "--batch-size" in mistake("cbp_occl", "--out", tmp_path / "a", *SHORT["cbp_occl"])
    monkeypatch.setattr(cbp_occl, "predict_labels", out_of_memory)
    sentence = mistake("cbp_occl", "--out", tmp_path / "b", *SHORT["cbp_occl"])
    assert "image" in sentence and "--batch-size" not in sentence
    monkeypatch.setattr(cbp_occl, "evaluate", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):                              # a bug is not hidden
        call("cbp_occl", "--out", tmp_path / "c", *SHORT["cbp_occl"])


def test_the_first_process_speaks_for_all_of_torchrun(tmp_path, monkeypatch):
    """The others wait, and torchrun ends them before they repeat the sentence."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(run.time, "sleep", lambda seconds: (_ for _ in ()).throw(SystemExit(-15)))
    for argv in (["--lr", -1], ["--no-such-flag"]):
        ended = call("cbp_occl", "--out", tmp_path / "out", *argv)
        assert (ended.returncode, ended.stderr) == (-15, "")


# ---- float16 ----

def test_auto_takes_bfloat16_only_where_a_gpu_computes_in_it(monkeypatch):
    gpu, asked = torch.device("cuda"), []
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation=True: asked.append(including_emulation) or native)
        assert run.precision(gpu) == ("bf16" if native else "off") and asked[-1] is False
    assert run.precision(torch.device("cpu")) == "off" and run.precision(gpu, "fp16") == "fp16"


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler")
def test_a_float16_step_that_overflows_changes_nothing_and_a_resumed_run_keeps_its_scale(tmp_path):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for factor, expected in ((0.5, 0.5), (3e38, 0.5), (0.25, 0.25)):    # 65536 times 3e38 is infinite
        optimizer.zero_grad()
        run.backward((factor * weight).sum(), optimizer, "fp16")
        run.step(optimizer)
        assert weight.tolist() == [expected] * 2
    assert optimizer.scaler.get_scale() == 32768
    flags = [*SHORT["cbp_occl"], "--amp", "fp16"]
    done("cbp_occl", "--out", tmp_path / "whole", *flags)
    interrupt("cbp_occl", 5, "--out", tmp_path / "cut", *flags)
    done("cbp_occl", "--out", tmp_path / "cut", "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
