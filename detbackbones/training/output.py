"""The folder of a run: for one run alone, and never overwritten without being asked."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from detectron2.config import instantiate
from omegaconf import DictConfig, OmegaConf

from ..data.verify import verify_images
from .lock import locked

_OF_A_RUN = ("config.yaml", "metrics.json", "last_checkpoint", "model_final.pth", "model_best.pth")
_OF_A_RUN += ("model_[0-9]*.pth",)


@contextlib.contextmanager
def reserved(cfg: DictConfig, *, resume: bool = False, overwrite: bool = False) -> Iterator[None]:
    """Have ``train.output_dir`` for one run alone, see :func:`prepare_output`.

    With ``dataset.verify`` all images are read, before any other process waits for this one.

    Raises:
        FileExistsError: as there, or if another run is in progress in it.
        ValueError: if an image is wrong.
    """
    with locked(Path(cfg.train.output_dir)):
        prepare_output(cfg, resume=resume, overwrite=overwrite)
        if OmegaConf.select(cfg, "dataset.verify"):
            for part in (cfg.dataloader.train, cfg.dataloader.test):
                verify_images(instantiate(part.dataset), instantiate(part.mapper))
        yield


def prepare_output(cfg: DictConfig, *, resume: bool = False, overwrite: bool = False) -> None:
    """Make ``train.output_dir``; refuse one that holds another run unless asked.

    Args:
        cfg: the config.
        resume: continue that run.
        overwrite: delete the files of that run; other files of the folder stay.

    Raises:
        FileExistsError: if it does, and is neither to be continued nor replaced.
    """
    folder = Path(cfg.train.output_dir)
    if not resume:
        run = _existing(folder, *_OF_A_RUN)
        if not overwrite:
            refuse_run(folder)
        if run:
            pictures = ("batch.png", "predictions.png", "errors.png", "hardest.png", "curves.png")
            run += _existing(folder, "log.txt*", "events.out.tfevents.*", *pictures)
            run += _existing(folder, "trackers.json", "evaluation.json", "evaluation_*.png")
        for path in run:
            path.unlink()
    folder.mkdir(parents=True, exist_ok=True)


def refuse_run(folder: Path) -> None:
    """Refuse a folder that holds a run.

    Raises:
        FileExistsError: if it does.
    """
    if run := _existing(folder, *_OF_A_RUN):
        raise FileExistsError(
            f"train.output_dir={folder} holds a run already ({run[0].name}): choose another, "
            "continue it with --resume (resume=True in Python), or replace it with --overwrite "
            "(overwrite=True)"
        )


def _existing(folder: Path, *patterns: str) -> list[Path]:
    return [path for pattern in patterns for path in folder.glob(pattern)]
