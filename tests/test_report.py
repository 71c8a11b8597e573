"""report.html: every number, column and figure of the toy runs has a text, no text is left over, the page
is valid and names no file that is not there."""
import importlib
import re
from fnmatch import fnmatch
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest

from commands import PAGES, ROOT, SCRIPTS, log_of, read
from common import report

VOID = {"meta", "img", "br", "path", "polyline"}
every_script = pytest.mark.parametrize("name", SCRIPTS)


def page_of(name):
    return importlib.import_module(f"common.{PAGES[name]}").PAGE


class Parsed(HTMLParser):
    """A page's texts and the files that it names; fails where a tag is not closed."""

    def __init__(self, path):
        super().__init__()
        self.open, self.files, self.texts = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.open += [tag] * (tag not in VOID)
        self.files += [unquote(value) for key, value in attributes if key in ("src", "href")]

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, text):
        self.texts.append(text)


@every_script
def test_the_page_tells_all_that_a_toy_run_leaves(name, trained):
    out, page = trained(name), page_of(name)
    parsed = Parsed(out / "report.html")
    text = " ".join(parsed.texts)
    metrics, columns = read(out / "metrics.json"), set(log_of(out)[0]) - {*report.NO_CURVES}
    assert metrics.keys() <= report.NUMBERS.keys() | page.numbers.keys()
    assert columns <= report.COLUMNS.keys() | page.columns.keys()
    pictures = {path.relative_to(out).as_posix() for path in out.rglob("*.png")}
    assert pictures and {file for file in parsed.files if file.endswith(".png")} == pictures
    assert all((out / file).is_file() for file in parsed.files)
    assert all(any(fnmatch(path.name, pattern) for pattern in page.shown) for path in out.rglob("*.png"))
    texts = [meaning for meaning in page.shown.values() if meaning.split("<")[0] in text]
    assert texts and all(text.count(meaning.split("<")[0]) == 1 for meaning in texts)      # told once each
    assert all(text.count(key) for key in metrics) and f"python {name}.py --out {out}" in text
    rates = metrics["miou"]["plain"]["plain"] if name == "pfa_scribble" else metrics.get("miou")
    ours = metrics["accuracy"] if name == "protopool" else rates
    assert next(iter(page.headline(metrics).values())) == pytest.approx(ours)
    last = (out / "printed.txt").read_text().splitlines()[-1]
    assert last.endswith(str(out / "report.html"))


@every_script
def test_no_text_is_left_over(name, trained):
    """What neither the toy run nor the code has: numbers, columns, the fixed part of a figure's name."""
    page, seen = page_of(name), {*read(trained(name) / "metrics.json"), *log_of(trained(name))[0]}
    files = [path for path in ROOT.glob("common/*.py") if not path.stem.endswith("_page")]
    code = "".join(path.read_text(encoding="utf-8") for path in [ROOT / f"{name}.py", *files])
    for word in {**page.numbers, **page.columns}:
        made = "}" + word[word.find("_"):] + '"'                       # f"{name}_by_quantile"
        assert word in seen or re.search(rf"\b{word}\b", code) or "_" in word and made in code, word
    for pattern in page.shown:
        assert max(re.split(r"\*|\d+|\.png|\[.*?\]", pattern), key=len).strip("-_") in code, pattern


@every_script
def test_what_is_missing_does_not_stop_the_page(name):
    page = page_of(name)
    assert page.advice({}) == [] and page.headline({})
    assert len(page.commands) == 3 and all(line.startswith("python ") for line in page.commands)


def test_tables_and_baseline(tmp_path):
    """Rows and headings of tableN.md, a | in a cell, links to the rows' own pages; numbers of --baseline."""
    def headline(metrics):
        return {"ours": metrics["rate"], "paper": 9.0}

    def advice(metrics):
        return ["low"] * (metrics["rate"] < 5)
    page = report.Page("name", "paper", headline, advice, {"rate": "a rate"}, {}, {}, {"python x OUT": "y"})
    rows = "| row | a \\| b |\n| --- | --- |\n| x | 1.5 |"
    (tmp_path / "table3.md").write_text(f"Table 3: title.\n\n{rows}\n\nnote\n")
    (tmp_path / "rows" / "x").mkdir(parents=True)
    (tmp_path / "rows" / "x" / "metrics.json").write_text('{"rate": 4.25, "names": {"<b>": [1, null]}}')
    (tmp_path / "rows" / "y").mkdir()
    (tmp_path / "rows" / "y" / "metrics.json").write_text('{"rate": 7.5}')
    report.write_report(tmp_path / "rows" / "x", page, baseline=tmp_path / "rows" / "y")
    report.write_report(tmp_path, page)
    row, table = Parsed(tmp_path / "rows" / "x" / "report.html"), Parsed(tmp_path / "report.html")
    assert {"4.25", "7.5", "9", "low", "a rate", "<b>", "y"} <= {*row.texts}
    assert ["row", "a | b", "x", "1.5", "note"] == table.texts[table.texts.index("row"):][:5]
    assert "rows/x/report.html" in table.files and "python x OUT" not in table.texts


def test_a_curve_goes_through_its_points():
    points = re.search('points="(.*?)"', report.curve([10, 20, 30], [1.0, 3.0, 2.0]))[1]
    assert points == "46.0,96.0 156.0,12.0 266.0,54.0"
    rows = [dict(iteration="1", a="1", b="nan"), dict(iteration="2", a="2", b="3")]
    drawn = report.curves(rows, dict(a="an a"))
    assert drawn.count("<svg") == 1 and "<b>a</b> an a" in drawn
