"""TransformersDetector: equal to transformers, right boxes, early errors, loading and saving."""

import math
import sys

import detbackbones.detr.dino  # noqa: F401  which transformers knows from then on
import pytest
import torch
import transformers
from detbackbones import (
    FeatureBackbone,
    TimmBackbone,
    TorchvisionBackbone,
    TransformersDetector,
    add_backbone_config,
    build_pyramid,
)
from detbackbones.detr.architectures import ARCHITECTURES
from detbackbones.detr.build import encoder_name
from detbackbones.detr.images import images_and_mask
from detbackbones.detr.pretrained import timm_backbone_name, timm_keys
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, build_model, build_resnet_backbone
from detectron2.structures import BitMasks, Boxes, Instances
from support import TOOLS, assert_checkpoints, assert_close, images, randomise
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForInstanceSegmentation,
    AutoModelForObjectDetection,
    ResNetConfig,
    TimmBackboneConfig,
)

SMALL = {"decoder_layers": 2, "encoder_layers": 1}
VITS = ["lw_detr", "rf_detr", "rf_detr with masks"]  # they take levels of one stride
HYBRID = [name for name in ARCHITECTURES if ARCHITECTURES[name].hybrid]
EVERY = [*ARCHITECTURES, VITS[-1]]
NOWHERE = "detbackbones/there-is-no-such-detector"


def detector(architecture="rt_detr_v2", backbone="resnet18", seed=0, **kwargs):
    torch.manual_seed(seed)
    vit = architecture in VITS
    if isinstance(backbone, str):
        backbone = TimmBackbone(backbone, out_features=["res4"] if vit else None)
    small = {"decoder_layers": 2, "group_detr": 3} if vit else SMALL
    kwargs = {"num_classes": 3, "num_queries": 20, "config_kwargs": small} | kwargs
    if architecture == VITS[-1]:
        architecture, kwargs["masks"] = "rf_detr", True
    return TransformersDetector(architecture=architecture, backbone=backbone, **kwargs)


def rectangle(box, height, width):
    """The pixels (height, width) that have their centre in a box."""
    x, y = torch.arange(width) + 0.5, (torch.arange(height) + 0.5)[:, None]
    return (box[0] < x) & (x < box[2]) & (box[1] < y) & (y < box[3])


