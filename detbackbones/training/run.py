"""Training and evaluating a detector from a LazyConfig, as the programs and a notebook do it."""

import contextlib
import copy
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import hooks
from detectron2.utils import comm
from detectron2.utils.events import TensorboardXWriter, get_event_storage
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..config import get_config
from ..messages import one_of
from .agreement import frozen_at_random
from .best import NAME as BEST
from .best import BestModel, StoppedEarly
from .build import build_model, build_trainer, last_checkpoint, load_trained, load_weights
from .checkpoint import Checkpointer
from .curves import draw_curves
from .evaluation import (
    Results,
    draw_first_batch,
    draw_pictures,
    evaluate_model,
    show_in_tensorboard,
    without_nan,
)
from .interrupt import InterruptHook
from .log import logging_to
from .metrics import (
    EvaluationHook,
    MetricsWriter,
    NewMetricsWriter,
    cut_metrics,
    missed_evaluation,
)
from .output import reserved
from .overrides import apply_overrides
from .progress import ProgressPrinter
from .record import fill_config, make_record, read_record
from .settings import check_settings
from .trackers import TRACKERS, build_trackers
from .trainer import AMP_DTYPES, Trainer

logger = logging.getLogger(__name__)


def train(cfg: DictConfig, *, resume: bool = False, overwrite: bool = False) -> Results:
    """Train a detector to ``train.max_iter``, evaluate it and draw what it predicts.

    Example, in a notebook::

        cfg = get_config("finetune/faster_rcnn.py")
        cfg.dataset.update(train_json="train.json", train_images="images")
        cfg.dataset.update(val_json="val.json", val_images="images")
        results = train(cfg)  # {"bbox": {"AP": ...}}

    Args:
        cfg: a config such as :func:`get_config` gives; it is not changed.
        resume: continue from the last checkpoint in ``train.output_dir``, if there is one.
        overwrite: replace the run that ``train.output_dir`` holds.

    Returns:
        the metrics by task and name; in a process that is not the main one, none.

    Raises:
        ValueError, OSError, ImportError: if a setting, a file or the data is wrong.
    """
    cfg = check_config(cfg)
    main = comm.is_main_process()
    with reserved(cfg, resume=resume, overwrite=overwrite) if main else contextlib.nullcontext():
        comm.synchronize()
        with logging_to(cfg.train.output_dir):
            return fit(prepare(cfg, resume=resume))


def evaluate(cfg: DictConfig) -> Results:
    """Evaluate ``train.init_checkpoint``, or else the last checkpoint in ``train.output_dir``.

    The metrics and the checkpoint's name are written to ``evaluation.json`` in that folder, and
    what is predicted and what is wrong is drawn in ``evaluation_predictions.png``,
    ``evaluation_errors.png`` and ``evaluation_hardest.png``; an earlier evaluation's are replaced.
    Of the training data nothing is needed, and classes of the test data are matched by their names.

    Args:
        cfg: as of :func:`train`.

    Returns:
        as :func:`train`.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError, OSError, ImportError: if a setting, a file or the data is wrong.
    """
    cfg = check_config(cfg, trains=False)
    folder, init = cfg.train.output_dir, cfg.train.init_checkpoint
    os.makedirs(folder, exist_ok=True)
    with logging_to(folder):
        file = init or last_checkpoint(folder)
        if not file:
            raise FileNotFoundError(
                f"there is nothing to evaluate: train.output_dir={folder} holds no checkpoint, and "
                "train.init_checkpoint is empty"
            )
        if record := read_record(file, trust=True):
            fill_config(cfg, record)
        else:
            check_settings(cfg)  # its data say what the model is
        model = build_model(cfg, loads_all=True)
        load_trained(cfg, model, file)
        results, evaluator = evaluate_model(cfg, model)
        if comm.is_main_process():
            metrics = Path(folder, "evaluation.json")
            content = {"checkpoint": file, **without_nan(results)}
            metrics.write_text(json.dumps(content, indent=1) + "\n")
            log_files([metrics, *draw_pictures(cfg, model, evaluator, "evaluation_")])
        return results


