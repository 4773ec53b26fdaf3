"""Find files to read, and write files so that a failed write loses nothing."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import platform
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sdcomp.errors import UserError

_SOURCE = Path(__file__).resolve().parents[1]
ROOT = _SOURCE if (_SOURCE / "pyproject.toml").exists() else Path.cwd()
"""The repository's folder; the working directory if the package is installed without the repository."""

_HERE = f"@{platform.node()}.partial"


def resolve_input(path: str | Path) -> Path:
    """Return a path to read: `path` itself, or, if only that exists, `path` below the repository's root."""
    path = Path(os.path.expanduser(path))
    # For names that are too long or hold a null character, os.path.exists returns False and raises nothing.
    return ROOT / path if not os.path.exists(path) and os.path.exists(ROOT / path) else path


def regular(file: Path, error: type[UserError] = UserError, most: int | None = None) -> Path:
    """Return `file` if it is a regular file: opening anything else could block.

    Raises `error` for a folder, a pipe, a socket or a device, for a file that is missing or cannot be
    reached, and for a file of more than `most` bytes.
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
        raise error(f"{file} is {kind}, not a file; put the right file in its place")
    if most is not None and status.st_size > most:
        raise error(f"{file} has {status.st_size} bytes, but at most {most} are read; copy the right file")
    return file


def resolve_output(path: str | Path) -> Path:
    """Return a path to write: inside the repository, relative paths start at the repository's root.

    So a notebook writes to the same place whether it runs in its own folder or in the root. Outside the
    repository, relative paths start at the working directory, as usual.
    """
    path = Path(os.path.expanduser(path))
    return ROOT / path if Path.cwd().is_relative_to(ROOT) else path


@dataclass
class _Held:
    """Finished files that wait in temporary folders for their places."""

    folders: ExitStack
    files: dict[Path, Path] = field(default_factory=dict)


_HELD: ContextVar[_Held | None] = ContextVar("_HELD", default=None)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; if the block succeeds, the new file replaces `path` in one step.

    The temporary path is in a folder of its own beside `path`. A killed or failed write leaves the old file
    as it was, and several processes can write the same file at the same time. Within `together` the file
    takes its place later. Raises UserError if the file cannot be written, for example on a full disk.
    """
    held = _HELD.get()
    with _explained(path), ExitStack() as stack:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parent)
        # A folder, because safetensors writes a temporary file beside the file that it is given.
        name = {"prefix": f"{path.name}.", "suffix": f".{os.getpid()}{_HERE}"}
        folder = (held.folders if held else stack).enter_context(TemporaryDirectory(**name, dir=path.parent))
        partial = Path(folder, path.name)
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # safetensors makes files that only their owner can read
        if held is None:
            os.replace(partial, path)
        elif path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        else:
            held.files[path] = partial


@contextmanager
def together(stale: Callable[[], Iterable[Path]], last: Collection[Path]) -> Iterator[None]:
    """Hold the files that `replacing` writes in the block, and put them all in place at its end.

    First the files that `stale` names are removed; those in `last` then come last. A block that fails or is
    killed leaves the old files as they were; it needs space for the new ones beside them. A block inside
    another one belongs to that. Raises UserError for a file that cannot be removed or written.
    """
    if _HELD.get() is not None:
        yield
        return
    with ExitStack() as folders:
        held = _Held(folders)
        token = _HELD.set(held)
        try:
            yield
        finally:
            _HELD.reset(token)
        for path in stale():
            with _explained(path):
                path.unlink(missing_ok=True)
        for path in sorted(held.files, key=lambda path: path in last):
            with _explained(path):
                os.replace(held.files[path], path)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the errors of writing a file into a UserError that names it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        full = getattr(error, "errno", None) in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = "is the disk full?" if full else "may you write there?"
        raise UserError(f"{path} cannot be written ({reason}); {hint}") from None


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary folders of killed processes; only this machine's processes can be checked."""
    for partial in folder.glob(f"*{glob.escape(_HERE)}"):
        try:
            # Signal 0 only asks whether the process exists.
            os.kill(int(partial.name.removesuffix(_HERE).rpartition(".")[2]), 0)
        except ProcessLookupError:
            shutil.rmtree(partial, ignore_errors=True)
        except PermissionError:  # another user's process, still alive
            pass


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step, as `replacing` does. Raises UserError if it cannot be written."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the metadata `about` in one step, as `replacing` does.

    Raises UserError if it cannot be written.
    """
    held, spans = {}, []
    for name, tensor in tensors.items():
        held[name] = tensor = tensor.detach().cpu().contiguous()
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        # Tied weights share their memory, which safetensors refuses.
        if any(begin < other_end and other < end for other, other_end in spans):
            held[name] = tensor.clone()
        spans.append((begin, end))
    with replacing(path) as partial:
        save_file(held, partial, about)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def source_digest() -> str:
    """A hash of the code that compresses models and makes images: all rooms but `evaluation` and `study`.

    Computed once: this process has not imported later changes of the files.
    """
    package = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        name = file.relative_to(package).as_posix()
        if not name.startswith(("evaluation/", "study/")):
            digest.update(f"{name} {sha256(file)}\n".encode())
    return digest.hexdigest()