def batch(*sizes, boxes=2, seed=0):
    """Images of (height, width) with boxes, as a detectron2 mapper gives them."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for height, width in sizes:
        corners = torch.rand(boxes, 2, 2, generator=generator).sort(1).values.flatten(1)
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(corners * torch.tensor([width, height, width, height]))
        instances.gt_classes = torch.arange(boxes) % 3
        if boxes:
            masks = [rectangle(box, height, width) for box in instances.gt_boxes]
            instances.gt_masks = BitMasks(torch.stack(masks))
        image = torch.randint(0, 256, (3, height, width), generator=generator).byte()
        inputs.append({"image": image, "instances": instances, "height": height, "width": width})
    return inputs


def reference(folder, architecture, model_name, indices, **kwargs):
    """A detector of transformers itself on a timm model, saved to a folder."""
    torch.manual_seed(0)
    backbone = TimmBackboneConfig(backbone=model_name, out_indices=indices)
    config = AutoConfig.for_model(
        architecture, backbone_config=backbone, num_labels=3, num_queries=20, **SMALL, **kwargs
    )
    model = randomise(AutoModelForObjectDetection.from_config(config)).eval()
    for name, module in model.named_modules():  # which randomise does not know
        if name.endswith(("bn1", "bn2", "bn3")) and "running_var" in dict(module.named_buffers()):
            module.running_var.fill_(0.9)
    model.save_pretrained(folder)
    return model


def channels(model_name):
    shapes = TimmBackbone(model_name, out_features=["res3", "res4", "res5"]).output_shape()
    return {"encoder_in_channels": [shape.channels for shape in shapes.values()]}


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in VITS])
def test_it_equals_the_model_of_transformers(tmp_path, architecture):
    """The same weights, frozen batch norm, the same padded batch: resnet50 where it counts."""
    name = "resnet50" if architecture == "rt_detr_v2" else "resnet18"
    indices = [4] if len(ARCHITECTURES[architecture].strides) == 1 else [2, 3, 4]
    hybrid = ARCHITECTURES[architecture].hybrid
    theirs = reference(tmp_path, architecture, name, indices, **(channels(name) if hybrid else {}))
    ours = detector(
        backbone=TimmBackbone(name, norm="FrozenBN"),
        architecture=None,
        num_queries=None,
        config_kwargs=None,
        pretrained_detector=str(tmp_path),
    ).eval()
    padded = images_and_mask(ours.preprocess_image(batch((128, 160), (100, 130))))
    assert padded["pixel_mask"].sum() == 128 * 160 + 100 * 130
    with torch.no_grad():
        expected, got = theirs(**padded), ours.detr(**padded)
    assert (got.logits - expected.logits).abs().max() < 1e-4
    assert (got.pred_boxes - expected.pred_boxes).abs().max() < 1e-4
    assert got.logits.std() > 1e-3 and got.pred_boxes.std() > 1e-4

    (image,) = inputs = batch((128, 160))
    padded = images_and_mask(ours.preprocess_image(inputs))
    with torch.no_grad():
        found = ours(inputs)[0]["instances"]
        is_softmax = ARCHITECTURES[architecture].no_object
        kind = "DetrImageProcessor" if is_softmax else "RTDetrImageProcessor"
        processor = getattr(transformers, kind)()
        (expected,) = processor.post_process_object_detection(
            theirs(**padded), threshold=0, target_sizes=[(128, 160)]
        )
    count = len(expected["scores"])  # transformers keeps as many as there are queries
    assert_close(found.scores[:count].sort().values, expected["scores"].sort().values)
    assert image["height"], image["width"] == found.image_size


class Wrapped(Backbone):
    """The ViT of a transformers model as a detectron2 backbone of several levels of one stride."""

    def __init__(self, vit, channels, stride, count):
        super().__init__()
        self.vit, self.channels, self.stride, self.count = vit, channels, stride, count

    def forward(self, x):
        return {f"p{i}": level for i, level in enumerate(self.vit(x).feature_maps)}

    def output_shape(self):
        shape = ShapeSpec(channels=self.channels, stride=self.stride)
        return {f"p{i}": shape for i in range(self.count)}

    size_divisibility = 64


@pytest.mark.parametrize("architecture", VITS)
def test_on_its_own_vit_it_equals_the_model_of_transformers(architecture):
    """Losses and outputs, with the same weights, and several maps of the ViT."""
    torch.manual_seed(0)
    name, masks = architecture.removesuffix(" with masks"), " with masks" in architecture
    vit = AutoConfig.for_model(
        ARCHITECTURES[name].vit,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        patch_size=16,
        image_size=128,
        out_indices=[1, 3],
        num_windows=4,
    )
    scales = {"projector_scale_factors": [2.0, 0.5]} if architecture == "lw_detr" else {}
    small = {"decoder_layers": 2, "group_detr": 3, "dropout": 0.0, **scales}
    config = AutoConfig.for_model(name, backbone_config=vit, num_labels=3, num_queries=20, **small)
    kind = AutoModelForInstanceSegmentation if masks else AutoModelForObjectDetection
    theirs = kind.from_config(config).train()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pixels = {"pixel_mean": [120.0] * 3, "pixel_std": [60.0] * 3}
    ours = detector(
        architecture,
        Wrapped(theirs.get_submodule(encoder_name(theirs)), 32, 16, 2),
        config_kwargs=small,
        in_features=["p0", "p1"],
        **pixels,
    )
    state = {k: v for k, v in theirs.state_dict().items() if "backbone.backbone" not in k}
    assert ours.detr.load_state_dict(state, strict=True)
    inputs = batch((128, 128), (128, 128))
    prepared = ours.preprocess_image(inputs)
    labels = ours.prepare_targets(prepared, [x["instances"] for x in inputs])
    torch.manual_seed(1)  # of the points of masks
    losses = ours(inputs)
    torch.manual_seed(1)
    expected = theirs(**images_and_mask(prepared), labels=labels)
    torch.testing.assert_close(sum(losses.values()), expected.loss, rtol=1e-5, atol=0)
    with torch.no_grad():
        expected, got = (model.eval()(**images_and_mask(prepared)) for model in (theirs, ours.detr))
    assert_close(got.logits, expected.logits)
    assert_close(got.pred_boxes, expected.pred_boxes)
    assert got.logits.std() > 1e-3
    if masks:
        assert_close(got.pred_masks, expected.pred_masks)
        assert len([key for key in losses if "mask" in key]) == 6  # two layers, and the proposals


@pytest.mark.parametrize("architecture", VITS)
def test_levels_that_are_not_taken_are_refused(architecture):
    with pytest.raises(ValueError, match=r"build it with out_features=\['res4'\]"):
        detector(architecture, TimmBackbone("test_resnet"))
    with pytest.raises(ValueError, match="takes levels of one stride and as many channels"):
        detector(architecture, TimmBackbone("test_resnet"), in_features=["res4", "res5"])


@pytest.mark.parametrize("architecture", EVERY)
def test_losses_are_named_and_add_up_to_that_of_transformers(architecture):
    model, inputs = detector(architecture), batch((96, 128), (64, 96))
    torch.manual_seed(1)
    losses = model(inputs)
    torch.manual_seed(1)
    prepared = model.preprocess_image(inputs)
    labels = model.prepare_targets(prepared, [x["instances"] for x in inputs])
    total = model.detr(**images_and_mask(prepared), labels=labels).loss
    torch.testing.assert_close(sum(losses.values()), total)
    assert {"loss_bbox", "loss_giou"} < losses.keys()
    assert len(losses) >= 6  # the inner layer of the decoder has losses too
    total.backward()
    assert [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("architecture", EVERY)
def test_a_batch_without_a_box_trains_every_parameter(architecture):
    model = detector(architecture)
    losses = model(batch((96, 128), (64, 96), boxes=0))
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("architecture", EVERY)
def test_a_class_that_is_none_is_refused(architecture):
    inputs = batch((64, 96))
    inputs[0]["instances"].gt_classes[1] = 3
    with pytest.raises(ValueError, match="class 3 must be from 0 to 2, for num_classes=3"):
        detector(architecture)(inputs)


def in_processes(architecture):
    """A detector whose losses depend on its images alone, and batches of two processes."""
    kwargs = {"num_denoising": 0} if architecture in HYBRID else {}
    kwargs |= {"dropout": 0.0} | SMALL
    model = detector(architecture, config_kwargs=kwargs)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return model, [batch((96, 128), boxes=1), batch((96, 128), boxes=7, seed=1)]


def losses_in_two_processes(rank, folder, architectures):
    torch.set_num_threads(1)
    file = (folder / "rendezvous").as_uri()
    torch.distributed.init_process_group("gloo", file, rank=rank, world_size=2)
    found = {}
    for architecture in architectures:
        model, batches = in_processes(architecture)
        found[architecture] = {k: v.item() for k, v in model(batches[rank]).items()}
    torch.save(found, folder / f"{rank}.pth")
    torch.distributed.destroy_process_group()


def test_losses_are_divided_by_the_boxes_of_all_processes(tmp_path):
    architectures = ["rt_detr", "rt_detr_v2", "d_fine", "deformable_detr", "conditional_detr"]
    architectures += ["dab-detr", "detr"]
    torch.multiprocessing.spawn(losses_in_two_processes, (tmp_path, architectures), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pth") for rank in range(2)]
    for architecture in architectures:
        model, batches = in_processes(architecture)
        whole = {k: v.item() for k, v in model(sum(batches, [])).items()}
        # a mean over queries, and weights by the processes' own predictions, are not of boxes
        apart = ("loss_ddf", "loss_ce") if architecture == "detr" else ("loss_ddf",)
        for key, value in whole.items():
            if not key.startswith(apart):
                mean = (parts[0][architecture][key] + parts[1][architecture][key]) / 2
                assert mean == pytest.approx(value, rel=1e-4), (architecture, key)


@pytest.mark.parametrize("architecture", EVERY)
def test_boxes_come_back_from_what_the_model_learns(architecture):
    """Targets given as predictions are the boxes that the targets were made from."""
    model, inputs = detector(architecture), batch((128, 96), (64, 160))
    prepared = model.preprocess_image(inputs)
    for i, label in enumerate(model.prepare_targets(prepared, [x["instances"] for x in inputs])):
        logits = 10.0 * torch.nn.functional.one_hot(label["class_labels"], 3) - 5
        logits[0, 0] += 1  # the first box is the best
        if ARCHITECTURES[model.architecture].no_object:
            logits = torch.nn.functional.pad(logits, (0, 1))
        found = model._detections(
            prepared, logits.expand(2, -1, -1), label["boxes"].expand(2, -1, -1)
        )[i]
        expected = inputs[i]["instances"]
        torch.testing.assert_close(found.pred_boxes.tensor[:2], expected.gt_boxes.tensor)
        assert found.pred_classes[:2].tolist() == expected.gt_classes.tolist()


@pytest.mark.parametrize("architecture", ["rt_detr", "rt_detr_v2", "d_fine"])
def test_boxes_stand_on_the_positions_of_the_padded_image(architecture):
    """Before any training, a box has its centre in the middle of a position of a feature map."""
    model = detector(architecture, "test_resnet", num_queries=200).eval()
    prepared = model.preprocess_image(batch((128, 128), (128, 512)))
    outputs = model.detr(**images_and_mask(prepared))
    centres = outputs.pred_boxes[0, :, 0] * model._frames(prepared)[0][1]
    assert centres.std() > 20
    assert (centres / 4 - (centres / 4).round()).abs().max() < 0.05


def test_deformable_queries_look_into_the_image_itself():
    """What a query depends on lies around its box, and none of it in the padding."""
    model = detector("deformable_detr", "test_resnet", num_queries=40).eval()
    prepared = model.preprocess_image(batch((128, 128), (128, 512)))
    pixels = prepared.tensor[:1].clone().requires_grad_()
    mask = images_and_mask(prepared)["pixel_mask"][:1]
    outputs = model.detr(pixel_values=pixels, pixel_mask=mask)
    centres = outputs.pred_boxes[0, :, 0] * model._frames(prepared)[0][1]
    query = (centres - 96).abs().argmin()  # right in the image, left in the padded one
    assert 64 < centres[query] < 128
    outputs.last_hidden_state[0, query].square().sum().backward()
    weight = pixels.grad.abs().sum((0, 1, 2))
    assert weight[64:128].sum() > weight[:64].sum() > weight[192:].sum()


@pytest.mark.parametrize("architecture", EVERY)
def test_what_is_beside_an_image_does_not_change_its_boxes(architecture):
    model = detector(architecture).eval()
    small, large, same = batch((90, 120), (160, 224), (96, 128))
    with torch.no_grad():
        alone = model([small])[0]["instances"]
        together = model([large, small, same])[1]["instances"]
    assert len(alone) == len(together) >= 20
    first, second = (
        torch.cat([x.pred_boxes.tensor, 100 * torch.stack([x.scores, x.pred_classes], 1)], 1)
        for x in (alone, together)
    )
    distances = (first[:, None] - second).abs().amax(2)  # the order of equal scores is any
    assert distances.min(0).values.max() < 1e-3 and distances.min(1).values.max() < 1e-3


def test_boxes_are_in_the_original_image():
    model = detector(num_queries=50, test_topk_per_image=30).eval()
    (small,) = batch((96, 128))
    with torch.no_grad():
        first = model([small])[0]["instances"]
        second = model([small | {"height": 192, "width": 384}])[0]["instances"]
    assert first.image_size == (96, 128) and second.image_size == (192, 384)
    assert 0 < len(first) <= 30 and first.scores.diff().max() <= 0
    scaled = first.pred_boxes.tensor * torch.tensor([3, 2, 3, 2])
    torch.testing.assert_close(second.pred_boxes.tensor, scaled)
    assert first.pred_boxes.tensor[:, 2].max() <= 128 and first.pred_boxes.tensor.min() >= 0


def test_masks_are_in_the_original_image():
    """Those of transformers at the size that the model sees, and the same at another."""
    model, (image,) = randomise(detector("rf_detr with masks")).eval(), batch((128, 96))
    with torch.no_grad():
        found, large = (
            model([image | {"height": 128 * n, "width": 96 * n}])[0]["instances"] for n in (1, 2)
        )
        outputs = model.detr(**images_and_mask(model.preprocess_image([image])))
    (expected,) = transformers.RfDetrImageProcessor().post_process_instance_segmentation(
        outputs, threshold=0, target_sizes=[(128, 96)], return_binary_maps=True, top_k=100
    )
    assert found.pred_masks.dtype == torch.bool
    not_empty = found.pred_masks.flatten(1).any(1)  # transformers leaves out the others
    assert not_empty.sum() > 20
    assert torch.equal(found.pred_masks[not_empty], expected["segmentation"])
    assert 0.1 < found.pred_masks.float().mean() < 0.9
    assert large.pred_masks.shape == (len(found), 256, 192)
    assert (large.pred_masks[:, ::2, ::2] == found.pred_masks).float().mean() > 0.95


def test_boxes_alone_are_no_masks():
    (image,) = batch((64, 96))
    image["instances"].remove("gt_masks")
    with pytest.raises(ValueError, match="masks cannot be learned: an image has boxes alone"):
        detector("rf_detr with masks")([image])


BACKBONES = {
    "convnext": lambda: TimmBackbone("test_convnext"),
    "swin": lambda: TimmBackbone(
        "swin_tiny_patch4_window7_224",
        model_kwargs={"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2]},
    ),
    "efficientnet": lambda: TimmBackbone("test_efficientnet", norm="FrozenBN", freeze_at=2),
    "vit": lambda: build_pyramid(TimmBackbone("test_vit"), 32, min_level=3),
    "torchvision": lambda: TorchvisionBackbone("mobilenet_v3_small", freeze_at=1),
    "dilated": lambda: TimmBackbone("resnet18", output_stride=16, out_indices=(2, 3)),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_any_backbone_trains(name):
    backbone = BACKBONES[name]()
    model = detector(backbone=backbone, in_features=["p2", "p3"] if name == "dilated" else None)
    losses = model(batch((128, 96), (64, 160)))
    sum(losses.values()).backward()
    assert [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    shapes = [backbone.output_shape()[level] for level in model.in_features]
    assert model.detr.config.encoder_in_channels == [shape.channels for shape in shapes]
    assert model.detr.config.feat_strides == [shape.stride for shape in shapes]
    assert not [k for k in model.state_dict() if k.startswith("detr.model.backbone")]


@pytest.mark.parametrize("architecture", HYBRID)
def test_detectron2s_own_resnet_has_sides_that_the_pyramid_takes(architecture):
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    backbone = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    assert backbone.size_divisibility == 0
    pixels = {"pixel_mean": [123.0] * 3, "pixel_std": [58.0] * 3}
    model = detector(architecture, backbone, **pixels)
    assert all(loss.isfinite() for loss in model(batch((100, 115))).values())


def test_pixels_are_normalized_as_the_backbone_was_trained():
    inception = detector(backbone=BACKBONES["swin"]())
    assert inception.pixel_mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
    half = detector(backbone="vit_tiny_patch16_224", architecture="dab-detr", in_features=["res4"])
    assert half.pixel_mean.flatten().tolist() == [127.5] * 3
    (image,) = batch((64, 64))
    image["image"][:] = 255
    assert half.preprocess_image([image]).tensor.unique().tolist() == [1]
    own = detector(pixel_mean=[1.0, 2.0, 3.0], pixel_std=[4.0, 5.0, 6.0])
    assert own.pixel_std.flatten().tolist() == [4, 5, 6]
    assert own.preprocess_image([image]).tensor[0, :, 0, 0].tolist() == pytest.approx(
        [63.5, 50.6, 42]
    )
    vgg = TorchvisionBackbone("mobilenet_v3_small")
    assert vgg.pixel_mean == pytest.approx([123.675, 116.28, 103.53])
    net = FeatureBackbone.from_module(
        torch.nn.Sequential(*[torch.nn.Conv2d(3, 3, 3, 2, 1) for _ in range(5)]), ["2", "3", "4"]
    )
    with pytest.raises(ValueError, match="pixel_mean=None"):
        detector(backbone=net)


WRONG = {
    "architecture": (dict(architecture="rt_detr_v3"), "'rt_detr_v3'.*'rt_detr_v2'"),
    "num_classes": (dict(num_classes=0), "num_classes=0"),
    "num_queries": (dict(num_queries=-1), "num_queries=-1"),
    "levels": (dict(backbone="test_vit"), r"strides \(8, 16, 32\).*res4 \(16\).*build_pyramid"),
    "level": (dict(in_features=["res6"]), "in_features=.*res6.*'res5'"),
    "strides": (dict(in_features=["res3", "res5"]), r"strides \[8, 32\].*twice"),
    "dilated": (
        dict(backbone=lambda: TimmBackbone("resnet18", output_stride=16, out_indices=(2, 3, 4))),
        r"\(8, 16, 32\).*p4 \(16\)",
    ),
    "one": (dict(architecture="dab-detr", in_features=["res4", "res5"]), "takes one level"),
    "typo": (dict(config_kwargs={"decoder_layer": 2}), "'decoder_layer'.*'decoder_layers'"),
    "computed": (dict(config_kwargs={"num_labels": 2}), "'num_labels', which follows"),
    "value": (dict(config_kwargs={"decoder_layers": "x"}), "are refused: "),
    "no first stage": (
        dict(architecture="deformable_detr", config_kwargs={"two_stage": True}),
        "two_stage=True must be left out: transformers has no loss for the first stage",
    ),
    "counted once": (
        dict(architecture="dab-detr", config_kwargs={"cls_loss_coefficient": 2}),
        "cls_loss_coefficient=2 must be left out: transformers counts the class loss once",
    ),
    "masks": (dict(masks=True), "masks=True is of 'rf_detr' alone, not of 'rt_detr_v2'"),
    "no folder": (dict(pretrained_detector=str(TOOLS)), "no folder of a detector"),
}


@pytest.mark.parametrize(("kwargs", "sentence"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused_in_a_sentence(kwargs, sentence):
    kwargs = {k: v() if callable(v) else v for k, v in kwargs.items()}
    with pytest.raises(ValueError, match=sentence) as error:
        detector(**kwargs)
    assert "\n" not in str(error.value)


def test_a_detector_of_another_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "yolos"}')
    sentence = "pretrained_detector='.*' must be of a known architecture, and it is of 'yolos': "
    with pytest.raises(ValueError, match=sentence):
        detector(pretrained_detector=str(tmp_path))


def test_images_of_too_few_positions_are_refused():
    model = detector(num_queries=100)
    with pytest.raises(ValueError, match="64x64.*num_queries=100.*84"):
        model(batch((64, 64)))


def test_without_transformers_there_is_one_sentence(monkeypatch):
    backbone = TimmBackbone("test_resnet")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"transformers: pip install detbackbones\[detr\]"):
        detector(backbone=backbone)


def test_nothing_global_is_changed():
    """transformers' own model is built as before, with its own encoder."""
    mapping = set(transformers.CONFIG_MAPPING.keys())
    detector()
    assert set(transformers.CONFIG_MAPPING.keys()) == mapping
    config = AutoConfig.for_model(
        "rt_detr_v2",
        backbone_config=ResNetConfig(hidden_sizes=[8] * 3, depths=[1] * 3, out_indices=[1, 2, 3]),
        encoder_in_channels=[8] * 3,
    )
    encoder = AutoModelForObjectDetection.from_config(config).model.backbone
    assert type(encoder).__name__ == "RTDetrV2ConvEncoder"


