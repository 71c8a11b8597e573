"""For every script: --help tells all, header and body agree, and a piece of it can be copied out."""
import importlib
import re
import sys
from dataclasses import fields
from types import ModuleType

import pytest
import torch

from commands import ROOT, SCRIPTS, done
from common.run import flag_of

README = "".join((ROOT / path).read_text(encoding="utf-8") for path in ("README.md", "data/README.md"))
LEAST_DEPARTURES = {"cbp_occl": 15, "protopool": 18, "scaleprotoseg": 13, "pfa_scribble": 17}
EQUATIONS = dict(cbp_occl=range(3, 8), protopool=range(1, 4), scaleprotoseg=[10], pfa_scribble=range(1, 11))
every_script = pytest.mark.parametrize("name", SCRIPTS)


def parts_of(name):
    """Header and body of a script."""
    return (ROOT / f"{name}.py").read_text(encoding="utf-8").split('"""', 2)[1:]


@every_script
def test_help_lists_every_option(name):
    text = done(name, "--help")
    for field in fields(importlib.import_module(name).Config):
        assert re.search(rf"{flag_of(field.name)}\b", text) and field.metadata["help"], field.name


@every_script
def test_every_departure_of_the_header_is_marked_at_a_line_and_the_other_way_round(name):
    header, body = parts_of(name)
    departures = re.findall(r"^(\[D\d+\])", header, re.M)
    assert departures == [f"[D{i}]" for i in range(1, len(departures) + 1)]
    assert len(departures) >= LEAST_DEPARTURES[name] and set(re.findall(r"\[D\d+\]", body)) == set(departures)


@every_script
def test_every_name_and_equation_of_the_symbol_table_is_in_the_body(name):
    header, body = parts_of(name)
    table = re.search(r"^symbol .*?(?=^$|^B images)", header, re.M | re.S)[0].splitlines()
    here, shape = table[0].index("here"), table[0].index("shape")
    cells = [row[here:shape] for row in table[1:]]
    assert len(cells) >= 12 and all(row[here - 1] == row[shape - 1] == " " for row in table)
    for cell in cells:
        assert all(re.search(rf"\b{word}\b", body) for word in re.findall(r"\w{3,}", cell)), cell
        assert all(f"def {function}(" in body for function in re.findall(r"(\w+)\(\)", cell)), cell
    marks = " ".join(re.findall(r"Eqs?\. ((?:\(\d+\)[, and]*)+)", body))
    assert all(f"({number})" in marks for number in EQUATIONS[name])


@every_script
def test_the_piece_that_the_readme_names_needs_torch_alone(name, monkeypatch):
    """Pasted into a notebook, from banner to banner, it computes what the imported one does."""
    found = re.search(rf"`{name}\.py` \(from `(.*?)` to `(.*?)`\).*?```python\n(.*?)```", README, re.S)
    source = parts_of(name)[1]
    start, end = (source.index(f"\n{banner}") for banner in found.groups()[:2])
    pasted, losses = ModuleType(name), []
    vars(pasted).update(torch=torch, nn=torch.nn, F=torch.nn.functional, math=importlib.import_module("math"))
    exec(source[start:end], vars(pasted))
    for module in (importlib.import_module(name), pasted):
        monkeypatch.setitem(sys.modules, name, module)
        torch.manual_seed(0)
        example = {}
        exec(found[3], example)
        losses.append(example["loss"].detach())
        assert torch.isfinite(losses[0]) and example["features"].grad.any()
    assert torch.equal(*losses)


@every_script
def test_the_script_stands_alone(name):
    source = "".join(parts_of(name))
    modules = re.findall(r"^(?:from|import) (\w+)", source, re.M)
    assert modules and not {*modules} & ({path.stem for path in ROOT.glob("*.py")} - {name})
    assert not re.search(r"\.cuda\(\)|parse_known_args|torch\.load\(", source)
