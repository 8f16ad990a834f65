"""Errors that a user can mend: one line that names what to change, no traceback."""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
from collections.abc import Iterable, Iterator
from types import ModuleType

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_LOST = 3
"""Of a process whose run lost another one."""


class UserError(Exception):
    """An input that cannot work. The message is one line and says what to change."""

    exit_code = EXIT_USER_ERROR
    alone = False
    """Whether other processes of the run may not know of it; all other errors the first process prints for all."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class Interrupted(UserError):
    """The run was stopped by the user; the message says how to go on."""

    exit_code = EXIT_INTERRUPTED


def near(word: str, choices: Iterable[str], limit: int = 5) -> str:
    """The choices that ``word`` may have meant, as a clause: ``did you mean a, b? `` (empty without a near one)."""
    names = list(dict.fromkeys(choices))
    by_folded = {name.casefold(): name for name in names}
    matches = difflib.get_close_matches(word.casefold(), list(by_folded), n=limit, cutoff=0.5)
    return f"did you mean {' or '.join(by_folded[match] for match in matches)}?" if matches else ""


def one_of(name: str, value: str, choices: Iterable[str]) -> None:
    """Raises UserError, with the near ones, for a value of the setting ``name`` that is not among ``choices``."""
    names = list(choices)
    if value not in names:
        hint = near(value, names)
        raise UserError(f"{name} should be one of {', '.join(names)}, not {value!r}" + (f"; {hint}" if hint else ""))


def require(package: str, extra: str = "train") -> ModuleType:
    """Imports an optional package. Raises UserError, which names the extra that installs it, when it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        missing = error.name or package
        raise UserError(f"{missing} is not installed: pip install 'fastlora-kernels[{extra}]'") from error


def first_line(error: BaseException) -> str:
    """The first line with text of an error's message, or the error's type without one."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


_FULL = ("No space left on device", "os error 28", "Disk quota exceeded", "File too large", "os error 27")


def is_disk_full(error: BaseException) -> bool:
    """Whether ``error`` says that the disk, a quota or a limit is full: libraries wrap ENOSPC into their own types."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return any(text in str(error) for text in _FULL)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that the memory of a GPU, or of the machine, does not suffice."""
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError"):
        return True
    texts = ("CUDA out of memory", "DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


@contextlib.contextmanager
def disk_errors(output_dir: object) -> Iterator[None]:
    """Turns a full or unwritable disk under ``output_dir`` into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise UserError(
                f"the disk of {output_dir} is full: free space or set another output_dir; "
                "every checkpoint finished before is intact and --resume goes on from it"
            ) from error
        if isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno == errno.EROFS):
            raise UserError(f"cannot write under {output_dir} ({error.strerror}): set another output_dir") from error
        raise
