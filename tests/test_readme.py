"""The README's snippets run as printed, and its commands in a copy of the repository."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from checkout import ROOT, checkout
from safetensors.torch import save_file

import sdcomp

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)

LEFT_OUT = {
    "make test": "is itself a run of tests",
    "make lab": "does not end; test_browser.py opens JupyterLab",
    "make sweep": "installs Snakemake; test_interruptions.py sweeps",
    "PROFILE=full": "takes hours",
    "-f notebooks/profiles/": "takes long",
    "hf download": "needs the network",
    "data/weights/": "needs weights of Stable Diffusion",
    "conda ": "needs conda",
}
"""Lines with this text are not run, for this reason."""
PACKAGES = {
    "from diffusers": "diffusers",
    "load_diffusers": "diffusers",
    'format="openvino"': "openvino",
    "import onnxruntime": "onnxruntime",
    'format="onnx"': "onnxscript",
}
"""Blocks with this text need an optional package."""


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("copy")
    return folder, checkout(folder)


def why_not(line: str) -> str:
    return next((reason for part, reason in LEFT_OUT.items() if part in line), "")


def test_every_block_names_a_language_that_is_run():
    assert {language for language, _ in BLOCKS} == {"bash", "python"}


def python_blocks() -> list:
    """The blocks; to record a graph for ONNX takes most of a minute."""
    blocks = [block for language, block in BLOCKS if language == "python"]
    return [pytest.param(b, marks=pytest.mark.slow) if 'format="onnx"' in b else b for b in blocks]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("block", python_blocks())
def test_python_blocks_run_as_printed(block, capsys, monkeypatch):
    for text, package in PACKAGES.items():
        if text in block:
            pytest.importorskip(package)
    monkeypatch.chdir(ROOT)
    names = {}
    if "loras=" in block:
        change = write_lora(ROOT / "reports" / "runs" / "style.safetensors")
    exec(compile(block, "README.md", "exec"), names)
    if "images.shape" in block:
        assert capsys.readouterr().out == "torch.Size([1, 3, 64, 64]) 29.8% zero\n"
    if "onnxruntime" in block:
        assert capsys.readouterr().out.endswith("['latents', 'timestep', 'context']\n")
    if "loras=" in block:
        before, after = (middle_queries(sd) for sd in (sdcomp.load("data/tiny"), names["sd"]))
        torch.testing.assert_close(after, before + 0.8 * change)


def middle_queries(sd: sdcomp.StableDiffusion) -> torch.Tensor:
    """The weight that makes the queries of the UNet's middle block."""
    return sd.unet.middle_block[1].transformer_blocks[0].attn1.to_q.weight


def write_lora(path: Path) -> torch.Tensor:
    """Write a LoRA of rank 2 for that weight, in the spelling of peft; return its change at a scale of 1."""
    width = len(middle_queries(sdcomp.load("data/tiny")))
    down, up = torch.randn(2, width), 0.1 * torch.randn(width, 2)
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, path)
    return up @ down


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for language, block in BLOCKS if language == "bash"])
def test_commands_run_as_printed(block, copy, tmp_path):
    folder, environment = copy
    lines = block.replace("<this repository>", str(folder)).splitlines()
    kept = [line for line in lines if not why_not(line)]
    if not kept:
        pytest.skip("; ".join(dict.fromkeys(map(why_not, lines))))
    command = ["bash", "-eux", "-c", "\n".join(kept)]
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        status = process.wait(3600)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert status == 0, (tmp_path / "output").read_text()[-3000:]
