"""Run plumbing for the four scripts: options, device and processes, run folder, checkpoints, log, schedule.

Nothing here belongs to one of the papers, and the loop is each script's own: see its train().
"""

import argparse
import contextlib
import csv
import difflib
import errno
import inspect
import itertools
import json
import math
import operator
import os
import re
import sys
import textwrap
import time
import traceback
import warnings
import zlib
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm


CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class UserError(Exception):
    """A mistake that the user can mend: a sentence that names the file or option and says what to do."""

    def __init__(self, message):                       # a DataLoader worker puts its traceback before it
        super().__init__(str(message).rsplit("UserError: ", 1)[-1].strip())


# ---- options ---------------------------------------------------------------------------------------------

def opt(default, help, choices=None, above=None, at_least=None, below=None, at_most=None, each=str,
        schedule=False, runtime=False, evaluation=False, source=False, uses_run=False):
    """A dataclass field that is also a command-line flag.

    choices; above, at_least, below, at_most: what check_options allows; nan and inf are outside any limit.
    each: type of the values of a field of type `list`, which takes one or more after its flag. The field
    class_ is the flag --class. A default of None is for the Config's own __post_init__ to fill.

    schedule: a number of iterations or epochs, multiplied by --schedule. The other marks say what an option
    changes. Without one it is part of the training, and a resumed run keeps it.
      runtime      where and how to compute, not what
      evaluation   metrics.json, not the training: a table evaluates its rows again
      source       where data or weights are found: a table trains its rows again
      uses_run     the option works on the run that --out names, with the settings in that run's config.json
    """
    default = list(default) if isinstance(default, tuple) else default
    about = dict(default=default, help=help, choices=choices, above=above, at_least=at_least, below=below,
                 at_most=at_most, each=each, schedule=schedule, evaluation=evaluation, source=source,
                 uses_run=uses_run, runtime=runtime or evaluation or source or uses_run)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=about)     # a new list for every Config
    return field(default=default, metadata=about)


@dataclass
class RunConfig:
    """The options that all four scripts have."""
    preset: str = opt("toy", "recipe to start from; any flag given beside it wins")
    data: str = opt("", "folder of the data set (data/README.md shows the tree); toy data need none",
                    source=True)
    out: str = opt("", "run folder: config.json, log.csv, metrics.json, last.pt, figures/ "
                   "(default runs/SCRIPT-PRESET)", runtime=True)
    seed: int = opt(0, "same seed, same machine, same numbers", at_least=0, at_most=2 ** 32 - 1)
    device: str = opt("auto", "auto takes cuda, then mps, then cpu", choices=("auto", "cuda", "mps", "cpu"),
                      runtime=True)
    amp: str = opt("auto", "autocast: auto = bf16 on GPUs that have it, else off; fp16 = float16 with "
                   "scaled losses, for older GPUs", choices=("auto", "bf16", "fp16", "off"))
    workers: int = opt(min(4, CORES), "data loader processes; 0 loads in the main process "
                       "(Windows: try 0 if loading hangs)", at_least=0, runtime=True)
    schedule: float = opt(1.0, "shortens every stage of the recipe in proportion: "
                          "0.1 = a tenth of the iterations", above=0)
    seeds: int = opt(1, "with --table: train every row with so many seeds, from --seed on", at_least=1,
                     runtime=True)
    resume: bool = opt(False, "go on from OUT/last.pt with the settings in OUT/config.json", uses_run=True)


def flag_of(name):
    """Name of a field -> its flag: w_centroid -> --w-centroid, class_ -> --class."""
    return "--" + name.rstrip("_").replace("_", "-")


LIMITS = {"above": ("above {}", operator.gt), "at_least": ("{} or more", operator.ge),
          "below": ("below {}", operator.lt), "at_most": ("at most {}", operator.le)}


