"""TransformersSegmenter: Mask2Former of transformers as a detectron2 meta-architecture."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import BitMasks, Instances, PolygonMasks

from ..messages import one_of, whole_number
from .architectures import SEGMENTERS, build_config, build_model, choose_levels, import_transformers
from .images import OfNormalizedImages

TASKS = ("instance", "semantic", "panoptic")
IGNORE_LABEL = 255


@META_ARCH_REGISTRY.register()
class TransformersSegmenter(OfNormalizedImages):
    """Mask2Former, https://arxiv.org/abs/2112.01527, on any backbone.

    Its state dict has the backbone under ``backbone.`` and the rest of the model under ``model.``.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        num_classes: int,
        task: str = "instance",
        num_things: int | None = None,
        architecture: str = "mask2former",
        num_queries: int | None = None,
        in_features: Sequence[str] | None = None,
        config_kwargs: Mapping[str, Any] | None = None,
        pixel_mean: Sequence[float] | None = None,
        pixel_std: Sequence[float] | None = None,
        test_topk_per_image: int = 100,
        object_score_thresh: float = 0.8,
        overlap_thresh: float = 0.8,
    ):
        """
        Args:
            backbone: any whose ``output_shape()`` is right.
            num_classes: classes, without background.
            task: "instance", "semantic" or "panoptic": what is learned and given.
            num_things: in "panoptic" the first so many classes are things, the rest is stuff.
            architecture: "mask2former".
            num_queries: an image cannot have more masks; None is for 100.
            in_features: the levels to use, by default those of strides 4, 8, 16 and 32. The masks
                have the stride of the first, the encoder takes the last three.
            config_kwargs: attributes of transformers' configuration: ``{"decoder_layers": 4}``.
            pixel_mean, pixel_std: of the images' channels, 0 to 255; None is for those that the
                backbone's weights were trained with.
            test_topk_per_image: instances to keep for an image.
            object_score_thresh: a query of a lower score is no segment of a panoptic map.
            overlap_thresh: a segment that others cover more is none.

        Raises:
            ImportError: if transformers is not installed.
            ValueError: if an argument is out of range, or the backbone's levels do not fit.
        """
        super().__init__(backbone, pixel_mean, pixel_std)
        one_of("architecture", architecture, SEGMENTERS)
        one_of("task", task, TASKS)
        whole_number("num_classes", num_classes)
        whole_number("test_topk_per_image", test_topk_per_image)
        if num_queries is not None:
            whole_number("num_queries", num_queries)
        if (task == "panoptic") != (num_things is not None):
            raise ValueError(f"num_things={num_things} must be given for task='panoptic' alone")
        if num_things is not None and not 0 <= num_things <= num_classes:
            raise ValueError(f"num_things={num_things} must be from 0 to num_classes={num_classes}")
        import_transformers()
        from .point_loss import PointLoss  # which needs transformers

        names = choose_levels(architecture, backbone, in_features)
        shapes = [backbone.output_shape()[name] for name in names]
        config = build_config(architecture, shapes, num_classes, num_queries, config_kwargs)

        self.task, self.num_classes, self.num_things = task, num_classes, num_things
        self.in_features = names
        self.test_topk_per_image = test_topk_per_image
        self.object_score_thresh, self.overlap_thresh = object_score_thresh, overlap_thresh
        self.model = build_model(config, backbone, names)
        self.model.criterion = PointLoss(config, self.model.weight_dict)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """
        Args:
            batched_inputs: for each image a dict with ``image``, an RGB tensor (C, H, W) of 0 to
                255; in training with ``instances``, detectron2's Instances with ``gt_masks`` and
                ``gt_classes``, or for "semantic" with ``sem_seg`` (H, W), or for "panoptic" with
                both, where 0 in ``sem_seg`` is things; else with ``height`` and ``width``.

        Returns:
            in training a dict of weighted losses; else for each image a dict with what the task
            has: ``instances`` with ``pred_masks``, ``pred_boxes``, ``scores`` and ``pred_classes``;
            ``sem_seg`` (classes, height, width); or all that PanopticFPN of detectron2 gives.
        """
        if not self.training:
            return self._inference(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        truth = [self.prepare_targets(x, images.tensor.shape[-2:]) for x in batched_inputs]
        outputs = self.model(pixel_values=images.tensor, output_auxiliary_logits=True)
        return self.model.get_loss_dict(
            outputs.masks_queries_logits,
            outputs.class_queries_logits,
            mask_labels=[masks for _, masks in truth],
            class_labels=[classes for classes, _ in truth],
            auxiliary_predictions=outputs.auxiliary_logits,
        )

    def prepare_targets(
        self, image: dict[str, Any], size: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The classes (n,) and masks (n, height, width) of an image, bits.

        Args:
            image: one of a batch.
            size: (height, width) that it is padded to.
        """
        classes, masks = [], []
        if self.task != "semantic":
            instances = image["instances"].to(self.device)
            classes.append(instances.gt_classes)
            masks.append(_bits(instances))
        if self.task != "instance":
            label_map = image["sem_seg"].to(self.device)
            found = label_map.unique()
            found = found[found != IGNORE_LABEL]
            first = 0
            if self.task == "panoptic":
                found, first = found[found > 0], self.num_things - 1  # stuff is counted from 1
            classes.append(found.long() + first)
            masks.append(label_map == found[:, None, None])
        whole = torch.cat(masks)
        height, width = whole.shape[-2:]
        return torch.cat(classes), F.pad(whole, (0, size[1] - width, 0, size[0] - height))

    def _inference(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        give = {
            "instance": self._instances,
            "semantic": self._semantic,
            "panoptic": self._panoptic,
        }[self.task]
        results: dict[int, dict[str, Any]] = {}
        for indices, images in self.groups_of_one_size(batched_inputs):
            outputs = self.model(pixel_values=images.tensor)
            for i, size, logits, masks in zip(
                indices,
                images.image_sizes,
                outputs.class_queries_logits.float(),
                outputs.masks_queries_logits.float(),
            ):
                height = batched_inputs[i].get("height", size[0])
                width = batched_inputs[i].get("width", size[1])
                frame = (tuple(images.tensor.shape[-2:]), size, height, width)
                results[i] = give(logits.softmax(-1)[:, :-1], masks, frame)
        return [results[i] for i in range(len(batched_inputs))]

    def _instances(
        self, scores: torch.Tensor, masks: torch.Tensor, frame: tuple
    ) -> dict[str, Instances]:
        """The best pairs of query and class; a query may be there for several classes."""
        best, index = scores.flatten().topk(min(self.test_topk_per_image, scores.numel()))
        probabilities = _resized(masks[index // scores.shape[1]], frame).sigmoid()
        found = Instances(tuple(probabilities.shape[-2:]))
        found.pred_masks = probabilities > 0.5
        size = found.pred_masks.flatten(1).sum(1)
        inside = (probabilities * found.pred_masks).flatten(1).sum(1)
        found.scores = best * inside / size.clamp(min=1)
        found.pred_boxes = BitMasks(found.pred_masks).get_bounding_boxes()
        found.pred_classes = index % scores.shape[1]
        order = found.scores.argsort(descending=True)
        return {"instances": found[order[size[order] > 0]]}

    def _semantic(
        self, scores: torch.Tensor, masks: torch.Tensor, frame: tuple
    ) -> dict[str, torch.Tensor]:
        probabilities = _resized(masks, frame).sigmoid()
        return {"sem_seg": torch.einsum("qc,qhw->chw", scores, probabilities)}

    def _panoptic(self, scores: torch.Tensor, masks: torch.Tensor, frame: tuple) -> dict[str, Any]:
        """Each pixel is of the query that is surest of it; section 3.4 of Mask2Former's paper."""
        things = scores[:, : self.num_things].amax(1, keepdim=True)
        stuff = scores[:, self.num_things :]
        result = self._semantic(torch.cat([things, stuff], 1), masks, frame)
        result |= self._instances(scores[:, : self.num_things], masks, frame)
        best, classes = scores.max(1)
        kept = (best > self.object_score_thresh) & (best > 1 - scores.sum(1))
        segments = torch.zeros(frame[2:], dtype=torch.int32, device=masks.device)
        infos: list[dict[str, Any]] = []
        result["panoptic_seg"] = (segments, infos)
        if not kept.any():
            return result
        probabilities = _resized(masks[kept], frame).sigmoid()
        owner = (best[kept, None, None] * probabilities).argmax(0)
        stuff_ids: dict[int, int] = {}
        for i, (class_id, score) in enumerate(zip(classes[kept].tolist(), best[kept].tolist())):
            own, whole = owner == i, probabilities[i] >= 0.5
            segment = own & whole
            if not segment.any() or own.sum() < self.overlap_thresh * whole.sum():
                continue
            is_thing = class_id < self.num_things
            category = class_id if is_thing else class_id - self.num_things + 1
            number = None if is_thing else stuff_ids.get(category)
            if number is None:
                number = len(infos) + 1
                infos.append(
                    {"id": number, "isthing": is_thing, "category_id": category, "score": score}
                )
                if not is_thing:
                    stuff_ids[category] = number
            segments[segment] = number
        return result


def _bits(instances: Instances) -> torch.Tensor:
    """The true masks, bits (n, H, W).

    Raises:
        ValueError: if there are boxes without masks.
    """
    height, width = instances.image_size
    if not instances.has("gt_masks"):
        if len(instances):
            raise ValueError("task='instance' must have masks, and the data have boxes alone")
        return torch.zeros(0, height, width, dtype=torch.bool, device=instances.gt_classes.device)
    masks = instances.gt_masks
    if isinstance(masks, PolygonMasks):
        masks = BitMasks.from_polygon_masks(masks, height, width)
    return masks.tensor.to(instances.gt_classes.device)


def _resized(masks: torch.Tensor, frame: tuple) -> torch.Tensor:
    """Logits of masks (n, h, w) in the size that is asked for, without the padding.

    Args:
        masks: as the model gives them.
        frame: (height, width) of the padded image, and of the image; then those asked for.
    """
    padded, size, height, width = frame
    masks = F.interpolate(masks[None], size=padded, mode="bilinear", align_corners=False)[0]
    return sem_seg_postprocess(masks, size, height, width)
