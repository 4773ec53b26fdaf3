"""What a run says in words, from made-up rows."""

from sdcomp.study import answer


def row(label: str, value: float, width: float, n: int) -> dict:
    found = {"label": label, "value": value, "ci_low": value - width, "ci_high": value + width, "n": n}
    return {**found, "metric": "prompt accuracy difference", "unit": "%"}


def test_few_images_give_no_verdict():
    lines = answer([row("2:4", -3, 9, 32), row("removed 25 %", -8, 11, 32)]).splitlines()
    assert lines[0].startswith("32 images a variant.") and "reach 10.0 (%)" in lines[0]
    assert lines[1] == "Fewer than 64 images give no verdict. Differences to fp32:"
    assert lines[2:] == ["- 2:4: -3.0 [-12.0, 6.0]", "- removed 25 %: -8.0 [-19.0, 3.0]"]


def test_enough_images_give_verdicts_by_their_intervals():
    rows = [row("good", -1, 2, 256), row("bad", -20, 2, 256), row("open", -4, 3, 256)]
    lines = answer(rows, tolerance=5).splitlines()
    assert lines[1:] == [
        "'Loses at most 5' holds:",
        "- good: -1.0 [-3.0, 1.0]",
        "'Loses at most 5' does not hold:",
        "- bad: -20.0 [-22.0, -18.0]",
        "'Loses at most 5' cannot be told at this n:",
        "- open: -4.0 [-7.0, -1.0]",
    ]


def test_a_run_without_images_says_so():
    assert answer([]) == "No variant gave images, so this run has no answer."
