"""Notebook parameters as papermill passes them, and the record that a run leaves."""

import csv
import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from IPython.core.interactiveshell import InteractiveShell
from matplotlib.figure import Figure
from papermill.cli import papermill
from papermill.translators import PythonTranslator
from traitlets.config import Config

from sdcomp import files
from sdcomp.errors import UserError
from sdcomp.evaluation import Estimate
from sdcomp.evaluation.precision import precision_facts
from sdcomp.study import ParameterError, Run, error_band, heat_map, label_ends, read_parameters, scatter
from sdcomp.study import run as run_module
from sdcomp.study.rules import STUDIES, common

PARAMETERS = """\
model: str = "data/tiny"  # model folder
amount: "float or list[float]" = 0.3  # share, or a list of shares
bits: "int or list[int]" = 8  # 2 to 8
quant_filters: list[str] = ["time_embed", "out"]  # layers left out
guidance_sweep: list[float] = []  # empty: no sweep
remove_amounts: list[float] = [0.25]  # further amounts
structured: bool = False
mode: str = "mask"
seed: int = 0
n_images: int = 32
steps: int = 20
sampler: str = "ddim"
guidance_scale: "float or str" = ""
dtype: str = "float32"
batch_size: int = 0
device: str = "cpu"
out: str = ""
"""

STUDY = "07_made_up"
RECORD = f"run = Run({STUDY!r}, globals())"

DEFAULTS = {
    "model": "data/tiny", "amount": 0.3, "bits": 8, "quant_filters": ["time_embed", "out"],
    "guidance_sweep": [], "remove_amounts": [0.25], "structured": False, "mode": "mask", "seed": 0,
    "n_images": 32, "steps": 20, "sampler": "ddim", "guidance_scale": "", "dtype": "float32",
    "batch_size": 0, "device": "cpu", "out": "",
}  # fmt: skip


def _removal_is_structured(p: dict) -> str | None:
    return "mode='remove' needs structured" if p["mode"] == "remove" and not p["structured"] else None


@pytest.fixture(autouse=True)
def study(monkeypatch):
    """A study that has each kind of parameter; the rules are those of the real ones."""
    rules = {
        **common.COMMON,
        **common.GENERATION,
        "amount": common.AMOUNT,
        "bits": common.BITS,
        "quant_filters": STUDIES["01_quantization"].rules["quant_filters"],
        "guidance_sweep": common.between(0, 100),
        "remove_amounts": common.AMOUNTS,
        "structured": common.FREE,
        "mode": common.one_of("mask", "remove"),
    }
    for name in (STUDY, "08_another"):
        monkeypatch.setitem(STUDIES, name, common.Study(rules, _removal_is_structured))


def read(namespace: dict) -> dict:
    return read_parameters(namespace, STUDY)


def notebook(injected: dict | None = None, parameters: str = PARAMETERS) -> dict:
    """The globals of a notebook when its third cell runs, after the parameters and what was injected."""
    cells = ["", parameters]
    if injected is not None:
        cells.append(PythonTranslator.codify(injected))
    namespace: dict = {}
    for cell in cells:
        exec(cell, namespace)
    return {**namespace, "In": [*cells, RECORD]}


# Parameters


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
    with pytest.raises(ParameterError, match="'dict' is no type of a parameter"):
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


# The record

COLUMNS = [
    "run_id", "study", "model", "method", "parameters", "metric",
    "value", "ci_low", "ci_high", "n", "unit", "baseline",
]  # fmt: skip


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(STUDY, notebook({"out": str(tmp_path / "results")}))


def test_results_go_where_out_says_or_to_a_folder_named_by_the_parameters(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "ROOT", tmp_path / "repository")
    run = Run(STUDY, notebook())
    assert run.folder == tmp_path / "repository" / "reports" / "runs" / STUDY / run.id
    assert re.fullmatch("[0-9a-f]{12}", run.id)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for out, folder in (("here/there", tmp_path / "here" / "there"), ("~/mine", tmp_path / "home" / "mine")):
        run = Run(STUDY, notebook({"out": out}))
        assert run.folder.resolve() == folder and folder.is_dir()
        assert not list(folder.iterdir())

    # In the repository, where nbval and papermill start from different folders, all mean its root.
    monkeypatch.setattr(files, "ROOT", tmp_path / "repository")
    (tmp_path / "repository" / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "repository" / "notebooks")
    model = str(Path(__file__).resolve().parents[1] / "data" / "tiny")
    run = Run(STUDY, notebook({"out": "reports/here", "model": model}))
    assert run.folder == tmp_path / "repository" / "reports" / "here"


def test_the_hash_is_of_the_study_and_its_parameters_and_not_of_where_results_go(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "ROOT", tmp_path)
    first = Run(STUDY, notebook())
    assert Run(STUDY, notebook()).id == first.id
    assert Run(STUDY, notebook({"out": str(tmp_path / "x")})).id == first.id
    assert len({Run(STUDY, notebook({"guidance_scale": scale})).id for scale in (4, 4.0)}) == 1
    others = [
        Run("08_another", notebook()),
        *(
            Run(STUDY, notebook(injected))
            for injected in ({"amount": 0.31}, {"amount": [0.3]}, {"seed": 1}, {"structured": True})
        ),
    ]
    assert len({first.id, *(run.id for run in others)}) == 6


