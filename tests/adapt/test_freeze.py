"""freeze_at freezes what runs before the end of a level: all of it, and nothing after."""

import copy

import pytest
import timm
import torch
import torchvision
from detbackbones import TimmBackbone, TorchvisionBackbone
from support import images, trainable
from timm.layers import DropPath


def numbered(template, first, last):
    return " ".join(template.format(i) for i in range(first, last + 1))


RESNET = ["conv1. bn1.", "layer1.", "layer2.", "layer3.", "layer4."]
DENSENET = [
    "features.conv0. features.norm0.",
    "features.denseblock1.",
    "features.transition1. features.denseblock2.",
    "features.transition2. features.denseblock3.",
    "features.transition3. features.denseblock4. features.norm5.",
]
VGG = [
    numbered("features.{}.", 0, 6),
    numbered("features.{}.", 7, 13),
    numbered("features.{}.", 14, 20),
    numbered("features.{}.", 21, 27),
    "",
]
TIMM_MOBILE = [
    "conv_stem. bn1. blocks.0.",
    "blocks.1.",
    "blocks.2.",
    "blocks.3. blocks.4.",
    "blocks.5. blocks.6.",
]
PAIRS = ["features.0.", "features.1."] + [numbered("features.{}.", i, i + 1) for i in (2, 4, 6)]

# What freeze_at 1, 2, ... 5 adds to what is frozen.
TIMM = {
    "resnet18": RESNET,
    "regnety_002": ["stem.", "s1.", "s2.", "s3.", "s4."],
    "efficientnet_b0": TIMM_MOBILE,
    "mobilenetv3_large_100": TIMM_MOBILE,
    "convnext_atto": ["stem.", "stages.0.", "stages.1.", "stages.2.", "stages.3."],
    "densenet121": DENSENET,
    "vgg11_bn": VGG,
    "swin_tiny_patch4_window7_224": [
        "patch_embed.",
        *(f"layers.{i}." for i in range(4)),
    ],
    "vit_tiny_patch16_224": ["cls_token pos_embed patch_embed.", "", "", "blocks.", ""],
}
TORCHVISION = {
    "resnet18": RESNET,
    "regnet_y_400mf": ["stem.", *(f"trunk_output.block{i}." for i in range(1, 5))],
    "efficientnet_b0": [
        numbered("features.{}.", 0, 1),
        "features.2.",
        "features.3.",
        numbered("features.{}.", 4, 5),
        numbered("features.{}.", 6, 8),
    ],
    "mobilenet_v3_large": [
        numbered("features.{}.", 0, 1),
        numbered("features.{}.", 2, 3),
        numbered("features.{}.", 4, 6),
        numbered("features.{}.", 7, 12),
        numbered("features.{}.", 13, 16),
    ],
    "convnext_tiny": PAIRS,
    "swin_t": [*PAIRS[:4], PAIRS[4] + " norm."],
}
CASES = [(TimmBackbone, name) for name in TIMM] + [(TorchvisionBackbone, n) for n in TORCHVISION]


def parameters_of_source(backbone_class, name):
    if backbone_class is TimmBackbone:
        with torch.device("meta"):
            return {key for key, _ in timm.create_model(name).named_parameters()}
    return {key for key, _ in torchvision.models.get_model(name).named_parameters()}


@pytest.mark.parametrize("backbone_class, name", CASES)
def test_exact_sets(backbone_class, name):
    steps = (TIMM if backbone_class is TimmBackbone else TORCHVISION)[name]
    parameters = parameters_of_source(backbone_class, name)
    whole = backbone_class(name)
    assert trainable(whole) == {k for k in parameters if f"model.{k}" in whole.state_dict()}
    for freeze_at in range(1, 6):
        frozen = tuple(" ".join(steps[:freeze_at]).split())
        expected = {key for key in trainable(whole) if not key.startswith(frozen)}
        assert trainable(backbone_class(name, freeze_at=freeze_at)) == expected
    assert not expected


@pytest.mark.parametrize(
    "backbone",
    [
        lambda: TimmBackbone("resnet18", freeze_at=3, out_features=["res4"]),
        lambda: TimmBackbone("resnet18", freeze_at=3, out_indices=(1, 3)),
        lambda: TorchvisionBackbone("resnet18", freeze_at=3, out_features=["res2", "res4"]),
        lambda: TorchvisionBackbone(
            "resnet18", freeze_at=3, return_nodes={"layer1": "a", "layer3.0": "b", "layer3": "c"}
        ),
    ],
)
def test_subsets_of_the_levels(backbone):
    names = trainable(backbone())
    assert names and all(name.startswith("layer3.") for name in names)


