"""Source: all that is asked of a model, whatever library it is from."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import nn

from ..measure.attempts import first_success
from ..measure.layers import LayerExtractor, check_layers
from ..measure.levels import last_of_each_stride, select_levels
from ..measure.sizes import SizeRule, find_size_rule
from ..measure.trace import Trace, trace
from ..messages import first_line


@dataclass(frozen=True)
class Levels:
    """The levels to output.

    Attributes:
        names: key of each level to its name in the backbone's output. A key is what the source
            calls the level by, or the name of a module if ``by_module``.
        by_module: whether the keys are names of modules, whatever the source calls its levels by.
    """

    names: Mapping[Hashable, str]
    by_module: bool = False

    @property
    def keys(self) -> list[Hashable]:
        """The keys alone, in the order of the extractor's outputs."""
        return list(self.names)


@dataclass(frozen=True)
class Fit:
    """How some levels of a model can be had of the most image sizes.

    Attributes:
        sizes: the image sizes that the extractor takes then.
        options: the arguments of ``create`` and ``extractor`` with which it does.
        trace: of that extractor.
    """

    sizes: SizeRule
    options: Mapping[str, Any]
    trace: Trace


def per_channel(values: Sequence[float], in_channels: int) -> list[float]:
    """Values of the channels R, G and B, such as a mean, for images of other channels.

    A model's first convolution is adapted as timm does it (``adapt_input_conv``): for one channel
    its weights are added up, for more than three they are repeated. So one channel has the mean of
    the three values, and more have them in turn.

    Args:
        values: of the channels that there are weights for.
        in_channels: channels of the images.
    """
    if in_channels == 1:
        return [sum(values) / len(values)]
    return [values[i % len(values)] for i in range(in_channels)]


