"""One run in one folder."""

import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, by a file ``run.lock`` that names this process.

    That of a process which is no longer there is of no account.

    Args:
        folder: is made if need be.

    Raises:
        FileExistsError: if another run is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "run.lock"
    own = {"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())}
    whole = file.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
    whole.write_text(json.dumps(own))
    try:
        while True:
            try:
                _put(whole, file)
                break
            except FileExistsError:
                _refuse(folder, file)
                file.unlink(missing_ok=True)
    finally:
        whole.unlink()
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def _put(whole: Path, file: Path) -> None:
    """Give a file another name, with all that is in it, if there is none of that name."""
    try:
        os.link(whole, file)
    except FileExistsError:
        raise
    except OSError:  # some file systems have no links
        with open(file, "x") as copy:
            copy.write(whole.read_text())


def _refuse(folder: Path, file: Path) -> None:
    """Raise if the process of a lock is there, or may be: on another machine nobody can tell."""
    try:
        lock = json.loads(file.read_text())
        pid, host, started = lock["pid"], lock["host"], lock["started"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # gone meanwhile, or not ours
    if host != socket.gethostname():
        raise FileExistsError(
            f"train.output_dir={folder} is that of a run on {host}, process {pid}: choose another, "
            f"or remove {file.name} in it if that run is no more"
        )
    if _started(pid) is not None and _started(pid) == started:
        raise FileExistsError(
            f"train.output_dir={folder} is that of a run in progress, process {pid}: choose another"
        )


def _started(pid: int) -> int | None:
    """When a process started, in ticks since the machine did; None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()
    return None if state == "Z" else int(fields[18])
