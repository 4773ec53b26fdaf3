"""Where files are found, and how they are written so that nothing is lost."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import platform
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError

from sdcomp.errors import UserError

_SOURCE = Path(__file__).resolve().parents[1]
ROOT = _SOURCE if (_SOURCE / "pyproject.toml").exists() else Path.cwd()
"""The repository; the working directory where the package is installed without one."""

_HERE = f"@{platform.node()}.partial"


def resolve_input(path: str | Path) -> Path:
    """A path to read: as given, or, if relative and not there, the same from the repository's root."""
    path = Path(os.path.expanduser(path))
    # os.path.exists is False, and raises nothing, for a name that is too long or holds a null character.
    return ROOT / path if not os.path.exists(path) and os.path.exists(ROOT / path) else path


def regular(file: Path, error: type[UserError] = UserError, most: int | None = None) -> Path:
    """The file, if opening it cannot block: neither a folder nor a pipe, a socket or a device.

    Raises `error` for those, for a file that is missing or cannot be reached, and for one of more than
    `most` bytes.
    """
    try:
        status = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        if not file.is_symlink():
            raise error(f"{file} is missing; copy the whole folder") from None
        raise error(f"{file} is a link to a file that is missing; copy the file itself") from None
    except (OSError, ValueError) as reason:
        raise error(f"{file} cannot be read ({getattr(reason, 'strerror', None) or reason})") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, a socket or a device"
        raise error(f"{file} is {kind}, not a file; copy the file that belongs there")
    if most is not None and status.st_size > most:
        raise error(f"{file} has {status.st_size} bytes, but at most {most} are read; copy the right file")
    return file


def resolve_output(path: str | Path) -> Path:
    """A path to write: relative ones are the caller's, but inside the repository they start at its root.

    A notebook run from its own folder therefore writes where the same parameters write from the root.
    """
    path = Path(os.path.expanduser(path))
    return ROOT / path if Path.cwd().is_relative_to(ROOT) else path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, in a folder of its own beside `path`, which takes its place when all went well.

    A killed or failed write leaves the file that was there before, and processes that write the same file
    at the same time do not meet. Raises UserError when the file cannot be written, on a full disk for
    example.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parent)
        # A folder, since safetensors writes to a temporary file beside the one that it is given.
        name = {"prefix": f"{path.name}.", "suffix": f".{os.getpid()}{_HERE}"}
        with TemporaryDirectory(**name, dir=path.parent) as folder:
            partial = Path(folder, path.name)
            partial.touch()
            mode = partial.stat().st_mode
            yield partial
            partial.chmod(mode)  # safetensors makes files that only their owner can read
            os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        full = getattr(error, "errno", None) in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = "is the disk full?" if full else "may you write there?"
        raise UserError(f"{path} cannot be written ({reason}); {hint}") from None


def _remove_leftovers(folder: Path) -> None:
    """Remove what writers that were killed left in a folder; of those on other machines nothing is known."""
    for partial in folder.glob(f"*{glob.escape(_HERE)}"):
        try:
            os.kill(int(partial.name.removesuffix(_HERE).rpartition(".")[2]), 0)  # asks, and sends nothing
        except ProcessLookupError:
            shutil.rmtree(partial, ignore_errors=True)
        except PermissionError:  # somebody else's, and alive
            pass


def write_text(path: Path, text: str) -> None:
    """Write a text file as `replacing` does."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
