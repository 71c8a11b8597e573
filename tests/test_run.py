"""common/run.py and tables.py: options, run folders, rows of tables, learning rate."""
from dataclasses import asdict, dataclass, replace

import json
import pytest
import torch

from commands import read
from common import run, tables
from common.run import RunConfig, UserError, opt

CPU = run.Machine(torch.device("cpu"))


@dataclass
class Config(RunConfig):
    iterations: int = opt(1000, "training steps", schedule=True)
    warmup: int = opt(100, "warm-up steps", schedule=True)
    finetune: int = opt(None, "a quarter of --iterations if not given", schedule=True)
    lr: float = opt(0.1, "learning rate")
    flip: bool = opt(True, "mirror half of the images")
    parts: list = opt(("head", "wing"), "parts to draw")
    weights: str = opt("none", "start", source=True)
    split: str = opt("val", "evaluated at the end", evaluation=True)
    quantiles: list = opt((0.1,), "of the report", each=float, evaluation=True)
    save_every: int = opt(100, "steps", runtime=True)
    table: int = opt(0, "table to make", runtime=True)
    predict: list = opt((), "images to label", runtime=True, uses_run=True)

    def __post_init__(self):
        if self.finetune is None:
            self.finetune = self.iterations // 4


PRESETS = {"toy": dict(iterations=50), "big": dict(iterations=8000, lr=0.5)}


def parse(*argv):
    return run.parse_config(Config, PRESETS, [*map(str, argv)])


# ---- options ----

def test_schedule_shortens_every_stage_in_proportion_once_and_nothing_else(tmp_path):
    cfg = parse("--preset", "big", "--schedule", "0.1", "--out", tmp_path)
    assert (cfg.iterations, cfg.warmup, cfg.finetune, cfg.lr) == (800, 10, 200, 0.5)
    assert parse("--schedule", "0.0001").iterations == 1                  # never to nothing, but 0 stays off
    assert parse("--warmup", 0, "--schedule", "0.1").warmup == parse("--finetune", 0).finetune == 0
    assert asdict(replace(cfg, seed=1)) == asdict(cfg) | dict(seed=1)     # a copy is not scaled again
    run.start_run(cfg, CPU)
    assert asdict(parse("--out", tmp_path, "--resume")) == asdict(cfg) | dict(resume=True)


# ---- run folder ----

def test_what_works_on_a_run_takes_its_settings_and_refuses_contradictions(tmp_path):
    flags = ["--preset", "big", "--lr", 0.3, "--schedule=0.1", "--parts", "tail", "beak", "--out", tmp_path]
    run.start_run(parse(*flags), CPU)
    again = parse("--out", tmp_path, "--resume", "--workers", 1)
    assert (again.preset, again.lr, again.iterations, again.workers) == ("big", 0.3, 800, 1)
    assert parse(*flags, "--resume").lr == parse("--preset", "big", "--out", tmp_path, "--resume").lr == 0.3
    cfg = parse("--out", tmp_path, "--predict", "a.png", "b.png")
    assert (cfg.predict, cfg.parts) == (["a.png", "b.png"], ["tail", "beak"])
    for flag, value in (("--lr", "0.7"), ("--preset", "toy"), ("--parts", "wing")):
        with pytest.raises(UserError, match=f"{flag} .*{value}.* contradicts .*config.json"):
            parse("--out", tmp_path, "--resume", flag, value)
    (tmp_path / "config.json").write_text("{oops")
    with pytest.raises(UserError, match="config.json cannot be read"):
        parse("--out", tmp_path, "--resume")


def test_an_earlier_run_is_moved_aside_not_overwritten(tmp_path, monkeypatch):
    out = tmp_path / "a"
    for notes in ("mine", "later", "last"):
        run.start_run(parse("--out", out), CPU)
        (out / "rows").mkdir(exist_ok=True)                               # of a table: they stay
        assert not (out / "notes.txt").exists()
        (out / "notes.txt").write_text(notes)
    assert [(out / f"previous-{k}" / "notes.txt").read_text() for k in (1, 2)] == ["mine", "later"]
    assert (out / "previous-1" / "config.json").exists() and not (out / "previous-2" / "rows").exists()
    for folder in (out, out / "rows"):                                    # a later run would move the data
        (out / "rows" / "image.png").write_text("")
        with pytest.raises(UserError, match="holds the data or belongs to them"):
            run.start_run(parse("--out", folder, "--data", out), CPU)
    monkeypatch.chdir(out / "rows")
    with pytest.raises(UserError, match="the folder that you work in"):
        run.start_run(parse("--out", out), CPU)


# ---- rows of tables ----

