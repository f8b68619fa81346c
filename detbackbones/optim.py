"""Parameter groups: layer-wise learning-rate decay, no weight decay on norms and biases."""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from detectron2.utils import comm
from tabulate import tabulate
from torch import nn

from .feature_backbone import FeatureBackbone

logger = logging.getLogger(__name__)


@dataclass
class _Part:
    """A row of the table: a layer of a backbone, a backbone, or the rest."""

    name: str
    lr: float
    first: str = ""
    tensors: int = 0
    parameters: int = 0
    decaying: int = 0

    def add(self, name: str, parameter: nn.Parameter, decays: bool) -> None:
        self.first = self.first or name
        self.tensors += 1
        self.parameters += parameter.numel()
        self.decaying += parameter.numel() * decays


def param_groups(
    model: nn.Module,
    base_lr: float,
    *,
    weight_decay: float,
    backbone_lr_factor: float = 1.0,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, with a learning rate for each layer of a backbone.

    The parameters of a backbone have base_lr * backbone_lr_factor * layer_decay^depth, all others
    base_lr. The last block has depth 1, the one before it 2, a final norm 0: as timm's
    ``param_groups_layer_decay`` has it for the classification model, and for a ViT detectron2's
    ``get_vit_lr_decay_rate``; see :func:`parameter_depths`.

    Weight decay is for the matrices and kernels of linear maps. Biases, norms, tokens, position
    embeddings and biases, layer scales, ``nn.Embedding`` and what timm's ``no_weight_decay()``
    names have none. The main process logs a table of the groups.

    Example::

        optimizer.params = L(param_groups)(
            base_lr="${..lr}", weight_decay="${..weight_decay}", layer_decay=0.7
        )

    Args:
        model: a detector, or a backbone; what requires no gradient is left out.
        base_lr: learning rate of all but the backbones.
        weight_decay: of the parameters that have one.
        backbone_lr_factor: multiplies the learning rate of every FeatureBackbone in the model.
        layer_decay: learning rate of a layer divided by that of the next; 1 is one for all.

    Returns:
        dicts of ``params``, ``lr`` and ``weight_decay``, no two with the same lr and decay.

    Raises:
        ValueError: if a number is out of range, or is for a backbone and there is none.
    """
    _check_number("base_lr", base_lr, zero=True)
    _check_number("weight_decay", weight_decay, zero=True)
    _check_number("backbone_lr_factor", backbone_lr_factor)
    _check_number("layer_decay", layer_decay, most=1)
    backbones = {n: m for n, m in model.named_modules() if isinstance(m, FeatureBackbone)}
    for_backbones = {"backbone_lr_factor": backbone_lr_factor, "layer_decay": layer_decay}
    for key, value in for_backbones.items():
        if value != 1 and not backbones:
            raise ValueError(
                f"{key}={value} is for a FeatureBackbone, and {type(model).__name__} has none: "
                "the only value for it is 1"
            )

    part_of: dict[int, _Part] = {}  # by id of the parameter
    exempt: set[int] = set()
    for prefix, backbone in backbones.items():
        depths = parameter_depths(backbone) if layer_decay != 1 else {}
        no_decay = backbone.no_weight_decay()
        layers = {}
        for name, parameter in backbone.named_parameters():
            depth = depths.get(name, 0)
            if depth not in layers:
                lr = base_lr * backbone_lr_factor * layer_decay**depth
                suffix = f", depth {depth}" if depths else ""
                layers[depth] = _Part((prefix or "backbone") + suffix, lr)
            part_of[id(parameter)] = layers[depth]
            if name in no_decay:
                exempt.add(id(parameter))

    rest, frozen = _Part("the rest", base_lr), _Part("frozen", math.nan)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            part = part_of.get(id(parameter), rest) if parameter.requires_grad else frozen
            decays = _is_weight(module, key, parameter) and id(parameter) not in exempt
            part.add(f"{prefix}.{key}".lstrip("."), parameter, decays)
            if part is not frozen:
                lr, decay = part.lr, weight_decay if decays else 0.0
                group = {"params": [], "lr": lr, "weight_decay": decay}
                groups.setdefault((lr, decay), group)["params"].append(parameter)
    if comm.is_main_process():
        parts = {id(part): part for part in [*part_of.values(), rest, frozen] if part.tensors}
        logger.info("parameter groups\n%s", _table(parts.values(), weight_decay))
    return list(groups.values())


def _is_weight(module: nn.Module, key: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is of a linear map: ``weight``, ``in_proj_weight``, ``weight_ih_l0``."""
    return parameter.ndim >= 2 and "weight" in key and not isinstance(module, nn.Embedding)


def _check_number(key: str, value: Any, *, zero: bool = False, most: float = math.inf) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= most or value == math.inf or (value == 0 and not zero):
        valid = "from 0" if zero else "above 0"
        valid += f" and at most {most}" if most < math.inf else ""
        raise ValueError(f"{key}={value!r} must be a number {valid}")


def _table(parts: list[_Part], weight_decay: float) -> str:
    """Rows from the first layer to the last, then the rest and what is frozen."""
    rows = [
        (
            part.name,
            part.first,
            "-" if math.isnan(part.lr) else f"{part.lr:.3g}",
            f"{part.tensors:,}",
            f"{part.parameters:,}",
            "-" if math.isnan(part.lr) else f"{part.decaying:,}",
        )
        for part in parts
    ]
    headers = ("part", "first of it", "lr", "tensors", "parameters", f"decaying {weight_decay:g}")
    align = ("left", "left", "right", "right", "right", "right")
    return tabulate(rows, headers, tablefmt="github", colalign=align, disable_numparse=True)


def parameter_depths(backbone: FeatureBackbone) -> dict[str, int]:
    """How many layers of a backbone follow each parameter, a classifier counted as one.

    A timm model's layers are those of its own ``group_matcher()``, so that the depths are those of
    the classification model. Those of other models are found by :func:`depths_by_execution`.

    Returns:
        name of each parameter to its depth: 1 is the last block.
    """
    depths = backbone.parameter_depths()
    if depths is None:
        parameters = dict(backbone.named_parameters())
        order = [name for name in backbone.execution_order if name in parameters]
        depths = depths_by_execution({name: parameters[name].ndim for name in order})
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
