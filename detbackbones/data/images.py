"""Reading images: one rule for each kind of file, and none that changes pixels in silence."""

import glob
import os
from collections.abc import Collection
from pathlib import Path

import cv2
import numpy as np
import tifffile
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_jpeg, read_file

from ..messages import first_line
from .files import existing

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".npy")
DEEP = ("I", "F", "I;16")  # PIL's modes of more than 8 bits begin so


class ImageError(ValueError):
    """An image that can be decoded but not be used."""


def read_image(file_name: str, channels: int = 3, max_value: float | None = None) -> np.ndarray:
    """Read an image as an array (height, width, channels) of values from 0 to 255.

    - For 3 channels, pictures of 8 bits are converted to RGB: gray ones to three equal channels,
      palettes to their colours, CMYK without a colour profile; transparency is dropped. For 1
      channel they are converted to gray.
    - For other numbers of channels, the file must have just so many: a TIFF (interleaved, in planes
      or in pages), a NumPy array ``.npy`` (height, width, channels), or what PIL has as such.
    - An EXIF orientation is applied.
    - Values of more than 8 bits are scaled by 255 / ``max_value``, and become float32. So is every
      image that has neither 1 nor 3 channels, for resizing treats it otherwise.

    Args:
        file_name: of the image.
        channels: of the result.
        max_value: the value that becomes 255, of images of more than 8 bits.

    Raises:
        OSError: if the file cannot be read or decoded.
        ImageError: if it has several frames, other channels, or values that do not fit.
    """
    try:
        pixels = _read(file_name, channels)
    except ImageError:
        raise
    except Exception as error:  # decoders raise all kinds
        raise OSError(f"image '{file_name}' cannot be read: {first_line(error)}") from error
    return as_image(pixels, f"image '{file_name}'", channels, max_value)


def as_image(
    pixels: np.ndarray, what: str, channels: int = 3, max_value: float | None = None
) -> np.ndarray:
    """An array as an image (height, width, channels) of values from 0 to 255.

    Args:
        pixels: (height, width), or (height, width, channels).
        what: a message calls it.
        channels: of the result; gray becomes three equal ones.
        max_value: the value that becomes 255, of images of more than 8 bits.

    Raises:
        ImageError: if it has other channels, or values that do not fit.
    """
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = np.repeat(pixels, channels, axis=2) if channels == 3 else pixels
    if pixels.ndim != 3 or pixels.shape[2] != channels or 0 in pixels.shape:
        raise ImageError(f"{what}: shape={pixels.shape} must be (height, width, {channels})")
    if pixels.dtype != np.uint8:
        return _scaled(pixels, what, max_value)
    dtype = np.uint8 if channels in (1, 3) else np.float32
    return pixels.astype(dtype, copy=not pixels.flags.writeable)


def shown_channels(image: np.ndarray) -> np.ndarray:
    """An image to look at, of 8 bits (H, W, 3): the first three of its channels, or one.

    Args:
        image: (H, W, C), from 0 to 255.
    """
    shown = image[:, :, :3] if image.shape[2] >= 3 else image[:, :, [0, 0, 0]]
    return np.ascontiguousarray(shown, dtype=np.uint8)


def list_images(root: str, parameter: str, suffixes: Collection[str] = SUFFIXES) -> list[Path]:
    """The images of a folder, a pattern or a list, sorted by name.

    Args:
        root: a folder, a pattern such as ``images/train_*.jpg``, or a text file ``train.txt`` of
            paths, one a line, relative to it or absolute.
        parameter: name of the argument that has it.
        suffixes: of the files that are meant.

    Raises:
        FileNotFoundError: if there are none, or one of a list is not there.
        ValueError: if it is empty, or another file.
    """
    if glob.has_magic(root) and not os.path.isdir(root):
        files = glob.glob(os.path.abspath(root))
    elif root.lower().endswith(".txt") and os.path.isfile(root):
        lines = Path(root).read_text().splitlines()
        files = [
            os.path.join(os.path.dirname(os.path.abspath(root)), x) for x in lines if x.strip()
        ]
        if missing := next((file for file in files if not os.path.isfile(file)), None):
            raise FileNotFoundError(f"{parameter}={root!r}: its image '{missing}' does not exist")
    else:
        what = "the folder of the images or a pattern of them"
        files = existing(parameter, root, os.path.isdir, what).iterdir()
    images = sorted(Path(f) for f in files if Path(f).suffix.lower() in suffixes)
    if not images:
        raise FileNotFoundError(
            f"{parameter}={root!r} must have images with a suffix of " + ", ".join(suffixes)
        )
    return images


def image_size(file_name: str) -> tuple[int, int]:
    """The (width, height) of an image as :func:`read_image` gives it, from the file's head.

    Raises:
        OSError: if the file is no image.
    """
    try:
        if Path(file_name).suffix.lower() == ".npy":
            height, width = np.load(file_name, mmap_mode="r", allow_pickle=False).shape[:2]
            return width, height
        try:
            opened = Image.open(file_name)
        except UnidentifiedImageError:
            pixels = _read_tiff(file_name)  # of other channels
            return pixels.shape[1], pixels.shape[0]
        with opened as image:
            turned = image.getexif().get(0x0112, 1) >= 5  # the EXIF orientation, by 90 degrees
            return image.size[::-1] if turned else image.size
    except Exception as error:  # decoders raise all kinds
        raise OSError(f"image '{file_name}' cannot be read: {first_line(error)}") from error


