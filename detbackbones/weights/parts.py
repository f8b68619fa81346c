"""The part of a checkpoint that is a model, wherever a training program has put it.

Trainers nest a model's weights under ``state_dict`` or ``teacher``, wrap it in others, and write
words such as ``module.`` before its names. All of that is a prefix once a file's nested dicts are
written as names with dots: ``{"teacher": {"backbone.conv1.weight": ...}}`` has
``teacher.backbone.conv1.weight``. So a part of a file is what stands behind one prefix.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Part:
    """What stands behind a prefix.

    Attributes:
        prefix: what was taken off the names, with its last dot; empty for a whole file.
        state: the tensors, by the names of the model that they are for.
        fitting: how many have the name and shape of one of the model's.
    """

    prefix: str
    state: Tensors
    fitting: int

    @property
    def where(self) -> str:
        """The clause that names the prefix; empty without one."""
        return f", which stand behind {self.prefix!r}" if self.prefix else ""


def flat(content: object) -> dict[str, torch.Tensor]:
    """The tensors of nested dicts, by their names with dots between."""

    def walk(content: object, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        if isinstance(content, torch.Tensor):
            yield prefix.removesuffix("."), content
        elif isinstance(content, Mapping):
            for key, value in content.items():
                yield from walk(value, f"{prefix}{key}.")

    return dict(walk(content, ""))


def find_part(
    tensors: Tensors, own: Tensors, convert: Callable[[Tensors], Tensors] = lambda state: state
) -> Part:
    """The part of a file's tensors of which most fit a model.

    Args:
        tensors: all of a file, see :func:`flat`.
        own: the model's.
        convert: to the model's names and shapes, from any format that it knows.

    Raises:
        ValueError: if two parts that differ fit, such as those of a teacher and a student. Of a
            model and its moving average the average is taken, as timm does.
    """

    def part(prefix: str) -> Part:
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        state = convert(state)
        fit = [key for key, value in state.items() if key in own and own[key].shape == value.shape]
        return Part(prefix, state, len(fit))

    # The longest prefix first: what a converter takes off itself is of the shorter one, too.
    prefixes = sorted(_prefixes(tensors, own), key=lambda prefix: -prefix.count("."))
    found = sorted(map(part, prefixes), key=lambda part: -part.fitting)
    best = found[0]
    rivals = [other for other in found if other.fitting > best.fitting / 2]
    rivals = [other for other in rivals if other is best or not _same(other, best, own)]
    averaged = [other for other in rivals if re.search(r"(^|[._])ema([._])", other.prefix)]
    if len(averaged) == 1:
        return averaged[0]
    if len(rivals) > 1:
        names = [repr(other.prefix.removesuffix(".")) for other in rivals]
        raise ValueError(
            f"it has weights that fit behind {' and '.join(names)}: write one after the file's "
            f"name and a #, as in FILE#{names[0][1:-1]}"
        )
    return best


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


def _same(one: Part, other: Part, own: Tensors) -> bool:
    """Whether two parts hold the same values for a model."""
    both = own.keys() & one.state.keys() & other.state.keys()
    return all(torch.equal(one.state[key], other.state[key]) for key in both)
