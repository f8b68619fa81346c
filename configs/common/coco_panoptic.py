"""COCO with things and stuff, and the 1x schedule."""

from detbackbones.data.evaluator import CocoEvaluator
from detbackbones.data.panoptic import PanopticEvaluator
from detbackbones.data.semantic import sem_seg_evaluator
from detectron2.config import LazyCall as L

from .coco import dataloader, lr_multiplier, optimizer, train  # noqa: F401

dataloader.train.dataset.update(names="coco_2017_train_panoptic_separated", filter_empty=False)
dataloader.test.dataset.names = "coco_2017_val_panoptic_separated"
dataloader.evaluator = [
    L(evaluator)(dataset_name="${...test.dataset.names}")
    for evaluator in (CocoEvaluator, sem_seg_evaluator, PanopticEvaluator)
]
