"""DETR-family detectors of transformers, on any backbone."""

from .detector import TransformersDetector

__all__ = ["TransformersDetector"]
