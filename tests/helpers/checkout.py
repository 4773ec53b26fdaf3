"""A copy of the working tree that a test may change: its own reports, image cache and notebooks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def checkout(folder: Path) -> dict[str, str]:
    """Copy what git tracks or would track into `folder`.

    Returns the environment for commands in the copy: they use this interpreter's packages, but the copy's
    sdcomp. The copy's .venv links to this interpreter, so `make` finds it ready.
    """
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # git also lists deleted files until their deletion is committed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").mkdir()
    for entry in Path(sys.prefix).iterdir():
        (folder / ".venv" / entry.name).symlink_to(entry)
    (folder / ".venv" / ".ready").unlink(missing_ok=True)
    (folder / ".venv" / ".ready").touch()
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return {
        **outer,
        "PATH": f"{folder}/.venv/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "JUPYTER_PREFER_ENV_PATH": "1",
    }
