"""The contract that a backbone keeps, for whoever writes a source of backbones."""

from .contract import Violation, check_source

__all__ = ["Violation", "check_source"]
