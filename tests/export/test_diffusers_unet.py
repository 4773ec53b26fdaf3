"""Our UNets in diffusers' pipelines, with a ControlNet and as exports, beside diffusers' own UNet."""

import pytest
import torch
from pipelines import controlnet, sd1
from quantized_models import calibrate, random

import sdcomp
from sdcomp.export import as_diffusers_unet, from_diffusers_unet
from sdcomp.quantization import QuantModel, TimeStepCalibratedQuantModel

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).square().mean() / expected.square().mean()).item()


@pytest.fixture
def controlled(diffusers, small):
    """diffusers' UNet, ours with its weights, and a call with a ControlNet's residuals."""
    torch.manual_seed(0)
    made = controlnet(diffusers, small).pipe
    call = {"sample": random(2, 4, 8, 8), "timestep": 700, "encoder_hidden_states": random(2, 24, 32)}
    with torch.no_grad():
        down, mid = made.controlnet(**call, controlnet_cond=torch.rand(2, 3, 32, 32), return_dict=False)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    return made.unet, from_diffusers_unet(made.unet), call, residuals


@torch.no_grad()
@pytest.mark.parametrize("kind", [QuantModel, TimeStepCalibratedQuantModel])
def test_residuals_of_a_controlnet_are_added_where_diffusers_adds_them(kind, controlled, small):
    theirs, ours, call, residuals = controlled
    down, mid = residuals.values()
    plain, expected = theirs(**call).sample, theirs(**call, **residuals).sample
    assert relative(plain, expected) > 0.1
    found = as_diffusers_unet(ours, small.config)(**call, **residuals).sample
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    q = calibrate(kind(ours), (*call.values(), down, mid))
    for unet in (q, sdcomp.to_int8(q), sdcomp.to_packed(q)):
        found = as_diffusers_unet(unet, small.config)(**call, **residuals).sample
        assert 0 < relative(found, expected) < 0.02


def test_residuals_that_do_not_fit_are_refused(controlled):
    _, ours, call, residuals = controlled
    down = residuals["down_block_additional_residuals"]
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        ours(*call.values(), down[:-1])
    with pytest.raises(ValueError, match="give both"):
        as_diffusers_unet(ours)(**call, down_block_additional_residuals=down)


@torch.no_grad()
def test_nan_in_a_residual_is_not_hidden_by_integers(controlled):
    _, ours, call, residuals = controlled
    down, mid = residuals.values()
    int8 = sdcomp.to_int8(calibrate(QuantModel(ours), (*call.values(), down, mid)))
    mid[1, 0, 0, 0] = float("nan")
    found = int8(*call.values(), down, mid)
    assert found[0].isfinite().all() and found[1].isnan().all()


def test_a_controlnet_pipeline_runs_our_unet(diffusers, small):
    torch.manual_seed(0)
    made = controlnet(diffusers, small)
    expected = made.run()
    made.pipe.unet = as_diffusers_unet(from_diffusers_unet(made.pipe.unet), small.config)
    torch.testing.assert_close(made.run(), expected, atol=1e-4, rtol=1e-4)


def test_an_export_runs_in_a_pipeline_and_refuses_residuals(diffusers, small, tmp_path):
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    made = sd1(diffusers, small)
    expected = made.run()
    unet = from_diffusers_unet(made.pipe.unet)
    file = sdcomp.export(small.replace(unet=unet), tmp_path / "unet.xml", format="openvino")
    made.pipe.unet = exported = as_diffusers_unet(sdcomp.export.load_openvino(file), small.config)
    assert exported.dtype == torch.float32 and exported.device.type == "cpu"
    torch.testing.assert_close(made.run(), expected, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="takes no residuals of a ControlNet"):
        exported.unet(random(1, 4, 8, 8), 5, random(1, 24, 32), (), torch.zeros(1))
