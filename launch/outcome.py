"""How a worker tells those who started it how it ended: its exit code, and a file in the failed step's folder."""

FAILED = 1
MISTAKE = 2
STOPPED = 75
"""Asked to stop, saved, and willing to go on (sysexits.h: EX_TEMPFAIL)."""

ERROR = "error.json"
"""Why the step failed: {"rank", "message", "log"}; gone once it succeeds."""
