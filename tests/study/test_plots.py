"""Figures that several notebooks draw."""

from matplotlib.figure import Figure

from sdcomp.study import (
    bits_map,
    difference_bars,
    error_band,
    error_dots,
    heat_map,
    label_ends,
    quantized,
    scatter,
)


def rows(values, **parameters):
    """Results as `Run.results` gives them, with intervals of one below and two above."""
    return [
        {
            "value": v,
            "ci_low": v - 1,
            "ci_high": v + 2,
            "parameters": {k: p[i] for k, p in parameters.items()},
        }
        for i, v in enumerate(values)
    ]


def test_a_method_that_failed_everywhere_draws_nothing():
    axis = Figure().add_subplot()
    error_band(axis, [], [], "failed")
    scatter(axis, [], [], "failed")
    bits_map(axis, [], tolerance=5)
    assert not axis.lines or all(line.get_xdata().size == 0 for line in axis.lines)


def test_names_at_the_ends_of_lines_do_not_overlap():
    axis = Figure(figsize=(4, 3), dpi=100).add_subplot()
    for name, end in (("low", 1.0), ("middle", 1.01), ("high", 10.0)):
        error_band(axis, [3, 1, 2], rows([end, 0.5, 0.7]), name)
    axis.set(yscale="log")
    label_ends(axis)
    axis.figure.canvas.draw()
    boxes = {text.get_text(): text.get_window_extent() for text in axis.texts}
    assert list(boxes) == ["low", "middle", "high"]
    assert boxes["low"].y1 <= boxes["middle"].y0 and boxes["middle"].y1 <= boxes["high"].y0
    # Beside the right end of its own line, where there is room.
    end = axis.transData.transform((3, 10.0))
    assert boxes["high"].y0 < end[1] < boxes["high"].y1 and boxes["high"].x0 > end[0]


def test_a_scatter_has_the_intervals_of_both_where_there_are_any():
    axis = Figure().add_subplot()
    exact = [{"value": 5.0, "ci_low": "", "ci_high": ""}, {"value": 6.0, "ci_low": "", "ci_high": ""}]
    scatter(axis, exact, rows([80.0, 90.0]), "removed")
    (container,) = axis.containers
    line, _, (across, upright) = container
    assert line.get_xydata().tolist() == [[5, 80], [6, 90]]
    assert [s.tolist() for s in upright.get_segments()] == [[[5, 79], [5, 82]], [[6, 89], [6, 92]]]
    assert [s.tolist() for s in across.get_segments()] == [[[5, 80], [5, 80]], [[6, 90], [6, 90]]]


def test_a_heat_map_keeps_the_order_and_shows_each_result_in_its_place():
    found = rows([0.1, 0.2, 0.3, 0.4], block=["b", "a", "b", "a"], amount=[0.3, 0.3, 0.1, 0.1])
    figure = heat_map(found, "amount", "block", "error")
    axis, bar = figure.axes
    assert [t.get_text() for t in axis.get_xticklabels()] == ["0.3", "0.1"]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["b", "a"]
    assert axis.collections[0].get_array().reshape(2, 2).tolist() == [[0.1, 0.3], [0.2, 0.4]]
    assert bar.get_ylabel() == "error" and axis.get_xlabel() == "amount"


def test_a_map_of_bits_has_the_most_bits_at_the_top_left_and_says_what_each_shows():
    axis = Figure().add_subplot()
    cells = {(3, 32): -2.0, (4, 32): -4.5, (3, 4): -31.26, (4, 4): -6.5}
    variants = [{"variant": quantized("low_bits", w, a)} for w, a in cells]
    made = [row | variant for row, variant in zip(rows(cells.values()), variants, strict=True)]
    bits_map(axis, made, tolerance=5)
    assert [text.get_text() for text in axis.get_xticklabels()] == ["full", "4"]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["4", "3"]
    written = ["-4.5\n[-5.5, -2.5]", "-6.5\n[-7.5, -4.5]", "-2.0\n[-3.0, 0.0]", "-31.3\n[-32.3, -29.3]"]
    assert [text.get_text() for text in axis.texts] == written
    names = axis.get_legend_handles_labels()[1]
    verdicts = [names[int(v)] for v in axis.collections[0].get_array().ravel()]
    unknown = "cannot be told"
    assert verdicts == [unknown, unknown, "holds", "does not hold"]


def test_differences_stand_from_top_to_bottom_with_their_intervals():
    axis = Figure().add_subplot()
    difference_bars(axis, rows([1.0, -3.0]), ["upper", "lower"], "C0")
    assert [text.get_text() for text in axis.get_yticklabels()] == ["upper", "lower"]
    dots = axis.lines[-1].get_xydata().tolist()
    assert dots == [[1.0, 2.0], [-3.0, 1.0]]
    ends = [segment[:, 0].tolist() for segment in axis.collections[0].get_segments()]
    assert ends == [[0.0, 3.0], [-4.0, -1.0]]


def test_dots_have_intervals_and_no_line():
    axis = Figure().add_subplot()
    error_dots(axis, [0.0, 5.0], rows([1.0, 2.0]), "name", "C1")
    (line,) = axis.lines
    assert line.get_linestyle() == "None" and line.get_xydata().tolist() == [[0.0, 1.0], [5.0, 2.0]]
    assert [s[:, 1].tolist() for s in axis.collections[0].get_segments()] == [[0.0, 3.0], [1.0, 4.0]]
