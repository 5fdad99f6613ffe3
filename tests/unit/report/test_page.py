"""report.html: self-contained, true to results.json, safe against what models say, and readable where scores
are missing.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest

from pipeline.artifact import Artifact
from pipeline.report import page
from pipeline.report.results import build
from pipeline.report.svg import DARK, LIGHT
from pipeline.report.table import render
from pipeline.report.terms import look

Json = dict[str, Any]
MakeResults = Callable[..., Json]
WriteRun = Callable[..., tuple[Json, dict[str, Artifact]]]

SMALL: Json = {"methods": ["flearn_ft"], "protocols": ["generation"]}

VOID = {"meta", "br", "link", "img", "source", "input", "hr"}


class Reader(HTMLParser):
    """Collects a page's tables (as texts of cells), its tags and its ids; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in VOID:
            return
        self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def results(make_results: MakeResults) -> Json:
    """Do not change it."""
    return make_results(num_records=60)


@pytest.fixture(scope="module")
def html(results: Json) -> str:
    return page.render(results)


def shown(html: str) -> str:
    """What a reader sees or hears of a page, but for its settings (which may well be null)."""
    html = re.sub(r"<(pre|style)>.*?</\1>", "", html, flags=re.DOTALL)
    return " ".join([Reader(html).text, *re.findall(r'(?:alt|aria-label)="([^"]*)"', html)])


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def pictures(html: str) -> list[str]:
    """The SVG files inside the page: of each figure the dark one, then the light one."""
    data = re.findall(r'"data:image/svg\+xml;base64,([^"]*)"', html)
    return [base64.b64decode(one).decode() for one in data]


def test_nothing_is_loaded_from_elsewhere(html: str) -> None:
    without_pictures = re.sub(r'"data:image/svg\+xml;base64,[^"]*"', '""', html)
    assert not re.search(
        r"https?:|//[a-z]|@import|@font-face|data:",
        without_pictures.partition("<body>")[0] + re.sub(r">[^<]*<", "><", without_pictures),
    )
    tags = Reader(html).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "iframe", "object", "embed", "base"}
    assert not [attrs for _, attrs in tags if any(name.startswith("on") for name in attrs)]
    loaded = [str(value) for _, attrs in tags for name, value in attrs.items() if name in ("src", "srcset")]
    assert loaded and all(value.startswith("data:image/svg+xml;base64,") for value in loaded)
    for picture in pictures(html):
        addresses = set(re.findall(r"https?://[^\s\"<]*", picture))
        assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}, (
            "names, not addresses"
        )
        assert not re.search(r"<script|<image|@import|@font-face", picture)
    links = {attrs["href"] for tag, attrs in tags if tag == "a"}
    assert {link for link in links if not str(link).startswith("#")} == {"results.json"}


def test_every_link_and_reference_has_its_target_and_ids_are_unique(html: str) -> None:
    tags = Reader(html).tags
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(set(ids)) == len(ids)
    references = {
        str(attrs[name])[1:]
        for tag, attrs in tags
        for name in ("href", "xlink:href")
        if name in attrs and str(attrs[name])[0] == "#"
    }
    references |= set(re.findall(r"url\(#([^)]+)\)", html))
    assert references
    assert references <= set(ids)


def test_main_tables_hold_the_numbers_of_results_json(results: Json, html: str) -> None:
    tables = [table for table in Reader(html).tables if table[0][0] == "Model"]
    rows = {(row["protocol"], row["method"], row["state"]): row for row in results["rows"]}
    assert len(tables) == 3
    for protocol, table in zip(("generation", "probability", "token"), tables, strict=True):
        header, original, *methods = table
        assert [cell.partition(" ")[0] for cell in header[1:]] == [
            "Reliability",
            "Generality",
            "Locality",
            "Old",
        ]
        lines = [(rows[protocol, "full_ft", "original"], original)]
        lines += [
            (rows[protocol, entry["method"], "updated"], line)
            for entry, line in zip(results["methods"], methods, strict=True)
        ]
        for row, line in lines:
            for metric, cell in zip(
                ("reliability", "generality", "locality", "leakage"), line[1:], strict=True
            ):
                words = cell.split()
                assert words[0] == percent(row[metric])
                if row[metric] is not None:
                    assert words[1] == f"±{percent(row['stderr'][metric])}"


