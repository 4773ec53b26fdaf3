"""The record of one run of a notebook: parameters, tidy results, figures, provenance."""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from sdcomp.errors import UserError
from sdcomp.evaluation.float_precision import fix_precision, precision_facts
from sdcomp.files import ROOT, replacing, resolve_output, sha256, write_text
from sdcomp.model import local_model
from sdcomp.study.parameters import read_parameters
from sdcomp.study.results import COLUMNS, Row, columns, name_of, table, typed
from sdcomp.study.scores import ImageScores
from sdcomp.study.variants import Variant

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sdcomp.evaluation import Estimate
    from sdcomp.model import StableDiffusion

PACKAGES = ("torch", "transformers", "torchmetrics", "numpy", "sdcomp")
WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")
"""Endings of files that hold weights."""


class Run:
    """One run of a study, started by its notebook's third cell.

    `metrics.csv`, `images.csv` (the `images` of a run that judges some), `run.json` and the figures go into
    `folder`: the parameter `out`, or `reports/runs/<study>/<hash of the parameters>` where that is empty.
    """

    def __init__(self, study: str, namespace: dict[str, Any]) -> None:
        """Check the parameters of the notebook, and fix the precision of everything computed after this.

        A model with a hub name is fetched. Raises ParameterError for a bad parameter, and UserError for a
        folder that cannot be written to, and for a model that cannot be fetched or has no weights.
        """
        self.study = study
        self.parameters = read_parameters(namespace, study)
        self._namespace = namespace
        text = json.dumps({k: v for k, v in self.parameters.items() if k != "out"}, sort_keys=True)
        self.id = hashlib.sha256(f"{study} {text}".encode()).hexdigest()[:12]
        self.folder = resolve_output(self.parameters["out"] or ROOT / "reports" / "runs" / study / self.id)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=self.folder) as file:
                file.write(b"is there space?")
        except OSError as error:
            raise UserError(f"out={str(self.folder)!r} cannot be written to ({error.strerror})") from None
        self._model = local_model(self.parameters["model"])
        if not self._weight_files():
            name = self.parameters["model"]
            raise UserError(f"model={name!r} has no weights: no file in it ends in {', '.join(WEIGHTS)}")
        fix_precision()
        self.facts: dict[str, Any] = {}
        self.images = ImageScores()
        self._figures: list[str] = []
        self._rows: dict[tuple[str, ...], dict[str, Any]] = {}
        self._commit = _commit()
        self._start = time.time()

    def record(
        self,
        subject: Variant | str,
        metric: str,
        estimate: Estimate | float,
        *,
        unit: str = "",
        baseline: Variant | str = "",
        **about: Any,
    ) -> None:
        """Add one result: an `Estimate`, or a plain number that is exact (a count, a share of zeros).

        `subject` is a variant, or a text for something else, such as "machine". `about` says more about the
        result, such as its timestep. `baseline` is what a difference is taken to. A result that is recorded
        again, by a cell that is run again, replaces the first.
        """
        row = dict.fromkeys(COLUMNS, "")
        row |= {"run_id": self.id, "study": self.study, "model": self.parameters.get("model", "")}
        row |= columns(subject, about)
        row |= {"metric": metric, "unit": unit, "baseline": name_of(baseline)}
        if isinstance(estimate, int | float):
            row |= {"value": estimate}
        else:
            row |= {
                "value": estimate.value,
                "ci_low": estimate.low,
                "ci_high": estimate.high,
                "n": estimate.n,
            }
        self._rows[row["method"], metric, row["parameters"], row["baseline"]] = row

    def results(self, *metrics: str) -> list[Row]:
        """The rows so far of these metrics, by default of all, as `sdcomp.study.results.typed` makes them."""
        rows = [row for row in self._rows.values() if not metrics or row["metric"] in metrics]
        return [typed({**row, "parameters": json.loads(row["parameters"])}) for row in rows]

    @property
    def metrics(self) -> list[str]:
        """The names of everything recorded so far."""
        return sorted({row["metric"] for row in self._rows.values()})

    def table(self, *metrics: str, direct: bool = False) -> pd.DataFrame:
        """Results so far: a row for each variant, a column for each metric (default: all), with intervals.

        A variant that failed is there too, with the reason. With `direct` the table has the comparisons of a
        variant with another variant instead, and only those.
        """
        return table(self.results(), metrics, direct)

    @property
    def device(self) -> str:
        """The parameter `device`; "auto" is cuda where there is one, else cpu."""
        device = self.parameters.get("device", "cpu")
        return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """The parameter `dtype`, the type of the model's weights."""
        return getattr(torch, self.parameters["dtype"])

    def generation(self, sd: StableDiffusion) -> dict[str, Any]:
        """The arguments of `sd.generate` that every study has: seed, steps, sampler, guidance, batch size.

        Where a parameter leaves guidance or batch size to the model, the model's own number is written out:
        studies with equal arguments share cached images. `run.json` records the guidance.
        """
        p = self.parameters
        scale = sd.config.guidance_scale if p["guidance_scale"] == "" else p["guidance_scale"]
        self.facts["guidance_scale"] = float(scale)
        return {
            "seed": p["seed"],
            "steps": p["steps"],
            "sampler": p["sampler"],
            "guidance_scale": float(scale),
            "batch_size": p["batch_size"] or sd.batch_size,
        }

    @property
    def progress(self) -> bool:
        """Whether to show progress bars. A test that compares a notebook's output shows none."""
        return "PYTEST_VERSION" not in os.environ

    def figure(self, figure: Figure, name: str) -> Path:
        """Write a figure as PNG into the run's folder."""
        path = self.folder / f"{name}.png"
        self._figures.append(path.name)
        with io.BytesIO() as buffer:
            figure.savefig(buffer, format="png", dpi=160, bbox_inches="tight")
            with replacing(path) as partial:
                partial.write_bytes(buffer.getvalue())
        return path

    def save(self) -> Path:
        """Write `metrics.csv`, `images.csv` and `run.json`; returns the folder.

        Raises UserError when a parameter was changed after the run was started.
        """
        if read_parameters(self._namespace, self.study) != self.parameters:
            raise UserError("parameters were changed after the run was started; run all cells again")
        with io.StringIO(newline="") as buffer:
            writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
                for row in self._rows.values()
            )
            write_text(self.folder / "metrics.csv", buffer.getvalue())
        if self.images:
            with replacing(self.folder / "images.csv") as partial:
                self.images.write(partial)
        else:
            (self.folder / "images.csv").unlink(missing_ok=True)  # of an earlier run in this folder
        record = {
            "run_id": self.id,
            "study": self.study,
            "parameters": self.parameters,
            "commit": self._commit,
            "weights": self.weights(),
            **precision_facts(self.device),
            "python": platform.python_version(),
            "packages": {name: _version(name) for name in PACKAGES},
            "seconds": round(time.time() - self._start, 1),
            "figures": self._figures,
            **self.facts,
        }
        write_text(self.folder / "run.json", json.dumps(record, indent=2) + "\n")
        return self.folder

    def weights(self) -> dict[str, str]:
        """SHA-256 of the model's files of weights, by their names inside its folder; never empty."""
        return {name: sha256(file) for name, file in self._weight_files().items()}

    def _weight_files(self) -> dict[str, Path]:
        path = self._model
        if not path.is_dir():
            return {path.name: path}
        files = sorted(file for file in path.rglob("*") if file.suffix in WEIGHTS and file.is_file())
        return {file.relative_to(path).as_posix(): file for file in files}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit that runs, marked where files differ from it; reports may, since runs write them."""
    git = ["git", "-C", str(ROOT)]
    status = [*git, "status", "--porcelain", "--", ".", ":(exclude)reports"]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run(status, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("-modified" if dirty.stdout.strip() else "")
