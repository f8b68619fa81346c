"""Names of parameters in other libraries, put into timm's and torchvision's."""

import logging
import re
from collections.abc import Collection, Mapping

import torch

logger = logging.getLogger(__name__)

# torch's own wrappers, which may stand anywhere in a name
_WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# torchvision's DenseNets as they can be downloaded
_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(?=\d\.)")
# DINOv2's blocks while it is trained: a number of a group, and that of the block
_CHUNK = re.compile(r"^blocks\.\d+\.(?=\d+\.)")
# detectron2's ResNet
_RESNET = (
    (r"^stem\.", ""),
    (r"^res(\d)\.", lambda found: f"layer{int(found[1]) - 1}."),
    (r"shortcut\.norm\.", "downsample.1."),
    (r"shortcut\.", "downsample.0."),
    (r"conv(\d)\.norm\.", r"bn\1."),
)
# efficientnet_pytorch; in a block without expansion the first convolution is the depthwise one
_EFFICIENTNET = (
    (r"^_conv_stem\.", "conv_stem."),
    (r"^_bn0\.", "bn1."),
    (r"^_conv_head\.", "conv_head."),
    (r"^_bn1\.", "bn2."),
    (r"^_fc\.", "classifier."),
    (r"\._se_(reduce|expand)\.", r".se.conv_\1."),
    (r"\._depthwise_conv\.", ".conv_dw."),
)
_EXPANDED = (
    (r"\._expand_conv\.", ".conv_pw."),
    (r"\._project_conv\.", ".conv_pwl."),
    (r"\._bn(\d)\.", lambda found: f".bn{int(found[1]) + 1}."),
)
_NOT_EXPANDED = ((r"\._project_conv\.", ".conv_pw."), (r"\._bn(\d)\.", r".bn\1."))


def translate(
    state: Mapping[str, torch.Tensor], own: Collection[str]
) -> Mapping[str, torch.Tensor]:
    """A state dict of another library by the names of a model.

    Those of detectron2's ResNets, efficientnet_pytorch, DINOv2's training and torchvision's
    downloads are known.

    Args:
        state: of any model.
        own: the names of the model's tensors.

    Returns:
        the state dict with other names, or as it is where it is of none of these or the model is
        another.
    """
    if any(_WRAPPERS.search(key) for key in state):
        state = {_WRAPPERS.sub("", key): value for key, value in state.items()}
    if any(_DENSENET.search(key) for key in state):
        state = {_DENSENET.sub(r"\1", key): value for key, value in state.items()}
    if "blocks.0.0.norm1.weight" in state and "blocks.0.norm1.weight" in own:
        state = {_CHUNK.sub("blocks.", key): value for key, value in state.items()}
    if "res2.0.conv1.weight" in state and "layer1.0.conv1.weight" in own:
        logger.warning(
            "the weights are of a ResNet of detectron2, which takes BGR images and may have its "
            "strides in other convolutions (STRIDE_IN_1X1): the maps are right only if it was "
            "trained otherwise"
        )
        return {_replace(key, _RESNET): value for key, value in state.items()}
    if "_conv_stem.weight" in state and "conv_stem.weight" in own:
        return _from_efficientnet_pytorch(state, own)
    return state


def _from_efficientnet_pytorch(
    state: Mapping[str, torch.Tensor], own: Collection[str]
) -> dict[str, torch.Tensor]:
    """efficientnet_pytorch counts the blocks through, and timm counts them within each stage."""
    found = (re.match(r"blocks\.\d+\.\d+\.", name) for name in own)
    blocks = list(dict.fromkeys(match[0] for match in found if match))
    translated = {}
    for key, value in state.items():
        name = _replace(key, _EFFICIENTNET)
        if block := re.match(r"_blocks\.(\d+)\.", name):
            is_expanded = f"{block[0]}_expand_conv.weight" in state
            name = _replace(name, _EXPANDED if is_expanded else _NOT_EXPANDED)
            if int(block[1]) < len(blocks):
                name = blocks[int(block[1])] + name.removeprefix(block[0])
        translated[name] = value
    return translated


def _replace(key: str, rules: Collection[tuple]) -> str:
    for pattern, name in rules:
        key = re.sub(pattern, name, key)
    return key
