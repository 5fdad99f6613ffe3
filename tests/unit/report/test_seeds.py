"""Several seeds: means and deviations, differences paired within a seed, and what the report shows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

import pytest

from pipeline.report import page
from pipeline.report.compare import Scores
from pipeline.report.seeds import average, deviation, margin, over_seeds
from pipeline.report.table import render

Json = dict[str, Any]
MakeResults = Callable[..., Json]

RUN: Json = {
    "num_records": 40,
    "methods": ["full_ft", "flearn_ft"],
    "protocols": ["token", "generation"],
    "minds": {("updated", "full_ft"): (0.5, 0.2), ("updated", "flearn_ft"): (0.8, 0.1)},
}


@pytest.fixture(scope="module")
def results(make_results: MakeResults) -> Json:
    """Do not change it."""
    return make_results(**RUN, seeds=[0, 1, 2])


def of(rows: list[Json], **labels: Any) -> list[Json]:
    return [row for row in rows if all(row[name] == value for name, value in labels.items())]


def test_every_seed_has_rows_of_its_own(results: Json) -> None:
    keys = [(row["method"], row["protocol"], row["state"], row["seed"]) for row in results["rows"]]
    assert len(set(keys)) == len(keys) == 3 * 2 * (2 + 3)
    assert (results["seed"], results["seeds"]) == (None, [0, 1, 2])
    assert [entry["method"] for entry in results["methods"]] == ["full_ft", "flearn_ft"]


def test_the_summary_is_their_mean_and_deviation(results: Json) -> None:
    assert len(results["summary"]) == 2 * (2 + 3)
    (row,) = of(results["summary"], method="flearn_ft", protocol="generation", state="updated")
    values = [
        r["reliability"] for r in of(results["rows"], **{k: row[k] for k in ("method", "protocol", "state")})
    ]
    assert len(set(values)) == 3, "seeds that differ"
    assert row["mean"]["reliability"] == pytest.approx(mean(values))
    assert row["deviation"]["reliability"] == pytest.approx(stdev(values))
    assert (row["num_seeds"], row["scale"]) == (3, 0.3)
    assert row["mean"]["portability"] is None and row["deviation"]["portability"] is None


def test_with_one_seed_there_is_no_summary(make_results: MakeResults) -> None:
    one = make_results(**RUN)
    assert (one["seed"], one["seeds"], one["summary"]) == (3, [3], [])


def test_differences_are_paired_within_a_seed(results: Json) -> None:
    rows = of(results["comparisons"], method="flearn_ft", state="updated", protocol="generation")
    rows = of(rows, metric="reliability")
    assert [row["seed"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert row["num_records"] == 40, "records of different seeds are not pooled"
        ours, theirs = (
            of(results["rows"], method=m, protocol="generation", state="updated", seed=row["seed"])[0]
            for m in ("flearn_ft", "full_ft")
        )
        assert row["difference"] == pytest.approx(ours["reliability"] - theirs["reliability"])


def test_a_difference_over_seeds_is_noise_if_its_interval_holds_0(results: Json) -> None:
    rows = of(results["comparisons"], method="flearn_ft", state="updated", protocol="generation")
    differences = [row["difference"] for row in of(rows, metric="reliability")]
    found = Scores(results).to_baseline("flearn_ft", "generation", "reliability")
    assert found is not None
    assert found.value == pytest.approx(mean(differences))
    assert found.noise == pytest.approx(max(4.303 * stdev(differences) / math.sqrt(3), 2 / 40))
    assert found.is_noise == (abs(found.value) <= found.noise)


@pytest.mark.usefixtures("undrawn")
def test_the_page_says_how_many_seeds_and_shows_their_deviation(results: Json) -> None:
    html = page.render(results)
    text = " ".join(re.sub(r"<[^>]+>", " ", html).split())
    assert "Seeds 0, 1, 2" in text
    assert "Scores are means over 3 seeds" in text and "standard errors of the difference" not in text
    assert "those of seed 0" in text
    (row,) = of(results["summary"], method="flearn_ft", protocol="generation", state="updated")
    shown = f"{100 * row['mean']['reliability']:.1f} ±{100 * row['deviation']['reliability']:.1f}"
    assert shown in text
    assert "seed 1" in text, "a step of one seed says which"


@pytest.mark.usefixtures("undrawn")
def test_one_seeds_page_speaks_of_one(make_results: MakeResults) -> None:
    text = page.render(make_results(**RUN))
    assert "of which this run has one" in text and "over seeds" not in text and "those of seed" not in text


def test_the_terminal_table_shows_mean_and_deviation(results: Json) -> None:
    text = render(results, 120, colour=False)
    (row,) = of(results["summary"], method="full_ft", protocol="token", state="updated")
    assert "mean ± standard deviation of 3 seeds" in text
    assert f"{100 * row['mean']['reliability']:.1f}±{100 * row['deviation']['reliability']:.1f}" in text
    assert max(map(len, render(results, 60, colour=False).splitlines())) <= 60


def test_two_seeds_are_few(make_results: MakeResults, results: Json) -> None:
    assert any("Two seeds tell little" in text for text in make_results(**RUN, seeds=[0, 1])["warnings"])
    assert not any("seeds tell little" in text for text in results["warnings"])


@pytest.mark.usefixtures("undrawn")
def test_time_is_a_mean_over_seeds(make_results: MakeResults, results: Json) -> None:
    one = make_results(**RUN)
    times = [
        re.findall(r"Training time by method.*?</table>", page.render(made), flags=re.DOTALL)[0]
        for made in (one, results)
    ]
    assert times[0] == times[1].replace(" Means over seeds.", "")


def test_steps_and_settings_of_all_seeds_are_told_once(results: Json) -> None:
    assert {tuple(row["seeds"]) for row in results["stages"]} == {(), (0,), (1,), (2,)}
    assert [row["seeds"] for row in results["stages"] if row["stage"] == "facts"] == [[]]
    (teach,) = of(results["settings"], stage="teach")
    assert teach["section"]["seed"] == [0, 1, 2]


def test_figures_of_the_subtraction_are_means(results: Json) -> None:
    assert list(results["survival"]) == list(results["layers"]) == ["flearn_ft"]
    assert results["layers"]["flearn_ft"][1]["mlp"]["delta_norm"] == 2.1
    assert results["known"]["num_records"] == 40


def test_the_mean_of_objects_is_that_of_their_values() -> None:
    values = [{"a": 1.0, "b": [None, 2], "c": "x"}, {"a": 3.0, "b": [4, 2], "c": "x"}]
    assert average(values) == {"a": 2.0, "b": [None, 2], "c": "x"}
    assert average([0.1]) == 0.1


def test_deviation_and_margin() -> None:
    assert deviation([1.0]) is None and deviation([1.0, None]) is None
    assert deviation([1.0, 3.0]) == pytest.approx(math.sqrt(2))
    assert margin([1.0, 3.0]) == pytest.approx(12.706 * math.sqrt(2) / math.sqrt(2))
    many = [float(i) for i in range(30)]
    assert margin(many) == pytest.approx(2.228 * stdev(many) / math.sqrt(30))


def test_rows_that_differ_in_their_seed_alone_become_one() -> None:
    rows = [{"m": "a", "x": 1.0}, {"m": "b", "x": 5.0}, {"m": "a", "x": 2.0}]
    assert over_seeds(rows, ("m",), ("x",)) == [
        {"m": "a", "x": 1.5, "num_seeds": 2, "deviation": {"x": pytest.approx(math.sqrt(0.5))}},
        {"m": "b", "x": 5.0, "num_seeds": 1, "deviation": {"x": None}},
    ]
