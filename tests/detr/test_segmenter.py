"""TransformersSegmenter: equal to transformers, right masks, early errors."""

import numpy as np
import pytest
import torch
from detbackbones import (
    TimmBackbone,
    TorchvisionBackbone,
    TransformersSegmenter,
    build_pyramid,
)
from detbackbones.detr.point_loss import read_bits
from detectron2.structures import PolygonMasks
from support import assert_checkpoints, mask_batch, without_gradient
from transformers import Mask2FormerForUniversalSegmentation
from transformers.models.mask2former.modeling_mask2former import sample_point

SMALL = {"encoder_layers": 1, "decoder_layers": 3, "train_num_points": 200}
SMALL |= dict.fromkeys(("feature_size", "hidden_dim", "mask_feature_size"), 32)
SMALL |= dict.fromkeys(("dim_feedforward", "encoder_feedforward_dim"), 48)


def segmenter(backbone="test_resnet", seed=0, **kwargs):
    torch.manual_seed(seed)
    if isinstance(backbone, str):
        backbone = TimmBackbone(backbone, norm="FrozenBN")
    kwargs = {"num_classes": 3, "num_queries": 20, "config_kwargs": SMALL} | kwargs
    return TransformersSegmenter(backbone=backbone, **kwargs)


def test_bits_are_read_as_floats_are():
    generator = torch.Generator().manual_seed(0)
    bits = torch.rand(35, 37, 41, generator=generator) > 0.5
    points = 1.2 * torch.rand(35, 300, 2, generator=generator) - 0.1
    expected = sample_point(bits[:, None].float(), points, align_corners=False).squeeze(1)
    torch.testing.assert_close(read_bits(bits, points), expected, rtol=0, atol=1e-5)
    which = torch.tensor([34, 0, 0])
    torch.testing.assert_close(
        read_bits(bits, points[:1], which),
        sample_point(
            bits[which, None].float(), points[:1].repeat(3, 1, 1), align_corners=False
        ).squeeze(1),
        rtol=0,
        atol=1e-5,
    )


def test_the_losses_are_those_of_transformers():
    """The same weights, a batch of two sizes, the same points."""
    model = segmenter()
    theirs = Mask2FormerForUniversalSegmentation(model.model.config)
    theirs.model.pixel_level_module.encoder = model.model.model.pixel_level_module.encoder
    theirs.load_state_dict(model.model.state_dict())
    inputs = mask_batch((96, 128), (80, 100))
    torch.manual_seed(1)
    losses = model(inputs)

    images = model.preprocess_image(inputs)
    truth = [model.prepare_targets(x, images.tensor.shape[-2:]) for x in inputs]
    torch.manual_seed(1)
    outputs = theirs.train()(
        pixel_values=images.tensor,
        class_labels=[classes for classes, _ in truth],
        mask_labels=[masks.float() for _, masks in truth],
        output_auxiliary_logits=True,
    )
    torch.testing.assert_close(sum(losses.values()), outputs.loss, rtol=1e-5, atol=0)
    kinds = ("loss_mask", "loss_dice", "loss_cross_entropy")
    assert sorted(losses) == sorted(f"{kind}{end}" for kind in kinds for end in ("", "_0", "_1"))
    sum(losses.values()).backward()
    assert without_gradient(model) == []


@pytest.mark.parametrize("task", ["instance", "semantic", "panoptic"])
def test_every_task_trains_every_parameter(task):
    model = segmenter(task=task, num_things=1 if task == "panoptic" else None)
    inputs = mask_batch((64, 96), (80, 90))
    for x in inputs:
        x["instances"].gt_classes[:] = 0
    sum(model(inputs).values()).backward()
    assert without_gradient(model) == []


@pytest.mark.parametrize("task", ["instance", "semantic"])
def test_a_batch_without_a_mask(task):
    model = segmenter(task=task)
    inputs = mask_batch((64, 96), masks=0)
    inputs[0]["sem_seg"][:] = 255
    losses = model(inputs)
    assert losses.keys() == segmenter(task=task)(mask_batch((64, 96))).keys()
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert without_gradient(model) == []


def test_grad_checkpointing_gives_the_same_gradients():
    wide = SMALL | {"decoder_layers": 6, "dim_feedforward": 512}
    assert_checkpoints(lambda on: segmenter(grad_checkpointing=on, config_kwargs=wide), mask_batch)


