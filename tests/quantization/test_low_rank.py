"""Low-rank branches beside quantized layers, against numpy's singular value decomposition."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import sdcomp
from sdcomp.errors import UserError
from sdcomp.export.checkpoint import rounded_unet
from sdcomp.integer import load_packed, save_packed, to_packed
from sdcomp.quantization import (
    Calibrator,
    QuantModel,
    apply_recipe,
    build,
    load_quant_model,
    save_quant_model,
)
from sdcomp.quantization.methods import LowRankBranch
from sdcomp.quantization.rounding_gradients import trainable

PROMPTS = ["a red star on a navy background", "a blue circle"]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_branch(module: nn.Module, x: torch.Tensor, rank: int, bits: int = 4) -> QuantModel:
    q = QuantModel(module, weight_quant_params={"n_bits": bits}, act_quant_params={"n_bits": bits})
    Calibrator(None, q).observe(lambda: q(x))
    (layer,) = q.quantized_layers()
    columns = layer.weight[0].numel()
    LowRankBranch(rank)(layer, torch.eye(columns))  # white inputs: every weight goes to the nearest
    return q


@pytest.fixture(scope="module")
def model(small):
    """A small UNet at W4A4 with branches of rank 2, and the ends at 8 bits."""
    recipe = sdcomp.quantization.PRESETS["low_rank"]
    recipe = sdcomp.quantization.Recipe(
        "",
        inputs=recipe.inputs,
        model=recipe.model,
        calibrator=recipe.calibrator,
        methods=(LowRankBranch(2),),
    )
    q = build(recipe, small.unet, 4, 4)
    sd = small.replace(unet=q)
    return apply_recipe(q, recipe, lambda: sd.generate(PROMPTS, steps=2, seed=0, progress=False))


def call(small):
    return random(2, 4, 4, 4), 500, random(2, 3, small.config.unet.context_dim, seed=1)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_the_branch_sees_the_input_and_the_rest_sees_the_rounded_one(kind):
    torch.manual_seed(0)
    if kind == "linear":
        module, x, product = nn.Linear(24, 10), random(7, 24), F.linear
    else:
        module, x = nn.Conv2d(3, 10, 3, stride=2, padding=1), random(2, 3, 8, 8)
        product = lambda x, w, b=None: F.conv2d(x, w, b, 2, 1)  # noqa: E731
    q = with_branch(module, x, rank=3)
    weight = module.weight.detach()
    u, s, v = np.linalg.svd(weight.flatten(1).double().numpy(), full_matrices=False)
    branch = torch.from_numpy(u[:, :3] * s[:3] @ v[:3]).view_as(weight)
    rest = weight.double() - branch
    scale = rest.flatten(1).abs().amax(1).view(-1, *[1] * (weight.dim() - 1)) / 7
    low = (x.abs().max() / 7).item()
    rounded = (rest / scale).round().clamp(-7, 7) * scale
    inputs = (x / low).round().clamp(-7, 7) * low
    expected = product(inputs.double(), rounded, module.bias.detach().double()) + product(x.double(), branch)
    # Factors are kept in 16 bits, so a few weights beside a border go the other way.
    error = (q(x) - expected).square().mean() / expected.square().mean()
    assert error < 1e-3
    assert torch.equal(q.set_use_quant(weights=False, activations=False)(x), module(x))


def test_a_branch_takes_up_the_large_singular_values():
    torch.manual_seed(0)
    module, x = nn.Linear(64, 32), random(500, 64)
    with torch.no_grad():
        module.weight.add_(random(32, 2) @ random(2, 64, seed=3))
    wanted = module(x)
    errors = [(with_branch(module, x, rank)(x) - wanted).square().mean().item() for rank in (1, 2, 8)]
    assert errors[1] < errors[0] / 10 and errors[2] < errors[1]


def test_layers_of_8_bits_have_no_branch(model):
    with_one = {
        layer.weight_quantizer.n_bits for layer in model.quantized_layers() if layer.branch_up is not None
    }
    without = {layer.weight_quantizer.n_bits for layer in model.quantized_layers() if layer.branch_up is None}
    assert (with_one, without) == ({4}, {8})


def test_files_keep_branches_bit_for_bit(small, model, tmp_path):
    args = call(small)
    expected = model(*args)
    loaded = load_quant_model(save_quant_model(model, tmp_path / "simulated"), small.unet)
    assert torch.equal(loaded(*args), expected)
    packed = to_packed(model)
    assert torch.equal(packed(*args), expected)
    assert torch.equal(load_packed(save_packed(packed, tmp_path / "packed"))(*args), expected)
    stored = load_file(tmp_path / "packed" / "packed.safetensors")
    types = {tensor.dtype for name, tensor in stored.items() if "branch" in name}
    assert types == {torch.float16}


@pytest.mark.parametrize("folder", ["simulated", "packed"])
def test_branches_of_another_shape_are_named(small, model, tmp_path, folder):
    simulated = folder == "simulated"
    (save_quant_model if simulated else save_packed)(model if simulated else to_packed(model), tmp_path)
    file = tmp_path / ("quantization.safetensors" if simulated else "packed.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("branch_up"))
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    save_file(tensors | {name: tensors[name][:-1].contiguous()}, file, about)
    with pytest.raises(UserError, match=name.removesuffix(".branch_up").replace(".", r"\.")):
        load_quant_model(tmp_path, small.unet) if simulated else load_packed(tmp_path)


def test_a_plain_checkpoint_has_branch_and_rest_in_one_weight(small, model, tmp_path):
    args = call(small)
    model = load_quant_model(save_quant_model(model, tmp_path), small.unet)
    expected = model.set_use_quant(activations=False)(*args)
    for made in (model, to_packed(model)):
        torch.testing.assert_close(rounded_unet(made)(*args), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rank", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError)])
def test_ranks_that_cannot_be_are_refused(rank, error):
    with pytest.raises(error, match="rank must be"):
        LowRankBranch(rank)


def test_what_takes_no_branches_says_so(model):
    with pytest.raises(UserError, match="low-rank branch"):
        sdcomp.to_int8(model)
    with pytest.raises(UserError, match="training takes no low-rank branches"):
        trainable(model)
