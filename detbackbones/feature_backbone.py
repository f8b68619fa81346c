"""FeatureBackbone: a feature extractor of any source as a detectron2 backbone."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from omegaconf import OmegaConf
from torch import nn
from torch.utils._pytree import tree_map

from .fold import fold_norms
from .freeze import NO_PREFIX, Prefix, freeze, frozen_prefix
from .grad_checkpointing import plan_checkpoints
from .layers import LayerExtractor, check_layers
from .levels import Trace, output_list, trace
from .messages import nearest, one_of, whole_number
from .norm import convert_norm, is_batch_norm
from .sizes import ANY_SIZE, SizeRule, find_size_rule


def select_levels(
    out_features: Sequence[str] | None, valid: Sequence[str], parameter: str = "out_features"
) -> list[str]:
    """The levels to output: those of ``out_features``, in the order of ``valid``.

    Without ``out_features``, the levels of strides 4 to 32 (``res2`` to ``res5``). ``parameter`` is
    what the user knows them as.

    Raises:
        ValueError: if a name is unknown or given twice, or the list is empty.
    """
    if out_features is None:
        return [name for name in valid if name in ("res2", "res3", "res4", "res5")]
    wrong = [name for name in out_features if name not in valid]
    if wrong or not out_features or len(set(out_features)) < len(out_features):
        raise ValueError(
            f"{parameter}={list(out_features)} must be different levels of the model: "
            + nearest(wrong[0] if wrong else "", valid)
        )
    return [name for name in valid if name in out_features]


def plain_dict(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """Keyword arguments as a dict of its own, with plain lists and dicts where a config had its."""
    if OmegaConf.is_config(arguments):
        return OmegaConf.to_container(arguments, resolve=True)
    return dict(arguments or {})


class FeatureBackbone(Backbone):
    """A feature extractor with measured channels and strides, frozen as asked.

    Its state dict has the source model's own keys under the prefix ``model.``, so that checkpoints
    of the source model load into it, and it saves back to them.

    Attributes:
        pixel_mean, pixel_std: of the images that the source model was trained on, by channel, in
            the range 0 to 255; None where that is not known.
    """

    pixel_mean: Sequence[float] | None = None
    pixel_std: Sequence[float] | None = None

    def __init__(
        self,
        extractor: nn.Module,
        names: Sequence[str],
        *,
        in_channels: int = 3,
        sizes: SizeRule = ANY_SIZE,
        measured: Trace | None = None,
        norm: str = "",
        prefix: Prefix = NO_PREFIX,
        fold: bool = True,
        channels_last: bool | None = None,
        compile: bool = False,
        grad_checkpointing: bool = False,
        source_keys: Mapping[str, str] | None = None,
        source_names: Iterable[str] = (),
    ):
        """
        Args:
            extractor: maps (N, C, H, W) images to a list or dict of feature maps, (N, C, h, w) or
                (N, h, w, C), or of tokens (N, h * w, C).
            names: a name for each of its outputs.
            in_channels: channels of the input.
            sizes: the image sizes that the extractor takes.
            measured: a trace of it with ``sizes``, if there is one already.
            norm: see :func:`detbackbones.norm.convert_norm`.
            prefix: the part to freeze, see :func:`detbackbones.freeze.frozen_prefix`.
            fold: make frozen batch norm a part of the convolution before it, see
                :func:`detbackbones.fold.fold_norms`.
            channels_last: the memory format of the maps; None is for where it was measured to help,
                on a CPU in models with batch norm.
            compile: pass the extractor through ``torch.compile``.
            grad_checkpointing: compute maps again in the backward pass instead of keeping them.
            source_keys: names of the extractor's parameters and buffers to their names in the
                source model, where these differ.
            source_names: keys of the source model's whole state dict; when they are given, weights
                of a deeper model of its family are refused.
        """
        super().__init__()
        switches = {"fold": fold, "compile": compile, "grad_checkpointing": grad_checkpointing}
        for key, value in switches.items():
            one_of(key, value, (True, False))
        one_of("channels_last", channels_last, (None, True, False))
        if compile and grad_checkpointing:
            raise ValueError("compile=True and grad_checkpointing=True cannot be had together")
        if measured is None:
            measured = trace(extractor, in_channels, sizes.probe, sizes.resample)
        _drop_unused(extractor, measured, in_channels, sizes)
        probe = sizes.probe
        step = math.lcm(*(level.stride for level in measured.levels))
        if step % sizes.divisor == 0 and not sizes.img_size:
            sizes = replace(sizes, divisor=1)  # nothing to refuse beyond what the strides say
        self.model = convert_norm(extractor, norm)
        self._eval_modules = freeze(self.model, prefix)
        if norm == "FrozenBN":  # what is a batch norm still is of no class that we can replace
            modules = self.model.named_modules()
            self._eval_modules += [name for name, module in modules if is_batch_norm(module)]
        if fold:
            size, multiple = [n // 2 for n in probe], math.lcm(step, sizes.divisor)
            if sizes.img_size or any(n % multiple for n in size):
                size = probe
            fold_norms(self.model, measured.followed_by, (1, in_channels, *size))
        self._channels_last = channels_last
        self._channels_last_on_cpu = _gains_from_channels_last(self.model)
        if compile:
            self.model.compile(dynamic=True)
        self._source_keys = {k: v for k, v in (source_keys or {}).items() if k != v}
        self._source_names = frozenset(source_names)
        first_use = measured.parameters
        self.execution_order = [f"model.{name}" for name in sorted(first_use, key=first_use.get)]
        self.register_state_dict_post_hook(_rename_saved)
        self.register_load_state_dict_pre_hook(_rename_loaded)

        # (position among the extractor's outputs, level), fine to coarse
        levels = sorted(zip(names, enumerate(measured.levels)), key=lambda item: item[1][1].stride)
        self._levels = dict(levels)
        self._out_features = list(self._levels)
        self._out_feature_channels = {n: level.channels for n, (_, level) in levels}
        self._out_feature_strides = {n: level.stride for n, (_, level) in levels}
        self._sizes = sizes
        self.train()
        self._checkpoints = None
        if grad_checkpointing:
            self._checkpoints = plan_checkpoints(self.model, in_channels, probe)

    @staticmethod
    def from_module(
        module: nn.Module,
        layers: Sequence[str] | Mapping[str, str],
        *,
        in_channels: int = 3,
        img_size: int = 224,
        norm: str = "",
        freeze_at: int = 0,
    ) -> "FeatureBackbone":
        """A backbone of any module that maps images to anything, by the names of its layers.

        Example::

            backbone = FeatureBackbone.from_module(MyNet(), layers={"stage3": "res4"})

        Args:
            module: runs on (N, C, H, W) images; the backbone has a copy of what its layers need.
            layers: names of submodules that give feature maps, (N, C, h, w) or (N, h, w, C), or
                a mapping from these names to level names.
            in_channels: channels of the images.
            img_size: the module is known to take images of this height and width; which others it
                takes is found by running it.
            norm: batch norm ``""`` as in the module, ``"FrozenBN"``, ``"SyncBN"`` or ``"BN"``.
            freeze_at: 0 nothing, n what runs up to the end of the last of ``layers`` with a stride
                of at most 2^n, 5 all.

        Raises:
            ValueError: if a layer does not exist or gives no feature map, or an argument is out of
                range.
        """
        whole_number("in_channels", in_channels)
        whole_number("img_size", img_size)
        names = check_layers(module, layers, (img_size, img_size), in_channels)
        extractor = LayerExtractor(copy.deepcopy(module), names)
        sizes, _, measured = find_size_rule([lambda: extractor], img_size, in_channels)
        prefix = frozen_prefix(measured, freeze_at, {})
        finest = min(level.exponent for level in measured.levels)
        if 0 < freeze_at < finest:
            raise ValueError(
                f"freeze_at={freeze_at} needs a level of stride {2**freeze_at} or less among "
                f"layers={layers}, whose finest has stride {2**finest}"
            )
        return FeatureBackbone(
            extractor,
            list(names.values()),
            in_channels=in_channels,
            sizes=sizes,
            measured=measured,
            norm=norm,
            prefix=prefix,
            source_keys={f"model.{key}": key for key in module.state_dict()},
            source_names=module.state_dict(),
        )

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            x: images (N, C, H, W); H and W are multiples of ``size_divisibility``.

        Returns:
            each level's feature map (N, C, H / stride, W / stride), fine to coarse.

        Raises:
            ValueError: if the model does not take images of this size.
        """
        size = tuple(x.shape[-2:])
        self._sizes.check(size)
        channels_last = self._channels_last
        if channels_last is None:
            channels_last = x.is_cpu and self._channels_last_on_cpu
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        run = partial(self._checkpoints.run, self.model) if self._checkpoints else self.model
        outputs = output_list(run(x))
        return {
            name: level.feature_map(outputs[i], size) for name, (i, level) in self._levels.items()
        }

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each level, fine to coarse."""
        return super().output_shape()

    @property
    def size_divisibility(self) -> int:
        """Height and width of the input must be multiples of this.

        A model that takes images of N x N alone has N here: detectron2 then pads smaller images to
        N x N, and larger ones to a size that is refused. (Its padding constraint ``square_size``
        would cut them off.)
        """
        return math.lcm(self._sizes.divisor, *self._out_feature_strides.values())

    @property
    def img_size(self) -> int | None:
        """N if the model takes images padded to N x N alone, None if it takes other sizes too."""
        return self._sizes.img_size

    @property
    def resampled(self) -> list[str]:
        """Levels whose own grid is no whole fraction of the image, and is resampled to one."""
        return [name for name, (_, level) in self._levels.items() if level.resampled]

    def train(self, mode: bool = True) -> "FeatureBackbone":
        """Set the mode of all but the frozen modules, which stay in eval mode."""
        super().train(mode)
        for name in self._eval_modules:
            self.model.get_submodule(name).eval()
        return self

    def load_source(self, state: Mapping[str, torch.Tensor]) -> tuple[int, list[str]]:
        """Load a state dict of the source model; what the levels do not need is passed over.

        Args:
            state: with the source model's own keys.

        Returns:
            how many tensors were loaded, and the keys that are missing or of another shape.

        Raises:
            ValueError: if the state dict has layers that the source model has not.
        """
        own = {key.removeprefix("model."): value for key, value in self.state_dict().items()}
        parts = {key.partition(".")[0] for key in own}
        for key in state if self._source_names else ():
            foreign = key.endswith(".weight") and key not in self._source_names
            if foreign and key.partition(".")[0] in parts:
                raise ValueError(f"the model has no {key}")
        fit = {k: state[k] for k, v in own.items() if k in state and state[k].shape == v.shape}
        self.load_state_dict({f"model.{key}": value for key, value in fit.items()}, strict=False)
        # timm and torchvision count batches, but nothing depends on it
        wanting = [k for k in own if k not in fit and not k.endswith("num_batches_tracked")]
        return len(fit), wanting

    def parameter_depths(self) -> dict[str, int] | None:
        """How many layers of the source model follow each parameter; None if it does not say.

        See :func:`detbackbones.optim.parameter_depths`.
        """
        return None

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the source model exempts from weight decay."""
        return set()


