"""Freezing batch norm changes nothing that the model computes, and then nothing changes it."""

import copy

import detectron2.layers
import pytest
import timm
import torch
import torchvision
from detbackbones import FeatureBackbone, TimmBackbone, TorchvisionBackbone
from detbackbones.adapt.norm import convert_norm, is_batch_norm
from support import assert_close, images, randomise
from timm.layers import BatchNormAct2d, SplitBatchNorm2d
from timm.layers.norm_act import FrozenBatchNormAct2d
from torch import nn

BLOCKS = {
    "BatchNorm2d": (nn.BatchNorm2d(4), (3, 4, 6, 5)),
    "eps 1e-3": (nn.BatchNorm2d(4, eps=1e-3), (3, 4, 6, 5)),
    "a large eps": (BatchNormAct2d(4, eps=0.5), (3, 4, 6, 5)),
    "with its activation": (BatchNormAct2d(4, act_layer="silu"), (3, 4, 6, 5)),
    "SyncBatchNorm": (nn.SyncBatchNorm(4, eps=0.1), (3, 4, 6, 5)),
    "SyncBatchNormAct": (
        convert_norm(BatchNormAct2d(4, act_layer="silu"), "SyncBN"),
        (3, 4, 6, 5),
    ),
    "NaiveSyncBatchNorm": (detectron2.layers.NaiveSyncBatchNorm(4), (3, 4, 6, 5)),
    "BatchNorm2d without affine": (nn.BatchNorm2d(4, affine=False), (3, 4, 6, 5)),
    "with dropout in it": (
        BatchNormAct2d(4, drop_layer=lambda: nn.Threshold(0.1, 0)),
        (3, 4, 6, 5),
    ),
    "BatchNorm1d on (N, C)": (nn.BatchNorm1d(4, eps=0.1), (3, 4)),
    "BatchNorm1d on (N, C, L)": (nn.BatchNorm1d(4), (3, 4, 7)),
    "BatchNorm1d without affine": (nn.BatchNorm1d(4, affine=False), (3, 4)),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("nested", [False, True])
def test_frozen_norm_computes_the_same(name, nested):
    block, shape = copy.deepcopy(BLOCKS[name])
    if block.affine:
        randomise(block)
    block.running_mean.uniform_(-1, 1)
    model = nn.Sequential(nn.Sequential(block)) if nested else block
    x = images(*shape)
    expected = model.eval()(x)
    frozen = convert_norm(model, "FrozenBN").train()
    assert_close(frozen(x), expected)
    assert_close(frozen(5 * x - 5), expected * 0 + frozen.eval()(5 * x - 5))
    assert not list(frozen.parameters())


@pytest.mark.parametrize("name", BLOCKS)
def test_frozen_norm_keeps_the_keys(name):
    block = copy.deepcopy(BLOCKS[name][0])
    state = {k: v for k, v in block.state_dict().items() if k != "num_batches_tracked"}
    frozen = convert_norm(block, "FrozenBN")
    assert frozen.state_dict().keys() == state.keys()
    assert convert_norm(frozen, "FrozenBN") is frozen
    thawed = convert_norm(frozen, "BN")
    assert is_batch_norm(thawed) and thawed.eps == block.eps and thawed.affine == block.affine
    assert all(torch.equal(thawed.state_dict()[key], value) for key, value in state.items())
    assert len(list(thawed.parameters())) == (2 if block.affine else 0)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["with its activation", "BatchNorm1d on (N, C, L)"])
def test_in_half_precision(name, dtype, learns):
    block, shape = copy.deepcopy(BLOCKS[name])
    randomise(block)
    block.running_var.fill_(1e-4)  # 1e-4 + eps is 2 % wrong in bfloat16 arithmetic
    x = (0.01 * images(*shape)).to(dtype).requires_grad_(learns)
    expected = block.eval()(x.float())
    frozen = convert_norm(block, "FrozenBN")
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [frozen(x)]
    outputs.append(frozen.to(dtype)(x))
    for output, tolerance in zip(outputs, (1, 4)):  # rounding of the output; of the values too
        assert output.dtype == dtype
        error = (output - expected).abs().max() / expected.abs().max()
        assert error < tolerance * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["a large eps", "BatchNorm1d on (N, C)"])
