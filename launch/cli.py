"""The `flearn` command: one parser, one handler a command, and the exit codes.

0 = done, 1 = it ran and failed, 2 = the caller's mistake (one line, no traceback), 130 = interrupted.
Handlers import what they need when they run, so that planning answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys

from launch.commands import cancel, delta, doctor, facts, logs, models, report, run, status
from pipeline.errors import InputError, file_system_message, printable

COMMANDS = (run, status, logs, cancel, report, facts, models, delta, doctor)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = _parser().parse_args(argv)
    code = 0
    try:
        code = arguments.handler(arguments)
        if sys.stdout is not None:  # as it is where the caller has closed it
            sys.stdout.flush()
    except InputError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        print("flearn: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code
    except OSError as error:
        message = file_system_message(error)
        if message is None:
            raise
        return _refuse(message)
    return code


def _refuse(message: str) -> int:
    print(f"flearn: {printable(message)}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flearn",
        description="Update what a language model knows: forget old facts, then learn new ones.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
