"""The catalogue: AutoTimm's names do what AutoTimm's users know, and the lists are right."""

import huggingface_hub
import pytest
import timm
import torch
import torchvision
from detbackbones import catalog as at
from detbackbones.catalog.autotimm import BackboneConfig, FeatureBackboneConfig
from detbackbones.catalog.listing import ModelSource

SWIN = "swin_tiny_patch4_window7_224"


@pytest.fixture
def offline(monkeypatch):
    """Let names alone, for which AutoTimm loads pretrained weights, do without them."""
    for config in (BackboneConfig, FeatureBackboneConfig):
        name, _, *others = config.__init__.__defaults__
        monkeypatch.setattr(config.__init__, "__defaults__", (name, False, *others))


def on_meta(create, cfg, *shape):
    """What a backbone gives for an image, without memory or arithmetic."""
    with torch.device("meta"):
        backbone = create(cfg).eval()
        return backbone, backbone(torch.empty(shape))


def test_configs_have_the_defaults_of_autotimm():
    both = {"pretrained": True, "drop_rate": 0.0, "drop_path_rate": 0.0, "extra_kwargs": {}}
    assert vars(BackboneConfig()) == {**both, "model_name": "resnet50", "num_classes": 0}
    features = {"model_name": "resnet50", "out_indices": (1, 2, 3, 4)}
    assert vars(FeatureBackboneConfig()) == {**both, **features}


@pytest.mark.parametrize(
    "name, features",
    [
        ("resnet50", 2048),
        ("vit_base_patch16_224", 768),
        ("efficientnet_b3", 1536),
        ("convnext_tiny", 768),
        (SWIN, 768),
        ("mobilenetv3_large_100", 1280),  # its num_features are 960
        ("vgg11", 4096),  # has no drop_path_rate
    ],
)
def test_create_backbone_gives_pooled_features(name, features, offline):
    backbone, output = on_meta(at.create_backbone, name, 2, 3, 224, 224)
    assert output.shape == (2, features)
    assert at.get_backbone_out_features(backbone) == features


def test_the_head_can_be_taken_off_and_the_features_had_without_pooling():
    cfg = BackboneConfig("resnet50", pretrained=False, extra_kwargs={"global_pool": ""})
    backbone, output = on_meta(at.create_backbone, cfg, 1, 3, 224, 224)
    assert output.shape == (1, 2048, 7, 7)

    cfg = BackboneConfig("resnet50", pretrained=False, num_classes=10)
    backbone, output = on_meta(at.create_backbone, cfg, 1, 3, 224, 224)
    assert output.shape == (1, 10)
    image = torch.empty(1, 3, 224, 224, device="meta")
    assert backbone.forward_features(image).shape == (1, 2048, 7, 7)
    backbone.reset_classifier(0, "")
    assert backbone(image).shape == (1, 2048, 7, 7)


def test_drop_rates_reach_the_model():
    with torch.device("meta"):
        none = at.create_backbone(BackboneConfig(SWIN, pretrained=False))
        some = at.create_backbone(
            BackboneConfig(SWIN, pretrained=False, drop_rate=0.3, drop_path_rate=0.2)
        )
    assert isinstance(none.layers[-1].blocks[-1].drop_path1, torch.nn.Identity)  # timm's: 0.1
    assert some.layers[-1].blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    assert some.head.drop.p == 0.3
    with pytest.raises(ValueError, match="vgg11.*drop_path_rate"):
        at.create_backbone(BackboneConfig("vgg11", pretrained=False, drop_path_rate=0.1))


def features(name, **kwargs):
    return FeatureBackboneConfig(name, pretrained=False, **kwargs)


