"""EoMT: equal to transformers' on ViTs of timm, at any size, masks of attention that end."""

import pytest
import torch
from detbackbones import TimmBackbone, TransformersSegmenter
from detbackbones.training.checkpoint import load_init_checkpoint
from support import assert_checkpoints, assert_close, mask_batch, without_gradient
from timm.utils import ModelEmaV3
from transformers import (
    EomtConfig,
    EomtDinov3Config,
    EomtDinov3ForUniversalSegmentation,
    EomtForUniversalSegmentation,
)

SMALL = {"num_blocks": 2, "train_num_points": 200}


def segmenter(vit="vit_tiny_patch16_224", seed=0, vit_kwargs=None, **kwargs):
    torch.manual_seed(seed)
    if isinstance(vit, str):
        vit = TimmBackbone(
            vit, img_size=64, final_norm=True, model_kwargs={"depth": 4} | (vit_kwargs or {})
        )
    kwargs = {"num_classes": 3, "num_queries": 20, "config_kwargs": SMALL} | kwargs
    return TransformersSegmenter(backbone=vit, architecture="eomt", **kwargs)


def load(theirs, ours, folder):
    """Give ours the weights of transformers' model, as a file of it is loaded."""
    torch.save(theirs.state_dict(), folder / "eomt.pth")
    report = load_init_checkpoint(ours, str(folder / "eomt.pth"))
    count = len([key for key in ours.state_dict() if key.startswith("backbone.")])
    assert f"loaded {count} of the backbone's {count} tensors" in report


MEASURES = dict(
    hidden_size=192,
    num_hidden_layers=4,
    num_attention_heads=3,
    image_size=64,
    num_queries=20,
    num_labels=3,
    layerscale_value=0.5,
    initializer_range=0.2,
    **SMALL,
)


def eomt():
    """Transformers' EoMT, and ours."""
    config = EomtConfig(patch_size=16, num_register_tokens=4, **MEASURES)
    vit = {"reg_tokens": 4, "no_embed_class": True, "init_values": 1.0}
    return EomtForUniversalSegmentation(config), segmenter(vit_kwargs=vit)


def eomt_dinov3():
    config = EomtDinov3Config(
        patch_size=16,
        num_register_tokens=4,
        intermediate_size=768,
        layer_norm_eps=1e-5,  # as DINOv3 and timm have it
        **MEASURES,
    )
    kwargs = {"embed_dim": 192, "num_heads": 3}
    ours = segmenter("vit_small_patch16_dinov3_qkvb", vit_kwargs=kwargs)
    return EomtDinov3ForUniversalSegmentation(config), ours


def mask(part, theirs, ours):
    """Let a part of the queries attend to their masks alone, in all blocks."""
    state = {"attn_mask_probs": torch.full((2,), part)}
    for model in (theirs, ours.model):
        model.load_state_dict(state, strict=False)


@pytest.mark.parametrize("build", [eomt, eomt_dinov3])
@pytest.mark.parametrize("masked", [0.0, 1.0])
def test_it_is_what_transformers_computes(build, masked, tmp_path):
    theirs, ours = build()
    theirs.eval(), ours.eval()
    for parameter in theirs.parameters():  # of LayerScale and the norms, too
        torch.nn.init.normal_(parameter, std=0.2)
    load(theirs, ours, tmp_path)
    mask(masked, theirs, ours)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(pixel_values=images)
        found = ours.model(pixel_values=images)
    for key in ("class_queries_logits", "masks_queries_logits"):
        other, own = getattr(expected, key), getattr(found, key)
        assert (own - other).abs().max() < 1e-5 * other.abs().max()
    assert len(found.auxiliary_logits) == (2 if masked else 0)


@pytest.mark.parametrize("part", [0.0, 0.4, 1.0])
def test_the_losses_are_those_of_transformers(part, tmp_path):
    theirs, ours = eomt()
    load(theirs, ours, tmp_path)
    mask(part, theirs, ours)
    inputs = mask_batch((64, 64), (64, 60))
    images = ours.preprocess_image(inputs)
    found = []
    for model in (theirs.train(), ours.model):  # some of the queries are not masked, by chance
        torch.manual_seed(1)
        outputs = model(pixel_values=images.tensor)
        found.append((outputs.class_queries_logits, outputs.masks_queries_logits))
    for other, own in zip(*found):
        assert_close(own, other)
        assert (own - other).abs().max() < 1e-5 * other.abs().max()
    torch.manual_seed(1)
    losses = ours(inputs)
    truth = [ours.prepare_targets(x, images.tensor.shape[-2:]) for x in inputs]
    torch.manual_seed(1)
    outputs = theirs.train()(
        pixel_values=images.tensor,
        class_labels=[classes for classes, _ in truth],
        mask_labels=[masks.float() for _, masks in truth],
    )
    # points are drawn in another order: first those of the last block
    torch.testing.assert_close(sum(losses.values()), outputs.loss, rtol=0.03, atol=0)


@pytest.mark.parametrize(
    "vit, kwargs",
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_small_patch14_reg4_dinov2", {}),
        ("vit_small_patch16_dinov3", {}),
        ("eva02_tiny_patch14_224", {}),  # its norm is behind its pooling
        ("vit_base_patch16_rope_mixed_224", {"embed_dim": 192, "num_heads": 3}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("vit_base_patch16_siglip_224", {"embed_dim": 192, "num_heads": 3}),
    ],
)
def test_plain_vits_at_any_size(vit, kwargs):
    backbone = TimmBackbone(
        vit, model_kwargs={"depth": 4} | kwargs, final_norm=not vit.startswith("eva02")
    )
    model = segmenter(backbone)
    patch = backbone.size_divisibility
    inputs = mask_batch((5 * patch + 3, 7 * patch))
    sum(model(inputs).values()).backward()
    assert without_gradient(model) == []
    with torch.no_grad():
        (found,) = model.eval()(inputs)
    assert found["instances"].pred_masks.shape[1:] == (5 * patch + 3, 7 * patch)


