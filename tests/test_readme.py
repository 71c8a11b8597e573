"""What README.md promises: its commands are understood, its Python runs."""
import importlib
import re
import shlex
from pathlib import Path

import pytest

from common import run

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
USES_A_RUN = ("--predict", "--explain", "--compare", "--failure", "--draw", "--eval-only")      # the run in --out


@pytest.mark.parametrize("name", ["cbp_occl", "protopool", "scaleprotoseg", "pfa_scribble"])
def test_every_command_is_one_that_the_script_takes(name):
    script = importlib.import_module(name)
    shell = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S))
    commands = re.findall(rf"{name}\.py((?: +--?[^#`|\n]*)?)", shell)
    assert len(commands) >= 8
    for command in commands:
        argv = shlex.split(command)
        for flag in {*USES_A_RUN, "--class", "--infer", "--class-scores"} & set(argv):
            after = [word.startswith("--") for word in argv[argv.index(flag) + 1:]] + [True]
            del argv[argv.index(flag):argv.index(flag) + 1 + after.index(True)]
        script.check_config(run.parse_config(script.Config, script.PRESETS, argv))


def test_the_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 5
    for block in blocks:
        exec(block.replace("schedule=0.05", "schedule=0.004"), {})
    assert (tmp_path / "runs" / "notebook" / "metrics.json").exists()


def test_ci_runs_the_test_command():
    assert "-m pytest -q" in README and "-m pytest -q" in (ROOT / ".ci" / "run").read_text()


def test_pictures_and_files_that_are_linked_exist():
    links = re.findall(r"\]\((?!http|#)([^)#]+)", README + (ROOT / "data" / "README.md").read_text("utf-8"))
    assert len(links) >= 3 and all((ROOT / link).exists() for link in links)