def test_everything_of_a_pretrained_detector_is_loaded(tmp_path, caplog):
    caplog.set_level("INFO", "detbackbones")
    theirs = reference(tmp_path, "rt_detr_v2", "resnet18", [2, 3, 4], **channels("resnet18"))
    ours = detector(pretrained_detector=str(tmp_path), config_kwargs=None)
    state = theirs.state_dict()
    own = ours.detr.state_dict()
    assert f"loaded {len(own)} of the detector's {len(own)} tensors" in caplog.text
    assert all(torch.equal(own[key], state[key]) for key in own)
    key = "layer4.1.conv2.weight"
    assert torch.equal(
        ours.backbone.state_dict()[f"model.{key}"], state[f"model.backbone.model._backbone.{key}"]
    )
    assert ours.detr.config.decoder_layers == SMALL["decoder_layers"]


def test_weights_of_another_model_with_the_same_names_are_not_loaded(tmp_path, caplog):
    caplog.set_level("INFO", "detbackbones")
    reference(tmp_path, "rt_detr_v2", "resnet18", [2, 3, 4], **channels("resnet18"))
    backbone = TimmBackbone("resnetblur18")
    assert backbone.state_dict().keys() == TimmBackbone("resnet18").state_dict().keys()
    detector(backbone=backbone, pretrained_detector=str(tmp_path), config_kwargs=None)
    assert "none of the backbone's" in caplog.text


