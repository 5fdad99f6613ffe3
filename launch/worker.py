"""One rank of a run: joins the other ranks, runs steps of a plan with them, and leaves with an exit code.

`launch/here.py` starts it as `python -m launch.worker PLAN`; a scheduler's job, `launch/slurm/stage_job.py`,
calls its functions. RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set (torch's env://).
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

from launch.run_folder import StepFolder, lock, read_plan
from pipeline.context import Context, Preempted, device_for, log
from pipeline.errors import InputError, refusal_message
from pipeline.plan import Plan, Step
from pipeline.run_step import run_step

FAILED = 1
MISTAKE = 2
STOPPED = 75
"""Asked to stop, saved, and willing to go on (sysexits.h: EX_TEMPFAIL)."""

_LOCK_SECONDS = 5


def main(plan_path: Path) -> NoReturn:
    """Run all pending steps of the plan file, and end the process."""
    plan = read_plan(plan_path)
    context = join()
    leave(run_all(plan, [step.id for step in plan.pending()], context), context)


def join(part: tuple[int, int] | None = None) -> Context:
    """Listen for requests to stop, and set up torch.distributed for this rank.

    `part` is (index, number) of its share of an array's work.
    """
    rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    context = Context(rank=rank, world_size=world_size, local_rank=local_rank, part=part)
    context.listen()  # before torch, whose import takes seconds: a job may be preempted as soon as it starts
    import torch
    import torch.distributed as dist

    context.device = device = device_for(local_rank)
    _quieten(device)
    if device != "cpu":
        if local_rank >= torch.cuda.device_count():
            visible = f"{torch.cuda.device_count()} GPUs are visible"
            print(f"flearn: {visible}: set cluster.ranks to at most that", file=sys.stderr)
            os._exit(MISTAKE)
        torch.cuda.set_device(local_rank)
    dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=timedelta(minutes=30))
    if world_size > 1:
        # A group of its own for control messages: the others wait in it while rank 0 alone runs a stage.
        context.group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    return context


def _quieten(device: str) -> None:
    """Leave the terminal to our own messages; warnings of the libraries stay."""
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns where it has to find that out
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def run_all(plan: Plan, ids: list[str], context: Context) -> int:
    """Run the steps `ids` of `plan`, in this order; returns the exit code."""
    pending: list[str] = context.share(ids)
    for number, id in enumerate(pending, 1):
        code = _run_one(plan, plan.steps[id], f"[{number}/{len(pending)}]", context)
        if code:
            return code
        if number < len(pending) and context.should_stop():
            return STOPPED
    return 0


def _run_one(plan: Plan, step: Step, number: str, context: Context) -> int:
    """Run one step, logging to the step's folder; an error leaves a file there for `flearn status`."""
    folder = StepFolder(plan.artifact(step).folder)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(folder.log(context.rank), encoding="utf-8")
    except OSError as error:  # this node may not write where the one that submitted may
        return _report(error, folder, context)
    _log_to(handler, context)
    log.info("%s %s %s", number, step.id, step.users)
    error_file = folder.error(context.part)
    if context.is_main:
        error_file.unlink(missing_ok=True)
    try:
        with _alone(folder, context):
            run_step(plan, step, context)
            if context.is_main:
                error_file.unlink(missing_ok=True)  # of another job that found the step taken
        return 0
    except Preempted as stopped:
        log.info("%s", stopped)
        return STOPPED
    except Exception as error:
        return _report(error, folder, context)
    finally:
        logging.getLogger().removeHandler(handler)
        with contextlib.suppress(OSError):  # lines that a full disk did not take
            handler.close()


@contextlib.contextmanager
def _alone(folder: StepFolder, context: Context) -> Iterator[None]:
    """Hold the step's lock, on rank 0, so that two jobs never work on one step.

    Parts of an array share a step, and take no lock. Raises InputError, on every rank, if others still hold
    the lock after a few seconds: the processes of a killed job may linger for that long.
    """
    if context.part is not None:
        yield
        return
    with folder.lock.open("a") as file:
        if not context.share(context.is_main and _locked(file.fileno())):
            run_dir = folder.path.parent
            raise InputError(
                f"{folder.path}: another job is at work on this step;"
                f" wait for it, or cancel it with: flearn cancel {run_dir}"
            )
        yield


def _locked(descriptor: int) -> bool:
    try:
        return lock(descriptor, _LOCK_SECONDS)
    except OSError:  # a file system without locks
        return True


def _log_to(handler: logging.Handler, context: Context) -> None:
    root = logging.getLogger()
    if not root.handlers:
        console = logging.StreamHandler(sys.stdout)
        console.setFormatter(logging.Formatter("%(message)s"))
        console.setLevel(logging.INFO if context.is_main else logging.WARNING)
        console.addFilter(_is_for_the_terminal)
        root.addHandler(console)
        logging.getLogger("flearn").setLevel(logging.INFO)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.addHandler(handler)


def _is_for_the_terminal(record: logging.LogRecord) -> bool:
    """Our own messages, and warnings of the libraries."""
    return record.name.startswith("flearn") or record.levelno >= logging.WARNING


def _report(error: Exception, folder: StepFolder, context: Context) -> int:
    """Say what went wrong, note it in the step's folder, and return the exit code.

    A mistake of the caller's is one line. So is a file that the system refuses, but the log has the traceback
    besides: the line does not say who was refused. Anything else is a traceback.
    """
    mistake = str(error) if isinstance(error, InputError) else refusal_message(error)
    if mistake is None:
        log.error("%s", traceback.format_exc())
    else:
        print(f"flearn: {mistake}", file=sys.stderr, flush=True)
        if not isinstance(error, InputError):
            _log_traceback(folder.log(context.rank))
    message = mistake or f"{type(error).__name__}: {error}"
    with contextlib.suppress(OSError):  # on a full disk the line above has to do
        if not folder.error(context.part).exists():  # the first to fail is the cause: its peers lose it
            folder.note_error(context.part, context.rank, message)
    return FAILED if mistake is None else MISTAKE


def _log_traceback(path: Path) -> None:
    """Not through the logger: it would print on the terminal, too, and fail loudly on a full disk."""
    with contextlib.suppress(OSError), path.open("a", encoding="utf-8") as file:
        file.write(traceback.format_exc())


def leave(code: int, context: Context) -> NoReturn:
    """Flush, leave the process group, and exit at once.

    After DeepSpeed work a process sometimes aborts while Python shuts down ("terminate called without an
    active exception"). That would turn a finished run into a failed one.
    """
    import torch.distributed as dist

    if code in (0, STOPPED):
        context.barrier()
        dist.destroy_process_group()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