def with_train_settings(cfg: DictConfig) -> DictConfig:
    """A copy of a config whose ``train`` has all settings of this package."""
    cfg = copy.deepcopy(cfg)
    cfg.train = OmegaConf.merge(get_config("common/train.py").train, cfg.get("train", {}))
    return cfg


def check_config(
    cfg: DictConfig,
    overrides: Sequence[str] = (),
    name: str = "the config",
    *,
    trains: bool = True,
) -> DictConfig:
    """A copy of a config with its overrides, its settings checked and the device chosen.

    Args:
        cfg: may lack settings that only this package has.
        overrides: ``key=value`` words, see :func:`apply_overrides`.
        name: what an error calls it.
        trains: whether the training data must be there.

    Raises:
        ValueError: if something is missing or wrong.
    """
    for key in ("model", "dataloader", "optimizer", "lr_multiplier"):
        if key not in cfg:
            raise ValueError(f"{name} has no {key!r}")
    cfg = with_train_settings(cfg)
    check_settings(apply_overrides(cfg, list(overrides)), trains=trains)
    settings = cfg.train
    one_of("train.amp.dtype", settings.amp.dtype, AMP_DTYPES)
    for tracker in settings.trackers:
        one_of("train.trackers", tracker, TRACKERS)
    gpu = torch.cuda.is_available()
    one_of("train.device", settings.device, ("auto", "cpu", "cuda") if gpu else ("auto", "cpu"))
    if settings.patience and not settings.eval_period:
        raise ValueError(
            f"train.patience={settings.patience} must be null where train.eval_period is 0"
        )
    if settings.fsdp and settings.model_ema.enabled:
        raise ValueError("train.fsdp=True must stand without train.model_ema")
    if settings.fsdp and settings.amp.enabled and settings.amp.dtype == "float16":
        raise ValueError("train.amp.dtype='float16' must be bfloat16 with train.fsdp")
    if settings.device == "auto":
        settings.device = "cuda" if gpu else "cpu"
    return cfg


