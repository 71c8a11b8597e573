"""What README.md and data/README.md promise: commands are understood, Python runs, links lead somewhere."""
import importlib
import re
import shlex

import pytest

from commands import PAGES, ROOT, SCRIPTS
from common import run

README, DATA = ((ROOT / path).read_text(encoding="utf-8") for path in ("README.md", "data/README.md"))
USES_A_RUN = {"--predict", "--explain", "--compare", "--failure", "--draw", "--eval-only", "--class",
              "--infer", "--class-scores", "--against", "--baseline"}  # they need the run in --out


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_command_is_one_that_the_script_takes(name):
    script = importlib.import_module(name)
    """In README.md, in data/README.md, in the script's header, and on the page of a run."""
    page = importlib.import_module(f"common.{PAGES[name]}").PAGE
    shell = "\n".join([*re.findall(r"```bash\n(.*?)```", README + DATA, re.S), *page.commands,
                       (ROOT / f"{name}.py").read_text(encoding="utf-8").split('"""')[1]])
    commands = re.findall(rf"{name}\.py((?: +--?[^#`|\n]*)?)", shell)
    assert len(commands) >= 8
    for command in commands:
        argv = shlex.split(command)
        for flag in USES_A_RUN & set(argv):
            after = [word.startswith("--") for word in argv[argv.index(flag) + 1:]] + [True]
            del argv[argv.index(flag):argv.index(flag) + 1 + after.index(True)]
        script.check_config(run.parse_config(script.Config, script.PRESETS, argv))


def test_the_python_block_runs(few_toys, tmp_path, monkeypatch):
    """A notebook, and torchvision's network with prototypes; the pieces to copy run in test_scripts.py."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README + DATA, re.S)
    assert len(blocks) == 3 + len(SCRIPTS)
    exec(blocks[0].replace("schedule=0.05", "schedule=0.004"), {})
    assert (tmp_path / "runs" / "notebook" / "metrics.json").exists()
    frozen, = (block for block in blocks if "freeze_classifier" in block)
    exec(frozen, found := {})
    assert found["seen"]["features"].shape == (2, 256, 8, 8)
    assert {id(p) for p in found["net"].parameters()}.isdisjoint(map(id, found["classifier"].buffers()))
    assert all(p.grad is not None for p in found["net"].parameters())


def test_ci_runs_the_test_command_and_links_lead_to_files():
    assert "-m pytest -q" in README and "-m pytest -q" in (ROOT / ".ci" / "run").read_text()
    links = [folder / link for folder, text in ((ROOT, README), (ROOT / "data", DATA))
             for link in re.findall(r"\]\((?!http|#)([^)#]+)", text)]
    assert len(links) >= 3 and all(link.exists() for link in links)
    for text in (README, DATA):                                        # places in a file, by their headings
        places = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
                  for title in re.findall(r"^#+ (.*)", text, re.M)}
        assert {*re.findall(r"\]\(#([^)]+)", text)} <= places
    assert len(README.splitlines()) <= 250
