"""common/run.py: options, checkpoints that survive anything, learning rate, exit codes."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common import run, speed, tables
from common.run import RunConfig, UserError, opt

CPU = run.Machine(torch.device("cpu"))

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Config(RunConfig):
    iterations: int = opt(1000, "training steps", schedule=True)
    warmup: int = opt(100, "warm-up steps", schedule=True)
    lr: float = opt(0.1, "learning rate")
    flip: bool = opt(True, "mirror half of the images")
    predict: str = opt("", "image to label", runtime=True, uses_run=True)


PRESETS = {"toy": dict(iterations=50), "big": dict(iterations=8000, lr=0.5)}


def parse(*argv):
    return run.parse_config(Config, PRESETS, list(argv))


# ---- options ----

def test_flags_beat_preset_beats_defaults():
    assert (parse().iterations, parse().lr) == (50, 0.1)
    cfg = parse("--preset", "big", "--lr", "0.25", "--no-flip")
    assert (cfg.iterations, cfg.lr, cfg.flip, cfg.preset) == (8000, 0.25, False, "big")


def test_schedule_shortens_every_stage_in_proportion_and_nothing_else():
    cfg = parse("--preset", "big", "--schedule", "0.1")
    assert (cfg.iterations, cfg.warmup, cfg.lr) == (800, 10, 0.5)
    assert parse("--schedule", "0.0001").iterations == 1               # never to nothing
    assert parse("--warmup", "0", "--schedule", "0.1").warmup == 0     # 0 stays off


@pytest.mark.parametrize("argv, words", [
    (["--learning-rat", "1"], ["--learning-rat"]), (["--iteratons", "1"], ["--iterations"]),
    (["--preset", "huge"], ["huge", "toy"]), (["--lr", "fast"], ["--lr", "fast"]),
    (["--device", "tpu"], ["--device", "tpu"]), (["--iter", "5"], ["--iter"]),
])
def test_wrong_flags_stop_with_one_sentence_and_exit_code_2(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1
    assert all(word in message for word in words)


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for f in fields(Config):
        assert "--" + f.name.replace("_", "-") in text and f.metadata["help"][:20] in text


def test_resume_takes_the_runs_settings_and_refuses_contradictions(tmp_path):
    cfg = parse("--preset", "big", "--out", str(tmp_path), "--lr", "0.3", "--schedule", "0.1")
    run.start_run(cfg, CPU)
    again = parse("--out", str(tmp_path), "--resume", "--workers", "1")
    assert (again.preset, again.lr, again.iterations, again.workers, again.resume) == (
        "big", 0.3, 800, 1, True)
    same = parse("--preset", "big", "--out", str(tmp_path), "--lr", "0.3", "--schedule", "0.1", "--resume")
    assert asdict(same) == {**asdict(cfg), "resume": True}
    with pytest.raises(UserError, match=r"--lr 0.7 contradicts .*config.json"):
        parse("--out", str(tmp_path), "--resume", "--lr", "0.7")
    assert parse("--preset", "big", "--out", str(tmp_path), "--resume").lr == 0.3          # not the preset's
    with pytest.raises(UserError, match="--preset toy contradicts"):
        parse("--preset", "toy", "--out", str(tmp_path), "--resume")
    assert parse("--out", str(tmp_path), "--predict", "a.png").preset == "big"


def test_resume_without_a_run_names_the_folder(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} holds no run"):
        parse("--out", str(tmp_path), "--resume")
    (tmp_path / "config.json").write_text("{oops")
    with pytest.raises(UserError, match="config.json cannot be read"):
        parse("--out", str(tmp_path), "--resume")
    (tmp_path / "config.json").write_text('{"colour": 1}')
    with pytest.raises(UserError, match="config.json is not a config of this script"):
        parse("--out", str(tmp_path), "--resume")


def test_config_from_python_needs_no_command_line(tmp_path):
    cfg = run.make_config(Config, PRESETS, "big", out=str(tmp_path), schedule=0.5)
    assert cfg.iterations == 4000
    with pytest.raises(UserError, match="preset 'small' does not exist: choose one of toy, big"):
        run.make_config(Config, PRESETS, "small")
    with pytest.raises(UserError, match="--schedule"):
        run.make_config(Config, PRESETS, "toy", schedule=0.0)


@dataclass
class ListConfig(RunConfig):
    epochs: int = opt(40, "epochs", schedule=True)
    finetune: int = opt(None, "epochs of the last stage; a quarter of --epochs if not given", schedule=True)
    extra: int = opt(None, "stays as it is", schedule=True)
    parts: list = opt(("head", "wing"), "parts to draw")
    explain: list = opt((), "images to explain", runtime=True, uses_run=True)

    def __post_init__(self):
        if self.finetune is None:
            self.finetune = self.epochs // 4


def parse_lists(*argv):
    return run.parse_config(ListConfig, {"toy": {}, "short": dict(finetune=4)}, list(argv))


def test_a_list_option_takes_one_or_more_words():
    cfg = parse_lists()
    assert cfg.parts == ["head", "wing"] and cfg.explain == []
    cfg.parts.append("tail")
    assert parse_lists().parts == ["head", "wing"]                     # no Config changes the default
    cfg = parse_lists("--parts", "beak", "--seed", "3")
    assert (cfg.parts, cfg.seed) == (["beak"], 3)
    assert parse_lists("--parts", "1", "2", "3").parts == ["1", "2", "3"]


def test_an_empty_list_flag_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_lists("--parts")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "--parts" in message and message.count("\n") == 1


def test_help_shows_lists_and_no_default_of_none(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        parse_lists("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "--parts STR [STR ...] parts to draw (default head wing)" in text
    assert text.endswith("--explain STR [STR ...] images to explain")  # an empty default is not shown
    assert "(default 40)" in text and "None" not in text


def test_a_list_option_survives_the_run_folder_and_can_work_on_a_run(tmp_path):
    out = str(tmp_path)
    run.start_run(parse_lists("--out", out, "--parts", "tail", "beak"), CPU)
    assert json.loads((tmp_path / "config.json").read_text())["parts"] == ["tail", "beak"]
    cfg = parse_lists("--out", out, "--explain", "a.png", "b.png")
    assert cfg.explain == ["a.png", "b.png"] and cfg.parts == ["tail", "beak"]             # from the run
    assert parse_lists("--out", out, "--resume", "--parts", "tail", "beak").explain == []
    assert parse_lists("--out", out).parts == ["head", "wing"]         # an empty list asks for no run
    with pytest.raises(UserError, match="--parts .*wing.* contradicts"):
        parse_lists("--out", out, "--explain", "a.png", "--parts", "wing")
    with pytest.raises(UserError, match="holds no run"):
        parse_lists("--out", str(tmp_path / "none"), "--explain", "a.png")


def test_a_default_of_none_is_filled_once_then_scaled(tmp_path):
    assert (parse_lists().finetune, parse_lists().extra) == (10, None)
    assert parse_lists("--preset", "short").finetune == 4 and parse_lists("--finetune", "0").finetune == 0
    cfg = parse_lists("--schedule", "0.5", "--out", str(tmp_path))
    assert (cfg.epochs, cfg.finetune, cfg.extra) == (20, 5, None)
    again = replace(cfg, seed=1)                                       # runs __post_init__ again
    assert (again.epochs, again.finetune) == (20, 5)
    run.start_run(cfg, CPU)
    resumed = parse_lists("--out", str(tmp_path), "--resume")
    assert asdict(resumed) == {**asdict(cfg), "resume": True}          # not scaled a second time


@pytest.mark.parametrize("body, code, said", [
    ("raise UserError('mask a.png is broken: replace it.')", 2,
     "script.py: mask a.png is broken: replace it.\n"),
    ("raise KeyboardInterrupt", 130, "--resume"), ("raise torch.OutOfMemoryError('CUDA')", 2, "--batch-size"),
    ("pass", 0, ""),
])
def test_exit_codes_without_traceback(tmp_path, body, code, said):
    script = tmp_path / "script.py"
    script.write_text("import torch\nfrom common.run import *\nfrom common.run import RunConfig\n"
                      f"def main(cfg):\n    {body}\nrun_script(main, RunConfig, {{'toy': {{}}}})\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, i):
        raise UserError(f"image {i}.png is truncated: download it again.")


def test_a_sentence_from_a_loader_worker_arrives_as_it_was():
    with pytest.raises(UserError) as error:
        list(torch.utils.data.DataLoader(Broken(), num_workers=1))
    assert str(error.value) == "image 0.png is truncated: download it again."


# ---- run folder ----

def test_an_earlier_run_is_moved_aside_not_overwritten(tmp_path):
    cfg = parse("--out", str(tmp_path / "a"))
    run.start_run(cfg, CPU)
    (tmp_path / "a" / "last.pt").write_text("weights")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    run.start_run(cfg, CPU)
    assert (tmp_path / "a" / "previous-1" / "last.pt").read_text() == "weights"
    assert (tmp_path / "a" / "previous-1" / "notes.txt").exists()
    assert not (tmp_path / "a" / "last.pt").exists()
    run.start_run(cfg, CPU)
    assert (tmp_path / "a" / "previous-2" / "config.json").exists()


def test_an_impossible_run_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out .*file"):
        run.start_run(parse("--out", str(tmp_path / "file")), CPU)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "metrics.json"
    run.write_json(path, {"miou": 1.0})
    with pytest.raises(TypeError):
        run.write_json(path, {"miou": 2.0, "bad": object()})
    assert json.loads(path.read_text()) == {"miou": 1.0}
    run.write_csv(tmp_path / "log.csv", [dict(a=1, b=2.5), dict(a=2, b=3.5)])
    assert (tmp_path / "log.csv").read_text().split() == ["a,b", "1,2.5", "2,3.5"]


@dataclass
class RowConfig(RunConfig):
    weights: str = opt("none", "start", source=True)
    lr: float = opt(0.1, "learning rate")
    parts: list = opt((), "parts")


def test_a_row_is_read_if_finished_resumed_if_interrupted_else_trained(tmp_path):
    calls = []

    def train(cfg, machine):
        assert machine == CPU
        calls.append((cfg.lr, cfg.resume))
        run.start_run(cfg, CPU)
        run.write_json(tmp_path / "row" / "metrics.json", dict(lr=cfg.lr, run=len(calls)))

    def row(**flags):
        cfg = run.make_config(RowConfig, {"toy": {}}, "toy", out=str(tmp_path / "row"), **flags)
        return tables.finished_row(train, cfg, CPU)["run"]

    assert row() == 1 and calls == [(0.1, False)]
    assert row() == 1 and row(workers=9, device="cpu") == 1 and len(calls) == 1           # nothing trained
    assert row(lr=0.2) == 2 and calls[-1] == (0.2, False)              # other settings: a new run
    assert row(lr=0.2, weights="a.pth") == 3 and calls[-1] == (0.2, False)                # these count
    assert row(lr=0.2, weights="a.pth", data="x") == 4 and calls[-1] == (0.2, False)
    (tmp_path / "row" / "metrics.json").unlink()
    assert row(lr=0.2, weights="a.pth", data="x") == 5 and calls[-1] == (0.2, True)   # goes on
    assert row(lr=0.2, parts=("a",)) == 6 and row(lr=0.2, parts=("a",)) == 6              # like a list


@dataclass
class ScoredRowConfig(RowConfig):
    test_split: str = opt("val", "evaluated at the end", evaluation=True)
    test_size: int = opt(0, "short side of test images", evaluation=True)
    threshold: float = opt(0.5, "of the report", evaluation=True)
    quantiles: list = opt(("0.1",), "of the report", evaluation=True)
    filter: int = opt(500, "pixels", evaluation=True)
    class_scores: str = opt("", "file", evaluation=True)
    score_threshold: float = opt(0.5, "of the scores", evaluation=True)
    train_classifier: bool = opt(False, "at the end", evaluation=True)
    classifier_weights: str = opt("imagenet", "start of the classifier", source=True)
    save_every: int = opt(100, "steps", runtime=True)


@pytest.mark.parametrize("name, value", [
    ("test_split", "test"), ("test_size", 64), ("threshold", 0.4), ("quantiles", ["0.1", "0.9"]),
    ("filter", 0), ("class_scores", "a.npz"), ("score_threshold", 0.1), ("train_classifier", True)])
def test_a_row_that_was_evaluated_otherwise_is_evaluated_again_and_not_trained(tmp_path, name, value):
    calls, out = [], tmp_path / "row"

    def train(cfg, machine):
        assert not (cfg.resume and (out / "metrics.json").exists())    # old ones cannot pass for the new ones
        calls.append((getattr(cfg, name), cfg.resume))
        run.start_run(cfg, CPU)
        if cfg.save_every == 1:
            raise KeyboardInterrupt
        run.write_json(out / "metrics.json", dict(run=len(calls)))

    def row(**flags):
        cfg = run.make_config(ScoredRowConfig, {"toy": {}}, "toy", out=str(out), **flags)
        found = tables.finished_row(train, cfg, CPU)["run"]
        saved = json.loads((out / "config.json").read_text())
        assert saved == json.loads(json.dumps(asdict(cfg))) | dict(save_every=saved["save_every"])
        return found

    first = row()
    usual = calls[0][0]
    assert first == row() == row(save_every=7) == 1
    assert row(**{name: value}) == 2 and calls[1:] == [(value, True)]  # resumed: nothing is left to train
    assert row(**{name: value}) == 2 and row() == 3 and calls[2:] == [(usual, True)]      # and back again
    with pytest.raises(KeyboardInterrupt):                             # killed before the scores are there
        row(**{name: value}, save_every=1)
    assert row(**{name: value}) == 5 and calls[3:] == [(value, True)] * 2
    for changes in (dict(lr=0.2), dict(weights="a.pth"), dict(data="x"), dict(classifier_weights="none")):
        assert row(**changes) == len(calls) and calls[-1] == (usual, False)        # another run
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_row_whose_metrics_say_another_evaluation_or_an_unfinished_run_is_evaluated_again(tmp_path):
    """--eval-only on a row's folder rewrites its metrics.json, not its config.json."""
    calls, out = [], tmp_path / "row"

    def train(cfg, machine):
        calls.append(cfg.resume)
        run.start_run(cfg, CPU)
        run.write_json(out / "metrics.json", dict(evaluated=dict(test_split=cfg.test_split), finished=True))

    def row():
        cfg = run.make_config(ScoredRowConfig, {"toy": {}}, "toy", out=str(out))
        return tables.finished_row(train, cfg, CPU)

    right = row()
    assert row() == right and calls == [False]
    run.write_json(out / "metrics.json", dict(evaluated=dict(test_split="elsewhere"), finished=True))
    assert row() == right and calls == [False, True]
    run.write_json(out / "metrics.json", right | dict(finished=False))
    assert row() == right and calls == [False, True, True]


