"""Parameter groups: the learning rate and the weight decay of every parameter, and nothing else."""

import copy
import logging

import pytest
import timm
import torch
from detbackbones import (
    FeatureBackbone,
    TimmBackbone,
    TorchvisionBackbone,
    build_pyramid,
    get_config,
)
from detbackbones.training.depths import depths_by_execution, parameter_depths
from detbackbones.training.optim import param_groups
from detectron2.config import instantiate
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from fvcore.common.param_scheduler import CosineParamScheduler
from support import images, trainable
from timm.optim import param_groups_layer_decay
from torch import nn


def on_meta(backbone_class, *args, **kwargs):
    with torch.device("meta"):
        return backbone_class(*args, **kwargs)


def by_name(model, groups):
    """Name of each parameter in the groups to its (lr, weight decay); each is there once."""
    values = {}
    for group in groups:
        assert group.keys() == {"params", "lr", "weight_decay"}
        for parameter in group["params"]:
            assert id(parameter) not in values
            values[id(parameter)] = group["lr"], group["weight_decay"]
    assert len({(g["lr"], g["weight_decay"]) for g in groups}) == len(groups)
    names = {name: values[id(p)] for name, p in model.named_parameters() if id(p) in values}
    assert len(names) == len(values)
    return names


def source_names(model):
    """Name of each parameter to that in the state dict, which has the names of the source."""
    names = {id(p): key for key, p in model.state_dict(keep_vars=True).items()}
    return {key: names[id(p)].removeprefix("model.") for key, p in model.named_parameters()}


# The depths of the first and the last parameter that is used.
TIMM = {
    "vit_tiny_patch16_224": (13, 1),
    "deit_tiny_distilled_patch16_224": (13, 1),
    "convnext_atto": (13, 1),
    "swin_tiny_patch4_window7_224": (13, 1),
    "resnet50": (17, 1),
    "efficientnet_b0": (17, 1),
    "mobilenetv3_small_100": (13, 1),
    "regnety_002": (14, 1),
    "maxvit_pico_rw_256": (5, 1),
    "eva02_tiny_patch14_224": (13, 1),
    "nf_resnet26": (9, 1),
}


@pytest.mark.parametrize("name", TIMM)
def test_learning_rates_are_those_of_timm(name):
    backbone = on_meta(TimmBackbone, name)
    with torch.device("meta"):
        model = timm.create_model(name)
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    scales = {key: scales[id(p)] for key, p in model.named_parameters()}

    found = by_name(backbone, param_groups(backbone, 0.25, weight_decay=0.1, layer_decay=0.5))
    assert len(found) == len(list(backbone.parameters()))
    names = source_names(backbone)
    for key, (lr, _) in found.items():
        assert lr == 0.25 * scales[names[key]], key
    first, last = TIMM[name]
    lrs = [found[key][0] for key in backbone.execution_order]
    assert lrs[-1] == 0.25 * 0.5**last
    assert first is None or lrs[0] == 0.25 * 0.5**first


def test_learning_rates_of_a_vit_are_those_of_detectron2():
    backbone = on_meta(TimmBackbone, "vit_tiny_patch16_224")
    groups = param_groups(backbone, 1.0, weight_decay=0.1, layer_decay=0.7)
    checked = 0
    for key, (lr, _) in by_name(backbone, groups).items():
        if "cls_token" not in key:  # which detectron2's ViT has not
            expected = get_vit_lr_decay_rate(f"backbone.net.{key}", 0.7, num_layers=12)
            assert lr == pytest.approx(expected, rel=1e-12), key
            checked += 1
    assert checked == 3 + 12 * 12


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet50_clip_gap"])
def test_a_model_without_a_classifier_has_the_same_depths(name):
    with_one = on_meta(TimmBackbone, name, model_kwargs={"num_classes": 10})
    without = on_meta(TimmBackbone, name, model_kwargs={"num_classes": 0})
    assert parameter_depths(without) == parameter_depths(with_one)


