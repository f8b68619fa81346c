"""What is to be predicted: images, folders and patterns of them, videos."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.images import SUFFIXES, list_images
from ..messages import first_line
from .extras import import_supervision

VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")


@dataclass(frozen=True)
class Source:
    """An image or a video.

    Attributes:
        name: of what is written for it, without a suffix.
        file: its path.
    """

    name: str
    file: Path

    @property
    def is_video(self) -> bool:
        """Whether it is a video, by its suffix."""
        return self.file.suffix.lower() in VIDEOS


def list_sources(words: Sequence[str]) -> list[Source]:
    """The images and videos that are meant, under names that differ.

    The name is the file's without its suffix, or with it where several would have the same.

    Args:
        words: files, folders, or patterns such as ``images/val_*.jpg``.

    Raises:
        FileNotFoundError: if there is no such file, or a folder or pattern holds no image.
        ValueError: if several files have one name.
    """
    files: dict[Path, None] = {}
    for word in words:
        if "://" in word:
            raise ValueError(f"images={word!r} must be a file: download it first")
        found = [Path(word)]
        if not os.path.isfile(word):
            found = list_images(word, "images", (*SUFFIXES, *VIDEOS))
        files |= dict.fromkeys(found)
    stems = Counter(file.stem for file in files)
    named: dict[str, Path] = {}
    for file in files:
        name = file.stem if stems[file.stem] == 1 else file.name
        if name in named:
            raise ValueError(
                f"images must have different names: there are '{named[name]}' and '{file}'"
            )
        named[name] = file
    return [Source(name, file) for name, file in named.items()]


def read_frames(file: Path, every: int) -> Iterator[tuple[int, np.ndarray]]:
    """The frames of a video, RGB (H, W, 3) of 8 bits, with their numbers from 0.

    Args:
        file: of the video.
        every: take each so many-th frame.

    Raises:
        OSError: if it cannot be read.
    """
    frames = import_supervision().get_video_frames_generator(str(file), stride=every)
    try:
        for i, frame in enumerate(frames):
            yield i * every, np.ascontiguousarray(frame[:, :, ::-1])
    except Exception as error:  # it has no errors of its own
        raise OSError(f"video '{file}' cannot be read: {first_line(error)}") from error
