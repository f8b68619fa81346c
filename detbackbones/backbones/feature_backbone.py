"""FeatureBackbone: a model of any source as a detectron2 backbone."""

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import nn

from ..adapt.depthwise import train_depthwise_in_float32
from ..adapt.fold import fold_norms
from ..adapt.freeze import freeze, frozen_part
from ..adapt.grad_checkpointing import Checkpoints
from ..adapt.lora import add_lora, check_lora, forget_updates, is_update, merged, own_name
from ..adapt.memory_format import breaks_in_channels_last, gains_from_channels_last, lay_out
from ..adapt.norm import NORMS, convert_norm, is_batch_norm
from ..adapt.prune import prune
from ..measure.levels import output_list
from ..measure.meta import meta_state, run_on_meta
from ..measure.sizes import ANY_SIZE, SizeRule
from ..measure.trace import record
from ..messages import one_of, whole_number
from ..weights import OtherModelError, Part, find_part, fitting, read_tensors, unloaded
from .module_source import ModuleSource
from .source import Fit, Levels, Source

logger = logging.getLogger(__name__)

# What a model computes with: layers that it has not would be missing from the maps.
_LEARNED = (".weight", ".bias", ".gamma", "bias_table")
_TOKENS = ("cls_token", "dist_token", "reg_token", "register_tokens", "storage_tokens")


