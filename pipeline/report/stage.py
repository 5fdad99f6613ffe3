"""The `report` stage: results.json and report.html from all other steps' manifests and records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.artifact import Artifact, write_json, write_text
from pipeline.context import Context
from pipeline.errors import InputError
from pipeline.report import page
from pipeline.report.results import build

RESULTS, PAGE = "results.json", "report.html"


def run(section: dict[str, Any], inputs: dict[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """Write the report of the run that `section` describes (`pipeline.report.results.build`) into `out`."""
    if "updates" not in section:
        raise InputError("this run was planned by an earlier flearn: run the experiment again")
    results = build(section, inputs)
    write(results, out)
    return {"results": RESULTS, "page": PAGE, "warnings": results["warnings"]}


def write(results: dict[str, Any], out: Path) -> None:
    """Write `results` and their page into `out`, each whole or not at all."""
    write_json(out / RESULTS, results)
    write_text(out / PAGE, page.render(results))
