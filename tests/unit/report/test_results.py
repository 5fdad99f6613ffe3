"""results.json: the contract of its rows, and that every figure is the manifests' own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact import Artifact
from pipeline.context import Context
from pipeline.errors import InputError
from pipeline.report import samples
from pipeline.report.columns import Records
from pipeline.report.paired import compare
from pipeline.report.results import build
from pipeline.report.stage import run

Json = dict[str, Any]
WriteRun = Callable[..., tuple[Json, dict[str, Artifact]]]
MakeResults = Callable[..., Json]

SMALL: Json = {"methods": ["flearn_ft"], "protocols": ["generation"]}
ROW = {
    *(
        "method",
        "protocol",
        "state",
        "reliability",
        "generality",
        "locality",
        "leakage",
        "portability",
        "old_reliability",
    ),
    *("num_records", "seed", "scale", "stderr", "counts", "other"),
}
TOP = {
    *(
        "name",
        "seed",
        "seeds",
        "methods",
        "rows",
        "summary",
        "comparisons",
        "curves",
        "known",
        "survival",
        "layers",
        "stages",
        "data",
    ),
    *("samples", "settings", "versions", "finished", "warnings"),
}


def test_rows_are_the_contract(make_results: MakeResults) -> None:
    results = make_results(num_records=20)
    assert set(results) == TOP
    assert all(set(row) == ROW for row in results["rows"])
    keys = [(row["method"], row["protocol"], row["state"]) for row in results["rows"]]
    states = {"full_ft": ("original", "updated"), "flearn_lora": ("original", "forgotten", "updated")}
    assert len(set(keys)) == len(keys) == 3 * (2 * 2 + 3 * 3)
    for method, expected in states.items():
        for protocol in ("token", "probability", "generation"):
            assert tuple(state for m, p, state in keys if (m, p) == (method, protocol)) == expected
    assert {row["scale"] for row in results["rows"] if row["method"] == "flearn_lora_ft"} == {2}
    assert {row["scale"] for row in results["rows"] if row["method"] == "full_ft"} == {None}
    assert {(row["num_records"], row["seed"]) for row in results["rows"]} == {(20, 3)}


def test_scores_are_the_evaluations_own(write_run: WriteRun) -> None:
    section, inputs = write_run(num_records=20)
    results = build(section, inputs)
    for method in section["updates"]:
        for row in (row for row in results["rows"] if row["method"] == method["method"]):
            scores = inputs[method["evaluations"][row["state"]]].result["protocols"][row["protocol"]]
            for metric in (
                "reliability",
                "generality",
                "locality",
                "leakage",
                "portability",
                "old_reliability",
            ):
                assert row[metric] == scores[metric]
    assert {row["portability"] for row in results["rows"]} == {None}
    assert {row["locality"] for row in results["rows"] if row["state"] == "original"} == {None}


def test_curves_also_have_the_tuned_state(make_results: MakeResults) -> None:
    curves = make_results(num_records=20)["curves"]
    mine = [
        row["state"] for row in curves if row["method"] == "flearn_ft" and row["protocol"] == "generation"
    ]
    assert mine == ["original", "tuned", "forgotten", "updated"]
    assert [row["state"] for row in curves if row["method"] == "lora" and row["protocol"] == "token"] == [
        "original",
        "updated",
    ]


def test_known_and_unknown_facts_make_up_all(make_results: MakeResults) -> None:
    known = make_results(num_records=40)["known"]
    rows = {
        row["subset"]: row
        for row in known["rows"]
        if (row["method"], row["protocol"], row["state"]) == ("lora", "token", "updated")
    }
    assert rows["known"]["num_records"] == known["num_known"]
    assert rows["known"]["num_records"] + rows["unknown"]["num_records"] == known["num_records"] == 40


def test_stages_say_what_each_step_cost(write_run: WriteRun) -> None:
    section, inputs = write_run(num_records=5)
    stages = build(section, inputs)["stages"]
    assert [step["id"] for step in stages] == list(inputs)
    keys = {
        "id",
        "stage",
        "methods",
        "seeds",
        "state",
        "seconds",
        "peak_memory_bytes",
        "peak_gpu_memory_bytes",
        "num_ranks",
        "device",
    }
    assert all(set(step) == keys for step in stages)
    assert {step["state"] for step in stages if step["stage"] == "evaluate"} == {
        "original",
        "tuned",
        "forgotten",
        "updated",
    }


def test_layers_are_the_subtractions_own(write_run: WriteRun) -> None:
    section, inputs = write_run(num_records=5)
    results = build(section, inputs)
    forgets = {
        method["method"]: inputs[method["subtraction"]].result
        for method in section["updates"]
        if method["subtraction"] is not None
    }
    assert list(results["layers"]) == list(forgets) == ["flearn_ft", "flearn_lora", "flearn_lora_ft"]
    for method, facts in forgets.items():
        assert [set(row) for row in results["layers"][method]] == 4 * [
            {"layer", "attention", "mlp", "matrices"}
        ]
        for row, stored in zip(results["layers"][method], facts["layers"], strict=True):
            assert (row["layer"], row["matrices"]) == (stored["layer"], stored["matrices"])
            for block in ("attention", "mlp"):
                assert set(row[block]) == {"delta_norm", "relative_norm", "share_changed", "projection"}
                assert row[block] == {figure: stored[block][figure] for figure in row[block]}
    assert results["layers"]["flearn_ft"][1]["mlp"] == {
        "delta_norm": 2.1,
        "relative_norm": 0.042,
        "share_changed": 0.93,
        "projection": 1.0,
    }
    assert results["layers"]["flearn_lora"][0]["mlp"]["projection"] is None  # nothing to change there


def test_a_block_that_was_not_fine_tuned_has_nulls(write_run: WriteRun) -> None:
    section, inputs = write_run(num_records=5, **SMALL)
    del inputs[section["updates"][0]["subtraction"]].result["layers"][2]["mlp"]
    layers = build(section, inputs)["layers"]["flearn_ft"]
    assert layers[2]["mlp"] == dict.fromkeys(("delta_norm", "relative_norm", "share_changed", "projection"))
    assert layers[2]["attention"]["delta_norm"] == 1.1 + 0.1 * 2


def test_settings_of_equal_steps_are_shown_once(make_results: MakeResults) -> None:
    settings = make_results(num_records=5)["settings"]
    assert [entry["methods"] for entry in settings if entry["stage"] == "learn"] == [
        ["full_ft", "flearn_ft", "flearn_lora_ft"],
        ["lora", "flearn_lora"],
    ]


def test_differences_are_paired_by_record() -> None:
    # One record in four differs: the paired error knows it, whatever the scores themselves scatter.
    ours = Records({("token", "reliability"): [1.0, 0.0, 1.0, None], ("token", "leakage"): [0.0] * 4}, {})
    theirs = Records({("token", "reliability"): [0.0, 0.0, 1.0, 1.0], ("token", "leakage"): [0.0] * 4}, {})
    methods = [
        {"method": "full_ft", "seed": 0, "evaluations": {"original": "o", "updated": "a"}},
        {"method": "flearn_ft", "seed": 0, "evaluations": {"original": "o", "updated": "b"}},
    ]
    rows = compare(methods, {"o": theirs, "a": theirs, "b": ours})
    assert [(row["method"], row["against"], row["metric"]) for row in rows] == [
        ("flearn_ft", "full_ft", "reliability"),
        ("flearn_ft", "full_ft", "leakage"),
    ]
    assert rows[0]["difference"] == pytest.approx(1 / 3)
    assert rows[0]["stderr"] == pytest.approx(1 / 3)  # of 1, 0, 0: deviation 0.577, over the root of 3
    assert rows[0]["num_records"] == 3
    assert rows[1]["difference"] == 0


def test_samples_are_spread_over_all_records() -> None:
    assert samples.choose(100) == [5, 15, 25, 35, 45, 55, 65, 75, 85, 95]
    assert samples.choose(3) == [0, 1, 2]
    assert samples.choose(11)[0] == 0
    assert samples.choose(11)[-1] == 10


def test_samples_hold_what_was_said_in_each_state(make_results: MakeResults) -> None:
    shown = make_results(num_records=5, answer="{text} of course")["samples"]
    assert [sample["id"] for sample in shown] == [f"town-{i}" for i in range(5)]
    said = {(answer["method"], answer["state"]): answer for answer in shown[0]["said"]}
    assert len(said) == 2 + 3 * 3
    texts = {"old": "Old Mayor 0 of course", "new": "New Mayor 0 of course", "other": "Nobody 0 of course"}
    assert all(answer["text"] == texts[answer["gives"]] for answer in said.values())


def test_no_samples_without_generations(make_results: MakeResults) -> None:
    assert make_results(num_records=5, protocols=["token"])["samples"] == []


def test_stage_writes_both_files_and_they_are_strict_json(write_run: WriteRun, tmp_path: Path) -> None:
    section, inputs = write_run(
        num_records=12,
        **SMALL,
        survival={"share_changed": 0.0, "projection": math.nan, "cosine": None, "norm_ratio": 0.0},
    )
    facts = run(section, inputs, tmp_path, Context())

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    results = json.loads((tmp_path / facts["results"]).read_text(), parse_constant=refuse)
    assert results["survival"]["flearn_ft"]["projection"] is None
    assert results["layers"]["flearn_ft"][0]["mlp"]["projection"] is None
    assert facts["warnings"] == results["warnings"]
    assert (tmp_path / facts["page"]).read_text().startswith("<!doctype html>")


def test_a_run_that_an_earlier_flearn_planned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run the experiment again"):
        run({"name": "old", "seed": 0, "methods": []}, {}, tmp_path, Context())


def test_same_run_gives_the_same_bytes(write_run: WriteRun, tmp_path: Path) -> None:
    section, inputs = write_run(num_records=12, **SMALL)
    for name in ("one", "two"):
        run(section, inputs, tmp_path / name, Context())
    for file in ("results.json", "report.html"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_costs_are_charged_to_the_methods_of_this_run(make_results: Callable[..., Json]) -> None:
    stages = make_results(methods=["full_ft", "flearn_lora", "flearn_lora_ft"])["stages"]
    users = {
        stage: [row["methods"] for row in stages if row["stage"] == stage]
        for stage in ("teach", "tune_old", "learn")
    }
    assert users == {
        "teach": [[]],
        "tune_old": [["flearn_lora", "flearn_lora_ft"]],
        "learn": [["full_ft"], ["flearn_lora"], ["flearn_lora_ft"]],
    }
