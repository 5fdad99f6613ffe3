"""The `flearn` command: its table of commands, and the exit codes.

0 = done, 1 = it ran and failed, 2 = the caller's mistake (one line, no traceback), 130 = interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module

from pipeline.errors import InputError, file_system_message, printable

COMMANDS = {
    "run": "run what is not yet done of an experiment",
    "status": "stages of a run, their states, jobs and times",
    "logs": "what a stage of a run said",
    "cancel": "stop a run; what is done is kept",
    "report": "rebuild report.html and results.json of a run",
    "facts": "look at files of facts",
    "models": "fetch small pretrained models",
    "delta": "arithmetic on weights, streamed from the disk",
    "doctor": "check this machine or cluster, and estimate what an experiment will want",
}
"""Each is a module of `launch/commands/`, and only the one that is asked for is imported: `flearn run` plans
without numpy, which `flearn delta` needs.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    arguments = _parser(words[0] if words else None).parse_args(words)
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


def _parser(asked: str | None) -> argparse.ArgumentParser:
    """A parser that knows all commands by name, and the arguments of the one that is asked for."""
    parser = argparse.ArgumentParser(
        prog="flearn",
        description="Update what a language model knows: forget old facts, then learn new ones.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, what in COMMANDS.items():
        command = commands.add_parser(name, help=what)
        if name == asked:
            import_module(f"launch.commands.{name}").add_arguments(command)
    return parser