# layers, and the depth of some parameters
TORCHVISION = {
    "convnext_tiny": (22, {"features.0.1.weight": 22, "features.2.0.bias": 18}),
    "swin_t": (16, {"features.0.2.weight": 16, "features.2.norm.weight": 13}),
    "vit_b_16": (13, {"class_token": 13, "encoder.layers.encoder_layer_11.ln_2.bias": 1}),
    "efficientnet_b0": (18, {"features.1.0.block.2.0.weight": 17, "features.8.1.bias": 1}),
    "densenet121": (62, {"features.transition1.conv.weight": 55, "features.norm5.bias": 1}),
    "regnet_y_400mf": (17, {"stem.1.weight": 17, "trunk_output.block4.block4-5.f.se.fc1.bias": 1}),
    "mobilenet_v3_large": (17, {"features.0.1.bias": 17, "features.16.0.weight": 1}),
    "vgg16_bn": (13, {"features.1.weight": 13, "features.40.weight": 1}),
    "maxvit_t": (13, {"stem.0.0.weight": 13, "stem.1.0.weight": 12}),
    "googlenet": (12, {"inception3a.branch2.0.conv.weight": 9, "inception5b.branch4.1.bn.bias": 1}),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_layers_of_torchvision_models(name):
    layers, some = TORCHVISION[name]
    depths = parameter_depths(TorchvisionBackbone(name))
    assert set(depths.values()) == set(range(1, layers + 1))
    assert {key: depths[f"model.{key}"] for key in some} == some


def test_a_resnet_has_the_same_layers_from_either_source():
    timm_depths = parameter_depths(on_meta(TimmBackbone, "resnet50"))
    assert parameter_depths(TorchvisionBackbone("resnet50")) == timm_depths
    frozen = parameter_depths(TorchvisionBackbone("resnet50", norm="FrozenBN", freeze_at=2))
    assert frozen == {key: timm_depths[key] for key in frozen}
    assert len(frozen) == 53 and max(frozen.values()) == 17


EXECUTION = {  # names and dimensions in the order of use: depths
    "conv1.weight/4 bn1.weight/1 layer1.0.conv1.weight/4 layer1.1.conv1.weight/4": [3, 3, 2, 1],
    "patch.weight/4 token/3 blocks.0.a.weight/2 blocks.1.a.weight/2 norm.weight/1": [3, 3, 2, 1, 1],
    "s.0.blocks.0.a.w/2 s.0.blocks.1.a.w/2 s.1.down.w/2 s.1.blocks.0.a.w/2": [4, 3, 2, 1],
    "stage1.0.weight/4 stage1.1.weight/1 stage2.0.weight/4": [2, 2, 1],
    "x1a.branch1.0.w/4 x1a.branch2.0.w/4 x1b.branch1.0.w/4": [2, 2, 1],
    "conv.weight/4 norm.weight/1": [1, 1],
    "norm0.weight/1 conv0.weight/4 conv1.weight/4": [3, 2, 1],
}


@pytest.mark.parametrize("words", EXECUTION)
def test_layers_by_execution(words):
    parameters = {name: int(ndim) for name, ndim in (word.split("/") for word in words.split())}
    assert list(depths_by_execution(parameters).values()) == EXECUTION[words]


@pytest.mark.parametrize("name, layers", [("poolformerv2_s12", 16), ("pit_ti_224", 15)])
def test_timm_models_that_name_no_layers(name, layers):
    backbone = on_meta(TimmBackbone, name)
    assert backbone.parameter_depths() is None
    depths = parameter_depths(backbone)
    assert set(depths.values()) == set(range(1, layers + 1))
    assert depths.keys() == {key for key, _ in backbone.named_parameters()}


class Net(nn.Module):
    """Declared in another order than it runs in."""

    def __init__(self):
        super().__init__()
        self.stage2 = nn.Conv2d(4, 4, 2, 2)
        self.stage1 = nn.Sequential(nn.Conv2d(4, 4, 2, 2), nn.GroupNorm(1, 4))
        self.stem = nn.Conv2d(3, 4, 2, 2)

    def forward(self, x):
        return self.stage2(self.stage1(self.stem(x)))


def test_layers_of_a_module_of_ones_own():
    backbone = FeatureBackbone.from_module(Net(), ["stage1", "stage2"])
    found = by_name(backbone, param_groups(backbone, 1.0, weight_decay=0.1, layer_decay=0.5))
    names = source_names(backbone)
    lrs = {names[key]: lr for key, (lr, _) in found.items()}
    expected = {"stem": 0.125, "stage1.0": 0.25, "stage1.1": 0.25, "stage2": 0.5}
    assert lrs == {f"{k}.{p}": lr for k, lr in expected.items() for p in ("weight", "bias")}


# parts of the names of weights without decay
EXEMPT = {
    "vit_tiny_patch16_224": (),
    "swin_tiny_patch4_window7_224": (),
    "swinv2_tiny_window8_256": ("cpb_mlp",),
    "convnext_atto": (),
    "nf_resnet26": (),
    "tf_efficientnet_cc_b0_4e": (),
    "xcit_nano_12_p16_224": ("pos_embed",),
    "resmlp_12_224": (),
    "levit_128s": (),
}


@pytest.mark.parametrize("name", [*EXEMPT, "torchvision:vit_b_16"])
def test_only_weights_of_linear_maps_decay(name):
    source, _, name = name.rpartition(":")
    backbone = TorchvisionBackbone(name) if source else on_meta(TimmBackbone, name)
    maps = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)
    expected = {
        f"{prefix}.{key}"
        for prefix, module in backbone.named_modules()
        for key, parameter in module.named_parameters(recurse=False)
        if (isinstance(module, maps) or type(module).__name__ == "CondConv2d")
        and parameter.ndim > 1
        and not key.startswith("bias")
        and "gain" not in key
        and not any(part in prefix for part in EXEMPT.get(name, ()))
    }
    found = by_name(backbone, param_groups(backbone, 1.0, weight_decay=0.1))
    assert {key for key, (_, decay) in found.items() if decay == 0.1} == expected
    assert {decay for _, decay in found.values()} == {0.0, 0.1}
    assert expected and len(found) == len(list(backbone.parameters()))


