"""Thousands of values for the parameters of all notebooks: each is good, or refused in one sentence."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path

import pytest
from notebook_parameters import NOTEBOOKS, namespace, parameters_cell

from sdcomp.study import ParameterError, read_parameters
from sdcomp.study.parameter_rules import STUDIES

DRAWS = 24_000
loop: list = []
loop.append(loop)
deep: list = []
for _ in range(5000):
    deep = [deep]

NASTY = (
    None, True, False, 0, -1, 1, 2, 3, 7, 8, 9, 2.0, 6.5, -0.0, 0.1, 0.999, 1.0, 1.5, 1e-300, 1e300, math.nan,
    math.inf, -math.inf, 2**31, 2**63, 10**400, -(10**400), 10**5000, 1j, b"bytes", (1, 2), {"a": 1}, {1},
    object(), int, range(3), Path("data/tiny"), loop, deep, [], [[]], [None], [[0.1]], "", " ", "\n", "\t",
    "abc", "None", "true", "nan", "1", "0.5", "[0.1]", "[0.1,\n0.2]", "~", "~nobody/x", "/", ".", "..",
    "data", "data/tiny", "reports", "README.md", "/dev/null", "/proc/self/mem", "\0", "a\0b", "\udc80",
    "data/\ud800", "é", "模型", "\u202e", "x" * 300, "x" * 5000, "/".join("x" * 3000), "a/" * 1999, "cpu",
    "cuda", "cuda:99", "cpu:-1", "meta", "hpu", "xpu", "mps", "xla", "vulkan", "privateuseone", "lazy", "max",
    "mse", "ddim", "DDIM", "ddpm ", "l1", "mask", "remove", "layer", "global", "float32", "float16", "fp32",
    "int8", "UNet", "test", "prompt accuracy", "weights_only", "timestep_mse", "openai/clip",
    "data/prompts/scenes_test.jsonl", "2:4", "unstructured 0.5", "removed 0.25 recovered 4", "removed 1.5",
)  # fmt: skip


def near(value: object, rng: random.Random) -> object:
    """Something close to a good value: beside it, of another type, or wrapped."""
    changes = [lambda v: v, lambda v: [v], lambda v: str(v), lambda v: [v, v]]
    if isinstance(value, int | float) and not isinstance(value, bool):
        step, power = rng.choice((-1, 1, 0.5, -0.5, 1e-9, 10, 1000)), rng.randint(-3, 9)
        changes += [lambda v: v + step, lambda v: -v, float, lambda v: v * 10**power]
    if isinstance(value, str):
        end = rng.choice(("\0", "x", "\ud800", " "))
        changes += [str.upper, lambda v: v[1:], lambda v: v + end]
    if isinstance(value, list) and value:
        changes += [lambda v: v[:-1], lambda v: v + v, lambda v: v[0], lambda v: [*v, rng.choice(NASTY)]]
        changes += [lambda v: [near(item, rng) for item in v]]
    return rng.choice(changes)(value)


def draw(good: object, rng: random.Random) -> object:
    kind = rng.random()
    if kind < 0.35:
        return rng.choice(NASTY)
    if kind < 0.5:
        return [rng.choice(NASTY) for _ in range(rng.randint(0, 4))]
    if kind < 0.6:
        n = rng.randint(1, 3)
        return [near(good, rng) if rng.random() < 0.8 else rng.choice(NASTY) for _ in range(n)]
    return near(good, rng)


def is_of_type(value: object, kinds: str) -> bool:
    """Whether a value is of a declared type such as `float or list[float]`, by Python's own types."""
    plain = {"int": int, "float": float, "str": str, "bool": bool}
    for kind in kinds.strip('"').split(" or "):
        item = kind.removeprefix("list[").removesuffix("]")
        items = value if kind != item and isinstance(value, list) else [value]
        if kind != item and not isinstance(value, list):
            continue
        if all(type(v) is plain[item] and (item != "float" or math.isfinite(v)) for v in items):
            return True
    return False


WITHIN = {
    "amount": (0, 1), "amounts": (0, 1), "sensitivity_amounts": (0, 1), "budgets": (0, 1),
    "strength": (0, 1), "weight_bits": (2, 8), "act_bits": (2, 8), "sweep_bits": (2, 8), "k": (1, 1000),
    "sweep_k": (1, 1000), "steps": (1, 500), "repeats": (1, 10_000), "seed": (0, 2**31 - 1),
    "packed_bits": (2, 8), "bits": (2, 8), "draws": (1, 100), "calibration_steps": (1, 1000),
    "n_images": (1, 100_000),
}  # fmt: skip
"""What numbers can mean, written down a second time."""
FULL_PRECISION = ("06_low_bits", "act_bits", 32)


def assert_good(study: str, kinds: dict[str, str], values: dict) -> None:
    for name, value in values.items():
        items = value if isinstance(value, list) else [value]
        assert is_of_type(value, kinds[name]), (study, name, value)
        assert all(STUDIES[study].rules[name].takes(item) for item in items), (study, name, value)
        if name in WITHIN:
            low, high = WITHIN[name]
            within = [item for item in items if (study, name, item) != FULL_PRECISION]
            assert all(low <= item <= high for item in within), (study, name, value)
            assert high != 1 or name in ("budgets", "strength") or all(item < 1 for item in items)
        for text in (item for item in items if isinstance(item, str)):
            text.encode()
            assert "\0" not in text
    assert STUDIES[study].checks(values) is None
    if "calibration_steps" in values and "methods" in values and "timestep_mse" in values["methods"]:
        assert values["k"] <= values["calibration_steps"]


@pytest.mark.filterwarnings("ignore")  # some names of devices are deprecated
def test_any_value_is_good_or_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(20)
    studies = list(NOTEBOOKS)
    plain = {study: namespace(study) for study in studies}
    kinds = {
        study: dict(line.partition(" = ")[0].split(": ", 1) for line in parameters_cell(study).splitlines())
        for study in studies
    }
    outcomes: Counter = Counter()
    for turn in range(DRAWS):
        study = studies[turn % len(studies)]
        names = sorted(kinds[study])
        # Each parameter in turn; now and then a second one, so that rules on several are met.
        drawn = {names[turn // len(studies) % len(names)]}
        drawn |= {rng.choice(names)} if rng.random() < 0.2 else set()
        injected = {name: draw(plain[study][name], rng) for name in drawn}
        given = {**plain[study], **injected}
        try:
            values = read_parameters(given, study)
        except ParameterError as error:
            message = str(error)
            assert message and message.isprintable() and len(message) < 800, (study, injected, message)
            outcomes["refused"] += 1
        else:
            assert_good(study, kinds[study], values)
            outcomes["taken"] += 1
    assert not list(tmp_path.iterdir())
    # Both happen often, so neither is all that there is.
    assert min(outcomes["refused"], outcomes["taken"]) > DRAWS / 10, outcomes
