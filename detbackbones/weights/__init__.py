"""Weights: where they come from, how they are read, which of them fit, and how they are written."""

from .export import backbone_state_dict, export_backbone
from .files import read_checkpoint, replacing, write_checkpoint
from .fit import OtherModelError, fitting, is_counter, unloaded
from .parts import Part, behind, find_part
from .read import read_tensors

__all__ = [
    "OtherModelError",
    "Part",
    "backbone_state_dict",
    "behind",
    "export_backbone",
    "find_part",
    "fitting",
    "is_counter",
    "read_checkpoint",
    "read_tensors",
    "replacing",
    "unloaded",
    "write_checkpoint",
]
