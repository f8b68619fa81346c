"""Gradient checkpointing: feature maps are computed again in the backward pass instead of kept.

Chen et al., Training Deep Nets with Sublinear Memory Cost, https://arxiv.org/abs/1604.06174, by
torch's ``checkpoint`` around pieces of the extractor. The libraries' own switches are not used:
timm's keeps more than these pieces do in most models, updates running statistics twice, and is
refused by some models.
"""

import math
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from ..measure.trace import Trace, tensors_in
from .lora import has_update


class Checkpoints:
    """Runs an extractor such that training keeps only what enters its pieces.

    A piece is an outermost module with parts that is no stage (a sequence of blocks) and holds
    none: a block, a stem. In the n-th stage 2^(n-1) blocks are one piece if the stage is an
    ``nn.Sequential``, since its maps are about half as large as those of the stage before. A module
    whose input is overwritten in place cannot run again, and is no piece. A graph is cut into about
    as many pieces as each piece has nodes, at places where the fewest values are alive.

    It holds names, no modules, so that it fits copies of the extractor and what its modules become.
    """

    def __init__(self, extractor: nn.Module, measured: Trace):
        """
        Args:
            extractor: with the parameters that are to be frozen frozen; it is not touched.
            measured: a trace of it, or of one that is built alike.

        Raises:
            ValueError: if nothing that learns lies in a piece.
        """
        overwritten = {run.name for run in measured.runs if not run.repeatable}
        modules = {n: m for n, m in extractor.named_modules() if n and n not in overwritten}
        stages = [
            name
            for name, module in modules.items()
            if _is_stage(module)
            and not any(map(_is_or_holds_stage, module.children()))
            and not overwritten & {f"{name}.{child}" for child, _ in module.named_children()}
        ]
        self.lengths = {name: 2**i for i, name in enumerate(stages)}
        self.blocks = [
            name
            for name, module in modules.items()
            if _has_parts(module) and not _is_or_holds_stage(module)
        ]
        inside = [*self.lengths, *self.blocks]
        if not any(p.requires_grad for name in inside for p in modules[name].parameters()):
            raise ValueError(
                "grad_checkpointing=True has no effect: the model has no blocks that learn"
            )

    def run(self, extractor: nn.Module, x: torch.Tensor) -> Any:
        """``extractor(x)``, of which training keeps only what enters the pieces.

        Outputs, gradients, random numbers and running statistics are those of ``extractor(x)``.
        """
        if not (extractor.training and torch.is_grad_enabled()):
            return extractor(x)
        if isinstance(extractor, fx.GraphModule):
            return _run_graph(extractor, x)
        outermost = _Outermost()
        forwards = {}
        for name in self.blocks:
            module = extractor.get_submodule(name)
            forwards[name] = partial(outermost.run, module, module.forward)
        for name, length in self.lengths.items():
            module = extractor.get_submodule(name)
            if type(module).forward is nn.Sequential.forward:
                forwards[name] = partial(_run_sequence, outermost, module, length)
        with _forwards(extractor, forwards):
            return extractor(x)


def _is_stage(module: nn.Module) -> bool:
    """Whether a module is a sequence of blocks: its parts are numbered, and several are blocks."""
    parts = dict(module.named_children())
    numbered = all(re.search(r"\d$", name) for name in parts)
    return numbered and sum(map(_is_block, parts.values())) > 1


def _is_block(module: nn.Module) -> bool:
    """Whether a module has more in it than, say, a convolution and its norm."""
    parts = [module] if has_update(module) else module.modules()
    return sum(bool(m._parameters or m._buffers) for m in parts) > 2


def _is_or_holds_stage(module: nn.Module) -> bool:
    return any(map(_is_stage, module.modules()))


def _has_parts(module: nn.Module) -> bool:
    """Whether a module is worth a piece: one with parts, or pooling, which keeps what it takes."""
    parts = bool([*module.children()]) and not has_update(module)
    return parts or isinstance(module, nn.MaxPool2d)


class _Outermost:
    """Checkpoints the outermost of modules that lie in each other."""

    def __init__(self):
        self.inside = False

    def run(self, module: nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        # a hook in the module would be called again; those of the module itself are not
        inner = [*module.modules()][1:]
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in inner)
        learns = any(tensor.requires_grad for tensor in tensors_in((args, kwargs)))
        learns = learns or any(parameter.requires_grad for parameter in module.parameters())
        if self.inside or hooked or not learns:
            return forward(*args, **kwargs)
        self.inside = True
        try:
            return _checkpoint(forward, [module], *args, **kwargs)
        finally:
            self.inside = False


