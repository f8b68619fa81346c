"""The spatial tuning adapter: transformers' own, on the maps of any plain ViT."""

from types import SimpleNamespace

import pytest
import torch
from detbackbones import SpatialTuningAdapter, TimmBackbone, build_pyramid, get_config
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances
from support import assert_close
from torch import nn

TINY = {"depth": 4}


def _vit(name="vit_tiny_patch16_224", indices=(1, 2, 3), **options):
    return TimmBackbone(name, out_indices=list(indices), model_kwargs=TINY, **options)


def test_it_is_what_transformers_computes():
    transformers = pytest.importorskip("transformers")
    from transformers.models.deimv2 import modeling_deimv2 as deimv2

    torch.manual_seed(0)
    ours = SpatialTuningAdapter(_vit(), 64, branch_channels=8).eval()
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    vit = transformers.DINOv3ViTConfig(
        hidden_size=192, num_hidden_layers=1, num_attention_heads=3, patch_size=16
    )
    config = transformers.Deimv2Config(
        backbone_config=vit, spatial_tuning_adapter_inplanes=8, encoder_hidden_dim=64
    )
    theirs = deimv2.Deimv2DINOv3ConvEncoder(config).eval()
    adapter = theirs.spatial_tuning_adapter
    layers = [adapter.stem_conv, adapter.conv2, adapter.conv3, adapter.conv4, *theirs.fusion_proj]
    for own, other in zip([ours.stem[0], *ours.branch, *ours.fusion], layers, strict=True):
        other.conv.weight.data.copy_(own.weight)
        other.norm.load_state_dict(own.norm.state_dict())
    images = torch.randn(2, 3, 96, 160)
    with torch.no_grad():
        maps = [*ours.net(images).values()]
        theirs.backbone = nn.Module()  # ours has given its maps
        theirs.backbone.config = SimpleNamespace(patch_size=16)
        theirs.backbone.forward = lambda *_, **__: SimpleNamespace(feature_maps=maps)
        expected, levels = theirs(images), ours(images)
    assert list(levels) == ["res3", "res4", "res5"]
    for level, other in zip(levels.values(), expected, strict=True):
        assert_close(level, other)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_tiny_patch16_224", (80, 112)),
        ("vit_small_patch14_reg4_dinov2", (84, 126)),  # registers, and a patch of 14
        ("eva02_tiny_patch14_224", (84, 126)),
        ("vit_small_patch16_dinov3", (80, 112)),
        ("vit_small_patch8_224", (80, 112)),
        ("deit_tiny_distilled_patch16_224", (80, 112)),
    ],
)
def test_any_plain_vit_has_three_levels(name, size):
    adapter = SpatialTuningAdapter(_vit(name), 32)
    levels = adapter(torch.rand(2, 3, *size))
    shapes = adapter.output_shape()
    assert [shape.stride for shape in shapes.values()] == [8, 16, 32]
    for level, shape in zip(levels.values(), shapes.values(), strict=True):
        assert level.shape == (2, 32, *(-(-length // shape.stride) for length in size))
    sum(level.sum() for level in levels.values()).backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_each_level_sees_the_map_of_its_depth():
    adapter = SpatialTuningAdapter(_vit(), 8).eval()
    images = torch.rand(1, 3, 64, 64)
    maps = {name: value.detach() for name, value in adapter.net(images).items()}
    for changed, level in zip(maps, adapter.output_shape()):
        adapter.net.forward = lambda _: maps
        with torch.no_grad():
            before = adapter(images)
            adapter.net.forward = lambda _, c=changed: {**maps, c: maps[c] + 1}
            after = adapter(images)
        differ = [name for name in before if not torch.equal(before[name], after[name])]
        assert differ == [level]


def test_one_map_gives_all_levels_and_a_pyramid_stands_on_them():
    adapter = SpatialTuningAdapter(_vit(indices=[3]), 32, branch_channels=32, norm="GN")
    assert adapter.size_divisibility == 32
    pyramid = build_pyramid(adapter, 16)
    levels = pyramid(torch.rand(1, 3, 64, 96))
    assert [tuple(level.shape[-2:]) for level in levels.values()][:4] == [
        (16, 24),
        (8, 12),
        (4, 6),
        (2, 3),
    ]


def test_a_detr_learns_with_it():
    pytest.importorskip("transformers")
    model = get_config("finetune/rt_detr.py").model
    model.update(num_classes=2, num_queries=10)
    vit = L(TimmBackbone)(
        model_name="vit_tiny_patch16_224", out_indices=[1, 2, 3], model_kwargs=TINY
    )
    model.backbone = L(SpatialTuningAdapter)(net=vit, out_channels=64)
    model.pixel_mean = model.pixel_std = [127.5] * 3
    model = instantiate(model).train()
    truth = Instances((96, 96), gt_boxes=Boxes(torch.tensor([[5.0, 5, 60, 70]])))
    truth.gt_classes = torch.tensor([1])
    images = [{"image": torch.rand(3, 96, 96) * 255, "instances": truth} for _ in range(2)]
    sum(model(images).values()).backward()
    assert all(p.grad is not None for p in model.backbone.parameters())


@pytest.mark.parametrize(
    ("net", "options", "said"),
    [
        (lambda: _vit(indices=[2, 3]), {}, "in_features must be one or three levels of one stride"),
        (lambda: TimmBackbone("resnet18"), {}, "res2 of stride 4, res3 of stride 8"),
        (_vit, {"out_channels": 0}, "out_channels=0 must be a whole number from 1"),
        (_vit, {"in_features": ["p1", "p9"]}, "p9"),
    ],
)
def test_what_it_cannot_stand_on(net, options, said):
    with pytest.raises(ValueError, match=said):
        SpatialTuningAdapter(net(), **options)