def test_other_classes_and_another_backbone_stay_as_they_are(tmp_path, caplog):
    caplog.set_level("INFO", "detbackbones")
    theirs = reference(tmp_path, "rt_detr_v2", "resnet18", [2, 3, 4], **channels("resnet18"))
    backbone = TimmBackbone("test_convnext")
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    ours = detector(
        backbone=backbone, num_classes=5, pretrained_detector=str(tmp_path), config_kwargs=None
    )
    assert "none of the backbone's" in caplog.text
    assert "(not class_embed.0, class_embed.1, " in caplog.text
    assert all(torch.equal(before[k], v) for k, v in backbone.state_dict().items())
    own, state = ours.detr.state_dict(), theirs.state_dict()
    same = [k for k in own if own[k].shape == state[k].shape]
    assert len(same) > 0.9 * len(own)
    assert all(torch.equal(own[k], state[k]) for k in same)
    assert ours.detr.class_embed[0].out_features == 5


def test_a_resnet_of_rt_detr_is_loaded_into_timms():
    torch.manual_seed(0)
    config = transformers.RTDetrResNetConfig(
        depths=[2, 2, 2, 2], layer_type="bottleneck", out_indices=[2, 3, 4]
    )
    theirs = randomise(transformers.RTDetrResNetBackbone(config)).eval()
    ours = TimmBackbone("resnet26d", out_features=["res3", "res4", "res5"]).eval()
    part, wanting = ours.load_source(timm_keys(theirs.state_dict()))
    counted = [key for key in ours.state_dict() if not key.endswith("num_batches_tracked")]
    assert not wanting and part.fitting == len(counted)
    assert timm_backbone_name(config) == "resnet26d"
    assert timm_backbone_name(transformers.RTDetrResNetConfig(layer_type="basic")) is None
    assert timm_backbone_name(TimmBackboneConfig(backbone="resnet18.a1_in1k")) == "resnet18"
    x = images(1, 3, 96, 128)
    with torch.no_grad():
        expected = theirs(x).feature_maps
        for got, wanted in zip(ours(x).values(), expected, strict=True):
            assert_close(got, wanted)


