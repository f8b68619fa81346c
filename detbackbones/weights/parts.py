"""The part of a checkpoint that is a model, wherever a training program has put it.

Trainers nest a model's weights under ``state_dict`` or ``teacher``, wrap it in others, and write
words such as ``module.`` before its names. All of that is a prefix once a file's nested dicts are
written as names with dots: ``{"teacher": {"backbone.conv1.weight": ...}}`` has
``teacher.backbone.conv1.weight``. So a part of a file is what stands behind one prefix.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from .fit import is_counter

Tensors = Mapping[str, torch.Tensor]

_AVERAGE = re.compile(r"(^|[._])ema\d*[._]")


@dataclass(frozen=True)
class Part:
    """What stands behind a prefix.

    Attributes:
        prefix: what was taken off the names, with its last dot; empty for a whole file.
        state: the tensors, by the names of the model that they are for.
        fitting: how many have the name and shape of one of the model's, counters left out.
    """

    prefix: str
    state: Tensors
    fitting: int

    @property
    def where(self) -> str:
        """The clause that names the prefix; empty without one."""
        return f", which stand behind {self.prefix!r}" if self.prefix and self.fitting else ""

    @property
    def unused(self) -> int:
        """How many tensors do not fit."""
        return sum(not is_counter(key) for key in self.state) - self.fitting


def flat(content: object) -> dict[str, torch.Tensor]:
    """The tensors of nested dicts, by their names with dots between."""

    def walk(content: object, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        if isinstance(content, torch.Tensor):
            yield prefix.removesuffix("."), content
        elif isinstance(content, Mapping):
            for key, value in content.items():
                yield from walk(value, f"{prefix}{key}.")

    return dict(walk(content, ""))


def behind(tensors: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors behind a prefix, by their names without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def find_part(
    tensors: Tensors,
    own: Tensors,
    convert: Callable[[Tensors], Tensors] = lambda state: state,
    within: str | None = None,
) -> Part:
    """The part of a file's tensors of which most fit a model.

    What fits less than a tenth of the model, such as one norm among many of the same shape, is not
    taken for a part unless at least a quarter of the file stands there.

    Args:
        tensors: all of a file, see :func:`flat`.
        own: the model's.
        convert: to the model's names and shapes, from any format that it knows.
        within: the prefix, without its last dot, that the user has chosen, or what stands before
            it; None for any.

    Raises:
        ValueError: if two parts that differ fit, such as those of a teacher and a student; see
            :func:`choose`.
    """
    wanted = [key for key in own if not is_counter(key)]
    chosen = f"{within}." if within else ""

    def part(prefix: str) -> Part:
        state = convert(behind(tensors, prefix))
        fit = [key for key in wanted if key in state and own[key].shape == state[key].shape]
        return Part(prefix, state, len(fit))

    prefixes = {prefix for prefix in _prefixes(tensors, own) if prefix.startswith(chosen)}
    # The longest prefix first: what a converter takes off itself is of the shorter one, too.
    order = sorted({chosen, *prefixes}, key=lambda prefix: -prefix.count("."))
    found = sorted(map(part, order), key=lambda part: -part.fitting)
    best = found[0]
    share = sum(key.startswith(best.prefix) for key in tensors) / max(len(tensors), 1)
    if best.fitting < len(wanted) / 10 and share < 1 / 4:
        return next(other for other in found if other.prefix == chosen)
    if best.fitting <= len(wanted) / 2:
        return best
    rivals = [other for other in found if other.fitting > best.fitting / 2]
    rivals = [other for other in rivals if other is best or not _same(other, best, wanted)]
    by_prefix = {other.prefix: other for other in rivals}
    if within is not None and chosen in by_prefix:
        return by_prefix[chosen]
    whole = [other.prefix for other in rivals if other.fitting == best.fitting]
    return by_prefix[choose([*by_prefix], whole)]


def choose(prefixes: Sequence[str], whole: Sequence[str]) -> str:
    """The one of several prefixes whose tensors are to be taken.

    Of a model and its moving average the average is taken, as timm does, if it is as whole.

    Args:
        prefixes: at least one.
        whole: those of them behind which there are the most tensors.

    Raises:
        ValueError: if it is not clear which one.
    """
    if len(prefixes) == 1:
        return prefixes[0]
    averages = [prefix for prefix in prefixes if _AVERAGE.search(prefix)]
    if len(averages) == 1 and len(prefixes) == 2 and averages[0] in whole:
        return averages[0]
    names = [repr(prefix.removesuffix(".")) for prefix in prefixes]
    raise ValueError(
        f"it has weights that fit behind {' and '.join(names)}: write one after the file's name "
        f"and a #, as in #{names[0][1:-1]}"
    )


def _prefixes(tensors: Tensors, own: Tensors) -> set[str]:
    """The prefixes that a model may stand behind.

    They are those that leave names of the model, and for other formats those that stand before at
    least half as many tensors as the model has.
    """
    before: Counter[str] = Counter()
    naming: Counter[str] = Counter()
    for key in tensors:
        dots = [i + 1 for i, letter in enumerate(key) if letter == "."]
        before.update(key[:dot] for dot in dots)
        naming.update(key[:dot] for dot in dots if key[dot:] in own)
    large = {prefix for prefix, count in before.items() if count >= len(own) / 2}
    return {"", *large, *(prefix for prefix, _ in naming.most_common(4))}


def _same(one: Part, other: Part, wanted: Sequence[str]) -> bool:
    """Whether two parts hold the same values for a model."""
    both = [key for key in wanted if key in one.state and key in other.state]
    return bool(both) and all(torch.equal(one.state[key], other.state[key]) for key in both)
