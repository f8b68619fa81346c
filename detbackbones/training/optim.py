"""Parameter groups: layer-wise learning-rate decay, no weight decay on norms and biases."""

import logging
import math
from typing import Any

from detectron2.solver.build import reduce_param_groups
from detectron2.utils import comm
from tabulate import tabulate
from torch import nn

from ..backbones.feature_backbone import FeatureBackbone
from .depths import parameter_depths

logger = logging.getLogger(__name__)

REST, FROZEN = "the rest", "frozen"


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
    names have none. Where learning rates differ the main process logs a table of the groups.

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

    parts: dict[nn.Parameter, tuple[str, float]] = {}  # of a backbone: name, learning rate
    exempt: set[nn.Parameter] = set()
    for prefix, backbone in backbones.items():
        depths = parameter_depths(backbone) if layer_decay != 1 else {}
        no_decay = backbone.no_weight_decay()
        for name, parameter in backbone.named_parameters():
            depth = depths.get(name, 0)
            part = (prefix or "backbone") + (f", depth {depth}" if depths else "")
            parts[parameter] = part, base_lr * backbone_lr_factor * layer_decay**depth
            if name in no_decay:
                exempt.add(parameter)

    groups, table = [], {}
    for name, parameter in model.named_parameters():
        path, _, key = name.rpartition(".")
        part, lr = parts.get(parameter, (REST, base_lr))
        decays = _is_weight(model.get_submodule(path), key, parameter) and parameter not in exempt
        if parameter.requires_grad:
            decay = weight_decay if decays else 0.0
            groups.append({"params": [parameter], "lr": lr, "weight_decay": decay})
        else:
            part = FROZEN
        table.setdefault(part, []).append((name, lr, parameter.numel(), decays))
    if comm.is_main_process():
        level = logging.DEBUG if backbone_lr_factor == layer_decay == 1 else logging.INFO
        logger.log(level, "parameter groups\n%s", _table(table, weight_decay))
    return reduce_param_groups(groups)


def _is_weight(module: nn.Module, key: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is of a linear map: ``weight``, ``in_proj_weight``, ``weight_ih_l0``."""
    return parameter.ndim >= 2 and "weight" in key and not isinstance(module, nn.Embedding)


def _check_number(key: str, value: Any, *, zero: bool = False, most: float = math.inf) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= most or value == math.inf or (value == 0 and not zero):
        valid = "from 0" if zero else "above 0"
        valid += f" and at most {most}" if most < math.inf else ""
        raise ValueError(f"{key}={value!r} must be a number {valid}")


def _table(parts: dict[str, list[tuple[str, float, int, bool]]], weight_decay: float) -> str:
    """The backbones from the first layer to the last, then the rest and what is frozen.

    Args:
        parts: for each part its tensors: name, learning rate, number of values, whether they decay.
        weight_decay: of those that decay.
    """
    rows = []
    for part in sorted(parts, key=lambda part: (part == FROZEN, part == REST)):
        names, lrs, sizes, decays = zip(*parts[part])
        decaying = sum(size for size, decays in zip(sizes, decays) if decays)
        lr, decaying = ("-", "-") if part == FROZEN else (f"{lrs[0]:.3g}", f"{decaying:,}")
        rows.append((part, names[0], lr, f"{len(names):,}", f"{sum(sizes):,}", decaying))
    headers = ("part", "first of it", "lr", "tensors", "parameters", f"decaying {weight_decay:g}")
    align = ("left", "left", "right", "right", "right", "right")
    return tabulate(rows, headers, tablefmt="github", colalign=align, disable_numparse=True)