def check_options(cfg):
    """UserError for a value that is none of its option's choices, or that lies outside its limits."""
    for f in fields(cfg):
        value, about, flag = getattr(cfg, f.name), f.metadata, flag_of(f.name)
        if about["choices"] and value not in about["choices"]:
            raise UserError(f"{flag} {value}: choose one of {', '.join(map(str, about['choices']))}.")
        limits = [(*LIMITS[name], about[name]) for name in LIMITS if about[name] is not None]
        if value is None or not limits:
            continue
        numbers = value if f.type is list else [value]
        for number in numbers:
            if not (math.isfinite(number) and all(fits(number, limit) for _, fits, limit in limits)):
                words = " and ".join(text.format(limit) for text, _, limit in limits)
                raise UserError(f"{flag} {' '.join(map(str, numbers))}: must be {words}, and finite.")
    if cfg.seeds > 1 and not (getattr(cfg, "table", 0) or getattr(cfg, "figure", 0)):
        raise UserError(f"--seeds {cfg.seeds}: goes with --table; a single run has one --seed.")


def check_batch_size(batch_size, least=1):
    """UserError unless every process gets the same number of images, `least` or more."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if batch_size % world or batch_size // world < least:
        more = f" and {least} at least for batch norm" if least > 1 else ""
        raise UserError(f"--batch-size {batch_size} for {world} process(es): each needs the same number of "
                        f"images{more}; choose {least * world} or more, a multiple of {world}.")


def batch_of_process(cfg):
    """Images that go through the network at once in training."""
    images = cfg.batch_size // int(os.environ.get("WORLD_SIZE", 1))
    return min(images, getattr(cfg, "micro_batch", 0) or images)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        """One sentence instead of argparse's usage dump; exit code 2 as usual."""
        word = message.split(": ")[-1].split("=")[0].split(" ")[0]
        unknown = message.startswith("unrecognized") and word.startswith("-")
        hint = did_you_mean(word, self._option_string_actions) if unknown else ""
        fail(f"{message}; {hint}--help lists the options.", 2)


def did_you_mean(word, names):
    """A question for a message: names that begin with the word, or the one most like it; "" without any."""
    close = [name for name in names if name.startswith(word)][:3] if len(word) > 3 else []
    close = close or difflib.get_close_matches(word, names, n=1)
    return f"did you mean {' or '.join(close)}? " if close else ""


FIRST = ("preset", "dataset", "data", "scribbles", "parts", "method", "classifier", "backbone", "weights",
         "out", "seed", "schedule", "resume", "table", "figure", "seeds", "stage1", "device", "amp",
         "workers", "save_every", "classifier_weights")


def group_of(f):
    """The heading under which --help shows an option."""
    if f.name in FIRST:
        return "what to train, and where"
    return "look at a run (the one in --out)" if f.metadata["runtime"] else (
        "recipe (defaults are the paper's; a preset changes them, and a flag wins over both)")


def _parser(Config, presets, description):
    description, *symbols = description.split("\nsymbol ")               # the idea, and how it is run
    if symbols:
        description += "The file begins with its symbols and its departures from the paper, [D1], [D2], ...\n"
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                     allow_abbrev=False, usage="%(prog)s [--option value ...]")
    parser._negative_number_matcher = re.compile(r"-\d*\.?\d+(e-?\d+)?$", re.I)       # -1e-3 is no flag
    place = {name: number for number, name in enumerate(FIRST)}
    options = sorted(fields(Config), key=lambda f: place.get(f.name, 99 if f.metadata["runtime"] else 100))
    groups = {name: parser.add_argument_group(name) for name in dict.fromkeys(map(group_of, options))}
    for f in options:
        default = f.metadata["default"]
        choices = list(presets) if f.name == "preset" else f.metadata["choices"]
        listed = "{" + ",".join(str(choice) for choice in choices if choice) + "}" if choices else None
        of_list = f.type is list
        one = f.metadata["each"] if of_list else f.type
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        else:
            kind = dict(type=one, choices=choices, metavar=listed or one.__name__.upper(),
                        nargs="+" if of_list else None)
        shown = " ".join(map(str, default)) if of_list else default
        text = f.metadata["help"]
        if shown not in ("", False, None):
            text += f" (default {shown})"
        groups[group_of(f)].add_argument(flag_of(f.name), dest=f.name, default=argparse.SUPPRESS,
                                         help=text.replace("%", "%%"), **kind)
    return parser


