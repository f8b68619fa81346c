"""Measuring the catalogue: every model as a backbone with default levels, on the meta device."""

import json
import math
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ..backbones import BACKBONES
from ..measure.meta import meta_state, run_on_meta
from ..messages import first_line
from ..testing.contract import check_build, check_sizes
from ..testing.trial import SUBJECTS, Trial
from .facts import DATA, VERSIONS

SIDE = 224
SAVE_EVERY = 10  # models


def count_macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-adds of a model for an input of a shape, by torch's FlopCounterMode.

    Those of convolutions, of linear maps and of attention are counted, as is usual.

    Args:
        model: in eval mode; it is not touched.
        shape: of its input.
    """
    with FlopCounterMode(display=False) as counter:
        run_on_meta(model, meta_state(model), shape)
    return counter.get_total_flops() // 2


def measure(source: str, name: str) -> list[Any]:
    """Measure a model.

    Args:
        source: a key of ``BACKBONES``.
        name: of one of its models.

    Returns:
        the arguments of :class:`detbackbones.catalog.facts.Facts` after the source.
    """
    trial = Trial(name, SUBJECTS[source])
    check_build(trial)
    backbone = trial.backbone
    if backbone.img_size:  # whether it can be built for another
        check_sizes(trial)
    step = backbone.size_divisibility
    side = backbone.img_size or math.ceil(SIDE / step) * step
    macs = count_macs(backbone.eval().extractor, (1, backbone.source.in_channels, side, side))
    row = trial.row
    levels = [level[1:] if level[3] else level[1:3] for level in row["levels"]]
    gmacs = float(f"{macs / 1e9:.4g}")
    return [row["parameters"], gmacs, side, row["size"], levels, row["batch_norm"]]


def write() -> Iterator[str]:
    """Measure what the data file lacks for the installed versions, and write it.

    A run that was interrupted goes on.

    Yields:
        why a model could not be measured, a sentence each.
    """
    data = json.loads(DATA.read_text()) if DATA.exists() else {}
    if data.get("versions") != VERSIONS:
        data = {"versions": VERSIONS, "models": {}}
    models = {source: data["models"].get(source, {}) for source in BACKBONES}
    todo = [
        (source, name)
        for source, kind in BACKBONES.items()
        for name in kind.source_class.names()
        if name not in models[source]
    ]
    for count, (source, name) in enumerate(tqdm(todo, unit="model"), 1):
        try:
            models[source][name] = measure(source, name)
        except Exception as error:  # a model may fail in any way
            yield f"{source} {name}: {type(error).__name__}: {first_line(error)}"
        if count % SAVE_EVERY == 0 or count == len(todo):
            DATA.write_text(_text(models))


def _text(models: dict[str, dict[str, list]]) -> str:
    """The data file, a line a model."""
    parts = []
    for source, rows in models.items():
        lines = [
            f"{json.dumps(name)}: {json.dumps(row, separators=(',', ':'))}"
            for name, row in sorted(rows.items())
        ]
        parts.append(f"{json.dumps(source)}: {{\n" + ",\n".join(lines) + "\n}")
    return f'{{"versions": {json.dumps(VERSIONS)}, "models": {{\n' + ",\n".join(parts) + "}}\n"
