"""COCO, and the 1x schedule: 12 epochs with a batch of 16."""

from detbackbones.data.evaluator import CocoEvaluator
from detbackbones.data.loader import build_train_loader
from detbackbones.data.mapper import CheckedDatasetMapper
from detectron2 import model_zoo

from .train import train  # noqa: F401

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train._target_ = build_train_loader
dataloader.train.seed = "${train.seed}"
dataloader.train.mapper._target_ = CheckedDatasetMapper
dataloader.train.mapper.image_format = "RGB"
dataloader.test.mapper._target_ = CheckedDatasetMapper
dataloader.evaluator._target_ = CocoEvaluator

optimizer = model_zoo.get_config("common/optim.py").SGD
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
