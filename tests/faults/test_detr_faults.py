"""Options of DETRs that transformers takes and that fail later: refused when the model is built."""

import pytest
from detbackbones import TimmBackbone, TransformersDetector
from detbackbones.detr.architectures import ARCHITECTURES


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"auxiliary_loss": False}, "auxiliary_loss=False must be left out"),
        ({"learn_initial_query": True}, "learn_initial_query"),
        ({"decoder_layers": 1}, "decoder_layers=1 must be at least 2"),
        ({"decoder_layers": 0}, "decoder_layers=0 must be at least 2"),
        ({"box_noise_scale": 0.0}, "box_noise_scale=0.0 must be more than 0|has 'box_noise_scale'"),
        ({"no_such": 1}, "config_kwargs has 'no_such'"),
        ({"num_labels": 3}, "config_kwargs has 'num_labels', which follows"),
        ({"decoder_ffn_dim": "two"}, "are refused: "),
    ],
)
def test_options_that_cannot_be_trained_are_refused(architecture, option, message):
    if "auxiliary_loss" in option and not ARCHITECTURES[architecture].pyramid:
        pytest.skip("every parameter has a gradient without it")
    out_features = ["res4"] if ARCHITECTURES[architecture].vit else None
    with pytest.raises(ValueError, match=message):
        TransformersDetector(
            backbone=TimmBackbone("test_resnet", out_features=out_features),
            architecture=architecture,
            num_classes=2,
            config_kwargs=option,
        )
