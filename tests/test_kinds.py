"""A UNet where the whole model belongs, or the reverse: each entry point says what it needs instead."""

import pytest

import sdcomp
from sdcomp.pruning import (
    calibrate,
    count_zeros,
    n_m_budgets,
    prune_n_m,
    prune_structured,
    prune_unstructured,
    remove_cheapest,
    sparsity_table,
)
from sdcomp.quantization import Calibrator, QuantModel, TimeStepCalibratedQuantModel, describe, quantize
from sdcomp.training import recover

PROMPTS = ["a star"]
WHOLE = {
    "save": lambda unet, path: sdcomp.save(unet, path),
    "model.save": lambda unet, path: sdcomp.model.save(unet, path),
    "export": lambda unet, path: sdcomp.export(unet, path, format="diffusers"),
    "quantize": lambda unet, path: quantize(unet, "max", PROMPTS),
    "Calibrator": lambda unet, path: Calibrator(unet, QuantModel(unet)),
    "recover": lambda unet, path: recover(unet, unet, PROMPTS, 1),
}
UNET = {
    "QuantModel": QuantModel,
    "TimeStepCalibratedQuantModel": TimeStepCalibratedQuantModel,
    "prune_unstructured": lambda sd: prune_unstructured(sd, 0.3),
    "prune_structured": lambda sd: prune_structured(sd, 0.3),
    "remove": lambda sd: prune_structured(sd, 0.3, mode="remove"),
    "prune_n_m": prune_n_m,
    "remove_cheapest": lambda sd: remove_cheapest(sd, 0.3, print),
    "calibrate": lambda sd: calibrate(sd, print),
    "count_zeros": count_zeros,
    "sparsity_table": sparsity_table,
    "as_diffusers_unet": sdcomp.as_diffusers_unet,
    "recover": lambda sd: recover(sd, sd, PROMPTS, 1),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_unet_is_no_whole_model(small, tmp_path, name):
    with pytest.raises(TypeError, match=r"^give the whole model, as sdcomp\.load returns it, not UNet$"):
        WHOLE[name](small.unet, tmp_path / "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", UNET)
def test_a_whole_model_is_no_unet(small, name):
    words = r"^give the model's UNet, sd\.unet, or another module, not StableDiffusion$"
    with pytest.raises(TypeError, match=words):
        UNET[name](small)


@pytest.fixture(scope="module")
def compressed(small):
    """The model, its UNet, and that UNet packed and in int8."""
    q = Calibrator(small, QuantModel(small.unet)).calibrate(PROMPTS, steps=1)
    unets = small.unet, sdcomp.to_packed(q), sdcomp.to_int8(q, execution="dequantized")
    return {type(given).__name__: given for given in (small, *unets)}


@pytest.mark.parametrize(
    ("call", "words", "wrong"),
    [
        (sdcomp.to_int8, "to_int8 takes a QuantModel or a PackedModel", "StableDiffusion UNet Int8Model"),
        (sdcomp.to_packed, "to_packed takes a QuantModel", "StableDiffusion UNet PackedModel Int8Model"),
        (describe, "describe takes a QuantModel", "StableDiffusion UNet PackedModel Int8Model"),
        (
            sdcomp.from_diffusers_unet,
            "from_diffusers_unet takes a UNet2DConditionModel",
            "StableDiffusion UNet Int8Model",
        ),
    ],
)
def test_another_kind_of_model_is_named(compressed, call, words, wrong):
    for kind in wrong.split():
        with pytest.raises(TypeError, match=f"^{words}, not {kind}$"):
            call(compressed[kind])


def test_calibration_data_must_be_a_calibration_or_a_callable(small):
    for data in (None, PROMPTS):
        with pytest.raises(
            ValueError, match="^removal needs data: give calibration=, a Calibration or a callab"
        ):
            remove_cheapest(small.unet, 0.3, data)
        with pytest.raises(ValueError, match="^the choice of n needs data: give calibration=, a Calibration"):
            n_m_budgets(small.unet, 0.7, calibration=data)
    with pytest.raises(ValueError, match="^importance 'wanda' needs data: give calibration=, a Calibration"):
        prune_unstructured(small.unet, 0.3, importance="wanda", calibration=PROMPTS)
    with pytest.raises(TypeError, match="^give a callable that runs the module, not list$"):
        calibrate(small.unet, PROMPTS)
