"""Names of parameters in other libraries, put into timm's and torchvision's."""

import re
from collections.abc import Collection, Mapping

import torch

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
    """A state dict of detectron2's ResNet or of efficientnet_pytorch by the names of a model.

    Args:
        state: of any model.
        own: the names of the model's tensors.

    Returns:
        the state dict with other names, or as it is where it is of neither or the model is another.
        detectron2's ResNets take BGR images, unless they were trained otherwise.
    """
    if "res2.0.conv1.weight" in state and "layer1.0.conv1.weight" in own:
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
