"""Whom tools/benchmark/backbones.py compares: a backbone and its peers, in equal conditions.

All have the same levels, weights and frozen parameters, and it is checked that they compute the
same thing.
"""

import argparse
import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
from detbackbones import FeatureBackbone, TimmBackbone, TorchvisionBackbone
from detbackbones.adapt.folded_conv import FoldedConv2d
from detbackbones.adapt.memory_format import breaks_in_channels_last
from detbackbones.measure.levels import output_list
from detbackbones.testing.contract import TOLERANCE
from detbackbones.testing.raw import flat
from detbackbones.testing.trial import randomise
from detectron2.modeling.backbone.resnet import BasicStem, ResNet
from timm.layers import freeze_batch_norm_2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor

OURS = "detbackbones"
AMP_TOLERANCE = 0.1  # bfloat16 has 8 significant bits, and errors add up over the layers
MIB = 2**20


@dataclass
class Contestant:
    """A model that maps images (N, C, H, W) to feature maps, and how it is run."""

    label: str
    model: nn.Module
    amp: bool = False

    def __post_init__(self):
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=1e-6) if trained else None

    def maps(self, images: torch.Tensor, amp: bool) -> list[torch.Tensor]:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            return output_list(self.model(images))

    def loss(self, images: torch.Tensor) -> torch.Tensor:
        return sum(level.float().mean() for level in self.maps(images, self.amp))

    def step(self, images: torch.Tensor) -> None:
        """A training or an inference step, whichever mode the model is in."""
        if self.model.training:
            loss = self.loss(images)
            if self.optimizer is None:
                return
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        else:
            with torch.no_grad():
                self.maps(images, self.amp)

    def train(self, mode: bool) -> None:
        """Set the mode of all but frozen batch norm that is still of an ordinary class."""
        self.model.train(mode)
        for module in self.model.modules():
            if isinstance(module, _BatchNorm) and not all(
                parameter.requires_grad for parameter in module.parameters(recurse=False)
            ):
                module.eval()


def copy_weights(
    source: nn.Module, target: nn.Module, name: Callable[[str], str] = lambda key: key
) -> None:
    """Load one extractor's weights into another; ``name`` says what the source calls a key."""
    values = {flat(key): value for key, value in source.state_dict().items()}
    target.load_state_dict(
        {key: values.get(flat(name(key)), old) for key, old in target.state_dict().items()}
    )


def with_telling_weights(model: nn.Module, size: tuple[int, int]) -> nn.Module:
    """A copy with values of their own everywhere, and the statistics of images in batch norm.

    With statistics at random, the maps of deep models would grow out of all bounds.
    """
    model = randomise(copy.deepcopy(model)).train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        model(torch.randn(4, 3, *size))
    return model


def timm_key(key: str) -> str:
    """The key of detectron2's ResNet in timm's and torchvision's words."""
    key = re.sub(r"^res(\d)", lambda match: f"layer{int(match[1]) - 1}", key.removeprefix("stem."))
    key = key.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
    return re.sub(r"conv(\d)\.norm", r"bn\1", key)


def timm_models(name: str, options: dict[str, Any]) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The backbone of a timm model, and timm's own extractor of its levels."""
    ours = TimmBackbone(name, **options)
    levels = ours.source.levels_by_stride()
    kwargs = ours.source.fit(levels).options  # for images of the same sizes
    peer = timm.create_model(name, features_only=True, out_indices=levels.keys, **kwargs)
    return ours, {"timm": peer}


