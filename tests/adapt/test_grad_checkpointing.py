"""Gradient checkpointing: the same gradients for less memory."""

import copy

import pytest
import torch
from detbackbones import FeatureBackbone, TimmBackbone, TorchvisionBackbone
from detbackbones.adapt.grad_checkpointing import Checkpoints
from detbackbones.adapt.norm import freeze_batch_norm
from detbackbones.measure.levels import output_list
from detbackbones.measure.trace import record
from support import images, randomise, saved_bytes
from torch import nn


class Shared(nn.Module):
    """Two blocks that share a layer, and one that overwrites what the first gives."""

    def __init__(self):
        super().__init__()
        conv = nn.Conv2d(8, 8, 3, padding=1)
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.first = nn.Sequential(conv, nn.BatchNorm2d(8), nn.GELU(), conv, nn.Sigmoid())
        self.second = nn.Sequential(nn.SiLU(inplace=True), conv, nn.BatchNorm2d(8), nn.SiLU())
        self.third = nn.Sequential(conv, nn.BatchNorm2d(8), nn.Dropout(0.5), nn.SiLU())

    def forward(self, x):
        return self.third(self.second(self.first(self.stem(x)) * 1))


# One of each kind of extractor, with dropout, stochastic depth and batch norm as they come.
BACKBONES = {
    "resnet18": lambda **kw: TimmBackbone("resnet18", drop_path_rate=0.5, **kw),
    "efficientnet_b0": lambda **kw: TimmBackbone("efficientnet_b0", drop_path_rate=0.5, **kw),
    "ViT": lambda **kw: TimmBackbone(
        "vit_tiny_patch16_224",
        drop_path_rate=0.5,
        model_kwargs={"proj_drop_rate": 0.2},
        **kw,
    ),
    "lists that grow": lambda **kw: TimmBackbone("densenet121", **kw),
    "shared modules": lambda **kw: FeatureBackbone.from_module(Shared(), ["first", "third"], **kw),
    "LayerExtractor": lambda **kw: TimmBackbone(
        "resnet18", layers=["layer2.0.conv2", "layer3"], **kw
    ),
    "graph": lambda **kw: TorchvisionBackbone("resnet18", **kw),
    "graph, stochastic depth": lambda **kw: TorchvisionBackbone("efficientnet_b0", **kw),
    "torchvision ViT": lambda **kw: TorchvisionBackbone(
        "vit_b_16", model_kwargs={"dropout": 0.2, "attention_dropout": 0.1}, **kw
    ),
}


def step(extractor, run, x):
    """Outputs, gradients and buffers after a step with the same random numbers."""
    torch.manual_seed(1)
    outputs = output_list(run(x))
    sum((output * images(*output.shape)).sum() for output in outputs).backward()
    gradients = {n: p.grad for n, p in extractor.named_parameters() if p.grad is not None}
    return [*outputs], gradients, dict(extractor.named_buffers())


@pytest.mark.parametrize("frozen", [False, True], ids=["BN", "frozen"])
@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.filterwarnings("error:.*requires_grad")
def test_a_step_is_the_same(name, frozen):
    extractor = randomise(BACKBONES[name]().train().extractor)
    if frozen:
        extractor = freeze_batch_norm(extractor)
        parameters = list(extractor.parameters())
        for parameter in parameters[: len(parameters) // 3]:
            parameter.requires_grad_(False)
    plan = Checkpoints(extractor, record(extractor, size=(64, 64)))
    other = copy.deepcopy(extractor)
    names = list(extractor.state_dict())
    x = images(2, 3, 64, 64)
    expected = step(extractor, extractor, x)
    got = step(other, lambda x: plan.run(other, x), x)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert list(other.state_dict()) == names
    assert saved_bytes(lambda x: plan.run(other, x), other, x) < 0.9 * saved_bytes(other, other, x)


@pytest.mark.parametrize("name", ["resnet18", "graph", "torchvision ViT"])
def test_nothing_is_repeated_without_need(name):
    extractor = BACKBONES[name]().train().extractor
    plan = Checkpoints(extractor, record(extractor, size=(64, 64)))
    x = images(2, 3, 64, 64)
    everything = saved_bytes(extractor, extractor, x)
    with torch.no_grad():
        assert saved_bytes(lambda x: plan.run(extractor, x), extractor, x) == 0
    extractor.eval()
    got = saved_bytes(lambda x: plan.run(extractor, x), extractor, x)
    assert got == saved_bytes(extractor, extractor, x) > 0.5 * everything


@pytest.mark.parametrize(
    "backbone, most",
    [
        (lambda: TimmBackbone("resnet50"), 0.35),
        (lambda: TimmBackbone("vit_small_patch16_224"), 0.1),
        (lambda: TimmBackbone("convnext_tiny"), 0.25),
        (lambda: TorchvisionBackbone("resnet50"), 0.25),
        (lambda: TorchvisionBackbone("vit_b_16"), 0.1),
    ],
    ids=["timm resnet50", "timm vit_small", "timm convnext_tiny", "resnet50", "vit_b_16"],
)
def test_memory(backbone, most):
    with torch.device("meta"):
        extractor = backbone().train().extractor.to("meta")
    plan = Checkpoints(extractor, record(extractor, size=(64, 64)))
    x = torch.empty(2, 3, 384, 384, device="meta")
    whole = saved_bytes(extractor, extractor, x)
    assert saved_bytes(lambda x: plan.run(extractor, x), extractor, x) < most * whole


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "graph"])
def test_compiled_in_mixed_precision(name):
    extractor = freeze_batch_norm(BACKBONES[name]().train().extractor)
    plan = Checkpoints(extractor, record(extractor, size=(64, 64)))
    other = copy.deepcopy(extractor)
    x = images(2, 3, 64, 64)
    compiled = torch.compile(lambda x: output_list(plan.run(other, x)), backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(extractor, extractor, x)
        got = step(other, compiled, x)
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


def test_refused():
    with pytest.raises(ValueError, match="grad_checkpointing=True has no effect"):
        Checkpoints(nn.Conv2d(3, 8, 4, 4), record(nn.Conv2d(3, 8, 4, 4)))
