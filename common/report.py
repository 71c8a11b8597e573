"""OUT/report.html: what a run did, its numbers with their meaning, its curves and its figures, on one page.

It is made from what lies in the run's folder: metrics.json, log.csv, tableN.md and figures. What the numbers
of a method mean stands in NAME_page.py. The page needs no network and no other file than the figures.
"""
import csv
import html
import math
import os
import re
import shlex
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Callable, NamedTuple
from urllib.parse import quote

from common.run import duration, read_json, replacing


class Page(NamedTuple):
    """What is to be said of the runs of a script, {name: meaning} but for the first four.

    headline(metrics) -> {what it is: percent, or None where it is unknown}, ours first, then the paper's;
    advice(metrics) -> sentences on what is to be looked at, [] if all is as it should be.
    """
    script: str
    paper: str
    headline: Callable
    advice: Callable
    numbers: dict                                                      # of metrics.json
    columns: dict                                                      # of log.csv
    shown: dict                                                        # patterns of file names of figures
    commands: dict                                                     # to try next; OUT is the run's folder


NUMBERS = {                                                            # that every script writes
    "preset": "Recipe that the run started from.",
    "seed": "The same seed repeats the run on the same machine; look at several before you compare.",
    "settings": "Options that differ from the defaults in --help, those of the recipe included.",
    "evaluated": "Options that decide how the run was evaluated, not how it was trained.",
    "seconds": "Training time, all resumed parts together.",
    "device": "Where it was computed.", "processes": "More than one under torchrun.",
    "parameters": "Numbers in the network, frozen ones included.",
    "split": "Images that the rates are of: val is looked at during training, test at the end alone.",
    "finished": "If false, the run is incomplete: --resume goes on.",
}
COLUMNS = {"lr": "learning rate of the backbone"}
NO_CURVES = ("iteration", "epoch", "phase", "seconds")                # columns that say when
STYLE = """
:root{color-scheme:light dark;--ink:#1b1b1f;--soft:#5d6068;--line:#d9dbe0;--back:#fff;--mark:#0b62c4}
@media(prefers-color-scheme:dark){:root{--ink:#e7e8ec;--soft:#a2a6b0;--line:#3a3d45;--back:#16171b}
:root{--mark:#7db8ff}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back);max-width:62rem;margin:auto}
body{padding:1rem}h1{font-size:1.5rem;margin-bottom:0}h2{font-size:1.2rem;margin-top:2.5rem}
a{color:var(--mark)}
.soft,figcaption,.numbers td+td+td{color:var(--soft)}code{overflow-wrap:anywhere}summary{cursor:pointer}
.row{display:flex;flex-wrap:wrap;gap:1.5rem}.row div{max-width:16rem}.row figure{margin:0;width:18rem}
.row b{display:block;font-size:2rem;line-height:1.2}.row figcaption b{display:inline;font-size:1rem}
table{border-collapse:collapse;width:100%}td,th{padding:.35rem .7rem .35rem 0;text-align:left}
td,th{border-top:1px solid var(--line);vertical-align:top}figure{margin:1.5rem 0}
img{max-width:100%;height:auto;background:#fff}
.wide{overflow-x:auto}.advice{border-left:4px solid var(--mark);padding-left:1rem}
@media(max-width:40rem){.numbers td{display:block;border:0;padding:.1rem 0}
.numbers>*>tr>td:first-child{border-top:1px solid var(--line);padding-top:.6rem;font-weight:600}}"""


