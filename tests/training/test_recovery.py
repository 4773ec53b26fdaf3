"""Recovery, the sparsity table, and sizes on disk."""

import copy
import json
import os

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from sdcomp.errors import UserError
from sdcomp.integer import to_packed
from sdcomp.model.channel_map import keep_units
from sdcomp.model.prune_groups import prune_groups
from sdcomp.pruning import (
    channel_map,
    count_zeros,
    disk_sizes,
    prune_n_m,
    prune_structured,
    prune_unstructured,
    sparsity_table,
)
from sdcomp.pruning.disk_sizes import sparse_state
from sdcomp.quantization import QuantModel
from sdcomp.training import recover
from sdcomp.training.recorded_calls import recorded_calls

PROMPTS = ["a small red star on gray", "a large blue ring on white"]
SETTINGS = {"sampling_steps": 3, "batch_size": 8, "lr": 1e-3, "progress": False}


def distance(sd, unet) -> float:
    """Between the noise predictions of `unet` and of the model's own, on its sampling path."""
    _, trace = sd.generate(PROMPTS, steps=3, guidance_scale=1, trace=True, batch_size=2)
    context = torch.randn(2, 24, sd.config.unet.context_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        errors = [
            (unet(x, t, context) - sd.unet(x, t, context)).square().mean()
            for x, t in zip(trace.latents, trace.timesteps, strict=True)
        ]
    return float(torch.stack(errors).mean())


@pytest.mark.parametrize("kind", ["unstructured", "pattern", "mask", "remove", "blocks"])
def test_recovery_brings_predictions_closer_and_keeps_what_was_pruned(small, kind):
    if kind == "unstructured":
        pruned = prune_unstructured(small.unet, 0.5)
    elif kind == "pattern":
        pruned = prune_n_m(small.unet, 2, 4)
    elif kind == "blocks":
        pruned = copy.deepcopy(small.unet)
        for group in prune_groups(pruned):
            if group.name in ("middle_block.0", "middle_block.1"):
                keep_units(pruned, group, [])
    else:
        pruned = prune_structured(small.unet, 0.5, mode=kind)
    before, dense = copy.deepcopy(pruned.state_dict()), copy.deepcopy(small.unet.state_dict())
    recovered = recover(pruned, small, PROMPTS, 24, **SETTINGS)
    assert len(recovered.losses) == 24
    assert np.mean(recovered.losses[-6:]) < 0.8 * np.mean(recovered.losses[:6])
    assert distance(small, recovered.module) < distance(small, pruned)
    state = recovered.module.state_dict()
    assert channel_map(recovered.module) == channel_map(pruned)
    for name, tensor in before.items():
        assert torch.equal(state[name] == 0, tensor == 0), name
        assert torch.equal(pruned.state_dict()[name], tensor)
    assert all(torch.equal(dense[name], tensor) for name, tensor in small.unet.state_dict().items())
    assert not recovered.module.training


def test_recovery_learns_conditional_and_unconditional_predictions_at_every_step(small):
    seen = []

    class Student(nn.Module):
        """Notes its inputs and predicts a constant."""

        def __init__(self):
            super().__init__()
            self.constant = nn.Parameter(torch.zeros(()))

        def forward(self, latents, timesteps, context):
            seen.append((latents, timesteps, context))
            return self.constant.expand(latents.shape)

    recovered = recover(Student(), small, PROMPTS, 30, **SETTINGS)
    _, trace = small.generate(PROMPTS, steps=3, trace=True, batch_size=2)
    latents, timesteps, context = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert set(timesteps.tolist()) == set(trace.timesteps.tolist())
    # Two prompts and the negative one; each with the latents of its own path only.
    assert len(torch.unique(context.flatten(1), dim=0)) == 3
    path = trace.latents.flatten(0, 1).flatten(1)
    nearest = torch.cdist(latents.flatten(1), path, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
    assert nearest.values.max() < 1e-4
    # The targets of the first step: what the model predicts for these very rows, before guidance.
    with torch.no_grad():
        target = small.unet(*(parts[0] for parts in zip(*seen, strict=True)))
    assert recovered.losses[0] == pytest.approx(float(target.square().mean()), rel=1e-4)


def test_each_prompt_is_recorded_as_often_as_the_others(small):
    prompts = [*PROMPTS, "a small gray star on navy"]
    calls = recorded_calls(small, prompts, batch_size=2, steps=2, guidance_scale=1, progress=False)
    contexts = torch.cat([context for _, _, context, _ in calls])
    assert len(contexts) == 2 * len(prompts)
    wanted = small.encode_prompts(prompts)
    assert [int((contexts == one).flatten(1).all(1).sum()) for one in wanted] == [2, 2, 2]


def test_recovery_decodes_no_images(small, monkeypatch):
    def fail(*_):
        raise AssertionError("images were decoded")

    monkeypatch.setattr(type(small.decoder), "forward", fail)
    assert len(recover(prune_unstructured(small.unet, 0.5), small, PROMPTS, 1, **SETTINGS).losses) == 1


def test_a_killed_recovery_goes_on_as_if_it_had_not_been(small, tmp_path, monkeypatch):
    pruned = prune_structured(small.unet, 0.5, mode="remove")
    expected = recover(pruned, small, PROMPTS, 12, **SETTINGS)

    saved = torch.save

    def save_and_die(state, file):
        if state["step"] == 5:
            raise KeyboardInterrupt
        saved(state, file)

    monkeypatch.setattr(torch, "save", save_and_die)
    again = {"checkpoint": tmp_path / "recover.pt", "checkpoint_seconds": 0.0, **SETTINGS}
    with pytest.raises(KeyboardInterrupt):
        recover(pruned, small, PROMPTS, 12, **again)
    monkeypatch.setattr(torch, "save", saved)
    assert torch.load(tmp_path / "recover.pt")["step"] == 4
    resumed = recover(pruned, small, PROMPTS, 12, **again)
    assert resumed.losses == expected.losses
    state = resumed.module.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in expected.module.state_dict().items())

    # It belongs to these prompts and to this UNet.
    with pytest.raises(UserError, match="another training"):
        recover(pruned, small, PROMPTS[:1], 12, **again)
    other = prune_structured(small.unet, 0.5, mode="remove", criterion="l1")
    with torch.no_grad():
        other.out[2].bias += 1
    with pytest.raises(UserError, match="another training"):
        recover(other, small, PROMPTS, 12, **again)
    # Other code may train differently.
    monkeypatch.setattr("sdcomp.training.recovery.source_digest", lambda: "changed")
    with pytest.raises(UserError, match="another training .source code is .* there and changed here"):
        recover(pruned, small, PROMPTS, 12, **again)


def test_recovery_refuses_what_it_cannot_use(small):
    for changes, message in (
        ({"prompts": []}, "at least one calibration prompt"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"sampler": "euler"}, "sampler must be one of"),
        ({"unet": copy.deepcopy(small.unet).half()}, "trains in float32"),
        ({"unet": to_packed(QuantModel(small.unet, act_quant_params=None))}, "quantized already"),
        ({"micro_batch": 3}, "micro_batch must divide batch_size"),
    ):
        arguments = {"unet": small.unet, "sd": small, "prompts": PROMPTS, "steps": 1, **SETTINGS}
        with pytest.raises(ValueError, match=message):
            recover(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"seed": 2**34}, ValueError, r"^the seed of a training must be at least 0 and below 2\*\*34"),
        ({"seed": -1}, ValueError, "^the seed of a training must be at least 0"),
        ({"seed": [1, 2]}, TypeError, "^seed must be a whole number"),
        ({"image": torch.zeros(3, 16, 16)}, TypeError, "^recovery does not take image; its generation takes"),
        ({"trace": True}, TypeError, "^recovery does not take trace; its generation takes negative_prompt, "),
    ],
)
def test_recovery_refuses_arguments_before_it_generates(small, monkeypatch, changes, error, message):
    monkeypatch.setattr(type(small), "generate", None)
    with pytest.raises(error, match=message):
        recover(small.unet, small, PROMPTS, 1, **SETTINGS, **changes)