def _gains_from_channels_last(model: nn.Module) -> bool:
    """Whether a model was measured to be faster on a CPU with its maps in channels-last order.

    Models with batch norm are, others are as fast either way. In this order the gradient of the
    weight of a 1x1 convolution with a stride and less than 16 input channels is computed with
    memory beyond its own (oneDNN 3.12): models that have one (RepVGG) are left as they are.
    """
    if not any(hasattr(module, "running_var") for module in model.modules()):
        return False
    return not any(
        module.kernel_size == (1, 1) != module.stride and module.in_channels < 16 * module.groups
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    )


def _drop_unused(extractor: nn.Module, measured: Trace, in_channels: int, sizes: SizeRule) -> None:
    """Take the modules and parameters that no level needs out of an extractor.

    Where it runs them all the same, something takes their place; where that changes the levels
    they stay, without gradients.
    """
    unused = []
    for name, module in extractor.named_modules():
        own = [f"{name}.{key}" for key, _ in module.named_parameters()]
        if name and own and not measured.needed.intersection(own):
            if not any(name.startswith(f"{other}.") for other in unused):
                unused.append(name)

    def runs_without(names: list[str], substitute: Callable[[nn.Module], nn.Module]) -> bool:
        modules = {name: extractor.get_submodule(name) for name in names}
        for name, module in modules.items():
            extractor.set_submodule(name, substitute(module))
        try:
            again = trace(extractor, in_channels, sizes.probe, sizes.resample)
            # what follows an Identity may overwrite what went into it
            if again.overwrites == measured.overwrites and _same_maps(again, measured):
                return True
        except Exception:  # what no level needs may fail in any way
            pass
        for name, module in modules.items():
            extractor.set_submodule(name, module)
        return False

    def drop(names: list[str]) -> None:
        if not names or runs_without(names, lambda _: nn.Identity()):
            return
        for name in names:
            if not (runs_without([name], lambda _: nn.Identity()) or runs_without([name], Stub)):
                children = extractor.get_submodule(name).named_children()
                drop([f"{name}.{key}" for key, child in children if [*child.parameters()]])

    drop(unused)
    for name, parameter in list(extractor.named_parameters()):
        if name not in measured.needed:
            parameter.requires_grad_(False)
            if name not in measured.parameters:
                module, _, key = name.rpartition(".")
                extractor.get_submodule(module).register_parameter(key, None)


class Stub(nn.Module):
    """Zeros of the shapes that a module gives, in the place of one that runs without need."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self._model = [copy.deepcopy(module).to("meta").eval()]  # in a list it is no submodule

    def forward(self, *args: torch.Tensor) -> Any:
        outputs = self._model[0](*(arg.to("meta", torch.float32) for arg in args))
        like = args[0]
        return tree_map(lambda out: like.new_zeros(out.shape), outputs)


def _same_maps(trace: Trace, other: Trace) -> bool:
    pairs = zip(trace.levels, other.levels, strict=True)
    return all(replace(level, end=0) == replace(same, end=0) for level, same in pairs)


def _rename(state_dict: dict, prefix: str, names: Mapping[str, str]) -> None:
    for old, new in names.items():
        if prefix + old in state_dict:
            state_dict[prefix + new] = state_dict.pop(prefix + old)


def _rename_saved(module: FeatureBackbone, state_dict: dict, prefix: str, _) -> None:
    _rename(state_dict, prefix + "model.", module._source_keys)


def _rename_loaded(module: FeatureBackbone, state_dict: dict, prefix: str, *_) -> None:
    _rename(state_dict, prefix + "model.", {v: k for k, v in module._source_keys.items()})
