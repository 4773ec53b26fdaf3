"""Where a module joins its skip connections."""

from __future__ import annotations

from torch import nn


def shortcut_splits(module: nn.Module) -> dict[str, int]:
    """The layers fed by skip concatenations -> channels of the first half.

    As the module's own `shortcut_splits()` tells, or read off diffusers' `UNet2DConditionModel`. Raises
    ValueError for a module that has neither.
    """
    if hasattr(module, "shortcut_splits"):
        return module.shortcut_splits()
    if not (hasattr(module, "up_blocks") and getattr(module, "mid_block", None) is not None):
        raise ValueError(
            f"{type(module).__name__} does not tell where its skip concatenations are: it needs a method"
            " shortcut_splits(), or leave split_shortcuts out"
        )
    splits = {}
    channels = module.mid_block.resnets[-1].out_channels
    for i, block in enumerate(module.up_blocks):
        for j, resnet in enumerate(block.resnets):
            splits[f"up_blocks.{i}.resnets.{j}.conv1"] = channels
            if resnet.conv_shortcut is not None:
                splits[f"up_blocks.{i}.resnets.{j}.conv_shortcut"] = channels
            channels = resnet.out_channels
    return splits