def test_metrics_are_tidy_rows_that_survive_the_file(run):
    run.record("dense", "prompt accuracy", Estimate(0.75, 0.7, 0.8125, 32), unit="%")
    run.record("l1, per layer", "nonzero", 816_658_036, amount=0.05, scope="layer")
    run.record(
        'with "quotes"\nand lines', "clip score", Estimate(-1 / 3, float("nan"), 2e-9, 1), baseline="dense"
    )
    run.record("dense", "zeros", 0.0)
    assert run.save() == run.folder
    with open(run.folder / "metrics.csv", newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert reader.fieldnames == COLUMNS and len(rows) == 4
    assert all(r["run_id"] == run.id and r["study"] == STUDY and r["model"] == "data/tiny" for r in rows)
    assert [r["method"] for r in rows] == ["dense", "l1, per layer", 'with "quotes"\nand lines', "dense"]
    assert [json.loads(r["parameters"]) for r in rows] == [{}, {"amount": 0.05, "scope": "layer"}, {}, {}]
    # Counts are whole; other numbers have six digits.
    assert [r["value"] for r in rows] == ["0.75", "816658036", "-0.333333", "0"]
    assert [r["ci_low"] for r in rows] == ["0.7", "", "nan", ""]
    assert [r["n"] for r in rows] == ["32", "", "1", ""]
    assert (rows[0]["unit"], rows[2]["baseline"]) == ("%", "dense")

    frame = pd.read_csv(run.folder / "metrics.csv")
    assert list(frame.columns) == COLUMNS
    assert frame["value"].tolist() == pytest.approx([0.75, 816_658_036, -1 / 3, 0], rel=1e-6)
    assert frame["ci_high"].tolist() == pytest.approx([0.8125, NAN, 2e-9, NAN], nan_ok=True)


def test_results_can_be_looked_up_and_shown(run):
    run.record("l1", "psnr", Estimate(31.25, 30, 32.5, 8), unit="dB", baseline="dense", amount=0.3)
    run.record("l1", "zeros", 0.25, amount=0.3)
    (row,) = run.results("psnr")
    assert (row["value"], row["ci_low"], row["n"]) == (31.25, 30, 8) and row["parameters"] == {"amount": 0.3}
    assert run.results("nothing") == []
    table = run.table()
    assert table.columns.tolist() == ["psnr (dB)", "zeros"] and table.index.tolist() == [("l1", "amount 0.3")]
    assert table.iloc[0].tolist() == ["31.25 [30, 32.5]", "0.25"]
    assert run.table("nothing").empty and run.table(direct=True).empty
    assert run.table("zeros").columns.tolist() == ["zeros"] and run.metrics == ["psnr", "zeros"]


def test_intervals_have_the_digits_of_small_values_too(run):
    run.record("l1", "noise MSE", Estimate(0.0123456, 0.00987654, 0.0234567, 8))
    assert run.table().iloc[0].tolist() == ["0.01235 [0.009877, 0.02346]"]


def test_comparisons_between_variants_have_their_own_table(run):
    run.record("dense", "accuracy", Estimate(90, 80, 95, 8), unit="%")
    for method, value in (("max", -20), ("mse", -5)):
        change = Estimate(value, value - 1, value + 1, 8)
        run.record(method, "accuracy difference", change, unit="%", baseline="dense", bits=6)
    run.record("mse", "accuracy difference", Estimate(15, 14, 16, 8), unit="%", baseline="max", bits=6)
    column = "accuracy difference (%)"
    assert run.table("accuracy difference")[column].to_dict() == {
        ("max", "bits 6"): "-20 [-21, -19]",
        ("mse", "bits 6"): "-5 [-6, -4]",
    }
    assert run.table(direct=True)[column].to_dict() == {("mse less max", "bits 6"): "15 [14, 16]"}


def test_a_cell_that_is_run_again_does_not_double_its_results(run):
    run.record("l1", "zeros", 0.25, amount=0.3)
    run.record("l1", "zeros", 0.5, amount=0.6)
    run.record("l1", "zeros", 0.26, amount=0.3)
    assert [row["value"] for row in run.results("zeros")] == [0.26, 0.5]


def test_parameters_that_changed_after_the_start_are_not_recorded_as_if_they_had_not(tmp_path):
    namespace = notebook({"out": str(tmp_path)})
    run = Run(STUDY, namespace)
    namespace["amount"] = 0.5
    with pytest.raises(UserError, match="parameters were changed"):
        run.save()
    assert not list(tmp_path.iterdir())


def test_the_record_says_what_was_run_and_with_what(run):
    run.facts["note"] = "kept"
    run.save()
    record = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
    assert {
        "run_id", "study", "parameters", "commit", "device", "threads", "python", "packages", "seconds",
        "weights", "note",
    } <= record.keys()  # fmt: skip
    assert record["run_id"] == run.id and record["study"] == STUDY
    assert record["parameters"] == {**DEFAULTS, "out": str(run.folder)}
    assert re.fullmatch("[0-9a-f]{40}(-modified)?|unknown", record["commit"])
    assert {"torch", "transformers", "torchmetrics", "numpy", "sdcomp"} <= record["packages"].keys()
    assert re.match(r"\d+\.\d+", record["packages"]["torch"])
    assert re.search(r"\d+ cores", record["device"]) and record["seconds"] >= 0
    # Without results there is a table all the same, and the folder has these two files only.
    assert (run.folder / "metrics.csv").read_text() == ",".join(COLUMNS) + "\n"
    assert {path.name for path in run.folder.iterdir()} == {"metrics.csv", "run.json"}


def test_a_variant_that_failed_is_in_every_table_but_in_no_other_result(run):
    run.record("max", "accuracy", Estimate(90, 80, 95, 8), unit="%", bits=6)
    run.record("max", "failed", 1, unit="step 2 of 20 gives NaN", bits=4)
    table = run.table("accuracy")
    assert table.columns.tolist() == ["accuracy (%)", "failed"]
    assert table.loc[("max", "bits 4")].tolist() == ["", "step 2 of 20 gives NaN"]
    assert table.loc[("max", "bits 6")].tolist() == ["90 [80, 95]", ""]
    assert [row["parameters"] for row in run.results("accuracy")] == [{"bits": 6}]
    assert run.table(direct=True).empty


def test_generation_is_as_the_parameters_say_or_as_the_model_is(tmp_path):
    sd = SimpleNamespace(config=SimpleNamespace(guidance_scale=7.5), batch_size=3)
    run = Run(STUDY, notebook({"out": str(tmp_path)}))
    assert run.generation(sd) == {
        "seed": 0, "steps": 20, "sampler": "ddim", "guidance_scale": 7.5, "batch_size": 3
    }  # fmt: skip
    run.save()
    assert json.loads((tmp_path / "run.json").read_text())["guidance_scale"] == 7.5
    injected = {"guidance_scale": 1, "batch_size": 2, "dtype": "float16", "out": str(tmp_path)}
    run = Run(STUDY, notebook(injected))
    assert run.generation(sd)["guidance_scale"] == 1.0 and run.generation(sd)["batch_size"] == 2
    assert run.dtype is torch.float16


def model_folder(folder: Path, *names: str) -> Path:
    for i, name in enumerate(("model_index.json", *names)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes([i]))
    return folder


def test_the_weights_of_a_diffusers_folder_are_those_in_its_folders(tmp_path):
    names = ["unet/diffusion.bin", "vae/vae.safetensors", "old.ckpt", "text_encoder/a.pt"]
    model = model_folder(tmp_path / "model", *names, "unet/config.json")
    run = Run(STUDY, notebook({"out": str(tmp_path / "out"), "model": str(model)}))
    assert set(run.weights()) == set(names)
    expected = hashlib.sha256((model / names[0]).read_bytes()).hexdigest()
    assert run.weights()[names[0]] == expected
    # Another model, of files of the same names.
    before = run.weights()
    (model / names[1]).write_bytes(b"other")
    assert run.weights() != before


def test_a_model_without_weights_stops_the_run(tmp_path):
    model = model_folder(tmp_path / "model", "unet/config.json")
    with pytest.raises(UserError, match="has no weights: no file in it ends in .safetensors") as caught:
        Run(STUDY, notebook({"out": str(tmp_path / "out"), "model": str(model)}))
    assert "\n" not in str(caught.value)


def test_a_run_fixes_the_precision_and_records_it(run, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    Run(STUDY, notebook({"out": str(run.folder)})).save()
    assert torch.backends.cudnn.allow_tf32 is False
    record = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
    assert record["precision"] == precision_facts("cpu") and record["precision"]


# Figures


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


def test_a_figure_is_a_png_in_the_folder(run):
    figure = Figure(figsize=(1, 1))
    figure.add_subplot().plot([0, 1])
    path = run.figure(figure, "curve")
    assert path == run.folder / "curve.png" and path.read_bytes().startswith(b"\x89PNG\r\n")
    assert [p.name for p in run.folder.iterdir()] == ["curve.png"]


# What cannot be written


def write(path: Path, content: bytes) -> None:
    with files.replacing(path) as partial:
        partial.write_bytes(content)


def test_a_folder_that_cannot_be_used_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300), "/proc/sdcomp"):
        with pytest.raises(UserError, match="cannot be written to") as caught:
            Run(STUDY, notebook({"out": str(out)}))
        message = str(caught.value)
        assert message.startswith("out=") and str(out) in message and "\n" not in message
        assert "None" not in message
    assert (tmp_path / "file").read_text() == "x"


def test_a_place_that_cannot_be_written_is_one_sentence_and_nothing_is_left(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "folder", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot be written") as caught:
            write(path, b"new")
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file"}
    assert not list((tmp_path / "folder").iterdir())


def test_a_write_that_is_killed_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "metrics.csv"
    write(path, b"old")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write(path, b"new")
    assert path.read_bytes() == b"old"
    write(path, b"newer")
    assert path.read_bytes() == b"newer" and list(tmp_path.iterdir()) == [path]
