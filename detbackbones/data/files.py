"""Checks of a user's files, and what their messages say."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from ..messages import nearest


def existing(parameter: str, path: str, exists: Callable[[str], bool], what: str) -> Path:
    """The absolute path of something that is there, symbolic links resolved.

    Args:
        parameter: name of the argument that has the path.
        path: its value.
        exists: ``os.path.isfile`` or ``os.path.isdir``.
        what: what the path is to be, such as "the folder of the images".

    Raises:
        ValueError: if the path is empty, or a folder where a file is wanted or the other way round.
        FileNotFoundError: if it is not there, with the nearest names in its folder.
    """
    if not path:
        raise ValueError(f"{parameter}={path!r} must be {what}")
    if not exists(path):
        if os.path.exists(path):
            kind = "a folder" if os.path.isdir(path) else "a file"
            raise ValueError(f"{parameter}={path!r} must be {what}, and is {kind}")
        folder, name = os.path.split(os.path.abspath(path))
        names = os.listdir(folder) if os.path.isdir(folder) else []
        near = nearest(name, [n for n in names if exists(os.path.join(folder, n))], most=0)
        raise FileNotFoundError(
            f"{parameter}={path!r} must be {what}, but does not exist: in '{folder}' {near}"
        )
    return Path(path).resolve()


def check_new(parameter: str, folder: str | Path) -> None:
    """Refuse a folder that holds something.

    Args:
        parameter: name of the argument that has it.
        folder: its value.

    Raises:
        FileExistsError: if it is a file, or not empty.
    """
    path = Path(folder)
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise FileExistsError(f"{parameter}={str(folder)!r} must be a new or an empty folder")


@contextlib.contextmanager
def new_folder(parameter: str, folder: str | Path) -> Iterator[Path]:
    """A temporary folder beside a new one that becomes it when all is written.

    Args:
        parameter: name of the argument that has it.
        folder: its value; it is as before if what is done within fails.

    Raises:
        FileExistsError: if it is a file, or not empty.
    """
    check_new(parameter, folder)
    path = Path(folder).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.mkdir()
    try:
        yield temporary
        check_new(parameter, folder)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