def parse_config(Config, presets, argv=None, description=""):
    """Command line -> Config: dataclass defaults < preset < flags, then iteration counts times --schedule.

    With an option that works on a trained run the settings are those in OUT/config.json; a flag that
    contradicts them is a UserError, unless it only says where to compute.
    """
    return make_config(Config, presets, **vars(_parser(Config, presets, description).parse_args(argv)))


def make_config(Config, presets, preset=None, **flags):
    """The same from Python: make_config(Config, PRESETS, "toy", seed=1). UserError: an unknown option, a
    value of another type, what check_options refuses, or two commands at once."""
    flags |= dict(preset=preset) if preset else {}
    preset = preset or "toy"
    if preset not in presets:
        raise UserError(f"preset {preset!r} does not exist: choose one of {', '.join(presets)}.")
    names = [f.name for f in fields(Config)]
    for name in flags:
        if name not in names:
            hint = did_you_mean(name, names)
            raise UserError(f"there is no option {name}{': ' + hint.strip() if hint else '.'}")
    cfg = Config(**{**presets[preset], **flags, "preset": preset})
    if not cfg.out:
        cfg.out = f"runs/{script_of(Config)}-{preset}"
    _read_types(cfg)
    check_options(cfg)
    for f in fields(Config):                               # the only place that multiplies by --schedule
        value = getattr(cfg, f.name)
        if f.metadata["schedule"] and value is not None and value > 0:
            setattr(cfg, f.name, max(1, round(value * cfg.schedule)))
    tasks = [f for f in fields(Config) if getattr(cfg, f.name)
             and (f.metadata["uses_run"] or f.name in ("table", "figure", "profile", "ensemble"))]
    names = [f.name for f in tasks]
    if len(tasks) > 1 and names != ["explain", "compare"]:              # which one command draws
        raise UserError(f"{' and '.join(map(flag_of, names))} are separate commands: give one of them (a "
                        "--table trains what is missing, and goes on by itself).")
    if any(f.metadata["uses_run"] for f in tasks):
        cfg = _config_of_run(cfg, flags)
    cfg.given = tuple(flags)                               # no field: see tables.check_rows
    return cfg


def script_of(Config):
    """The name of the script that a Config belongs to, whether it was started or imported."""
    return Path(sys.argv[0]).stem if Config.__module__ == "__main__" else Config.__module__


def _read_types(cfg):
    """Values get the type that their option says: from Python, paths may be Path and numbers text. UserError
    where that cannot be."""
    for f in fields(cfg):
        value, one = getattr(cfg, f.name), f.metadata["each"] if f.type is list else f.type
        values = value if f.type is list else [value]
        if value is None and f.metadata["default"] is None:
            continue
        try:
            if one is bool and value not in (True, False) or f.type is list and isinstance(value, str):
                raise ValueError
            if one is str and not all(isinstance(v, (str, os.PathLike, int, float)) for v in values):
                raise ValueError
            read = [one(v) for v in values]
            if one is int and any(isinstance(v, float) and v != int(v) for v in values):
                raise ValueError
            if one in (int, float) and any(isinstance(v, bool) for v in values):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            kind = f"a list of {one.__name__}" if f.type is list else one.__name__
            raise UserError(f"{flag_of(f.name)} {value}: must be {kind}.") from None
        setattr(cfg, f.name, read if f.type is list else read[0])


def read_config(Config, out):
    """The settings of the run in the folder `out`; UserError if there is none of this script."""
    path = Path(out) / "config.json"
    rows = f": those of its tables are in {out}/rows" if (Path(out) / "rows").is_dir() else ": train first"
    saved = read_json(path, f"{out} holds no run (no config.json){rows}, or pass a run's folder.")
    if not isinstance(saved, dict) or set(saved) - {f.name for f in fields(Config)}:
        raise UserError(f"{path} is not a config of this script: pass the folder of a run of this script.")
    cfg = Config(**saved)
    missing = [f.name for f in fields(Config) if f.name not in saved]
    if missing and not int(os.environ.get("RANK", 0)):
        print(f"note: {path} has no {', '.join(missing)}: taken as the default of the option")
    try:
        _read_types(cfg)                               # a run of an earlier version has numbers as text
        check_options(cfg)
    except UserError as error:
        raise UserError(f"{path} holds a wrong value: {error}") from None
    return cfg