def test_scores_are_split_by_what_the_original_knew(results: Json, html: str) -> None:
    table = next(table for table in Reader(html).tables if table[0][1].startswith("Old fact known"))
    rows = [
        row
        for row in results["known"]["rows"]
        if (row["protocol"], row["state"]) == ("generation", "updated")
    ]
    for line, method in zip(table[2:], results["methods"], strict=True):
        known, unknown = (
            next(r for r in rows if r["method"] == method["method"] and r["subset"] == s)
            for s in ("known", "unknown")
        )
        metrics = ("reliability", "generality", "locality", "leakage")
        assert line[1:] == [percent(known[m]) for m in metrics] + [percent(unknown[m]) for m in metrics]


@pytest.mark.usefixtures("undrawn")
def test_no_split_where_the_original_knew_everything(make_results: MakeResults) -> None:
    html = page.render(make_results(num_records=3, **SMALL, minds={("original", None): (0.0, 1.0)}))
    assert "The original model knew all of the 3 old facts" in html
    assert "Old fact not known" not in html


def test_all_numbers_are_there(results: Json, html: str) -> None:
    table = next(table for table in Reader(html).tables if table[0][-1] == "n")
    assert len(table) == 1 + len(results["rows"])
    for row, line in zip(results["rows"], table[1:], strict=True):
        assert line[0].split()[0] == look(row["method"]).label
        metrics = ("reliability", "generality", "locality", "leakage", "portability", "old_reliability")
        assert [cell.split()[0] for cell in line[3:9]] == [percent(row[metric]) for metric in metrics]
        assert line[-1] == str(row["num_records"])


def test_differences_are_those_of_results_json(results: Json, html: str) -> None:
    table = next(table for table in Reader(html).tables if table[0][0] == "Model")
    line = next(line for line in table if line[0].startswith("F-Learning_FT"))
    row = next(
        row
        for row in results["comparisons"]
        if (row["method"], row["protocol"], row["metric"]) == ("flearn_ft", "generation", "leakage")
    )
    points = f"{100 * row['difference']:+.1f}".replace("-", "−")
    kind = (
        "noise"
        if abs(row["difference"]) <= 2 * max(row["stderr"], 1 / 60)
        else "better"
        if row["difference"] < 0
        else "worse"
    )
    assert line[4].split()[2:] == [points, kind]


def test_best_is_bold_and_the_original_never_is(results: Json, html: str) -> None:
    body = html[html.index("<tbody>") : html.index("</tbody>")]
    bold = re.findall(r'<td class="best">\s*([0-9.]+)', body)
    rows = [row for row in results["rows"] if row["protocol"] == "generation" and row["state"] == "updated"]
    expected = {percent(max(row[m] for row in rows)) for m in ("reliability", "generality", "locality")} | {
        percent(min(r["leakage"] for r in rows))
    }
    assert set(bold) == expected
    assert "best" not in body[body.index("original") : body.index("</tr>")]


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_missing_scores_are_dashes(write_run: WriteRun, missing: float | None) -> None:
    section, inputs = write_run(num_records=3, **SMALL)
    updated = inputs[section["updates"][0]["evaluations"]["updated"]]
    updated.result["protocols"]["generation"]["generality"] = missing
    text = page.render(build(section, inputs))
    main = next(table for table in Reader(text).tables if table[0][0] == "Model")
    assert [cell.split()[0] for cell in main[2][1:]] == ["100.0", "–", "66.7", "0.0"]
    assert not re.search(r"\b(nan|NaN|None|null|undefined)\b", shown(text))


