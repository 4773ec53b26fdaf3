"""Pipelines of diffusers on small configurations with random weights, each as a callable that runs it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from diffusers_keys import BETAS, diffusers_unet, diffusers_vae
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdcomp.model import StableDiffusion
from sdcomp.scenes import VOCABULARY
from sdcomp.training.caption_tokenizer import word_tokenizer

PROMPT = "a small red star on a navy background"
_WIDTH = 32


def _text(kind: type[nn.Module], width: int = _WIDTH) -> nn.Module:
    vocab = word_tokenizer(VOCABULARY)[0]
    return kind(
        CLIPTextConfig(
            vocab_size=len(vocab), hidden_size=width, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=24, projection_dim=width,
            bos_token_id=len(vocab) - 2, eos_token_id=len(vocab) - 1, pad_token_id=len(vocab) - 1,
        )
    ).eval()  # fmt: skip


def _tokenizer() -> CLIPTokenizer:
    vocab, merges = word_tokenizer(VOCABULARY)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=24)


def _running(pipe, name: str = "unet", **arguments: object) -> SimpleNamespace:
    """A pipeline, the name of its denoiser, and `run()`, which gives the latents of one image."""

    def run(steps: int = 4, **more: object) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        settings = {"num_inference_steps": steps, "output_type": "latent", **arguments, **more}
        return pipe(generator=generator, **settings).images

    pipe.set_progress_bar_config(disable=True)
    return SimpleNamespace(pipe=pipe, name=name, run=run)


def sd1(diffusers, small: StableDiffusion, kind: str = "StableDiffusionPipeline", scheduler=None, **parts):
    """Stable Diffusion 1.x, or a relative of it with the same parts."""
    parts = {"unet": diffusers_unet(diffusers, small.config.unet), **parts}
    pipe = getattr(diffusers, kind)(
        vae=diffusers_vae(diffusers, small.config.vae), text_encoder=_text(CLIPTextModel),
        tokenizer=_tokenizer(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        scheduler=scheduler or diffusers.DDIMScheduler(**BETAS, steps_offset=1), **parts,
    )  # fmt: skip
    return _running(pipe, prompt=PROMPT, height=32, width=32)


def lcm(diffusers, small: StableDiffusion):
    """A latent consistency model: the guidance scale is an input of the UNet."""
    unet = diffusers.UNet2DConditionModel(
        **{**diffusers_unet(diffusers, small.config.unet).config, "time_cond_proj_dim": 32}
    ).eval()
    return sd1(diffusers, small, "LatentConsistencyModelPipeline", diffusers.LCMScheduler(**BETAS), unet=unet)


def controlnet(diffusers, small: StableDiffusion):
    """Residuals from a ControlNet reach the UNet's skip connections."""
    unet = diffusers_unet(diffusers, small.config.unet)
    control = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 16)).eval()
    for layer in [*control.controlnet_down_blocks, control.controlnet_mid_block]:
        nn.init.normal_(layer.weight, std=0.2)  # zero at first, so that nothing would be added
    made = sd1(diffusers, small, "StableDiffusionControlNetPipeline", unet=unet, controlnet=control)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return _running(made.pipe, prompt=PROMPT, image=image)


def sdxl(diffusers, small: StableDiffusion):
    """SDXL: two text encoders; their pooled states and the image's size are conditions too."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2), use_linear_projection=True, cross_attention_dim=2 * _WIDTH,
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + _WIDTH,
    ).eval()  # fmt: skip
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=diffusers_vae(diffusers, small.config.vae), unet=unet,
        text_encoder=_text(CLIPTextModel), text_encoder_2=_text(CLIPTextModelWithProjection),
        tokenizer=_tokenizer(), tokenizer_2=_tokenizer(), add_watermarker=False,
        scheduler=diffusers.EulerDiscreteScheduler(**BETAS, steps_offset=1),
    )  # fmt: skip
    return _running(pipe, prompt=PROMPT, height=32, width=32)


def sd3(diffusers, small: StableDiffusion):
    """Stable Diffusion 3: a transformer on text and image tokens; flow matching starts at timestep 1000."""
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=_WIDTH, caption_projection_dim=32,
        pooled_projection_dim=64, pos_embed_max_size=8,
    ).eval()  # fmt: skip
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer, vae=diffusers_vae(diffusers, small.config.vae),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    states = _states(6, _WIDTH)
    pooled = _states(2, 64)[0]
    return _running(
        pipe, "transformer", prompt_embeds=states[:1], negative_prompt_embeds=states[1:],
        pooled_prompt_embeds=pooled[:1], negative_pooled_prompt_embeds=pooled[1:], height=32, width=32,
    )  # fmt: skip


def pixart(diffusers, small: StableDiffusion):
    """PixArt: a transformer with cross-attention to the text."""
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, cross_attention_dim=32, caption_channels=_WIDTH,
    ).eval()  # fmt: skip
    pipe = diffusers.PixArtSigmaPipeline(
        transformer=transformer, vae=diffusers_vae(diffusers, small.config.vae), text_encoder=None,
        tokenizer=None, scheduler=diffusers.DPMSolverMultistepScheduler(**BETAS),
    )  # fmt: skip
    states, mask = _states(6, _WIDTH), torch.ones(1, 6)
    return _running(
        pipe, "transformer", prompt_embeds=states[:1], negative_prompt_embeds=states[1:],
        prompt_attention_mask=mask, negative_prompt_attention_mask=mask, negative_prompt=None,
        height=32, width=32, use_resolution_binning=False,
    )  # fmt: skip


def _states(tokens: int, width: int) -> torch.Tensor:
    """Random states for a prompt and for the empty prompt."""
    return torch.randn(2, tokens, width, generator=torch.Generator().manual_seed(2))


PIPELINES: dict[str, Callable] = {
    "sd1": sd1, "sdxl": sdxl, "lcm": lcm, "controlnet": controlnet, "sd3": sd3, "pixart": pixart,
}  # fmt: skip