BACKBONES = {
    "torchvision": lambda: TorchvisionBackbone("resnet18"),
    "vit": lambda: build_pyramid(TimmBackbone("test_vit"), out_channels=32),
    "swin": lambda: TimmBackbone("swin_tiny_patch4_window7_224"),
    "convnext": lambda: TimmBackbone("test_convnext"),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_any_backbone(name):
    model = segmenter(BACKBONES[name]())
    sum(model(mask_batch((64, 90))).values()).backward()
    assert without_gradient(model) == []
    with torch.no_grad():
        (found,) = model.eval()(mask_batch((64, 90)))
    assert found["instances"].pred_masks.shape[1:] == (64, 90)


def test_polygons_and_bits_are_the_same_truth():
    model = segmenter()
    (image,) = mask_batch((64, 96), masks=1)
    corners = [9.0, 4.0, 93.0, 4.0, 93.0, 40.0, 9.0, 40.0]
    classes, bits = model.prepare_targets(image, (64, 96))
    image["instances"].gt_masks = PolygonMasks([[np.array(corners)]])
    assert torch.equal(model.prepare_targets(image, (64, 96))[1], bits)
    padded = model.prepare_targets(image, (96, 128))[1]
    assert torch.equal(padded[:, :64, :96], bits) and padded.sum() == bits.sum()
    assert bits.dtype == torch.bool and classes.tolist() == [0]


def test_label_maps_become_masks():
    """Ignored pixels are in none. In panoptic maps 0 stands for things, which are instances."""
    (image,) = mask_batch((64, 96))
    image["sem_seg"][5:] = 0
    image["sem_seg"][20:, 30:] = 2
    classes, bits = segmenter(task="semantic").prepare_targets(image, (64, 96))
    assert classes.tolist() == [0, 2] and bits.sum() == 59 * 96
    assert bits[1, 20:, 30:].all() and not (bits[0] & bits[1]).any()
    image["instances"].gt_classes[:] = torch.tensor([1, 0])
    classes, bits = segmenter(task="panoptic", num_things=2, num_classes=4).prepare_targets(
        image, (64, 96)
    )
    assert classes.tolist() == [1, 0, 3]
    assert torch.equal(bits[:2], image["instances"].gt_masks.tensor)
    assert bits[2].sum() == 44 * 66


def perfect(bits):
    """Probabilities that say what the bits are."""
    return 0.9 * bits.float() + 0.05


def squares():
    bits = torch.zeros(4, 64, 96, dtype=torch.bool)
    bits[0, :32, :48] = True
    bits[1, 32:, :48] = True
    bits[2, :, 48:] = True
    bits[3, :32, 8:48] = True  # nearly the first
    return bits


def test_instances_are_the_masks_with_their_boxes():
    model = segmenter(test_topk_per_image=3).eval()
    scores = torch.tensor([[0.1, 0.9, 0.0], [0.6, 0.1, 0.1], [0.0, 0.0, 0.8], [0.0, 0.0, 0.1]])
    found = model._instances(scores, perfect(squares()))["instances"]
    assert found.pred_classes.tolist() == [1, 2, 0]
    assert found.scores.tolist() == pytest.approx([0.95 * 0.9, 0.95 * 0.8, 0.95 * 0.6])
    expected = [[0, 0, 48, 32], [48, 0, 96, 64], [0, 32, 48, 64]]
    assert found.pred_boxes.tensor.tolist() == expected
    assert torch.equal(found.pred_masks, squares()[[0, 2, 1]])


def test_a_map_of_classes():
    model = segmenter(task="semantic").eval()
    scores = torch.tensor([[0.1, 0.9, 0.0], [0.6, 0.1, 0.1], [0.0, 0.0, 0.8], [0.0, 0.0, 0.0]])
    label_map = model._semantic(scores, perfect(squares()))["sem_seg"].argmax(0)
    expected = torch.zeros(64, 96, dtype=torch.long)
    expected[:32, :48], expected[:, 48:] = 1, 2
    assert torch.equal(label_map, expected)


def test_segments_do_not_overlap():
    """Two things and stuff; a query that is hidden by another, and one that is not sure, are none.

    Stuff of two queries is one segment.
    """
    model = segmenter(task="panoptic", num_things=2, num_classes=4).eval()
    scores = torch.tensor(
        [[0.95, 0.0, 0, 0], [0.0, 0.0, 0, 0.9], [0.0, 0.0, 0, 0.9], [0.9, 0.0, 0, 0]]
    )
    result = model._panoptic(scores, perfect(squares()))
    segments, infos = result["panoptic_seg"]
    assert [(x["isthing"], x["category_id"]) for x in infos] == [(True, 0), (False, 2)]
    assert [x["score"] for x in infos] == pytest.approx([0.95, 0.9])
    assert segments.dtype == torch.int32 and set(segments.unique().tolist()) <= {0, 1, 2}
    assert (segments[:32, :48] == infos[0]["id"]).all()
    assert (segments[32:, :48] == infos[1]["id"]).all()
    assert (segments[:, 48:] == infos[1]["id"]).all()
    assert result["sem_seg"].shape == (3, 64, 96)  # things, and two kinds of stuff
    assert set(result["instances"].pred_classes.tolist()) <= {0, 1}
    unsure = model._panoptic(0.5 * scores, perfect(squares()))["panoptic_seg"]
    assert unsure[1] == [] and not unsure[0].any()


def test_what_is_beside_an_image_does_not_change_its_masks():
    model = segmenter(task="semantic").eval()
    small, large, same = mask_batch((90, 120), (160, 224), (96, 128))
    with torch.no_grad():
        alone = model([small])[0]["sem_seg"]
        together = model([large, small, same])[1]["sem_seg"]
    assert alone.shape == (3, 90, 120) and alone.std() > 1e-4
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)


