"""COCO's metrics, computed by hotcoco: pycocotools' numbers to the last digit, sooner."""

import warnings
from collections.abc import Sequence
from typing import Any

import hotcoco
from detectron2.evaluation import COCOEvaluator


class CocoEvaluator(COCOEvaluator):
    """detectron2's ``COCOEvaluator`` with hotcoco in place of pycocotools.

    Attributes:
        evaluations: of the last evaluation by task, hotcoco's ``COCOeval``, which also has
            confusion matrices and errors by image; none where nothing was found.
    """

    def __init__(
        self,
        dataset_name: str,
        max_dets_per_image: int | Sequence[int] | None = None,
        **kwargs: Any,
    ):
        """
        Args:
            dataset_name: a dataset that ``register_coco`` or detectron2 registered.
            max_dets_per_image: COCO's three limits for AR, the last also that of AP; a number is
                the last one.
            kwargs: of detectron2's ``COCOEvaluator``.

        Raises:
            ValueError: if the limits are not three whole numbers that grow.
        """
        limits = max_dets_per_image
        if isinstance(limits, int):
            limits = [1, min(10, limits), limits]
        limits = [1, 10, 100] if limits is None else list(limits)
        whole = all(type(limit) is int and limit > 0 for limit in limits)
        if not whole or len(limits) != 3 or sorted(limits) != limits:
            raise ValueError(
                f"max_dets_per_image={max_dets_per_image} must be a whole number from 1, or three "
                "that grow"
            )
        super().__init__(dataset_name, max_dets_per_image=limits[-1], **kwargs)
        self._max_dets_per_image = limits  # detectron2 has 1 and 10, also where the last is less
        self.evaluations: dict[str, hotcoco.COCOeval] = {}
        # hotcoco wants numbers; in this order equal scores come as they do with pycocotools
        self._images = {key: i for i, key in enumerate(sorted(self._coco_api.imgs), 1)}
        self._categories = {key: i for i, key in enumerate(sorted(self._coco_api.cats), 1)}
        self._truth = self._numbered() if self._do_evaluation else None

    def _numbered(self) -> hotcoco.COCO:
        """The ground truth, with images and categories numbered, and without what is not needed."""
        api = self._coco_api
        images = [
            {"id": self._images[key], "width": image["width"], "height": image["height"]}
            for key, image in api.imgs.items()
        ]
        keys = ("id", "bbox", "area", "iscrowd", "segmentation")
        annotations = [
            {key: annotation[key] for key in keys if key in annotation}
            | self._numbers(annotation["image_id"], annotation["category_id"])
            for annotation in api.dataset["annotations"]
            if annotation["image_id"] in self._images
        ]
        categories = [
            {"id": self._categories[key], "name": x["name"]} for key, x in api.cats.items()
        ]
        return hotcoco.COCO(
            {"images": images, "annotations": annotations, "categories": categories}
        )

    def _numbers(self, image: Any, category: Any) -> dict[str, int]:
        return {"image_id": self._images[image], "category_id": self._categories[category]}

    def reset(self) -> None:
        """Forget the predictions."""
        super().reset()
        self.evaluations = {}

    def metric_names(self) -> list[str]:
        """What an evaluation may give, as "bbox/AP50"; of masks only where some are found."""
        names = ["AP", "AP50", "AP75", "APs", "APm", "APl"]
        classes = self._metadata.get("thing_classes") or []
        names += [f"AP-{name}" for name in classes] if len(classes) > 1 else []
        return [f"{task}/{name}" for task in self._tasks or ("bbox", "segm") for name in names]

    def hardest_images(self, count: int) -> list[Any]:
        """The ids of the images in which most is wrong, the worst first.

        They have the least F1 of detections with scores from 0.5 and an IoU from 0.5, of masks
        where there are masks. Images in which all is right are none of them.
        """
        if not self.evaluations:
            return []
        task = sorted(self.evaluations)[-1]
        certain = [result for result in self._found if result["score"] >= 0.5]
        if not certain:
            return []
        evaluation = self._build(task, certain)
        evaluation.evaluate()
        found = evaluation.image_diagnostics()["img_summary"]
        wrong = {key: x for key, x in found.items() if x["fp"] or x["fn"]}
        ids = {number: key for key, number in self._images.items()}
        worst = sorted(wrong, key=lambda key: (wrong[key]["f1"], -wrong[key]["fn"], key))
        return [ids[number] for number in worst[:count]]

    def _eval_predictions(
        self, predictions: list[dict[str, Any]], img_ids: Sequence[int] | None = None
    ) -> None:
        """Fill the results; what hotcoco does not compute here is detectron2's."""
        found = [result for image in predictions for result in image["instances"]]
        tasks = sorted(self._tasks or self._tasks_from_predictions(found))
        names = self._metadata.get("thing_classes")
        bare = "segm" in tasks and any(
            "segmentation" not in x for x in self._coco_api.anns.values()
        )
        left = self._output_dir or "keypoints" in tasks or bare
        if not found or not self._do_evaluation or left:
            super()._eval_predictions(predictions, img_ids)
            return
        contiguous = self._metadata.get("thing_dataset_id_to_contiguous_id", {})
        original = {number: key for key, number in contiguous.items()}
        self._found = []
        for result in found:
            category = original.get(result["category_id"], result["category_id"])
            self._found.append({**result, **self._numbers(result["image_id"], category)})
        for task in tasks:
            self.evaluations[task] = evaluation = self._build(task, self._found)
            if img_ids is not None:
                evaluation.params.img_ids = [self._images[key] for key in img_ids]
            with warnings.catch_warnings():  # of limits that are asked for
                warnings.filterwarnings("ignore", "hotcoco: max_dets")
                evaluation.run()
            self._results[task] = self._derive_coco_results(evaluation, task, names)

    def _build(self, task: str, found: list[dict[str, Any]]) -> hotcoco.COCOeval:
        """Of detections with numbered images and categories."""
        if task == "segm":  # or the size of an object would be that of its box
            found = [{k: v for k, v in result.items() if k != "bbox"} for result in found]
        try:
            detections = self._truth.load_res(found)
        except ValueError as error:
            raise FloatingPointError(f"the detections cannot be evaluated: {error}") from error
        evaluation = hotcoco.COCOeval(self._truth, detections, task)
        evaluation.params.max_dets = self._max_dets_per_image
        return evaluation