def test_numbers_of_numpy_are_numbers_of_python_in_recovery_and_its_checkpoint(small, tmp_path):
    pruned = prune_unstructured(small.unet, 0.5)
    changes = {"seed": 2**34 - 1, "guidance_scale": 4.0, "lr": float(np.float32(1e-3)), "size": (16, 16)}
    expected = recover(pruned, small, PROMPTS, 2, **SETTINGS | changes)
    numbers = {
        "steps": np.int64(2), "batch_size": np.int64(8), "sampling_steps": np.int64(3),
        "seed": np.int64(2**34 - 1), "guidance_scale": np.float32(4), "lr": np.float32(1e-3),
        "size": (np.int64(16), np.int64(16)),
    }  # fmt: skip
    again = {"unet": pruned, "sd": small, "prompts": PROMPTS, **SETTINGS, "checkpoint": tmp_path / "r.pt"}
    assert recover(**again | numbers).losses == expected.losses
    # Done already: the checkpoint is read, and belongs to the same training.
    assert recover(**again | changes | {"steps": 2}).losses == expected.losses


def test_the_sparsity_table_adds_up(small):
    unet = prune_unstructured(small.unet, 0.4)
    table = sparsity_table(unet)
    counted = count_zeros(unet)
    assert (table["parameters"].sum(), table["nonzero"].sum()) == (counted.total, counted.nonzero)
    assert list(table.columns) == ["block", "kind", "parameters", "nonzero", "zero_fraction"]
    assert not table.duplicated(["block", "kind"]).any()
    assert table["block"].unique().tolist() == [
        "time_embed", *(f"input_blocks.{i}" for i in range(4)), "middle_block",
        *(f"output_blocks.{i}" for i in range(4)), "out",
    ]  # fmt: skip
    cells = table.set_index(["block", "kind"])
    stage = unet.input_blocks[3]
    convolutions = [m for m in stage.modules() if isinstance(m, nn.Conv2d)]
    weights = [p for m in convolutions for p in m.parameters()]
    cell = cells.loc[("input_blocks.3", "Conv2d")]
    assert cell["parameters"] == sum(p.numel() for p in weights)
    assert cell["zero_fraction"] == pytest.approx(
        sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights)
    )
    assert (cells.xs("out")["zero_fraction"] == 0).all()


