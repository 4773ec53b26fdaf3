"""Figures of quality against bytes and against time."""

from dataclasses import replace

import pandas as pd
import pytest
from matplotlib.figure import Figure

from sdcomp.study import FP32, pruned, quantized
from sdcomp.study.loss_plots import kind, plot_bytes, plot_seconds

REMOVED = pruned("removed", 0.25, recover_steps=400)
INT8 = quantized("timestep_mse", 8, 8, 10, of=REMOVED, execution="int8")
W4 = quantized("weights_gptq", 4, of=REMOVED, execution="packed")
WHOLE = quantized("weights_gptq", 4, execution="packed")


@pytest.fixture
def axis():
    return Figure(figsize=(9, 5)).add_subplot()


def lines(axis):
    return [line.get_xydata().tolist() for line in axis.lines if line.get_marker() == "o"]


def test_the_kind_of_a_variant_is_its_pruning():
    assert kind(WHOLE) == kind(FP32) == "not pruned"
    assert kind(W4) == kind(INT8) == "removed 25 %, recovered 400"


def test_files_of_one_pruning_are_joined_and_their_intervals_drawn(axis):
    found = [(INT8, 7.5, -1.6, -4.0, 1.0), (WHOLE, 4.9, -0.4, -2.0, 1.2), (W4, 4.1, -2.0, -5.0, 1.0)]
    points = pd.DataFrame(found, columns=["variant", "MB", "change", "worst", "best"])
    plot_bytes(axis, points, half=18.7, tolerance=5)
    assert lines(axis) == [[[4.1, -2.0], [7.5, -1.6]], [[4.9, -0.4]]]
    (control,) = [line for line in axis.lines if line.get_marker() == "s"]
    assert control.get_xydata().tolist() == [[18.7, 0]]
    limits = [line.get_ydata()[0] for line in axis.lines if line.get_marker() == "None"]
    assert limits == [0, -2, -5]
    bars = [[s.tolist() for s in bar.get_segments()] for bar in axis.collections]
    assert bars[0] == [[[4.1, -5], [4.1, 1]], [[7.5, -4], [7.5, 1]]]
    assert {"fp16", "4", "8", "not pruned", kind(W4)} == {text.get_text() for text in axis.texts}
    assert axis.get_xscale() == "log" and axis.get_xlim()[0] < 4.1 and axis.get_xlim()[1] > 18.7


def test_without_files_only_fp16_is_drawn(axis):
    plot_bytes(axis, pd.DataFrame(columns=["variant", "MB", "change", "worst", "best"]), 18.7, 5)
    assert [text.get_text() for text in axis.texts] == ["fp16"]


def test_fewer_steps_of_one_unet_are_one_line_and_the_control_is_black(axis):
    seconds = {FP32: 0.4, replace(FP32, steps=10): 0.2, INT8: 0.3, replace(INT8, steps=10): 0.15}
    values = [0.0, -1.0, -0.5, -2.0]
    rows = [
        {"variant": v, "value": value, "ci_low": value - 1, "ci_high": value + 1}
        for v, value in zip(seconds, values, strict=True)
    ]
    plot_seconds(axis, [*rows, {**rows[0], "variant": W4}], seconds, 20)
    assert lines(axis) == [[[0.2, -1.0], [0.4, 0.0]], [[0.15, -2.0], [0.3, -0.5]]]
    assert axis.lines[0].get_color() == "black" and axis.lines[1].get_color() != "black"
    names = {"fewer steps alone", f"{kind(INT8)}, int8", "10", "20"}
    assert names == {text.get_text() for text in axis.texts}
    assert "0.400\n1x" in [text.get_text() for text in axis.get_xticklabels()]