def test_a_row_that_leaves_no_metrics_is_named(tmp_path):
    cfg = run.make_config(RowConfig, {"toy": {}}, "toy", out=str(tmp_path))
    with pytest.raises(UserError, match="metrics.json is missing"):
        tables.finished_row(lambda *_: None, cfg, CPU)


# ---- checkpoints ----

def training_parts():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return dict(model=model, optimizer=optimizer, scheduler=run.poly_schedule(optimizer, 20, warmup=3))


def step(parts):
    loss = parts["model"](torch.randn(8, 4)).square().sum()
    parts["optimizer"].zero_grad()
    loss.backward()
    parts["optimizer"].step()
    parts["scheduler"].step()
    return loss.item()


def test_checkpoint_restores_weights_optimizer_schedule_rng_and_progress(tmp_path):
    parts = training_parts()
    for _ in range(5):
        step(parts)
    run.save_checkpoint(tmp_path / "last.pt", parts,
                        dict(iteration=5, log=[dict(miou=1.5)], sums=dict(ce=torch.tensor(2.0))))
    expected = [step(parts) for _ in range(5)]
    other = training_parts()
    progress = run.load_checkpoint(tmp_path / "last.pt", other, torch.device("cpu"))
    assert progress["iteration"] == 5 and progress["log"] == [{"miou": 1.5}] and progress["sums"]["ce"] == 2
    assert [step(other) for _ in range(5)] == expected


