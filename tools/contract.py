"""The contract that tools/conformance.py holds models to: its points, on models of each source.

Each ``check_`` function tries one point and raises; :func:`contract` tries them all.
"""

import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from detbackbones import TimmBackbone, TorchvisionBackbone, build_pyramid
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import Backbone
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.structures import ImageList
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

# (height, width) of the images of two batches
PAIRS = (((250, 333), (201, 300)), ((480, 640), (427, 500)))
TOLERANCE = 1e-4  # largest difference, relative to the largest value


class Violation(Exception):
    """A point of the contract that a backbone does not keep; the text says how."""


class RawBackbone(Backbone):
    """timm's own feature extractor as it comes, believed in all that it says of itself."""

    img_size = None
    resampled = ()

    def __init__(
        self,
        name: str,
        out_features: Sequence[str] | None = None,
        norm: str = "",
        fold: bool = False,  # timm folds nothing
        **kwargs: Any,
    ):
        super().__init__()
        if out_features is not None:
            kwargs["out_indices"] = [int(level.removeprefix("p")) for level in out_features]
        self.model = timm.create_model(name, features_only=True, **kwargs)
        info = self.model.feature_info
        self._out_features = [f"p{index}" for index in info.out_indices]
        self._out_feature_channels = dict(zip(self._out_features, info.channels()))
        self._out_feature_strides = dict(zip(self._out_features, info.reduction()))
        if norm == "FrozenBN":
            self.model = FrozenBatchNorm2d.convert_frozen_batchnorm(self.model)

    @property
    def size_divisibility(self) -> int:
        return max(self._out_feature_strides.values())

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(self._out_features, self.model(x)))

    def load_source(self, state: dict[str, torch.Tensor]) -> tuple[int, list[str]]:
        missing = self.model.load_state_dict(state, strict=False).missing_keys
        return len(self.model.state_dict()) - len(missing), missing


