"""TorchvisionSource: torchvision's classification models as sources of backbones."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torchvision
from timm.models import adapt_input_conv
from torch import nn
from torchvision.models import VisionTransformer, WeightsEnum
from torchvision.ops import StochasticDepth

from ..measure.meta import NumbersOnCPU
from ..measure.sizes import ANY_SIZE, SizeRule
from ..messages import first_line, nearest, one_of
from ..weights.downloads import downloading
from ..weights.names import translate
from .source import Source, per_channel
from .torchvision_graph import (
    extractor_of,
    find_level_nodes,
    first_convolution,
    graph_nodes,
    switch_off_dropout,
)
from .torchvision_vit import VisionTransformerFeatures

TOKENS = "tokens"  # what the one level of a ViT is called by, which is no node of its graph


class TorchvisionSource(Source):
    """A classification model of torchvision; its levels are called by the nodes of its graph."""

    by_name = "return_nodes"

    def __init__(
        self, model_name: str, in_channels: int = 3, *, weights: Any = None, **kwargs: Any
    ):
        """
        Args:
            model_name: a name of ``torchvision.models.list_models()``.
            in_channels: channels of the images.
            weights: a name or value of the model's weights enum: those that ``create`` loads.
            kwargs: further arguments for ``torchvision.models.get_model``; ``img_size`` is what a
                ViT or MaxViT is built for, and ``drop_path_rate`` stochastic depth.

        Raises:
            ValueError: if there is no such model, or it has no such weights.
        """
        super().__init__(model_name, in_channels)
        names = self.names()
        if model_name not in names:
            raise ValueError(
                f"model_name={model_name!r} is no torchvision classifier: "
                + nearest(model_name, names)
            )
        self.kwargs = kwargs
        if "img_size" in kwargs:
            self.kwargs |= self._for_size(kwargs.pop("img_size"))
        self._drop_path_rate = kwargs.pop("drop_path_rate", None)
        self._weights: WeightsEnum | None = None
        if weights is not None:
            enum = torchvision.models.get_model_weights(model_name)
            name = str(weights).removeprefix(f"{enum.__name__}.")
            one_of("weights", name, [*(member.name for member in enum), "DEFAULT"])
            self._weights = enum[name]
            # as torchvision does when it has loaded them
            if model_name.startswith("vit_"):
                self.kwargs.setdefault("image_size", self._weights.meta["min_size"][0])
            if model_name in ("googlenet", "inception_v3"):
                self.kwargs.setdefault("transform_input", True)

    def _for_size(self, img_size: int) -> dict[str, Any]:
        """The argument by which a torchvision model is built for an image size."""
        if self.model_name.startswith("vit_"):
            return {"image_size": img_size}
        if self.model_name.startswith("maxvit_"):
            return {"input_size": (img_size, img_size)}
        raise ValueError(
            f"img_size={img_size} has no meaning for {self.model_name}: it takes any size"
        )

    @classmethod
    def names(cls) -> list[str]:
        """torchvision's classifiers."""
        return torchvision.models.list_models(module=torchvision.models)

    @classmethod
    def version(cls) -> str:
        """Of torchvision."""
        return torchvision.__version__.partition("+")[0]

    @classmethod
    def weights(cls) -> dict[str, list[str]]:
        """The members of each model's weights enum."""
        enums = {name: torchvision.models.get_model_weights(name) for name in cls.names()}
        return {name: [member.name for member in enum] for name, enum in enums.items()}

    @classmethod
    def family(cls, model_name: str) -> str:
        """The module of torchvision in which a model is defined."""
        return torchvision.models.get_model_builder(model_name).__module__.rpartition(".")[2]

    @property
    def native_size(self) -> int:
        """What the model was built for, else the size that its weights were evaluated on."""
        if "input_size" in self.kwargs:
            return self.kwargs["input_size"][0]
        weights = torchvision.models.get_model_weights(self.model_name).DEFAULT
        return getattr(self.model, "image_size", None) or weights.transforms().crop_size[0]

    @cached_property
    def level_keys(self) -> list[str]:
        """The nodes that give the levels."""
        if isinstance(self.model, VisionTransformer):
            return [TOKENS]
        native = SizeRule(self.native_size, self.native_size)
        try:
            rules = (ANY_SIZE, native, SizeRule(resample=True))
            return list(find_level_nodes(self.model, rules).values())
        except ValueError as error:
            raise self._refused(error) from error

    @classmethod
    def graph_nodes(cls, model: nn.Module, size: tuple[int, int]) -> dict[str, tuple[str, str]]:
        """What ``return_nodes`` can name."""
        return graph_nodes(model, size)

    def create(self, pretrained: bool = False) -> nn.Module:
        """The classification model, with ``weights`` if it is to be pretrained."""
        weights = self._weights if pretrained else None
        with downloading(self.model_name), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*initialization of .* will be changed")
            try:
                model = self._get_model(weights)
            except (AssertionError, TypeError, ValueError) as error:
                raise ValueError(
                    f"model_name={self.model_name!r} cannot be built: {first_line(error)}"
                ) from error
        if self._drop_path_rate is not None:
            self._set_drop_path_rate(model, self._drop_path_rate)
        if self.in_channels != 3:
            self._adapt_input(model)
        return model

    def _get_model(self, weights: WeightsEnum | None) -> nn.Module:
        try:
            return torchvision.models.get_model(self.model_name, weights=weights, **self.kwargs)
        except RuntimeError:
            if torch.get_default_device().type != "meta":
                raise
            with NumbersOnCPU():  # RegNets read numbers back
                return torchvision.models.get_model(self.model_name, **self.kwargs)

    def _adapt_input(self, model: nn.Module) -> None:
        """Give the first convolution other channels, as timm does it."""
        if getattr(model, "transform_input", False):  # channel by channel
            raise ValueError(
                f"in_channels={self.in_channels} must be 3 for {self.model_name} with weights, "
                "which it takes images of RGB with"
            )
        name, conv = first_convolution(model)
        adapted = copy.copy(conv)
        adapted._parameters = dict(conv._parameters)
        adapted.in_channels = self.in_channels
        weight = adapt_input_conv(self.in_channels, conv.weight.detach())
        adapted.weight = nn.Parameter(weight.to(conv.weight.dtype))
        model.set_submodule(name, adapted)

    def convert(self, state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """A checkpoint, its first convolution adapted to ``in_channels``.

        Names of other libraries are translated, see
        :func:`detbackbones.weights.names.translate`.
        """
        state = translate(state, self.state_names)
        key = f"{first_convolution(self.model)[0]}.weight"
        if key in state and state[key].shape[1] == 3 != self.in_channels:
            state = {**state, key: adapt_input_conv(self.in_channels, state[key])}
        return state

    def _set_drop_path_rate(self, model: nn.Module, rate: float) -> None:
        """Scale the model's own schedule of stochastic depth, such that ``rate`` is its largest."""
        modules = [module for module in model.modules() if isinstance(module, StochasticDepth)]
        if not modules:
            raise ValueError(
                f"drop_path_rate={rate} must be left out for {self.model_name}, which has no "
                "stochastic depth"
            )
        largest = max(module.p for module in modules)
        for module in modules:
            module.p *= rate / largest

    def extractor(self, model: nn.Module, keys: Sequence[str]) -> nn.Module:
        """torchvision's own extractor, or for a ViT's tokens one that takes images of any size."""
        if list(keys) == [TOKENS] and isinstance(model, VisionTransformer):
            return VisionTransformerFeatures(model)
        return extractor_of(model, keys)

    def switch_off_dropout(self, extractor: nn.Module, frozen: frozenset[str]) -> None:
        """Switch off dropout that is a function, whose mode is written in the graph."""
        switch_off_dropout(extractor, frozen)

    @property
    def pixel_mean(self) -> list[float] | None:
        """That of the weights; without weights, the one that all the model's weights have."""
        return self._pixels and per_channel(self._pixels[:3], self.in_channels)

    @property
    def pixel_std(self) -> list[float] | None:
        """Standard deviation that goes with :attr:`pixel_mean`."""
        return self._pixels and per_channel(self._pixels[3:], self.in_channels)

    @cached_property
    def _pixels(self) -> list[float] | None:
        every = torchvision.models.get_model_weights(self.model_name)
        kinds = [self._weights] if self._weights else every
        found = {(*each.transforms().mean, *each.transforms().std) for each in kinds}
        return [255 * value for value in found.pop()] if len(found) == 1 else None
