"""What is exported of a detector or a backbone: a module that takes a tensor and gives tensors."""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.modeling import Backbone
from detectron2.modeling.meta_arch import GeneralizedRCNN, SemanticSegmentor
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import ImageList
from torch import nn

from ..adapt.fold import unfold
from ..detr.detector import TransformersDetector
from ..detr.images import images_and_mask, upsampled
from ..detr.segmenter import TransformersSegmenter


class Graph(nn.Module):
    """A model as a function of tensors, in eval mode and without folded convolutions.

    Attributes:
        outputs: the tensors that it gives, and the lengths or names of their axes.
        batches: whether it takes several images at once, all of one size.
        pads: whether it pads images to what the model takes, or is given images of such sizes.
    """

    batches = True
    pads = True

    def __init__(self, model: nn.Module, **outputs: tuple[str | int, ...]):
        super().__init__()
        self.model = unfold(model)
        self.outputs = outputs

    @property
    def multiple(self) -> int:
        """What the model needs height and width to be a multiple of."""
        own = getattr(self.model, "size_divisibility", 0)  # of a DETR whose backbone takes any
        return self.model.backbone.size_divisibility or own or 1

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """
        Args:
            images: (N, C, H, W) of 0 to 255; of a backbone, normalized.

        Returns:
            the ``outputs``.
        """
        raise NotImplementedError

    def padded(self, images: torch.Tensor) -> torch.Tensor:
        """Images padded with zeros at the bottom and at the right, if the graph pads."""
        if not self.pads:
            return images
        height, width = images.shape[-2:]
        if square := self.square:
            return F.pad(images, (0, square - width, 0, square - height))
        return F.pad(images, (0, -width % self.multiple, 0, -height % self.multiple))

    @property
    def square(self) -> int:
        """The side of the squares that detectron2 pads images to for this backbone, or 0."""
        return self.model.backbone.padding_constraints.get("square_size", 0)


