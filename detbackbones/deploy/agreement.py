"""How far what was exported gives other outputs than the model that it was made of."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

CERTAIN, FEWEST = 0.05, 20  # objects of lower scores are compared if there are fewer
NEAR = 0.01  # in scores, and in boxes as a fraction of the largest coordinate
NEAR_INT8 = 0.1  # of what computes with 8 bits
SAME_MASK, STRAY = 0.9, 2  # IoU of two masks, or pixels that differ
ROUNDING = 1e-3  # of a map, as a fraction of its largest value
Outputs = Mapping[str, np.ndarray]


@dataclass
class Agreement:
    """The largest differences.

    Attributes:
        agrees: whether the differences are those of rounding, in each image. Of two objects of
            nearly equal scores or overlap another may be kept: one in fifty, or one in ten and
            more.
        objects: of the model that were compared: with a score of 0.05 or more, or the best 20.
        lost: of these, that have no counterpart.
        extra: of what was exported, that have none.
        box: the largest difference of a coordinate, in pixels.
        score: the largest difference of a score.
        tensors: the largest difference of a map, as a fraction of its largest value.
        near: how far an object and its counterpart may differ, in scores, and in boxes as a
            fraction of the largest coordinate.
    """

    agrees: bool = True
    objects: int = 0
    lost: int = 0
    extra: int = 0
    box: float = 0.0
    score: float = 0.0
    tensors: float = 0.0
    near: float = NEAR

    def add(self, expected: Outputs, found: Outputs) -> None:
        """Compare the outputs for an image.

        Args:
            expected: of the model: ``boxes`` (n, 4), ``scores`` and ``classes`` (n,), and maybe
                ``masks`` (n, H, W), bits; or maps by their names.
            found: of what was exported.
        """
        if "boxes" not in expected:
            for name, values in expected.items():
                difference = _relative(values, found[name])
                self.tensors = max(self.tensors, difference)
                self.agrees &= difference <= ROUNDING
            return
        count, lost = self._match(expected, found)
        _, extra = self._match(found, expected)
        allowed = max(count // 50, int(count >= 10))
        self.agrees &= max(lost, extra) <= allowed
        self.objects, self.lost, self.extra = (
            self.objects + count,
            self.lost + lost,
            self.extra + extra,
        )

    def _match(self, ones: Outputs, others: Outputs) -> tuple[int, int]:
        """How many objects of the ones are certain, and how many of these the others have not."""
        order = np.argsort(-ones["scores"], kind="stable")
        certain = order[: max((ones["scores"] >= CERTAIN).sum(), FEWEST)]
        near = self.near * max(ones["boxes"].max(initial=1), 1)
        free = np.ones(len(others["scores"]), dtype=bool)
        lost = 0
        for i in certain:
            boxes = np.abs(others["boxes"] - ones["boxes"][i]).max(1, initial=0)
            scores = np.abs(others["scores"] - ones["scores"][i])
            same = free & (others["classes"] == ones["classes"][i])
            same &= (boxes <= near) & (scores <= self.near)
            if not same.any():
                lost += 1
                continue
            best = np.where(same, boxes + scores, np.inf).argmin()
            free[best] = False
            self.box = max(self.box, float(boxes[best]))
            self.score = max(self.score, float(scores[best]))
            if "masks" in ones and not _same_mask(ones["masks"][i], others["masks"][best]):
                lost += 1
        return len(certain), lost

    def __str__(self) -> str:
        if not self.objects and not self.extra:
            return f"the outputs differ by at most {self.tensors:.1g} of the largest value"
        text = f"boxes differ by at most {self.box:.2g} pixels, scores by {self.score:.1g}"
        more = f", and {self.extra} are found besides" if self.extra else ""
        low = f"objects, also of low scores, {self.lost} are missing or another{more}"
        return f"{text}; of {self.objects} {low}"


def outputs_of(prediction: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What detectron2's models give for an image, as arrays by the names that exported files have.

    Args:
        prediction: with ``instances`` or ``sem_seg``.
    """
    if "sem_seg" in prediction:
        return {"sem_seg": prediction["sem_seg"].cpu().numpy()}
    found = prediction["instances"].to("cpu")
    outputs = {
        "boxes": found.pred_boxes.tensor,
        "scores": found.scores,
        "classes": found.pred_classes,
    }
    if found.has("pred_masks"):
        outputs["masks"] = found.pred_masks
    return {name: value.numpy() for name, value in outputs.items()}


def _same_mask(one: np.ndarray, other: np.ndarray) -> bool:
    differ, union = (one != other).sum(), (one | other).sum()
    return differ <= max(STRAY, (1 - SAME_MASK) * union)


def _relative(expected: np.ndarray, found: np.ndarray) -> float:
    if expected.shape != found.shape:
        return float("inf")
    size = max(np.abs(expected).max(initial=0), 1e-12)
    return float(np.nan_to_num(np.abs(expected - found).max(initial=0) / size, nan=np.inf))