class FeatureBackbone(Backbone):
    """A model with measured channels and strides, frozen as asked.

    Parameters, buffers and modules have the source model's own names under the prefix ``model.``,
    so that checkpoints of the source model load into it, and it saves back to them.

    Attributes:
        source: what the model is.
        model: the source model, without the parts that no level depends on.
        execution_order: names of the parameters in the order of their first use.
        source_class: of a subclass that makes its source itself, the class of that source.
    """

    source_class: ClassVar[type[Source]]

    def __init__(
        self,
        source: Source,
        levels: Levels | None = None,
        *,
        pretrained: bool = False,
        checkpoint_path: str = "",
        norm: str = "",
        freeze_at: int = 0,
        fold: bool = True,
        channels_last: bool | None = None,
        compile: bool = False,
        grad_checkpointing: bool = False,
        lora_rank: int = 0,
        lora_layers: Sequence[str] = (),
    ):
        """
        Args:
            source: the model.
            levels: which of its levels to output, under which names; by default the last of each
                stride from 4 to 32, ``res2`` to ``res5``.
            pretrained: with the model's pretrained weights, else with random ones.
            checkpoint_path: a file of weights, see :meth:`load_checkpoint`.
            norm: batch norm ``""`` as in the model, ``"FrozenBN"``, ``"SyncBN"`` or ``"BN"``; see
                :func:`detbackbones.adapt.norm.convert_norm`.
            freeze_at: 0 nothing, 1 the stem, 2 up to and including ``res2``, ... 5 all.
            fold: make frozen batch norm a part of the convolution before it, see
                :func:`detbackbones.adapt.fold.fold_norms`.
            channels_last: the memory format of the maps; None is for where it was measured to help,
                on a CPU in models with batch norm but ResNeSt. RepVGG never has channels last on a
                CPU, see :func:`detbackbones.adapt.memory_format.breaks_in_channels_last`.
            compile: pass the extractor through ``torch.compile``.
            grad_checkpointing: compute maps again in the backward pass instead of keeping them.
            lora_rank: freeze the model, and train updates of this rank of its linear layers and
                1x1 convolutions, see :func:`detbackbones.adapt.lora.add_lora`; 0 is none. Batch
                norm is frozen too unless ``norm`` says otherwise.
            lora_layers: endings of the names of the layers that have updates; empty is for all.

        Raises:
            ValueError: if an argument is out of range, or the model cannot give these levels.
            FileNotFoundError: if ``checkpoint_path`` does not exist.
            ConnectionError: if pretrained weights cannot be downloaded.
            ImportError: if peft is needed and not installed.
        """
        super().__init__()
        switches = {"pretrained": pretrained, "fold": fold, "compile": compile}
        switches["grad_checkpointing"] = grad_checkpointing
        for key, value in switches.items():
            one_of(key, value, (True, False))
        one_of("channels_last", channels_last, (None, True, False))
        one_of("norm", norm, NORMS)
        check_lora(lora_rank, lora_layers)
        if lora_rank:
            norm = norm or "FrozenBN"
        if compile and grad_checkpointing:
            raise ValueError("compile=True and grad_checkpointing=True cannot be had together")

        # what is frozen, and how the levels can be had, is known before there are any weights
        part = frozen_part(source.trace, freeze_at, source.prefix)
        levels = levels or source.levels_by_stride()
        fit = source.fit(levels)
        prefix = source.names_in(levels)

        extractor = source.build(levels, fit.options, pretrained)
        source.switch_off_dropout(extractor, part.modules)
        prune(extractor, fit.trace, source.in_channels, fit.sizes)
        extractor = convert_norm(extractor, norm)
        self._eval_modules = freeze(extractor, part, prefix)
        if norm == "FrozenBN":  # what is a batch norm still is of no class that we can replace
            modules = extractor.named_modules()
            self._eval_modules += [name for name, module in modules if is_batch_norm(module)]
        if lora_rank:
            frozen = {prefix + name for name in part.modules}
            learning = fit.trace.modules.keys() - frozen
            add_lora(extractor, lora_rank, learning, lora_layers)
        if fold:
            _fold(extractor, fit, source.in_channels)
        train_depthwise_in_float32(extractor)
        if compile:
            extractor.compile(dynamic=True)

        self.source = source
        self.model = extractor.get_submodule(prefix.removesuffix("."))
        self._extractor = [extractor]  # in a list it is no submodule, and has no names of its own
        self._channels_last = channels_last
        breaks = breaks_in_channels_last(extractor)
        gains = gains_from_channels_last(extractor)
        self._channels_last_on_cpu = not breaks and (
            gains if channels_last is None else channels_last
        )
        self._lay_out()
        self._describe(fit, list(levels.names.values()), prefix)
        self.train()
        self._checkpoints = None
        if grad_checkpointing:
            # traced again, for a folded norm passes on what it is given
            as_it_is = record(extractor, source.in_channels, fit.sizes.probe)
            self._checkpoints = Checkpoints(extractor, as_it_is)
        if checkpoint_path:
            self.load_checkpoint(checkpoint_path)

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
            module: runs on (N, C, H, W) images; the backbone has a copy of the part that its
                layers need.
            layers: names of modules that give the levels, or these names to names of the levels.
            in_channels: channels of the images.
            img_size: the N of an N x N image that the module takes.
            norm, freeze_at: as in the constructor; ``freeze_at`` is by the strides of ``layers``.

        Raises:
            ValueError: if an argument is out of range, or a layer gives no feature map.
        """
        whole_number("in_channels", in_channels)
        whole_number("img_size", img_size)
        source = ModuleSource(module, layers, in_channels, img_size)
        frozen_part(source.trace, freeze_at)  # refuses what is out of range
        finest = min(level.exponent for level in source.trace.levels)
        if 0 < freeze_at < finest:
            raise ValueError(
                f"freeze_at={freeze_at} needs a level of stride {2**freeze_at} or less among "
                f"layers={layers}, whose finest has stride {2**finest}"
            )
        backbone = FeatureBackbone(source, source.levels, norm=norm, freeze_at=freeze_at)
        source.forget_weights()
        return backbone

    def _describe(self, fit: Fit, names: Sequence[str], prefix: str) -> None:
        """Keep what was measured of the levels, fine to coarse, and the sizes that are taken."""
        # (position among the extractor's outputs, level)
        levels = sorted(zip(names, enumerate(fit.trace.levels)), key=lambda item: item[1][1].stride)
        self._levels = dict(levels)
        self._out_features = list(self._levels)
        self._out_feature_channels = {n: level.channels for n, (_, level) in levels}
        self._out_feature_strides = {n: level.stride for n, (_, level) in levels}
        self._sizes = fit.sizes
        step = math.lcm(*self._out_feature_strides.values())
        if step % fit.sizes.divisor == 0 and not fit.sizes.img_size:
            self._sizes = replace(fit.sizes, divisor=1)  # the strides say as much
        first_use = fit.trace.parameters
        order = sorted(first_use, key=first_use.get)
        self.execution_order = [f"model.{name.removeprefix(prefix)}" for name in order]

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            x: images (N, C, H, W). Where the model does not take their size, they are padded with
                zeros at the bottom and at the right, to what detectron2 pads images to.

        Returns:
            each level's feature map (N, C, ceil(H / stride), ceil(W / stride)), fine to coarse; of
            a model that takes the size by itself, with the rows and columns that it gives.

        Raises:
            ValueError: if the model takes only images of a smaller size.
        """
        size = height, width = tuple(x.shape[-2:])
        whole = self._whole(size)
        if whole != size:
            x = F.pad(x, (0, whole[1] - width, 0, whole[0] - height))
        if self._runs_channels_last(x.device):
            x = x.contiguous(memory_format=torch.channels_last)
        run = self.extractor
        if self._checkpoints:
            run = partial(self._checkpoints.run, run)
        outputs = output_list(run(x))
        maps = {
            name: level.feature_map(outputs[i], whole) for name, (i, level) in self._levels.items()
        }
        if whole == size:
            return maps
        strides = self._out_feature_strides
        return {
            name: level[..., : -(-height // strides[name]), : -(-width // strides[name])]
            for name, level in maps.items()
        }

    def _whole(self, size: tuple[int, int]) -> tuple[int, int]:
        """The (height, width) that images of a size are padded to."""
        step = self.size_divisibility
        if size[0] % step == 0 == size[1] % step and not self._sizes.img_size:
            return size
        if self._sizes == ANY_SIZE and self._takes_any_size:
            return size
        rule = self._sizes if self._sizes.img_size else SizeRule(step)
        return rule.padded(size)

    @cached_property
    def _takes_any_size(self) -> bool:
        """Whether the model runs on images that are no multiples of its strides."""
        height, width = self._sizes.probe
        shape = (1, self.source.in_channels, height + 3, width + 5)
        try:
            run_on_meta(self.extractor, meta_state(self.extractor), shape)
        except Exception:  # a model may fail in any way
            return False
        return True

    @property
    def extractor(self) -> nn.Module:
        """What runs ``model`` and gives the levels as its library has them."""
        return self._extractor[0]

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each level, fine to coarse."""
        return super().output_shape()

    @property
    def size_divisibility(self) -> int:
        """Height and width of the input should be multiples of this; others are padded to it.

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
    def probe_size(self) -> tuple[int, int]:
        """The (height, width) of an image that the model takes without padding, a small one."""
        return self._sizes.probe

    @property
    def grad_checkpointing(self) -> bool:
        """Whether maps are computed again in the backward pass."""
        return self._checkpoints is not None

    @property
    def is_compiled(self) -> bool:
        """Whether the model runs through ``torch.compile``."""
        return self.extractor._compiled_call_impl is not None

    @property
    def resampled(self) -> list[str]:
        """Levels whose own grid is no whole fraction of the image, and is resampled to one."""
        return [name for name, (_, level) in self._levels.items() if level.resampled]

    @property
    def model_name(self) -> str:
        """What the source calls the model."""
        return self.source.model_name

    @property
    def pixel_mean(self) -> list[float] | None:
        """Mean of the images that the model was trained on, by channel, 0 to 255; None if unknown.

        timm's and torchvision's are RGB.
        """
        return self.source.pixel_mean

    @property
    def pixel_std(self) -> list[float] | None:
        """Standard deviation that goes with :attr:`pixel_mean`."""
        return self.source.pixel_std

    def train(self, mode: bool = True) -> "FeatureBackbone":
        """Set the mode of all but the frozen modules, which stay in eval mode."""
        super().train(mode)
        self.extractor.training = mode
        for name in self._eval_modules:
            self.extractor.get_submodule(name).eval()
        return self

    def _apply(self, *args, **kwargs) -> "FeatureBackbone":
        super()._apply(*args, **kwargs)
        self._lay_out()  # for the device that it has been moved to
        return self

    def _lay_out(self) -> None:
        weight = next(self.parameters(), None)
        if weight is not None:
            lay_out(self.extractor, self._runs_channels_last(weight.device))

    def _runs_channels_last(self, device: torch.device) -> bool:
        on_cpu = device.type in ("cpu", "meta")
        return bool(self._channels_last_on_cpu if on_cpu else self._channels_last)

    def __deepcopy__(self, memo: dict) -> "FeatureBackbone":
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__ = copy.deepcopy(self.__getstate__(), memo)
        return new.train(self.training)  # a copied GraphModule is in training mode

    def match_source(
        self, tensors: Mapping[str, torch.Tensor], within: str | None = None
    ) -> tuple[Part, list[str]]:
        """Find weights of the source model; what the levels do not need is passed over.

        Args:
            tensors: in any format that the source knows how to convert, behind any prefix.
            within: see :func:`detbackbones.weights.parts.find_part`.

        Returns:
            the part that fits, and the keys that are missing in it or of another shape.

        Raises:
            ValueError: if several parts fit, or values are not finite.
            OtherModelError: if the part that fits has layers or tokens that the source model has
                not.
        """
        own = self._source_state()
        part = find_part(merged(tensors), own, self.source.convert, within)
        parts = {key.partition(".")[0] for key in own}
        for key in part.state if part.fitting else ():
            learned = key.endswith(_LEARNED) and key.partition(".")[0] in parts or key in _TOKENS
            if learned and key not in self.source.state_names:
                raise OtherModelError(f"the model has no {key}")
        return part, unloaded(own, fitting(part.state, own))

    def load_part(self, part: Part) -> None:
        """Load what :meth:`match_source` has found."""
        fit = fitting(part.state, self._source_state())
        self.load_state_dict({f"model.{key}": value for key, value in fit.items()}, strict=False)
        forget_updates(self)

    def load_source(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, list[str]]:
        """:meth:`match_source`, and load what it finds."""
        part, wanting = self.match_source(tensors)
        self.load_part(part)
        return part, wanting

    def _source_state(self) -> dict[str, torch.Tensor]:
        state = self.state_dict()
        return {key.removeprefix("model."): state[key] for key in state if not is_update(key)}

    def load_checkpoint(self, path: str) -> None:
        """Load a file with weights of the source model, or of a detector with this backbone, whole.

        Args:
            path: see :func:`detbackbones.weights.read_tensors`. Of its tensors those are taken that
                fit the backbone, whatever stands before their names.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if any tensor that the backbone needs is missing or of another shape, or
                several parts of the file fit.
        """
        tensors, within = read_tensors(path)
        not_of = f"checkpoint_path={str(path)!r} is not of {self.model_name}"
        try:
            part, wanting = self.match_source(tensors, within)
        except ValueError as error:
            raise ValueError(f"{not_of}: {error}") from error
        wanted = part.fitting + len(wanting)
        if wanting:
            raise ValueError(
                f"{not_of}: {part.fitting} of {wanted} tensors fit, and {wanting[0]} is missing or "
                f"of another shape; the file's own are {', '.join(list(tensors)[:3])}, ..."
            )
        self.load_part(part)
        logger.info(
            "loaded %d of %d tensors of %s from %s%s; %d of the tensors there are not used",
            *(part.fitting, wanted, self.model_name, path, part.where, part.unused),
        )

    def parameter_depths(self) -> dict[str, int] | None:
        """How many layers of the source model follow each parameter; None if it does not say.

        See :func:`detbackbones.training.depths.parameter_depths`.
        """
        depths = self.source.depths
        names = [name for name, _ in self.model.named_parameters()]
        return depths and {f"model.{name}": depths[own_name(name)] for name in names}

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the source model exempts from weight decay."""
        names = [name for name, _ in self.model.named_parameters()]
        return {f"model.{name}" for name in names if own_name(name) in self.source.no_weight_decay}


def _fold(extractor: nn.Module, fit: Fit, in_channels: int) -> None:
    """Fold what can be folded, tried on half of a probe image where the model takes that."""
    sizes, step = fit.sizes, math.lcm(*(level.stride for level in fit.trace.levels))
    size, multiple = [n // 2 for n in sizes.probe], math.lcm(step, sizes.divisor)
    if sizes.img_size or any(n % multiple for n in size):
        size = sizes.probe
    fold_norms(extractor, fit.trace.followed_by, (1, in_channels, *size))
