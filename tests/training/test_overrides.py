"""key=value words: what they change, and which are refused."""

import pytest
import torch
from detbackbones import TimmBackbone, get_config
from detbackbones.training.overrides import apply_overrides
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from omegaconf import OmegaConf


@pytest.fixture
def cfg():
    return get_config("cascade_mask_rcnn/timm_r50_fpn_1x.py")


BOTTOM_UP = "model.backbone.bottom_up"

VALID = {
    "a number": (["train.max_iter=7"], "train.max_iter", 7),
    "text": ([f"{BOTTOM_UP}.model_name=regnety_008.pycls_in1k"], f"{BOTTOM_UP}.model_name", ...),
    "a hub's name": (
        [f"{BOTTOM_UP}.model_name='hf-hub:timm/resnet18'"],
        f"{BOTTOM_UP}.model_name",
        "hf-hub:timm/resnet18",
    ),
    "a pattern": (["train.output_dir=a/b c_*.d"], "train.output_dir", "a/b c_*.d"),
    "brackets": (["train.output_dir=a (b), [c]=d"], "train.output_dir", "a (b), [c]=d"),
    "a list as text": (["train.output_dir=[2024]"], "train.output_dir", "[2024]"),
    "a number as text": (["train.output_dir=2024"], "train.output_dir", "2024"),
    "a value for a call": (
        ["model.pixel_mean=[116.0]"],
        "model.pixel_mean",
        [116.0],
    ),
    "nothing": (["train.output_dir="], "train.output_dir", ""),
    "a value with =": (["train.output_dir='a=b'"], "train.output_dir", "a=b"),
    "an argument not mentioned": (
        [f"{BOTTOM_UP}.drop_path_rate=0.1"],
        f"{BOTTOM_UP}.drop_path_rate",
        0.1,
    ),
    "the last counts": (["train.seed=1", "train.seed=2"], "train.seed", 2),
    "free keys": (
        [f"{BOTTOM_UP}.model_kwargs.a=1", f"{BOTTOM_UP}.model_kwargs.b.c=2"],
        f"{BOTTOM_UP}.model_kwargs",
        {"a": 1, "b": {"c": 2}},
    ),
    "an item of a list": (
        ["model.roi_heads.box_heads.1.fc_dims=[8, 8]"],
        "model.roi_heads.box_heads.1.fc_dims",
        [8, 8],
    ),
    "any keyword": (["dataloader.test.batch_size=2"], "dataloader.test.batch_size", 2),
    "a list for a tuple": (
        ["dataloader.train.mapper.augmentations.0.short_edge_length=[64]"],
        "dataloader.train.mapper.augmentations.0.short_edge_length",
        [64],
    ),
}


@pytest.mark.parametrize(("words", "key", "value"), VALID.values(), ids=VALID)
def test_override(cfg, words, key, value):
    value = words[0].partition("=")[2] if value is ... else value
    changed = apply_overrides(cfg, words)
    assert changed is cfg
    assert OmegaConf.select(cfg, key) == value


def test_the_rest_stays(cfg):
    before = OmegaConf.to_container(cfg.model.roi_heads.box_heads[0], resolve=False)
    apply_overrides(cfg, ["model.roi_heads.box_heads.1.fc_dims=[8, 8]"])
    assert OmegaConf.to_container(cfg.model.roi_heads.box_heads[0], resolve=False) == before


UNKNOWN = {
    "trian.seed=1": "config key 'trian.seed' is unknown: .*'train'",
    "model_name=a": f"'model_name' is unknown: is '{BOTTOM_UP}.model_name' or",
    "pretrained=False": f"'pretrained' is unknown: is '{BOTTOM_UP}.pretrained' meant",
    "bottom_up.drop_path_rate=0": f"is unknown: is '{BOTTOM_UP}.drop_path_rate' meant",
    "train.max_itr=1": "'train.max_itr' is unknown: .*'train.max_iter'",
    "train.amp.enable=True": "'train.amp.enable' is unknown: .*'train.amp.enabled'",
    f"{BOTTOM_UP}.model_nam=a": f"is unknown: .*'{BOTTOM_UP}.model_name'",
    f"{BOTTOM_UP}.drop_path=0.1": f"is unknown: .*'{BOTTOM_UP}.drop_path_rate'",
    "optimizer.momentun=0": "is unknown: .*'optimizer.momentum'",
    "model.roi_heads.box_heads.3.fc_dims=[]": "is unknown: .*'model.roi_heads.box_heads.2'",
    "lr_multiplier.scheduler.milestone=[]": "is unknown: .*'lr_multiplier.scheduler.milestones'",
    "train.max_iter": "override 'train.max_iter' must be key=value$",
    "train.max_iter.x=1": "must be key=value that the config takes: .*train.max_iter",
    "~train.seed=0": "override '~train.seed=0' must be key=value that",
}


@pytest.mark.parametrize(("word", "message"), UNKNOWN.items())
def test_a_wrong_word_is_refused(cfg, word, message):
    with pytest.raises(ValueError, match=message) as error:
        apply_overrides(cfg, [word])
    assert "\n" not in str(error.value)


def test_a_saved_config_is_checked_alike(cfg, tmp_path):
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    cfg = LazyConfig.load(str(tmp_path / "config.yaml"))
    assert isinstance(cfg.model.backbone.bottom_up._target_, str)
    assert apply_overrides(cfg, [f"{BOTTOM_UP}.drop_path_rate=0.1"])
    with pytest.raises(ValueError, match=f"is unknown: .*'{BOTTOM_UP}.freeze_at'"):
        apply_overrides(cfg, [f"{BOTTOM_UP}.freez_at=1"])


def test_a_dict_that_a_config_does_not_mention():
    cfg = OmegaConf.create({"optimizer": L(torch.optim.SGD)(lr=1)}, flags={"allow_objects": True})
    cfg.backbone = L(TimmBackbone)(model_name="resnet18")
    apply_overrides(cfg, ["backbone.model_kwargs.a=1", "backbone.model_kwargs.b=2"])
    assert cfg.backbone.model_kwargs == {"a": 1, "b": 2}
