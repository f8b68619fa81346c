"""COCO's stuff as semantic segmentation (all things are one class), and the 1x schedule."""

from detbackbones.data.semantic import sem_seg_evaluator
from detectron2.config import LazyCall as L

from .coco import dataloader, lr_multiplier, optimizer, train  # noqa: F401

dataloader.train.dataset.update(names="coco_2017_train_panoptic_stuffonly", filter_empty=False)
dataloader.train.mapper.use_instance_mask = False
dataloader.test.dataset.names = "coco_2017_val_panoptic_stuffonly"
dataloader.evaluator = L(sem_seg_evaluator)(dataset_name="${..test.dataset.names}")
