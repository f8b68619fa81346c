"""Heads for semantic segmentation that detectron2 lacks; importing it registers them."""

from .dpt import DPTHead
from .linear import LinearHead

__all__ = ["DPTHead", "LinearHead"]