def written(value):
    """A value of metrics.json as HTML: numbers are rounded, and what has many parts can be unfolded."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
    if not isinstance(value, (dict, list)):
        return html.escape(str(value))
    if not value:
        return "none"
    if isinstance(value, list) and len(str(value)) < 60 and not isinstance(value[0], (dict, list)):
        return ", ".join(map(written, value))
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    rows = [f"<tr><td>{html.escape(str(key))}</td><td>{written(part)}</td></tr>" for key, part in parts]
    return f"<details><summary>{len(rows)} entries</summary><table>{''.join(rows)}</table></details>"


def curve(xs, ys):
    """A line of points as inline SVG; beside it the lowest and highest y, below it the first and last x."""
    low, high, left, right = min(ys), max(ys), min(xs), max(xs)
    across, up = 220 / (right - left or 1), 84 / (high - low or 1)
    points = " ".join(f"{46 + across * (x - left):.1f},{96 - up * (y - low):.1f}" for x, y in zip(xs, ys))
    texts = [(42, 16, "end", f"{high:.3g}"), (42, 100, "end", f"{low:.3g}"),
             (46, 114, "start", f"{left:g}"), (266, 114, "end", f"{right:g}")]
    words = "".join(f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="11" fill="currentColor">'
                    f"{text}</text>" for x, y, anchor, text in texts)
    return ('<svg viewBox="0 0 276 118" role="img"><path d="M46 8V98H268" fill="none" stroke="var(--line)"/>'
            f'<polyline points="{points}" fill="none" stroke="var(--mark)" stroke-width="2"/>{words}</svg>')


def curves(rows, meanings):
    """Rows of log.csv as curves, one a column of numbers; over the row if the iteration begins anew."""
    places = [float(row.get("iteration") or 0) for row in rows]
    if len(set(places)) < len(rows) or places != sorted(places):
        places = range(1, len(rows) + 1)
    pieces = []
    for name in rows[0]:
        points = [(x, float(row[name])) for x, row in zip(places, rows)
                  if name not in NO_CURVES and row[name] and math.isfinite(float(row[name]))]
        if len(points) > 1:
            pieces.append(f"<figure>{curve(*zip(*points))}<figcaption><b>{name}</b> "
                          f"{meanings.get(name, '')}</figcaption></figure>")
    return f'<div class="row">{"".join(pieces)}</div>'


def table_of(path):
    """tableN.md or figureN.md (see common/tables.py) as HTML: a sentence, rows with headings, a note."""
    title, *lines = path.read_text(encoding="utf-8").splitlines()
    rows = [re.split(r"(?<!\\) *\| *", line.strip("| ")) for line in lines if line.startswith("|")]
    rows = [[html.escape(cell.replace("\\|", "|")) for cell in row] for row in rows if set(row) != {"---"}]
    cells = [f"<tr><{tag}>{f'</{tag}><{tag}>'.join(row)}</{tag}></tr>" for tag, row in
             zip(["th"] + ["td"] * len(rows), rows)]
    note = html.escape(" ".join(line for line in lines if line and not line.startswith("|")))
    return (f'<h2>{html.escape(title)}</h2><div class="wide"><table>{"".join(cells)}</table></div>'
            f'<p class="soft">{note}</p>')


def top(metrics, page, baseline):
    """How the page of a run begins: facts, its headline in large figures, and what is to be looked at."""
    facts, tiles, advice = "", page.headline(metrics), page.advice(metrics)
    if "preset" in metrics:
        facts = (f"Preset {metrics['preset']}, seed {metrics['seed']}, {duration(metrics['seconds'])} of "
                 f"training on {metrics['device']}.")
    if baseline and (Path(baseline) / "metrics.json").exists():
        other = page.headline(read_json(Path(baseline) / "metrics.json", ""))
        tiles[f"the first of these in --baseline {baseline}"] = next(iter(other.values()))
    large = "".join(f"<div><b>{written(value)}</b>{html.escape(name)}</div>" for name, value in tiles.items())
    share = metrics.get("settings", {}).get("schedule", 1)
    if share < 1:
        advice = [f"The recipe was shortened to {share:g} of its length (--schedule): read the numbers as "
                  "those of an unfinished training.", *advice]
    advice = "".join(f"<p>{sentence}</p>" for sentence in advice)
    advice = f'<h2>To look at</h2><div class="advice">{advice}</div>' if advice else ""
    return f'<p>{facts}</p><div class="row">{large}</div>{advice}'


def pictures(out, shown):
    """All figures in OUT and OUT/figures in the order of their texts; those of one pattern share a text."""
    left = sorted([*out.glob("*.png"), *out.glob("figures/*.png")], key=lambda path: path.name)
    pieces = []
    for pattern, meaning in [*shown.items(), ("*", "")]:
        for path in [path for path in left if fnmatch(path.name, pattern)]:
            left.remove(path)
            place = quote(path.relative_to(out).as_posix())
            pieces.append(f'<figure><a href="{place}"><img src="{place}" alt="" loading="lazy"></a>'
                          f"<figcaption><b>{html.escape(path.name)}</b> {meaning}</figcaption></figure>")
            meaning = ""
    return f"<h2>Figures</h2>{''.join(pieces)}" if pieces else ""


def write_report(out, page, baseline=""):
    """OUT/report.html of what lies in the folder `out`: a run, tables, or both; prints its path.
    page: Page of the companion. baseline: folder of the run of --baseline."""
    if int(os.environ.get("RANK", 0)):                                 # the first process does it alone
        return
    out = Path(out)
    metrics = read_json(out / "metrics.json", "") if (out / "metrics.json").exists() else {}
    command = "a call from Python"
    if Path(sys.argv[0]).stem == page.script:
        command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    parts = [f'<h1>{page.script}.py</h1><p class="soft">{page.paper}</p>'
             f"<p>Written by <code>{html.escape(command)}</code>.</p>"]
    if metrics:
        parts.append(top(metrics, page, baseline))
    parts += [table_of(path) for pattern in ("table*.md", "figure*.md") for path in sorted(out.glob(pattern))]
    rows = sorted(path.relative_to(out).as_posix() for path in out.glob("rows/*/report.html"))
    links = ", ".join(f'<a href="{quote(path)}">{html.escape(path.split("/")[1])}</a>' for path in rows)
    parts += [f"<p>Rows as runs of their own: {links}</p>" if links else "", pictures(out, page.shown)]
    if metrics:
        meanings = NUMBERS | page.numbers
        rows = "".join(f"<tr><td>{key}</td><td>{written(value)}</td><td>{meanings.get(key, '')}</td></tr>"
                       for key, value in metrics.items())
        parts.append("<h2>Numbers (metrics.json; rates in percent, cosines and correlations up to 1)</h2>"
                     f'<table class="numbers">{rows}</table>')
    if (out / "log.csv").exists():
        with open(out / "log.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        parts.append(f"<h2>Training (log.csv)</h2>{curves(rows, COLUMNS | page.columns)}" if rows else "")
    of_run = out if (out / "config.json").exists() or not metrics else out.parent        # eval-..., ensemble
    tries = "".join(f"<p><code>{html.escape(line.replace('OUT', str(of_run)))}</code><br>{meaning}</p>"
                    for line, meaning in page.commands.items() if metrics or "OUT" not in line)
    with replacing(out / "report.html") as file:
        file.write('<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content='
                   f'"width=device-width, initial-scale=1"><title>{page.script}: {html.escape(out.name)}'
                   f"</title><style>{STYLE}</style></head><body>{''.join(parts)}<h2>To try next</h2>{tries}"
                   "</body></html>\n")
    print(f"all of it on one page: {out / 'report.html'}")
