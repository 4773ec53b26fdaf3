"""Compressed variants of a UNet: what they cost, what they are worth, and which to take."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import pandas as pd
import seaborn as sns
from torch import nn

from sdcomp.evaluation import weight_bytes
from sdcomp.files import ROOT
from sdcomp.integer.conversion import Int8Model
from sdcomp.pruning import disk_sizes
from sdcomp.quantization import PRESETS, QuantModel
from sdcomp.quantization.layers import QuantLayer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sdcomp.study.run import Run


def int8_name(kernels: bool) -> str:
    """What int8 is called in results: by itself only where integer kernels ran."""
    return "int8" if kernels else "int8 (dequantized)"


def runs_on_kernels(unet: nn.Module) -> bool:
    """Whether an int8 UNet runs on integer kernels, rather than on weights dequantized layer by layer."""
    return getattr(unet, "execution", "kernels") == "kernels"


@dataclass(frozen=True)
class Variant:
    """How a UNet is pruned, quantized and run: one point of a study."""

    pruning: str
    """"unstructured", "masked channels" or "removed"."""
    amount: float
    recover_steps: int = 0
    preset: str = ""
    """One of `PRESETS`; empty where nothing is quantized."""
    weight_bits: int = 32
    act_bits: int = 32
    k: int = 0
    """Timestep intervals; 0 where the preset has none."""
    backend: str = "fp32"
    """"fp32", "simulated" or "int8"."""
    calibrated_first: bool = False
    """Whether activations were calibrated before the pruning rather than after it."""
    dequantized: bool = False
    """Whether int8 ran on no integer kernels, but on weights dequantized layer by layer."""

    @classmethod
    def of(cls, row: dict[str, Any]) -> Variant:
        """The variant that a row of 01_quantization or 02_pruning is about."""
        method, found = row["method"], row["parameters"]
        if method in PRESETS:
            bits = {name: found[name] for name in ("weight_bits", "act_bits")}
            return cls("unstructured", 0.0, preset=method, k=found.get("k", 0), backend="simulated", **bits)
        return cls(method.removesuffix(", recovered"), found["amount"], found.get("recover_steps", 0))

    @property
    def simulation(self) -> Variant:
        """The same, simulated."""
        return replace(self, backend="simulated", dequantized=False)

    @property
    def execution(self) -> str:
        """How its UNet is run: nothing for fp32, else its name in methods and labels."""
        return {"fp32": "", "simulated": self.preset, "int8": int8_name(not self.dequantized)}[self.backend]

    @property
    def method(self) -> str:
        """The name under which results are recorded, together with `parameters`."""
        recovered = ", recovered" if self.recover_steps else ""
        how = f" + {self.execution}" if self.execution else ""
        return self.pruning + recovered + how + (", calibrated first" if self.calibrated_first else "")

    @property
    def parameters(self) -> dict[str, Any]:
        """What tells the variants of one method apart."""
        names = ("amount", "recover_steps", "weight_bits", "act_bits", "k")
        defaults = {f.name: f.default for f in fields(self)}
        found = {name: getattr(self, name) for name in names}
        return {name: value for name, value in found.items() if value != defaults[name]}

    @property
    def label(self) -> str:
        """A short name for figures."""
        bits = f"{self.weight_bits} bits"
        if self.act_bits not in (32, self.weight_bits):
            bits = f"{self.weight_bits} and {self.act_bits} bits"
        how = f"{self.execution} {bits}" if self.backend == "simulated" else self.execution
        recovered = ", recovered" if self.recover_steps else ""
        pruning = f"{100 * self.amount:g} % {self.pruning}{recovered}" if self.amount else ""
        first = ", calibrated first" if self.calibrated_first else ""
        named = " (published sweet spot)" if self.published else ""
        return (", ".join(part for part in (pruning, how) if part) or "fp32") + first + named

    @property
    def published(self) -> bool:
        """Whether this is what published work found to be the sweet spot."""
        return self == Variant("unstructured", 0.2, 0, "timestep_mse", 8, 8, self.k, "simulated")


SAME = ("seed", "n_images", "steps", "sampler", "guidance_scale")
"""Beside the weights, what must be the same in two runs for their results to stand side by side."""

GROUPS = {
    (False, False): "fp32",
    (True, False): "pruned",
    (False, True): "quantized",
    (True, True): "pruned and quantized",
}
"""What a variant is, by whether it is pruned and whether it is quantized."""


def packed_bytes(unet: nn.Module) -> int:
    """Bytes that a UNet's tensors would take packed. No such file is written: no kernel here reads one.

    A weight that simulates n bits takes n bits, any other number those of its type; a tensor in which
    that is less takes one bit an entry for where its zeros are, and the others' bits. Scales count too.
    """
    integers, width = {}, 0
    if isinstance(unet, QuantModel) and unet.weight_quantizer is not None:
        width = unet.weight_quantizer.n_bits
        layers = ((n, layer) for n, layer in unet.named_modules() if isinstance(layer, QuantLayer))
        integers = {f"{name}.weight": layer for name, layer in layers}
    total = 0
    for name, tensor in unet.state_dict().items():
        bits = width if name in integers else 8 * tensor.element_size()
        values = integers[name].integer_weight() if name in integers else tensor
        n, nonzero = values.numel(), int(values.count_nonzero())
        total += -(-min(n * bits, n + nonzero * bits) // 8)
    return total


def stored_bytes(unet: nn.Module) -> tuple[int, bool]:
    """Bytes of a UNet on disk, and whether that is a real file, as `sdcomp.save` writes it.

    Where low bits are only simulated, or zeros would be left out, it is `packed_bytes` and no real file.
    """
    if isinstance(unet, Int8Model):
        return disk_sizes(unet.module)["dense"], True
    packed = packed_bytes(unet)
    if packed < weight_bytes(unet):
        return packed, False
    return disk_sizes(unet)["dense"], True


def pareto_front(cost: Sequence[float], quality: Sequence[float]) -> list[int]:
    """The points that no other equals or beats in both cost (less) and quality (more), by rising cost.

    Of equal points the first. Returns their indices.
    """
    front: list[int] = []
    for i in sorted(range(len(cost)), key=lambda i: (cost[i], -quality[i])):
        if not front or quality[i] > quality[front[-1]]:
            front.append(i)
    return front


def measured(rows: Iterable[dict[str, Any]], metric: str, variants: Iterable[Variant] = ()) -> pd.DataFrame:
    """One row for each variant that `rows` hold a `metric` of, those of the first study first.

    `variants` are those of this run; rows of other studies name theirs (`Variant.of`). Columns: `study`,
    `method` and `parameters` of the row; `variant`, its `label`; `group`, one of `GROUPS`; `quality`, the
    metric, from `low` to `high`; `worst`, the lower end of its paired difference to the study's baseline.
    The other studies' baselines are left out.
    """
    own = {_key(v.method, v.parameters): v for v in variants}
    rows = list(rows)
    found = [row for row in rows if row["metric"] == metric]
    bases = {row["study"]: row["method"] for row in found if not row["parameters"]}
    worst = {
        (row["study"], _key(row["method"], row["parameters"])): row["ci_low"]
        for row in rows
        if row["metric"] == f"{metric} difference" and row["baseline"] == bases[row["study"]]
    }
    points = []
    for row in found:
        key = _key(row["method"], row["parameters"])
        if row["parameters"]:
            variant = own[key] if row["study"] == found[0]["study"] else Variant.of(row)
        elif row["study"] == found[0]["study"]:
            variant = Variant("unstructured", 0.0)
        else:
            continue
        points.append(
            {
                **{name: row[name] for name in ("study", "method", "parameters")},
                "variant": variant,
                "label": variant.label,
                "group": GROUPS[variant.amount > 0, variant.preset != ""],
                "quality": row["value"],
                "low": row["ci_low"],
                "high": row["ci_high"],
                # Of what was never compared nothing is shown.
                "worst": worst.get((row["study"], key), math.nan if row["parameters"] else 0.0),
            }
        )
    return pd.DataFrame(points)


def _key(method: str, parameters: dict[str, Any]) -> tuple[str, str]:
    return method, json.dumps(parameters, sort_keys=True)


def plot_front(axis: Axes, points: pd.DataFrame, cost: str, packed: bool = False) -> None:
    """Draw the `quality` of every point over a column `cost`, and the front of the real files, labelled.

    Filled dots have a real `file`, hollow ones would take so little if packed; with `packed` the front of
    all is drawn as well, dotted. Colours tell each point's `group`. What is labelled, also fp32 and the
    published sweet spot, shows its interval. Limits and scale of the axis must be set before.
    """
    colors = dict(zip(GROUPS.values(), sns.color_palette(), strict=False))
    for (group, real), dots in points.groupby(["group", "file"], sort=False):
        face, name = (colors[group], group) if real else ("none", f"{group}, packed")
        style = {"color": colors[group], "markerfacecolor": face, "markersize": 5}
        axis.plot(dots[cost], dots["quality"], "o", label=name, **style)
    named = points[points["variant"].map(lambda v: v.published) | (points["group"] == "fp32")]
    for line, some in ((":", points), ("-", points[points["file"]]))[0 if packed else 1 :]:
        front = some.iloc[pareto_front(some[cost].tolist(), some["quality"].tolist())]
        axis.step(front[cost], front["quality"], line, where="post", color="0.4", linewidth=1, zorder=0)
        named = pd.concat([named, front])
    named = named[~named.index.duplicated()].sort_values([cost, "quality"])
    place = axis.transData + axis.transAxes.inverted()
    named["x"] = [place.transform((x, 0.5))[0] for x in named[cost]]
    # Labels stand on stairs that fall outwards, so that no line to a dot crosses one.
    stairs = pd.concat([named[named["x"] > 0.6], named[named["x"] <= 0.6][::-1]])
    for step, (_, point) in enumerate(stairs.iterrows()):
        x, right = point[cost], point["x"] > 0.6
        axis.vlines(x, point["low"], point["high"], color=colors[point["group"]], alpha=0.3, linewidth=2)
        axis.annotate(
            point["label"],
            (x, point["quality"]),
            xytext=(point["x"], 0.66 - 0.055 * step),
            textcoords="axes fraction",
            ha="right" if right else "left",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": "0.7", "linewidth": 0.6, "relpos": (float(right), 1)},
        )


def recommend(points: pd.DataFrame, budget: float, tolerance: float) -> pd.Series | None:
    """The point to take where `MB` may be at most `budget`; None where nothing fits.

    Of those that fit: the fastest, then smallest, whose quality is shown to be at most `tolerance` below
    the baseline's (`worst`, the lower end of the paired difference, is no less than -`tolerance`: a test
    of non-inferiority). Where that can be shown of none, the one with the best `quality`.
    """
    fits = points[points["MB"] <= budget]
    if fits.empty:
        return None
    good = fits[fits["worst"] >= -tolerance]
    if good.empty:
        return fits.sort_values(["quality", "MB"], ascending=[False, True], kind="stable").iloc[0]
    return good.sort_values(["time", "MB"], kind="stable").iloc[0]


def matching_results(run: Run, *studies: str) -> list[dict[str, Any]]:
    """The rows of other studies' committed reports, where the same weights drew the same prompts.

    As `Run.results` gives them, numbers as floats; of reports that differ in weights or in one of `SAME`,
    none.
    """
    weights, own, rows = run.weights(), _settings(run.parameters, run.facts), []
    for study in studies:
        folder = ROOT / "reports" / study
        if not all((folder / name).is_file() for name in ("run.json", "metrics.csv")):
            continue
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        # Of a model whose weights were not recorded, nobody knows whether it is this one.
        known = weights and record.get("weights")
        if not known or record["weights"] != weights or _settings(record["parameters"], record) != own:
            continue
        with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                numbers = {n: float(row[n]) for n in ("value", "ci_low", "ci_high") if row[n]}
                rows.append({**row, **numbers, "parameters": json.loads(row["parameters"])})
    return rows


def _settings(parameters: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """What of a run decides about its images; of a parameter left to the model, what the model made it."""
    found = {name: parameters.get(name) for name in SAME} | {"dtype": parameters.get("dtype", "float32")}
    return found | {"guidance_scale": facts.get("guidance_scale", parameters.get("guidance_scale"))}
