"""For every script: options with help, marks of the header in the body, no other script imported."""
import importlib
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEAST_DEPARTURES = {"cbp_occl": 14, "protopool": 18, "scaleprotoseg": 13, "pfa_scribble": 17}
every_script = pytest.mark.parametrize("name", list(LEAST_DEPARTURES))


def source(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


@every_script
def test_help_lists_every_option(name):
    done = subprocess.run([sys.executable, f"{name}.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    for field in fields(importlib.import_module(name).Config):
        assert re.search(rf"--{field.name.rstrip('_').replace('_', '-')}\b", done.stdout), field.name
        assert field.metadata["help"]


@every_script
def test_every_departure_of_the_header_is_marked_at_a_line_and_the_other_way_round(name):
    header, body = source(name).split('"""', 2)[1:]
    departures = re.findall(r"^(\[D\d+\])", header, re.M)
    assert departures == [f"[D{i}]" for i in range(1, len(departures) + 1)]
    assert len(departures) >= LEAST_DEPARTURES[name] and set(re.findall(r"\[D\d+\]", body)) == set(departures)


@every_script
def test_the_script_stands_alone(name):
    modules = re.findall(r"^(?:from|import) ([\w.]+)", source(name), re.M)
    scripts = {path.stem for path in ROOT.glob("*.py")} - {name}
    assert scripts and not {module.split(".")[0] for module in modules} & scripts
    assert not re.search(r"\.cuda\(\)|parse_known_args|torch\.load\(", source(name))
