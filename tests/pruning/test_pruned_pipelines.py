"""Pruning of diffusers' UNets while its pipelines run them."""

import copy

import pytest
import torch
from pipelines import PIPELINES
from torch import nn

from sdcomp.errors import UserError
from sdcomp.model.prune_groups import prune_groups
from sdcomp.pruning import channel_map, prune_n_m, prune_structured, prune_unstructured, remove_cheapest

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")
BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")


@pytest.fixture(params=["sdxl", "controlnet"])
def made(request, diffusers, small):
    torch.manual_seed(0)
    return PIPELINES[request.param](diffusers, small)


def error(made, unet: nn.Module, expected: torch.Tensor) -> float:
    """The squared error of the latents that the pipeline makes with `unet`; the pipeline then has its own."""
    own, made.pipe.unet = made.pipe.unet, unet
    found = made.run()
    made.pipe.unet = own
    assert found.isfinite().all()
    return (found - expected).square().mean().item()


def prediction_error(made, unet: nn.Module) -> float:
    """The squared error of `unet` on the calls that the pipeline makes of its own UNet."""
    errors = []

    def compare(_: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        found, expected = unet(*args, **kwargs)[0], output[0]
        errors.append((found - expected).square().mean().item())

    handle = made.pipe.unet.register_forward_hook(compare, with_kwargs=True)
    made.run()
    handle.remove()
    return sum(errors) / len(errors)


def zeros(unet: nn.Module, kinds: tuple[type, ...] = (nn.Conv2d, nn.Linear)) -> dict[str, float]:
    """The share of zeros in each weight."""
    layers = {name: layer for name, layer in unet.named_modules() if isinstance(layer, kinds)}
    return {name: (layer.weight == 0).float().mean().item() for name, layer in layers.items()}


def test_second_order_zeros_weights_of_blocks_and_is_closer_than_magnitude(made):
    unet, expected = made.pipe.unet, made.run()
    magnitude = prune_unstructured(unet, 0.4)
    second = prune_unstructured(unet, 0.4, importance="second_order", calibration=made.run)
    for pruned in (magnitude, second):
        for name, share in zeros(pruned).items():
            assert share == pytest.approx(0.4 if name.startswith(BLOCKS) else 0, abs=0.02), name
    assert error(made, second, expected) < error(made, magnitude, expected)


def test_2_4_patterns_are_kept_and_corrected(made):
    unet = made.pipe.unet
    magnitude = prune_n_m(unet)
    second = prune_n_m(unet, importance="second_order", calibration=made.run)
    for name, layer in second.named_modules():
        # Rows of 16 inputs or more; of the kernel, each position by itself.
        if name.startswith(BLOCKS) and isinstance(layer, nn.Conv2d | nn.Linear):
            fours = layer.weight.flatten(2) if layer.weight.dim() == 4 else layer.weight[..., None]
            if fours.shape[1] % 16 == 0 and fours.shape[0] % 8 == 0:
                assert (fours.unflatten(1, (-1, 4)) != 0).sum(2).max() <= 2, name
    # Single predictions: over the steps of this random model the errors grow at random.
    assert prediction_error(made, second) < prediction_error(made, magnitude)


def test_channels_and_heads_go_where_it_costs_least(made):
    unet, expected = made.pipe.unet, made.run()
    size = sum(p.numel() for p in unet.parameters())
    chosen = remove_cheapest(unet, 0.25, made.run)
    assert sum(p.numel() for p in chosen.parameters()) < 0.76 * size
    by_norm = prune_structured(unet, 0.25, mode="remove")
    assert sum(p.numel() for p in by_norm.parameters()) > 0.76 * size
    assert channel_map(chosen)
    assert error(made, chosen, expected) < error(made, by_norm, expected)


def small_unet(diffusers) -> nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=16,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=4,
    ).eval()  # fmt: skip


def kinds_of(unet: nn.Module) -> list[str]:
    return sorted({group.kind for group in prune_groups(unet)})


def test_an_attention_whose_heads_own_more_than_its_projections_stays_whole(diffusers):
    unet = small_unet(diffusers)
    whole = ["attention", "feed-forward", "residual"]
    assert kinds_of(unet) == whole
    fused = copy.deepcopy(unet)
    fused.fuse_qkv_projections()
    assert kinds_of(fused) == whole[1:]
    fused.unfuse_qkv_projections()
    assert kinds_of(fused) == whole
    processors = {}
    for name, processor in unet.attn_processors.items():
        attention = unet.get_submodule(name.removesuffix(".processor"))
        processors[name] = (
            diffusers.models.attention_processor.IPAdapterAttnProcessor2_0(attention.inner_dim, 16)
            if attention.is_cross_attention
            else processor
        )
    unet.set_attn_processor(processors)
    crossed = [group.name for group in prune_groups(unet) if group.name.endswith("attn2")]
    assert not crossed and kinds_of(unet) == whole
    fewer_keys = diffusers.models.attention_processor.Attention(16, heads=4, kv_heads=2, dim_head=4)
    assert not fewer_keys.fused_projections
    with pytest.raises(ValueError, match="nothing can be removed"):
        prune_groups(nn.Sequential(fewer_keys))


@pytest.mark.parametrize(
    "prune",
    [
        lambda unet: prune_unstructured(unet, 0.5),
        lambda unet: prune_structured(unet, 0.5, mode="remove"),
        lambda unet: remove_cheapest(unet, 0.5, lambda: None),
    ],
)
def test_lora_layers_must_be_fused_first(diffusers, prune):
    unet = small_unet(diffusers)
    unet.add_adapter(pytest.importorskip("peft").LoraConfig(r=2, target_modules=["to_q", "to_out.0"]))
    with pytest.raises(UserError, match="has LoRA layers beside its own: fuse and unload them first"):
        prune(unet)


def test_gradients_cannot_be_had_in_inference_mode(diffusers):
    unet = small_unet(diffusers)
    call = torch.zeros(1, 4, 8, 8), 5, torch.zeros(1, 3, 16)

    def run() -> None:
        with torch.inference_mode():
            unet(*call)

    with pytest.raises(UserError, match="needs gradients: run the module under"):
        remove_cheapest(unet, 0.3, run)