def torchvision_models(
    name: str, options: dict[str, Any]
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The backbone of a torchvision model, and torchvision's own extractors of its levels."""
    ours = TorchvisionBackbone(name, **options)
    source = torchvision.models.get_model(name)
    nodes = dict(ours.source.levels_by_stride().names)
    peers = {"create_feature_extractor": create_feature_extractor(copy.deepcopy(source), nodes)}
    if isinstance(source, torchvision.models.ResNet):
        layers = {f"layer{n - 1}": f"res{n}" for n in range(2, 6)}
        peers["IntermediateLayerGetter"] = IntermediateLayerGetter(source, layers)
    return ours, peers


def variants_of(backbone: FeatureBackbone, device: str) -> list[dict[str, bool]]:
    """The memory format and the folding that a backbone does not choose by itself on a device."""
    folds = [{"fold": False}] * any(isinstance(m, FoldedConv2d) for m in backbone.modules())
    if device == "cpu" and breaks_in_channels_last(backbone):
        return folds
    other = {"channels_last": not (device == "cpu" and backbone._channels_last_on_cpu)}
    return [*folds, other, *({**other, **fold} for fold in folds)]


def contestants(name: str, args: argparse.Namespace, images: torch.Tensor) -> list[Contestant]:
    """The backbone of a model, first, and its peers: weights and what is frozen are the same.

    Args:
        name: of the model.
        args: the program's.
        images: (N, C, H, W), on which all must agree.

    Raises:
        ValueError: if the model cannot be built, or a peer gives other feature maps.
    """
    options = {"norm": args.norm, "freeze_at": args.freeze_at}
    options |= {key: True for key in ("grad_checkpointing", "compile") if getattr(args, key)}
    if args.options_off:
        options = {"fold": False, "channels_last": False}
    build = timm_models if args.source == "timm" else torchvision_models
    torch.manual_seed(0)
    ours, peers = build(name, options)
    resnet = re.fullmatch(r"resnet(18|34|50|101|152)(\..*)?", name)
    if resnet and not args.options_off:
        depth = int(resnet[1])
        kwargs = {"norm": args.norm} | ({"stride_in_1x1": False} if depth >= 50 else {})
        peers["detectron2"] = ResNet(
            BasicStem(norm=args.norm),
            ResNet.make_default_stages(depth, **kwargs),
            out_features=list(ours.output_shape()),
            freeze_at=args.freeze_at,
        )

    if args.variants:
        for variant in variants_of(ours, images.device.type):
            label = ", ".join(f"{key}={value}" for key, value in variant.items())
            peers[label] = build(name, {**options, **variant})[0]

    with torch.no_grad():
        ours.eval()(torch.zeros(1, 3, *args.size))  # refuses a size in plain words
    source = with_telling_weights(next(iter(peers.values())), args.size)
    copy_weights(source, ours)
    state = ours.state_dict(keep_vars=True)
    frozen = {flat(key) for key, value in state.items() if not value.requires_grad}
    for label, peer in peers.items():
        if label == "detectron2":
            copy_weights(ours, peer, timm_key)
            continue
        copy_weights(source, peer)
        if isinstance(peer, FeatureBackbone):  # built with the same options
            continue
        for key, parameter in peer.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and flat(key) not in frozen)
        if args.norm == "FrozenBN" and not args.options_off:
            # gives torchvision's FrozenBatchNorm2d with the eps of the model
            freeze_batch_norm_2d(peer)
    models = {OURS: ours, **peers}
    for model in models.values():
        model.to(images.device)
    check_agreement(models, images)
    made = [Contestant(OURS, ours, args.amp)]
    made += [Contestant(label, peer) for label, peer in peers.items()]
    if args.amp or args.compile:
        settings = ", AMP" * args.amp + ", compiled" * args.compile
        for label, peer in peers.items():
            peer = torch.compile(peer, dynamic=True) if args.compile else peer
            made.append(Contestant(label + settings, peer, args.amp))
    check_setting(made, images)
    return made


def _compare(
    labels: Sequence[str], maps: Sequence[Sequence[torch.Tensor]], tolerance: float
) -> None:
    for label, outputs in zip(labels, maps):
        for wanted, got in zip(maps[1], outputs, strict=True):
            # Swin's own maps are (N, H, W, C)
            layouts = [m for m in (got, got.permute(0, 2, 3, 1)) if m.shape == wanted.shape]
            size = wanted.abs().max()
            error = min([((m - wanted).abs().max() / size).item() for m in layouts], default=1)
            if not error <= tolerance:  # nor if it is no number
                raise ValueError(
                    f"{label} gives other feature maps than {labels[1]}: at "
                    f"{tuple(wanted.shape)} the difference is {error:.1g} of the largest value"
                )


@torch.no_grad()
def check_agreement(models: Mapping[str, nn.Module], images: torch.Tensor) -> None:
    """Compare the feature maps of models, in eval mode, with those of the second (the first peer).

    Deep models with random weights may be chaotic, so that float32 tells nothing: float64 is used.

    Raises:
        ValueError: if one gives others, or the backbone does not take the images.
    """
    maps = [output_list(model.eval().double()(images.double())) for model in models.values()]
    for model in models.values():
        model.float()
    _compare([*models], maps, TOLERANCE)


@torch.no_grad()
def check_setting(made: Sequence[Contestant], images: torch.Tensor) -> None:
    """Compare the finest feature map of all as they are timed: compiled, with AMP, on a GPU.

    Raises:
        ValueError: if one gives another than the first peer.
    """
    for one in made:
        one.train(False)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        maps = [one.maps(images, one.amp)[:1] for one in made]
    amp = any(one.amp for one in made)
    _compare([one.label for one in made], maps, AMP_TOLERANCE if amp else TOLERANCE)


def saved_bytes(
    model: nn.Module, images: torch.Tensor, forward: Callable[[torch.Tensor], Any]
) -> tuple[int, int]:
    """What a forward pass keeps for the backward pass.

    Args:
        model: its parameters and buffers, and the images, are not counted.
        images: (N, C, H, W).
        forward: what runs the model on the images.

    Returns:
        bytes in all, and bytes of copies of convolution weights (folded or cast): what has the
        shape of one and no N in front.
    """
    given = (*model.parameters(), *model.buffers(), images)
    given = {tensor.untyped_storage().data_ptr() for tensor in given}
    shapes = {p.shape for p in model.parameters() if p.dim() == 4}
    saved: dict[int, tuple[int, bool]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            weight = tensor.shape in shapes and tensor.shape[0] != images.shape[0]
            saved[storage.data_ptr()] = storage.nbytes(), weight
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward(images)  # while it lives, no address is used twice
    del kept
    return sum(n for n, _ in saved.values()), sum(n for n, weight in saved.values() if weight)


def memory(one: Contestant, images: torch.Tensor) -> dict[str, float]:
    """In MiB: what a training step saves, and on a GPU how much a step adds at its peak."""
    found = {}
    if one.model.training:
        total, weights = saved_bytes(one.model, images, one.loss)
        found = {"saved_mib": total / MIB, "saved_weights_mib": weights / MIB}
    if images.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        one.step(images)
        torch.cuda.synchronize()
        found["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / MIB
    return found
