"""`python -m launch` is the same program as `flearn`."""

import sys

from launch.cli import main

sys.exit(main())
