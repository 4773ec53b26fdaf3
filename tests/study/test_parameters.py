"""Notebook parameters as papermill passes them."""

import re
from pathlib import Path

import nbformat
import pytest
from click.testing import CliRunner
from IPython.core.interactiveshell import InteractiveShell
from made_up import DEFAULTS, PARAMETERS, RECORD, notebook, read
from made_up import made_up_study as made_up_study
from papermill.cli import papermill
from traitlets.config import Config

from sdcomp.errors import UserError
from sdcomp.study import ParameterError, read_parameters


def test_what_was_declared_and_injected_is_returned():
    assert read(notebook()) == DEFAULTS
    injected = {
        "amount": [0.1, 0.2], "seed": 7, "guidance_scale": 2, "sampler": "dpmpp_2m", "structured": True,
        "quant_filters": ["*.to_v"], "guidance_sweep": [1.0, 4.0],
    }  # fmt: skip
    values = read(notebook(injected))
    assert values == {**DEFAULTS, **injected}
    # A whole number is a number, and one parameter has one type however it was given.
    assert type(values["guidance_scale"]) is float
    assert type(read(notebook({"amount": 0}))["amount"]) is float


def test_without_history_the_declarations_are_those_of_the_namespace():
    namespace = notebook()
    namespace["In"] = [""]  # as nbval runs cells
    assert read(namespace) == DEFAULTS
    for name, value, words in (("amount", 1.3, "a fraction"), ("amount", "abc", "a number or a list")):
        with pytest.raises(ParameterError, match=words):
            read({**namespace, name: value})


GOOD = {
    "amount": [0, 0.0, 0.999], "bits": [2, 8, [2, 8]], "seed": [2**31 - 1], "device": ["cpu"],
    "guidance_scale": [0, 100, ""],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in GOOD for value in GOOD[name]])
def test_the_ends_of_a_range_are_in_it(name, value):
    assert read(notebook({name: value}))[name] == value


NAN, INF = float("nan"), float("inf")
BAD = [
    ("amount", 1.3, "a fraction from 0 to below 1"),
    ("amount", 1, "a fraction from 0 to below 1"),
    ("amount", -0.1, "a fraction from 0 to below 1"),
    ("amount", "abc", "a number or a list"),
    ("amount", "0,3", "a number or a list"),
    ("amount", "[0.1]", "pass a list with -y 'amount: [0.1]'"),
    ("amount", [], "empty list"),
    ("amount", [[0.1]], "plain values"),
    ("amount", [{"a": 1}], "plain values"),
    ("amount", [0.1, True], "plain values"),
    ("amount", [0.1, None], "plain values"),
    ("amount", [0.1, "0.2"], "a list of numbers"),
    ("amount", [0.1, 1.3], "not 1.3"),
    ("amount", [0.1, NAN], "not nan"),
    ("amount", NAN, "not nan"),
    ("amount", INF, "not inf"),
    ("amount", True, "a number or a list"),
    ("amount", None, "a number or a list"),
    ("amount", {"a": 1}, "a number or a list"),
    ("quant_filters", [], "empty list"),
    ("quant_filters", "out", "must be a list"),
    ("guidance_sweep", [1.0, NAN], "not nan"),
    ("guidance_sweep", [1.0, 101.0], "between 0 and 100"),
    ("guidance_sweep", ["high"], "a list of numbers"),
    ("bits", 6.5, "a whole number or a list of whole numbers"),
    ("bits", [6.5], "a list of whole numbers, not of 6.5"),
    ("bits", [8, 6.0], "a list of whole numbers, not of 6.0"),
    ("bits", ["6"], "a list of whole numbers, not of '6'"),
    ("bits", [8, 9], "between 2 and 8, not 9"),
    ("quant_filters", ["out", 2], "a list of texts, not of 2"),
    ("quant_filters", ["out", " "], "names of layers"),
    ("quant_filters", ["\udc80"], "text that UTF-8 can hold, not '\\udc80'"),
    ("amount", 10**400, "must be finite"),
    ("amount", 10**5000, "must be finite, not this int"),
    ("amount", [-(10**400)], "must be finite"),
    ("seed", 10**400, "(401 characters)"),
    ("batch_size", -1, "between 0 and"),
    ("dtype", "float64", "one of float32, bfloat16, float16"),
    ("model", "x" * 5000, "text of at most 4,000 characters"),
    ("model", "x" * 3000, "an existing model folder"),
    ("model", "data\0tiny", "without NUL"),
    ("model", "data", "an existing model folder"),
    ("out", "x\0", "without NUL"),
    ("device", "hpu", "a device that this machine"),
    ("device", "privateuseone", "a device that this machine"),
    ("guidance_scale", "high", "or empty for the model's own, not 'high'"),
    ("structured", 1, "true or false"),
    ("structured", "yes", "true or false"),
    ("seed", True, "a whole number"),
    ("seed", 1.0, "a whole number"),
    ("seed", "1", "a whole number"),
    ("seed", -1, "between 0 and"),
    ("seed", 2**31, "between 0 and"),
    ("n_images", 0, "between 1 and"),
    ("steps", 501, "between 1 and 500"),
    ("sampler", "euler", "one of ddpm, ddim, dpmpp_2m"),
    ("sampler", 3, "must be text"),
    ("guidance_scale", -0.5, "between 0 and 100"),
    ("guidance_scale", NAN, "not nan"),
    ("guidance_scale", INF, "not inf"),
    ("guidance_scale", True, "a number or text"),
    ("model", "data/no such model", "an existing model folder"),
    ("model", "~no_such_user/model", "an existing model folder"),
    ("model", "two\nlines", "an existing model folder"),
    ("model", None, "must be text"),
    ("device", "cuda:99", "a device that this machine"),
    ("device", "gpu", "a device that this machine"),
    ("device", "meta", "a device that this machine"),
    ("device", "", "a device that this machine"),
    ("out", 3, "must be text"),
]


