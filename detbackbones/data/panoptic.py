"""Panoptic quality, https://arxiv.org/abs/1801.00868."""

import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from PIL import Image

VOID = 0  # the number of pixels that are of no segment


class PanopticEvaluator(DatasetEvaluator):
    """Evaluates ``panoptic_seg`` of a model on a dataset that detectron2 has registered.

    It gives what detectron2's ``COCOPanopticEvaluator`` does for models that tell of their
    segments, and needs no package besides: PQ, SQ and RQ of all classes, of things (``PQ_th``) and
    of stuff (``PQ_st``), in percent.
    """

    def __init__(self, dataset_name: str):
        """
        Args:
            dataset_name: of a dataset with ``panoptic_json`` and ``panoptic_root`` in its metadata.

        Raises:
            ValueError: if the dataset has no panoptic maps.
            FileNotFoundError: if the JSON file does not exist.
        """
        metadata = MetadataCatalog.get(dataset_name)
        if not metadata.get("panoptic_json"):
            raise ValueError(f"dataset_name={dataset_name!r} must be a dataset with panoptic maps")
        self._root = Path(metadata.panoptic_root)
        self._classes = {
            True: {v: k for k, v in metadata.thing_dataset_id_to_contiguous_id.items()},
            False: {v: k for k, v in metadata.stuff_dataset_id_to_contiguous_id.items()},
        }
        file = Path(metadata.panoptic_json)
        if not file.is_file():
            raise FileNotFoundError(
                f"dataset {dataset_name!r} must have its segments in {str(file)!r}, which does not "
                "exist"
            )
        annotations = json.loads(file.read_text())["annotations"]
        self._truth = {annotation["image_id"]: annotation for annotation in annotations}

    def reset(self) -> None:
        """Forget what was processed."""
        self._counts: dict[int, np.ndarray] = {}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """
        Args:
            inputs: of the model, with ``image_id``.
            outputs: of the model, with ``panoptic_seg``: a map of numbers (H, W), and for each
                number ``id`` its ``category_id`` and ``isthing``.
        """
        for image, output in zip(inputs, outputs):
            if image["image_id"] not in self._truth:
                raise ValueError(
                    f"image_id={image['image_id']!r} must be in the panoptic JSON file"
                )
            truth = self._truth[image["image_id"]]
            colours = np.asarray(Image.open(self._root / truth["file_name"]).convert("RGB"))
            ids = colours.astype(np.int64) @ (1, 256, 256**2)
            found, infos = output["panoptic_seg"]
            infos = [
                {"id": x["id"], "category_id": self._classes[x["isthing"]][x["category_id"]]}
                for x in infos
            ]
            _add(
                self._counts,
                count_segments(ids, truth["segments_info"], found.cpu().numpy(), infos),
            )

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """The metrics; None in a process that is not the main one."""
        counts: dict[int, np.ndarray] = {}
        for part in comm.gather(self._counts):
            _add(counts, part)
        if not comm.is_main_process():
            return None
        things = [counts[i] for i in self._classes[True].values() if i in counts]
        stuff = [counts[i] for i in self._classes[False].values() if i in counts]
        metrics = {}
        for end, classes in (("", things + stuff), ("_th", things), ("_st", stuff)):
            values = zip(("PQ", "SQ", "RQ"), panoptic_quality(classes))
            metrics |= {f"{name}{end}": 100 * value for name, value in values}
        return OrderedDict(panoptic_seg=metrics)


def count_segments(
    truth: np.ndarray,
    truth_infos: Iterable[Mapping[str, Any]],
    found: np.ndarray,
    found_infos: Iterable[Mapping[str, Any]],
) -> dict[int, np.ndarray]:
    """Match the segments of an image: those of one class that share more than half of their union.

    Args:
        truth: the number of each pixel's segment (H, W).
        truth_infos: of each segment ``id``, ``category_id`` and maybe ``iscrowd``.
        found: the same of the prediction.
        found_infos: the same of the prediction.

    Returns:
        for each class: the sum of the IoUs of those matched; how many are matched, how many of the
        prediction are not, and how many of the truth are not.
    """
    classes = {x["id"]: x["category_id"] for x in truth_infos if not x.get("iscrowd")}
    crowds = {x["category_id"]: x["id"] for x in truth_infos if x.get("iscrowd")}
    found_classes = {x["id"]: x["category_id"] for x in found_infos}
    both = truth.astype(np.int64) << 32 | found.astype(np.int64)
    pairs = (x.tolist() for x in np.unique(both, return_counts=True))
    shared = {(pair >> 32, pair & (1 << 32) - 1): count for pair, count in zip(*pairs)}
    area = dict(zip(*(x.tolist() for x in np.unique(truth, return_counts=True))))
    found_area = dict(zip(*(x.tolist() for x in np.unique(found, return_counts=True))))
    found_classes = {i: c for i, c in found_classes.items() if i in found_area}

    result: dict[int, np.ndarray] = {}

    def add(category: int, *values: float) -> None:
        _add(result, {category: np.array(values, dtype=float)})

    matched, matched_found = set(), set()
    for (i, j), both in shared.items():
        if i in classes and classes[i] == found_classes.get(j):
            union = area[i] + found_area[j] - both - shared.get((VOID, j), 0)
            if both / union > 0.5:  # of no two segments can this be true of the same one
                add(classes[i], both / union, 1, 0, 0)
                matched.add(i)
                matched_found.add(j)
    for i in classes.keys() - matched:
        add(classes[i], 0, 0, 0, 1)
    for j in found_classes.keys() - matched_found:
        crowd = crowds.get(found_classes[j])
        ignored = shared.get((VOID, j), 0) + (shared.get((crowd, j), 0) if crowd else 0)
        if ignored / found_area[j] <= 0.5:
            add(found_classes[j], 0, 0, 1, 0)
    return result


def panoptic_quality(classes: Iterable[np.ndarray]) -> tuple[float, float, float]:
    """PQ, SQ and RQ: means over the classes that are there, from 0 to 1; nan without any.

    Args:
        classes: what :func:`count_segments` counts, summed over all images.
    """
    rows = []
    for iou, both, found, true in classes:
        half = both + found / 2 + true / 2
        rows.append((iou / half, iou / both if both else 0.0, both / half))
    return tuple(np.mean(rows, axis=0).tolist()) if rows else (float("nan"),) * 3


def _add(counts: dict[int, np.ndarray], more: Mapping[int, np.ndarray]) -> None:
    for category, values in more.items():
        counts[category] = counts.get(category, 0) + values