def test_gradient_and_memory(name):
    block, shape = copy.deepcopy(BLOCKS[name])
    if hasattr(block, "act"):
        block.act = nn.Identity()
    x, grad = images(*shape).requires_grad_(), images(*shape, seed=1)
    (expected,) = torch.autograd.grad(randomise(block).eval()(x), x, grad)
    frozen, saved = convert_norm(block, "FrozenBN"), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        output = frozen(x)
    assert_close(torch.autograd.grad(output, x, grad)[0], expected)
    assert [tensor.shape for tensor in saved] == [(4,)]  # the scale, and not the input


class InferenceABN(nn.Module):
    """Batch norm and activation of a class of its own, as those of in-place ABN."""

    def __init__(self, channels):
        super().__init__()
        self.eps, self.momentum = 1e-3, 0.1
        self.weight = nn.Parameter(torch.rand(channels))
        self.bias = nn.Parameter(torch.rand(channels))
        self.register_buffer("running_mean", torch.rand(channels))
        self.register_buffer("running_var", torch.rand(channels))

    def forward(self, x):
        values = self.running_mean, self.running_var, self.weight.abs(), self.bias
        x = nn.functional.batch_norm(x, *values, self.training, self.momentum, self.eps)
        return nn.functional.leaky_relu(x, 0.01)


@pytest.mark.parametrize("norm", [InferenceABN, lambda n: SplitBatchNorm2d(n)])
def test_a_class_of_its_own_is_kept_and_fixed(norm):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), norm(4), nn.Conv2d(4, 4, 1, 2))
    x = images(2, 3, 64, 64)
    expected = net.eval()(x)
    for arguments in ({"norm": "FrozenBN"}, {"freeze_at": 1}):
        backbone = FeatureBackbone.from_module(net, {"1": "res1", "2": "res2"}, **arguments)
        backbone.train()
        before = {key: value.clone() for key, value in backbone.state_dict().items()}
        outputs = backbone(x)
        assert_close(outputs["res2"], expected)
        outputs["res2"].square().mean().backward()
        learning = [p for p in backbone.parameters() if p.requires_grad]
        torch.optim.SGD(learning, lr=1.0, weight_decay=1.0).step()
        changed = {k for k, v in backbone.state_dict().items() if not torch.equal(v, before[k])}
        assert changed == {"model.0.weight", "model.0.bias", "model.2.weight", "model.2.bias"} - (
            {"model.0.weight", "model.0.bias"} if "freeze_at" in arguments else set()
        )
    with pytest.raises(ValueError, match="norm='SyncBN' is not possible for a (Inf|Split)"):
        convert_norm(net, "SyncBN")


def test_a_norm_with_two_names_stays_one():
    norm = nn.BatchNorm2d(4)
    net = convert_norm(nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)}), "FrozenBN")
    assert net["a"] is net["b"][0] and not is_batch_norm(net["a"])


def test_compiled():
    block, shape = copy.deepcopy(BLOCKS["with its activation"])
    frozen = convert_norm(randomise(block), "FrozenBN")
    compiled = torch.compile(frozen, backend="aot_eager", fullgraph=True)
    x = images(*shape).requires_grad_()
    assert_close(compiled(x), frozen(x))
    grads = [torch.autograd.grad(net(x).square().sum(), x)[0] for net in (frozen, compiled)]
    assert_close(*grads)


@pytest.mark.parametrize("name", ["tf_efficientnet_b0", "levit_conv_128s"])
def test_frozen_models_compute_the_same(name):
    model = randomise(timm.create_model(name, num_classes=0)).eval()
    x = images(1, 3, 224, 224)
    expected = model(x)
    eps = {m.eps for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    frozen = convert_norm(model, "FrozenBN")
    assert_close(frozen(x), expected)
    assert {m.eps for m in frozen.modules() if hasattr(m, "running_var")} == eps
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in frozen.modules())


def test_tf_models_keep_their_eps():
    backbone = TimmBackbone("tf_efficientnet_b0", norm="FrozenBN", out_features=["res2"])
    assert {m.eps for m in backbone.modules() if hasattr(m, "running_var")} == {1e-3}


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_training_changes_no_frozen_value(name):
    backbone = randomise(TimmBackbone(name)).train()
    backbone.load_source(
        {k.removeprefix("model."): v for k, v in randomise(backbone).state_dict().items()}
    )
    frozen = TimmBackbone(name, norm="FrozenBN").train()
    frozen.load_state_dict(backbone.state_dict())
    norms = {k for k, v in frozen.named_buffers()}
    before = {k: v.clone() for k, v in frozen.state_dict().items()}
    optimizer = torch.optim.AdamW(frozen.parameters(), lr=0.1, weight_decay=0.5)
    sum(v.square().mean() for v in frozen(images(2, 3, 64, 64)).values()).backward()
    optimizer.step()
    changed = {k for k, v in frozen.state_dict().items() if not torch.equal(v, before[k])}
    assert len(norms) >= 80 and not changed & norms
    assert changed == {k for k, p in frozen.named_parameters()}


