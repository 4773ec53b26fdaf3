"""The record that a run leaves."""

import csv
import hashlib
import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from made_up import DEFAULTS, STUDY, notebook
from made_up import made_up_study as made_up_study
from matplotlib.figure import Figure

from sdcomp import files
from sdcomp.errors import UserError
from sdcomp.evaluation import Estimate
from sdcomp.evaluation.float_precision import precision_facts
from sdcomp.study import FP32, Run, pruned, quantized
from sdcomp.study import run as run_module

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
    model = str(Path(__file__).resolve().parents[2] / "data" / "tiny")
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


DENSE, L1 = FP32, pruned("unstructured", 0.3)


def test_metrics_are_tidy_rows_that_survive_the_file(run):
    run.record(DENSE, "prompt accuracy", Estimate(0.75, 0.7, 0.8125, 32), unit="%")
    run.record(pruned("unstructured", 0.05, scope="global"), "nonzero", 816_658_036, timestep=999)
    quoted = 'with "quotes"\nand lines'
    run.record(quoted, "clip score", Estimate(-1 / 3, float("nan"), 2e-9, 1), baseline=DENSE)
    run.record("machine", "zeros", 0.0, of="memory")
    assert run.save() == run.folder
    with open(run.folder / "metrics.csv", newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert reader.fieldnames == COLUMNS and len(rows) == 4
    assert all(r["run_id"] == run.id and r["study"] == STUDY and r["model"] == "data/tiny" for r in rows)
    assert [r["method"] for r in rows] == ["fp32", "unstructured", quoted, "machine"]
    assert [json.loads(r["parameters"]) for r in rows] == [
        {},
        {"pruning": "unstructured", "amount": 0.05, "scope": "global", "timestep": 999},
        {},
        {"of": "memory"},
    ]
    # Counts are whole; other numbers have six digits.
    assert [r["value"] for r in rows] == ["0.75", "816658036", "-0.333333", "0"]
    assert [r["ci_low"] for r in rows] == ["0.7", "", "nan", ""]
    assert [r["n"] for r in rows] == ["32", "", "1", ""]
    assert (rows[0]["unit"], rows[2]["baseline"]) == ("%", "fp32")

    frame = pd.read_csv(run.folder / "metrics.csv")
    assert list(frame.columns) == COLUMNS
    assert frame["value"].tolist() == pytest.approx([0.75, 816_658_036, -1 / 3, 0], rel=1e-6)
    assert frame["ci_high"].tolist() == pytest.approx([0.8125, float("nan"), 2e-9, float("nan")], nan_ok=True)


def test_results_can_be_looked_up_and_shown(run):
    run.record(L1, "psnr", Estimate(31.25, 30, 32.5, 8), unit="dB", baseline=DENSE)
    run.record(L1, "zeros", 0.25)
    (row,) = run.results("psnr")
    assert (row["value"], row["ci_low"], row["n"]) == (31.25, 30, 8)
    assert (row["variant"], row["about"], row["label"]) == (L1, {}, "unstructured 30 %")
    assert run.results("nothing") == []
    assert [row["metric"] for row in run.results()] == ["psnr", "zeros"] == run.metrics
    table = run.table()
    assert table.columns.tolist() == ["psnr (dB)", "zeros"] and table.index.tolist() == ["unstructured 30 %"]
    assert table.iloc[0].tolist() == ["31.25 [30, 32.5]", "0.25"]
    assert run.table("nothing").empty and run.table(direct=True).empty
    assert run.table("zeros").columns.tolist() == ["zeros"]
    run.record(L1, "zeros", 0.5, layer="out")
    assert run.table("zeros").index.tolist() == [
        ("unstructured 30 %", ""),
        ("unstructured 30 %", "layer out"),
    ]


def test_intervals_have_the_digits_of_small_values_too(run):
    run.record(L1, "noise MSE", Estimate(0.0123456, 0.00987654, 0.0234567, 8))
    assert run.table().iloc[0].tolist() == ["0.01235 [0.009877, 0.02346]"]


def test_comparisons_between_variants_have_their_own_table(run):
    run.record(DENSE, "accuracy", Estimate(90, 80, 95, 8), unit="%")
    for recipe, value in (("max", -20), ("mse", -5)):
        change = Estimate(value, value - 1, value + 1, 8)
        run.record(quantized(recipe, 6, 6), "accuracy difference", change, unit="%", baseline=DENSE)
    change = Estimate(15, 14, 16, 8)
    mse, largest = quantized("mse", 6, 6), quantized("max", 6, 6)
    run.record(mse, "accuracy difference", change, unit="%", baseline=largest)
    column = "accuracy difference (%)"
    assert run.table("accuracy difference")[column].to_dict() == {
        "max W6A6": "-20 [-21, -19]",
        "mse W6A6": "-5 [-6, -4]",
    }
    assert run.table(direct=True)[column].to_dict() == {"mse W6A6 less max W6A6": "15 [14, 16]"}


def test_a_cell_that_is_run_again_does_not_double_its_results(run):
    run.record(L1, "zeros", 0.25)
    run.record(pruned("unstructured", 0.6), "zeros", 0.5)
    run.record(L1, "zeros", 0.26)
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


def test_the_commit_is_marked_where_anything_but_the_reports_differs_from_it(tmp_path, monkeypatch):
    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True)

    def recorded():
        run = Run(STUDY, notebook({"out": str(tmp_path / "results")}))
        run.save()
        return json.loads((run.folder / "run.json").read_text(encoding="utf-8"))["commit"]

    monkeypatch.setattr(run_module, "ROOT", tmp_path)
    assert recorded() == "unknown"
    (tmp_path / "reports").mkdir()
    for name in ("code.py", "reports/metrics.csv"):
        (tmp_path / name).write_text("1")
    git("init")
    git("add", "code.py", "reports/metrics.csv")
    git("commit", "-m", "all")
    (tmp_path / ".git" / "info" / "exclude").write_text("results\n")
    commit = git("rev-parse", "HEAD").stdout.strip()
    for name in ("metrics.csv", "new.png"):
        (tmp_path / "reports" / name).write_text("2")
    assert recorded() == commit
    (tmp_path / "code.py").write_text("2")
    assert recorded() == f"{commit}-modified"


