"""A variant: how a UNet is compressed and run. Every study names its results by this one type."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

PRUNINGS = ("", "unstructured", "pattern", "masked channels", "removed")
EXECUTIONS = ("fp32", "simulated", "packed", "int8", "int8 (dequantized)", "openvino")


@dataclass(frozen=True)
class Variant:
    """One way to compress and run a UNet. The defaults are those of the baseline, the UNet as it is.

    Raises ValueError for fields that contradict each other.
    """

    pruning: str = ""
    """"unstructured" zeroes single weights, "pattern" m - n of every m inputs, "masked channels" output
    channels; "removed" makes the network smaller; empty: nothing is pruned."""
    amount: float = 0.0
    """The share that is pruned, 0 to 1."""
    pattern: str = ""
    """The pattern of zeros, n:m, such as "2:4"."""
    scope: str = "layer"
    """Each "layer" loses the same share, or "global": those lose more where it costs less. Whole blocks
    compete for removal only then."""
    importance: str = ""
    """What finds the least important: a name in `sdcomp.pruning.IMPORTANCES`, or the norm "l1" or "l2" of
    channels; empty: magnitude, or l2."""
    block: str = ""
    """The only block that is pruned; empty: all of them."""
    recover_steps: int = 0
    """Training steps after the pruning."""
    recipe: str = ""
    """How it is quantized: a name in `PRESETS`, or one that the study defines; empty: not at all."""
    weight_bits: int = 32
    act_bits: int = 32
    k: int = 0
    """Timestep intervals with scales of their own; 0: the scales are the same at all timesteps."""
    calibrated_first: bool = False
    """Whether activations were calibrated before the pruning instead of after it."""
    execution: str = "fp32"
    """"simulated" rounds in floating point, "packed" unpacks n-bit weights layer by layer. "int8" runs
    integer kernels, "int8 (dequantized)" turns int8 weights into floats, "openvino" exports the UNet to that
    engine. "fp32" is for variants without a recipe."""
    steps: int = 0
    """Sampling steps of its images; 0: those of the study. Fewer steps are the control for a gain in time."""

    def __post_init__(self) -> None:
        if self.pruning not in PRUNINGS or self.execution not in EXECUTIONS:
            raise ValueError(f"{self.pruning!r} or {self.execution!r} is unknown: see PRUNINGS, EXECUTIONS")
        if bool(self.pruning) != (self.amount > 0):
            raise ValueError(f"pruning={self.pruning!r} and amount={self.amount} contradict each other")
        if bool(self.pattern) != (self.pruning == "pattern"):
            raise ValueError(f"pruning={self.pruning!r} and pattern={self.pattern!r} contradict each other")
        if bool(self.recipe) != (self.execution != "fp32"):
            raise ValueError(f"recipe={self.recipe!r} and execution={self.execution!r} contradict each other")

    @property
    def method(self) -> str:
        """The kind of the variant, without its numbers: "removed, recovered + timestep_mse + int8"."""
        pruning = _join(", ", self.pattern or self.pruning, "recovered" if self.recover_steps else "")
        how = _join(" + ", pruning, self.recipe, self._executed) or "fp32"
        first = "calibrated first" if self.calibrated_first else ""
        return _join(", ", how, first, "other steps" if self.steps else "")

    @property
    def label(self) -> str:
        """A text that no other variant has: "removed 25 %, recovered 400, timestep_mse k10 W8A8 int8"."""
        return self.describe()

    def describe(self, amount: bool = True) -> str:
        """The `label`; without `amount` it is the same for all amounts, such as all points of a line."""
        pruning = (
            self.pattern or self.pruning,
            f"{100 * self.amount:g} %" if self.pruning and amount and not self.pattern else "",
            "global" if self.scope == "global" else "",
            f"by {self.importance}" if self.importance else "",
            f"in {self.block}" if self.block else "",
        )
        quantization = (
            self.recipe,
            f"k{self.k}" if self.k else "",
            _bits("W", self.weight_bits) + _bits("A", self.act_bits),
            self._executed,
            "calibrated first" if self.calibrated_first else "",
        )
        recovery = f"recovered {self.recover_steps}" if self.recover_steps else ""
        how = _join(", ", _join(" ", *pruning), recovery, _join(" ", *quantization)) or "fp32"
        return _join(", ", how, f"{self.steps} steps" if self.steps else "")

    @property
    def _executed(self) -> str:
        """The execution, where it is not the usual one."""
        return "" if self.execution in ("fp32", "simulated") else self.execution

    @property
    def parameters(self) -> dict[str, Any]:
        """The fields that differ from the baseline's; `Variant(**parameters)` is the same variant."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}

    @property
    def unquantized(self) -> Variant:
        """The same pruning and recovery, without the quantization, at the study's steps."""
        bits = {"weight_bits": 32, "act_bits": 32, "k": 0, "steps": 0}
        return replace(self, recipe="", calibrated_first=False, execution="fp32", **bits)

    @property
    def simulation(self) -> Variant:
        """The same quantization, simulated."""
        return replace(self, execution="simulated")


def _join(separator: str, *parts: str) -> str:
    return separator.join(part for part in parts if part)


def _bits(letter: str, bits: int) -> str:
    return f"{letter}{bits}" if bits < 32 else ""


FP32 = Variant()
"""The baseline of every study: the UNet as it is."""


def pruned(pruning: str, amount: float, **fields: Any) -> Variant:
    """A pruned variant; the baseline where `amount` is 0, since nothing is pruned then."""
    return Variant(pruning, amount, **fields) if amount else FP32


def patterned(pattern: str, **fields: Any) -> Variant:
    """A variant with an n:m pattern, such as "2:4"; raises ValueError for another text."""
    n, _, m = pattern.partition(":")
    if not (n.isdecimal() and m.isdecimal() and 1 <= int(n) < int(m)):
        raise ValueError(f"a pattern is n:m with n below m, such as 2:4, not {pattern!r}")
    return Variant("pattern", 1 - int(n) / int(m), pattern=pattern, **fields)


def quantized(
    recipe: str,
    weight_bits: int,
    act_bits: int = 32,
    k: int = 0,
    *,
    of: Variant = FP32,
    execution: str = "simulated",
) -> Variant:
    """The quantization of a variant, by default of the UNet as it is."""
    bits = {"weight_bits": weight_bits, "act_bits": act_bits}
    return replace(of, recipe=recipe, k=k, execution=execution, **bits)