def timm_maps(name: str, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The intermediate maps (N, C, H, W) that timm itself gives for a model."""
    if not hasattr(model, "forward_intermediates"):
        extractor = timm.create_model(name, features_only=True)
        extractor.load_state_dict(model.state_dict(), strict=False)
        return extractor.eval().to(x.dtype)(x)
    return model.forward_intermediates(x, intermediates_only=True, output_fmt="NCHW")


def module_maps(name: str, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output of every module that can be read as a map, as (N, C, H, W)."""
    outputs = []

    def keep(module, args, output):
        if isinstance(output, torch.Tensor):  # a copy too, for what runs next may be in place
            outputs.extend((output, output.clone()))

    hooks = [module.register_forward_hook(keep) for module in model.modules()]
    model(x)
    for hook in hooks:
        hook.remove()
    maps = []
    for output in outputs:
        if output.ndim == 4:
            maps += [output, output.permute(0, 3, 1, 2)]
        elif output.ndim == 3:  # tokens, the first of them of the class
            rows = math.isqrt(output.shape[1] - 1)
            if rows**2 == output.shape[1] - 1:
                maps.append(output[:, 1:].transpose(1, 2).unflatten(2, (rows, rows)))
    return maps


def crop_size(name: str) -> tuple[int, int, int]:
    """(C, H, W) of the images that a torchvision model was trained on."""
    weights = torchvision.models.get_model_weights(name).DEFAULT
    return (3, *2 * weights.transforms().crop_size)


@dataclass(frozen=True)
class Source:
    """Where models come from.

    Attributes:
        names: lists the models.
        entrypoint: name to the function that makes the model; its module is the family.
        create: name to the classification model.
        image_size: name to the (C, H, W) that the classification model takes.
        build: name and arguments to the backbone.
        maps: (name, model, images) to the maps of the classification model, (N, C, H, W).
        any_map: True if a level may be any of the maps of its stride, False if it is the last.
    """

    names: Callable[[], list[str]]
    entrypoint: Callable[[str], Callable]
    create: Callable[[str], nn.Module]
    image_size: Callable[[str], tuple[int, int, int]]
    build: Callable[..., Backbone]
    maps: Callable[[str, nn.Module, torch.Tensor], list[torch.Tensor]]
    any_map: bool

    def family(self, name: str) -> str:
        return self.entrypoint(name).__module__.rpartition(".")[2]


def _timm_source(build: Callable[..., Backbone]) -> Source:
    return Source(
        names=timm.list_models,
        entrypoint=timm.model_entrypoint,
        create=timm.create_model,
        image_size=lambda name: timm.get_pretrained_cfg(name).input_size,
        build=build,
        maps=timm_maps,
        any_map=False,
    )


SOURCES = {
    "timm": _timm_source(TimmBackbone),
    "torchvision": Source(
        names=lambda: torchvision.models.list_models(module=torchvision.models),
        entrypoint=torchvision.models.get_model_builder,
        create=torchvision.models.get_model,
        image_size=crop_size,
        build=TorchvisionBackbone,
        maps=module_maps,
        any_map=True,
    ),
    "raw": _timm_source(RawBackbone),
}


@dataclass
class Trial:
    """A model under the contract."""

    name: str
    source: Source
    row: dict[str, Any] = field(default_factory=dict)
    backbone: Backbone | None = None
    seen: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = field(default_factory=list)
    trained: dict[str, torch.Tensor] | None = None

    def on_meta(self, **kwargs: Any) -> Backbone:
        try:
            with torch.device("meta"):
                return self.source.build(self.name, **kwargs)
        except NotImplementedError:  # torchvision's RegNets compute their widths with tensors
            return self.source.build(self.name, **kwargs).to("meta")

    def batch(self) -> torch.Tensor:
        """The first padded pair; if the model does not take it, a pair of its native size."""
        if self.seen:
            return self.seen[0][0]
        return torch.empty(2, *self.source.image_size(self.name), device="meta")

    @cached_property
    def reference(self) -> tuple[nn.Module, torch.Tensor, list[torch.Tensor]]:
        """The source model with telling weights, an image of its native size, and its maps."""
        torch.manual_seed(0)
        model = randomise(self.source.create(self.name)).eval()
        x = torch.randn(1, *self.source.image_size(self.name))
        with torch.no_grad():
            return model, x, self.source.maps(self.name, model, x)

    def loaded(self, **kwargs: Any) -> Backbone:
        """The backbone, with real numbers: the weights of the reference."""
        backbone = self.source.build(self.name, **kwargs)
        missing = backbone.load_source(self.reference[0].state_dict())[1]
        if missing:
            raise Violation(f"the source model's weights leave out {some(missing)}")
        return backbone


def randomise(model: nn.Module) -> nn.Module:
    """Give what starts with one value (norms, layer scale) values of its own; returns the model."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.min() == parameter.max():
                parameter += torch.empty_like(parameter).uniform_(-0.2, 0.2)
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return model


def pairs_for(backbone: Backbone) -> list[list[tuple[int, int]]]:
    """(height, width) of the images of each batch, scaled down to what the backbone takes."""
    limit = backbone.img_size or math.inf
    scales = [min(1, limit / max(map(max, pair))) for pair in PAIRS]
    return [[(int(h * s), int(w * s)) for h, w in pair] for pair, s in zip(PAIRS, scales)]


def padded(backbone: Backbone, sizes: Iterable[tuple[int, int]]) -> torch.Tensor:
    """Images without values as detectron2's meta-architectures put them together."""
    images = [torch.empty(3, *size, device="meta") for size in sizes]
    return ImageList.from_tensors(
        images, backbone.size_divisibility, padding_constraints=backbone.padding_constraints
    ).tensor


def some(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def flat(key: str) -> str:
    """A key of a state dict as it is called in every kind of extractor."""
    return re.sub(r"^((model|body)\.)*", "", key).replace(".", "_")


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
        "batch_norm": sorted(
            {type(m).__name__ for m in backbone.modules() if isinstance(m, _BatchNorm)}
        ),
    }


def check_sizes(trial: Trial) -> None:
    backbone = trial.backbone.eval()
    with torch.no_grad():
        for pair in pairs_for(backbone):
            x = padded(backbone, pair)
            trial.seen.append((x, backbone(x)))
        if pairs_for(backbone)[1] == list(PAIRS[1]):
            return
        try:
            backbone(padded(backbone, PAIRS[1]))
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
        x = padded(larger, pair)
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
    if any(stride & (stride - 1) for stride in strides):
        try:
            build_pyramid(bottom_up=backbone, top_block=LastLevelMaxPool())
        except ValueError as error:
            if "patch_size=16" not in str(error):
                raise Violation(f"the strides are refused without patch_size=16: {error}") from None
        else:
            raise Violation(f"a pyramid on strides {sorted(strides)} is not refused")
        if trial.source.any_map:  # torchvision has no way to other patches
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
    x = padded(neck, pairs_for(backbone)[0])
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
            with torch.device("meta"):
                own = trial.source.create(trial.name).named_parameters()
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
            for m in (expected if trial.source.any_map else expected[-1:])
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
            maps = trial.source.maps(trial.name, model.double(), x)
        found = difference(trial, backbone.double(), x, maps)
        model.float()
        backbone.float()
    if found:
        raise Violation(found)


def check_batch_norm(trial: Trial) -> None:
    if not trial.row["batch_norm"]:
        return
    compare_values(trial, trial.loaded(norm="FrozenBN", fold=False))
    backbone = trial.loaded(norm="FrozenBN")
    compare_values(trial, backbone)
    norms = {
        flat(f"{name}.{key}")
        for name, module in trial.reference[0].named_modules()
        if isinstance(module, _BatchNorm)
        for key in module.state_dict()
    }
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    frozen = {key for key in before if flat(key) in norms}
    if not frozen:
        raise Violation("the batch norms of the source model are not in the state dict")
    learning = [p for p in backbone.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=1e-3, weight_decay=0.1)
    size = trial.source.image_size(trial.name)
    if trial.row["points"]["sizes"] == "ok":  # then smaller ones will do
        step = backbone.size_divisibility
        size = (3, *2 * [step * math.ceil(128 / step)])
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
    compare_values(trial, trial.loaded())


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
    return {"source": source, "name": name, "family": SOURCES[source].family(name), "points": {}}


def contract(
    row: dict[str, Any], max_params: float, report: Callable[[dict], None] = lambda row: None
) -> dict[str, Any]:
    """Try every point of the contract on a model.

    Args:
        row: as :func:`new_row` makes it.
        max_params: millions of parameters, above which the points with real numbers are skipped.
        report: called with the row after each point.

    Returns:
        the row, with the facts of the model and each point "ok", "skipped" or why it failed.
    """
    start = time.perf_counter()
    trial = Trial(row["name"], SOURCES[row["source"]], row)
    for point, check in POINTS.items():
        large = point in WITH_NUMBERS and row.get("parameters", 0) > max_params * 1e6
        if large or row["points"].get("build", "ok") != "ok":
            result = "skipped"
        else:
            try:
                check(trial)
                result = "ok"
            except Exception as error:  # a model may fail in any way
                text = str(error).partition("\n")[0]
                refused = point == "build" and isinstance(error, ValueError)
                kind = "refused" if refused else type(error).__name__
                result = text if isinstance(error, Violation) else f"{kind}: {text}"
        row["points"][point] = result
        row["seconds"] = round(time.perf_counter() - start, 2)
        report(row)
    return row


def failures(row: dict[str, Any]) -> dict[str, str]:
    """The points that failed, and why."""
    return {point: why for point, why in row["points"].items() if why not in ("ok", "skipped")}
