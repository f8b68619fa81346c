"""Trying several ways to have something of a model, which may refuse any of them in any way."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from ..messages import first_line

T = TypeVar("T")


def first_success(attempts: Iterable[Callable[[], T]]) -> T:
    """What the first of some calls gives that does not fail.

    Args:
        attempts: at least one function without arguments, the preferred first.

    Raises:
        ValueError: if all fail, with the first line of the first failure.
    """
    failures = []
    for attempt in attempts:
        try:
            return attempt()
        except Exception as error:  # models refuse with errors of any class
            failures.append(error)
    raise ValueError(first_line(failures[0])) from failures[0]