@pytest.mark.parametrize(
    "cfg, side, channels, strides",
    [
        (features("resnet50", out_indices=(2, 3, 4)), 224, [512, 1024, 2048], [8, 16, 32]),
        (features("resnet50", out_indices=[4, 2]), 224, [512, 2048], [8, 32]),
        ("resnet50", 224, [256, 512, 1024, 2048], [4, 8, 16, 32]),
        ("convnext_tiny", 224, [96, 192, 384, 768], [4, 8, 16, 32]),
        (features("convnext_tiny"), 224, [96, 192, 384, 768], [4, 8, 16, 32]),
        (SWIN, 320, [96, 192, 384, 768], [4, 8, 16, 32]),
        (features(SWIN, out_indices=(1, 2, 3)), 224, [192, 384, 768], [8, 16, 32]),
        ("vgg11", 224, [256, 512, 512, 512], [4, 8, 16, 32]),
        ("vit_tiny_patch16_224", 320, [192] * 12, [16] * 12),
        (features("vit_tiny_patch16_224"), 224, [192] * 4, [16] * 4),
        (
            features("ecaresnet101d", out_indices=(2, 4), extra_kwargs={"output_stride": 8}),
            320,
            [512, 2048],
            [8, 8],
        ),
    ],
)
def test_create_feature_backbone_gives_a_map_a_level(cfg, side, channels, strides, offline):
    backbone, maps = on_meta(at.create_feature_backbone, cfg, 1, 3, side, side)
    shapes = [(1, c, side // s, side // s) for c, s in zip(channels, strides)]
    assert isinstance(maps, list)
    assert [level.shape for level in maps] == shapes
    assert at.get_feature_channels(backbone) == channels
    assert at.get_feature_strides(backbone) == strides
    info = at.get_feature_info(backbone)
    assert [(level["num_chs"], level["reduction"]) for level in info] == [*zip(channels, strides)]
    assert all(level["module"] for level in info)


def test_maps_are_those_of_timm():
    source = timm.create_model("test_resnet", features_only=True, out_indices=(1, 3)).eval()
    backbone = at.create_feature_backbone(
        features("test_resnet", out_indices=(1, 3), extra_kwargs={"in_chans": 3})
    ).eval()
    backbone.backbone.load_source(source.state_dict())
    image = torch.randn(1, 3, 64, 96)
    for ours, theirs in zip(backbone(image), source(image), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert at.get_feature_channels(source) == at.get_feature_channels(backbone)


def test_other_channels_of_the_images():
    cfg = features("test_resnet", extra_kwargs={"in_chans": 1})
    _, maps = on_meta(at.create_feature_backbone, cfg, 1, 1, 64, 64)
    assert len(maps) == 4


@pytest.mark.parametrize(
    "function", [at.get_feature_info, at.get_feature_channels, at.get_feature_strides]
)
def test_a_model_without_feature_maps_has_no_levels(function):
    with pytest.raises(AttributeError, match="ResNet has no feature_info: create_feature"):
        function(timm.create_model("test_resnet"))


def test_what_gives_no_pooled_features_has_no_number_of_them():
    with pytest.raises(AttributeError, match="FeatureMaps has no num_features: create_backbone"):
        at.get_backbone_out_features(at.create_feature_backbone(features("test_resnet")))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: at.create_backbone("ResNet50"), "'ResNet50' is no timm model: .*'resnet50'"),
        (lambda: at.create_backbone("resnet51"), "'resnet51' is no timm model: .*'resnet50'"),
        (lambda: at.create_feature_backbone("convnext_tny"), "no timm model: .*'convnext_tiny'"),
        (
            lambda: at.create_feature_backbone(features("resnet18", out_indices=(2, 9))),
            r"out_indices=\[2, 9\] must be different levels of resnet18, 0 to 4",
        ),
        (lambda: at.list_backbones(source="timn"), "source='timn' is unknown: .*'timm'"),
        (
            lambda: at.create_feature_backbone(features("resnet18", out_indices=3)),
            "out_indices=3 must be a list of whole numbers",
        ),
        (lambda: at.create_backbone("alexnet"), "'alexnet' is no timm model: .*Torchvision"),
        (lambda: at.get_model_source("resnet51"), "model_name='resnet51' is unknown: .*'resnet50'"),
        (lambda: at.list_backbones(necks={"pan"}), "necks='pan' is unknown: .*'fpn', 'sfp'"),
        (lambda: at.list_backbones(necks="pan"), "necks='pan' is unknown: .*'fpn', 'sfp'"),
        (lambda: at.list_backbones(stride=3), "stride=3 is unknown: valid are 4, 8, 14, 16, 32"),
        (lambda: at.list_backbones(max_params=30), "max_params=30 fits no model: the smallest has"),
        (lambda: at.list_backbones(max_gmacs=-1), "max_gmacs=-1 fits no model: the smallest has"),
    ],
)
def test_what_is_wrong_is_refused_with_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_names_that_timm_does_not_list_any_more():
    assert at.get_model_source("convnext_tiny_in22ft1k") == ModelSource.TIMM


def test_lists_without_filters_are_those_of_the_libraries():
    names = at.list_backbones()
    assert names == timm.list_models()
    assert at.list_backbones("*efficientnet*") == timm.list_models("*efficientnet*")
    assert "vit_base_patch16_224.augreg_in21k" in at.list_backbones("vit_*in21k*", True)
    assert at.list_backbones("no such name") == []
    assert at.list_backbones("resnet18", with_source=True) == [("resnet18", ModelSource.TIMM)]
    ours = at.list_backbones("*resnet50*", source="torchvision", with_source=True)
    assert ("wide_resnet50_2", "torchvision") in ours
    assert len(at.list_backbones(source="torchvision")) == len(
        torchvision.models.list_models(module=torchvision.models)
    )