class Source(ABC):
    """A model of a library: how it is built, and what its levels and parameters are called.

    What is abstract here a library's source must say; all else is measured or has a default. A
    source holds no weights: ``model`` lies on the meta device, is built once and kept, and what is
    found out with it is kept too. :func:`detbackbones.testing.check_source` tries a source.

    Attributes:
        model_name: as the library calls it.
        in_channels: channels of the images.
        prefix: what an extractor puts before the model's own names of parameters and modules.
        by_name: the argument of the library's backbone that takes levels by their names.
        resizes_patches: whether ``patch_size`` gives the library's ViTs another stride.
        size_options: further arguments of ``create`` and ``extractor`` that make some of the
            library's models take images of more sizes, the preferred first; a model may refuse
            them. Of those with which a model runs, the one that takes the most sizes is used.
        dilation: arguments of ``create`` that keep late levels from becoming coarser: the backbone
            is built with them, and ``model`` without, so that levels keep their names.
        odd_strides: whether a level's stride may be no power of two, as in a patch-14 ViT; else the
            level is resampled to the nearest power of two.
        native_only: whether the model is wrong at other sizes than its own, though it runs on the
            meta device, where no value is looked at.
    """

    prefix: ClassVar[str] = ""
    by_name: ClassVar[str] = "layers"
    resizes_patches: ClassVar[bool] = False
    size_options: Sequence[Mapping[str, Any]] = ({},)
    dilation: Mapping[str, Any] = {}
    odd_strides: bool = True
    native_only: bool = False

    def __init__(self, model_name: str, in_channels: int = 3):
        """
        Args:
            model_name: as the library calls it.
            in_channels: channels of the images.
        """
        self.model_name = model_name
        self.in_channels = in_channels

    def __deepcopy__(self, memo: dict) -> "Source":
        return self  # nothing in it changes

    # What a source must say.

    @classmethod
    @abstractmethod
    def names(cls) -> list[str]:
        """The models that there are."""

    @property
    @abstractmethod
    def native_size(self) -> int:
        """The N of the N x N images that the model is built for."""

    @property
    @abstractmethod
    def level_keys(self) -> Sequence[Hashable]:
        """What the library calls the model's levels by, in the order of execution."""

    @abstractmethod
    def create(self, pretrained: bool = False, **options: Any) -> nn.Module:
        """Build the whole model on torch's current device.

        Args:
            pretrained: with its pretrained weights.
            options: of ``size_options``.

        Raises:
            ValueError: if it cannot be built.
            ConnectionError: if the weights cannot be downloaded.
        """

    @abstractmethod
    def extractor(self, model: nn.Module, keys: Sequence[Hashable], **options: Any) -> nn.Module:
        """Make a model of :meth:`create` into an extractor of some of its levels.

        Args:
            model: may be changed, and becomes a part of the extractor.
            keys: some of ``level_keys``.
            options: of ``size_options``, those that the model was created with.

        Returns:
            a module that maps images (N, C, H, W) to a list or dict of feature maps, one for each
            key, (N, C, h, w), (N, h, w, C) or, tokens in the order of the rows, (N, h * w, C).
        """

    # What a source may say.

    @classmethod
    def has(cls, model_name: str) -> bool:
        """Whether there is a model of a name, perhaps one that is not listed any more."""
        return model_name in cls.names()

    @classmethod
    def find(cls, pattern: str | Sequence[str] = "*", pretrained: bool = False) -> list[str]:
        """The models whose names fit a pattern, or one of several.

        Args:
            pattern: with wildcards.
            pretrained: only those that have pretrained weights.
        """
        patterns = [pattern] if isinstance(pattern, str) else pattern
        names = cls.weights() if pretrained else cls.names()
        return [name for name in names if any(fnmatch(name, each) for each in patterns)]

    @classmethod
    def version(cls) -> str:
        """Of the library; what is measured and kept is for this version."""
        return ""

    @classmethod
    def weights(cls) -> dict[str, list[str]]:
        """The names of the pretrained weights of each model that has any."""
        return {}

    @classmethod
    def family(cls, model_name: str) -> str:
        """What a model is listed under together with its like."""
        return cls.__name__

    @property
    def pixel_mean(self) -> list[float] | None:
        """Of the images that the model was trained on, by channel, 0 to 255; None if unknown."""
        return None

    @property
    def pixel_std(self) -> list[float] | None:
        """The standard deviation that goes with :attr:`pixel_mean`."""
        return None

    def switch_off_dropout(  # noqa: B027  most have none
        self, extractor: nn.Module, frozen: frozenset[str]
    ) -> None:
        """Switch off dropout in frozen modules where it does not follow their mode.

        Args:
            extractor: of some levels, as it was built.
            frozen: names in the model of the modules that are frozen.
        """

    @classmethod
    def graph_nodes(cls, model: nn.Module, size: tuple[int, int]) -> dict[str, tuple[str, str]]:
        """Other places than modules that levels can be had from.

        Args:
            model: of :meth:`create`.
            size: (H, W) of images that it takes.

        Returns:
            name to the output's shape without the images ("64x56x56") and the modes in which it
            runs ("train, eval").
        """
        return {}

    def convert(self, state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """A checkpoint of the model, in whatever format, with the names and shapes of the model."""
        return state

    @cached_property
    def depths(self) -> Mapping[str, int] | None:
        """How many layers follow each parameter of the model, the classifier counted as one.

        None where the library does not say; then they are found by the order of execution, see
        :func:`detbackbones.training.depths.parameter_depths`.
        """
        return None

    @cached_property
    def no_weight_decay(self) -> frozenset[str]:
        """Names of the model's parameters that its library exempts from weight decay."""
        return frozenset()

    # What is found out.

    @cached_property
    def model(self) -> nn.Module:
        """The whole model on the meta device."""
        with torch.device("meta"):
            return self.create().to("meta")

    @cached_property
    def state_names(self) -> frozenset[str]:
        """The keys of the whole model's state dict."""
        return frozenset(self.model.state_dict())

    @cached_property
    def trace(self) -> Trace:
        """Of an extractor of all levels for images of the native size; strides are powers of two.

        Raises:
            ValueError: if the model gives no feature maps.
        """
        if not self.level_keys:
            raise ValueError(
                f"model_name={self.model_name!r} has no feature maps: it cannot be a backbone"
            )
        levels = Levels(dict.fromkeys(self.level_keys, ""))

        def run(options: Mapping[str, Any]) -> Trace:
            size = (self.native_size, self.native_size)
            return trace(self._on_meta(levels, options), self.in_channels, size, resample=True)

        try:
            return first_success(partial(run, options) for options in self.size_options)
        except ValueError as error:
            raise self._refused(error) from error

    @cached_property
    def _fits(self) -> dict[Hashable, Fit]:
        return {}

    def levels_by_stride(self, out_features: Sequence[str] | None = None) -> Levels:
        """The last level of each stride, ``res{n}`` for stride 2^n.

        Args:
            out_features: which of them; by default those of strides 4 to 32.

        Raises:
            ValueError: if the model does not have one of them.
        """
        by_stride = last_of_each_stride(self.trace.levels)
        names = select_levels(out_features, list(by_stride))
        return Levels({self.level_keys[by_stride[name]]: name for name in names})

    def levels_by_module(self, layers: Sequence[str] | Mapping[str, str]) -> Levels:
        """The outputs of modules as levels; see :func:`detbackbones.measure.layers.check_layers`.

        Raises:
            ValueError: if a module does not give one feature map in one run.
        """
        size = (self.native_size, self.native_size)
        return Levels(check_layers(self.model, layers, size, self.in_channels), by_module=True)

    def fit(self, levels: Levels) -> Fit:
        """Find out how an extractor of some levels takes images of the most sizes.

        Raises:
            ValueError: if there is no way to have these levels.
        """
        key = (*levels.names.items(), levels.by_module)
        if key not in self._fits:
            self._fits[key] = self._fit(levels)
        return self._fits[key]

    def _fit(self, levels: Levels) -> Fit:
        shapes = []
        if set(levels.keys) <= set(self.level_keys) and not (levels.by_module or self.dilation):
            shapes = [self.trace.shapes[self.level_keys.index(key)] for key in levels.keys]
        trials = [{**self.dilation, **options} for options in self.size_options]
        try:
            sizes, chosen, found = find_size_rule(
                [partial(self._on_meta, levels, options) for options in trials],
                self.native_size,
                self.in_channels,
                odd_strides=self.odd_strides,
                at_native=shapes,
                native_only=self.native_only,
            )
        except ValueError as error:
            raise self._refused(error) from error
        return Fit(sizes, trials[chosen], found)

    def build(
        self, levels: Levels, options: Mapping[str, Any], pretrained: bool = False
    ) -> nn.Module:
        """An extractor of some levels with weights, on torch's current device.

        Args:
            levels: the levels.
            options: that :meth:`fit` has found for them.
            pretrained: with pretrained weights, else with random ones.
        """
        return self._extractor(self.create(pretrained, **options), levels, options)

    def names_in(self, levels: Levels) -> str:
        """What an extractor of some levels puts before the model's own names."""
        return "model." if levels.by_module else self.prefix

    def _on_meta(self, levels: Levels, options: Mapping[str, Any]) -> nn.Module:
        if not options:
            return self._extractor(copy.deepcopy(self.model), levels, options)
        with torch.device("meta"):
            return self._extractor(self.create(**options), levels, options)

    def _extractor(self, model: nn.Module, levels: Levels, options: Mapping[str, Any]) -> nn.Module:
        if levels.by_module:
            return LayerExtractor(model, levels.keys)
        return self.extractor(model, levels.keys, **options)

    def _refused(self, error: Exception) -> ValueError:
        return ValueError(
            f"model_name={self.model_name!r} cannot be a backbone: {first_line(error)}"
        )