class MapsGraph(Graph):
    """The feature maps of a backbone, of images padded to what it takes, without the padding."""

    square = 0

    def __init__(self, model: Backbone):
        levels = model.output_shape().items()
        super().__init__(
            model,
            **{
                name: ("batch", x.channels, f"height_{name}", f"width_{name}") for name, x in levels
            },
        )

    @property
    def multiple(self) -> int:
        return self.model.size_divisibility or 1

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        maps = self.model(self.padded(images))
        if not self.pads:
            return tuple(maps[name] for name in self.outputs)
        height, width = images.shape[-2:]
        strides = {name: shape.stride for name, shape in self.model.output_shape().items()}
        return tuple(
            maps[name][..., : (height + n - 1) // n, : (width + n - 1) // n]
            for name, n in strides.items()
        )


class ObjectsGraph(Graph):
    """The objects in one image, by an R-CNN, RetinaNet or FCOS.

    ``boxes`` (n, 4) are x0, y0, x1, y1 in pixels of the image, ``scores`` (n,) and ``classes``
    (n,) go with them, the best first; of an R-CNN with masks ``masks`` are the probabilities within
    each box, 28 x 28 of detectron2's mask head.
    """

    batches = False

    def __init__(self, model: nn.Module):
        masks = getattr(getattr(model, "roi_heads", None), "mask_on", False)
        masks = {"masks": ("objects", "mask_height", "mask_width")} if masks else {}
        super().__init__(
            model, boxes=("objects", 4), scores=("objects",), classes=("objects",), **masks
        )

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = [{"image": images[0]}]
        if isinstance(self.model, GeneralizedRCNN):
            found = self.model.inference(inputs, do_postprocess=False)[0]
        else:
            found = self.model(inputs)[0]["instances"]
        tensors = found.pred_boxes.tensor, found.scores, found.pred_classes
        return (*tensors, found.pred_masks[:, 0]) if "masks" in self.outputs else tensors


class QueriesGraph(Graph):
    """The objects in images, by a DETR: ``boxes`` (N, n, 4), ``scores`` and ``classes`` (N, n)."""

    def __init__(self, model: TransformersDetector):
        axes = ("batch", "objects")
        super().__init__(model, boxes=(*axes, 4), scores=axes, classes=axes)
        _trace_sizes(self.model)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        model, size = self.model, images.shape[-2:]
        pixels = self.padded((images - model.pixel_mean) / model.pixel_std)
        inputs = images_and_mask(ImageList(pixels, [tuple(size)]))
        inputs["pixel_mask"] = inputs["pixel_mask"].expand(pixels.shape[0], -1, -1)
        outputs = model.detr(**inputs)
        scores, classes, _, boxes = model.best_pairs(outputs.logits, outputs.pred_boxes)
        frame = pixels.shape[-2:] if model.frame_is_padded else size
        xs, ys = boxes[..., 0::2] * frame[1], boxes[..., 1::2] * frame[0]
        corners = torch.stack((_within(xs, size[1]), _within(ys, size[0])), -1)
        return corners.flatten(-2), scores, classes


class MasksGraph(Graph):
    """The objects in one image, or the ``sem_seg`` scores of its pixels, by Mask2Former
    or EoMT.

    ``masks`` (n, H, W) are bits, and ``boxes``, ``scores`` and ``classes`` are as of others.
    """

    batches = False

    def __init__(self, model: TransformersSegmenter):
        n, pixels = "objects", ("height", "width")
        if model.task == "instance":
            outputs = {"boxes": (n, 4), "scores": (n,), "classes": (n,), "masks": (n, *pixels)}
        else:
            outputs = {"sem_seg": ("batch", "classes", *pixels)}
        super().__init__(model, **outputs)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        model, (height, width) = self.model, images.shape[-2:]
        pixels = self.padded((images - model.pixel_mean) / model.pixel_std)
        outputs = model.model(pixel_values=pixels)
        masks = upsampled(outputs.masks_queries_logits[0], pixels)[:, :height, :width].sigmoid()
        scores = outputs.class_queries_logits[0].softmax(-1)[:, :-1]
        if model.task == "semantic":
            return (model.task_results(scores, masks)["sem_seg"][None],)
        return model.best_masks(scores, masks)


class ScoresGraph(Graph):
    """The scores (N, classes, H, W) that the pixels of images have, by a semantic head."""

    def __init__(self, model: SemanticSegmentor):
        super().__init__(model, sem_seg=("batch", "classes", "height", "width"))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        model, (height, width) = self.model, images.shape[-2:]
        pixels = self.padded((images - model.pixel_mean) / model.pixel_std)
        scores, _ = model.sem_seg_head(model.backbone(pixels))
        return (scores[..., :height, :width],)


def _trace_sizes(model: nn.Module) -> None:
    """Let the deformable attention of a DETR take the sizes of maps as they are traced.

    transformers makes a tensor of them by ``torch.as_tensor``, which is a constant in a trace: of
    Deformable DETR the boxes of images of other sizes were wrong by some tenths of a pixel.
    """

    def traced(module: nn.Module, args: tuple, options: dict[str, Any]) -> tuple | None:
        if "spatial_shapes" not in options or not torch.jit.is_tracing():
            return None
        sizes = options["spatial_shapes_list"]
        rows = [torch.stack([torch.as_tensor(length) for length in size]) for size in sizes]
        return args, {**options, "spatial_shapes": torch.stack(rows)}

    for module in model.modules():
        if "DeformableAttention" in type(module).__name__:
            module.register_forward_pre_hook(traced, with_kwargs=True)


def _within(values: torch.Tensor, most: int) -> torch.Tensor:
    """Values from 0 to a number, which in a trace is a tensor."""
    return values.clamp(min=0) - (values - most).clamp(min=0)


def make_graph(model: nn.Module) -> Graph:
    """What is exported of a detector, a segmenter or a backbone.

    Raises:
        ValueError: if it is of a kind that cannot be exported.
    """
    if isinstance(model, Backbone):
        return MapsGraph(model)
    if isinstance(model, SemanticSegmentor):
        return ScoresGraph(model)
    if isinstance(model, TransformersSegmenter) and model.task != "panoptic":
        return MasksGraph(model)
    if isinstance(model, TransformersDetector) and not model.masks:
        return QueriesGraph(model)
    keypoints = getattr(getattr(model, "roi_heads", None), "keypoint_on", False)
    if type(model) is GeneralizedRCNN and not keypoints or isinstance(model, DenseDetector):
        return ObjectsGraph(model)
    raise ValueError(
        f"a {type(model).__name__}{' with keypoints' * keypoints} cannot be exported: "
        "GeneralizedRCNN without keypoints, RetinaNet, FCOS, SemanticSegmentor, "
        "TransformersDetector without masks, and TransformersSegmenter but for panoptic "
        "segmentation can"
    )
