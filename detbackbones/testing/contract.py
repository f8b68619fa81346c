"""The contract that a backbone of a model keeps: its points, each of which tries one thing.

A ``check_`` function raises where its point is not kept; :func:`contract` tries them all, and
:func:`check_source` is for the author of a source.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.modeling import Backbone
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import nn

from ..adapt.norm import is_batch_norm
from ..backbones.pyramid import build_pyramid
from ..backbones.source import Source
from ..measure.levels import is_power_of_two
from ..messages import first_line
from .raw import flat
from .trial import PAIRS, SUBJECTS, Subject, Trial, padded, pairs_for, some

TOLERANCE = 1e-4  # largest difference, relative to the largest value


class Violation(AssertionError):
    """A point of the contract that a backbone does not keep; the text says how."""


def check_build(trial: Trial) -> None:
    trial.backbone = backbone = trial.on_meta()
    shapes = backbone.output_shape()
    coarsest = max(shape.stride for shape in shapes.values())
    if backbone.img_size:
        rule = f"square {backbone.img_size}"
    elif backbone.size_divisibility == coarsest:
        rule = "any"
    else:
        rule = f"multiples of {backbone.size_divisibility}"
    trial.row |= {
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "levels": [[n, s.channels, s.stride, n in backbone.resampled] for n, s in shapes.items()],
        "size": rule,
        "batch_norm": sorted({type(m).__name__ for m in backbone.modules() if is_batch_norm(m)}),
    }


def check_sizes(trial: Trial) -> None:
    backbone = trial.backbone.eval()
    with torch.no_grad():
        for pair in pairs_for(backbone):
            x = padded(trial.source.in_channels, backbone, pair)
            trial.seen.append((x, backbone(x)))
        if pairs_for(backbone)[1] == list(PAIRS[1]):
            return
        try:
            backbone(padded(trial.source.in_channels, backbone, PAIRS[1]))
        except ValueError as error:
            if "img_size" not in str(error):
                raise Violation(f"larger images are refused without img_size: {error}") from error
        else:
            raise Violation(f"img_size={backbone.img_size}, but larger images are taken")
        check_larger(trial)


def check_larger(trial: Trial) -> None:
    """A model of one size that can be built for another takes both pairs when it is."""
    native = trial.backbone.img_size
    side = native * math.ceil(max(map(max, PAIRS[1])) / native)
    try:
        larger = trial.on_meta(img_size=side).eval()
    except ValueError:
        trial.row["size"] += " only"
        return
    for pair in PAIRS:
        x = padded(trial.source.in_channels, larger, pair)
        compare_shapes(larger(x), larger, x)
    trial.row["size"] += " or img_size"


def check_shapes(trial: Trial) -> None:
    backbone = trial.backbone
    strides = [shape.stride for shape in backbone.output_shape().values()]
    if strides != sorted(strides):
        raise Violation(f"the strides {strides} are not fine to coarse")
    x = trial.batch()
    if not trial.seen:
        trial.seen.append((x, backbone.eval()(x)))
    trial.trained = backbone.train()(x)
    for images, outputs in [*trial.seen, (x, trial.trained)]:
        compare_shapes(outputs, backbone, images)


def compare_shapes(outputs: dict[str, torch.Tensor], backbone: Backbone, x: torch.Tensor) -> None:
    """Outputs for the images (N, C, H, W) are what ``output_shape()`` says."""
    shapes = backbone.output_shape()
    if list(outputs) != list(shapes):
        raise Violation(f"the levels are {list(outputs)}, declared are {list(shapes)}")
    for name, output in outputs.items():
        rows, columns = (-(-side // shapes[name].stride) for side in x.shape[2:])
        expected = (len(x), shapes[name].channels, rows, columns)
        if output.shape != expected or not output.is_floating_point():
            raise Violation(
                f"{name} has shape {tuple(output.shape)} of {output.dtype} for an input of "
                f"{x.shape[2]}x{x.shape[3]}, declared is {expected}"
            )


def check_neck(trial: Trial) -> None:
    backbone = trial.backbone
    strides = {shape.stride for shape in backbone.output_shape().values()}
    label = ""
    if not all(map(is_power_of_two, strides)):
        try:
            build_pyramid(bottom_up=backbone, top_block=LastLevelMaxPool())
        except ValueError as error:
            if "patch_size=16" not in str(error):
                raise Violation(f"the strides are refused without patch_size=16: {error}") from None
        else:
            raise Violation(f"a pyramid on strides {sorted(strides)} is not refused")
        if not trial.source.resizes_patches:
            trial.row["neck"] = "none"
            return
        backbone = trial.on_meta(patch_size=16)
        label = " with patch_size=16"
    with torch.device("meta"):
        neck = build_pyramid(bottom_up=backbone, top_block=LastLevelMaxPool()).eval()
    kind = type(neck).__name__
    if isinstance(neck, FPN):
        kind = "FPN" if {4, 8, 16, 32} <= strides else "completed FPN"
    trial.row["neck"] = kind + label
    found = {name: shape.stride for name, shape in neck.output_shape().items()}
    if found != {f"p{n}": 2**n for n in range(2, 7)}:
        raise Violation(f"the pyramid has the levels and strides {found}")
    x = padded(trial.source.in_channels, neck, pairs_for(backbone)[0])
    with torch.no_grad():
        compare_shapes(neck(x), neck, x)


def check_gradients(trial: Trial) -> None:
    names = list(trial.backbone.output_shape())
    x = trial.batch()
    for subset in dict.fromkeys((tuple(names), tuple(names[:1]))):
        backbone, outputs = trial.backbone, trial.trained
        if len(subset) < len(names):
            backbone = trial.on_meta(out_features=list(subset))
            outputs = None
        outputs = outputs or backbone.train()(x)
        if tuple(outputs) != subset:
            raise Violation(f"out_features={list(subset)} gives {list(outputs)}")
        sum(output.sum() for output in outputs.values()).backward()
        parameters = {
            key: value
            for key, value in backbone.state_dict(keep_vars=True).items()
            if isinstance(value, nn.Parameter)
        }
        missed = [key for key, p in parameters.items() if p.requires_grad and p.grad is None]
        if missed:
            raise Violation(f"{list(subset)} give no gradient to {some(missed)}")
        unused = [key for key, p in parameters.items() if not p.requires_grad]
        if unused:
            own = trial.source.model.named_parameters()
            frozen = {flat(key) for key, p in own if not p.requires_grad}
            unused = [key for key in unused if flat(key) not in frozen]
        if unused:
            raise Violation(f"{list(subset)} do not need {some(unused)}")


def difference(
    trial: Trial, backbone: Backbone, x: torch.Tensor, maps: Sequence[torch.Tensor]
) -> str:
    """How the levels differ from the source model's maps, resampled where the backbone says so."""
    with torch.no_grad():
        levels = backbone.eval()(x)
    for name, level in levels.items():
        exponent = round(math.log2(x.shape[3] / level.shape[3]))
        expected = [
            m
            for m in maps
            if m.shape[1] == level.shape[1]
            and round(math.log2(x.shape[3] / m.shape[3])) == exponent
        ]
        if name in backbone.resampled:
            expected = [F.interpolate(m, level.shape[2:], mode="bilinear") for m in expected]
        differences = [
            float((level - m).abs().max() / m.abs().max())
            for m in (expected if trial.any_map else expected[-1:])
            if m.shape == level.shape
        ]
        if not any(value < TOLERANCE for value in differences):
            found = f"by {min(differences):.1e}" if differences else "in shape"
            return f"{name} differs from the source model's maps {found}"
    return ""