@pytest.mark.parametrize("name", [NOWHERE, "no/network"])
def test_a_detector_that_cannot_be_downloaded(name):
    with pytest.raises(ConnectionError, match=f"'{name}' could not be downloaded.*folder") as error:
        detector(pretrained_detector=name)
    assert "\n" not in str(error.value)


def test_pickled_weights_are_not_read(tmp_path):
    model = reference(tmp_path, "rt_detr_v2", "resnet18", [2, 3, 4], **channels("resnet18"))
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no folder of a detector"):
        detector(pretrained_detector=str(tmp_path), config_kwargs=None)


def test_another_architecture_than_that_of_the_weights(tmp_path):
    reference(tmp_path, "rt_detr_v2", "resnet18", [2, 3, 4], **channels("resnet18"))
    with pytest.raises(ValueError, match="'d_fine' is not that of .* 'rt_detr_v2'"):
        detector("d_fine", pretrained_detector=str(tmp_path), config_kwargs=None)


@pytest.mark.parametrize(
    ("architecture", "model_name"),
    [
        ("rt_detr_v2", "resnet18"),
        ("rt_detr_v2", "regnetx_002"),
        ("deformable_detr", "resnet18"),
        ("dab-detr", "convnext_atto"),
        ("dino", "resnet18"),
        ("deimv2", "resnet18"),
    ],
)
def test_transformers_loads_a_saved_detector(tmp_path, architecture, model_name):
    backbone = TimmBackbone(model_name, norm="FrozenBN", freeze_at=2)
    ours = detector(architecture, backbone, num_queries=400)
    randomise(ours.backbone)
    ours.save_pretrained(str(tmp_path / "saved"), class_names=["a", "b", "c"])
    theirs = AutoModelForObjectDetection.from_pretrained(tmp_path / "saved").eval()
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"}
    (image,) = inputs = batch((640, 640))
    padded = images_and_mask(ours.eval().preprocess_image(inputs))
    # in double precision, or queries that are chosen nearly alike change places
    dtype = torch.float64 if architecture in HYBRID else torch.float32
    exact = padded | {"pixel_values": padded["pixel_values"].to(dtype)}
    with torch.no_grad():
        got, expected = theirs.to(dtype)(**exact), ours.to(dtype).detr(**exact)
    assert_close(got.logits, expected.logits)
    assert_close(got.pred_boxes, expected.pred_boxes)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "saved")
    if architecture == "rt_detr_v2":
        pixels = processor(images=image["image"], return_tensors="pt")["pixel_values"]
        assert (pixels - padded["pixel_values"]).abs().max() < 1e-4


