"""Ablation tables: a table is data (rows, columns, the paper's numbers), and this file trains and prints it.

Nothing here knows a method. train(cfg, machine) is the script's own, and leaves metrics.json in cfg.out.
"""
import json
import re
import statistics
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from common.run import (UserError, flag_of, read_config, read_json, replacing, settings_of, start_run,
                        write_json)


class Table(NamedTuple):
    """One table of a paper.

    rows: {name: options that the row changes, or a sentence why it cannot be run}. columns: {heading: key of
    metrics.json, (key, name) of a dict in it, or a function of all of it}. paper: {row: a value for each of
    paper_columns; None = not printed}. digits: {heading: decimals} where not 1.
    """
    title: str
    rows: dict
    columns: dict
    paper_columns: tuple = ()
    paper: dict = {}
    digits: dict = {}


def beside_paper(title, columns, paper_columns, rows):
    """Table of rows {name: (what it changes, then what the paper prints under each of paper_columns)}."""
    return Table(title, {name: changes for name, (changes, *_) in rows.items()}, columns, paper_columns,
                 {name: printed for name, (_, *printed) in rows.items()})


def folder_of(name):
    """A folder's name for a row: "w/o both" -> "no-both", "T = 2" -> "T2"."""
    return re.sub(r"[ /]+", "-", name.replace("w/o", "no").replace(" = ", "").replace(",", ""))


def folder_of_changes(changes, usual):
    """A folder's name for a row by what differs from the Config `usual`, so that tables share rows."""
    return "_".join(f"{name}-{value}" for name, value in changes.items()
                    if name != "weights" and value != getattr(usual, name))


def row_out(cfg, folder, seed):
    """The run of a row with this seed: OUT/rows/FOLDER, or OUT/rows/FOLDER-seedK if that is not 0."""
    return Path(cfg.out) / "rows" / (f"{folder}-seed{seed}" if seed else folder)


def row_configs(name, changes, cfg, folder=folder_of):
    """The settings of a row's runs, one a seed: cfg.seed, cfg.seed + 1, ... folder(name): see folder_of."""
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        out = row_out(cfg, folder(name), 0 if "seed" in changes else seed)
        base = dict(table=type(cfg.table)(), seeds=1, seed=seed, out=str(out))
        yield replace(cfg, **base | changes)


def check_rows(rows, cfg, check, also=(), free=()):
    """Before the first row is trained: UserError for a flag beside --table that its rows set, or for a row
    that cannot work. check(cfg): check_config of the script. also: further options that are the rows' own;
    free: options that may be given, as may all that say where data and weights are."""
    own = set(also).union(*(changes for changes in rows.values() if isinstance(changes, dict)))
    own -= {"table", "figure", *free, *(f.name for f in fields(cfg) if f.metadata["source"])}
    for name in sorted(own & set(getattr(cfg, "given", ()))):
        value = getattr(cfg, name)
        raise UserError(f"{flag_of(name)} {value}: the rows of a --table set that themselves: leave it out.")
    for changes in rows.values():
        if isinstance(changes, dict):
            check(replace(cfg, table=type(cfg.table)(), seeds=1, **changes))


def train_rows(rows, cfg, train, machine, folder=folder_of):
    """{row: [metrics, one a seed]} for the rows that can be run; see row_configs and finished_row.
    UserError where a row sets the seed itself and --seeds is above 1."""
    results = {}
    for name, changes in rows.items():
        if isinstance(changes, str):
            continue
        if cfg.seeds > 1 and "seed" in changes:
            raise UserError(f"--seeds {cfg.seeds}: the row {name} sets the seed itself; leave --seeds out.")
        results[name] = []
        for row_cfg in row_configs(name, changes, cfg, folder):
            if machine.rank == 0:
                seed = f", seed {row_cfg.seed}" if cfg.seeds > 1 else ""
                print(f"row {name}{seed} in {row_cfg.out}", flush=True)
            results[name].append(finished_row(train, row_cfg, machine))
    return results


def metrics_of(cfg):
    """metrics.json in cfg.out, if it is that of the finished run with these settings; else None."""
    try:
        metrics = read_json(Path(cfg.out) / "metrics.json", "")
    except UserError:                                   # none, or damaged
        return None
    own = json.loads(json.dumps(settings_of(cfg)))
    fits = isinstance(metrics, dict) and all(metrics.get(key) == value for key, value in own.items())
    return metrics if fits and metrics.get("finished") else None


def finished_run(Config, out):
    """The settings of another run, in the folder `out`. UserError: none of this script, or not finished."""
    cfg = replace(read_config(Config, out), out=str(out))
    if metrics_of(cfg) is None:
        raise UserError(f"the run in {out} is not finished, or its metrics.json is another's: go on with it "
                        "(--out and --resume) first.")
    return cfg


