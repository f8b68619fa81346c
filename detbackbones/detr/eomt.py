"""EoMT: a plain ViT that is a mask transformer itself, without a decoder.

Kerssies et al., Your ViT is Secretly an Image Segmentation Model, https://arxiv.org/abs/2503.19108.
The queries are tokens of the last blocks, and the masks come from the tokens of the patches. Heads
and losses are those of transformers' EoMT; the blocks are those of timm's ViT.
"""

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.modeling import Backbone
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import EomtConfig, EomtForUniversalSegmentation

from ..backbones.timm_backbone import TimmBackbone
from ..config import plain_dict
from ..messages import first_line, nearest
from .settings import refusal

# what a configuration of transformers says besides the ViT's own measures
_SETTINGS = """
    num_blocks num_upscale_blocks no_object_weight class_weight mask_weight dice_weight
    train_num_points oversample_ratio importance_sample_ratio
    """.split()


def build_eomt(
    backbone: Backbone,
    num_classes: int,
    num_queries: int | None = None,
    config_kwargs: Mapping[str, Any] | None = None,
) -> "Eomt":
    """An EoMT with random weights around the ViT of a backbone.

    Args:
        backbone: a TimmBackbone of a plain ViT; it does not become a submodule.
        num_classes: without background.
        num_queries: None is for transformers' 200.
        config_kwargs: attributes of transformers' ``EomtConfig`` that are not measures of the ViT,
            such as ``num_blocks``, the blocks that have queries, by default 4.

    Raises:
        ValueError: if the backbone is no plain ViT, or a setting is unknown or wrong.
    """
    vit = _checked(backbone)
    kwargs = plain_dict(config_kwargs)
    for key in kwargs:
        if key not in _SETTINGS:
            raise ValueError(f"config_kwargs has {key!r}: {nearest(key, _SETTINGS)}")
    shape = list(backbone.output_shape().values())[-1]
    # a mask has a stride of about 4, as in the authors' program
    kwargs = {"num_upscale_blocks": max(int(math.log2(shape.stride)) - 2, 1)} | kwargs
    if num_queries is not None:
        kwargs["num_queries"] = num_queries
    try:
        config = EomtConfig(
            hidden_size=shape.channels,
            num_hidden_layers=0,  # the blocks are the ViT's
            num_attention_heads=1,
            image_size=shape.stride,
            patch_size=shape.stride,
            num_labels=num_classes,
            **kwargs,
        )
    except Exception as error:  # huggingface_hub's validation has errors of its own
        raise refusal(plain_dict(config_kwargs), error) from error
    if not 1 <= config.num_blocks <= len(vit.blocks):
        raise ValueError(
            f"config_kwargs: num_blocks={config.num_blocks} must be from 1 to {len(vit.blocks)}, "
            "the blocks of the ViT"
        )
    for key in ("train_num_points", "oversample_ratio"):
        if getattr(config, key) < 1:
            raise ValueError(f"config_kwargs: {key}={getattr(config, key)} must be at least 1")
    try:
        return Eomt(config, vit)
    except Exception as error:
        raise ValueError(
            f"config_kwargs: transformers cannot build 'eomt' with them: {first_line(error)}"
        ) from error


def _checked(backbone: Backbone) -> nn.Module:
    """The ViT of a backbone whose blocks can take the queries."""
    vit = backbone.model if isinstance(backbone, TimmBackbone) else None
    if not isinstance(vit, VisionTransformer | Eva):
        name = backbone.model_name if vit is not None else type(backbone).__name__
        raise ValueError(
            "architecture='eomt' needs a TimmBackbone of a plain ViT, timm's VisionTransformer or "
            f"Eva, and the backbone is {name}"
        )
    if not backbone.indices:
        raise ValueError("layers must be left out with architecture='eomt': it takes whole blocks")
    if backbone.img_size:
        raise ValueError(
            f"architecture='eomt' needs a ViT that takes images of more than one size, and "
            f"{backbone.model_name} takes those of {backbone.img_size} pixels alone: give an "
            f"img_size that is a multiple of its patches"
        )
    if backbone.source.attention_windows:
        raise ValueError(
            "window_size must be left out with architecture='eomt': queries attend to all patches"
        )
    if backbone.is_compiled:
        raise ValueError(
            "compile=True of the backbone must be left out with architecture='eomt', which runs "
            "the ViT's blocks one by one"
        )
    return vit


