"""The record of one run of a notebook: parameters, tidy results, figures, provenance."""

from __future__ import annotations

import contextlib
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
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from sdcomp.errors import UserError
from sdcomp.study.parameters import read_parameters

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sdcomp.evaluation import Estimate

_SOURCE = Path(__file__).resolve().parents[2]
ROOT = _SOURCE if (_SOURCE / "pyproject.toml").exists() else Path.cwd()
"""The repository; the working directory where the package is installed without one."""

COLUMNS = (
    "run_id", "study", "model", "method", "parameters", "metric",
    "value", "ci_low", "ci_high", "n", "unit", "baseline",
)  # fmt: skip
PACKAGES = ("torch", "transformers", "torchmetrics", "numpy", "sdcomp")


class Run:
    """One run of a study, started by its notebook's third cell.

    `folder` takes `metrics.csv`, `run.json` and the figures: the parameter `out`, or
    `reports/runs/<study>/<hash of the parameters>` where that is empty.
    """

    def __init__(self, study: str, namespace: dict[str, Any]) -> None:
        """Check the notebook's parameters; raises ParameterError, or UserError for an unusable folder."""
        self.study = study
        self.parameters = read_parameters(namespace)
        text = json.dumps({k: v for k, v in self.parameters.items() if k != "out"}, sort_keys=True)
        self.id = hashlib.sha256(f"{study} {text}".encode()).hexdigest()[:12]
        out = self.parameters.get("out", "")
        self.folder = Path(os.path.expanduser(out)) if out else ROOT / "reports" / "runs" / study / self.id
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / ".writable").touch()
            (self.folder / ".writable").unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"out={str(self.folder)!r} cannot be written to ({error.strerror})") from None
        self.facts: dict[str, Any] = {}
        self._rows: list[dict[str, Any]] = []
        self._start = time.time()

    def record(
        self,
        method: str,
        metric: str,
        estimate: Estimate | float,
        *,
        unit: str = "",
        baseline: str = "",
        **parameters: Any,
    ) -> None:
        """Add one result: an `Estimate`, or a plain number that is exact (a count, a share of zeros).

        `parameters` say which variant of `method` this is; `baseline` names what a difference is to.
        """
        row = dict.fromkeys(COLUMNS, "")
        row.update(
            run_id=self.id, study=self.study, model=self.parameters.get("model", ""), method=method,
            parameters=json.dumps(parameters, sort_keys=True), metric=metric, unit=unit, baseline=baseline,
        )  # fmt: skip
        if isinstance(estimate, int | float):
            row.update(value=estimate)
        else:
            row.update(value=estimate.value, ci_low=estimate.low, ci_high=estimate.high, n=estimate.n)
        self._rows.append(row)

    def results(self, metric: str) -> list[dict[str, Any]]:
        """The rows of one metric so far, with `parameters` as a dictionary."""
        return [{**r, "parameters": json.loads(r["parameters"])} for r in self._rows if r["metric"] == metric]

    def table(self) -> pd.DataFrame:
        """All results so far, one row each, the value written with its interval."""
        rows = []
        for r in self._rows:
            interval = "" if r["ci_low"] == "" else f" [{r['ci_low']:.4g}, {r['ci_high']:.4g}]"
            variant = ", ".join(f"{k}={v}" for k, v in json.loads(r["parameters"]).items())
            rows.append(
                {
                    "method": r["method"],
                    "variant": variant,
                    "metric": r["metric"],
                    "value [95 % interval]": f"{r['value']:.4g}{interval}",
                    "unit": r["unit"],
                    "n": r["n"],
                    "baseline": r["baseline"],
                }
            )
        return pd.DataFrame(rows)

    @property
    def progress(self) -> bool:
        """Whether to show progress bars: not where a notebook's output is being compared."""
        return "PYTEST_VERSION" not in os.environ

    def figure(self, figure: Figure, name: str) -> Path:
        """Write a figure as PNG into the run's folder."""
        path = self.folder / f"{name}.png"
        with io.BytesIO() as buffer:
            figure.savefig(buffer, format="png", dpi=160, bbox_inches="tight")
            write_atomically(path, buffer.getvalue())
        return path

    def save(self) -> Path:
        """Write `metrics.csv` and `run.json`; returns the folder."""
        with io.StringIO(newline="") as buffer:
            writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in self._rows
            )
            write_atomically(self.folder / "metrics.csv", buffer.getvalue().encode())
        record = {
            "run_id": self.id,
            "study": self.study,
            "parameters": self.parameters,
            "commit": _commit(),
            "device": _device_name(self.parameters.get("device", "cpu")),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "packages": {name: _version(name) for name in PACKAGES},
            "seconds": round(time.time() - self._start, 1),
            **self.facts,
        }
        write_atomically(self.folder / "run.json", (json.dumps(record, indent=2) + "\n").encode())
        return self.folder


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path` and rename, so that a killed run leaves no half-written file."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f"{path} cannot be written ({error.strerror}); free some space or set out=") from None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("-modified" if dirty.stdout.strip() else "")


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"
