"""LoRA: the updates learn and nothing else does, and merged they are what they were."""

import copy
from itertools import product

import pytest
import timm
import torch
from detbackbones import FeatureBackbone, TimmBackbone, TorchvisionBackbone
from detbackbones.adapt.lora import is_update, merged
from detbackbones.backbones.module_source import ModuleSource
from detbackbones.measure.trace import record
from detbackbones.training.depths import parameter_depths
from detbackbones.training.optim import param_groups
from detbackbones.weights import export_backbone
from safetensors.torch import load_file
from support import images, randomise, saved_bytes
from torch import nn

pytest.importorskip("peft")

LAYERS = ["qkv", "attn.proj"]
MODELS = {
    "a ViT": (TimmBackbone, "vit_tiny_patch16_224", {}),
    "attention alone": (TimmBackbone, "vit_tiny_patch16_224", {"lora_layers": LAYERS}),
    "windows": (TimmBackbone, "swin_tiny_patch4_window7_224", {"drop_path_rate": 0.0}),
    "linear layers among convolutions": (TimmBackbone, "convnext_atto", {}),
    "1x1 convolutions": (TimmBackbone, "tf_efficientnet_lite0", {"norm": "FrozenBN"}),
    "frozen up to res2": (TimmBackbone, "resnet26", {"freeze_at": 2, "norm": "FrozenBN"}),
    "checkpointing": (TimmBackbone, "vit_tiny_patch16_224", {"grad_checkpointing": True}),
    "a weight that is taken alone": (TimmBackbone, "eva02_tiny_patch14_224", {}),
    "torchvision's": (TorchvisionBackbone, "swin_t", {"drop_path_rate": 0.0}),
}


def trained(kind, name, rank=4, **arguments):
    """A backbone with updates that are not zero, in eval mode."""
    torch.manual_seed(0)
    backbone = kind(name, lora_rank=rank, **arguments)
    randomise(backbone)
    with torch.no_grad():
        for key, parameter in backbone.named_parameters():
            if ".lora_" in key:
                parameter.copy_(0.05 * torch.randn_like(parameter))
            elif "gamma" in key:  # layer scales of 1e-6 would hide all
                parameter.fill_(1.0)
        for key, buffer in backbone.named_buffers():  # timm's last norm of a block is zero
            if key.endswith(".weight"):
                buffer.fill_(1.0)
    return backbone.eval()


def difference(backbone, other, x):
    pairs = zip(backbone(x).values(), other(x).values(), strict=True)
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)


@pytest.mark.parametrize("case", MODELS)
@torch.no_grad()
def test_merged_is_the_same(case):
    kind, name, arguments = MODELS[case]
    backbone = trained(kind, name, **arguments)
    x = images(1, 3, 224, 224)
    state = backbone.state_dict()
    without = {key: value for key, value in arguments.items() if key != "lora_layers"}
    plain, whole = (kind(name, **without).eval() for _ in range(2))
    assert plain.load_source({key: state[key] for key in state if not is_update(key)})[1] == []
    assert difference(backbone, plain, x) > 1e-3
    assert whole.load_source({f"teacher.{key}": value for key, value in state.items()})[1] == []
    assert difference(backbone, whole, x) < 1e-5
    assert whole.state_dict().keys() == {key for key in state if not is_update(key)}

    again = trained(kind, name, rank=2, **arguments)  # whose own updates are forgotten
    again.load_source(state)
    assert difference(backbone, again, x) < 1e-5
    same = trained(kind, name, **arguments)
    same.load_state_dict(state)
    assert difference(copy.deepcopy(backbone), same, x) == 0


@pytest.mark.parametrize("case", MODELS)
def test_every_update_learns_and_nothing_else(case):
    kind, name, arguments = MODELS[case]
    backbone = trained(kind, name, **arguments).train()
    sum(level.square().mean() for level in backbone(images(2, 3, 224, 224)).values()).backward()
    for key, parameter in backbone.named_parameters():
        assert parameter.requires_grad == (".lora_" in key)
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (".lora_" in key), key


def test_layers_by_the_ends_of_their_names():
    backbone = TimmBackbone("vit_tiny_patch16_224", lora_rank=4, lora_layers=LAYERS)
    updates = {key for key in backbone.state_dict() if is_update(key)}
    assert updates == {
        f"model.blocks.{block}.attn.{layer}.lora_{part}.weight"
        for block, layer, part in product(range(12), ("qkv", "proj"), "AB")
    }


def test_updates_of_attention_alone_keep_less():
    x = images(1, 3, 224, 224)
    whole, attention = (
        saved_bytes(backbone, backbone, x)
        for backbone in (
            TimmBackbone("vit_tiny_patch16_224").train(),
            TimmBackbone("vit_tiny_patch16_224", lora_rank=8, lora_layers=LAYERS).train(),
        )
    )
    assert attention < 0.7 * whole


@pytest.mark.parametrize("name", ["swinv2_tiny_window8_256", "crossvit_9_240", "coat_tiny"])
def test_no_update_is_passed_over(name):
    """Models that take the weights of some layers alone."""
    with torch.device("meta"):
        backbone = TimmBackbone(name, lora_rank=4)
    updates = {key for key, _ in backbone.extractor.named_parameters() if ".lora_" in key}
    size = (backbone.source.native_size,) * 2
    assert updates and updates <= record(backbone.extractor, 3, size).needed


