"""The exception for the caller's mistakes: printed as one line, exit code 2, no traceback."""

from __future__ import annotations

import errno

_FULL_DISK_ADVICE = (
    "free some space and run the same command again, what is finished is kept;"
    " or write to a larger disk (a run: cluster.runs_dir; other commands: --out)"
)

_CALLERS_TO_MEND = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


class InputError(ValueError):
    """Bad input. The message is one line: the file, field or tensor, and what to do."""


def file_system_message(error: BaseException) -> str | None:
    """One line for a full disk, or for an OSError that names its file; None for any other error."""
    message = full_disk_message(error)
    if (
        message is None
        and isinstance(error, OSError)
        and error.errno is not None
        and error.filename is not None
    ):
        return f"{error.filename}: {error.strerror}"
    return message


def refusal_message(error: BaseException) -> str | None:
    """As `file_system_message`, but of an OSError only what whoever chose the path can mend.

    For a rank: its libraries open files of their own, and one of these missing is no mistake of the caller's.
    """
    is_theirs = isinstance(error, OSError) and error.errno in _CALLERS_TO_MEND
    return file_system_message(error) if is_theirs else full_disk_message(error)


def full_disk_message(error: BaseException) -> str | None:
    """One line for a full disk, anywhere in the chain of causes; None for any other error.

    torch and safetensors wrap ENOSPC in exceptions of their own, so texts are read too.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" while writing {seen.filename}" if seen.filename else ""
            return f"no space left on the disk{where}: {_FULL_DISK_ADVICE}"
        if "No space left on device" in str(seen):
            return f"no space left on the disk: {_FULL_DISK_ADVICE}"
        seen = seen.__cause__ or seen.__context__
    return None


def printable(text: str) -> str:
    """`text` on one line, with control characters and undecodable bytes as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