def _config_of_run(cfg, given):
    """Settings of the run in cfg.out, with today's runtime flags; given: the flags that were typed."""
    kept, path = read_config(type(cfg), cfg.out), Path(cfg.out) / "config.json"
    for f in fields(cfg):
        asked, saved = getattr(cfg, f.name), getattr(kept, f.name)
        if f.metadata["uses_run"] or f.name == "out" or f.metadata["runtime"] and f.name in given:
            setattr(kept, f.name, asked)
        elif f.name in given and asked != saved:
            raise UserError(f"{flag_of(f.name)} {asked} contradicts {path}, which says {saved}: drop the "
                            "flag, or start a new run with another --out.")
    return kept


def run_script(main, Config, presets, description=""):
    """Parse, run main(cfg); user mistakes become one sentence and exit code 2, Ctrl-C exit code 130."""
    code = 2
    print_any_name()
    try:
        main(parse_config(Config, presets, description=description))
        return
    except UserError as error:
        undo_start()
        problem = str(error)
    except KeyboardInterrupt:
        problem, code = ("interrupted; the same command with --resume (a --table: the same command) goes on "
                         "from the last checkpoint."), 130
    except (RuntimeError, MemoryError) as error:
        problem = lack_of_memory(error)
        if not problem:
            raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    fail(problem, code)


def print_any_name():
    """Characters that this terminal cannot show are printed as codes, such as \\u5929; no run ends there."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def fail(problem, code):
    """Print one sentence and exit. Under torchrun the first process tells what all of them met."""
    if int(os.environ.get("RANK", 0)):
        time.sleep(5)                                  # torchrun ends this process once the first has gone
    print(f"{Path(sys.argv[0]).name}: {problem}", file=sys.stderr)
    sys.exit(code)


def lack_of_memory(error):
    """What to do about an exception that means too little memory, else None."""
    text = str(error)
    if re.search("DataLoader worker|shared memory|/dev/shm", text):
        return ("a loader process was killed, mostly for lack of memory or of room in /dev/shm: lower "
                "--workers (0 needs no processes), and --resume goes on from the last checkpoint.")
    if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not re.search(
            "out of memory|can't allocate memory|not enough memory", text):
        return None
    device = "the GPU" if re.search("cuda|mps", text.lower()) else "the machine"
    called = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    if called & {"evaluate", "predict"}:
        return (f"{device} ran out of memory at a whole image, which is scored or labelled alone: make such "
                "images smaller, or cut them with --window.")
    return (f"{device} ran out of memory: lower --batch-size or the image size (a lower batch size wants a "
            "lower --lr in proportion).")


# ---- device, seed, ranks ---------------------------------------------------------------------------------

class Machine(NamedTuple):
    """Where a process computes: its device, its number (rank), and how many processes there are (world)."""
    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def quiet(self):
        """For tqdm's `disable`: only the first process shows a bar, and (None) only in a terminal."""
        return True if self.rank else None


def setup(device="auto", seed=0):
    """-> Machine; seeds torch. Under torchrun it joins the process group (NCCL on CUDA, else gloo)."""
    has = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if has[name])
    if not has[device]:
        raise UserError(f"--device {device}: this torch sees no such device; use --device auto or cpu.")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise UserError(f"torchrun --nproc-per-node is higher than the {torch.cuda.device_count()} GPUs "
                            "of this machine: start one process a GPU.")
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
        torch.backends.cudnn.benchmark = True
        torch.set_num_threads(min(2, torch.get_num_threads()))      # enough to load; runs side by side share
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo",
                                timeout=timedelta(hours=6))    # rank 0 draws while the others wait
    torch.manual_seed(seed)                            # seeds CUDA and MPS too
    return Machine(torch.device(device), rank, world)


