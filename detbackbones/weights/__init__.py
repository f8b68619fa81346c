"""Weights: where they come from, how they are read, which of them fit, and how they are written."""

from .export import backbone_state_dict, export_backbone
from .files import read_checkpoint, replacing, write_checkpoint
from .fit import fitting, unloaded
from .parts import Part, behind, find_part
from .read import read_tensors

__all__ = [
    "Part",
    "backbone_state_dict",
    "behind",
    "export_backbone",
    "find_part",
    "fitting",
    "read_checkpoint",
    "read_tensors",
    "replacing",
    "unloaded",
    "write_checkpoint",
]