@pytest.mark.usefixtures("undrawn")
def test_what_models_say_is_escaped(make_results: MakeResults) -> None:
    results = make_results(
        num_records=3,
        **SMALL,
        prompt="<b>Who</b> & {i}?",
        answer='<script>alert("{text}")</script><img src=x onerror=y>',
    )
    html = page.render(results)
    assert "<script>" not in html
    assert "<img src=x" not in html
    assert "&lt;script&gt;alert(" in html
    assert "&lt;b&gt;Who&lt;/b&gt; &amp; 0?" in html
    Reader(html)


def test_summary_speaks_of_the_best_method_in_its_numbers(results: Json, html: str) -> None:
    rows = {(row["method"], row["state"]): row for row in results["rows"] if row["protocol"] == "generation"}
    updated = {
        method: row["reliability"]
        for (method, state), row in rows.items()
        if state == "updated" and method.startswith("flearn")
    }
    best = max(updated, key=lambda method: updated[method])
    row = rows[best, "updated"]
    headline = re.search(r'class="headline">([^<]*)<', html)
    assert headline is not None
    assert headline[1].startswith(
        f"{look(best).label} learned {percent(row['reliability'])}% of the new answers"
    )
    left, before = percent(row["leakage"]), percent(rows[best, "original"]["leakage"])
    assert f"still gives {left}% of the old ones (originally {before}%)" in headline[1]


def test_figures_tell_those_who_cannot_see_them(results: Json, html: str) -> None:
    figures = [attrs for tag, attrs in Reader(html).tags if tag == "img"]
    assert (
        len(figures) == 3 + 2 * 3 + 2 * 2 + 2
    )  # bars, curves, task vectors (two methods share one; norm, relative norm), cost
    row = next(
        row
        for row in results["curves"]
        if (row["method"], row["protocol"], row["state"]) == ("flearn_ft", "generation", "forgotten")
    )
    assert any(
        f"forgotten: new answer {percent(row['new_answer'])}%" in str(attrs["alt"]) for attrs in figures
    )
    tables = Reader(html).tags
    assert sum(tag == "table" for tag, _ in tables) == sum(tag == "caption" for tag, _ in tables)


def layer_pictures(html: str) -> list[str]:
    """What the pictures by layer tell those who cannot see them."""
    labels = [attrs["alt"] for tag, attrs in Reader(html).tags if tag == "img"]
    return [label for label in labels if label is not None and "layer 0: " in label]


def test_norm_and_relative_norm_by_layer(html: str) -> None:
    norm_ft, norm_lora, relative_ft, relative_lora = layer_pictures(html)
    assert norm_ft.startswith(
        "Norm of the task vector of F-Learning_FT. layer 0: MLP 1.9, attention 1.1; layer 1: MLP 2.1, "
    )
    assert norm_lora.startswith(
        "Norm of the task vector of F-Learning_LoRA, F-Learning_LoRA-FT. layer 0: MLP 0, attention 1.1; "
    )
    start = (
        "Norm of the task vector of F-Learning_FT, in % of the original weights' norm."
        " layer 0: MLP 3.8, attention 2.75; "
    )
    assert relative_ft.startswith(start)
    assert "layer 0: MLP 0, attention 2.75; " in relative_lora


def test_table_by_layer_holds_the_numbers_of_results_json(results: Json, html: str) -> None:
    _, header, *lines = next(table for table in Reader(html).tables if "attention" in table[0])
    assert header == ["Method", "Layer", *2 * ["Norm", "Relative", "Changed", "Kept"]]
    rows = [(look(method).label, row) for method, rows in results["layers"].items() for row in rows]
    assert len(lines) == len(rows) == 3 * 4
    for (label, row), line in zip(rows, lines, strict=True):
        assert line[:2] == [label, str(row["layer"])]
        for figures, cells in ((row["mlp"], line[2:6]), (row["attention"], line[6:])):
            norms = [f"{figures['delta_norm']:#.3g}", f"{100 * figures['relative_norm']:#.3g}"]
            assert cells == [*norms, percent(figures["share_changed"]), percent(figures["projection"])]
    assert lines[4][2:6] == ["0.00", "0.00", "0.0", "–"]


