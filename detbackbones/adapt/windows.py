"""Attention within windows: a plain ViT on large images in less time, as in ViTDet."""

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.modeling.backbone.utils import window_partition, window_unpartition
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn


def add_windows(model: nn.Module, size: int, global_blocks: int) -> nn.Module:
    """Let most blocks of a ViT attend within windows (ViTDet, arXiv 2203.16527, section 3).

    The windows are squares that do not overlap; a few blocks at equal distances, the last among
    them, attend to the whole image. Parameters and their names stay, and so do position embeddings,
    absolute or rotary. Class tokens and registers are in each window, and become the mean of what
    they are there. The map is padded with zeros to whole windows, as in ViTDet. An image that fits
    into one window is computed as ever.

    Args:
        model: a ``VisionTransformer`` or an ``Eva`` of timm; changed in place.
        size: length of a window's side in patches.
        global_blocks: how many blocks attend to the whole image.

    Returns:
        the model.

    Raises:
        ValueError: if it is another model, or has fewer blocks.
    """
    blocks = list(getattr(model, "blocks", ()))
    standard = isinstance(model, VisionTransformer | Eva)
    if not standard or not all(isinstance(getattr(x, "attn", None), nn.Module) for x in blocks):
        kind = f" of {type(blocks[0]).__name__}" if standard else ""
        raise ValueError(
            f"window_size={size} needs a plain ViT whose blocks have one attention each, as timm's "
            f"VisionTransformer and Eva, and the model is a {type(model).__name__}{kind}"
        )
    if type(global_blocks) is not int or not 0 <= global_blocks <= len(blocks):
        raise ValueError(f"global_blocks={global_blocks!r} must be from 0 to {len(blocks)}")
    windows = _Windows(size, model.num_prefix_tokens)
    model.patch_embed.register_forward_pre_hook(windows.see)
    whole = {(i + 1) * len(blocks) // global_blocks - 1 for i in range(global_blocks)}
    for i, block in enumerate(blocks):
        if i not in whole:
            block.attn.register_forward_pre_hook(windows.split, with_kwargs=True)
            block.attn.register_forward_hook(windows.join)
    return model


class _Windows:
    """Splits the tokens of an image before an attention, and joins what it gives."""

    def __init__(self, size: int, prefix: int):
        """
        Args:
            size: of a window, in patches.
            prefix: tokens before those of the patches.
        """
        self.size, self.prefix = size, prefix
        self.grid = (0, 0)

    def see(self, patch_embed: nn.Module, images: tuple[torch.Tensor, ...]) -> None:
        """Note how many rows and columns of patches there are."""
        self.grid = patch_embed.dynamic_feat_size(images[0].shape[-2:])

    def split(
        self, attention: nn.Module, inputs: tuple[torch.Tensor, ...], options: Mapping[str, Any]
    ) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]] | None:
        """Tokens (N, prefix + rows * columns, C) of images as tokens of windows."""
        if max(self.grid) <= self.size:
            return None
        (x,) = inputs
        patches = self._windows(x[:, self.prefix :])
        count = len(patches) // len(x)
        others = x[:, : self.prefix].repeat_interleave(count, dim=0)
        if (rope := options.get("rope")) is not None:  # (rows * columns, D), or (heads, ..., D)
            heads = rope.reshape(-1, *rope.shape[-2:])
            places = self._windows(heads).unflatten(0, (len(heads), count)).transpose(0, 1)
            options = {**options, "rope": places.repeat(len(x), 1, 1, 1)}
        return (torch.cat([others, patches], dim=1),), dict(options)

    def join(
        self, attention: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor | None:
        """Tokens of windows as tokens of images."""
        if max(self.grid) <= self.size:
            return None
        rows, columns = (-(-length // self.size) * self.size for length in self.grid)
        windows = output[:, self.prefix :].unflatten(1, (self.size, self.size))
        patches = window_unpartition(windows, self.size, (rows, columns), self.grid).flatten(1, 2)
        others = output[:, : self.prefix].unflatten(0, (len(patches), -1)).mean(1)
        return torch.cat([others, patches], dim=1)

    def _windows(self, tokens: torch.Tensor) -> torch.Tensor:
        """Those of (N, rows * columns, C): (N * windows, size * size, C)."""
        return window_partition(tokens.unflatten(1, self.grid), self.size)[0].flatten(1, 2)