def precision(device, amp="auto"):
    """What --amp means on a device: "bf16", "fp16" or "off"; auto is bf16 on a GPU that computes in it."""
    if amp == "fp16" and device.type == "mps":
        raise UserError("--amp fp16 is for CUDA GPUs: use --amp off here.")
    if amp != "auto":
        return amp
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "off"


def autocast(device, amp="auto"):
    """Autocast on `device`, see precision()."""
    kind = precision(device, amp)
    return torch.autocast(device.type, dtype=torch.float16 if kind == "fp16" else torch.bfloat16,
                          enabled=kind != "off")


def backward(loss, optimizer, amp="off"):
    """loss.backward(). With --amp fp16 the loss is scaled first, as small gradients are 0 in float16; the
    scaler is kept as optimizer.scaler, and in checkpoints."""
    if amp == "fp16" and not hasattr(optimizer, "scaler"):
        optimizer.scaler = torch.amp.GradScaler(loss.device.type)
    scaler = getattr(optimizer, "scaler", None)
    (scaler.scale(loss) if scaler else loss).backward()


def step(optimizer):
    """optimizer.step(). After a scaled loss: of unscaled gradients, and none if one is not finite."""
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step")    # step() may leave out the first


def distribute(model, machine):
    """DistributedDataParallel around the model; on CUDA batch norm is synchronised."""
    if machine.world == 1:
        return model
    if machine.device.type == "cuda":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    DDP = torch.nn.parallel.DistributedDataParallel
    renamed = "forward_sync_buffers" in inspect.signature(DDP).parameters                # by torch 2.14
    option = "forward_sync_buffers" if renamed else "broadcast_buffers"
    return DDP(model, **{option: False})               # see share_buffers