@pytest.mark.parametrize(
    ("name", "value", "words"), BAD, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(BAD)]
)
def test_a_bad_value_is_refused_in_one_sentence_that_names_it(name, value, words):
    with pytest.raises(ParameterError, match=re.escape(words)) as caught:
        read({**notebook(), name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} must ") and "\n" not in message
    assert isinstance(caught.value, ValueError)


def test_further_amounts_may_be_none_though_the_default_is_some():
    assert read(notebook({"remove_amounts": []}))["remove_amounts"] == []


@pytest.mark.parametrize("name", ["amuont", "Amount", "In"])
def test_a_misspelt_name_is_refused_with_the_names_there_are(name):
    with pytest.raises(ParameterError) as caught:
        read(notebook({"amount": 0.5, name: 0.3}))
    assert str(caught.value) == f"there is no parameter {name!r}; this notebook has {', '.join(DEFAULTS)}"


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ParameterError) as caught:
        read(notebook({"mode": "remove"}))
    assert str(caught.value) == "mode='remove' needs structured"
    assert read(notebook({"mode": "remove", "structured": True}))["mode"] == "remove"


def test_a_parameter_without_a_rule_stops_the_run(monkeypatch):
    for cell in (PARAMETERS + "strictness: float = 0.5\n", PARAMETERS.replace("mode: str", "mood: str")):
        with pytest.raises(ParameterError, match="'(strictness' has no rule|mode' has a rule, and is not)"):
            read(notebook(parameters=cell))
    with pytest.raises(ParameterError, match="the study '99_mine' has no rules"):
        read_parameters(notebook(), "99_mine")
    with pytest.raises(ParameterError, match="cannot have the type 'dict'"):
        read(notebook(parameters=PARAMETERS.replace("structured: bool", "structured: dict")))


def test_without_a_parameters_cell_there_is_one_sentence():
    for cells in ([], [""], ["", "import sdcomp\nx: int = 3", "%load_ext nothing"]):
        with pytest.raises(ParameterError, match="run the parameters cell first"):
            read({"In": cells})


def test_other_cells_do_not_matter():
    namespace = notebook({"amount": 0.5})
    namespace["In"] += [
        "# Parameters of the figure\nwidth = 3",
        "# Parameters\nfirst, second = 1, 2\nself.x = 3",
        "run.note: int = 3",
        "!ls",
        "%time x = 3",
    ]
    assert read(namespace)["amount"] == 0.5
    # A parameters cell that is run again, with another value in it, is the one that counts.
    changed = PARAMETERS.replace('amount: "float or list[float]" = 0.3', "amount: float = 0.1")
    exec(changed, namespace)
    namespace["In"].append(changed)
    values = read(namespace)
    assert values["amount"] == 0.1


def papermill_cells(tmp_path: Path, *options: str) -> dict:
    """The globals of a notebook that papermill itself prepared with these command-line options."""
    source = nbformat.v4.new_notebook()
    source.cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})]
    source.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(source, tmp_path / "in.ipynb")
    paths = [str(tmp_path / name) for name in ("in.ipynb", "out.ipynb")]
    result = CliRunner().invoke(papermill, ["--prepare-only", *paths, *options])
    assert result.exit_code == 0, result.output
    cells = ["", *(cell.source for cell in nbformat.read(paths[1], as_version=4).cells), RECORD]
    namespace: dict = {}
    for cell in cells[:-1]:
        exec(cell, namespace)
    return {**namespace, "In": cells}


def test_the_command_line_of_papermill_gives_what_it_says(tmp_path):
    options = ["-p", "amount", "0.5", "-p", "sampler", "ddpm", "-r", "out", "12", "-p", "structured", "True"]
    values = read(papermill_cells(tmp_path, *options))
    assert values == {**DEFAULTS, "amount": 0.5, "sampler": "ddpm", "out": "12", "structured": True}
    values = read(papermill_cells(tmp_path, "-y", "amount: [0.1, 0.2]"))
    assert values == {**DEFAULTS, "amount": [0.1, 0.2]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("-p", "amount", "1.3"),
            "amount must be a fraction from 0 to below 1, such as 0.3 for 30 %, not 1.3",
        ),
        (("-p", "amuont", "0.3"), "there is no parameter 'amuont'"),
        (("-p", "amount", "[0.1]"), "pass a list with -y 'amount: [0.1]'"),
        (("-p", "amount", "nan"), "not nan"),
    ],
)
def test_the_command_line_of_papermill_is_refused_in_one_sentence(tmp_path, options, message):
    with pytest.raises(ParameterError, match=re.escape(message)) as caught:
        read(papermill_cells(tmp_path, *options))
    assert "\n" not in str(caught.value)


def test_a_notebook_shows_one_line_in_place_of_a_stack_trace(tmp_path, capsys):
    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.ipython_dir = str(tmp_path)
    shell = InteractiveShell(config=config)
    cells = [PARAMETERS, "# Parameters\namount = 1.3\n", "from sdcomp.study import Run\n" + RECORD]
    for cell in cells:
        result = shell.run_cell(cell, store_history=True)
    assert isinstance(result.error_in_exec, ParameterError)
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [
        "ParameterError: amount must be a fraction from 0 to below 1, such as 0.3 for 30 %, not 1.3"
    ]
    assert shown.err == ""
    assert UserError("no space")._render_traceback_() == ["UserError: no space"]
