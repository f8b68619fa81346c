"""Panoptic quality, https://arxiv.org/abs/1801.00868."""

import io
import json
from collections import OrderedDict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from hotcoco.panoptic import PanopticEval
from PIL import Image

VOID = 0  # the number of pixels that are of no segment


class PanopticEvaluator(DatasetEvaluator):
    """Evaluates ``panoptic_seg`` of a model on a dataset that detectron2 has registered.

    It gives what detectron2's ``COCOPanopticEvaluator`` does for models that tell of their
    segments, by hotcoco in place of panopticapi: PQ, SQ and RQ of all classes, of things
    (``PQ_th``) and of stuff (``PQ_st``), in percent; nan where there are none.
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
        self._truth = {x["image_id"]: x for x in json.loads(file.read_text())["annotations"]}

    def reset(self) -> None:
        """Forget what was processed."""
        self._found: list[tuple[dict[str, Any], bytes]] = []

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
            found, infos = output["panoptic_seg"]
            found = found.cpu().numpy()
            found = np.where(np.isin(found, [x["id"] for x in infos]), found, VOID)
            there = set(np.unique(found).tolist())
            segments = [
                {"id": x["id"], "category_id": self._classes[x["isthing"]][x["category_id"]]}
                for x in infos
                if x["id"] in there
            ]
            colours = np.stack([found >> shift & 255 for shift in (0, 8, 16)], 2).astype(np.uint8)
            png = io.BytesIO()
            Image.fromarray(colours).save(png, "png")
            entry = {"image_id": image["image_id"], "segments_info": segments}
            self._found.append((entry, png.getvalue()))

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """The metrics; None in a process that is not the main one."""
        found = {x["image_id"]: (x, png) for part in comm.gather(self._found) for x, png in part}
        if not comm.is_main_process():
            return None
        # detectron2 may count things among the stuff as well
        is_thing = {number: False for number in self._classes[False].values()}
        is_thing |= {number: True for number in self._classes[True].values()}
        classes = [
            {"id": number, "name": str(number), "isthing": int(thing)}
            for number, thing in is_thing.items()
        ]
        truth = []
        with TemporaryDirectory() as folder:
            for number, (image_id, (entry, png)) in enumerate(found.items()):
                truth.append({**self._truth[image_id], "image_id": number})  # it may be text
                entry |= {"image_id": number, "file_name": f"{number}.png"}
                Path(folder, entry["file_name"]).write_bytes(png)
            evaluation = PanopticEval(
                {"annotations": truth, "categories": classes},
                {"annotations": [entry for entry, _ in found.values()], "categories": classes},
                gt_folder=self._root,
                pred_folder=folder,
            )
            evaluation.evaluate()
        results = evaluation.results()
        metrics = {}
        for end, group in (("", "All"), ("_th", "Things"), ("_st", "Stuff")):
            for name in ("PQ", "SQ", "RQ"):
                value = results[group][name.lower()] if results[group]["n"] else float("nan")
                metrics[name + end] = 100 * value
        return OrderedDict(panoptic_seg=metrics)