def test_the_sparsity_table_of_any_module():
    shared = nn.Linear(2, 2, bias=False)
    module = nn.Sequential(shared, nn.ModuleList([nn.Linear(3, 1), nn.LayerNorm(3)]), shared)
    rows = sparsity_table(module)[["block", "kind", "parameters", "nonzero"]].values.tolist()
    assert rows == [["0", "Linear", 4, 4], ["1.0", "Linear", 4, 4], ["1.1", "LayerNorm", 6, 3]]
    assert sparsity_table(shared)[["block", "kind"]].values.tolist() == [["", "Linear"]]
    assert sparsity_table(nn.ReLU()).empty


def unpack(stored, shapes):
    """The tensors again, written from the description of the format."""
    whole = {}
    for name, tensor in stored.items():
        base, _, kind = name.rpartition(".")
        if base in shapes and kind == "values":
            bits = "".join(f"{byte:08b}" for byte in stored[f"{base}.mask"].tolist())
            flat = torch.zeros(int(np.prod(shapes[base])), dtype=tensor.dtype)
            flat[[i for i, bit in enumerate(bits) if bit == "1"]] = tensor
            whole[base] = flat.view(shapes[base])
        elif not (base in shapes and kind == "mask"):
            whole[name] = tensor
    return whole


@pytest.mark.parametrize("amount", [0, 0.3, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sparse_storage_holds_the_same_weights(amount, dtype):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(7, 9, 3), nn.LayerNorm(9), nn.Linear(5, 3)).to(dtype)
    state = prune_unstructured(module, amount).state_dict()
    stored, shapes = sparse_state(state)
    whole = unpack(stored, shapes)
    assert whole.keys() == state.keys()
    assert all(torch.equal(whole[name], tensor) for name, tensor in state.items())
    assert sum(t.nbytes for t in stored.values()) <= sum(t.nbytes for t in state.values())
    assert ("0.weight" in shapes) == (amount > 0) and shapes.get("1.bias") == [9]


def test_tied_weights_are_stored_once():
    first, second = nn.Linear(16, 16), nn.Linear(16, 16)
    alone = disk_sizes(nn.Sequential(first))
    second.weight, second.bias = first.weight, first.bias
    tied = disk_sizes(nn.Sequential(first, second))
    assert {kind: abs(size - alone[kind]) < 9 for kind, size in tied.items()} == dict.fromkeys(alone, True)


def test_sizes_are_those_of_real_files(small, tmp_path):
    unet = prune_unstructured(small.unet.to(memory_format=torch.contiguous_format), 0.7)
    sizes = disk_sizes(unet)
    state = unet.state_dict()
    save_file(state, tmp_path / "dense.safetensors")
    assert sizes["dense"] == (tmp_path / "dense.safetensors").stat().st_size
    stored, shapes = sparse_state(state)
    save_file(stored, tmp_path / "sparse.safetensors", {"shapes": json.dumps(shapes)})
    assert sizes["sparse"] == (tmp_path / "sparse.safetensors").stat().st_size
    with safe_open(tmp_path / "sparse.safetensors", "pt") as file:
        assert json.loads(file.metadata()["shapes"]) == shapes
    assert 0.3 < sizes["sparse"] / sizes["dense"] < 0.5
    assert 0.3 < sizes["dense_zstd"] / sizes["dense"] < 0.4

    half = disk_sizes(state, torch.float16)
    assert 0.5 < half["dense"] / sizes["dense"] < 0.6
    assert all(t.dtype == torch.float32 for t in state.values())
    # Nothing zero, nothing gained.
    dense = disk_sizes(small.unet)
    assert dense["dense"] == sizes["dense"] and dense["dense_zstd"] > 0.85 * dense["dense"]
    assert dense["dense"] <= dense["sparse"] < dense["dense"] + 100


def test_micro_batches_add_up_to_the_batch(small):
    pruned = prune_structured(small.unet, 0.5, mode="remove")
    settings = SETTINGS | {"batch_size": 8}
    whole, parts = (recover(pruned, small, PROMPTS, 1, micro_batch=rows, **settings) for rows in (8, 2))
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    again = recover(pruned, small, PROMPTS, 1, micro_batch=2, recompute=True, **settings)
    assert again.losses == parts.losses and not again.module.recompute
    for name, tensor in whole.module.state_dict().items():
        # One step of Adam is the gradient's sign; what is near zero may have either.
        close = torch.isclose(parts.module.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
        assert close.float().mean() > 0.99, name


def test_recovery_asks_for_no_more_rows_than_generation(small):
    rows = []
    unet = prune_structured(small.unet, 0.5, mode="remove")
    handle = small.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    student = unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    large = {"size": (384, 384), "sampling_steps": 1}
    try:
        recover(unet, small, PROMPTS * 3, 1, **SETTINGS | large | {"batch_size": 64})
    finally:
        handle.remove()
        student.remove()
    assert max(rows) == 2  # one image with guidance, as in `generate` at this size


def test_half_precision_products_keep_float32_weights(small):
    pruned = prune_structured(small.unet, 0.5, mode="remove")
    exact, half = (recover(pruned, small, PROMPTS, 2, autocast=on, **SETTINGS) for on in (False, True))
    assert all(p.dtype == torch.float32 for p in half.module.parameters())
    assert half.losses != exact.losses and half.losses == pytest.approx(exact.losses, rel=0.05)


@pytest.mark.cuda
def test_recovery_on_a_gpu_trains_in_bfloat16_and_keeps_little(small):
    on_device = copy.deepcopy(small).to("cuda")
    pruned = prune_unstructured(on_device.unet, 0.5)
    torch.cuda.reset_peak_memory_stats()
    trained = recover(pruned, on_device, PROMPTS, 3, **SETTINGS)
    assert next(trained.module.parameters()).is_cuda and trained.losses[-1] < 2 * trained.losses[0]
    assert count_zeros(trained.module) == count_zeros(pruned)


@pytest.mark.parametrize("content", [torch.zeros(2), [1], {"recipe": 3}, {"weight": torch.zeros(2)}])
def test_a_file_of_something_else_is_no_checkpoint(small, tmp_path, content):
    file = tmp_path / "other.pt"
    torch.save(content, file)
    before = file.read_bytes()
    with pytest.raises(UserError, match=r"other\.pt is no checkpoint of a training; give another name"):
        recover(prune_unstructured(small.unet, 0.5), small, PROMPTS, 1, checkpoint=file, **SETTINGS)
    assert file.read_bytes() == before


def test_a_checkpoint_that_is_no_file_is_refused(small, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(UserError, match="is no file: a checkpoint cannot be read from it"):
            recover(prune_unstructured(small.unet, 0.5), small, PROMPTS, 1, checkpoint=path, **SETTINGS)
