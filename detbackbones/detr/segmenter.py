"""TransformersSegmenter: Mask2Former and EoMT of transformers as a detectron2 meta-architecture."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.modeling import Backbone
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import Boxes, Instances

from ..data.semantic import IGNORE_LABEL
from ..messages import fraction, one_of, whole_number
from .architectures import SEGMENTERS, choose_levels, import_transformers
from .build import build_model, checkpoint_layers
from .eomt_names import from_transformers
from .images import NormalizesImages, check_classes, true_masks, upsampled
from .processes import mean_per_process
from .settings import build_config

TASKS = ("instance", "semantic", "panoptic")


class TransformersSegmenter(NormalizesImages):
    """Mask2Former, https://arxiv.org/abs/2112.01527, on any backbone, or EoMT on a plain ViT.

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
        grad_checkpointing: bool = False,
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
            architecture: "mask2former", or "eomt", see :mod:`detbackbones.detr.eomt`.
            num_queries: an image cannot have more masks; None is for 100, of EoMT 200.
            in_features: of Mask2Former the levels to use, by default those of strides 4, 8, 16 and
                32. The masks have the stride of the first, the encoder takes the last three.
            config_kwargs: attributes of transformers' configuration: ``{"decoder_layers": 4}``.
            grad_checkpointing: compute what is in the decoder's layers, of EoMT in the ViT's
                blocks, again in the backward pass instead of keeping it. The backbone has
                one of its own, which is the same for EoMT.
            pixel_mean, pixel_std: of the images' channels, 0 to 255; None is for those that the
                backbone's weights were trained with.
            test_topk_per_image: instances to keep for an image.
            object_score_thresh: of "panoptic"; a query becomes a segment if its score is higher.
            overlap_thresh: of "panoptic"; a query becomes a segment if at least this part of its
                mask is not covered by others.

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
        if task != "instance" and num_classes > IGNORE_LABEL:
            raise ValueError(
                f"num_classes={num_classes} must be at most {IGNORE_LABEL} for task={task!r}: "
                f"{IGNORE_LABEL} in a label map is no class"
            )
        if num_things is not None:
            whole_number("num_things", num_things)
            if num_things >= num_classes:
                raise ValueError(
                    f"num_things={num_things} must be less than num_classes={num_classes}"
                )
        for key, value in (
            ("object_score_thresh", object_score_thresh),
            ("overlap_thresh", overlap_thresh),
        ):
            fraction(key, value)
        import_transformers()
        from .point_loss import PointLoss  # which needs transformers

        wanted = SEGMENTERS[architecture]
        if wanted.encoder_only and in_features is not None:
            raise ValueError(
                f"in_features={in_features} must be left out with architecture={architecture!r}"
            )
        if wanted.encoder_only:
            from .eomt import build_eomt  # which needs transformers

            self.model = build_eomt(backbone, num_classes, num_queries, config_kwargs)
            self.model.grad_checkpointing = grad_checkpointing or backbone.grad_checkpointing
        else:
            self.in_features = names = choose_levels(architecture, backbone, in_features)
            shapes = [backbone.output_shape()[name] for name in names]
            config = build_config(architecture, shapes, num_classes, num_queries, config_kwargs)
            self.size_divisibility = shapes[-1].stride
            self.model = build_model(config, backbone, names)
            if grad_checkpointing:
                checkpoint_layers(self.model)
        self.model.criterion = PointLoss(self.model.config, self.model.weight_dict)
        self.architecture = architecture
        self.task, self.num_classes, self.num_things = task, num_classes, num_things
        self.test_topk_per_image = test_topk_per_image
        self.object_score_thresh, self.overlap_thresh = object_score_thresh, overlap_thresh

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

    def convert_weights(self, state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """A state dict of another program by the names of this segmenter.

        That of transformers' EoMT is known, see
        :func:`detbackbones.detr.eomt_names.from_transformers`.
        """
        return from_transformers(state) if self.architecture == "eomt" else state

    def loss_divisor(self, batched_inputs: list[dict[str, Any]]) -> float:
        """What the losses of a batch's masks are divided by: their number, see PointLoss."""
        truth = [self.prepare_targets(x, x["image"].shape[-2:]) for x in batched_inputs]
        return mean_per_process(sum(len(classes) for classes, _ in truth))

    def prepare_targets(
        self, image: dict[str, Any], size: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The classes (n,) and masks (n, height, width) of an image, bits.

        Args:
            image: one of a batch.
            size: (height, width) that it is padded to.

        Raises:
            ImageError: if a class is none of ``num_classes``, or things have no masks.
        """
        classes, masks = [], []
        if self.task != "semantic":
            instances = image["instances"].to(self.device)
            classes.append(instances.gt_classes)
            masks.append(true_masks(instances, size))
        if self.task != "instance":
            label_map = image["sem_seg"].to(self.device)
            found = label_map.unique()
            found = found[found != IGNORE_LABEL]
            first = 0
            if self.task == "panoptic":
                found, first = found[found > 0], self.num_things - 1  # stuff is counted from 1
            classes.append(found.long() + first)
            (height, width), (padded_height, padded_width) = label_map.shape, size
            margin = (0, padded_width - width, 0, padded_height - height)
            masks.append(F.pad(label_map == found[:, None, None], margin))
        labels = torch.cat(classes)
        check_classes(labels, self.num_classes)
        return labels, torch.cat(masks)

    def _inference(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
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
                masks = upsampled(masks, images.tensor)
                masks = sem_seg_postprocess(masks, size, height, width).sigmoid()
                with torch.autocast(self.device.type, enabled=False):
                    results[i] = self.task_results(logits.softmax(-1)[:, :-1], masks)
        return [results[i] for i in range(len(batched_inputs))]

    def task_results(self, scores: torch.Tensor, masks: torch.Tensor) -> dict[str, Any]:
        """What the task gives for an image, see :meth:`forward`.

        Args:
            scores: (queries, classes).
            masks: probabilities (queries, height, width).
        """
        give = {
            "instance": self._instances,
            "semantic": self._semantic,
            "panoptic": self._panoptic,
        }[self.task]
        return give(scores, masks)

    def best_masks(
        self, scores: torch.Tensor, masks: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The best pairs of query and class; a query may be there for several classes.

        Args:
            scores: (queries, classes).
            masks: probabilities (queries, height, width).

        Returns:
            boxes (n, 4), scores (n,), classes (n,) and masks, bits (n, height, width).
        """
        best, index = scores.flatten().topk(min(self.test_topk_per_image, scores.numel()))
        probabilities = masks[index // scores.shape[1]]
        bits = probabilities > 0.5
        size = bits.flatten(1).sum(1)
        sure = (probabilities * bits).flatten(1).sum(1) / size.clamp(min=1)
        order = (best * sure).argsort(descending=True)
        order = order[size[order] > 0]
        bits = bits[order]
        classes = (index % scores.shape[1])[order]
        return _boxes_around(bits), (best * sure)[order], classes, bits

    def _instances(self, scores: torch.Tensor, masks: torch.Tensor) -> dict[str, Instances]:
        found = Instances(tuple(masks.shape[-2:]))
        boxes, found.scores, found.pred_classes, found.pred_masks = self.best_masks(scores, masks)
        found.pred_boxes = Boxes(boxes)
        return {"instances": found}

    def _semantic(self, scores: torch.Tensor, masks: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sem_seg": torch.einsum("qc,qhw->chw", scores, masks)}

    def _panoptic(self, scores: torch.Tensor, masks: torch.Tensor) -> dict[str, Any]:
        """Each pixel is of the query that is surest of it; section 3.4 of Mask2Former's paper."""
        things, stuff = scores[:, : self.num_things], scores[:, self.num_things :]
        result = self._semantic(torch.cat([things.amax(1, keepdim=True), stuff], 1), masks)
        result |= self._instances(things, masks)
        best, classes = scores.max(1)
        kept = (best > self.object_score_thresh) & (best > 1 - scores.sum(1))
        segments = torch.zeros(masks.shape[-2:], dtype=torch.int32, device=masks.device)
        infos: list[dict[str, Any]] = []
        result["panoptic_seg"] = (segments, infos)
        if not kept.any():
            return result
        best, classes, masks = best[kept], classes[kept], masks[kept]
        owner = (best[:, None, None] * masks).argmax(0)
        stuff_ids: dict[int, int] = {}
        for i, (class_id, score) in enumerate(zip(classes.tolist(), best.tolist())):
            own, whole = owner == i, masks[i] >= 0.5
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


def _boxes_around(masks: torch.Tensor) -> torch.Tensor:
    """Boxes (n, 4) around masks (n, height, width) that are not empty.

    detectron2's and torchvision's functions go through the masks one by one, which is slower, and
    a traced graph would hold as many as there were.
    """
    corners = []
    for axis, length in ((1, masks.shape[2]), (2, masks.shape[1])):
        found = masks.any(axis).int()
        corners.append((found.argmax(1), length - found.flip(1).argmax(1)))
    (x0, x1), (y0, y1) = corners
    return torch.stack([x0, y0, x1, y1], 1).float()
