"""Where it runs: the command line, and the ways to start a run's processes. Imports `pipeline/`, never the reverse.

From Python: `from launch.submit import submit` (see there).
"""