def share_buffers(model):
    """The first process's buffers (batch-norm statistics) to all: before an evaluation or a checkpoint."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


# ---- run folder ------------------------------------------------------------------------------------------

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def replacing(path, mode="w"):
    """Open a file beside `path` and rename it at the end: a killed program leaves no half-written file.
    UserError if it cannot be written, such as on a full disk; what was at `path` stays."""
    path, draft = Path(path), Path(f"{path}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = {} if "b" in mode else dict(encoding="utf-8", errors="backslashreplace", newline="")
        with open(draft, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:            # RuntimeError: torch.save after a failed write
        failed = error if isinstance(error, OSError) else error.__context__
        if not isinstance(failed, OSError):
            raise
        room = "make room or " if failed.errno in NO_ROOM else ""
        raise UserError(f"{path} cannot be written ({failed.strerror or failed}): {room}choose another "
                        "--out; what is there is whole, and --resume goes on from it.") from None
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


KEPT = re.compile(r"rows|previous-\d+")                                 # what a new run does not move aside
START = {}                                              # until the first checkpoint: how to undo start_run


def start_run(cfg, machine):
    """Make the run folder and write config.json.

    What an earlier run left there is moved to OUT/previous-1, -2, ..., all but rows/ and earlier previous-N.
    UserError: the folder cannot be made, is the one that is worked in, or has to do with the data.
    """
    out = Path(cfg.out)
    here, data = out.resolve(), Path(cfg.data).expanduser().resolve()
    if cfg.data and (here in (data, *data.parents) or data in here.parents and is_foreign(out)):
        raise UserError(f"--out {out} holds the data or belongs to them: give the run a folder of its own.")
    if here in (Path.cwd(), *Path.cwd().parents):
        raise UserError(f"--out {out} is the folder that you work in, and a later run would move all of it "
                        "aside: give the run a folder of its own.")
    if machine.rank == 0 and not cfg.resume:
        is_new = not out.exists()
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out} cannot be made ({error.strerror}): name another folder.") from None
        START.clear()
        START.update(out=out, is_new=is_new)
        if (out / "config.json").exists():
            places = (out / f"previous-{number}" for number in itertools.count(1))
            aside = next(place for place in places if not place.exists())
            earlier = [path for path in out.iterdir() if not KEPT.fullmatch(path.name)]
            aside.mkdir()
            for path in earlier:
                path.rename(aside / path.name)
            print(f"the earlier run in {out} was moved to {aside}")
            START.update(aside=aside)
        write_json(out / "config.json", asdict(cfg))
        START.update(config=number_of_config(out))
    if machine.rank == 0:
        if cfg.resume and not (out / "last.pt").exists():
            print(f"note: {out} has no checkpoint yet: the run begins anew")
    if dist.is_initialized():
        dist.barrier()


def number_of_config(out):
    """Which file OUT/config.json is, so that a run sees it if another one has begun in its folder."""
    path = Path(out) / "config.json"
    return path.stat().st_ino if path.exists() else None


def is_foreign(out):
    """Is it a folder with files, but none of a run?"""
    return out.is_dir() and any(out.iterdir()) and not (out / "config.json").exists()


def undo_start():
    """After a mistake before the first checkpoint: the run folder is as it was before start_run, unless
    another run has begun there."""
    if not START or START.get("config") != number_of_config(START["out"]):
        return
    out, aside = START["out"], START.get("aside")
    for name in ("config.json", "log.csv"):             # all that a run has written by then
        (out / name).unlink(missing_ok=True)
    for path in aside.iterdir() if aside else ():
        path.rename(out / path.name)
    with contextlib.suppress(OSError):                  # folders that are not empty stay
        for folder in filter(None, (aside, START["is_new"] and out)):
            folder.rmdir()
    START.clear()


def for_results(cfg):
    """cfg, with the folder OUT/eval-SPLIT-OPTION-VALUE if --eval-only evaluates another split than the run
    did, other data, or in another way: the metrics and figures of the finished run stay."""
    own = read_json(Path(cfg.out) / "config.json", "")
    changed = {f.name: getattr(cfg, f.name) for f in fields(cfg)
               if f.metadata["evaluation"] or f.name == "data"}
    changed = {name: value for name, value in changed.items() if value != own.get(name)}
    if not changed or not cfg.eval_only:
        return cfg
    changed.pop("test_split", None)
    words = [f"{name}-{Path(str(value)).name}" if value is not True else name
             for name, value in changed.items()]
    folder = re.sub(r"[^\w.]+", "-", "-".join(["eval", cfg.test_split, *words])).rstrip("-")
    return replace(cfg, out=f"{cfg.out}/{folder}")


def write_json(path, value):
    with replacing(path) as file:
        file.write(json.dumps(value, indent=1) + "\n")


def read_json(path, missing):
    """The file's content; UserError(missing) where there is no such file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(missing) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it, or start a new run with another "
                        "--out.") from None


def write_csv(path, rows):
    """One line a dict; the columns are those of the first."""
    with replacing(path) as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


# ---- checkpoints -----------------------------------------------------------------------------------------

def rng_state():
    """State of torch's random generators in this process; None for a device that the machine lacks."""
    return dict(cpu=torch.get_rng_state(),
                cuda=torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
                mps=torch.mps.get_rng_state() if torch.backends.mps.is_available() else None)


def set_rng_state(rng):
    torch.set_rng_state(rng["cpu"].cpu())
    if rng["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"].cpu())
    if rng.get("mps") is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(rng["mps"].cpu())


def save_checkpoint(path, parts, progress):
    """State dicts of `parts` {name: module, optimizer, scheduler}, `progress`, every process's RNG state.

    progress: tensors, numbers, strings, lists and dicts only, for weights_only=True. All processes call
    this; the first one writes, and the others go on with its buffers, as a resumed run does.
    """
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            share_buffers(part)
    rng = [rng_state()]
    if dist.is_initialized():
        rng = [None] * dist.get_world_size()
        dist.all_gather_object(rng, rng_state())
    if not dist.is_initialized() or dist.get_rank() == 0:
        state = {name: part.state_dict() for name, part in parts.items()}
        scalers = {name: part.scaler.state_dict() for name, part in parts.items() if hasattr(part, "scaler")}
        with replacing(path, "wb") as file:
            torch.save(state | dict(rng=rng, progress=progress, scalers=scalers), file)
    START.clear()                                       # now there is something to go on from
    if dist.is_initialized():
        dist.barrier()


