"""What 07_conditions says in words, from made-up rows."""

import math

import numpy as np
import pytest

from sdcomp.study.condition_answers import (
    calibration_answer,
    changes_answer,
    draws_against_images,
    draws_spread,
    failure_title,
    first_failure,
    lost_first,
)


def row(label: str, value: float, reach: float, n: int = 128, **more) -> dict:
    found = {"label": label, "value": value, "ci_low": value - reach, "ci_high": value + reach}
    return {**found, "n": n, "unit": "%", **more}


def lost(label: str, attribute: str, value: float, reach: float, n: int = 128) -> dict:
    return row(label, value, reach, n, about={"attribute": attribute})


def test_the_spread_is_pooled_within_numbers_of_prompts():
    draws = [[row("a", -1, 3), row("b", 1, 3), row("c", 3, 3)], [row("d", 10, 3), row("e", 14, 3)]]
    pooled = math.sqrt((2 * np.var([-1, 1, 3], ddof=1) + np.var([10, 14], ddof=1)) / 3)
    assert draws_spread(draws) == pytest.approx(pooled)
    assert math.isnan(draws_spread([[row("a", 1, 1)], [row("b", 2, 1)]])) and math.isnan(draws_spread([]))


def test_draws_widen_an_interval():
    draws = {
        "4 prompts": [row("a", -2, 3.92), row("b", 0, 3.92)],
        "8 prompts": [row("d", -1, 3.92), row("e", 1, 3.92), row("f", 0, 3.92)],
        "16 prompts": [row("c", -1, 3.92)],
    }
    lines = calibration_answer(draws).splitlines()
    assert (
        lines[0] == "4 prompts, 2 draws: -2.0 to 0.0 points; an interval by images reaches 3.9 to each side."
    )
    assert lines[2].startswith("16 prompts, 1 draw: -1.0 points;")
    wide = math.hypot(3.92, 3.182 * math.sqrt(4 / 3))  # Student's t with 3 degrees of freedom
    assert lines[3].startswith("Draws of equally many prompts have a standard deviation of 1.2 points.")
    assert f"intervals reach {wide:.1f} points to each side instead of 3.9." in lines[3]
    assert calibration_answer({"4 prompts": draws["8 prompts"]}).endswith("how much draws differ.")
    assert calibration_answer({"4 prompts": [row("a", 0, 1)]}).endswith("how much draws differ.")
    assert calibration_answer({}) == "No calibration gave images."
    assert draws_against_images({}).endswith("how much draws differ.")
    few = {"4 prompts": [row("a", 0, 30, 8), row("b", 9, 30, 8)]}
    assert calibration_answer(few).endswith("8 images are fewer than 64. How much draws differ stays open.")


def test_a_new_draw_lies_within_the_reach_of_old_ones():
    """With 3 x 2 draws, the fewest that give an interval, it contains a new draw in 95 % of all runs."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(2000):
        draws = {f"{i}": [row("a", rng.normal(0, 2), 0) for _ in range(2)] for i in range(3)}
        both = float(draws_against_images(draws).split("intervals reach ")[1].split()[0])
        inside += abs(rng.normal(0, 2)) <= both
    assert 0.93 < inside / 2000 < 0.97


def test_a_loss_holds_where_its_change_is_not_told_from_zero():
    holds, other = row("mse", -1, 4, condition="ddpm"), row("mse", -9, 4, condition="6 steps")
    assert changes_answer([], "ddim") == "No other condition was run."
    said = changes_answer([holds, holds], "ddim")
    assert said.startswith("No loss is shown to be another than under ddim. The intervals of 2 changes reach")
    assert said.endswith("up to 4.0 points to each side.")
    said = changes_answer([holds, other], "ddim")
    assert said.startswith("2 losses were compared with those under ddim. For 1 the interval of the change")
    assert said.endswith("chance alone gives about 0.1. 6 steps, mse: -9.0 [-13.0, -5.0].")
    assert "stays open" in changes_answer([row("mse", -90, 4, 16, condition="ddpm")], "ddim")


def test_the_first_failure_is_that_of_the_gentlest_variant_that_shows_one():
    rows = [
        lost("W6A6", "color", -1, 2), lost("W6A6", "shape", -1, 2),
        lost("W5A5", "color", -4, 2), lost("W5A5", "shape", -6, 2), lost("W5A5", "relation", -9, 2, n=20),
        lost("W4A4", "color", -40, 2), lost("W4A4", "shape", -30, 2),
    ]  # fmt: skip
    assert [r["about"]["attribute"] for r in lost_first(rows)] == ["shape", "color"]
    said = first_failure(rows)
    assert said.startswith("W5A5 is the first") and "shape -6.0 [-8.0, -4.0], color" in said
    assert failure_title(rows) == "W5A5 loses shape and color; W6A6 shows no clear loss"
    assert failure_title(rows[2:]) == "W5A5 loses shape and color"
    assert first_failure(rows[:2]) == "From W6A6 to W6A6, no attribute is lost for certain at this n."
    assert failure_title(rows[:2]) == "no clear loss"
    assert first_failure([]) == "No reader judges these images, so no attribute can be told."
    assert failure_title([lost("W4A4", "color", -40, 2, n=8)]) == "8 images are too few to tell"
    assert failure_title([]) == "0 images are too few to tell"


def test_a_loss_that_harsher_variants_do_not_show_is_not_clear():
    rows = [
        lost("W5A5", "size", -3, 2), lost("W5A5", "shape", -4, 6), lost("W5A5", "color", -3, 2),
        lost("W4A4", "size", -2, 4), lost("W4A4", "shape", -14, 6), lost("W4A4", "color", -1, 2),
    ]  # fmt: skip
    assert [(r["label"], r["about"]["attribute"]) for r in lost_first(rows)] == [("W4A4", "shape")]
    assert failure_title(rows) == "W4A4 loses shape; W5A5 shows no clear loss"
    harshest = [lost("W3A3", name, -9, 10) for name in ("size", "shape", "color")]
    assert lost_first([*rows, *harshest]) == []
