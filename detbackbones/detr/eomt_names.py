"""Weights of transformers' EoMT, by the names of ours."""

import re
from collections.abc import Mapping

import torch

_NAMES = (
    (r"^embeddings\.cls_token", "cls_token"),
    (r"^embeddings\.register_tokens", "reg_token"),
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings\.weight", "pos_embed"),
    (r"^layernorm\.", "norm."),
    (r"^layers\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.(out|o)_proj\.", ".attn.proj."),
)
_DINOV2 = (*_NAMES, (r"\.layer_scale(\d)\.lambda1", r".ls\1.gamma"))
_DINOV3 = (
    *_NAMES,
    (r"\.layer_scale(\d)\.lambda1", r".gamma_\1"),
    (r"\.attention\.([qv])_proj\.bias", r".attn.\1_bias"),
    (r"\.mlp\.up_proj\.", ".mlp.fc1."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
)


def from_transformers(state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """A state dict of transformers' EoMT, on DINOv2 or DINOv3, by the names of a segmenter.

    Args:
        state: of any model.

    Returns:
        the state dict with other names, the ViT's by those of timm, or as it is where it is of
        another model.
    """
    if not {"query.weight", "embeddings.cls_token", "class_predictor.weight"} <= state.keys():
        return state
    names = _DINOV2 if "embeddings.position_embeddings.weight" in state else _DINOV3
    vit, rest = {}, {}
    for key, value in state.items():
        if not re.match(r"(embeddings|layernorm|layers)\.", key):
            rest[f"model.{key}"] = value
            continue
        for pattern, name in names:
            key = re.sub(pattern, name, key)
        vit[key] = value[None] if key == "pos_embed" else value
    for key in [key for key in vit if ".attention.q_proj." in key]:
        parts = [vit.pop(key.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        vit[key.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    return rest | {f"backbone.model.{key}": value for key, value in vit.items()}