class Eomt(EomtForUniversalSegmentation):
    """Transformers' EoMT with timm's ViT, for images of any size that the ViT takes.

    Its state dict has the names of transformers' without those of the ViT.

    Attributes:
        attn_mask_probs: of each block that has queries, how many of these attend to the patches of
            their own masks alone, from 1 to 0; see :meth:`anneal`.
        grad_checkpointing: whether what is in a block is computed again in the backward pass.
    """

    def __init__(self, config: EomtConfig, vit: nn.Module):
        """
        Args:
            config: without measures of the ViT but ``hidden_size``.
            vit: a ``VisionTransformer`` or an ``Eva`` of timm; it does not become a submodule.
        """
        super().__init__(config)
        del self.embeddings, self.layers
        # in lists they are no submodules; without final_norm=True of the backbone the norm is new
        self._vit, self._norm = [vit], [self.layernorm]
        if not isinstance(vit.norm, nn.Identity):
            self._norm = [vit.norm]
            del self.layernorm
        self.grad_checkpointing = False
        self._parts = [1.0] * config.num_blocks
        self.register_load_state_dict_post_hook(lambda module, _: module._note_parts())

    def forward(
        self, pixel_values: torch.Tensor, output_auxiliary_logits: bool | None = None
    ) -> SimpleNamespace:
        """
        Args:
            pixel_values: normalized images (N, C, H, W), H and W multiples of the patches' size.
            output_auxiliary_logits: as of transformers' Mask2Former; they are always there in
                training.

        Returns:
            an object with ``masks_queries_logits`` (N, queries, h, w), ``class_queries_logits``
            (N, queries, classes + 1), and ``auxiliary_logits``, a list of dicts with both, from the
            tokens before each block that has queries.
        """
        vit = self._vit[0]
        grid = vit.patch_embed.dynamic_feat_size(pixel_values.shape[-2:])
        tokens, ropes = _embed(vit, pixel_values)
        first = len(vit.blocks) - self.config.num_blocks
        auxiliary = []
        for i, (block, rope) in enumerate(zip(vit.blocks, ropes)):
            options = {} if rope is None else {"rope": rope}
            if i == first:
                queries = self.query.weight.expand(len(tokens), -1, -1)
                tokens = torch.cat([tokens, queries], dim=1)
            if i >= first:
                if rope is not None:
                    options["rope"] = _with_unmoved(rope, self.config.num_queries)
                part = self._masked_part(i - first)
                if part or self.training:
                    masks, classes = self.predict(tokens, grid)
                    auxiliary.append(
                        {"masks_queries_logits": masks, "class_queries_logits": classes}
                    )
                if part:
                    options["attn_mask"] = self._attention_mask(masks.detach(), grid, part)
            tokens = self._run(block, tokens, options)
        masks, classes = self.predict(tokens, grid)
        return SimpleNamespace(
            masks_queries_logits=masks, class_queries_logits=classes, auxiliary_logits=auxiliary
        )

    def predict(
        self, tokens: torch.Tensor, grid: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks (N, queries, h, w) and classes (N, queries, classes + 1) of the queries, logits.

        Args:
            tokens: (N, prefix + rows * columns + queries, C).
            grid: (rows, columns) of the patches.
        """
        tokens = self._norm[0](tokens)[:, self._vit[0].num_prefix_tokens :]
        patches, queries = tokens.split([grid[0] * grid[1], self.config.num_queries], dim=1)
        maps = self.upscale_block(patches.transpose(1, 2).unflatten(2, grid))
        masks = torch.einsum("nqc,nchw->nqhw", self.mask_head(queries), maps)
        return masks, self.class_predictor(queries)

    def _run(
        self, block: nn.Module, tokens: torch.Tensor, options: Mapping[str, Any]
    ) -> torch.Tensor:
        if self.grad_checkpointing and self.training:
            return checkpoint(block, tokens, use_reentrant=False, **options)
        return block(tokens, **options)

    def _masked_part(self, number: int) -> float:
        """The part of the queries that is masked in a block, counted from the first with queries.

        In an evaluation, which is to give the same each time, it is all or none.
        """
        part = self._parts[number]
        return part if self.training else float(part >= 0.5)

    def _note_parts(self) -> None:
        """Keep ``attn_mask_probs`` as numbers: no GPU is waited for, and nothing is traced."""
        self._parts = self.attn_mask_probs.tolist()

    def train(self, mode: bool = True) -> "Eomt":
        """Set the mode; what an average has made of ``attn_mask_probs`` is seen, too."""
        self._note_parts()
        return super().train(mode)

    def _attention_mask(
        self, masks: torch.Tensor, grid: tuple[int, int], part: float
    ) -> torch.Tensor:
        """What the tokens attend to, bits (N, 1, tokens, tokens): all, but for the masked queries.

        Args:
            masks: logits of the queries' masks (N, queries, h, w).
            grid: (rows, columns) of the patches.
            part: of the queries that attend to the patches of their masks alone.
        """
        inside = F.interpolate(masks, size=grid, mode="bilinear").flatten(2) > 0
        if part < 1:
            inside = inside | (torch.rand(inside.shape[:2], device=inside.device) > part)[..., None]
        count, start = inside.shape[1], self._vit[0].num_prefix_tokens
        total = start + inside.shape[2] + count
        mask = inside.new_ones(len(inside), 1, total, total)
        mask[:, 0, -count:, start:-count] = inside
        return mask

    def anneal(self, progress: float) -> None:
        """Let the masks of attention go, block after block, as training goes on.

        Block i of L goes from (i + 1) / (L + 2) to (i + 2) / (L + 2) of the training, counted from
        0, and in it as (1 - t)^0.9, which is the authors' schedule (section 3.2 of the paper, and
        their configurations for COCO). So a trained model needs none.

        Args:
            progress: of the training, from 0 to 1.
        """
        count = self.config.num_blocks
        for i in range(count):
            passed = progress * (count + 2) - (i + 1)
            self.attn_mask_probs[i] = (1 - min(max(passed, 0.0), 1.0)) ** 0.9
        self._note_parts()


def _embed(vit: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """The tokens that go into a ViT's first block, and what each block rotates them by."""
    tokens, count = vit.patch_embed(images), len(vit.blocks)
    if isinstance(vit, VisionTransformer):
        return vit.norm_pre(vit.patch_drop(vit._pos_embed(tokens))), [None] * count
    tokens, rope = vit._pos_embed(tokens)
    ropes = list(rope) if getattr(vit, "rope_mixed", False) else [rope] * count
    return vit.norm_pre(tokens), ropes


def _with_unmoved(rope: torch.Tensor, count: int) -> torch.Tensor:
    """Sines and cosines (..., patches, D), and those of tokens without a place, of an angle 0."""
    none = torch.zeros_like(rope[..., :1, :])
    none[..., rope.shape[-1] // 2 :] = 1
    return torch.cat([rope, none.expand(*none.shape[:-2], count, -1)], dim=-2)