def compare_values(trial: Trial, backbone: Backbone) -> None:
    """The levels are the source model's own maps."""
    model, x, maps = trial.reference
    found = difference(trial, backbone, x, maps)
    if found:  # random weights let rounding grow in some models: double precision tells
        x = x.double()
        with torch.no_grad():
            maps = trial.maps(model.double(), x)
        found = difference(trial, backbone.double(), x, maps)
        model.float()
        backbone.float()
    if found:
        raise Violation(found)


def loaded(trial: Trial, **kwargs: Any) -> Backbone:
    """The backbone, with real numbers: the weights of the reference."""
    backbone, missing = trial.loaded(**kwargs)
    if missing:
        raise Violation(f"the source model's weights leave out {some(missing)}")
    return backbone


def check_batch_norm(trial: Trial) -> None:
    if not trial.row["batch_norm"]:
        return
    compare_values(trial, loaded(trial, norm="FrozenBN", fold=False))
    backbone = loaded(trial, norm="FrozenBN")
    compare_values(trial, backbone)
    norms = {
        flat(f"{name}.{key}")
        for name, module in trial.reference[0].named_modules()
        if is_batch_norm(module)
        for key in module.state_dict()
    }
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    frozen = {key for key in before if flat(key) in norms}
    if not frozen:
        raise Violation("the batch norms of the source model are not in the state dict")
    learning = [p for p in backbone.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=1e-3, weight_decay=0.1)
    size = trial.image_size
    if trial.row["points"]["sizes"] == "ok":  # then smaller ones will do
        step = backbone.size_divisibility
        size = (trial.source.in_channels, *2 * [step * math.ceil(128 / step)])
    for _ in range(3):
        optimizer.zero_grad()
        outputs = backbone.train()(torch.randn(2, *size))
        sum(output.square().mean() for output in outputs.values()).backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
    after = backbone.state_dict()
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    if changed & frozen:
        raise Violation(f"training changes {some(sorted(changed & frozen))}")
    moved = {flat(key) for key in changed}
    kept = [k for k, p in backbone.named_parameters() if p.requires_grad and flat(k) not in moved]
    if kept:
        raise Violation(f"training leaves {some(kept)} as it was")