def test_wrong_checkpoints_are_refused_by_name(tmp_path):
    path, cpu = tmp_path / "last.pt", torch.device("cpu")
    with pytest.raises(UserError, match="no checkpoint at .*last.pt"):
        run.load_checkpoint(path, training_parts(), cpu)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="last.pt cannot be read"):
        run.load_checkpoint(path, training_parts(), cpu)
    torch.save(dict(weight=torch.zeros(2)), path)
    with pytest.raises(UserError, match="last.pt is not a checkpoint of this script"):
        run.load_checkpoint(path, training_parts(), cpu)
    run.save_checkpoint(path, dict(model=torch.nn.Linear(4, 5)), dict(iteration=1))
    with pytest.raises(UserError, match="last.pt does not fit this model"):
        run.load_checkpoint(path, dict(model=torch.nn.Linear(4, 4)), cpu)


SAVER = """
import sys, torch
from common import run
model = torch.nn.Linear(1000, 1000)
for i in range(1000000):
    with torch.no_grad():
        model.weight.fill_(i)
    run.save_checkpoint(sys.argv[1], dict(model=model), dict(iteration=i))
"""


def bytes_of(path):
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def test_kill_9_in_the_middle_of_a_checkpoint_loses_nothing(tmp_path):
    path, seen = tmp_path / "last.pt", -1
    for delay in (0.003, 0.011, 0.02):
        path.unlink(missing_ok=True)
        child = subprocess.Popen([sys.executable, "-c", SAVER, str(path)],
                                 env={**os.environ, "PYTHONPATH": str(ROOT)})
        while not path.exists():
            time.sleep(0.01)
        beside = Path(f"{path}.tmp")
        deadline = time.time() + 20
        while not 0 < bytes_of(beside) < 4_000_000 and time.time() < deadline:
            pass                                                       # wait until a write is under way
        time.sleep(delay / 10)
        child.send_signal(signal.SIGKILL)
        child.wait()
        model = torch.nn.Linear(1000, 1000)
        seen = run.load_checkpoint(path, dict(model=model), torch.device("cpu"))["iteration"]
        assert (model.weight == seen).all()                            # a whole checkpoint, not a mixture
    assert seen >= 0