@pytest.mark.parametrize("module", [nn.LSTM(4, 4), nn.MultiheadAttention(4, 2, kdim=3)])
def test_weights_of_other_names_decay(module):
    found = by_name(module, param_groups(module, 1.0, weight_decay=0.1))
    assert {key for key, (_, decay) in found.items() if decay} == {
        key for key, _ in module.named_parameters() if "bias" not in key
    }


class Head(nn.Module):
    def __init__(self, backbone=None):
        super().__init__()
        self.backbone = backbone
        self.queries = nn.Embedding(5, 4)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.norm = nn.GroupNorm(2, 4)


def test_without_a_backbone_there_is_decay_alone():
    head = Head()
    decay, no_decay = sorted(
        param_groups(head, 0.5, weight_decay=0.1), key=lambda g: len(g["params"])
    )
    assert decay["params"] == [head.first.weight]
    others = [head.queries.weight, head.first.bias, head.second.bias, *head.norm.parameters()]
    assert {id(p) for p in no_decay["params"]} == {id(p) for p in others}
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("factor", [1.0, 0.1])
def test_the_factor_is_for_the_backbone_alone(factor):
    model = Head(build_pyramid(on_meta(TimmBackbone, "test_resnet", freeze_at=2)))
    groups = param_groups(model, 0.5, weight_decay=0.1, backbone_lr_factor=factor)
    assert len(groups) == (2 if factor == 1 else 4)
    for key, (lr, _) in by_name(model, groups).items():
        assert lr == (0.5 * factor if "bottom_up" in key else 0.5), key


@pytest.mark.parametrize("norm, trainable", [("", 45), ("FrozenBN", 15)])
@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_what_is_frozen_is_in_no_group(norm, trainable, layer_decay):
    backbone = on_meta(TimmBackbone, "resnet18", norm=norm, freeze_at=2)
    found = by_name(backbone, param_groups(backbone, 1, weight_decay=0, layer_decay=layer_decay))
    assert len(found) == trainable
    assert found.keys() == {key for key, p in backbone.named_parameters() if p.requires_grad}
    assert not [key for key in found if "layer1" in key]


def test_a_step_with_weight_decay_leaves_the_frozen_part_as_it_is():
    torch.manual_seed(0)
    model = TimmBackbone("test_resnet", norm="FrozenBN", freeze_at=2)
    groups = param_groups(model, 0.1, weight_decay=0.5, layer_decay=0.5)
    optimizer = torch.optim.AdamW(groups, lr=9.0, weight_decay=9.0)
    before = copy.deepcopy(model.state_dict())
    sum(level.square().mean() for level in model(images(2, 3, 64, 64)).values()).backward()
    optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(before[k], v)}
    assert changed and {key.removeprefix("model.") for key in changed} == trainable(model)


def test_the_schedule_multiplies_each_learning_rate_and_resumes():
    model = on_meta(TimmBackbone, "test_vit")

    def build():
        groups = param_groups(model, 1.0, weight_decay=0.1, layer_decay=0.5)
        return torch.optim.AdamW(groups, lr=1.0, weight_decay=0.1)

    def lrs(optimizer):
        return [group["lr"] for group in optimizer.param_groups]

    cosine, whole = CosineParamScheduler(1.0, 0.0), build()
    base = lrs(whole)
    assert len(set(base)) == 7 and max(base) == 0.5
    scheduler = LRMultiplier(whole, cosine, max_iter=8)
    for _ in range(4):
        whole.step()
        scheduler.step()
    assert lrs(whole) == pytest.approx([0.5 * lr for lr in base])
    resumed = build()
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    again = LRMultiplier(resumed, cosine, max_iter=8, last_iter=3)
    assert lrs(resumed) == lrs(whole)
    for optimizer, schedule in ((whole, scheduler), (resumed, again)):
        optimizer.step()
        schedule.step()
    assert lrs(resumed) == lrs(whole) != base


