"""How many layers of a backbone follow each parameter, for layer-wise learning-rate decay."""

import re
from collections.abc import Mapping

from ..adapt.lora import own_name
from ..backbones.feature_backbone import FeatureBackbone


def parameter_depths(backbone: FeatureBackbone) -> dict[str, int]:
    """How many layers of a backbone follow each parameter, a classifier counted as one.

    A timm model's layers are those of its own ``group_matcher()``, so that the depths are those of
    the classification model. Those of other models are found by :func:`depths_by_execution`.

    Returns:
        name of each parameter to its depth: 1 is the last block.
    """
    depths = backbone.parameter_depths()
    if depths is None:
        names = {name: own_name(name) for name, _ in backbone.named_parameters()}
        sizes = {names[name]: value.ndim for name, value in backbone.named_parameters()}
        order = [name for name in backbone.execution_order if name in sizes]
        found = depths_by_execution({name: sizes[name] for name in order})
        depths = {name: found[own] for name, own in names.items() if own in found}
    return depths


def depths_by_execution(parameters: Mapping[str, int]) -> dict[str, int]:
    """Depths from the names of parameters and the order in which they are used.

    A layer is what lies under the first module with a number at the end of its name:
    ``features.3``, ``encoder.layers.encoder_layer_0``, ``Mixed_5b``; or under the second, if that
    follows at once or after ``blocks`` or ``layers``, and has modules of its own: ``layer1.0``,
    ``stages.0.blocks.1``, ``denseblock1.denselayer2``. So a ResNet has a layer for each block, as
    timm has it, and not for each stage. A parameter with no such module is in the layer of the
    parameter before it; what runs before the first such module is a layer too (a ViT's embeddings).
    A layer of nothing but vectors is a part of the layer before it (a convolution and its norm).

    Args:
        parameters: name to number of dimensions, in the order of first use.

    Returns:
        name to depth; the last layer has 1.
    """
    paths = [name.split(".")[:-1] for name in parameters]
    parents = {".".join(path[:n]) for path in paths for n in range(1, len(path))}
    layers: dict[str, list[str]] = {}
    layer = ""
    for name, path in zip(parameters, paths):
        layer = _layer(path, parents) or layer
        layers.setdefault(layer, []).append(name)
    merged: list[list[str]] = []
    for names in layers.values():
        if merged and all(parameters[name] < 2 for name in names):
            merged[-1] += names
        else:
            merged.append(names)
    return {name: len(merged) - i for i, names in enumerate(merged) for name in names}


def _layer(path: list[str], parents: set[str]) -> str:
    """The part of a module's path that names a layer; ``parents`` are the paths with modules."""
    for n, module in enumerate(path, 1):
        if re.search(r"\d[a-z]?$", module):
            end = n + (path[n : n + 1] in (["blocks"], ["layers"]))
            inner = ".".join(path[: end + 1])
            numbered = module[-1].isdigit() and end < len(path) and path[end][-1].isdigit()
            return inner if numbered and inner in parents else ".".join(path[:n])
    return ""
