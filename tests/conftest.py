"""What all test files share: one thread, small toy data sets, one short run of each script, made once."""
import contextlib
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)                                               # small tensors: more threads only wait

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skips itself without one")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@contextlib.contextmanager
def small_splits():
    from common import toy_birds, toy_scenes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_scenes, "SPLITS", dict(train=8, val=2, test=3))
        patch.setattr(toy_birds, "SPLITS", dict(train=24, test=12))
        yield


@pytest.fixture(scope="module")
def few_toys():
    """Toy scenes and toy birds with a handful of pictures in each split, for the tests of a file."""
    with small_splits():
        yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """trained(SCRIPT) -> the folder of a short run of it that nobody may change; trained once a session."""
    from commands import SHORT, done
    folders = {}

    def folder_of(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            with small_splits():
                printed = done(name, "--out", folders[name], *SHORT[name])
            (folders[name] / "printed.txt").write_text(printed)
        return folders[name]
    return folder_of


@pytest.fixture
def no_figures(monkeypatch):
    """Figures and the announced time are left out: the tests that ask for neither are quicker."""
    from common import cbp_occl_figures, pfa_figures, protopool_figures, scaleprotoseg_figures, speed
    monkeypatch.setattr(speed, "announce", lambda *args: None)
    monkeypatch.setattr(protopool_figures, "draw_run", lambda *args: [])
    monkeypatch.setattr(cbp_occl_figures, "draw_figures", lambda *args: None)
    monkeypatch.setattr(pfa_figures, "draw_figures", lambda *args: None)
    monkeypatch.setattr(scaleprotoseg_figures, "draw_figures", lambda *args: None)