def read_checkpoint(path, device="cpu", parts=()):
    """What save_checkpoint wrote, as a dict. UserError: no file, or not one with these parts."""
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}: train first, or pass the --out of that run.") from None
    except Exception as error:                          # torch raises many types for a damaged file
        raise UserError(f"{path} cannot be read as a checkpoint ({type(error).__name__}): "
                        "delete it and train again, or pass the --out of another run.") from None
    if not isinstance(saved, dict) or not {"progress", "rng", *parts} <= set(saved):
        raise UserError(f"{path} is not a checkpoint of this script: pass the --out of one of its runs.")
    return saved


def load_checkpoint(path, parts, device):
    """Restores `parts` and the RNG state; returns progress. UserError as read_checkpoint, or a misfit."""
    saved = read_checkpoint(path, device, parts)
    for name, part in parts.items():
        try:
            part.load_state_dict(saved[name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"{path} does not fit this {name} ({textwrap.shorten(str(error), 200)}): "
                            "it comes from a run with other options; use that run's config.json.") from None
        if name in saved.get("scalers", {}):
            part.scaler = torch.amp.GradScaler(device.type)
            part.scaler.load_state_dict(saved["scalers"][name])
    rank = dist.get_rank() if dist.is_initialized() else 0
    set_rng_state(saved["rng"][min(rank, len(saved["rng"]) - 1)])
    return saved["progress"]


def code_of_names(data):
    """A number for the names of a split's images, their order, and the sizes of the files."""
    files = [path for entry in data.paths or () for path in (entry if isinstance(entry, tuple) else [entry])]
    sizes = [os.path.getsize(path) for path in files if isinstance(path, os.PathLike)]
    names = [data.name_of(i) for i in range(len(data))]
    return zlib.crc32(repr((names, sizes)).encode("utf-8", "backslashreplace"))


def read_progress(out, keys=(), classes=None, data=None):
    """progress in OUT/last.pt. UserError: no run of this script (a key is missing), or other classes.
    data: the training images, to go on with; a note if they are not those that the run began with."""
    path = Path(out) / "last.pt"
    progress = read_checkpoint(path)["progress"]
    if not {"classes", *keys} <= set(progress):
        raise UserError(f"{path} is not a checkpoint of this script: pass the --out of one of its runs.")
    if classes is not None:
        check_classes(progress["classes"], classes, out)
    if data is not None and progress.get("images") not in (None, code_of_names(data)):
        if not int(os.environ.get("RANK", 0)):
            print(f"note: the run in {out} began with other training images or labels than the {len(data)} "
                  "of now: its results are those of neither")
    return progress


def check_classes(known, classes, out):
    """UserError if the run in the folder `out` knows other classes than the data have; lists of names."""
    for c, (theirs, ours) in enumerate(itertools.zip_longest(known, classes)):
        if theirs != ours:
            theirs, ours = theirs or "missing", ours or "missing"
            numbers = f" ({len(known)}) than the data ({len(classes)})" * (len(known) != len(classes))
            raise UserError(f"the run in {out} knows other classes{numbers}; class {c} is {theirs} there and "
                            f"{ours} here: pass the --data of that run, or another run.")


# ---- log -------------------------------------------------------------------------------------------------

def due(iteration, every, total):
    """Is it time for what happens every so many iterations, and after the last? Iterations count from 1."""
    return iteration % every == 0 or iteration == total


class Log:
    """Losses summed on the device, log.csv, the printed lines and the clock of a run.

    What it knows stands in `progress`, so that a checkpoint holds it: log (rows), seconds (of training) and
    sums {loss: [sum since the last row, steps]}. The losses of the first process are logged.
    """

    def __init__(self, out, progress, machine):
        self.out, self.progress, self.machine = Path(out), progress, machine
        self.config = number_of_config(out)
        self.began = time.perf_counter() - progress["seconds"]

    def seconds(self):
        """Seconds of training so far, those before a --resume included."""
        return time.perf_counter() - self.began

    def add(self, losses):
        """One step's losses {name: scalar on the device}, detached. Nothing waits for the device here."""
        sums = self.progress["sums"]
        for name, value in losses.items():
            total, steps = sums.get(name, (0.0, 0))
            sums[name] = [total + value, steps + 1]

    def means(self, when):
        """{name: mean since the last row}; when: such as "iteration 200". UserError if one is not finite, or
        if the folder is another run's by now."""
        if number_of_config(self.out) != self.config:
            raise UserError(f"another run has begun in {self.out} and moved the files of this one aside: "
                            "give each run an --out of its own.")
        means = {name: float(total) / steps for name, (total, steps) in self.progress["sums"].items()}
        if not all(map(math.isfinite, means.values())):
            raise UserError(f"the loss is not finite ({means}) by {when}: lower --lr, or use --amp off; "
                            "--resume goes back to the last good checkpoint.")
        return means

    def row(self, when, before, after, text, losses=None):
        """One more row of log.csv, and a line that says "when: losses, text, time"; the sums begin anew.

        before, after: {column: value} on both sides of the losses. losses: their columns, if not just those
        that were added; the others stay empty.
        """
        means = self.means(when)
        columns = means if losses is None else {name: means.get(name, "") for name in losses}
        seconds = self.seconds()
        self.progress["log"].append({**before, **columns, **after, "seconds": seconds})
        self.progress["sums"].clear()
        if self.machine.rank == 0:
            write_csv(self.out / "log.csv", self.progress["log"])
            words = [f"{name} {value:.3f}" for name, value in means.items()]
            tqdm.write(f"{when}: {', '.join([*words, text, duration(seconds)])}")

    def save(self, name, parts, **where):
        """Checkpoint OUT/name of `parts`; progress is told `where`, such as iteration=200, and the time."""
        self.means(" ".join(f"{key} {value}" for key, value in where.items()))      # refuses a loss of nan
        self.progress |= where | dict(seconds=self.seconds())
        save_checkpoint(self.out / name, parts, self.progress)


def settings_of(cfg):
    """What decides metrics.json: the options of the training that differ from the defaults in --help, and
    all of the evaluation."""
    settings = {f.name: getattr(cfg, f.name) for f in fields(cfg)
                if not f.metadata["runtime"] and getattr(cfg, f.name) != f.metadata["default"]}
    evaluated = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.metadata["evaluation"]}
    return dict(settings=settings, evaluated=evaluated)


