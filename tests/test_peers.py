"""UNets that other tools compressed work as `sd.replace(unet=...)`. Needs the `peers` extra."""

import copy

import pytest
import torch
from torch import nn

from sdcomp.model import StableDiffusion

PROMPTS = ["a small red star on a navy background", "a large striped blue circle above a small green square"]

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers' own


@pytest.fixture(scope="module")
def sd(tiny) -> StableDiffusion:
    """A model of the tiny model's size, which the peers' kernels take."""
    return tiny


def images(sd: StableDiffusion, unet: nn.Module) -> torch.Tensor:
    return sd.replace(unet=unet).generate(PROMPTS, steps=2, batch_size=2)


def decibels(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return -10 * (found - wanted).square().mean().log10().item()


@pytest.mark.parametrize(("weights", "least"), [("qint8", 30), ("qint4", 10), ("qint2", 3)])
def test_optimum_quanto(sd, weights, least):
    quanto = pytest.importorskip("optimum.quanto")
    unet = copy.deepcopy(sd.unet)
    quanto.quantize(unet, weights=getattr(quanto, weights))
    quanto.freeze(unet)
    assert least < decibels(images(sd, unet), images(sd, sd.unet)) < 90


def test_accelerate(sd):
    accelerate = pytest.importorskip("accelerate")
    wanted = images(sd, sd.unet)
    # Its hooks bring the weights to the device only while a layer runs.
    unet = accelerate.cpu_offload(copy.deepcopy(sd.unet), execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in unet.parameters())
    assert torch.equal(images(sd, unet), wanted)


def test_torchao(sd):
    quantization = pytest.importorskip("torchao.quantization")
    unet = copy.deepcopy(sd.unet)
    quantization.quantize_(unet, quantization.Int8DynamicActivationInt8WeightConfig())
    assert 20 < decibels(images(sd, unet), images(sd, sd.unet)) < 90


def test_torch_pruning(sd):
    pruning = pytest.importorskip("torch_pruning")
    unet = copy.deepcopy(sd.unet)
    example = (torch.randn(2, 4, 16, 16), torch.tensor(500), torch.randn(2, 24, 128))
    # Hidden channels of one residual block; 16, since its norm keeps its 16 groups.
    graph = pruning.DependencyGraph().build_dependency(unet, example)
    conv = unet.middle_block[0].in_layers[2]
    group = graph.get_pruning_group(conv, pruning.prune_conv_out_channels, list(range(16)))
    group.prune()
    assert unet.middle_block[0].out_layers[3].in_channels == conv.out_channels == 176
    assert 5 < decibels(images(sd, unet), images(sd, sd.unet)) < 90


@pytest.mark.parametrize("int8", [False, True])
def test_openvino(sd, int8):
    openvino = pytest.importorskip("openvino")
    generator = torch.Generator().manual_seed(0)
    example = (
        torch.randn(4, 4, 16, 16, generator=generator), torch.tensor(500),
        torch.randn(4, 24, 128, generator=generator),
    )  # fmt: skip
    converted = openvino.convert_model(sd.unet, example_input=example)
    if int8:
        nncf = pytest.importorskip("nncf")
        data = nncf.Dataset([tuple(part.numpy() for part in example)])
        converted = nncf.quantize(converted, data, subset_size=1)
    compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    class OpenVINO(nn.Module):
        """The compiled model, called as a UNet."""

        def forward(self, latents, timesteps, context):
            found = compiled([latents.numpy(), torch.tensor(timesteps).numpy(), context.numpy()])
            return torch.from_numpy(found[0])

    assert (15 if int8 else 50) < decibels(images(sd, OpenVINO()), images(sd, sd.unet)) < 150


def test_diffusers(diffusers, sd):
    from diffusers_keys import diffusers_unet, unet_state

    theirs = diffusers_unet(diffusers, sd.config.unet)
    theirs.load_state_dict(unet_state(sd.unet))

    class Diffusers(nn.Module):
        """diffusers' UNet, called as ours."""

        def __init__(self) -> None:
            super().__init__()
            self.unet = theirs

        def forward(self, latents, timesteps, context):
            return self.unet(latents, timesteps, context).sample

    assert decibels(images(sd, Diffusers()), images(sd, sd.unet)) > 60