SYNC = nn.SyncBatchNorm if torch.cuda.is_available() else detectron2.layers.NaiveSyncBatchNorm


@pytest.mark.parametrize(
    "norm, kind", [("SyncBN", SYNC), ("BN", nn.BatchNorm2d), ("", nn.BatchNorm2d)]
)
def test_other_norms(norm, kind):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.3))
    converted = convert_norm(model, norm)[1]
    assert isinstance(converted, kind) and converted.momentum == 0.3


@pytest.mark.parametrize(
    "frozen, kind",
    [
        (torchvision.ops.FrozenBatchNorm2d(4, eps=0.1), nn.BatchNorm2d),
        (detectron2.layers.FrozenBatchNorm2d(4, eps=0.1), nn.BatchNorm2d),
        (FrozenBatchNormAct2d(4, eps=0.1, act_layer=nn.SiLU), BatchNormAct2d),
        (convert_norm(nn.BatchNorm1d(4, eps=0.1), "FrozenBN"), nn.BatchNorm1d),
    ],
)
def test_thawing_and_freezing_again(frozen, kind):
    for buffer in frozen.buffers():
        buffer.uniform_(0.5, 1.5)
    x = images(3, 4) if kind is nn.BatchNorm1d else images(3, 4, 6, 5)
    expected = frozen(x)
    thawed = convert_norm(frozen, "BN")
    assert type(thawed) is kind and len(list(thawed.parameters())) == 2
    again = convert_norm(copy.deepcopy(thawed), "FrozenBN")
    norms = [thawed, again]
    if kind is not nn.BatchNorm1d:
        norms.append(convert_norm(copy.deepcopy(frozen), "SyncBN"))
        assert isinstance(norms[-1], SYNC)
    for norm in norms:
        assert_close(norm.eval()(x), expected)
    with torch.no_grad():
        assert not torch.allclose(thawed.train()(x), expected)


def test_thawing_a_torchvision_model_with_frozen_norms():
    arguments = {"model_kwargs": {"norm_layer": torchvision.ops.FrozenBatchNorm2d}}
    frozen = TorchvisionBackbone("resnet18", **arguments)
    thawed = TorchvisionBackbone("resnet18", norm="BN", **arguments)
    for backbone, count in ((frozen, 0), (thawed, 20)):
        assert sum(isinstance(m, nn.BatchNorm2d) for m in backbone.modules()) == count
    thawed.load_state_dict(frozen.state_dict(), strict=False)
    x = images(1, 3, 64, 64)
    assert_close(thawed.eval()(x)["res5"], frozen.eval()(x)["res5"])


def train_in_two_processes(rank, folder, name):
    """One step of a backbone with SyncBN under DDP, each process with half of a batch."""
    torch.set_num_threads(1)
    file = (folder / "rendezvous").as_uri()
    torch.distributed.init_process_group("gloo", file, rank=rank, world_size=2)
    torch.manual_seed(0)
    backbone = TimmBackbone(name, norm="SyncBN")
    ddp = nn.parallel.DistributedDataParallel(backbone)
    half = images(4, 3, 64, 64)[2 * rank : 2 * rank + 2]
    sum(v.square().mean() for v in ddp(half).values()).backward()
    state = {name: p.grad for name, p in backbone.named_parameters()} | dict(
        backbone.named_buffers()
    )
    torch.save(state, folder / f"{rank}.pth")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet"])
def test_sync_batch_norm_sees_the_batches_of_all_processes(name, tmp_path):
    torch.multiprocessing.spawn(train_in_two_processes, (tmp_path, name), nprocs=2)
    torch.manual_seed(0)
    backbone = TimmBackbone(name, norm="BN")
    sum(v.square().mean() for v in backbone(images(4, 3, 64, 64)).values()).backward()
    grads = {name: p.grad for name, p in backbone.named_parameters()}
    means = {k: v for k, v in backbone.named_buffers() if k.endswith("running_mean")}
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pth")
        assert grads and means
        for key, value in (grads | means).items():
            assert (state[key] - value).abs().max() < 1e-3 * value.abs().max() + 1e-6, key


def test_unknown_norm():
    with pytest.raises(ValueError, match="norm='FrozenBn' is unknown: valid are '', 'FrozenBN'"):
        convert_norm(nn.BatchNorm2d(3), "FrozenBn")