@pytest.mark.parametrize(
    "filters, has, has_not",
    [
        ({"max_params": 12e6}, ["resnet18"], ["resnet50"]),
        ({"max_gmacs": 0.5}, ["efficientnet_b0", "mobilenetv3_large_100"], ["resnet18"]),
        ({"stride": 4}, ["resnet50", SWIN], ["vit_tiny_patch16_224", "levit_128"]),
        ({"stride": 14}, ["vit_small_patch14_dinov2"], ["vit_tiny_patch16_224"]),
        ({"necks": {"sfp"}}, ["vit_tiny_patch16_224"], ["resnet50"]),
        ({"necks": "sfp"}, ["vit_tiny_patch16_224"], ["resnet50"]),
        ({"necks": {"fpn", "sfp"}}, ["vit_tiny_patch16_224", "resnet50"], []),
        ({"necks": {"fpn"}, "max_gmacs": 2}, ["resnet18", "levit_128"], ["resnet50", SWIN]),
        ({"pretrained_only": True, "stride": 4}, ["resnet18.a1_in1k"], ["resnet18"]),
        ({"source": "torchvision", "max_params": 12e6}, ["resnet18"], ["resnet50", "vit_b_16"]),
        ({"source": "torchvision", "necks": {"sfp"}}, ["vit_b_16"], ["vit_h_14", "resnet18"]),
    ],
)
def test_filters(filters, has, has_not):
    names = at.list_backbones(**filters)
    assert set(has) <= set(names)
    assert not set(has_not) & set(names)
    assert all(name in names for name in at.list_backbones("*resnet*", **filters))


@pytest.mark.parametrize(
    "name, source",
    [
        ("resnet50", ModelSource.TIMM),
        ("resnet50.a1_in1k", "timm"),
        ("alexnet", "torchvision"),
        ("hf-hub:timm/resnet50.a1_in1k", ModelSource.HF_HUB),
        ("hf_hub:timm/resnet50.a1_in1k", "hf_hub"),
        ("timm/vit_base_patch16_224", ModelSource.HF_HUB),
    ],
)
def test_get_model_source(name, source):
    assert at.get_model_source(name) == source


def test_hub_names_can_be_listed(monkeypatch):
    asked = {}

    def list_models(self, **kwargs):
        asked.update(kwargs)
        names = ["timm/resnet50.a1_in1k", "timm/resnet18.a1_in1k"]
        return iter([huggingface_hub.ModelInfo(id=name) for name in names])

    monkeypatch.setattr(huggingface_hub.HfApi, "list_models", list_models)
    names = at.list_hf_hub_backbones(model_name="resnet", limit=2)
    assert names == ["hf-hub:timm/resnet50.a1_in1k", "hf-hub:timm/resnet18.a1_in1k"]
    assert {"author": "timm", "search": "resnet", "limit": 2}.items() <= asked.items()
    pairs = at.list_hf_hub_backbones(with_source=True)
    assert pairs == [(name, ModelSource.HF_HUB) for name in names]


def test_the_hub_does_not_answer(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RuntimeError, match="hub does not answer .*without a network"):
        at.list_hf_hub_backbones()
    for name in ("timm/resnet51", "hf_hub:timm/resnet51", "hf-hub:timm/resnet51"):
        with pytest.raises(ConnectionError, match="'hf-hub:timm/resnet51' could not be downloaded"):
            at.create_backbone(name)


def test_snippets_of_autotimms_documentation(offline):
    resnet = at.list_backbones("*resnet*")
    assert len(at.list_backbones()) > 1000 and "resnet50" in resnet
    with torch.device("meta"):
        backbone = at.create_backbone("resnet50")
        assert f"Output features: {backbone.num_features}" == "Output features: 2048"
        assert f"Total parameters: {at.count_parameters(backbone):,}".endswith("23,508,032")
        assert at.count_parameters(backbone.requires_grad_(False)) == 0
        assert at.count_parameters(backbone, trainable_only=False) == 23_508_032

        cfg = BackboneConfig(
            model_name="efficientnet_b3", extra_kwargs={"global_pool": "avg", "in_chans": 3}
        )
        assert at.create_backbone(cfg)(torch.empty(1, 3, 64, 64)).shape == (1, 1536)

        cfg = FeatureBackboneConfig(
            model_name=SWIN, out_indices=(1, 2, 3), drop_rate=0.1, drop_path_rate=0.1
        )
        assert at.get_feature_strides(at.create_feature_backbone(cfg)) == [8, 16, 32]
