"""Submitting a sweep to SLURM against bare sbatch, and `flearn status` against bare squeue: one JSON line.

    python tests/bench/chain.py     # on a one-box cluster that it makes

That needs root, and the packages that slurm/dev/cluster.sh names. The sweep has two lambdas. Its jobs wait in
the queue, held back by one that takes both nodes, so that what is timed is not their work.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from dev_cluster import MISSING, ROOT, dev_cluster

CONFIG = ["configs/quickstart.yaml", "--set", "cluster.nodes=2"]


def main() -> None:
    if MISSING:
        print(json.dumps({"skipped": f"{', '.join(MISSING)} not found: see slurm/dev/cluster.sh"}))
        return
    with dev_cluster() as env, tempfile.TemporaryDirectory() as runs:
        run_dir = Path(runs) / "quickstart"
        timed(env, "sbatch", "--exclusive", "--nodes=2", "--output=/dev/null", "--wrap=sleep 600")
        flearn = (sys.executable, "-m", "launch")
        run = (*flearn, "run", *CONFIG, "--on", "slurm", "--set", f"cluster.runs_dir={runs}")
        submit = sum(timed(env, *run, "--set", f"forget.scale={scale}") for scale in (0.1, 0.2))
        num_jobs = len(json.loads((run_dir / "jobs.json").read_text()))
        status = min(timed(env, *flearn, "status", str(run_dir)) for _ in range(3))
        bare = sum(timed(env, "sbatch", "--output=/dev/null", "--wrap=true") for _ in range(num_jobs))
        squeue = min(timed(env, "squeue", "--states=all") for _ in range(3))
    figures = {
        "jobs": num_jobs,
        "submit_seconds": submit,
        "sbatch_seconds": bare,
        "submit_ratio": submit / bare,
    }
    figures |= {"status_seconds": status, "squeue_seconds": squeue, "status_ratio": status / squeue}
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


def timed(env: dict[str, str], *command: str) -> float:
    """Seconds that the command took, its start included."""
    started = time.monotonic()
    subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL, timeout=120)
    return time.monotonic() - started


if __name__ == "__main__":
    main()