def _run_sequence(
    outermost: _Outermost, sequence: nn.Sequential, length: int, x: torch.Tensor
) -> torch.Tensor:
    """Run a sequence, of which so many modules are a piece."""
    for start in range(0, len(sequence), length):
        part = nn.Sequential(*[*sequence][start : start + length])
        x = outermost.run(part, part.forward, x)
    return x


@torch.compiler.disable  # torch.compile refuses an interpreter inside a checkpoint
def _run_graph(extractor: fx.GraphModule, x: torch.Tensor) -> Any:
    interpreter = fx.Interpreter(extractor)
    image, *nodes, output = interpreter.graph.nodes
    values = {image: x}
    for piece in _cut(extractor, nodes):
        given = [node for node in values if not node.users.keys().isdisjoint(piece)]
        made = [node for node in piece if node.users.keys() - set(piece)]
        function = partial(_run_nodes, interpreter, piece, given, made)
        modules = [extractor.get_submodule(n.target) for n in piece if n.op == "call_module"]
        outputs = _checkpoint(function, modules, *(values[node] for node in given))
        values.update(zip(made, outputs))
    return fx.map_arg(output.args[0], values.__getitem__)


def _cut(extractor: fx.GraphModule, nodes: Sequence[fx.Node]) -> Iterator[list[fx.Node]]:
    """Pieces of a graph of one to two times the square root of its length, between which the fewest
    values are alive.
    """
    place = {node: i for i, node in enumerate(nodes)}
    alive = [0] * len(nodes)  # how many values of nodes up to each are used after it
    for node in nodes:
        last = max((place.get(user, 0) for user in node.users), default=0)
        for i in range(place[node], last):
            alive[i] += node.op != "get_attr"
        if _is_in_place(extractor, node):  # what it overwrites could not enter a piece again
            for i in range(place.get(node.all_input_nodes[0], 0), place[node]):
                alive[i] += len(nodes)
    start, size = 0, math.isqrt(len(nodes))
    while start < len(nodes):
        ends = range(start + size, min(start + 2 * size, len(nodes)))
        end = min(reversed(ends), key=alive.__getitem__) + 1 if ends else len(nodes)
        yield list(nodes[start:end])
        start = end


def _is_in_place(extractor: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node overwrites its first input."""
    if node.op == "call_module":
        module = extractor.get_submodule(node.target)
        # a folded norm passes on what it is given, which an activation may then overwrite
        return getattr(module, "inplace", False) or getattr(module, "folded", False)
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    augmented = getattr(operator, name, None) is node.target and name in ("iadd", "imul", "isub")
    return augmented or name.endswith("_") or bool(node.kwargs.get("inplace"))


def _run_nodes(
    interpreter: fx.Interpreter,
    nodes: list[fx.Node],
    given: list[fx.Node],
    made: list[fx.Node],
    *values: Any,
) -> list[Any]:
    """The values of some nodes of a graph that a run of ``nodes`` makes of those ``given``."""
    interpreter.env = dict(zip(given, values))
    for node in nodes:
        interpreter.env[node] = interpreter.run_node(node)
        for used in interpreter.user_to_last_uses.get(node, ()):
            del interpreter.env[used]
    return [interpreter.env[node] for node in made]


def _checkpoint(function: Callable, modules: Sequence[nn.Module], *args: Any, **kwargs: Any) -> Any:
    """Call a function of some modules, to be called again in the backward pass."""
    # flat, for a list may have grown when the function is called again
    leaves, structure = tree_flatten((args, kwargs))

    def call(*leaves: Any) -> Any:
        args, kwargs = tree_unflatten(leaves, structure)
        return function(*args, **kwargs)

    options = {}
    if not torch.compiler.is_compiling():  # compiled, only the arithmetic is repeated
        options["context_fn"] = lambda: (nullcontext(), _kept_statistics(modules))
    return checkpoint(call, *leaves, use_reentrant=False, **options)


@contextmanager
def _kept_statistics(modules: Sequence[nn.Module]) -> Iterator[None]:
    """The running statistics of batch norms are the same after the context as before."""
    kept = []
    for module in (m for root in modules for m in root.modules() if m.training):
        for name, buffer in module._buffers.items():
            if name.startswith(("running_", "num_batches")) and buffer is not None:
                kept.append((module, name, buffer))
    for module, name, buffer in kept:
        module._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for module, name, buffer in kept:
            module._buffers[name] = buffer


@contextmanager
def _forwards(model: nn.Module, forwards: dict[str, Callable]) -> Iterator[None]:
    """Modules, by name, have another ``forward``; their hooks run around it, and once."""
    with ExitStack() as stack:
        for name, forward in forwards.items():
            attributes = vars(model.get_submodule(name))
            if "forward" in attributes:
                stack.callback(attributes.update, forward=attributes["forward"])
            else:
                stack.callback(attributes.pop, "forward")
            attributes["forward"] = forward
        yield