@pytest.mark.parametrize(
    "backbone_class, name",
    [
        (TimmBackbone, "resnet18"),
        (TimmBackbone, "efficientnet_b0"),
        (TimmBackbone, "densenet121"),
        (TorchvisionBackbone, "resnet18"),
        (TorchvisionBackbone, "mobilenet_v3_large"),
    ],
)
def test_batch_norm_of_the_prefix_is_fixed(backbone_class, name):
    steps = (TIMM if backbone_class is TimmBackbone else TORCHVISION)[name]
    backbone = backbone_class(name, freeze_at=2).train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone(images(2, 3, 64, 64))
    means = {key for key in before if key.endswith("running_mean")}
    frozen = {
        k for k in means if k.startswith(tuple("model." + s for s in " ".join(steps[:2]).split()))
    }
    changed = {key for key in means if not torch.equal(before[key], backbone.state_dict()[key])}
    assert frozen and changed == means - frozen


@pytest.mark.parametrize(
    "backbone, kind",
    [
        (
            lambda: TimmBackbone("convnext_atto", freeze_at=3, drop_path_rate=0.5),
            DropPath,
        ),
        (
            lambda: TorchvisionBackbone(
                "convnext_tiny", freeze_at=3, model_kwargs={"stochastic_depth_prob": 0.5}
            ),
            torchvision.ops.StochasticDepth,
        ),
    ],
)
def test_drop_path_of_the_prefix_is_off(backbone, kind):
    backbone = backbone()
    backbone.eval()
    backbone.train()
    drops = [module.training for module in backbone.modules() if isinstance(module, kind)]
    assert drops == sorted(drops) and set(drops) == {False, True}
    x = images(4, 3, 32, 32)
    first, second = backbone(x), backbone(x)
    assert torch.equal(first["res3"], second["res3"])
    assert not torch.equal(first["res4"], second["res4"])


def test_dropout_of_the_prefix_is_off():
    rates = {"proj_drop_rate": 0.5, "pos_drop_rate": 0.5}
    x = images(2, 3, 32, 32)
    for freeze_at, same in ((0, False), (4, True)):
        backbone = TimmBackbone("vit_tiny_patch16_224", freeze_at=freeze_at, model_kwargs=rates)
        assert torch.equal(backbone(x)["res4"], backbone(x)["res4"]) is same


@pytest.mark.parametrize(
    "name, rates",
    [
        ("densenet121", {"drop_rate": 0.5}),
        ("swin_t", {"attention_dropout": 0.5}),
    ],
)
@pytest.mark.parametrize("keeps", ["eval mode", "copy"])
def test_dropout_that_is_a_function(name, rates, keeps):
    backbone = TorchvisionBackbone(name, freeze_at=3, model_kwargs=rates)
    if keeps == "copy":
        backbone = copy.deepcopy(backbone)
    x = images(2, 3, 64, 64)
    for train, same in ((False, True), (True, False)):
        backbone.train(train)
        first, second = backbone(x), backbone(x)
        assert torch.equal(first["res3"], second["res3"])
        assert torch.equal(first["res4"], second["res4"]) is same


@pytest.mark.parametrize("backbone_class, name", CASES)
def test_the_prefix_runs_without_autograd(backbone_class, name):
    for freeze_at in (2, 3):
        backbone = backbone_class(name, freeze_at=freeze_at).train()
        for level, output in backbone(images(2, 3, 64, 64)).items():
            assert output.requires_grad is (int(level[3:]) > freeze_at)


@pytest.mark.parametrize(
    "backbone",
    [
        lambda: TimmBackbone("resnet18", freeze_at=5),
        lambda: TimmBackbone("vit_tiny_patch16_224", freeze_at=5),
        lambda: TimmBackbone("resnet18", freeze_at=5, layers=["layer1.0.conv1", "layer2.0"]),
        lambda: TorchvisionBackbone("resnet18", freeze_at=5),
        lambda: TorchvisionBackbone("vit_b_16", freeze_at=5),
    ],
)
def test_a_wholly_frozen_backbone_stays_in_eval_mode(backbone):
    backbone = backbone().train()
    assert backbone.training
    assert not any(module.training for module in backbone.model.modules())
    assert not any(p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize("backbone_class", [TimmBackbone, TorchvisionBackbone])
@pytest.mark.parametrize("freeze_at", [6, -1, "2", None, 1.5])
def test_out_of_range(backbone_class, freeze_at):
    with pytest.raises(ValueError, match=f"freeze_at={freeze_at!r} is out of range: .* 0 .* 5"):
        backbone_class("resnet18", freeze_at=freeze_at)