def test_names_are_the_models_own():
    plain, backbone = (TimmBackbone("vit_tiny_patch16_224", lora_rank=rank) for rank in (0, 4))
    names = {key for key in backbone.state_dict() if not is_update(key)}
    assert names == plain.state_dict().keys()
    depths = {key: depth for key, depth in parameter_depths(backbone).items() if ".lora_" in key}
    assert depths["model.blocks.11.mlp.fc2.lora_A.default.weight"] == 1
    assert depths["model.blocks.0.attn.qkv.lora_B.default.weight"] == 12
    groups = param_groups(backbone, 1.0, weight_decay=0.1, layer_decay=0.5)
    assert {group["lr"] for group in groups} == {0.5**depth for depth in range(1, 13)}
    torchvisions = TorchvisionBackbone("swin_t", lora_rank=4)
    assert parameter_depths(torchvisions).keys() == dict(torchvisions.named_parameters()).keys()


@torch.no_grad()
def test_a_detectors_backbone_goes_back_to_timm(tmp_path):
    backbone = trained(TimmBackbone, "vit_tiny_patch16_224")
    state = {f"backbone.bottom_up.{key}": value for key, value in backbone.state_dict().items()}
    torch.save({"model": state}, tmp_path / "detector.pth")
    export_backbone(str(tmp_path / "detector.pth"), str(tmp_path / "mine.safetensors"))
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    found = model.load_state_dict(load_file(tmp_path / "mine.safetensors"), strict=False)
    assert not found.unexpected_keys
    x = images(1, 3, 224, 224)
    want = model.get_intermediate_layers(x, 1, reshape=True, norm=False)[0]
    got = TimmBackbone(
        "vit_tiny_patch16_224", checkpoint_path=str(tmp_path / "mine.safetensors")
    ).eval()
    assert difference(backbone, got, x) < 1e-5
    assert ((got(x)["res4"] - want).abs().max() / want.abs().max()) < 1e-5


def test_batch_norm_stays_as_it_is():
    backbone = TimmBackbone("test_resnet", lora_rank=4).train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone(images(2, 3, 64, 64))
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_a_batch_norm_of_a_class_that_does_more_stays_too():
    class Scaled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    net = nn.Sequential(nn.Conv2d(3, 8, 4, 4), Scaled(8), nn.Conv2d(8, 8, 1))
    source = ModuleSource(net, ["2"], 3, 64)
    backbone = FeatureBackbone(source, source.levels, lora_rank=2).train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone(images(2, 3, 64, 64))
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize("name", ["mixnet_s", "resnet26"])
def test_stages_are_those_without(name):
    """Which pieces gradient checkpointing and FSDP have."""
    with torch.device("meta"):
        plain, backbone = (
            TimmBackbone(name, lora_rank=rank, norm="FrozenBN", grad_checkpointing=True)
            for rank in (0, 4)
        )
    assert plain._checkpoints.lengths == backbone._checkpoints.lengths


def test_refused(monkeypatch):
    for rank in (-1, True, 2.5):
        with pytest.raises(ValueError, match=f"lora_rank={rank} must be a whole number"):
            TimmBackbone("vit_tiny_patch16_224", lora_rank=rank)
    with pytest.raises(ValueError, match="lora_rank=4 has no effect: no linear or 1x1 layer"):
        TimmBackbone("vit_tiny_patch16_224", lora_rank=4, freeze_at=5)
    for layers, why in {
        ("qkw",): "'qkw' must be the end of the name .* valid are 'attn.proj', 'attn.qkv', 'fc1'",
        ("kv",): "'kv' must be the end of the name",
        ("qkv", "patch_embed.proj"): "'patch_embed.proj' must be the end of the name",
    }.items():
        with pytest.raises(ValueError, match=f"lora_layers={why}"):
            TimmBackbone("vit_tiny_patch16_224", lora_rank=4, lora_layers=layers)
    for rank, layers in product((0, 4), ("qkv", None, 3)):
        with pytest.raises(ValueError, match=f"lora_layers={layers!r} must be a list"):
            TimmBackbone("vit_tiny_patch16_224", lora_rank=rank, lora_layers=layers)
    with pytest.raises(ValueError, match="lora_rank=0 must be a whole number from 1"):
        TimmBackbone("vit_tiny_patch16_224", lora_layers=["qkv"])
    state = {"a.weight": torch.zeros(4, 4), "a.lora_A.weight": torch.zeros(2, 4)}
    with pytest.raises(ValueError, match="it has 'a.lora_A.weight', and must have the layer's"):
        merged(state)
    with pytest.raises(ValueError, match="'a.lora_A.weight' must be of the shape of 'a.weight'"):
        merged({**state, "a.lora_B.weight": torch.zeros(5, 2)})
    monkeypatch.setattr("detbackbones.adapt.lora.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="lora_rank=4 needs peft: pip install"):
        TimmBackbone("vit_tiny_patch16_224", lora_rank=4)