@dataclass
class Run:
    """A training that is ready to start, see :func:`prepare`."""

    cfg: DictConfig
    trainer: Trainer
    checkpointer: Checkpointer
    start_iter: int
    best: BestModel
    trackers: Sequence[NewMetricsWriter]

    @property
    def model(self) -> nn.Module:
        """The detector, without the wrapper of distributed training."""
        return self.trainer.bare_model

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated: the average, or of a divided model a whole copy."""
        return self.trainer.evaluated_model


def prepare(cfg: DictConfig, *, resume: bool = False) -> Run:
    """Build all that a training needs, load the weights, and write ``config.yaml``.

    Args:
        cfg: as :func:`check_config` returns it; its output folder exists.
        resume: as of :func:`train`.

    Raises:
        ValueError, OSError, ImportError: if something is wrong.
    """
    folder, main = cfg.train.output_dir, comm.is_main_process()
    file = last_checkpoint(folder) if resume else None
    trainer = build_trainer(cfg, loads_all=file is not None)
    checkpointer = Checkpointer(trainer.bare_model, folder, save_to_disk=main, trainer=trainer)
    trainer.iter = -1
    load_weights(cfg, checkpointer, file)
    if file and trainer.iter < 0:
        raise ValueError(f"checkpoint {file!r} has no trainer in it: it cannot be continued")
    start = trainer.iter + 1
    if not (file or cfg.train.init_checkpoint) and (odd := frozen_at_random(cfg)):
        logger.warning(odd)
    settings = cfg.train
    patience = settings.patience and settings.patience * settings.eval_period
    try:
        checkpointer.record = make_record(cfg, trainer.bare_model)
    except ValueError as error:
        logger.warning("the checkpoints do not hold what a Predictor needs: %s", error)
    best = BestModel(
        trainer.evaluated_model, folder, settings.best_metric, patience, checkpointer.record
    )
    best.read(start)
    trackers = build_trackers(cfg, resume=start > 0) if main else []
    if main:
        cut_metrics(Path(folder, "metrics.json"), start)
        LazyConfig.save(cfg, os.path.join(folder, "config.yaml"))
    comm.synchronize()
    return Run(cfg, trainer, checkpointer, start, best, trackers)


def fit(run: Run) -> Results:
    """Train to ``train.max_iter``, then evaluate and draw; returns the metrics.

    Raises:
        Interrupted: if a signal ended it; there is a checkpoint to continue from.
    """
    cfg, settings, trainer = run.cfg, run.cfg.train, run.trainer
    folder, main = Path(settings.output_dir), comm.is_main_process()
    results: Results = {}
    evaluator = None
    interrupt = InterruptHook(run.checkpointer.save)
    keep = settings.checkpointer.max_to_keep if main else None
    saving = hooks.PeriodicCheckpointer(
        run.checkpointer, settings.checkpointer.period, max_to_keep=keep
    )
    saving.recent_checkpoints = run.checkpointer.kept(run.start_iter, keep)
    missed = missed_evaluation(
        folder / "metrics.json", run.start_iter, settings.eval_period, settings.max_iter
    )
    missed = comm.all_gather(missed)[0]  # as the main process sees it

    def evaluation() -> Results:
        nonlocal evaluator
        trainer.gather()
        # a checkpoint of what is divided needs all processes, and they are not at the same image
        check = None if settings.fsdp else interrupt.check
        found, evaluator = evaluate_model(cfg, run.evaluated, check)
        results.update(found)
        run.best.update(results, min(get_event_storage().iter, settings.max_iter - 1))
        if trainer.iter + 1 < settings.max_iter:  # or it is drawn what it predicts
            trainer.release()
        return results

    timing = [hooks.IterationTimer(), hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier))]
    writing = []
    if main:
        file = MetricsWriter(folder / "metrics.json")
        screen = ProgressPrinter(settings.max_iter, cfg.dataloader.train.total_batch_size)
        writers = [screen, file, TensorboardXWriter(settings.output_dir), *run.trackers]
        writing = [hooks.PeriodicWriter(writers, settings.log_period)]
    evaluating = EvaluationHook(
        settings.eval_period, evaluation, before=file.write if main else None, missed=missed
    )
    saving = [saving] if main or settings.fsdp else []
    trainer.register_hooks([*timing, *saving, evaluating, *writing, run.best, interrupt])
    parameters = list(run.model.parameters())
    logger.info(
        "training %s on %s, iterations %d to %d, into %s: %.1f M parameters, %.1f M trainable",
        type(run.evaluated).__name__,
        settings.device,
        run.start_iter,
        settings.max_iter,
        folder,
        sum(p.numel() for p in parameters) / 1e6,
        sum(p.numel() for p in parameters if p.requires_grad) / 1e6,
    )
    if main:
        written = draw_first_batch(cfg, trainer.data_loader)
        show_in_tensorboard(written, run.start_iter)
        log_files(written)
    try:
        trainer.train(run.start_iter, settings.max_iter)
    except StoppedEarly as end:
        logger.info("%s", end)
        trainer.iter = end.iteration
        run.checkpointer.save("model_final", iteration=end.iteration)
        trainer.gather()
        if end.iteration < run.start_iter and not missed:  # what is continued had ended
            found, evaluator = evaluate_model(cfg, run.evaluated)
            results.update(found)
    if main:
        written = draw_pictures(cfg, run.evaluated, evaluator)
        show_in_tensorboard(written, trainer.iter)
        written.append(draw_curves(folder / "metrics.json", folder / "curves.png"))
        names = ["model_final.pth", BEST, "metrics.json", "config.yaml", "log.txt"]
        log_files([*written, *(folder / name for name in names if (folder / name).is_file())])
    return results


def log_files(written: list[Path]) -> None:
    """Say which files there are now."""
    if written:
        logger.info("wrote %s", ", ".join(map(str, written)))
