"""The graph of a torchvision model, in which its levels are found by tracing."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.ops import StochasticDepth

from ..measure.attempts import first_success
from ..measure.levels import measure_shape
from ..measure.meta import meta_state, run_on_meta
from ..measure.sizes import ANY_SIZE, SizeRule
from ..messages import first_line, one_of

# A module that is traced through cannot be put into eval mode alone, as freeze_at does.
TRACER = {"leaf_modules": [StochasticDepth]}


def find_level_nodes(model: nn.Module, rules: Sequence[SizeRule] = (ANY_SIZE,)) -> dict[str, str]:
    """Find a model's levels by tracing it.

    A level is what enters the block that halves the resolution, or what the model ends with. The
    block is the largest module in which no other resolution occurs: of a ResNet, ``layer2`` and not
    the strided convolution in it, before which two others have already run.

    Args:
        model: any that torch.fx can trace.
        rules: image sizes that it may take; the first that it does take are used.

    Returns:
        level name (``res2`` for stride 4) to graph node, fine to coarse.

    Raises:
        ValueError: if there are no feature maps.
    """
    nodes = [node for node in _node_names(model)[1] if node != "x"]
    extractor = extractor_of(model, nodes[:1], nodes)

    def run(sizes: SizeRule) -> dict[str, str]:
        return _level_nodes(model, _run(extractor, "eval", sizes.probe), sizes)

    return first_success(partial(run, sizes) for sizes in rules)


def _level_nodes(model: nn.Module, outputs: dict[str, Any], sizes: SizeRule) -> dict[str, str]:
    """See :func:`find_level_nodes`; ``outputs`` are those of all nodes."""
    classifier = [name for name, _ in model.named_children()][-1] + "."
    if outputs[next(reversed(outputs))].dim() == 4:
        classifier = None
    strides = {
        node: measured[1]
        for node, output in outputs.items()
        if isinstance(output, torch.Tensor)
        and output.dim() == 4
        and not (classifier and node.startswith(classifier))
        and (measured := measure_shape(output.shape, sizes.probe, sizes.resample))
    }
    order = list(strides)
    levels = {}
    coarsest = 1
    for node in order:
        if strides[node] <= coarsest:
            continue
        block = _block(node, strides, {coarsest, strides[node]})
        start = next(i for i, n in enumerate(order) if n == block or n.startswith(block + "."))
        if start:
            levels[coarsest] = order[start - 1]
        coarsest = strides[node]
    if coarsest == 1:
        raise ValueError("it has no feature maps with a whole stride above 1")
    levels[coarsest] = [n for n in order if strides[n] == coarsest][-1]
    return {f"res{stride.bit_length() - 1}": node for stride, node in levels.items()}


def _block(node: str, strides: dict[str, int], allowed: set[int]) -> str:
    """The outermost module around a node in which only the allowed strides occur."""
    parts = node.split(".")
    for depth in range(1, len(parts)):
        path = ".".join(parts[:depth])
        if {s for n, s in strides.items() if n.startswith(path + ".")} <= allowed:
            return path
    return node


def graph_nodes(model: nn.Module, size: tuple[int, int] = (224, 224)) -> dict[str, tuple[str, str]]:
    """The nodes of a torchvision model's graph, which ``return_nodes`` can name.

    Args:
        model: any that torch.fx can trace.
        size: (H, W) of the images.

    Returns:
        node, in the order of execution, to its output's shape without the images ("64x56x56", or ""
        for what is no tensor) and the modes in which it runs ("train", "eval" or "train, eval").

    Raises:
        ValueError: if the model does not take such images in both modes.
    """
    names = _node_names(model)
    train, evaluation = [[node for node in nodes if node != "x"] for nodes in names]
    extractor = extractor_of(model, train, evaluation)
    modes: dict[str, list[str]] = {}
    shapes = {}
    for mode, nodes in (("train", train), ("eval", evaluation)):
        try:
            outputs = _run(extractor, mode, size)
        except Exception as error:  # Inception's auxiliary classifier takes no small image
            raise ValueError(
                f"size={size[0]}x{size[1]} does not suit {type(model).__name__} in {mode} mode: "
                f"{first_line(error)}"
            ) from error
        for node in nodes:
            modes.setdefault(node, []).append(mode)
            tensor = isinstance(outputs[node], torch.Tensor)
            shapes[node] = "x".join(map(str, outputs[node].shape[1:])) if tensor else ""
    order = {node: i for i, node in enumerate(train)}
    return {
        node: (shapes[node], ", ".join(modes[node]))
        for node in sorted(modes, key=lambda node: order.get(node, len(order)))
    }


def check_nodes(
    return_nodes: Mapping[str, str] | Sequence[str], model: nn.Module
) -> dict[str, str]:
    """``return_nodes`` as a dictionary in the order of execution.

    Args:
        return_nodes: nodes of the graph or modules, to their names in the output, if they have
            others there.
        model: the whole model.

    Raises:
        ValueError: if a node does not exist, or a name is given twice.
    """
    if not isinstance(return_nodes, Mapping):
        return_nodes = {name: name for name in return_nodes}
    # node or module -> position of its last operation, for outputs come in the graph's order
    valid = {}
    for position, name in enumerate(_node_names(model)[1]):
        parts = name.split(".")
        valid.update({".".join(parts[:n]): position for n in range(1, len(parts) + 1)})
    for node in return_nodes:
        one_of("return_nodes", node, valid)
    if not return_nodes or len(set(return_nodes.values())) < len(return_nodes):
        raise ValueError(f"return_nodes={dict(return_nodes)} must give different names to nodes")
    return {str(node): str(return_nodes[node]) for node in sorted(return_nodes, key=valid.get)}


def extractor_of(
    model: nn.Module, nodes: Sequence[str], in_evaluation: Sequence[str] | None = None
) -> fx.GraphModule:
    """torchvision's extractor of some nodes, whose state dict has the model's own keys alone.

    Args:
        model: any that torch.fx can trace.
        nodes: the nodes or modules whose outputs it gives.
        in_evaluation: those whose outputs it gives in eval mode, if they are others.
    """
    extractor = create_feature_extractor(
        model,
        train_return_nodes=list(nodes),
        eval_return_nodes=list(nodes if in_evaluation is None else in_evaluation),
        tracer_kwargs=TRACER,
        suppress_diff_warning=True,  # of nodes that run in one mode alone
    )
    for graph in (extractor.train_graph, extractor.eval_graph):
        *nodes, output = graph.nodes
        for node in reversed(nodes):  # what follows the last output, kept for assertions in it
            if node in output.all_input_nodes:
                break
            graph.erase_node(node)
    extractor.recompile()
    keys = model.state_dict()
    for name, buffer in list(extractor.named_buffers(recurse=False)):
        if name not in keys:  # a constant of the graph
            extractor.register_buffer(name, buffer, persistent=False)
    return extractor


def switch_off_dropout(extractor: nn.Module, frozen: frozenset[str]) -> None:
    """Switch off dropout that is a function, whose mode is written in the graph.

    Args:
        extractor: changed if it is a graph.
        frozen: names of the modules that are frozen; what follows them up to the next other module
            is frozen too.
    """
    if not isinstance(extractor, fx.GraphModule):
        return
    inside = bool(frozen)
    for node in extractor.train_graph.nodes:
        if node.op == "call_module":
            inside = node.target in frozen
        elif inside and node.kwargs.get("training"):
            node.update_kwarg("training", False)
    extractor.recompile()


def _node_names(model: nn.Module) -> tuple[list[str], list[str]]:
    """The nodes of the graph in train and in eval mode."""
    return get_graph_node_names(model, TRACER, suppress_diff_warning=True)


def _run(extractor: fx.GraphModule, mode: str, size: tuple[int, int]) -> dict[str, Any]:
    """The output of every node, in the order of execution, without memory or arithmetic."""
    extractor.train(mode == "train")
    channels = first_convolution(extractor)[1].in_channels
    return run_on_meta(extractor, meta_state(extractor), (2, channels, *size))


def first_convolution(model: nn.Module) -> tuple[str, nn.Conv2d]:
    """The convolution that takes the images, and its name."""
    return next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
