"""Exporting a backbone alone."""

from pathlib import Path
from typing import Any

import torch

from ..backbones import FeatureBackbone
from ..data.images import list_images, read_image
from .export import Report, export
from .export_detector import TRIED, spread
from .exported import resized


def export_maps(
    backbone: FeatureBackbone, folder: str | Path, *, images: str | None = None, **options: Any
) -> Report:
    """Export a backbone, whose outputs are the levels of normalized images.

    Args:
        backbone: with the weights that it is to have.
        folder: to write to; it must not exist or be empty.
        images: the folder of some images to try it with; by default noise.
        options: ``format`` and ``size``, see :func:`detbackbones.deploy.export.export`.

    Raises:
        FileExistsError, FileNotFoundError, ImportError, ValueError: as of ``export``.
    """
    about = {"model": backbone.model_name, "channel_order": "RGB"}
    return export(backbone, folder, _tried(backbone, images), about=about, **options)


def _tried(backbone: FeatureBackbone, folder: str | None) -> list[torch.Tensor]:
    """Images of a folder, or noise, of a size that the model takes."""
    size, channels = backbone.probe_size, backbone.source.in_channels
    if not folder:
        seeds = (torch.Generator().manual_seed(i) for i in (0, 1))
        return [torch.randn(channels, *size, generator=generator) for generator in seeds]
    if not (backbone.pixel_mean and backbone.pixel_std):
        raise ValueError(
            f"images={folder!r} must be left out: what {backbone.model_name} was trained with is "
            "not known"
        )
    mean, std = (torch.tensor(x)[:, None, None] for x in (backbone.pixel_mean, backbone.pixel_std))
    files = spread(list_images(folder, "images"), TRIED)
    pixels = [torch.tensor(read_image(str(file), channels)).permute(2, 0, 1) for file in files]
    return [(resized(image.float(), size) - mean) / std for image in pixels]
