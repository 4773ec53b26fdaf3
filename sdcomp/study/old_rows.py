"""Rows of reports from before results had a typed variant. Remove it when those reports are made anew."""

from __future__ import annotations

from typing import Any

from sdcomp.study.variants import FP32, Variant

_BASELINES = ("full precision", "unpruned", "fp32")
_PRUNINGS = {
    "unstructured": "unstructured", "masked channels": "masked channels", "removed": "removed",
    "masked": "unstructured", "one block": "unstructured",
}  # fmt: skip
_RECIPES = (
    "weights_only", "max", "max_filtered", "mse", "mse_filtered",
    "timestep_mse", "timestep_mse_filtered", "timestep_optimal", "timestep_split",
)  # fmt: skip
_USED = ("amount", "recover_steps", "weight_bits", "act_bits", "k", "block")


def renewed(row: dict[str, Any]) -> dict[str, Any]:
    """The row as it would be recorded today. A row of today is returned as it is."""
    parameters = row["parameters"]
    if parameters.keys() & {"pruning", "recipe"}:
        return row
    variant = _variant(row["method"], parameters)
    if variant is None:
        return row
    about = {name: value for name, value in parameters.items() if name not in _USED}
    found = {**row, "method": variant.method, "parameters": {**variant.parameters, **about}}
    if row.get("baseline"):
        baseline = _variant(row["baseline"], parameters)
        found["baseline"] = baseline.label if baseline else row["baseline"]
    return found


def _variant(method: str, parameters: dict[str, Any]) -> Variant | None:
    """The variant that an old name stands for with these parameters; None where it is no variant."""
    if method in _BASELINES:
        return FP32
    calibrated_first = method.endswith(", calibrated first")
    kind, _, recipe = method.removesuffix(", calibrated first").partition(" + ")
    if kind in (*_RECIPES, "simulated", "int8"):
        kind, recipe = "", kind
    pruning = kind.removesuffix(", recovered")
    if (pruning not in _PRUNINGS and not recipe) or (pruning and "amount" not in parameters):
        return None
    found: dict[str, Any] = {"calibrated_first": calibrated_first}
    if pruning and parameters["amount"]:
        found |= {"pruning": _PRUNINGS[pruning], "amount": parameters["amount"]}
        found |= {"block": parameters.get("block", "")}
        found |= {"recover_steps": parameters["recover_steps"]} if pruning != kind else {}
    return Variant(**found, **_quantization(recipe, parameters)) if recipe else Variant(**found)


def _quantization(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    recipe = name if name in _RECIPES else "timestep_mse"
    found = {"recipe": recipe, "execution": name if name.startswith("int8") else "simulated"}
    # 03_profiling had one setting, and did not write it down.
    found |= {"weight_bits": parameters.get("weight_bits", 8)}
    if recipe != "weights_only":
        found |= {"act_bits": parameters.get("act_bits", 8)}
    if recipe.startswith("timestep"):
        found |= {"k": parameters.get("k", 0 if "weight_bits" in parameters else 5)}
    return found
