"""Gradient checkpointing: feature maps are computed again in the backward pass instead of kept.

Chen et al., Training Deep Nets with Sublinear Memory Cost, https://arxiv.org/abs/1604.06174. What
is computed again is chosen by running the extractor once on the meta device and noting what it
saves; nothing is known of timm or torchvision here.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import checkpoint

from .levels import meta_state


@dataclass(frozen=True)
class ModuleCheckpoints:
    """Modules of a feature extractor that are computed again in the backward pass, by name.

    It holds no module, so that it fits copies of the extractor and what its modules become.
    """

    names: tuple[str, ...]

    def run(self, extractor: nn.Module, x: torch.Tensor) -> Any:
        """``extractor(x)``, which in training keeps only the inputs of the modules.

        Outputs, gradients, random numbers and running statistics are those of ``extractor(x)``.
        """
        if not (extractor.training and torch.is_grad_enabled()):
            return extractor(x)
        forwards = {
            name: partial(_checkpoint, module.forward, [module])
            for name in self.names
            for module in [extractor.get_submodule(name)]
        }
        with _forwards(extractor, forwards):
            return extractor(x)


@dataclass(frozen=True)
class GraphCheckpoints:
    """Where the graph of a torch.fx feature extractor is cut, to be computed again piece by piece.

    ``ends`` are the names of the last nodes of the pieces.
    """

    ends: tuple[str, ...]

    @torch.compiler.disable  # torch.compile refuses an interpreter inside a checkpoint
    def run(self, extractor: fx.GraphModule, x: torch.Tensor) -> Any:
        """As :meth:`ModuleCheckpoints.run`."""
        if not (extractor.training and torch.is_grad_enabled()):
            return extractor(x)
        interpreter = fx.Interpreter(extractor)
        image, *nodes, output = interpreter.graph.nodes
        values = {image: x}
        while nodes:
            size = next((i for i, n in enumerate(nodes, 1) if n.name in self.ends), len(nodes))
            piece, nodes = nodes[:size], nodes[size:]
            read = dict.fromkeys(n for node in piece for n in node.all_input_nodes if n in values)
            made = [node for node in piece if not set(piece).issuperset(node.users)]
            function = partial(_run_nodes, interpreter, piece, list(read), made)
            modules = [extractor.get_submodule(n.target) for n in piece if n.op == "call_module"]
            outputs = _checkpoint(function, modules, *map(values.__getitem__, read))
            values.update(zip(made, outputs))
        return fx.map_arg(output.args[0], values.__getitem__)


def plan_checkpoints(
    extractor: nn.Module, in_channels: int, size: tuple[int, int]
) -> ModuleCheckpoints | GraphCheckpoints:
    """Choose what to compute again, such that a training step needs the least memory.

    That is: what is kept until the backward pass, together with the largest of the pieces that are
    computed again.

    Args:
        extractor: in the mode in which it is trained, frozen as it will be; it is not touched.
        in_channels: channels of its input.
        size: an (H, W) that it takes.

    Returns:
        what runs the extractor: ``plan.run(extractor, images)``.

    Raises:
        ValueError: if the extractor cannot run on the meta device, or nothing can be gained.
    """
    log = _SavedLog(extractor)
    try:
        log.run((2, in_channels, *size))
    except Exception as error:  # a model may refuse in any way
        reason = str(error).partition("\n")[0]
        raise ValueError(f"grad_checkpointing=True is not possible: {reason}") from error
    whole = log.memory([])
    select = log.cut if log.graph else log.choose
    pieces = min((select(whole >> halvings) for halvings in range(1, 7)), key=log.memory)
    if log.memory(pieces) >= whole:
        raise ValueError(
            "grad_checkpointing=True has no effect: nothing can be computed again in less memory "
            "than keeping it takes"
        )
    names = tuple(dict.fromkeys(piece.name for piece in pieces))
    return GraphCheckpoints(names) if log.graph else ModuleCheckpoints(names)


def _checkpoint(function: Callable, modules: Iterable[nn.Module], *args: Any, **kwargs: Any) -> Any:
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
def _kept_statistics(modules: Iterable[nn.Module]) -> Iterator[None]:
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


@dataclass(frozen=True)
class _Piece:
    """A call of a module, or some nodes of a graph.

    Attributes:
        name: of the module or the last node.
        inputs: tensors that have to be kept for it, and how often each had been written before.
        sizes: address and bytes of what these tensors need of memory.
        saved: what it saved for the backward pass, as positions in the log.
    """

    name: str
    inputs: list[tuple[torch.Tensor, int]]
    sizes: dict[int, int]
    saved: range

    @property
    def memory(self) -> int:
        """Bytes of its inputs."""
        return sum(self.sizes.values())

    @cached_property
    def repeatable(self) -> bool:
        """Whether its inputs are at the end what they were, not overwritten in place."""
        return all(tensor._version == version for tensor, version in self.inputs)


class _SavedLog:
    """What an extractor saves for the backward pass, and in which of its pieces."""

    def __init__(self, extractor: nn.Module):
        self.graph = isinstance(extractor, fx.GraphModule)
        self.pieces: list[_Piece] = []  # calls in the order of their ends, or single nodes
        self._extractor = extractor
        self._saved: list[dict[int, int]] = []  # address and bytes
        self._alive: list[torch.Tensor] = []  # an address is unique among what is alive
        self._free: set[int] = set()  # addresses of what is in memory in any case

    def run(self, shape: tuple[int, ...]) -> None:
        """Run the extractor on the meta device."""
        state = meta_state(self._extractor)
        for name, parameter in self._extractor.named_parameters():
            state[name].requires_grad_(parameter.requires_grad)
        image = torch.empty(*shape, device="meta")
        self._free = {t.untyped_storage()._cdata for t in (image, *state.values())}
        if self.graph:
            forwards = {"": self._run_graph}
        else:
            forwards = {
                name: partial(self._run_module, name, module, module.forward)
                for name, module in self._extractor.named_modules()
                if name and [*module.children()]
            }

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            self._alive.append(tensor)
            self._saved.append(self._sizes([tensor]))
            return tensor

        saving = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with _forwards(self._extractor, forwards), torch.enable_grad(), saving:
            torch.func.functional_call(self._extractor, state, (image,), tie_weights=False)

    def memory(self, pieces: Sequence[_Piece]) -> int:
        """Bytes kept for the backward pass, and of the largest of the pieces, which are not."""
        inside = {position for piece in pieces for position in piece.saved}
        kept = dict(
            item
            for sizes in (
                *(sizes for i, sizes in enumerate(self._saved) if i not in inside),
                *(piece.sizes for piece in pieces),
            )
            for item in sizes.items()
        )
        largest = max((sum(self._saved_in(p.saved).values()) for p in pieces), default=0)
        return sum(kept.values()) + largest

    def choose(self, limit: int) -> list[_Piece]:
        """The calls of the outermost modules that save at most so many bytes."""
        calls: dict[str, list[_Piece]] = {}
        for piece in self.pieces:
            calls.setdefault(piece.name, []).append(piece)
        modules = dict(self._extractor.named_modules())
        chosen: list[str] = []
        inside: set[nn.Module] = set()
        # what is around a module comes before it, even if they share it
        for name in sorted(calls, key=lambda name: -len([*modules[name].modules()])):
            if modules[name] not in inside and all(
                piece.repeatable
                and piece.memory < sum(self._saved_in(piece.saved).values()) <= limit
                for piece in calls[name]
            ):
                chosen.append(name)
                inside.update(modules[name].modules())
        return [piece for name in chosen for piece in calls[name]]

    def cut(self, limit: int) -> list[_Piece]:
        """Pieces of the graph that save just more than so many bytes."""
        pieces, first, saved = [], self.pieces[0], {}
        for piece, following in zip(self.pieces, [*self.pieces[1:], None]):
            saved |= self._saved_in(piece.saved)
            if following is None or (sum(saved.values()) > limit and following.repeatable):
                positions = range(first.saved.start, piece.saved.stop)
                pieces.append(_Piece(piece.name, first.inputs, first.sizes, positions))
                first, saved = following, {}
        return pieces

    def _run_module(
        self, name: str, module: nn.Module, forward: Callable, *args: Any, **kwargs: Any
    ) -> Any:
        note = self._noting(name, (args, kwargs))
        output = forward(*args, **kwargs)
        # a hook in the module would be called again; those of the module itself are not
        inner = (m for m in module.modules() if m is not module)
        if not any(m._forward_hooks or m._forward_pre_hooks for m in inner):
            note()
        return output

    def _run_graph(self, x: torch.Tensor) -> None:
        interpreter = fx.Interpreter(self._extractor)
        image, *nodes, output = interpreter.graph.nodes
        last_use = {n: i for i, user in enumerate(nodes) for n in user.all_input_nodes}
        interpreter.env = {image: x}
        for i, node in enumerate(nodes):
            alive = [value for n, value in interpreter.env.items() if last_use.get(n, -1) >= i]
            note = self._noting(node.name, alive)
            interpreter.env[node] = interpreter.run_node(node)
            note()

    def _noting(self, name: str, inputs: Any) -> Callable[[], None]:
        """Called before a piece runs; what it returns is called after."""
        tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
        versions = [(tensor, tensor._version) for tensor in tensors]
        sizes, start = self._sizes(tensors), len(self._saved)

        def note() -> None:
            saved = range(start, len(self._saved))
            self.pieces.append(_Piece(name, versions, sizes, saved))

        return note

    def _saved_in(self, positions: range) -> dict[int, int]:
        parts = self._saved[positions.start : positions.stop]
        return {address: size for part in parts for address, size in part.items()}

    def _sizes(self, tensors: Sequence[torch.Tensor]) -> dict[int, int]:
        sizes = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._free:
                sizes[storage._cdata] = storage.nbytes()
        return sizes
