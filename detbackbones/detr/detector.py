"""TransformersDetector: a DETR-family model of transformers as a detectron2 meta-architecture."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.postprocessing import detector_postprocess, sem_seg_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from torchvision.ops import box_convert

from ..messages import one_of, whole_number
from .architectures import ARCHITECTURES, choose_levels
from .build import build_model, checkpoint_layers
from .dino_names import from_other_programs
from .images import NormalizesImages, check_classes, images_and_mask, true_masks, upsampled
from .pretrained import load_pretrained, read_config, save_pretrained
from .processes import mean_per_process
from .settings import build_config

logger = logging.getLogger(__name__)


@META_ARCH_REGISTRY.register()
class TransformersDetector(NormalizesImages):
    """DINO, or a detector of transformers from DETR to DEIMv2, on any backbone.

    Its state dict has the backbone under ``backbone.`` and the rest of the model under ``detr.``.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        num_classes: int,
        architecture: str | None = None,
        num_queries: int | None = None,
        in_features: Sequence[str] | None = None,
        config_kwargs: Mapping[str, Any] | None = None,
        pretrained_detector: str | Mapping[str, Any] = "",
        masks: bool = False,
        grad_checkpointing: bool = False,
        pixel_mean: Sequence[float] | None = None,
        pixel_std: Sequence[float] | None = None,
        test_topk_per_image: int = 100,
    ):
        """
        Args:
            backbone: any whose ``output_shape()`` is right.
            num_classes: classes, without background.
            architecture: "dino", "rt_detr", "rt_detr_v2", "d_fine", "deimv2", "lw_detr", "rf_detr",
                "deformable_detr", "detr", "conditional_detr" or "dab-detr"; None is for that of
                ``pretrained_detector``.
            num_queries: object queries; None is for what the architecture has: 300, or 100 in
                "detr", 900 in "dino".
            in_features: the levels to use, by default those of strides 8, 16 and 32 ("detr",
                "conditional_detr" and "dab-detr": of stride 32; "lw_detr" and "rf_detr": of 16,
                or several of one stride).
            config_kwargs: attributes of the configuration that transformers has for the
                architecture: ``{"decoder_layers": 3}``.
            pretrained_detector: a name on the Hugging Face hub or a folder: start from this
                detector's configuration, and from those of its weights that fit; or that
                configuration alone.
            masks: learn and give masks, too; of "rf_detr" alone.
            grad_checkpointing: compute what is in the encoder's and decoder's layers again in the
                backward pass instead of keeping it; not of RT-DETR and its kin. The backbone has
                one of its own.
            pixel_mean, pixel_std: of the images' channels, 0 to 255; None is for those that the
                backbone's weights were trained with.
            test_topk_per_image: detections to keep for an image.

        Raises:
            ImportError: if transformers is not installed.
            ValueError: if an argument is out of range, or the backbone's levels do not fit.
            ConnectionError: if ``pretrained_detector`` cannot be downloaded.
        """
        super().__init__(backbone, pixel_mean, pixel_std)
        whole_number("num_classes", num_classes)
        whole_number("test_topk_per_image", test_topk_per_image)
        if num_queries is not None:
            whole_number("num_queries", num_queries)
        base = read_config(pretrained_detector) if pretrained_detector else None
        architecture = architecture or (base.model_type if base else None)
        one_of("architecture", architecture, ARCHITECTURES)
        if base and base.model_type != architecture:
            raise ValueError(
                f"architecture={architecture!r} is not that of pretrained_detector="
                f"{pretrained_detector!r}, which is {base.model_type!r}"
            )
        if masks and not ARCHITECTURES[architecture].masks:
            able = ", ".join(repr(name) for name, has in ARCHITECTURES.items() if has.masks)
            raise ValueError(f"masks=True is of {able} alone, not of {architecture!r}")
        names = choose_levels(architecture, backbone, in_features)
        shapes = [backbone.output_shape()[name] for name in names]
        config = build_config(architecture, shapes, num_classes, num_queries, config_kwargs, base)

        self.architecture = architecture
        self.num_classes = num_classes
        self.size_divisibility = shapes[-1].stride
        self.in_features = names
        self.test_topk_per_image = test_topk_per_image
        self.masks = masks
        self.detr = build_model(config, backbone, names, masks=masks)
        if grad_checkpointing:
            checkpoint_layers(self.detr)
        if isinstance(pretrained_detector, str) and pretrained_detector:
            logger.info(load_pretrained(self.detr, backbone, pretrained_detector))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Arguments from the yacs keys under MODEL.DETR, see ``add_backbone_config``."""
        return {
            "backbone": build_backbone(cfg),
            "architecture": cfg.MODEL.DETR.ARCHITECTURE or None,
            "num_classes": cfg.MODEL.DETR.NUM_CLASSES,
            "num_queries": cfg.MODEL.DETR.NUM_QUERIES or None,
            "pretrained_detector": cfg.MODEL.DETR.PRETRAINED_DETECTOR,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "test_topk_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """
        Args:
            batched_inputs: for each image a dict with ``image``, an RGB tensor (C, H, W) of 0 to
                255; in training with ``instances``, detectron2's Instances with ``gt_boxes``,
                ``gt_classes`` and, if masks are learned, ``gt_masks``; else with ``height`` and
                ``width``, which the boxes are scaled to.

        Returns:
            in training a dict of weighted losses, whose sum is the loss that transformers has;
            else for each image a dict with ``instances``: ``pred_boxes``, ``scores`` and
            ``pred_classes``, the best first, and with masks ``pred_masks``, bits of the original
            image's size.
        """
        if not self.training:
            return self._inference(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        instances = [x["instances"].to(self.device) for x in batched_inputs]
        outputs = self.detr(
            **images_and_mask(images), labels=self.prepare_targets(images, instances)
        )
        losses = self._weighted(outputs.loss_dict, sum(map(len, instances)))
        if self.masks and not any(map(len, instances)):  # transformers gives empty tensors
            nothing = 0 * outputs.pred_masks.sum()
            losses |= {key: nothing for key in losses if "mask" in key}
        embed = getattr(getattr(self.detr, "model", None), "denoising_class_embed", None)
        if embed is not None and not any(map(len, instances)):
            # Without a box there are no denoising queries. A process has the losses and gradients
            # of the others all the same: zeros.
            kinds = {key.partition("_aux_")[0] for key in losses if "_aux_" in key}
            layers, nothing = self.detr.config.decoder_layers, 0 * embed.weight.sum()
            losses |= {f"{kind}_dn_{i}": nothing for kind in kinds for i in range(layers)}
        return losses

    def loss_divisor(self, batched_inputs: list[dict[str, Any]]) -> float:
        """What the losses of a batch are divided by: its boxes, in the mean over the processes."""
        return mean_per_process(sum(len(x["instances"]) for x in batched_inputs))

    @property
    def frame_is_padded(self) -> bool:
        """Whether boxes are fractions of the padded image, and not of the image itself."""
        return ARCHITECTURES[self.architecture].padded_boxes

    def _frames(self, images: ImageList) -> list[tuple[int, int]]:
        """The (height, width) that the boxes of each image are fractions of."""
        if self.frame_is_padded:
            return [tuple(images.tensor.shape[-2:])] * len(images)
        return images.image_sizes

    def convert_weights(self, state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """A state dict of another program by the names of this detector.

        Those of DINO are known, see :func:`detbackbones.detr.dino_names.from_other_programs`.
        """
        if self.architecture != "dino":
            return state
        return from_other_programs(state, self.detr.config)

    def prepare_targets(
        self, images: ImageList, instances: list[Instances]
    ) -> list[dict[str, torch.Tensor]]:
        """The labels that transformers takes: ``class_labels``, and ``boxes`` as cx, cy, w, h.

        Boxes are fractions of the padded images or of each image's own size, as the architecture
        has it. Masks are those of the padded images.

        Raises:
            ImageError: if there are masks to learn and an image has none, or it has a class that is
                none of ``num_classes``.
        """
        labels = []
        for (height, width), x in zip(self._frames(images), instances):
            scale = x.gt_boxes.tensor.new_tensor([width, height, width, height])
            boxes = box_convert(x.gt_boxes.tensor / scale, "xyxy", "cxcywh")
            check_classes(x.gt_classes, self.num_classes)
            labels.append({"class_labels": x.gt_classes, "boxes": boxes})
            if self.masks:
                labels[-1]["masks"] = true_masks(x, images.tensor.shape[-2:])
        return labels

    def _weighted(self, losses: dict[str, torch.Tensor], num_boxes: int) -> dict[str, torch.Tensor]:
        losses = {key: value for key, value in losses.items() if key.startswith("loss_")}
        wanted = ARCHITECTURES[self.architecture]
        for prefix, weight in wanted.loss_weights:
            weight = getattr(self.detr.config, weight) if isinstance(weight, str) else weight
            losses |= {k: weight * v for k, v in losses.items() if k.startswith(prefix)}
        if wanted.counts_alone:
            ratio = max(num_boxes, 1) / mean_per_process(num_boxes)
            losses |= {k: ratio * v for k, v in losses.items() if k.startswith(wanted.counts_alone)}
        return losses

    def _inference(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        results: dict[int, dict[str, Instances]] = {}
        for indices, images in self.groups_of_one_size(batched_inputs):
            outputs = self.detr(**images_and_mask(images))
            detections = self._detections(images, outputs.logits, outputs.pred_boxes)
            for n, (i, found) in enumerate(zip(indices, detections)):
                size = found.image_size
                height = batched_inputs[i].get("height", size[0])
                width = batched_inputs[i].get("width", size[1])
                found = detector_postprocess(found, height, width)
                if self.masks:
                    logits = upsampled(outputs.pred_masks[n, found.queries].float(), images.tensor)
                    found.pred_masks = sem_seg_postprocess(logits, size, height, width) > 0
                found.remove("queries")
                results[i] = {"instances": found}
        return [results[i] for i in range(len(batched_inputs))]

    def _detections(
        self, images: ImageList, logits: torch.Tensor, boxes: torch.Tensor
    ) -> list[Instances]:
        """The best pairs of query and class, with the number of the query."""
        detections = []
        for frame, size, scores, classes, queries, fractions in zip(
            self._frames(images), images.image_sizes, *self.best_pairs(logits, boxes)
        ):
            found = Instances(size)
            found.queries = queries
            found.pred_boxes = Boxes(fractions * fractions.new_tensor([*frame[::-1], *frame[::-1]]))
            found.scores, found.pred_classes = scores, classes
            detections.append(found)
        return detections

    def best_pairs(self, logits: torch.Tensor, boxes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The best pairs of query and class of each image, the best first.

        A query may be there for several classes, but of a softmax for its best alone.

        Args:
            logits, boxes: what the model of transformers gives for N images.

        Returns:
            scores, classes and numbers of the queries (N, n), and boxes (N, n, 4) as x0, y0, x1,
            y1, fractions of the frame, see :attr:`frame_is_padded`.
        """
        count, logits = self.num_classes * logits.shape[1], logits.float()
        if ARCHITECTURES[self.architecture].no_object:
            probabilities, count = logits.softmax(-1)[..., :-1], logits.shape[1]
            probabilities = probabilities * (probabilities == probabilities.amax(-1, keepdim=True))
        else:
            probabilities = logits.sigmoid()
        scores, index = probabilities.flatten(1).topk(min(self.test_topk_per_image, count))
        queries = index // self.num_classes
        xyxy = box_convert(boxes.float(), "cxcywh", "xyxy")
        xyxy = xyxy.gather(1, queries[..., None].expand(-1, -1, 4))
        return scores, index % self.num_classes, queries, xyxy

    def save_pretrained(self, folder: str, class_names: Sequence[str] | None = None) -> None:
        """Write the detector as ``transformers.AutoModelForObjectDetection`` reads it.

        Args:
            folder: to write to; it must not exist or be empty.
            class_names: names of the classes, in order.

        Raises:
            FileExistsError: if ``folder`` holds files.
            ValueError: if the backbone is not one that transformers builds through timm, or
                transformers' model does not give what this one gives.
        """
        pixels = (self.pixel_mean, self.pixel_std)
        save_pretrained(folder, self.detr, self.backbone, self.in_features, pixels, class_names)
