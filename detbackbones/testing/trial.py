"""A model under the contract: what is tried, with which images, and what it is compared with."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from detectron2.modeling import Backbone
from detectron2.structures import ImageList
from torch import nn

from ..adapt.norm import is_batch_norm
from ..backbones import BACKBONES
from ..backbones.feature_backbone import FeatureBackbone
from ..backbones.source import Source
from ..backbones.timm_source import TimmSource
from .raw import RawBackbone, extracted_maps

# (height, width) of the images of two batches
PAIRS = (((250, 333), (201, 300)), ((480, 640), (427, 500)))


@dataclass(frozen=True)
class Subject:
    """Whose models are tried.

    Attributes:
        source: the class of their source.
        build: name and arguments to the backbone.
        names: lists the models.
    """

    source: type[Source]
    build: Callable[..., Backbone]
    names: Callable[[], list[str]]

    @classmethod
    def of(cls, source: type[Source], build: Callable[..., Backbone] | None = None) -> "Subject":
        """A source with the backbone that FeatureBackbone makes of it, or another."""

        def plain(
            name: str,
            out_features: Sequence[str] | None = None,
            norm: str = "",
            fold: bool = True,
            **others: Any,
        ) -> Backbone:
            if others:
                raise ValueError(f"{source.__name__} has no {', '.join(others)}")
            model = source(name)
            levels = model.levels_by_stride(out_features)
            return FeatureBackbone(model, levels, norm=norm, fold=fold)

        return cls(source, build or plain, source.names)


SUBJECTS = {key: Subject.of(kind.source_class, kind) for key, kind in BACKBONES.items()}
SUBJECTS["raw"] = Subject.of(TimmSource, RawBackbone)


@dataclass
class Trial:
    """A model under the contract."""

    name: str
    subject: Subject
    row: dict[str, Any] = field(default_factory=dict)
    backbone: Backbone | None = None
    seen: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = field(default_factory=list)
    trained: dict[str, torch.Tensor] | None = None

    @cached_property
    def source(self) -> Source:
        """What the model is."""
        return self.subject.source(self.name)

    @property
    def image_size(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that the source model takes."""
        return self.source.in_channels, self.source.native_size, self.source.native_size

    def on_meta(self, **kwargs: Any) -> Backbone:
        """The backbone without weights."""
        with torch.device("meta"):
            return self.subject.build(self.name, **kwargs)

    def batch(self) -> torch.Tensor:
        """The first padded pair; if the model does not take it, a pair of its native size."""
        if self.seen:
            return self.seen[0][0]
        return torch.empty(2, *self.image_size, device="meta")

    @property
    def any_map(self) -> bool:
        """Whether a level may be any of the maps of its stride, or must be the last of them."""
        return not hasattr(self.source.model, "forward_intermediates")

    def maps(self, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        """The maps (N, C, H, W) in a model: those that it says it has, or what its modules give."""
        if self.any_map:
            return module_maps(model, x)
        try:
            return extracted_maps(self.name, model, x)
        except Exception:  # not every model of timm has such an extractor
            return model.forward_intermediates(x, intermediates_only=True, output_fmt="NCHW")

    @cached_property
    def reference(self) -> tuple[nn.Module, torch.Tensor, list[torch.Tensor]]:
        """The source model with telling weights, an image of its native size, and its maps."""
        torch.manual_seed(0)
        model = randomise(self.source.create()).eval()
        x = torch.randn(1, *self.image_size)
        with torch.no_grad():
            return model, x, self.maps(model, x)

    def loaded(self, **kwargs: Any) -> tuple[Backbone, list[str]]:
        """The backbone with the weights of the reference, and what these leave out."""
        backbone = self.subject.build(self.name, **kwargs)
        return backbone, backbone.load_source(self.reference[0].state_dict())[1]


def module_maps(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
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


def randomise(model: nn.Module) -> nn.Module:
    """Give what starts with one value (norms, layer scale) values of its own; returns the model."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.min() == parameter.max():
                parameter += torch.empty_like(parameter).uniform_(-0.2, 0.2)
        for module in model.modules():
            if is_batch_norm(module):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return model


def pairs_for(backbone: Backbone) -> list[list[tuple[int, int]]]:
    """(height, width) of the images of each batch, scaled down to what the backbone takes."""
    limit = backbone.img_size or math.inf
    scales = [min(1, limit / max(map(max, pair))) for pair in PAIRS]
    return [[(int(h * s), int(w * s)) for h, w in pair] for pair, s in zip(PAIRS, scales)]


def padded(channels: int, backbone: Backbone, sizes: Iterable[tuple[int, int]]) -> torch.Tensor:
    """Images without values as detectron2's meta-architectures put them together."""
    images = [torch.empty(channels, *size, device="meta") for size in sizes]
    return ImageList.from_tensors(
        images, backbone.size_divisibility, padding_constraints=backbone.padding_constraints
    ).tensor


def some(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
