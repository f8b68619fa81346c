"""Weights of DINO from other programs, by the names of ours."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .dino import DinoConfig

# What detrex, the authors' program and mmdetection call the same, in this order; the norms of a
# decoder's layer are numbered by detrex and mmdetection in order, and by the authors not.
_NAMES = [
    (r"^transformer\.", ""),
    (r"^level_embeds$", "level_embed"),
    (r"^neck\.convs\.(\d+)\.conv\.", r"input_proj.\1.0."),
    (r"^neck\.convs\.(\d+)\.(norm|gn)\.", r"input_proj.\1.1."),
    (r"^(tgt_embed|query_embedding)\.", "query_content."),
    (r"^(label_enc|dn_query_generator\.label_embedding)\.", "label_embed."),
    (r"^memory_trans_fc\.", "enc_output."),
    (r"^memory_trans_norm\.", "enc_output_norm."),
    (r"^decoder\.(class_embed|bbox_embed|ref_point_head)\.", r"\1."),
    (r"^decoder\.norm\.", "decoder_norm."),
    (r"^bbox_head\.cls_branches\.", "class_embed."),
    (
        r"^bbox_head\.reg_branches\.(\d+)\.(\d+)\.",
        lambda m: f"bbox_embed.{m[1]}.layers.{int(m[2]) // 2}.",
    ),
    (r"\.ffns?(\.0)?\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffns?(\.0)?\.layers\.1\.", ".mlp.fc2."),
    (r"\.linear(\d)\.", r".mlp.fc\1."),
    (r"^(encoder\.layers\.\d+)\.(norms\.0|norm1)\.", r"\1.self_attn_layer_norm."),
    (r"^(encoder\.layers\.\d+)\.(norms\.1|norm2)\.", r"\1.final_layer_norm."),
    (r"^(decoder\.layers\.\d+)\.(norms\.0|norm2)\.", r"\1.self_attn_layer_norm."),
    (r"^(decoder\.layers\.\d+)\.(norms\.1|norm1)\.", r"\1.encoder_attn_layer_norm."),
    (r"^(decoder\.layers\.\d+)\.(norms\.2|norm3)\.", r"\1.final_layer_norm."),
    (r"\.attentions\.0\.", ".self_attn."),
    (r"^(decoder\.layers\.\d+)\.(attentions\.1|cross_attn)\.", r"\1.encoder_attn."),
    (r"\.self_attn\.attn\.", ".self_attn."),
    (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
]
_AUTHORS, _DETREX = (20, 0.0), (10000, -0.5)  # temperature and offset of the position encoding


def from_other_programs(
    state: Mapping[str, torch.Tensor], config: "DinoConfig"
) -> Mapping[str, torch.Tensor]:
    """A state dict of detrex, of the authors' program or of mmdetection 3, by our names.

    Args:
        state: of any model; its backbone stays as it is.
        config: of ours.

    Returns:
        the state dict with other names, or as it is where it is of none of these.

    Raises:
        ValueError: if the program has another encoding of positions than ``config``: the weights
            would give wrong boxes.
    """
    programs = {
        "transformer.level_embeds": ("detrex", _DETREX),
        "transformer.level_embed": ("DINO's authors", _AUTHORS),
        "memory_trans_fc.weight": ("mmdetection", _AUTHORS),
    }
    found = next((value for key, value in programs.items() if key in state), None)
    if found is None:
        return state
    program, (temperature, offset) = found
    if (config.position_temperature, config.position_offset) != (temperature, offset):
        raise ValueError(
            f"the weights are of {program}, whose encoding of positions is another: set "
            f"model.config_kwargs.position_temperature={temperature} and "
            f"model.config_kwargs.position_offset={offset}"
        )
    translated = {}
    for key, tensor in state.items():
        if key.startswith("backbone."):
            translated[key] = tensor
            continue
        for pattern, name in _NAMES:
            key = re.sub(pattern, name, key)
        translated |= _split(key, tensor)
    _add_what_follows(translated, config)
    return {
        key if key.startswith("backbone.") else f"detr.{key}": tensor
        for key, tensor in translated.items()
    }


def _split(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The projections of queries, keys and values apart."""
    start, found, kind = key.rpartition("in_proj_")
    if not found:
        return {key: tensor}
    names = (f"{start}{letter}_proj.{kind}" for letter in "qkv")
    return dict(zip(names, tensor.chunk(3)))


def _add_what_follows(state: dict[str, torch.Tensor], config: "DinoConfig") -> None:
    """Names that depend on how many there are of something, and what is zero where it is wanting.

    The first map of the extra ones follows those of the backbone, and the heads of the encoder
    those of the decoder. mmdetection's projections have no bias, and the embeddings of labels of
    detrex and mmdetection have none for padding.
    """
    maps = sum(bool(re.fullmatch(r"input_proj\.\d+\.0\.weight", key)) for key in state)
    for key in [*state]:
        if extra := re.match(r"neck\.extra_convs\.(\d+)\.(conv|norm|gn)\.", key):
            part = 0 if extra[2] == "conv" else 1
            name = f"input_proj.{maps + int(extra[1])}.{part}.{key[extra.end() :]}"
            state[name] = state.pop(key)
        elif head := re.match(r"enc_out_(class|bbox)_embed\.", key):
            name = f"{head[1]}_embed.{config.decoder_layers}.{key[head.end() :]}"
            state[name] = state.pop(key)
    for key in [*state]:
        if re.fullmatch(r"input_proj\.\d+\.0\.weight", key):
            bias = key.replace("weight", "bias")
            state.setdefault(bias, state[key].new_zeros(len(state[key])))
    labels = state.get("label_embed.weight")
    if labels is not None and len(labels) == config.num_labels:
        state["label_embed.weight"] = torch.cat([labels, torch.zeros_like(labels[:1])])