def test_a_variant_that_failed_is_in_every_table_but_has_no_other_result(run):
    works, fails = quantized("max", 6, 6), quantized("max", 4, 4)
    run.record(works, "accuracy", Estimate(90, 80, 95, 8), unit="%")
    run.record(fails, "failed", 1, unit="step 2 of 20 gives NaN")
    table = run.table("accuracy")
    assert table.columns.tolist() == ["accuracy (%)", "failed"]
    assert table.loc[fails.label].tolist() == ["", "step 2 of 20 gives NaN"]
    assert table.loc[works.label].tolist() == ["90 [80, 95]", ""]
    assert [row["variant"] for row in run.results("accuracy")] == [works]
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


def test_a_model_with_a_hub_name_is_fetched_before_anything_runs(tmp_path, monkeypatch):
    fetched = []
    model = model_folder(tmp_path / "cache", "unet/unet.safetensors")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: fetched.append(name) or model)
    run = Run(STUDY, notebook({"out": str(tmp_path / "out"), "model": "owner/model"}))
    assert fetched == ["owner/model"]
    assert set(run.weights()) == {"unet/unet.safetensors"}


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
    assert record.items() >= precision_facts("cpu").items()


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


def test_a_folder_that_is_used_again_keeps_no_images_of_the_earlier_run(tmp_path):
    for kept in (True, False):
        run = Run(STUDY, notebook({"out": str(tmp_path / "results")}))
        if kept:
            run.images.keep(FP32, "prompt accuracy", torch.tensor([True]), ["a"])
        figure = Figure()
        run.figure(figure, "with" if kept else "without")
        run.save()
        assert (run.folder / "images.csv").exists() == kept
    record = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
    assert record["figures"] == ["without.png"]
