"""Command lines of the scripts, called in the test's process: a new one spends seconds importing torch."""
import contextlib
import io
import sys
from types import SimpleNamespace

from common import run


def call(script, *argv):
    """`python SCRIPT.py ARGV` with the module `script` -> returncode, stdout, stderr."""
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


def flags_of(settings):
    """{name: value} -> command line."""
    argv = []
    for name, value in settings.items():
        flag = name.rstrip("_").replace("_", "-")              # the field class_ is --class
        if isinstance(value, bool):
            argv.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            argv += [f"--{flag}", *(value if isinstance(value, (list, tuple)) else [value])]
    return argv
