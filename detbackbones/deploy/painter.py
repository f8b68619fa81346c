"""Painting what is found on an image."""

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from ..data.images import shown_channels
from .extras import import_supervision

if TYPE_CHECKING:
    from supervision import Detections

_MOST = 40  # objects that have labels; of more the classes are counted
_SCALES = (0.4, 1.0)  # of text, in small and in large images


class Painter:
    """Paints what is found on images, a colour for each class.

    Objects have masks, if there are any, boxes, and labels with their scores; or if they are many,
    a line for each class counts them. The classes of label maps have their names.
    """

    def __init__(self) -> None:
        self._supervision = import_supervision()
        self._palette = self._supervision.ColorPalette.from_matplotlib("tab10", 10)

    def __call__(self, image: np.ndarray, found: "Detections") -> np.ndarray:
        """The picture, RGB (H, W, 3) of 8 bits.

        Args:
            image: (H, W, C) of 0 to 255.
            found: the objects.
        """
        supervision, palette, size = self._supervision, self._palette, image.shape[1::-1]
        picture = shown_channels(image)[:, :, ::-1].copy()  # the annotators paint BGR
        scale = float(np.clip(supervision.calculate_optimal_text_scale(size) / 2, *_SCALES))
        names = [str(name) for name in found.data.get("class_name", [])]
        if found.mask is not None:
            picture = supervision.MaskAnnotator(palette, opacity=0.4).annotate(picture, found)
        if found.confidence is None:
            labels, position = names, supervision.Position.CENTER_OF_MASS
        else:
            thickness = max(supervision.calculate_optimal_line_thickness(size) // 2, 1)
            picture = supervision.BoxAnnotator(palette, thickness).annotate(picture, found)
            labels = [f"{name} {score:.0%}" for name, score in zip(names, found.confidence)]
            position = supervision.Position.TOP_LEFT
        if len(found) <= _MOST:
            painter = supervision.LabelAnnotator(
                palette,
                text_scale=scale,
                text_padding=2,
                text_position=position,
                smart_position=True,
            )
            picture = painter.annotate(picture, found, labels)
        else:
            self._count(picture, Counter(zip(found.class_id.tolist(), names)), scale)
        return np.ascontiguousarray(picture[:, :, ::-1])

    def _count(self, picture: np.ndarray, counts: Counter, scale: float) -> None:
        """A line for each class in the upper left corner."""
        height = round(40 * scale)
        for row, ((label, name), count) in enumerate(sorted(counts.items())):
            text = f"{name}: {count}"
            self._supervision.draw_text(
                picture,
                text,
                self._supervision.Point(10 + 9 * scale * len(text), (row + 0.7) * height),
                text_color=self._supervision.Color.WHITE,
                text_scale=scale,
                text_padding=4,
                background_color=self._palette.by_idx(label),
            )