def test_masks_are_in_the_original_image():
    model = segmenter().eval()
    (image,) = mask_batch((64, 96))
    with torch.no_grad():
        first = model([image])[0]["instances"]
        twice = model([{**image, "height": 128, "width": 192}])[0]["instances"]
    assert twice.image_size == (128, 192)
    ratio = twice.pred_boxes.tensor[:5] / 2 - first.pred_boxes.tensor[:5]
    assert ratio.abs().max() < 3


def test_mixed_precision():
    """The masks are matched, and the maps of classes made, as without."""
    model = segmenter(task="semantic")
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(mask_batch((64, 96)))
    sum(losses.values()).backward()
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model.eval()(mask_batch((64, 96)))[0]["sem_seg"].dtype == torch.float32

    generator = torch.Generator().manual_seed(0)
    predictions = torch.randn(1, 20, 16, 24, generator=generator), torch.randn(1, 20, 4)
    truth = [torch.rand(8, 64, 96, generator=generator) > 0.5], [torch.arange(8) % 3]
    matches = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            matches.append(model.model.criterion.matcher(*predictions, *truth)[0])
    assert torch.equal(matches[0][0], matches[1][0]) and torch.equal(matches[0][1], matches[1][1])


WRONG = {
    "task": (dict(task="masks"), "task='masks' is unknown: valid are 'instance'"),
    "architecture": (dict(architecture="maskformer"), "architecture='maskformer' is unknown"),
    "label": (dict(task="semantic", num_classes=300), "num_classes=300 must be at most 255"),
    "things": (dict(task="panoptic"), "num_things=None must be given for task='panoptic' alone"),
    "many": (dict(task="panoptic", num_things=3), "num_things=3 must be less than num_classes=3"),
    "none": (dict(task="panoptic", num_things=0), "num_things=0 must be a whole number from 1"),
    "percent": (
        dict(object_score_thresh=80),
        "object_score_thresh=80 must be a number from 0 to 1",
    ),
    "two levels": (dict(in_features=["res4", "res5"]), "in_features must be at least 3 for"),
    **{
        key: (dict(config_kwargs=SMALL | {key: value}), f"config_kwargs: {key}={value} must be ")
        for key, value in {
            "use_auxiliary_loss": False,
            "dropout": 0.1,
            "train_num_points": 0,
            "oversample_ratio": 0.5,
            "hidden_dim": 64,
            "enforce_input_projection": True,
        }.items()
    },
    "levels": (dict(in_features=["res2", "res4"]), "levels each of twice the stride before"),
    "key": (dict(config_kwargs={"decoder_layer": 2}), "config_kwargs has 'decoder_layer': "),
    "computed": (dict(config_kwargs={"feature_strides": [4]}), "follows from other parameters"),
    "queries": (dict(num_queries=0), "num_queries=0 must be a whole number from 1"),
}


@pytest.mark.parametrize(("kwargs", "sentence"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused_in_a_sentence(kwargs, sentence):
    with pytest.raises(ValueError, match=sentence):
        segmenter(**kwargs)


@pytest.mark.parametrize("task", ["instance", "semantic"])
def test_a_class_that_is_none_is_refused(task):
    (image,) = mask_batch((64, 96))
    image["instances"].gt_classes[1] = 3
    image["sem_seg"] = torch.full((64, 96), 3)
    with pytest.raises(ValueError, match="class 3 must be from 0 to 2, for num_classes=3"):
        segmenter(task=task)([image])


@pytest.mark.parametrize("layer", ["encoder.layers.0.fc1", "adapter_1.0", "input_projections.0.0"])
def test_it_starts_with_weights_that_learn(layer):
    weight = segmenter().model.get_submodule(f"model.pixel_level_module.decoder.{layer}").weight
    fan = weight[0].numel() + weight[:, 0].numel()
    least = (1 / 3 / weight[0].numel()) ** 0.5 if "adapter" in layer else (2 / fan) ** 0.5
    assert weight.std().item() == pytest.approx(least, rel=0.1)  # torch's default, and Xavier's


def test_boxes_alone_are_refused():
    (image,) = mask_batch((64, 96))
    image["instances"].remove("gt_masks")
    with pytest.raises(ValueError, match="masks cannot be learned: an image has boxes alone"):
        segmenter()([image])
