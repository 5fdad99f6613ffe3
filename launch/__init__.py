"""Where it runs: the command line, and the ways to start a run's processes. Imports `pipeline/`, never the
reverse.

From Python: `from launch import submit`.
"""

from launch.slurm.chain import Submitted, submit

__all__ = ["Submitted", "submit"]