def test_the_table(caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="detbackbones.training.optim")
    model = Head(FeatureBackbone.from_module(Net(), ["stage1", "stage2"], freeze_at=2))
    param_groups(model, 0.1, weight_decay=0.05, layer_decay=0.5)
    (record,) = caplog.records
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in record.getMessage().splitlines()[1:]
    ]
    assert [rows[0], *rows[2:]] == [
        ["part", "first of it", "lr", "tensors", "parameters", "decaying 0.05"],
        ["backbone, depth 1", "backbone.model.stage2.weight", "0.05", "2", "68", "64"],
        ["the rest", "queries.weight", "0.1", "6", "52", "16"],
        ["frozen", "backbone.model.stage1.0.weight", "-", "6", "128", "-"],
    ]
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    param_groups(model, 0.1, weight_decay=0.05)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "key, values, valid",
    [
        ("base_lr", [-1, "1e-4", None, True, float("nan"), float("inf")], "a number from 0"),
        ("weight_decay", [-0.1, "0", None], "a number from 0"),
        ("backbone_lr_factor", [0, -1.0, [1]], "a number above 0"),
        ("layer_decay", [0, -0.5, 1.1, "0.7"], "a number above 0 and at most 1"),
    ],
)
def test_numbers_out_of_range(key, values, valid):
    backbone = FeatureBackbone.from_module(Net(), ["stage2"])
    for value in values:
        with pytest.raises(ValueError) as error:
            param_groups(backbone, **{"base_lr": 1e-4, "weight_decay": 0.1, key: value})
        assert str(error.value) == f"{key}={value!r} must be {valid}"


@pytest.mark.parametrize("key", ["backbone_lr_factor", "layer_decay"])
def test_a_number_for_a_backbone_that_is_not_there(key):
    with pytest.raises(ValueError, match=f"{key}=0.5 is for a FeatureBackbone, and Head has none"):
        param_groups(Head(), 1e-4, weight_decay=0.1, **{key: 0.5})


def test_a_config_gives_each_part_its_learning_rate_and_decay():
    cfg = get_config("mask_rcnn/timm_vit_b_sfp_1x.py")
    cfg.model.backbone.bottom_up.update(model_name="test_vit", pretrained=False)
    model = instantiate(cfg.model)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    groups = [{k: g[k] for k in ("params", "lr", "weight_decay")} for g in optimizer.param_groups]
    found = by_name(model, groups)
    assert found.keys() == {key for key, p in model.named_parameters() if p.requires_grad}
    names = source_names(model)
    found = {names[key]: values for key, values in found.items()}
    net = "backbone.net.model"
    assert found[f"{net}.pos_embed"] == (pytest.approx(1e-4 * 0.7**7), 0.0)
    assert found[f"{net}.blocks.0.attn.qkv.weight"] == (pytest.approx(1e-4 * 0.7**6), 0.1)
    assert found[f"{net}.blocks.5.norm1.weight"] == (pytest.approx(1e-4 * 0.7), 0.0)
    assert found["roi_heads.box_predictor.cls_score.weight"] == (1e-4, 0.1)
    assert found["roi_heads.box_predictor.cls_score.bias"] == (1e-4, 0.0)


@pytest.mark.parametrize(
    "name, lr, decay",
    [
        ("mask_rcnn/timm_convnext_t_fpn_1x.py", 1e-4, 0.05),
        ("mask_rcnn/timm_swin_t_fpn_1x.py", 1e-4, 0.05),
        ("finetune/faster_rcnn.py", 5e-4, 0.05),
    ],
)
def test_configs_with_adamw(name, lr, decay):
    cfg = get_config(name)
    model = Head(on_meta(TimmBackbone, "convnext_atto"))
    cfg.optimizer.params.update(model=model, backbone_lr_factor=0.1)
    optimizer = instantiate(cfg.optimizer)
    groups = [{k: g[k] for k in ("params", "lr", "weight_decay")} for g in optimizer.param_groups]
    assert {(g["lr"], g["weight_decay"]) for g in groups} == {
        (lr * factor, d) for factor in (1.0, 0.1) for d in (0.0, decay)
    }
    norms = {key: decay for key, (_, decay) in by_name(model, groups).items() if "norm" in key}
    assert len(norms) > 20 and set(norms.values()) == {0.0}