@pytest.fixture
def row(tmp_path):
    """row(flags) -> number of the training that its metrics are from; row.calls: lr, split, --resume."""
    metrics = tmp_path / "row" / "metrics.json"

    def train(cfg, machine):
        assert machine == CPU and not (cfg.resume and metrics.exists())
        row.calls.append((cfg.lr, cfg.split, cfg.resume))
        run.start_run(cfg, CPU)
        if cfg.save_every == 1:
            raise KeyboardInterrupt
        run.write_json(metrics, run.settings_of(cfg) | dict(run=len(row.calls), finished=True))

    def row(**flags):
        cfg = run.make_config(Config, PRESETS, "toy", out=str(tmp_path / "row"), **flags)
        return tables.finished_row(train, cfg, CPU)["run"]
    row.calls, row.metrics = [], metrics
    return row


def test_a_row_is_read_if_finished_resumed_if_interrupted_else_trained(row):
    assert row() == row() == row(workers=9, device="cpu", save_every=7) == 1
    assert row.calls == [(0.1, "val", False)]
    changes = [dict(lr=0.2), dict(lr=0.2, weights="a.pth"), dict(lr=0.2, data="x"), dict(parts=("a",))]
    for number, change in enumerate(changes, start=2):                    # other settings or data: a new run
        assert row(**change) == row(**change) == number and row.calls[-1][2] is False
    row.metrics.unlink()
    assert row(parts=["a"]) == 6 and row.calls[-1] == (0.1, "val", True)  # goes on; a list is like a tuple


@pytest.mark.parametrize("change", [dict(split="test"), dict(quantiles=[0.1, 0.9])])
def test_a_row_that_was_evaluated_otherwise_is_evaluated_again_and_not_trained(row, change):
    assert row() == 1 and row(**change) == row(**change) == 2
    saved = read(row.metrics.parent / "config.json")                      # as if it had been trained so
    assert not saved["resume"] and change.items() <= saved.items() and row() == 3
    assert [resumed for _, _, resumed in row.calls] == [False, True, True]
    with pytest.raises(KeyboardInterrupt):                               # killed before the scores are there
        row(**change, save_every=1)
    assert row(**change) == 5 and row(**change, lr=0.2) == 6
    assert [resumed for _, _, resumed in row.calls[3:]] == [True, True, False]
    for number, entry in enumerate((dict(evaluated={}), dict(finished=False), dict(settings={}), None), 7):
        content = read(row.metrics) | entry if entry else "damaged"       # or of another row
        row.metrics.write_text(json.dumps(content)[:-1 if entry is None else None])
        assert row(**change, lr=0.2) == number and row.calls[-1][2] is True


def test_a_table_shows_ours_beside_the_papers_and_says_what_was_not_run(tmp_path):
    columns = {"mIoU": "miou", "car": ("iou", "car"), "half": lambda metrics: metrics["miou"] / 2}
    rows = {"ours": (dict(lr=1), 51.2), "huge": ("needs weights", None)}
    table = tables.beside_paper("Table 9", columns, ["paper"], rows)._replace(digits=dict(half=2))
    found = [dict(miou=50.04, iou=dict(car=None)), dict(miou=53.0, iou=dict(car=3.0))]
    for results, line in [(found[:1], "| ours | 50.0 | - | 25.02 | 51.2 |"),
                          (found, "| ours | 51.5 +- 2.1 | - | 25.76 +- 1.05 | 51.2 |")]:
        tables.write_table(9, table, dict(ours=results), parse("--out", tmp_path), CPU)
        assert (tmp_path / "table9.md").read_text().splitlines()[-4:] == [
            "| row | mIoU | car | half | paper |", "| --- | --- | --- | --- | --- |", line,
            "| huge | not run (needs weights) |  |  | - |"]


# ---- learning rate ----

def test_poly_lr_is_mmcv_s():
    """mmcv 1.x: (base - min) (1 - it/max)^power + min; warm-up: times 1 - (1 - it/warmup) (1 - ratio)."""
    for iteration, share in [(0, 1), (50, 0.5 ** 0.9), (100, 0)]:
        assert run.poly_lr(iteration, 0.01, 100, 0.9, 1e-4) == pytest.approx(0.0099 * share + 1e-4)
    for iteration, warm in [(0, 1e-6), (750, 1 - 0.5 * (1 - 1e-6)), (1500, 1)]:
        expected = 6e-5 * (1 - iteration / 160000) * warm
        assert run.poly_lr(iteration, 6e-5, 160000, warmup=1500) == pytest.approx(expected)
    optimizer = torch.optim.SGD([dict(params=[torch.zeros(1)], lr=base) for base in (0.01, 0.1)])
    scheduler = run.poly_schedule(optimizer, 10, power=0.9, floor=1e-3)   # own rates, the same floor
    optimizer.step()
    scheduler.step()
    expected = [(base - 1e-3) * (1 - 1 / 10) ** 0.9 + 1e-3 for base in (0.01, 0.1)]
    assert scheduler.get_last_lr() == pytest.approx(expected)