KEPT_ALL = "stored attention and MLP weights keep 100.0% of the intended change"


def test_where_nothing_is_rounded_away_a_sentence_says_so(html: str) -> None:
    assert KEPT_ALL in html
    assert "What survives of it" not in html


def test_survival_by_layer_where_rounding_took_something(write_run: WriteRun) -> None:
    section, inputs = write_run(
        num_records=3, methods=["flearn_lora", "flearn_lora_ft"], protocols=["generation"]
    )
    inputs[section["updates"][1]["subtraction"]].result["layers"][3]["attention"]["projection"] = 0.812
    html = page.render(build(section, inputs))
    assert KEPT_ALL not in html
    assert "What survives of it" in html
    whole, rounded, *norms = layer_pictures(html)
    start = (
        "Share of the intended change of F-Learning_LoRA{} that the stored weights keep, in %."
        " layer 0: attention 100; "
    )
    assert whole.startswith(start.format(""))
    assert rounded.startswith(start.format("-FT"))  # the same vector, subtracted with another lambda
    assert rounded.endswith("layer 3: attention 81.2.")
    assert len(norms) == 2


@pytest.mark.parametrize("projection", [None, float("nan")])
def test_nothing_is_said_of_layers_where_nothing_was_to_change(
    make_results: MakeResults, projection: float | None
) -> None:
    survival = {"share_changed": 0.0, "projection": projection, "cosine": None, "norm_ratio": None}
    html = page.render(make_results(num_records=3, **SMALL, survival=survival))
    assert KEPT_ALL not in html
    assert "What survives of it" not in html
    assert len(layer_pictures(html)) == 2


def test_pictures_are_in_the_colours_of_their_page(html: str) -> None:
    found = pictures(html)
    media = re.findall(r'<source media="([^"]*)"', html)
    assert set(media) == {"screen and (prefers-color-scheme: dark)"} and len(found) == 2 * len(media)
    for start, palette in ((0, DARK), (1, LIGHT)):
        own = {palette.ink, palette.muted, palette.rule, palette.page, *palette.hues.values()}
        for picture in found[start::2]:
            assert (
                set(re.findall(r"#[0-9a-f]{6}\b", re.sub(r'(href|id)="[^"]*"|url\([^)]*\)', "", picture)))
                <= own
            )
    for colour in (LIGHT.ink, DARK.ink, LIGHT.hues["blue"], DARK.hues["blue"]):
        assert colour in html


@pytest.mark.parametrize(
    "run",
    [{"protocols": ["token"]}, {"methods": ["lora"]}, {"protocols": ["probability"]}, {"num_records": 1}],
)
def test_smaller_runs_have_a_page_and_a_table_too(make_results: MakeResults, run: Json) -> None:
    results = make_results(**{"num_records": 8} | SMALL | run)
    html = page.render(results)
    Reader(html)
    assert "None" not in shown(html)
    assert "Reliability" in render(results, 80)


@pytest.mark.usefixtures("undrawn")
def test_unknown_methods_go_by_their_own_name(make_results: MakeResults) -> None:
    results = make_results(num_records=3, **SMALL)
    for part in ("rows", "curves", "methods", "comparisons"):
        for row in results[part]:
            row["method"] = "my_editor"
    assert "my_editor" in page.render(results)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_terminal_table(results: Json, width: int) -> None:
    text = render(results, width, colour=False)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    for row in results["rows"]:
        if row["state"] == "updated" and row["protocol"] == "generation":
            line = next(line for line in text.splitlines() if look(row["method"]).label in line.split())
            assert line.split()[-4:] == [
                percent(row[metric]) for metric in ("reliability", "generality", "locality", "leakage")
            ]
    flat = " ".join(text.split())
    assert all(" ".join(warning.split()) in flat for warning in results["warnings"])


def test_terminal_table_is_coloured_on_a_terminal_only(
    results: Json, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[1m" in render(results, 100, colour=True)
    assert "\x1b" not in render(results, 100)  # pytest's stdout is no terminal
