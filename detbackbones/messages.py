"""The sentence that answers wrong input: the parameter, the value, what would be valid."""

from collections.abc import Collection, Iterable
from difflib import get_close_matches


def nearest(value: object, valid: Iterable[str], most: int = 8) -> str:
    """A clause that names the valid values: all if they are few, else the nearest to ``value``."""
    valid = list(valid)
    if len(valid) <= most:
        return f"valid are {', '.join(map(repr, valid))}" if valid else "there is none"
    names = {name.lower(): name for name in valid}
    word = str(value).lower()
    close = [names[n] for n in get_close_matches(word, names, n=3, cutoff=0.5)]
    if not close and len(word) > 2:
        close = [name for lower, name in names.items() if word in lower][:3]
    return f"the nearest are {', '.join(map(repr, close))}" if close else "no name is near it"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def whole_number(parameter: str, value: object) -> None:
    """Refuse what is no whole number from 1.

    Raises:
        ValueError: with one sentence that names parameter and value.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{parameter}={value!r} must be a whole number from 1")


def fraction(parameter: str, value: object) -> None:
    """Refuse what is no number from 0 to 1.

    Raises:
        ValueError: with one sentence that names parameter and value.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{parameter}={value!r} must be a number from 0 to 1")


def one_of(parameter: str, value: object, valid: Iterable[str], hint: str = "") -> None:
    """Refuse a value that is not among the valid ones.

    Raises:
        ValueError: with one sentence that names parameter, value and the nearest valid values.
    """
    valid = list(valid)
    if value not in valid:
        raise ValueError(f"{parameter}={value!r} is unknown: {nearest(value, valid)}{hint}")


def few(items: Collection) -> str:
    """The first ten of some values, for a message."""
    shown = [repr(item) for item in items][:10]
    return ", ".join(shown) + (", ..." if len(items) > len(shown) else "")
