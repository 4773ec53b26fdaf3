"""Training: the tiny model from its rendered scenes, and the recovery of compressed UNets."""

from sdcomp.training.caption_tokenizer import caption_tokenizer
from sdcomp.training.data import SceneSet, scene_set
from sdcomp.training.loop import Trained, fit
from sdcomp.training.recovery import recover
from sdcomp.training.stages import (
    Latents,
    encode_scenes,
    train_clip,
    train_reader,
    train_unet,
    train_vae,
    vae_round_trips,
)

__all__ = [
    "Latents",
    "SceneSet",
    "Trained",
    "caption_tokenizer",
    "encode_scenes",
    "fit",
    "recover",
    "scene_set",
    "train_clip",
    "train_reader",
    "train_unet",
    "train_vae",
    "vae_round_trips",
]