def finished_row(train, cfg, machine):
    """Metrics of the run in cfg.out: read if it is finished, else trained or resumed.
    A run with other settings, data or weights is made again; one that was evaluated otherwise, evaluated."""
    out = Path(cfg.out)
    trained = False
    if (out / "config.json").exists():
        saved = read_json(out / "config.json", "")
        asked = json.loads(json.dumps(asdict(cfg)))     # tuples become lists, as in the file
        differing = [f.metadata for f in fields(cfg) if saved.get(f.name) != asked[f.name]]
        trained = not any(option["source"] or not option["runtime"] for option in differing)
        evaluated = not any(option["evaluation"] for option in differing)
        if trained and evaluated:
            metrics = metrics_of(cfg)
            if metrics:
                return metrics
    if dist.is_initialized():
        dist.barrier()                                  # all have read what the first now changes
    if trained and machine.rank == 0:
        (out / "metrics.json").unlink(missing_ok=True)
        write_json(out / "config.json", asdict(replace(cfg, resume=False)))
    train(replace(cfg, resume=trained), machine)
    if dist.is_initialized():
        dist.barrier()
    return read_json(out / "metrics.json", f"{out}/metrics.json is missing: run the table again.")


def train_from(first, later, train, usual, cfg, machine):
    """train(cfg, machine) for a row whose run begins as those of the other rows do: first(cfg, machine) is
    what they have in common, made once a seed in OUT/rows/shared and copied, to the same numbers.

    usual: the settings of the table; later: the options that `first` does not depend on. A row that changes
    others, or is resumed, begins by itself.
    """
    differing = {f.name for f in fields(cfg) if getattr(cfg, f.name) != getattr(usual, f.name)}
    if cfg.resume or differing - {"table", "seed", "seeds", "out", *later}:
        return train(cfg, machine)

    def begin(cfg, machine):
        first(cfg, machine)
        if machine.rank == 0:
            write_json(Path(cfg.out) / "metrics.json", settings_of(cfg) | dict(finished=True))
    shared, = row_configs("shared", {}, replace(usual, seed=cfg.seed, seeds=1))
    finished_row(begin, shared, machine)
    start_run(cfg, machine)
    if machine.rank == 0:
        with replacing(Path(cfg.out) / "last.pt", "wb") as file:
            file.write((Path(shared.out) / "last.pt").read_bytes())
    if dist.is_initialized():
        dist.barrier()
    return train(replace(cfg, resume=True), machine)


def values_of(column, results):
    """[value of a column, one a seed] for the metrics of a row; None where a run has no such value."""
    if callable(column):
        return [column(metrics) for metrics in results]
    if isinstance(column, tuple):
        return [metrics[column[0]].get(column[1]) for metrics in results]
    return [metrics.get(column) for metrics in results]


def cell_text(values, digits=1):
    """One number as it is; several as mean +- sample deviation; "-" where one is unknown."""
    if not values or any(value is None for value in values):
        return "-"
    if len(values) > 1:
        return f"{statistics.mean(values):.{digits}f} +- {statistics.stdev(values):.{digits}f}"
    value = values[0]
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def markdown(headings, rows):
    """A Markdown table of texts; None becomes "-", and a | in a text stays one."""
    lines = []
    for row in [headings, ["---"] * len(headings), *rows]:
        cells = ["-" if cell is None else str(cell).replace("|", "\\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table_text(table, results):
    """Markdown: our columns, then the paper's. results: what train_rows returns."""
    headings = ["row", *table.columns, *table.paper_columns]
    lines = []
    for name, changes in table.rows.items():
        if name in results:
            cells = [cell_text(values_of(column, results[name]), table.digits.get(heading, 1))
                     for heading, column in table.columns.items()]
        else:
            cells = [f"not run ({changes})"] + [""] * (len(table.columns) - 1)
        printed = table.paper.get(name, (None,) * len(table.paper_columns))
        lines.append([name, *cells, *printed])
    return markdown(headings, lines)


def write_table(number, table, results, cfg, machine, about="", more="", name="table"):
    """OUT/tableN.md, printed too, and OUT/tableN.json, {row: {column: [a value a seed]}}, by one process.
    about: more on the runs, in a few words. more: text below the table. name: "figure" writes figureN.*."""
    if machine.rank:
        return
    seeds = f"seed {cfg.seed}"
    if cfg.seeds > 1:
        seeds = f"seeds {cfg.seed} to {cfg.seed + cfg.seeds - 1}: mean +- sample deviation"
    facts = ", ".join(filter(None, [f"Preset {cfg.preset}", about, machine.device.type, seeds]))
    text = "\n\n".join(filter(None, [f"{table.title}. {facts}.", table_text(table, results), more]))
    path = Path(cfg.out) / f"{name}{number}"
    values = {row: {heading: values_of(column, runs) for heading, column in table.columns.items()}
              for row, runs in results.items()}
    write_json(f"{path}.json", values)
    with replacing(f"{path}.md") as file:
        file.write(text + "\n")
    print(f"\n{text}\nwritten to {path}.md")
