"""Command lines of the scripts, called in this process: a new one spends seconds importing torch."""
import contextlib
import csv
import importlib
import io
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common import run

ROOT = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
SCRIPTS = ("cbp_occl", "protopool", "scaleprotoseg", "pfa_scribble")
PAGES = dict(zip(SCRIPTS, ("cbp_occl_page", "protopool_page", "scaleprotoseg_page", "pfa_page")))
SHORT = {                                       # a few steps of every phase on the toy data of conftest.py
    "cbp_occl": "--iterations 6 --eval-every 3 --save-every 2 --batch-size 4 --crop 64 --warmup 2",
    "protopool": "--size 32 --prototypes 24 --slots 2 --depth 8 --batch-size 6 --passes-per-epoch 1 "
                 "--pretrain-epochs 1 --warmup-epochs 1 --joint-epochs 2 --finetune-epochs 2",
    "scaleprotoseg": "--crop 48 --batch-size 4 --depth 6 --rates 1 2 --prototypes 2 --warmup 4 --joint 4 "
                     "--finetune 4 --group-warmup 4 --group-joint 4 --eval-every 3 --save-every 2 "
                     "--equivariance 0",
    "pfa_scribble": "--crop 64 --batch-size 4 --iterations 14 --warmup 3 --slots 1 --head-channels 16 "
                    "--hidden 8 --eval-every 5 --save-every 2 --classifier-iterations 5 "
                    "--classifier-size 32",
}
SHORT = {name: ["--device", "cpu", *flags.split()] for name, flags in SHORT.items()}


def call(script, *argv):
    """`python SCRIPT.py ARGV` -> returncode, stdout, stderr. script: a module or its name."""
    script = importlib.import_module(script) if isinstance(script, str) else script
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [f"{script.__name__}.py", *map(str, argv)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run.run_script(script.main, script.Config, script.PRESETS, script.__doc__)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = before
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def done(script, *argv):
    """What a command that must succeed prints."""
    ended = call(script, *argv)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def mistake(script, *argv):
    """The one sentence with which a command must end, exit code 2."""
    ended = call(script, *argv)
    name = script if isinstance(script, str) else script.__name__
    lines = ended.stderr.splitlines()
    sentences = [line for line in lines if line.strip() and "it/s]" not in line]       # no progress bars
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert len(sentences) == 1 and sentences[0].startswith(f"{name}.py: "), ended.stderr
    return sentences[0]


def interrupt(name, place, *argv):
    """Ctrl-C at step number `place`, or where the report begins -> names of the losses of each step."""
    steps, add = [], run.Log.add

    def stopping_add(log, losses):
        steps.append(tuple(losses))
        if len(steps) == place:
            raise KeyboardInterrupt
        add(log, losses)

    def stop(*args):
        raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Log, "add", stopping_add)
        if place == "report":
            patch.setattr(run, "facts", stop)
        ended = call(name, *argv)
    assert ended.returncode == 130 and "--resume" in ended.stderr, ended.stdout + ended.stderr
    return steps


# ---- what a run leaves ----

def copy_of(out, folder):
    """A run folder that a command may change."""
    return Path(shutil.copytree(out, folder, ignore=shutil.ignore_patterns("figures", "previous-*")))


def files(path):
    return {str(p.relative_to(path)) for p in Path(path).rglob("*") if p.is_file()}


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def log_of(out):
    """Rows of log.csv without their times."""
    with open(Path(out) / "log.csv") as file:
        return [numbers(row) for row in csv.DictReader(file)]


def numbers(metrics):
    """Without what a clock measured, and without what protopool's figures tell."""
    return {k: v for k, v in metrics.items() if k not in ("seconds", "images_per_second", "explanations")}


def same(a, b):
    """Bit for bit, through dicts, lists and tensors; seconds aside."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[k], b[k]) for k in a if k != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a and b != b                                  # nan equals nan


def assert_same_run(a, b):
    """Weights, optimizer, random numbers, log and metrics of two run folders are equal bit for bit."""
    for path in sorted(Path(a).glob("*.pt")):
        assert same(run.read_checkpoint(path), run.read_checkpoint(Path(b) / path.name)), path.name
    assert same(numbers(read(a / "metrics.json")), numbers(read(b / "metrics.json")))
    assert log_of(a) == log_of(b)
