"""Names of other libraries."""

import timm
import torch
from detbackbones.weights.names import translate

# A file of efficientnet_pytorch's b0 has these of its stem, its first two blocks, and its end.
EFFICIENTNET = {
    "_conv_stem.weight": "conv_stem.weight",
    "_bn0.running_var": "bn1.running_var",
    "_blocks.0._depthwise_conv.weight": "blocks.0.0.conv_dw.weight",
    "_blocks.0._bn1.weight": "blocks.0.0.bn1.weight",
    "_blocks.0._se_reduce.weight": "blocks.0.0.se.conv_reduce.weight",
    "_blocks.0._se_reduce.bias": "blocks.0.0.se.conv_reduce.bias",
    "_blocks.0._se_expand.weight": "blocks.0.0.se.conv_expand.weight",
    "_blocks.0._project_conv.weight": "blocks.0.0.conv_pw.weight",
    "_blocks.0._bn2.running_mean": "blocks.0.0.bn2.running_mean",
    "_blocks.1._expand_conv.weight": "blocks.1.0.conv_pw.weight",
    "_blocks.1._bn0.weight": "blocks.1.0.bn1.weight",
    "_blocks.1._depthwise_conv.weight": "blocks.1.0.conv_dw.weight",
    "_blocks.1._bn1.bias": "blocks.1.0.bn2.bias",
    "_blocks.1._se_expand.bias": "blocks.1.0.se.conv_expand.bias",
    "_blocks.1._project_conv.weight": "blocks.1.0.conv_pwl.weight",
    "_blocks.1._bn2.bias": "blocks.1.0.bn3.bias",
    "_blocks.15._expand_conv.weight": "blocks.6.0.conv_pw.weight",
    "_conv_head.weight": "conv_head.weight",
    "_bn1.weight": "bn2.weight",
    "_fc.bias": "classifier.bias",
}


def test_efficientnet_pytorch():
    with torch.device("meta"):
        own = timm.create_model("tf_efficientnet_b0").state_dict()
    state = {key: own[name] for key, name in EFFICIENTNET.items()}
    translated = translate(state, own)
    assert [*translated] == [*EFFICIENTNET.values()]
    assert all(translated[name] is own[name] for name in translated)
    for name in ("resnet18", "convnext_atto"):  # of models of other names nothing is translated
        assert translate(state, timm.create_model(name).state_dict()) is state


def test_a_model_with_a_stem_of_its_own_is_no_resnet():
    state = {"stem.0.weight": torch.ones(1), "stages.0.x": torch.ones(1)}
    assert translate(state, {"stem.0.weight"}) is state