# ---- learning rate, speed ----

def test_poly_lr_is_mmcv_s():
    # mmcv 1.x: regular = (base - min) (1 - it/max)^power + min;
    # warm-up: regular (1 - (1 - it/warmup) (1 - ratio))
    assert run.poly_lr(0, 0.01, 100, power=0.9, floor=1e-4) == pytest.approx(0.01)
    assert run.poly_lr(50, 0.01, 100, power=0.9, floor=1e-4) == pytest.approx(0.0099 * 0.5 ** 0.9 + 1e-4)
    assert run.poly_lr(100, 0.01, 100, power=0.9, floor=1e-4) == pytest.approx(1e-4)
    assert run.poly_lr(0, 6e-5, 160000, warmup=1500) == pytest.approx(6e-5 * 1e-6)
    assert run.poly_lr(750, 6e-5, 160000, warmup=1500) == pytest.approx(
        6e-5 * (1 - 750 / 160000) * (1 - 0.5 * (1 - 1e-6)))
    assert run.poly_lr(1500, 6e-5, 160000, warmup=1500) == pytest.approx(6e-5 * (1 - 1500 / 160000))


def test_poly_schedule_gives_every_group_its_own_rate_and_the_same_floor():
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([dict(params=[a], lr=0.01), dict(params=[b], lr=0.1)], lr=0.01)
    scheduler = run.poly_schedule(optimizer, 10, power=0.9, floor=1e-3)
    for iteration in range(11):
        expected = [(base - 1e-3) * (1 - iteration / 10) ** 0.9 + 1e-3 for base in (0.01, 0.1)]
        assert np.allclose([g["lr"] for g in optimizer.param_groups], expected)
        optimizer.step()
        scheduler.step()


def test_measuring_the_speed_changes_nothing():
    parts, other = training_parts(), training_parts()
    torch.manual_seed(3)
    speed.measured_speed(lambda: step(parts), parts, torch.device("cpu"))
    mine = [step(parts) for _ in range(3)]
    torch.manual_seed(3)
    assert mine == [step(other) for _ in range(3)]


@pytest.mark.parametrize("seconds, text", [
    (5, "5 s"), (130, "2.2 min"), (7200, "2.0 h"), (200000, "2.3 days"),
])
def test_duration_is_readable(seconds, text):
    assert run.duration(seconds) == text


def test_peak_memory_is_in_gib():
    block = torch.ones(2 ** 27)                                        # half a GiB
    assert block[-1] == 1 and 0.5 < speed.peak_memory(torch.device("cpu")) < 64
