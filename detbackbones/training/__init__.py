"""Training a detector and evaluating it."""

from .run import evaluate, train

__all__ = ["evaluate", "train"]
