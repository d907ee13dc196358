import io
import json
import math
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from itertools import combinations, pairwise
from statistics import fmean, stdev
from xml.etree import ElementTree

import matplotlib
import pytest
from rich.console import Console

from allrounder.report import charts, summary, write
from allrounder.report.page import page
from allrounder.report.ranking import answer, ranking

HOSTILE = [
    "<script>alert(1)</script>",
    "$x_1$",
    'a&b"',
    "\u4efb\u52a1",
    "a_long_name_of_a_task_that_does_not_end/2",
    "\x01\u202e\ud800",
]
FEW = ["base", "experts", "average", "regmean", "tall-masks", "adamerging"]
VOID = {"meta", "link", "br", "hr", "img", "input"}
SVG = "{http://www.w3.org/2000/svg}"


class Read(HTMLParser):
    """Elements of a page, its tables and its text; fails where a tag is not closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.tables, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"{tag} closed at {self.getpos()}"

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def drawings(text):
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def printed(report):
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(summary(report))
    return console.export_text()


@pytest.fixture(scope="module")
def report(made):
    return made()


@pytest.fixture(scope="module")
def html(report):
    return page(report)


@pytest.fixture(scope="module")
def hostile(made):
    return page(
        made(
            tasks=HOSTILE, seeds=1, methods=FEW, title="<script>alert(1)</script> & $x_1$", base="/home/<b>me</b>/$m$",
            command="allrounder run '</code><img src=x onerror=alert(1)>'",
        )
    )  # fmt: skip


def test_page_loads_nothing_and_runs_nothing(html):
    read = Read(html)
    tags = {tag for tag, _ in read.elements}
    assert not tags & {"script", "img", "iframe", "object", "embed", "image", "base", "form"}
    for tag, attributes in read.elements:
        assert not any(name.startswith("on") or name in ("src", "srcset", "poster") for name in attributes)
        for name in ("href", "xlink:href"):
            target = attributes.get(name, "#")
            assert (
                target.startswith("#")
                or (tag == "a" and target.startswith("https://arxiv.org/abs/"))
                or target == "data:,"
            )
    assert not re.search(r"@import|url\((?!#)", html)
    policy = next(
        a["content"] for t, a in read.elements if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'")
    assert "script-src" not in policy


def test_structure(html):
    read = Read(html)
    assert ("html", {"lang": "en"}) in read.elements
    levels = [int(tag[1]) for tag, _ in read.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in read.elements:
        for name in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(name, ids[0]) in ids
        for target in re.findall(
            r"url\(#([^)]*)\)|^#(.*)", attributes.get("clip-path", "") + attributes.get("xlink:href", "")
        ):
            assert "".join(target) in ids
    order = [
        "All methods", "What each method keeps", "What it costs to store", "Each task", "Inside the experts",
        "What was run", "Notes", "Papers",
    ]  # fmt: skip
    places = [html.index(f">{heading}</h2>") for heading in order]
    assert places == sorted(places)
    assert len(html.encode()) < 500_000


def test_every_drawing_is_well_formed_and_described(html):
    found = drawings(html)
    assert len(found) == 2 + 2 + 2 + 5
    for drawing in found:
        assert drawing.get("role") == "img"
        assert len(drawing.get("aria-label")) > 20
        assert [part for part in drawing.iter() if part.tag == f"{SVG}text"]
    assert "#0100" not in html  # every stand-in colour became a variable
    assert "<metadata" not in html


def test_figures_in_the_page_are_the_report_s(report, html):
    tables = Read(html).tables
    methods = {re.sub(r"^\W", "", row[0]): row for row in tables[0][1:]}
    scores = {row[0]: row for row in tables[1]}
    assert scores["Method"][1:] == report["tasks"]
    assert len(methods) == len(report["methods"]) == len(scores) - 1
    for row in report["methods"]:
        means = [fmean(by_task.values()) for by_task in row["normalised"].values()]
        shown = next(
            cells
            for name, cells in methods.items()
            if name.removesuffix(row["family"]).split(" chosen")[0] == row["title"]
        )
        assert shown[1] == f"{fmean(means):.1f} ± {stdev(means):.1f}%"
        assert shown[4] == row["needs"]
        for task, cell in zip(report["tasks"], scores[row["title"]][1:]):
            assert cell == f"{100 * fmean(by_task[task] for by_task in row['scores'].values()):.1f}"
    order = [float(cells[1].split()[0]) for cells in methods.values()]
    assert order == sorted(order, reverse=True)
    assert methods[next(name for name in methods if "chosen" in name)][0].count("RegMean") == 1
    wide, narrow = drawings(html)[:2]
    for drawing in (wide, narrow):
        texts = [part.text for part in drawing.iter(f"{SVG}text")]
        for row in report["methods"]:
            means = row["mean"].values()
            known = row["name"] in ("base", "experts")
            assert (f"{fmean(means):.1f} ± {stdev(means):.1f}%" in texts) != known
    cross = [part.text for part in drawings(html)[4].iter(f"{SVG}text")]
    for line in report["cross"]["values"]:
        assert all(f"{100 * value:.0f}" in cross for value in line)


def test_marks_stand_where_their_values_are(report):
    lines = ranking(report)
    drawing = ElementTree.fromstring(charts.dots(lines, narrow=False, label="x"))
    marks = [float(use.get("x")) for use in drawing.iter(f"{SVG}use") if "stroke: var(--paper)" in use.get("style", "")]
    values = [line.mean for line in lines if line.row["name"] not in ("base", "experts")]
    assert len(marks) == len(values)
    slope = (marks[0] - marks[-1]) / (values[0] - values[-1])
    assert slope > 1
    assert marks == pytest.approx([marks[0] + slope * (value - values[0]) for value in values], abs=0.05)


@pytest.mark.parametrize("narrow", [True, False])
def test_labels_of_the_trade_off_do_not_collide(made, narrow):
    for one in (made(), made(tasks=[f"t{i}" for i in range(20)], seeds=1), made(tasks=["a"], seeds=1)):
        text = charts.tradeoff(ranking(one), unit=101_416, narrow=narrow, label="x", metric="accuracy")
        boxes = {}
        for part in ElementTree.fromstring(text).iter(f"{SVG}text"):
            if part.text in {row["title"] for row in one["methods"]}:
                width = len(part.text) * 12 * 0.55
                x = float(part.get("x")) - width * ("text-anchor: end" in part.get("style"))
                x -= width / 2 * ("text-anchor: middle" in part.get("style"))
                boxes[part.text] = (x, float(part.get("y")), width)
        assert "RegMean" in boxes
        assert "Base, zero-shot" in boxes
        for (x, y, width), (other_x, other_y, other) in combinations(boxes.values(), 2):
            assert abs(y - other_y) >= 12 or x + width <= other_x or other_x + other <= x


def test_front_is_what_nothing_beats():
    points = [(1, 50), (1, 90), (2, 90), (2, 95), (1.5, 80), (3, 95), (6, 100), (7, 99)]
    slow = [
        i for i, (x, y) in enumerate(points)
        if not any((u <= x and v >= y) and (u, v) != (x, y) for u, v in points)
    ]  # fmt: skip
    assert charts._front(points) == slow == [1, 3, 6]


def test_hostile_names_are_text(hostile):
    read = Read(hostile)
    assert not {"script", "b", "img"} & {tag for tag, _ in read.elements}
    for name in (
        *HOSTILE[:5],
        "<script>alert(1)</script> & $x_1$",
        "/home/<b>me</b>/$m$",
        "'</code><img src=x onerror=alert(1)>'",
    ):
        assert name in read.text
    texts = {part.text for drawing in drawings(hostile) for part in drawing.iter(f"{SVG}text")}
    assert "$x_1$" in texts  # as it was written: not read as mathematics
    assert 'a&b"' in texts
    assert "<script>alert…" in texts or "<script>alert(…" in texts
    assert "\x01" not in hostile
    hostile.encode()


def test_stand_in_colours_and_ids_in_names_stay(made):
    named = page(made(tasks=['id="x"', "#010101", "1.23456"], seeds=1, methods=FEW))
    texts = {part.text for drawing in drawings(named) for part in drawing.iter(f"{SVG}text")}
    assert {'id="x"', "#010101", "1.23456"} <= texts


def test_same_report_same_bytes_whatever_matplotlib_is_set_to(made, tmp_path):
    small = made(methods=FEW)
    before = dict(matplotlib.rcParams)
    write(small, tmp_path / "one.html")
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.hashsalt": None, "text.usetex": True}):
        write(json.loads(json.dumps(small)), tmp_path / "two.html")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.html", "two.html"]


def _zero(results):
    results["experts"][0]["scores"] = dict.fromkeys(results["experts"][0]["scores"], 0.0)


def _nan(results):
    for which in ("scores", "validation"):
        results["regmean"][0][which] = dict.fromkeys(results["regmean"][0][which], math.nan)
    results["experts"][0]["cross"] = [[math.nan] * 6] * 6


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"seeds": 1}, "Best merged model: RegMean. It keeps"),
        ({"tasks": ["plain"], "seeds": 1}, "of the expert's accuracy."),
        ({"tasks": [f"t{i}" for i in range(20)], "tensors": 200, "seeds": 2}, "in 1 model instead of 20."),
        ({"methods": ["base", "experts", "tall-masks"]}, "No merged model was chosen"),
        ({"methods": ["base", "experts"]}, "No merged model was chosen"),
        ({"change": _zero, "seeds": 1}, "Its share of the experts' accuracy is not known."),
        ({"change": _nan}, "Best merged model: AdaMerging, layer-wise. It keeps"),
    ],
    ids=["one seed", "one task", "twenty tasks", "no single model", "references alone", "experts at zero", "nan"],
)
def test_unusual_reports(made, options, sentence):
    report = made(**{"methods": FEW} | options)
    text = page(report)
    read = Read(text)
    drawings(text)
    assert sentence in read.text
    assert ("±" in read.text) == (len(report["seeds"]) > 1)
    assert not re.search(r"\bnan\b|\bNone\b", read.text)
    assert len(text.encode()) < 500_000
    assert sentence.split(".")[0] in " ".join(printed(report).split())


def test_answer_tells_what_speaks_against_the_choice(made):
    def change(results):
        for one in results["adamerging"].values():
            one["validation"] = dict.fromkeys(one["scores"], 1.0)

    sentences = answer(made(methods=FEW, change=change))
    assert sentences[0].startswith("Best merged model: AdaMerging, layer-wise.")
    assert any(
        text.startswith("AdaMerging, layer-wise was chosen on validation; on test, RegMean came out higher")
        for text in sentences
    )
    assert any(
        text.startswith("TALL-masks, which is not one model, keeps") and "1.2 times the bytes of one model" in text
        for text in sentences
    )
    assert not any("chosen on validation" in text for text in answer(made(methods=FEW)))


def test_summary_prints_every_method_and_marks_the_chosen(made):
    report = made(title="[red]Mine[/red] & yours")
    text = printed(report)
    assert "[red]Mine[/red] & yours" in text
    for row in report["methods"]:
        assert row["title"] in text
        assert f"{fmean(row['mean'].values()):.1f} ± " in text
    marked = [line for line in text.splitlines() if "│ * │" in line]
    assert len(marked) == 1
    assert "RegMean" in marked[0]
    assert answer(report)[0] in text


MEASURE = """<!DOCTYPE html><title>measure</title><body><script>
const found = {}, pages = PAGES;
let left = 2 * Object.keys(pages).length;
function measure(key, width, page) {
  const boxes = query => [...page.querySelectorAll(query)].map(part => part.getBoundingClientRect());
  found[key] = {
    over: page.documentElement.scrollWidth - width,
    widest: Math.max(...boxes("section, h1, p, ul, dl, details").map(box => box.right)),
    smallest: Math.min(...boxes("svg text").map(box => box.height).filter(Boolean)),
    drawings: boxes("svg").filter(box => box.width > 0).length,
    scripts: page.scripts.length,
    title: page.title,
  };
  left -= 1;
  if (left) return;
  const out = document.createElement("pre");
  out.id = "out";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
}
for (const [name, html] of Object.entries(pages)) for (const width of [360, 1280]) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `border: 0; width: ${width}px; height: 3000px`;
  frame.onload = () => measure(`${name} ${width}`, width, frame.contentDocument);
  frame.srcdoc = html;
  document.body.append(frame);
}
</script>"""


def test_in_a_browser_nothing_overflows_and_the_console_is_silent(report, html, hostile, made, tmp_path):
    browser = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if browser is None:
        pytest.skip("no Chromium on the PATH")
    many = page(made(tasks=[f"a_task_with_a_name_{i}" for i in range(20)], tensors=200, methods=FEW))
    pages = {"digits": html, "hostile": hostile, "many": many}
    content = json.dumps(pages).replace("<", "\\u003c")
    (tmp_path / "measure.html").write_text(MEASURE.replace("PAGES", content), encoding="utf-8")
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom",
    ]  # fmt: skip
    done = subprocess.run(
        [browser, *flags, (tmp_path / "measure.html").as_uri()], capture_output=True, text=True, timeout=300, check=True
    )
    assert ":CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    found = json.loads(unescape(re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.DOTALL)[1]))
    assert len(found) == 6
    for name, one in found.items():
        assert one["over"] <= 0, name
        assert one["widest"] <= int(name.split()[1]), name
        assert one["scripts"] == 0
        assert one["drawings"] == {"digits": 2 + 2 + 5, "hostile": 2 + 2 + 1, "many": 2 + 2 + 1}[name.split()[0]]
        assert one["smallest"] >= 8, name
    assert found["hostile 360"]["title"] == "<script>alert(1)</script> & $x_1$"


def test_tasks_in_sequence_are_drawn_by_task_and_by_method(made):
    names = ["base", "experts", "average", "continual/er", "continual/finetune"]
    text = page(made(tasks=HOSTILE, methods=names))
    read = Read(text)
    assert "One task after another" in read.text
    labels = [unescape(attrs.get("aria-label", "")) for tag, attrs in read.elements if tag == "svg"]
    curves = [label for label in labels if "score after each task" in label]
    assert len(curves) == len(HOSTILE)
    assert all("In sequence: ER: " in label and "In sequence: finetuning: " in label for label in curves)
    assert sum("below the diagonal" in label for label in labels) == 2
    assert len(drawings(text)) == text.count("<svg")
    assert "One task after another" not in page(made(methods=FEW))
