"""Where files are found, and how they are written so that nothing is lost."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sdcomp.errors import UserError

_SOURCE = Path(__file__).resolve().parents[1]
ROOT = _SOURCE if (_SOURCE / "pyproject.toml").exists() else Path.cwd()
"""The repository; the working directory where the package is installed without one."""


def find(path: str | Path) -> Path:
    """A path to read: as given, or, if relative and not there, the same from the repository's root."""
    path = Path(os.path.expanduser(path))
    return ROOT / path if not path.exists() and (ROOT / path).exists() else path


def place(path: str | Path) -> Path:
    """A path to write: relative ones are the caller's, but inside the repository they start at its root.

    A notebook run from its own folder therefore writes where the same parameters write from the root.
    """
    path = Path(os.path.expanduser(path))
    return ROOT / path if Path.cwd().is_relative_to(ROOT) else path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place when all went well.

    A killed or failed write leaves the file that was there before. Raises UserError when the file cannot
    be written, on a full disk for example.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be written ({reason}); is the disk full?") from None
    finally:
        if os.path.lexists(partial):
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file as `replacing` does."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