def test_what_transformers_cannot_build_is_not_saved(tmp_path):
    folder = str(tmp_path / "saved")
    for architecture in VITS:
        with pytest.raises(ValueError, match="on its own ViT alone"):
            detector(architecture).save_pretrained(folder)
    for backbone in (BACKBONES["torchvision"](), BACKBONES["vit"]()):
        with pytest.raises(ValueError, match="stages of timm's models"):
            detector(backbone=backbone).save_pretrained(folder)
    narrow = TimmBackbone("resnet18", model_kwargs={"channels": [8, 16, 32, 64]})
    with pytest.raises(ValueError, match="'resnet18' cannot be saved"):
        detector(backbone=narrow).save_pretrained(folder)
    # in Deformable DETR, transformers freezes batch norm and loses the activation with it
    with pytest.raises(ValueError, match="'regnetx_002' cannot be saved.*other feature maps"):
        detector("deformable_detr", "regnetx_002").save_pretrained(folder)
    with pytest.raises(ValueError, match="2 names for 3 classes"):
        detector().save_pretrained(folder, class_names=["a", "b"])
    (tmp_path / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="holds files"):
        detector().save_pretrained(str(tmp_path))
    assert not (tmp_path / "saved").exists()


def test_yacs():
    cfg = get_cfg()
    add_backbone_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "TransformersDetector"
    cfg.MODEL.BACKBONE.NAME = "TimmBackbone"
    cfg.MODEL.TIMM.MODEL_NAME = "test_resnet"
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.DETR.NUM_CLASSES = 4
    cfg.MODEL.DETR.NUM_QUERIES = 12
    model = build_model(cfg)
    assert (model.architecture, model.num_classes) == ("rt_detr_v2", 4)
    assert model.detr.config.num_queries == 12
    assert all(loss.isfinite() for loss in model(batch((64, 96))).values())


