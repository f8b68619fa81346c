"""DETR-family detectors and segmenters of transformers, on any backbone."""

from .detector import TransformersDetector
from .segmenter import TransformersSegmenter

__all__ = ["TransformersDetector", "TransformersSegmenter"]
