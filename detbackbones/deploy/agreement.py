"""How far what was exported gives other outputs than the model that it was made of."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

CERTAIN, FEWEST = 0.05, 20  # objects of lower scores are compared if there are fewer
NEAR = 0.01  # in scores, and in boxes as a fraction of the image's longer side


@dataclass
class Agreement:
    """The largest differences.

    Attributes:
        objects: that were compared: with a score of 0.05 or more, or the best 20.
        lost: of these, that have no counterpart.
        box: the largest difference of a coordinate, in pixels.
        score: the largest difference of a score.
        tensors: the largest difference of a map, as a fraction of its largest value.
    """

    objects: int = 0
    lost: int = 0
    box: float = 0.0
    score: float = 0.0
    tensors: float = 0.0

    @property
    def agrees(self) -> bool:
        """Whether the differences are those of rounding.

        Of two objects of nearly equal scores or overlap another may be kept: one in fifty, or one.
        """
        return self.lost <= max(1, self.objects / 50) and self.tensors <= 1e-3

    def add(self, expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> None:
        """Compare the outputs for one image or batch.

        Args:
            expected: of the model, by their names.
            found: of what was exported.
        """
        if "boxes" not in expected:
            for name, values in expected.items():
                self.tensors = max(self.tensors, _relative(values, found[name]))
            return
        if expected["boxes"].ndim == 2:
            expected, found = ({k: v[None] for k, v in x.items()} for x in (expected, found))
        for i in range(len(expected["boxes"])):
            self._add_objects(*({k: v[i] for k, v in x.items()} for x in (expected, found)))

    def _add_objects(
        self, expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]
    ) -> None:
        order = np.argsort(-expected["scores"], kind="stable")
        certain = order[: max((expected["scores"] >= CERTAIN).sum(), FEWEST)]
        self.objects += len(certain)
        near = NEAR * max(expected["boxes"].max(initial=1), 1)
        free = np.ones(len(found["scores"]), dtype=bool)
        for i in certain:
            boxes = np.abs(found["boxes"] - expected["boxes"][i]).max(1, initial=0)
            scores = np.abs(found["scores"] - expected["scores"][i])
            same = free & (found["classes"] == expected["classes"][i])
            same &= (boxes <= near) & (scores <= NEAR)
            if not same.any():
                self.lost += 1
                continue
            best = np.where(same, boxes + scores, np.inf).argmin()
            free[best] = False
            self.box = max(self.box, float(boxes[best]))
            self.score = max(self.score, float(scores[best]))
            if "masks" in expected:
                masks = expected["masks"][i].astype(np.float32) - found["masks"][best]
                if np.abs(masks).mean() > NEAR:
                    self.lost += 1

    def __str__(self) -> str:
        if not self.objects:
            return f"the outputs differ by at most {self.tensors:.1g} of the largest value"
        text = f"boxes differ by at most {self.box:.2g} pixels, scores by {self.score:.1g}"
        return f"{text}; {self.lost} of {self.objects} objects are missing or another"


def _relative(expected: np.ndarray, found: np.ndarray) -> float:
    if expected.shape != found.shape:
        return float("inf")
    size = max(np.abs(expected).max(initial=0), 1e-12)
    return float(np.nan_to_num(np.abs(expected - found).max(initial=0) / size, nan=np.inf))