def facts(cfg, net, progress, machine, *options):
    """What metrics.json tells of every run beside its rates; options: further ones to name, as "method"."""
    told = {name: getattr(cfg, name) for name in ("preset", "seed", *options)}
    return told | settings_of(cfg) | dict(seconds=round(progress["seconds"], 1),
                       device=machine.device.type, processes=machine.world,
                       parameters=sum(p.numel() for p in net.parameters()))


# ---- learning rate, time ---------------------------------------------------------------------------------

def poly_lr(iteration, base, total, power=1.0, floor=0.0, warmup=0, warmup_ratio=1e-6):
    """mmcv 1.x "poly" policy: (base - floor) (1 - it/total)^power + floor; linear warm-up multiplies it."""
    lr = (base - floor) * (1 - min(iteration / total, 1)) ** power + floor
    if iteration < warmup:
        lr *= 1 - (1 - iteration / warmup) * (1 - warmup_ratio)
    return lr


def poly_schedule(optimizer, total, power=1.0, floor=0.0, warmup=0):
    """poly_lr from the base rate of each parameter group, as a torch scheduler: one step an iteration."""
    def factor(base):
        return lambda iteration: poly_lr(iteration, base, total, power, floor, warmup) / base
    factors = [factor(group["lr"]) for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factors)


def duration(seconds):
    """130.0 -> "2.2 min"."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
