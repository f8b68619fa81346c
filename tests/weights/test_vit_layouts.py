"""The files in which foundation ViTs are given away, by their own names: each gives timm's maps."""

import re

import pytest
import timm
import torch
from detbackbones import TimmBackbone
from support import ROOT, assert_close, images

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}


def rename(state, *rules):
    for pattern, name in rules:
        state = {re.sub(pattern, name, key): value for key, value in state.items()}
    return state


def dinov3(state):
    """github.com/facebookresearch/dinov3: its biases of keys are there, and masked."""
    theirs = rename(
        state,
        (r"^reg_token$", "storage_tokens"),
        (r"\.gamma_(\d)$", r".ls\1.gamma"),
    )
    for key in [key for key in theirs if key.endswith("qkv.weight")]:
        none = torch.zeros(48)
        q, v = (theirs.pop(key.replace("qkv.weight", f"{part}_bias"), none) for part in "qv")
        name = key.replace("weight", "bias")
        theirs |= {name: torch.cat([q, none, v]), f"{name}_mask": torch.ones(3 * 48)}
    return theirs | {"mask_token": torch.zeros(1, 48), "rope_embed.periods": torch.ones(4)}


def dinov2_giant(state):
    """github.com/facebookresearch/dinov2, with SwiGLU in the giant model."""
    theirs = rename(state, (r"\.mlp\.fc1\.", ".mlp.w12."), (r"\.mlp\.fc2\.", ".mlp.w3."))
    return theirs | {"mask_token": torch.zeros(1, 48)}


def eva02(state):
    """github.com/baaivision/EVA, fine-tuned; its sines and cosines are in each block."""
    theirs = rename(
        state,
        (r"\.mlp\.fc1_g\.", ".mlp.w1."),
        (r"\.mlp\.fc1_x\.", ".mlp.w2."),
        (r"\.mlp\.fc2\.", ".mlp.w3."),
        (r"\.mlp\.norm\.", ".mlp.ffn_ln."),
        (r"\.attn\.norm\.", ".attn.inner_attn_ln."),
        (r"\.attn\.([qv])_proj\.bias", r".attn.\1_bias"),
    )
    tables = {
        f"blocks.{i}.attn.rope.freqs_{x}": torch.ones(9, 8) for i in (0, 1) for x in ("sin", "cos")
    }
    return {"module": theirs | tables | {"rope.freqs_cos": torch.ones(9, 8)}}


def siglip(state):
    """open_clip's file of a SigLIP: an image tower of timm's, and one of text."""
    text = {"text.positional_embedding": torch.ones(64, 48), "logit_scale": torch.ones(())}
    return {f"visual.trunk.{key}": value for key, value in state.items()} | text


LAYOUTS = {
    "vit_small_patch16_dinov3_qkvb": dinov3,
    "vit_small_patch16_dinov3": dinov3,  # whose biases are all 0
    "vit_giant_patch14_dinov2": dinov2_giant,
    "eva02_base_patch14_224": eva02,
    "vit_base_patch16_siglip_224": siglip,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_file_by_its_own_names(name, tmp_path, capsys):
    torch.manual_seed(0)
    source = timm.create_model(name, **SMALL).eval()
    for key, parameter in source.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1 if "norm" in key else 0, 0.2)
    torch.save(LAYOUTS[name](dict(source.state_dict())), tmp_path / "c.pth")
    backbone = TimmBackbone(name, checkpoint_path=str(tmp_path / "c.pth"), model_kwargs=SMALL)
    size = source.patch_embed.img_size[0]
    x = images(1, 3, size, size)
    with torch.no_grad():
        (expected,) = source.forward_intermediates(x, indices=1, intermediates_only=True)
        (found,) = backbone.eval()(x).values()
    assert_close(found, expected)
    assert capsys.readouterr().out == ""


def test_the_licences_of_the_docs_are_those_that_timm_notes():
    rows = re.findall(r"\| `(\S+)` \| (\S+) \|", (ROOT / "docs" / "vits.md").read_text())
    assert len(rows) > 8
    for name, licence in rows:
        assert timm.get_pretrained_cfg(name).license == licence, name