def test_queries_without_place_leave_a_rotating_vit_as_it_is():
    """Where no patch attends to a query, the backbone's own map is what EoMT makes of patches."""
    model = segmenter("vit_small_patch16_dinov3").eval()
    seen = []
    model.model.upscale_block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images = torch.randn(1, 3, 64, 96)
    keep = model.model._attention_mask

    def closed(*args):
        mask = keep(*args)
        mask[..., :-20, -20:] = False
        return mask

    model.model._attention_mask = closed
    with torch.no_grad():
        (expected,) = model.backbone(images).values()
        model.model(pixel_values=images)
    assert_close(seen[-1], expected)


@pytest.mark.parametrize("task", ["instance", "semantic", "panoptic"])
def test_every_task_trains_every_parameter(task):
    model = segmenter(task=task, num_things=1 if task == "panoptic" else None)
    inputs = mask_batch((64, 96), (80, 90))
    for x in inputs:
        x["instances"].gt_classes[:] = 0
    losses = model(inputs)
    sum(losses.values()).backward()
    assert without_gradient(model) == []
    kinds = ("loss_mask", "loss_dice", "loss_cross_entropy")
    assert sorted(losses) == sorted(f"{kind}{end}" for kind in kinds for end in ("", "_0", "_1"))


def test_grad_checkpointing_gives_the_same_gradients():
    assert_checkpoints(lambda on: segmenter(grad_checkpointing=on), mask_batch)


def test_grad_checkpointing_of_the_backbone_is_the_same():
    backbone = TimmBackbone("test_vit", grad_checkpointing=True)
    assert segmenter(backbone).model.grad_checkpointing
    assert not segmenter().model.grad_checkpointing


def test_the_queries_that_are_masked():
    model = segmenter().model
    masks = torch.randn(2, 20, 16, 16)
    patches = torch.nn.functional.interpolate(masks, size=(4, 4), mode="bilinear").flatten(2) > 0
    torch.manual_seed(3)
    free = torch.rand(2, 20) > 0.4
    torch.manual_seed(3)
    mask = model._attention_mask(masks, (4, 4), 0.4)
    assert mask.shape == (2, 1, 37, 37) and 10 < free.sum() < 30
    assert mask[:, :, :17].all() and mask[..., :1].all() and mask[..., 17:].all()
    for image in range(2):
        for query in range(20):
            expected = patches[image, query] | free[image, query]
            assert torch.equal(mask[image, 0, 17 + query, 1:17], expected)


def test_an_average_of_the_weights_ends_its_masks_too():
    model = segmenter()
    average = ModelEmaV3(model, decay=0.5)
    for progress in (0.5, 1.0, 1.0, 1.0):
        model.model.anneal(progress)
        average.update(model)
    average.module.eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert average.module.model(images).auxiliary_logits == []
    state = model.state_dict()
    assert not state["model.attn_mask_probs"].any()
    fresh = segmenter().eval()
    fresh.load_state_dict(state)
    with torch.no_grad():
        assert fresh.model(images).auxiliary_logits == []


def test_masks_of_attention_end_block_after_block():
    model = segmenter().model
    model.anneal(0.0)
    assert model.attn_mask_probs.tolist() == [1, 1]
    model.anneal(0.375)  # half of the second quarter
    torch.testing.assert_close(model.attn_mask_probs, torch.tensor([0.5**0.9, 1]))
    model.anneal(0.625)
    torch.testing.assert_close(model.attn_mask_probs, torch.tensor([0, 0.5**0.9]))
    model.anneal(1.0)
    assert model.attn_mask_probs.tolist() == [0, 0]


def test_an_evaluation_gives_the_same_twice():
    model = segmenter().eval()
    mask(0.6, model.model, model)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        first, second = (model.model(images).masks_queries_logits for _ in range(2))
    assert torch.equal(first, second)


WRONG = {
    "convolutions": (dict(vit=TimmBackbone("test_resnet")), "needs a TimmBackbone of a plain ViT"),
    "windows": (
        dict(vit=TimmBackbone("test_vit", window_size=4)),
        "window_size must be left out with architecture='eomt'",
    ),
    "layers": (
        dict(vit=TimmBackbone("test_vit", layers=["patch_embed.proj"])),
        "layers must be left out",
    ),
    "one size": (
        dict(vit=TimmBackbone("vit_small_patch14_dinov2", img_size=64, model_kwargs={"depth": 4})),
        "needs a ViT that takes images of more than one size",
    ),
    "compiled": (dict(vit=TimmBackbone("test_vit", compile=True)), "compile=True of the backbone"),
    "levels": (dict(in_features=["res4"]), "in_features=.'res4'. must be left out"),
    "blocks": (dict(config_kwargs={"num_blocks": 5}), "num_blocks=5 must be from 1 to 4"),
    "unknown": (dict(config_kwargs={"num_block": 2}), "config_kwargs has 'num_block'"),
    "measure": (dict(config_kwargs={"hidden_size": 8}), "config_kwargs has 'hidden_size'"),
    "kind": (dict(config_kwargs={"num_blocks": "two"}), "config_kwargs=.* are refused"),
    "points": (dict(config_kwargs={"train_num_points": 0}), "train_num_points=0 must be at least"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    kwargs, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        segmenter(**kwargs)
