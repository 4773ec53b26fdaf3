"""Full disks, read-only folders: one sentence, nothing half-written, and what was there is still there."""

from __future__ import annotations

import os
import re
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from workspace import Workspace

import sdcomp
from sdcomp.errors import UserError
from sdcomp.evaluation import cached_images
from sdcomp.model import StableDiffusion
from sdcomp.pruning import prune_unstructured
from sdcomp.study import Run
from sdcomp.training.loop import fit

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "02_pruning.ipynb"
PARAMETERS = nbformat.read(NOTEBOOK, as_version=4).cells[1].source
ROOM = 8192
"""Bytes that still fit: enough to begin a file, too few for any of those written here."""


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(params=["disk", "limit"])
def place(request, tmp_path) -> Iterator[tuple[Path, Callable[[], None], Callable[[], None]]]:
    """A folder, a function after which files there end at `ROOM` bytes or before, and one that undoes it.

    Either the disk is full, or, which needs no root, longer files are forbidden to this process.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if request.param == "limit":

        def fill(size: int = ROOM) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

        yield tmp_path, fill, lambda: fill(limits[0])
        fill(limits[0])
    else:
        folder = request.getfixturevalue("disk")

        def fill() -> None:
            free = os.statvfs(folder)
            (folder / "filler").write_bytes(bytes(free.f_bavail * free.f_frsize - ROOM))

        yield folder, fill, (folder / "filler").unlink


@pytest.fixture
def read_only(request, tmp_path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A folder, and a function that makes it read-only; permissions do not hold root back."""
    if os.geteuid() == 0:
        folder = request.getfixturevalue("disk")
        yield folder, lambda: subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    else:
        yield tmp_path, lambda: [p.chmod(0o555) for p in (tmp_path, *tmp_path.rglob("*")) if p.is_dir()]
        for path in (tmp_path, *tmp_path.rglob("*")):
            path.chmod(0o755)


def contents(folder: Path) -> dict[str, bytes]:
    """Everything below a folder, but for what fills it up."""
    found = {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}
    return {name: content for name, content in found.items() if name != "filler"}


# What is written, once and then again in another version


def started(out: Path) -> Run:
    namespace: dict = {}
    injected = f"# Parameters\nout = {str(out)!r}\n"
    for cell in (PARAMETERS, injected):
        exec(cell, namespace)
    return Run("02_pruning", {**namespace, "In": ["", PARAMETERS, injected]})


def results(folder: Path, small: StableDiffusion, version: int) -> None:
    run = started(folder)
    for i in range(500):
        run.record("machine", "a number", i + version, index=i)
    run.save()


def figure(folder: Path, small: StableDiffusion, version: int) -> None:
    drawn = Figure()
    drawn.add_subplot().imshow(np.random.default_rng(version).random((100, 100)))
    started(folder).figure(drawn, "noise")


def images(folder: Path, small: StableDiffusion, version: int) -> None:
    cached_images(small, ["a red star"], folder=folder / "images", steps=1, seed=version)


def checkpoint(folder: Path, small: StableDiffusion, version: int) -> None:
    file = folder / "recovered.ckpt"
    torch.manual_seed(0)
    module = nn.Linear(100, 100)

    def loss(rng: np.random.Generator, _: torch.Generator) -> Tensor:
        if version == 0 and file.exists():
            raise KeyboardInterrupt  # and so it has to take up again
        return module(torch.from_numpy(rng.random((1, 100), np.float32))).square().mean()

    with suppress(KeyboardInterrupt):
        fit(module, loss, 3, lr=1e-3, checkpoint=file, checkpoint_seconds=0, progress=False)


def model(folder: Path, small: StableDiffusion, version: int) -> None:
    unet = prune_unstructured(small.unet, 0.1 * (1 + version))
    sdcomp.save(small.replace(unet=unet), folder / "model")


WRITERS = [results, figure, images, checkpoint, model]


@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_is_one_sentence_and_leaves_everything_as_it_was(small, place, write):
    folder, fill, make_room = place
    write(folder, small, 0)
    before = contents(folder)
    fill()
    with pytest.raises(UserError, match=r"cannot be written \(.+\); is the disk full\?$") as caught:
        write(folder, small, 1)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert contents(folder) == before
    make_room()
    write(folder, small, 1)
    assert contents(folder) != before


@pytest.mark.parametrize("write", WRITERS)
def test_a_read_only_folder_is_one_sentence(small, read_only, write):
    folder, lock = read_only
    write(folder, small, 0)
    before = contents(folder)
    lock()
    with pytest.raises(UserError, match="cannot be written") as caught:
        write(folder, small, 1)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert "disk full" not in str(caught.value)
    assert contents(folder) == before


def test_a_cache_that_cannot_be_written_is_found_before_anything_is_generated(small, read_only, monkeypatch):
    folder, lock = read_only
    images(folder, small, 0)
    lock()
    monkeypatch.setattr(StableDiffusion, "generate", lambda *_, **__: pytest.fail("generated"))
    images(folder, small, 0)  # what is there can be read
    with pytest.raises(UserError, match="cannot be written"):
        images(folder, small, 1)


@pytest.mark.parametrize("damage", [b"", b"\0" * 100, None])
def test_a_cached_file_that_is_damaged_is_made_anew(small, tmp_path, damage):
    images(tmp_path, small, 0)
    (file,) = (tmp_path / "images").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    images(tmp_path, small, 0)
    assert contents(tmp_path / "images") == {file.name: whole}


@pytest.mark.parametrize("damage", [b"", b"\0" * 100, None])
def test_a_checkpoint_that_is_damaged_is_one_sentence(small, tmp_path, damage):
    checkpoint(tmp_path, small, 0)
    file = tmp_path / "recovered.ckpt"
    file.write_bytes(file.read_bytes()[:5000] if damage is None else damage)
    with pytest.raises(UserError, match="cannot be read as a checkpoint; delete it to start again") as caught:
        checkpoint(tmp_path, small, 1)
    assert "\n" not in str(caught.value)


# A whole notebook


@pytest.mark.slow
def test_a_notebook_on_a_full_disk_or_without_its_cache_ends_in_one_sentence(disk, tmp_path):
    workspace = Workspace(tmp_path / "repository")
    notebook = ["./python", "-m", "papermill", "notebooks/02_pruning.ipynb", "out.ipynb", "--no-progress-bar"]
    quick = "n_images: 2\nsteps: 2\nnoise_images: 1\ntiming_repeats: 1\n"

    def last_line() -> str:
        status, output = workspace.run([*notebook, "-y", quick, "-p", "out", str(disk / "run")])
        assert status != 0
        return output.splitlines()[-1] or output.splitlines()[-2]

    images = workspace.folder / "reports" / "runs" / "images"
    images.parent.mkdir(parents=True)
    images.write_text("no folder")
    assert re.fullmatch(r"UserError: .*images/\w+\.safetensors cannot be written \(.+", last_line())
    images.unlink()
    assert not contents(disk / "run")
    free = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(free.f_bavail * free.f_frsize - ROOM))
    assert re.fullmatch(
        r"UserError: .*\.png cannot be written \(No space .+; is the disk full\?", last_line()
    )
    assert not contents(disk / "run")
