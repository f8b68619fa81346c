"""What lies on a user's disk as detectron2 datasets, and the loader of training batches."""

from .coco import register_coco
from .evaluator import CocoEvaluator
from .loader import TrainLoader, build_train_loader
from .mapper import CheckedDatasetMapper
from .panoptic import PanopticEvaluator
from .registry import num_classes
from .semantic import read_label_map, register_semantic, sem_seg_evaluator

__all__ = [
    "CheckedDatasetMapper",
    "CocoEvaluator",
    "PanopticEvaluator",
    "TrainLoader",
    "build_train_loader",
    "num_classes",
    "read_label_map",
    "register_coco",
    "register_semantic",
    "sem_seg_evaluator",
]