def check_weights(trial: Trial) -> None:
    compare_values(trial, loaded(trial))


POINTS = {
    "build": check_build,
    "sizes": check_sizes,
    "shapes": check_shapes,
    "neck": check_neck,
    "gradients": check_gradients,
    "batch norm": check_batch_norm,
    "weights": check_weights,
}
WITH_NUMBERS = ("batch norm", "weights")


def new_row(source: str, name: str) -> dict[str, Any]:
    """What the contract begins with: the model, and no points yet.

    Args:
        source: a key of ``SUBJECTS``.
        name: of a model of it.
    """
    family = SUBJECTS[source].source.family(name)
    return {"source": source, "name": name, "family": family, "points": {}}


def contract(
    row: dict[str, Any],
    max_params: float,
    report: Callable[[dict], None] = lambda row: None,
    subject: Subject | None = None,
) -> dict[str, Any]:
    """Try every point of the contract on a model.

    Args:
        row: as :func:`new_row` makes it.
        max_params: millions of parameters, above which the points with real numbers are skipped.
        report: called with the row after each point.
        subject: whose model it is; by default that of ``SUBJECTS``.

    Returns:
        the row, with the facts of the model and each point "ok", "skipped" or why it failed.
    """
    start = time.perf_counter()
    trial = Trial(row["name"], subject or SUBJECTS[row["source"]], row)
    for point, check in POINTS.items():
        large = point in WITH_NUMBERS and row.get("parameters", 0) > max_params * 1e6
        if large or row["points"].get("build", "ok") != "ok":
            result = "skipped"
        else:
            try:
                check(trial)
                result = "ok"
            except Exception as error:  # a model may fail in any way
                refused = point == "build" and isinstance(error, ValueError)
                kind = "refused" if refused else type(error).__name__
                text = first_line(error)
                result = text if isinstance(error, Violation) else f"{kind}: {text}"
        row["points"][point] = result
        row["seconds"] = round(time.perf_counter() - start, 2)
        report(row)
    return row


def check_source(
    source: type[Source],
    model_name: str,
    build: Callable[..., Backbone] | None = None,
    max_params: float = math.inf,
) -> dict[str, Any]:
    """Try the contract on a model of a source, as scikit-learn's ``check_estimator`` does.

    Example::

        def test_my_source():
            check_source(MySource, "my_model")

    Args:
        source: the class; it is called with the name of the model.
        model_name: of one of its models.
        build: makes a backbone of the name and keyword arguments ``out_features``, ``norm`` and
            ``fold`` (and ``img_size`` and ``patch_size``, where it has them); by default a
            FeatureBackbone of the source.
        max_params: millions of parameters, above which the points with real numbers are skipped.

    Returns:
        what was found, see :func:`contract`.

    Raises:
        Violation: an AssertionError with a line for each point that the source does not keep.
    """
    subject = Subject.of(source, build)
    row = {"source": source.__name__, "name": model_name, "points": {}}
    row = contract(row, max_params, subject=subject)
    if failed := failures(row):
        lines = [f"{model_name}: {point}: {why}" for point, why in failed.items()]
        raise Violation("\n".join(lines))
    return row


def failures(row: dict[str, Any]) -> dict[str, str]:
    """The points that failed, and why."""
    return {point: why for point, why in row["points"].items() if why not in ("ok", "skipped")}