def read_label_map(file_name: str, dtype: type | None = None) -> np.ndarray:
    """Read a label map: the value of each pixel, of a palette image the index of its colour.

    Args:
        file_name: of the label map.
        dtype: type of the array's elements; that of the file if not given.

    Returns:
        the class of each pixel, of shape (H, W).

    Raises:
        OSError: if the file cannot be read or decoded.
        ImageError: if it has more than one channel.
    """
    try:
        with Image.open(file_name) as image:
            labels = np.array(image, dtype=dtype)
    except Exception as error:  # decoders raise all kinds
        raise OSError(f"label map '{file_name}' cannot be read: {first_line(error)}") from error
    if labels.ndim != 2:
        raise ImageError(
            f"label map '{file_name}': shape={labels.shape} must be (height, width), the class of "
            "each pixel"
        )
    return labels


def _read(file_name: str, channels: int) -> np.ndarray:
    suffix = Path(file_name).suffix.lower()
    if suffix == ".npy":
        return np.array(np.load(file_name, mmap_mode="r", allow_pickle=False))
    if suffix in (".tif", ".tiff") and channels not in (1, 3):
        return _read_tiff(file_name, channels)
    with Image.open(file_name) as image:
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # cameras put a preview behind the picture
            raise ImageError(
                f"image '{file_name}': it has {frames} frames, and must have one: save the one "
                "that the annotations are of"
            )
        if any(";16" in str(tile) for tile in image.tile):  # of which PIL would keep the high byte
            return _read_deep(file_name, image)
        if channels == 3 and image.format == "JPEG" and image.mode in ("RGB", "L"):
            pixels = _read_jpeg(file_name, image.getexif().get(0x0112, 1))
            if pixels is not None:
                return pixels
        image = ImageOps.exif_transpose(image)
        if not image.mode.startswith(DEEP):
            if channels in (1, 3):
                image = image.convert("RGB" if channels == 3 else "L")
        return np.asarray(image)


def _read_jpeg(file_name: str, orientation: int) -> np.ndarray | None:
    """A JPEG of 8 bits as torchvision decodes it: as PIL does, in less time.

    Where the file does not end as it should, it is left to PIL, which says whether something is
    missing: torchvision takes what there is.
    """
    data = read_file(file_name)
    if data[-2:].tolist() != [0xFF, 0xD9]:  # the end of an image
        return None
    pixels = decode_jpeg(data, ImageReadMode.RGB).permute(1, 2, 0)
    if orientation in range(5, 9):
        pixels = pixels.transpose(0, 1)
    turned = {2: [1], 3: [0, 1], 4: [0], 6: [1], 7: [0, 1], 8: [0]}.get(orientation, [])
    return (torch.flip(pixels, turned) if turned else pixels).contiguous().numpy()


def _read_deep(file_name: str, image: Image.Image) -> np.ndarray:
    """An image of 16 bits in several channels; transparency is dropped."""
    if image.format == "TIFF":
        pixels = _read_tiff(file_name, len(image.getbands()))
    else:
        flags = cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imread(file_name, flags)
        if pixels.ndim == 3:
            pixels = cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGBA)[:, :, : pixels.shape[2]]
    if pixels.ndim == 3 and image.mode in ("LA", "RGBA"):
        pixels = pixels[:, :, :1] if image.mode == "LA" else pixels[:, :, :3]
    turned = image.getexif().get(0x0112, 1)
    if turned != 1:
        raise ImageError(
            f"image '{file_name}': an EXIF orientation ({turned}) of an image of 16 bits cannot be "
            "applied: turn the image itself"
        )
    return pixels


def _read_tiff(file_name: str, channels: int | None = None) -> np.ndarray:
    with tifffile.TiffFile(file_name) as file:
        pixels = file.series[0].asarray()
        planes = pixels.ndim == 3 and file.series[0].axes.endswith("YX")
    if planes and channels in (None, len(pixels)):
        return np.moveaxis(pixels, 0, 2)
    return pixels


def _scaled(pixels: np.ndarray, what: str, max_value: float | None) -> np.ndarray:
    if pixels.dtype.kind not in "uif":
        raise ImageError(f"{what}: its values are {pixels.dtype}, and must be numbers")
    if max_value is None:
        raise ImageError(
            f"{what}: its values are {pixels.dtype}, from {pixels.min()} to "
            f"{pixels.max()}: set dataset.max_value to the value that is to become 255, such as "
            "65535, or 4095 of a camera of 12 bits"
        )
    if not (pixels.min() >= 0 and pixels.max() <= max_value):  # NaN is neither
        raise ImageError(
            f"{what}: its values, from {pixels.min()} to {pixels.max()}, must be from "
            f"0 to dataset.max_value={max_value}"
        )
    return (pixels * (255 / max_value)).astype(np.float32)
