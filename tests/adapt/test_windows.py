"""Windows of attention: ViTDet's own, and the plain model where a window holds the image."""

import pytest
import timm
import torch
from detbackbones import TimmBackbone
from detbackbones.adapt.windows import add_windows
from detectron2.modeling.backbone.vit import ViT
from support import assert_close

NAMES = (
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_rope_mixed_224",
    "vit_small_patch16_dinov3",
    "vit_small_patch14_reg4_dinov2",
)


def _model(name, **options):
    """A model of two blocks whose layer scale is no near zero, which would hide all."""
    torch.manual_seed(0)
    model = timm.create_model(name, depth=2, dynamic_img_size=True, **options).eval()
    for parameter, values in model.named_parameters():
        if "gamma" in parameter or "ls" in parameter:
            torch.nn.init.ones_(values)
    return model


def _maps(model, images):
    with torch.no_grad():
        return model.forward_intermediates(images, intermediates_only=True)


@pytest.mark.parametrize("grid", [(5, 7), (8, 4)])
def test_it_is_what_detectron2_computes(grid):
    plain = _model("vit_tiny_patch16_224", class_token=False, global_pool="avg")
    plain.pos_embed.data = torch.randn(1, 1, 192).expand(1, 196, 192).clone()  # resized alike
    theirs = ViT(
        embed_dim=192,
        depth=2,
        num_heads=3,
        img_size=224,
        window_size=4,
        window_block_indexes=[0],
        pretrain_use_cls_token=False,
        drop_path_rate=0.0,
        out_feature="last",
    ).eval()
    state = plain.state_dict()
    theirs.load_state_dict({key: state[key] for key in theirs.state_dict()})
    images = torch.randn(2, 3, 16 * grid[0], 16 * grid[1])
    with torch.no_grad():
        expected = theirs(images)["last"]
    assert_close(_maps(add_windows(plain, 4, 1), images)[-1], expected)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_in_one_window_is_as_ever(name):
    plain, windowed = _model(name), add_windows(_model(name), 6, 0)
    side = plain.patch_embed.patch_size[0]
    images = torch.randn(2, 3, 6 * side, 5 * side)
    for one, other in zip(_maps(plain, images), _maps(windowed, images)):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_patches_attend_to_their_window_and_to_what_is_no_patch(name):
    """As by a mask; positions are those of the whole image."""
    plain, windowed = _model(name), add_windows(_model(name), 3, 1)
    side, (rows, columns) = plain.patch_embed.patch_size[0], (3, 9)
    images = torch.randn(2, 3, rows * side, columns * side)
    window = torch.arange(columns).repeat(rows) // 3
    prefix = plain.num_prefix_tokens
    mask = torch.ones(prefix + rows * columns, prefix + rows * columns, dtype=torch.bool)
    mask[prefix:, prefix:] = window[:, None] == window[None]
    with torch.no_grad():
        expected = plain.forward_intermediates(
            images, indices=[0], intermediates_only=True, stop_early=True, attn_mask=mask
        )[0]
    found = _maps(windowed, images)
    assert_close(found[0], expected)
    assert (found[0] - _maps(plain, images)[0]).abs().max() > 1e-3


def test_a_backbone_has_windows():
    plain, windowed = (
        TimmBackbone("vit_tiny_patch16_224", model_kwargs={"depth": 4}, **options).eval()
        for options in ({}, {"window_size": 4, "global_blocks": 2})
    )
    assert plain.state_dict().keys() == windowed.state_dict().keys()
    hooked = [bool(block.attn._forward_hooks) for block in windowed.model.blocks]
    assert hooked == [True, False, True, False]
    windowed.load_state_dict(plain.state_dict())
    with torch.no_grad():
        for side, same in ((64, True), (128, False)):
            images = torch.rand(1, 3, side, side)
            difference = (plain(images)["res4"] - windowed(images)["res4"]).abs().max()
            assert (difference < 1e-6) == same
    windowed.train()
    windowed(torch.rand(2, 3, 128, 96))["res4"].sum().backward()
    assert all(p.grad is not None for p in windowed.parameters())


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("swin_tiny_patch4_window7_224", {"window_size": 4}, "needs a plain ViT .* SwinTransfor"),
        ("beit_base_patch16_224", {"window_size": 4}, "needs a plain ViT"),
        ("resnet18", {"window_size": 4}, "needs a plain ViT"),
        ("vit_small_patch16_18x2_224", {"window_size": 4}, "VisionTransformer of ParallelThings"),
        ("vit_tiny_patch16_224", {"window_size": 0}, "window_size=0 must be a whole number"),
        (
            "vit_tiny_patch16_224",
            {"window_size": 4, "global_blocks": 13},
            "global_blocks=13 must be from 0 to 12",
        ),
    ],
)
def test_what_cannot_have_windows(name, options, said):
    with pytest.raises(ValueError, match=said):
        TimmBackbone(name, **options)


def test_swin_keeps_an_argument_of_the_same_name():
    backbone = TimmBackbone("swin_tiny_patch4_window7_224", model_kwargs={"window_size": 8})
    assert backbone.model.layers[0].blocks[0].window_size == (8, 8)
