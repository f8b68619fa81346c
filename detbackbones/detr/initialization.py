"""The random weights with which a model of transformers starts to learn: those of its authors.

transformers 5.23 draws most of them from N(0, 0.01) or N(0, 0.02), in the RT-DETRs even the scales
of batch norm, which makes maps of next to nothing: enough for models that load a checkpoint, and a
poor start for those that do not.
"""

import math
import re
from typing import TYPE_CHECKING

from torch import nn

from .architectures import EVERY

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PLAIN = (nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.Embedding)
_PARTS = re.compile(r"\.[qkv]_proj$")  # of one matrix in the authors' programs
# the layers that have Xavier's, linear ones and convolutions
_OF_HYBRIDS = (r"\.[qkv]_proj$|query_pos_head|enc_output\.0", "decoder_input_proj")
_OF_OTHERS = (r"(en|de)coder\.", r"input_proj(ections)?\.\d")
_PRIOR = 0.01  # the probability of each class at the start


def initialize(model: "PreTrainedModel") -> None:
    """Draw the weights anew: torch's defaults, but for what the authors' programs set by hand.

    Matrices of transformer layers are Xavier's; the deformable attention looks around, as
    transformers has it; a class has a probability of 0.01, where its loss is a focal loss; and box
    heads leave the boxes that they refine as they are.
    """
    wanted = EVERY[model.config.model_type]
    linear, convolution = _OF_HYBRIDS if wanted.hybrid else _OF_OTHERS
    for name, module in model.named_modules():
        if isinstance(module, _PLAIN):
            module.reset_parameters()
        names = {nn.Linear: linear, nn.Conv2d: convolution}.get(type(module))
        if names and re.search(names, name):
            nn.init.xavier_uniform_(module.weight, gain=2**-0.5 if _PARTS.search(name) else 1)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if not isinstance(module, _PLAIN):
            model._init_weights(module)
    for name, module in model.named_modules():
        if name.endswith("denoising_class_embed"):
            module.reset_parameters()
        elif name.endswith("reference_point_embed"):  # which is added to the proposals
            nn.init.zeros_(module.weight)
        elif isinstance(module, nn.Linear) and re.search("class|score", name):
            if not wanted.no_object:
                nn.init.constant_(module.bias, -math.log(1 / _PRIOR - 1))
        elif "bbox" in name and hasattr(module, "layers"):
            nn.init.zeros_(module.layers[-1].weight)
            nn.init.zeros_(module.layers[-1].bias)
            # the first boxes of Deformable DETR have no size yet, and begin small
            if model.config.model_type == "deformable_detr" and name.endswith("bbox_embed.0"):
                nn.init.constant_(module.layers[-1].bias[2:], -2)