@pytest.mark.parametrize("architecture", EVERY)
def test_mixed_precision(architecture):
    model, inputs = detector(architecture), batch((96, 128))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(inputs)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = model.eval()(inputs)[0]["instances"]
    assert found.scores.dtype == found.pred_boxes.tensor.dtype == torch.float32


@pytest.mark.parametrize("architecture", EVERY)
def test_boxes_have_the_precision_of_floats_under_autocast(architecture, monkeypatch):
    model, inputs, seen = detector(architecture), batch((96, 128)), []
    if architecture in HYBRID:
        inner = model.detr.model
        make = inner.generate_anchors
        monkeypatch.setattr(
            inner,
            "generate_anchors",
            lambda *a, **k: seen.append(make(*a, **k)[0]) or make(*a, **k),
        )
    run = model.detr.forward
    monkeypatch.setattr(
        model.detr, "forward", lambda **k: seen.append((out := run(**k)).pred_boxes) or out
    )
    with torch.autocast("cpu", torch.bfloat16):
        model(inputs)
    assert len(seen) == 1 + (architecture in HYBRID)
    assert {x.dtype for x in seen} == {torch.float32}


@pytest.mark.parametrize("architecture", EVERY)
def test_it_starts_with_weights_that_learn(architecture):
    model = detector(architecture)
    for name, module in model.detr.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.weight.min() == module.weight.max() == 1, name
        elif isinstance(module, torch.nn.Conv2d):  # torch's default or Xavier's
            fan_in, fan_out = module.weight[0].numel(), module.weight[:, 0].numel()
            std = module.weight.std()
            assert min((1 / 3 / fan_in) ** 0.5, (2 / (fan_in + fan_out)) ** 0.5) * 0.8 < std, name
    outputs = {}
    model.detr.register_forward_hook(lambda m, args, out: outputs.update(out))
    model.eval()(batch((96, 128)))
    if architecture == "detr":
        assert outputs["logits"].softmax(-1).max() < 0.9
    else:  # the prior of the focal loss, 1 %
        assert 0.003 < outputs["logits"].sigmoid().median() < 0.03
    if ARCHITECTURES[model.architecture].two_stage or architecture in VITS:
        # nothing is added to the anchors: squares in pixels or in fractions of the image
        width, height = outputs["pred_boxes"][..., 2:].unbind(-1)
        ratio = (width / height).log2()
        assert all(r == pytest.approx(0, abs=1e-3) for r in ratio.flatten().tolist()) or all(
            r == pytest.approx(-math.log2(128 / 96), abs=0.05) for r in ratio.flatten().tolist()
        )


