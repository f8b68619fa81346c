"""A third source, and check_source, which proves it or says what is wrong with it."""

import pytest
from detbackbones import FeatureBackbone, build_pyramid
from detbackbones.backbones.source import Source
from detbackbones.measure.layers import LayerExtractor
from detbackbones.testing import check_source
from support import images
from transformers import AutoConfig, AutoModel


class TransformersSource(Source):
    """Convolutional models of transformers with their default configurations."""

    prefix = "model."
    native_size = 224

    @classmethod
    def names(cls):
        return ["convnextv2", "regnet", "resnet"]

    @property
    def level_keys(self):
        modules = dict(self.model.named_modules())
        return [name for n in range(4) if (name := f"encoder.stages.{n}") in modules]

    def create(self, pretrained=False):
        sizes = {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1]}
        return AutoModel.from_config(AutoConfig.for_model(self.model_name, **sizes))

    def extractor(self, model, keys):
        return LayerExtractor(model, keys)


@pytest.mark.parametrize("name", TransformersSource.names())
def test_a_third_source_keeps_the_contract(name):
    row = check_source(TransformersSource, name)
    assert [level[:3] for level in row["levels"]] == [
        ["res2", 16, 4],
        ["res3", 24, 8],
        ["res4", 32, 16],
        ["res5", 40, 32],
    ]
    assert set(row["points"].values()) == {"ok"} and row["neck"] == "FPN"
    assert bool(row["batch_norm"]) is (name != "convnextv2")


def test_a_backbone_of_a_third_source():
    source = TransformersSource("resnet")
    backbone = FeatureBackbone(source, norm="FrozenBN", freeze_at=2)
    frozen = {key for key, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen and all("embedder" in key or "encoder.stages.0" in key for key in frozen)
    pyramid = build_pyramid(bottom_up=backbone, out_channels=8)
    assert pyramid(images(1, 3, 64, 96))["p3"].shape == (1, 8, 8, 12)


class Grey(TransformersSource):
    """Takes images of one channel."""

    def __init__(self, model_name):
        super().__init__(model_name, in_channels=1)

    def create(self, pretrained=False):
        sizes = {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1], "num_channels": 1}
        return AutoModel.from_config(AutoConfig.for_model(self.model_name, **sizes))


def test_a_source_of_other_channels():
    assert set(check_source(Grey, "regnet")["points"].values()) == {"ok"}


class Forgetful(TransformersSource):
    """Says that the checkpoint has other names than it has."""

    def convert(self, state):
        return {key.replace("embedder", "stem"): value for key, value in state.items()}


class WithoutLevels(TransformersSource):
    """Calls its levels by names that the model does not have."""

    level_keys = ["stage1"]


@pytest.mark.parametrize(
    "source, message",
    [
        (Forgetful, "resnet: weights: .*leave out embedder.embedder.convolution.weight"),
        (WithoutLevels, "resnet: build: refused: model_name='resnet' cannot be a backbone"),
    ],
)
def test_a_wrong_source_is_told_what_is_wrong(source, message):
    with pytest.raises(AssertionError, match=message):
        check_source(source, "resnet")
