"""Predictor: a trained detector or segmenter that takes images as people have them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetMapper
from detectron2.structures import Instances
from omegaconf import DictConfig, OmegaConf
from PIL import Image, ImageOps
from torch import nn
from torchvision.ops import batched_nms

from ..config import find_config, load_config
from ..data.images import DEEP, as_image, read_image
from ..data.transforms import QuickAugInput
from ..messages import first_line, fraction, one_of, whole_number
from ..training.best import NAME as BEST
from ..training.checkpoint import last_whole, load_init_checkpoint
from ..training.record import make_record, read_record
from ..training.run import check_config
from .augmented import IOU, SCALES, check_scales, flipped, merged, scaled
from .extras import import_supervision
from .hub import PREFIX, WEIGHTS, download

if TYPE_CHECKING:
    from supervision import Detections

ImageLike = str | Path | np.ndarray | Image.Image | torch.Tensor


class Predictor:
    """A trained detector or segmenter.

    All that it needs is in the checkpoint: the detector's config, the names of its classes, the
    size that images get. The data of its training need not be there.

    Example::

        predictor = Predictor("output/mine")
        instances = predictor("cells.jpg")["instances"]  # detectron2's, of the image's own size
        detections = predictor.detections("cells.jpg")  # supervision's

    Attributes:
        model: the detector.
        mapper: what makes its inputs of images.
        classes: the names of its classes, in order.
        categories: the ids that the classes have in the JSON file of the training.
        channels, max_value: of the images, see :func:`detbackbones.data.images.read_image`.
        gives_objects: whether it gives objects, or else label maps.
        checkpoint: the file that the weights are of.
        record: what the detector is, see :func:`detbackbones.training.record.make_record`.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        config: str | Path | DictConfig | None = None,
        device: str = "auto",
        score_threshold: float = 0.5,
        nms_threshold: float | None = None,
        classes: Sequence[str] | None = None,
        trust: bool = False,
    ):
        """
        Args:
            run: the folder of a training, of which ``model_best.pth`` is taken, or else the last
                checkpoint; a checkpoint; a folder that ``save_pretrained`` wrote; or the name of
                one on the Hugging Face hub, ``hf-hub:user/name``.
            config: the detector's config, for a checkpoint that holds none; by default the
                ``config.yaml`` beside it. The data that it names must be there.
            device: "cpu", "cuda", or "auto" for a GPU if there is one.
            score_threshold: objects with a lower score are left out.
            nms_threshold: of objects of one class whose boxes overlap by more than this IoU the
                best is kept; None is for what the detector itself does.
            classes: names of those whose objects are given; None is for all.
            trust: let a config call code of other packages.

        Raises:
            FileNotFoundError: if there is no such checkpoint.
            ConnectionError: if the hub cannot be reached.
            ValueError: if an argument is wrong, the checkpoint is damaged, must be trusted, or
                does not fit its config.
        """
        fraction("score_threshold", score_threshold)
        if nms_threshold is not None:
            fraction("nms_threshold", nms_threshold)
        gpu = torch.cuda.is_available()
        one_of("device", device, ("auto", "cpu", "cuda") if gpu else ("auto", "cpu"))
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.checkpoint = _checkpoint(run)
        record = read_record(self.checkpoint, trust=trust) if config is None else None
        if record is None:
            record = _record_of(self.checkpoint, config, trust)
        self.record = record
        self.classes: list[str] = record["thing_classes"] or record["stuff_classes"]
        self.gives_objects = bool(record["thing_classes"])
        if classes and not self.gives_objects:
            raise ValueError(f"classes={[*classes]} must be left out for a model of label maps")
        for name in classes or ():
            one_of("classes", name, self.classes)
        self._wanted = torch.tensor([not classes or name in classes for name in self.classes])
        self.categories: list[int] = record["categories"] or [*range(1, len(self.classes) + 1)]
        self.model, self.mapper = self._build(record)
        self.model.to(("cuda" if gpu else "cpu") if device == "auto" else device)
        self.channels = getattr(self.mapper, "channels", 3)
        self.max_value = getattr(self.mapper, "max_value", None)

    def _build(self, record: dict[str, Any]) -> tuple[nn.Module, DatasetMapper]:
        try:
            mapper, model = (
                instantiate(OmegaConf.create(record[key])) for key in ("mapper", "model")
            )
        except Exception as error:  # another version of a package may fail in any way
            made = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
            raise ValueError(
                f"the detector of {self.checkpoint!r} cannot be built: {first_line(error)}; it was "
                f"made with {made}"
            ) from error
        if not isinstance(mapper, DatasetMapper):
            raise ValueError(
                "dataloader.test.mapper of the run must be a DatasetMapper of detectron2, and is a "
                f"{type(mapper).__name__}"
            )
        load_init_checkpoint(model, self.checkpoint, whole=True)
        return model.eval(), mapper

    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> Any:
        """Predict what is in an image, or in several at once.

        Args:
            images: each a file's path; a PIL image; an RGB array (H, W, 3) or gray one (H, W); or
                a tensor (3, H, W). Values are those of files: of 8 bits, or of more if the images
                of the training had more. A sequence goes through the model as one batch.

        Returns:
            for each image, at its own size, a dict with what the detector gives, on the CPU:
            ``instances``, detectron2's ``Instances``; ``sem_seg``, scores (classes, H, W);
            ``panoptic_seg``, segments (H, W) and a list of what they are.

        Raises:
            OSError: if a file cannot be read.
            ValueError: if an image has other channels or values, or a size that the model cannot
                take.
        """
        if not isinstance(images, list | tuple):
            return self([images])[0]
        return self.predict([self.read(image) for image in images])

    def predict(self, images: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        """Predict what is in images that are read.

        Args:
            images: of :meth:`read`; they go through the model as one batch.

        Returns:
            as a call.
        """
        inputs = [self.prepare(image) for image in images]
        with torch.no_grad():
            outputs = self.model(inputs) if inputs else []
        return [{key: self._kept(value) for key, value in output.items()} for output in outputs]

    def prepare(self, image: np.ndarray, scale: float = 1.0) -> dict[str, Any]:
        """What the model takes of an image of :meth:`read`, as the mapper makes it of a file.

        Args:
            image: of :meth:`read`.
            scale: of the size that the mapper gives it.
        """
        if image.shape[2] == 3 and self.mapper.image_format == "BGR":
            image = image[:, :, ::-1]
        inputs = QuickAugInput(np.ascontiguousarray(image))
        augmentations = self.mapper.augmentations
        (augmentations if scale == 1 else scaled(augmentations, scale))(inputs)
        height, width = image.shape[:2]
        pixels = torch.as_tensor(np.ascontiguousarray(inputs.image)).permute(2, 0, 1)
        return {"image": pixels, "height": height, "width": width}

    def detections(self, image: ImageLike | dict[str, Any]) -> "Detections":
        """The objects in an image as supervision has them, with ``class_name`` in their data.

        Of label maps each class in the image is one, with its mask and without a score. Of panoptic
        segmentation it is the things alone.

        Args:
            image: as for a call, or what a call gave.

        Raises:
            ImportError: if supervision is not installed.
            OSError, ValueError: as of a call.
        """
        supervision = import_supervision()
        prediction = image if isinstance(image, dict) else self(image)
        if "instances" in prediction:
            found = supervision.Detections.from_detectron2(prediction)
        else:
            labels = prediction["sem_seg"].argmax(0).numpy()
            classes = np.unique(labels)
            masks = labels[None] == classes[:, None, None]
            found = supervision.Detections(
                supervision.mask_to_xyxy(masks, "exclusive"), masks, class_id=classes
            )
        found.data["class_name"] = np.array(self.classes, dtype=str)[found.class_id]
        return found

    def augmented(
        self, image: ImageLike, scales: Sequence[float] = SCALES, flip: bool = True
    ) -> dict[str, Any]:
        """Predict what is in an image from several views of it: test-time augmentation.

        Of boxes of one class that overlap the one with the best score is kept.

        Args:
            image: as for a call.
            scales: of the size that images have otherwise.
            flip: whether to take each mirrored, too.

        Returns:
            as a call, ``instances`` alone.

        Raises:
            ValueError: as of a call, if a scale is none, or if the model gives label maps.
        """
        if not self.gives_objects:
            raise ValueError("the model gives label maps: views of an image are merged of objects")
        check_scales(scales)
        image, views = self.read(image), []
        for mirrored in (False, True) if flip else (False,):
            seen = np.ascontiguousarray(image[:, ::-1]) if mirrored else image
            for scale in scales:
                with torch.no_grad():
                    (found,) = self.model([self.prepare(seen, scale)])
                found = self._kept(found["instances"])
                views.append(flipped(found) if mirrored else found)
        return {
            "instances": merged(views, IOU if self.nms_threshold is None else self.nms_threshold)
        }

    def tiled(self, image: ImageLike, tile: int, overlap: float = 0.2) -> "Detections":
        """The objects in a large image, found tile by tile.

        What is found twice where tiles overlap becomes one object: what is cut at a border lies
        with more than half of its area in what is whole (the rule of SAHI, arXiv 2202.06934).

        Args:
            image: as for a call.
            tile: length of a tile's side in pixels.
            overlap: of neighbouring tiles, a fraction of the side.

        Raises:
            ImportError: if supervision is not installed.
            ValueError: as of a call, or if an argument is out of range.
        """
        return self.predict_tiled(self.read(image), tile, overlap)

    def predict_tiled(self, image: np.ndarray, tile: int, overlap: float = 0.2) -> "Detections":
        """As :meth:`tiled`, of an image that is read.

        Args:
            image: of :meth:`read`.
            tile, overlap: as of :meth:`tiled`.
        """
        check_tiles(tile, overlap)
        slicer = import_supervision().InferenceSlicer(
            lambda pixels: self.detections(self.predict([pixels])[0]),
            slice_wh=tile,
            overlap_wh=int(tile * overlap),
            overlap_filter="non_max_merge",
            overlap_metric="IOS",
            compact_masks=True,
        )
        return slicer(image)

    def read(self, image: ImageLike) -> np.ndarray:
        """An image as an RGB array (H, W, C) of 0 to 255.

        Args:
            image: as for a call.

        Raises:
            OSError, ValueError: as of a call.
        """
        channels, max_value = self.channels, self.max_value
        if isinstance(image, str | Path):
            if "://" in str(image):
                raise ValueError(f"image={image!r} must be a file: download it first")
            if not os.path.isfile(image):
                raise FileNotFoundError(f"image={str(image)!r} must be a file, and there is none")
            return read_image(str(image), channels, max_value)
        if isinstance(image, Image.Image):
            image = ImageOps.exif_transpose(image)
            if channels in (1, 3) and not image.mode.startswith(DEEP):
                image = image.convert("L" if channels == 1 else "RGB")
            image = np.asarray(image)
        elif isinstance(image, torch.Tensor):
            image = image.detach().cpu().numpy()
            image = np.moveaxis(image, 0, -1) if image.ndim == 3 else image
        elif not isinstance(image, np.ndarray):
            raise ValueError(
                f"image of {type(image).__name__} must be a path, a PIL image, an array or a tensor"
            )
        return as_image(image, "image", channels, max_value)

    def _kept(self, value: Any) -> Any:
        if isinstance(value, tuple):  # of segments, and what they are
            return tuple(self._kept(item) for item in value)
        if isinstance(value, torch.Tensor):
            return value.cpu()
        if not isinstance(value, Instances):
            return value
        value = value[value.scores >= self.score_threshold].to("cpu")
        value = value[self._wanted[value.pred_classes]]
        if self.nms_threshold is None:
            return value
        boxes, classes = value.pred_boxes.tensor, value.pred_classes
        return value[batched_nms(boxes, value.scores, classes, self.nms_threshold)]


def _checkpoint(run: str | Path) -> str:
    path = download(run) if isinstance(run, str) and run.startswith(PREFIX) else Path(run)
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(
                f"run={str(run)!r} must be the folder of a training or a checkpoint, and there is "
                "none"
            )
        return str(path)
    best, shared = path / BEST, path / WEIGHTS
    file = str(best) if best.is_file() else last_whole(str(path))
    if not file and shared.is_file():
        return str(shared)
    if not file:
        raise FileNotFoundError(f"run={str(run)!r} must hold a checkpoint, such as {BEST}")
    return file


def _record_of(
    checkpoint: str, config: str | Path | DictConfig | None, trust: bool
) -> dict[str, Any]:
    """The record of a detector whose checkpoint holds none: its data must be there."""
    if config is None:
        config = Path(checkpoint).with_name("config.yaml")
        if not config.is_file():
            raise FileNotFoundError(
                f"checkpoint {checkpoint!r} holds no config, and there is no config.yaml beside "
                "it: give one as config (--config-file)"
            )
    if not isinstance(config, DictConfig):
        config = load_config(find_config(str(config)), trust=trust)
    return make_record(check_config(config, ["train.device=auto"]))


def check_tiles(tile: int, overlap: float) -> None:
    """Refuse tiles that are none.

    Raises:
        ValueError: if their side is no number of pixels, or the overlap no fraction below 1.
    """
    whole_number("tile", tile)
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap={overlap} must be a fraction, from 0 to below 1")
