"""Fronts, budgets and bytes of compressed variants, against brute force and files that are really written."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sdcomp.integer import save_int8, to_int8
from sdcomp.pruning import disk_sizes, prune_structured, prune_unstructured
from sdcomp.quantization import Calibrator, QuantModel
from sdcomp.study import pareto
from sdcomp.study.pareto import (
    Variant,
    matching_results,
    measured,
    packed_bytes,
    pareto_front,
    recommend,
    runs_on_kernels,
    stored_bytes,
)

numbers = st.integers(0, 5).map(float)


@given(st.lists(st.tuples(numbers, numbers), max_size=12))
def test_front_is_what_nothing_dominates(points):
    front = pareto_front([c for c, _ in points], [q for _, q in points])

    def dominated(c, q):
        return any((c2 <= c and q2 >= q) and (c2, q2) != (c, q) for c2, q2 in points)

    assert {points[i] for i in front} == {p for p in points if not dominated(*p)}
    assert len({points[i] for i in front}) == len(front)
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


def table(*rows):
    return pd.DataFrame(rows, columns=["label", "MB", "time", "quality", "worst"])


POINTS = table(
    ("best", 9, 0.9, 91.0, -2.0),
    ("fast", 8, 0.6, 89.0, -4.5),
    ("faster", 7, 0.5, 84.0, -9.0),
    ("small", 2, 0.7, 40.0, -60.0),
    ("worse", 2, 0.4, 30.0, -70.0),
)


@pytest.mark.parametrize(
    ("budget", "tolerance", "label"),
    [
        (10, 5, "fast"),  # the fastest within tolerance
        (10, 3, "best"),
        (7.5, 5, "faster"),  # none within tolerance: the best
        (2, 5, "small"),
        (2, 65, "small"),
        (2, 75, "worse"),
    ],
)
def test_recommended_is_the_fastest_that_is_shown_not_to_be_much_worse(budget, tolerance, label):
    assert recommend(POINTS, budget, tolerance)["label"] == label


def test_nothing_is_recommended_where_nothing_fits():
    assert recommend(POINTS, 1.9, 5) is None


def layer(*weights):
    module = nn.Linear(len(weights), 1, bias=False)
    module.weight.data[:] = torch.tensor(weights)
    return module


def test_packed_bytes_by_hand():
    assert packed_bytes(layer(*[1.0] * 16)) == 64
    # 12 of 16 zero: 16 bits that say where, and 4 float32.
    assert packed_bytes(layer(*[0.0] * 12, *[1.0] * 4)) == 2 + 16
    # 4 bits each; beside them a scale (4 bytes), a flag, and the interval's start, whose zero takes a bit.
    model = QuantModel(layer(*[1.0] * 16), weight_quant_params={"n_bits": 4}, act_quant_params=None)
    assert packed_bytes(model) == 8 + 4 + 1 + 1
    sparse = layer(*[0.0] * 12, *[1.0] * 4)
    model = QuantModel(sparse, weight_quant_params={"n_bits": 4}, act_quant_params=None)
    assert packed_bytes(model) == 2 + 2 + 4 + 1 + 1


def test_only_what_is_written_counts_as_a_file(small):
    dense = disk_sizes(small.unet)["dense"]
    assert stored_bytes(small.unet) == (dense, True)
    size, real = stored_bytes(prune_structured(small.unet, 0.5, mode="remove"))
    assert real and size < 0.8 * dense
    size, real = stored_bytes(prune_unstructured(small.unet, 0.5))
    assert not real and 0.5 * dense < size < 0.8 * dense
    simulated = QuantModel(small.unet)
    Calibrator(small, simulated).calibrate(["a star"], steps=2, batch_size=1)
    size, real = stored_bytes(simulated)
    assert not real and size < 0.5 * dense


def test_an_int8_model_takes_its_file(small, tmp_path):
    simulated = QuantModel(prune_unstructured(small.unet, 0.5))
    Calibrator(small, simulated).calibrate(["a star"], steps=2, batch_size=1)
    int8 = to_int8(simulated)
    size, real = stored_bytes(int8)
    assert real and size == (save_int8(int8, tmp_path) / "int8.safetensors").stat().st_size


REMOVED = Variant("removed", 0.25, 400, "timestep_mse", 8, 8, 10, "int8")


@pytest.mark.parametrize(
    ("variant", "method", "parameters", "label"),
    [
        (
            REMOVED,
            "removed, recovered + int8",
            {"amount": 0.25, "recover_steps": 400, "weight_bits": 8, "act_bits": 8, "k": 10},
            "25 % removed, recovered, int8",
        ),
        (
            Variant("unstructured", 0.2, 0, "mse", 6, 8, 0, "simulated", calibrated_first=True),
            "unstructured + mse, calibrated first",
            {"amount": 0.2, "weight_bits": 6, "act_bits": 8},
            "20 % unstructured, mse 6 and 8 bits, calibrated first",
        ),
        (
            Variant("unstructured", 0.3, 0, "weights_only", 4, backend="simulated"),
            "unstructured + weights_only",
            {"amount": 0.3, "weight_bits": 4},
            "30 % unstructured, weights_only 4 bits",
        ),
        (
            Variant("unstructured", 0.2, 0, "timestep_mse", 8, 8, 10, "simulated"),
            "unstructured + timestep_mse",
            {"amount": 0.2, "weight_bits": 8, "act_bits": 8, "k": 10},
            "20 % unstructured, timestep_mse 8 bits (published sweet spot)",
        ),
        (Variant("masked channels", 0.05), "masked channels", {"amount": 0.05}, "5 % masked channels"),
        (Variant("removed", 0.0, backend="int8", preset="mse"), "removed + int8", {"amount": 0.0}, "int8"),
    ],
)
def test_a_variant_names_itself(variant, method, parameters, label):
    assert (variant.method, variant.parameters, variant.label) == (method, parameters, label)


@pytest.mark.parametrize(
    ("method", "parameters", "variant"),
    [
        ("removed, recovered", {"amount": 0.45, "recover_steps": 400}, Variant("removed", 0.45, 400)),
        (
            "timestep_mse",
            {"weight_bits": 6, "act_bits": 6, "k": 5},
            Variant("unstructured", 0.0, 0, "timestep_mse", 6, 6, 5, "simulated"),
        ),
        (
            "weights_only",
            {"weight_bits": 4, "act_bits": 32},
            Variant("unstructured", 0.0, 0, "weights_only", 4, 32, 0, "simulated"),
        ),
    ],
)
def test_rows_of_the_other_studies_name_their_variant(method, parameters, variant):
    assert Variant.of({"method": method, "parameters": parameters}) == variant


def row(study, method, parameters, metric, value, low=np.nan, baseline="", high=99.0):
    return {
        "study": study, "method": method, "parameters": parameters, "metric": metric, "value": value,
        "ci_low": low, "ci_high": high, "baseline": baseline,
    }  # fmt: skip


def test_each_variant_is_measured_once_with_its_difference_to_the_baseline():
    p = REMOVED.parameters
    points = measured(
        [
            row("04", "fp32", {}, "accuracy", 90.0),
            row("04", REMOVED.method, p, "accuracy", 88.0),
            row("04", REMOVED.method, p, "accuracy difference", -2.0, -4.0, "fp32"),
            row("04", REMOVED.method, p, "accuracy difference", 1.0, 0.5, "another variant"),
            row("04", REMOVED.method, p, "PSNR", 20.0),
            row("02", "unpruned", {}, "accuracy", 90.0),
            row("02", "unstructured", {"amount": 0.3}, "accuracy", 91.0),
            row("02", "unstructured", {"amount": 0.3}, "accuracy difference", 1.0, -1.5, "unpruned"),
            row("01", "full precision", {}, "accuracy", 90.0),
            row("01", "mse", {"weight_bits": 6, "act_bits": 6}, "accuracy", 89.0),
        ],
        "accuracy",
        [REMOVED],
    )
    assert points[["study", "group", "quality"]].to_numpy().tolist() == [
        ["04", "fp32", 90.0],
        ["04", "pruned and quantized", 88.0],
        ["02", "pruned", 91.0],
        ["01", "quantized", 89.0],
    ]
    # Of the last it was not recorded.
    assert points["worst"].tolist() == pytest.approx([0.0, -4.0, -1.5, float("nan")], nan_ok=True)
    assert points["variant"][1] is REMOVED


SETTINGS = {"seed": 0, "n_images": 4, "steps": 20, "sampler": "ddim", "guidance_scale": 4.0}


@pytest.mark.parametrize(
    ("record", "rows"),
    [
        ({}, 1),
        ({"weights": {"unet": "other"}}, 0),
        ({"parameters": {**SETTINGS, "n_images": 8}}, 0),
        ({"parameters": {**SETTINGS, "model": "elsewhere/the/same"}}, 1),
        ({"parameters": {**SETTINGS, "guidance_scale": 2.0}}, 0),
        ({"parameters": {**SETTINGS, "guidance_scale": ""}, "guidance_scale": 4.0}, 1),
        ({"parameters": {**SETTINGS, "guidance_scale": ""}, "guidance_scale": 7.5}, 0),
        ({"parameters": {**SETTINGS, "dtype": "float32"}}, 1),
        ({"parameters": {**SETTINGS, "dtype": "float16"}}, 0),
        ({"weights": {}}, 0),
        ({"weights": None}, 0),
    ],
)
def test_only_reports_of_the_same_weights_and_settings_are_read(tmp_path, monkeypatch, record, rows):
    monkeypatch.setattr(pareto, "ROOT", tmp_path)
    folder = tmp_path / "reports" / "02_pruning"
    folder.mkdir(parents=True)
    parameters = {**SETTINGS, "model": "data/tiny", "dtype": "float32", "guidance_scale": ""}
    run = SimpleNamespace(parameters=parameters, facts={"guidance_scale": 4.0}, weights=lambda: {"unet": "a"})
    assert matching_results(run, "02_pruning") == []
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["method", "parameters", "value", "ci_low", "ci_high"])
        writer.writeheader()
        writer.writerow({"method": "unstructured", "parameters": '{"amount": 0.3}', "value": "90.1"})
    content = {"parameters": {**SETTINGS, "model": "data/tiny"}, "weights": {"unet": "a"}} | record
    Path(folder / "run.json").write_text(json.dumps(content))
    found = matching_results(run, "02_pruning")
    assert len(found) == rows
    assert all(r["value"] == 90.1 and r["parameters"] == {"amount": 0.3} for r in found)


def test_a_model_whose_weights_are_unknown_is_nobody_elses(tmp_path, monkeypatch):
    monkeypatch.setattr(pareto, "ROOT", tmp_path)
    folder = tmp_path / "reports" / "02_pruning"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("method,parameters,value,ci_low,ci_high\na,{},1,,\n")
    (folder / "run.json").write_text(json.dumps({"parameters": SETTINGS, "weights": {}}))
    run = SimpleNamespace(parameters=SETTINGS, facts={}, weights=dict)
    assert matching_results(run, "02_pruning") == []


def test_int8_without_kernels_has_a_name_of_its_own():
    slow = replace(REMOVED, dequantized=True)
    assert (REMOVED.method, slow.method) == (
        "removed, recovered + int8",
        "removed, recovered + int8 (dequantized)",
    )
    assert slow.label == "25 % removed, recovered, int8 (dequantized)"
    assert slow.simulation == REMOVED.simulation == replace(REMOVED, backend="simulated")
    assert runs_on_kernels(SimpleNamespace(execution="kernels")) and runs_on_kernels(SimpleNamespace())
    assert not runs_on_kernels(SimpleNamespace(execution="dequantized"))