def test_learned_positions_start_as_transformers_has_them():
    """From 0 to 1, as at DETR's authors, and not as other embeddings do."""
    model = detector("detr", config_kwargs=SMALL | {"position_embedding_type": "learned"})
    weights = [v for k, v in model.state_dict().items() if "row_embeddings" in k]
    assert weights and all(0 <= weight.min() < weight.max() <= 1 for weight in weights)


def test_a_setting_that_says_no_is_none():
    one_stage = {"two_stage": False} | SMALL
    assert not detector("deformable_detr", config_kwargs=one_stage).detr.config.two_stage


@pytest.mark.parametrize("architecture", EVERY)
def test_grad_checkpointing_gives_the_same_gradients(architecture):
    if architecture in HYBRID:
        with pytest.raises(ValueError, match="grad_checkpointing=True must be left out for"):
            detector(architecture, grad_checkpointing=True)
        return
    assert_checkpoints(lambda switch: detector(architecture, grad_checkpointing=switch), batch)


def test_the_encoder_is_not_a_second_copy_of_the_backbone():
    model = detector()
    name = encoder_name(model.detr)
    assert not list(model.detr.get_submodule(name).parameters())
    total = sum(p.numel() for p in model.parameters())
    parts = (model.backbone, model.detr)
    assert total == sum(p.numel() for part in parts for p in part.parameters())
    assert math.isclose(sum(p.numel() for p in model.backbone.parameters()), 11.2e6, rel_tol=0.01)
