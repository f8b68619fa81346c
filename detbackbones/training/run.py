"""Training and evaluating a detector from a LazyConfig, as the programs and a notebook do it."""

import contextlib
import copy
import io
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import MetadataCatalog
from detectron2.engine import hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm
from detectron2.utils.events import TensorboardXWriter
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate
from timm.utils import distribute_bn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..config import get_config, without_weights
from ..data.verify import verify_images
from ..messages import first_line, one_of
from .agreement import (
    check_channels,
    check_classes,
    check_fit,
    check_pixels,
    frozen_at_random,
)
from .checkpoint import Checkpointer, last_whole, load_init_checkpoint
from .curves import draw_curves
from .interrupt import InterruptHook
from .lock import locked
from .log import logging_to
from .metrics import (
    EvaluationHook,
    MetricsWriter,
    cut_metrics,
    missed_evaluation,
)
from .overrides import apply_overrides
from .pictures import draw_predictions
from .progress import ProgressPrinter
from .settings import check_settings
from .trainer import AMP_DTYPES, Trainer, seed_step

logger = logging.getLogger(__name__)

Results = dict[str, dict[str, float]]


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
    what is predicted is drawn in ``evaluation.png``; an earlier evaluation's are replaced.

    Args:
        cfg: as of :func:`train`.

    Returns:
        as :func:`train`.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError, OSError, ImportError: if a setting, a file or the data is wrong.
    """
    cfg = check_config(cfg)
    folder, init = cfg.train.output_dir, cfg.train.init_checkpoint
    os.makedirs(folder, exist_ok=True)
    with logging_to(folder):
        model = build_model(cfg, loads_all=True)
        checkpointer = Checkpointer(model, folder, save_to_disk=False)
        file = None if init else _last_checkpoint(folder)
        load_weights(cfg, checkpointer, file, whole=True)
        if not (file or init):
            raise FileNotFoundError(
                f"there is nothing to evaluate: train.output_dir={folder} holds no checkpoint, and "
                "train.init_checkpoint is empty"
            )
        results = evaluate_model(cfg, model)
        if comm.is_main_process():
            metrics = Path(folder, "evaluation.json")
            content = {"checkpoint": file or init, **_without_nan(results)}
            metrics.write_text(json.dumps(content, indent=1) + "\n")
            log_files([metrics, *draw_pictures(cfg, model, "evaluation.png")])
        return results


def check_config(
    cfg: DictConfig, overrides: Sequence[str] = (), name: str = "the config"
) -> DictConfig:
    """A copy of a config with its overrides, its settings checked and the device chosen.

    Args:
        cfg: may lack settings that only this package has.
        overrides: ``key=value`` words, see :func:`apply_overrides`.
        name: what an error calls it.

    Raises:
        ValueError: if something is missing or wrong.
    """
    for key in ("model", "dataloader", "optimizer", "lr_multiplier"):
        if key not in cfg:
            raise ValueError(f"{name} has no {key!r}")
    cfg = copy.deepcopy(cfg)
    cfg.train = OmegaConf.merge(get_config("common/train.py").train, cfg.get("train", {}))
    check_settings(apply_overrides(cfg, list(overrides)))
    settings = cfg.train
    one_of("train.amp.dtype", settings.amp.dtype, AMP_DTYPES)
    gpu = torch.cuda.is_available()
    one_of("train.device", settings.device, ("auto", "cpu", "cuda") if gpu else ("auto", "cpu"))
    if settings.device == "auto":
        settings.device = "cuda" if gpu else "cpu"
    return cfg


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
        weights = ("last_checkpoint", "model_final.pth", "model_[0-9]*.pth")
        run = _existing(folder, "config.yaml", "metrics.json", *weights)
        if run and not overwrite:
            raise FileExistsError(
                f"train.output_dir={folder} holds a run already ({run[0].name}): choose another, "
                "continue it with --resume (resume=True in Python), or replace it with "
                "--overwrite (overwrite=True)"
            )
        if run:
            pictures = ("predictions.png", "curves.png", "evaluation.json", "evaluation.png")
            run += _existing(folder, "log.txt*", "events.out.tfevents.*", *pictures)
        for path in run:
            path.unlink()
    folder.mkdir(parents=True, exist_ok=True)


def _existing(folder: Path, *patterns: str) -> list[Path]:
    return [path for pattern in patterns for path in folder.glob(pattern)]


@dataclass
class Run:
    """A training that is ready to start, see :func:`prepare`."""

    cfg: DictConfig
    trainer: Trainer
    checkpointer: Checkpointer
    start_iter: int

    @property
    def model(self) -> nn.Module:
        """The detector, without the wrapper of distributed training."""
        return self.checkpointer.model


def prepare(cfg: DictConfig, *, resume: bool = False) -> Run:
    """Build all that a training needs, load the weights, and write ``config.yaml``.

    Args:
        cfg: as :func:`check_config` returns it; its output folder exists.
        resume: as of :func:`train`.

    Raises:
        ValueError, OSError, ImportError: if something is wrong.
    """
    folder, main = cfg.train.output_dir, comm.is_main_process()
    file = _last_checkpoint(folder) if resume else None
    trainer = build_trainer(cfg, loads_all=file is not None)
    model = trainer.model
    model = model.module if isinstance(model, DistributedDataParallel) else model
    checkpointer = Checkpointer(model, folder, save_to_disk=main, trainer=trainer)
    trainer.iter = -1
    load_weights(cfg, checkpointer, file)
    if file and trainer.iter < 0:
        raise ValueError(f"checkpoint {file!r} has no trainer in it: it cannot be continued")
    start = trainer.iter + 1
    if not (file or cfg.train.init_checkpoint) and (odd := frozen_at_random(cfg)):
        logger.warning(odd)
    if main:
        cut_metrics(Path(folder, "metrics.json"), start)
        LazyConfig.save(cfg, os.path.join(folder, "config.yaml"))
    comm.synchronize()
    return Run(cfg, trainer, checkpointer, start)


def build_trainer(cfg: DictConfig, *, loads_all: bool) -> Trainer:
    """The model, its optimizer and its data, as the config says."""
    settings = cfg.train
    seed_step(settings.seed, 0, 0)
    loader = instantiate(cfg.dataloader.train)
    instantiate(cfg.dataloader.test.dataset)  # a fault in these is to be found now
    instantiate(cfg.dataloader.evaluator)
    check_classes(cfg)
    model = build_model(cfg, loads_all=loads_all)
    optimizer_cfg = copy.deepcopy(cfg.optimizer)
    optimizer_cfg.params.model = model
    optimizer = instantiate(optimizer_cfg)
    device_ids = [comm.get_local_rank()] if settings.device == "cuda" else None
    return Trainer(
        create_ddp_model(model, device_ids=device_ids, **settings.ddp),
        loader,
        optimizer,
        device=settings.device,
        seed=settings.seed,
        rank=comm.get_rank(),
        amp_dtype=settings.amp.dtype if settings.amp.enabled else None,
        clip_grad=dict(settings.clip_grad.params) if settings.clip_grad.enabled else None,
    )


def build_model(cfg: DictConfig, *, loads_all: bool) -> nn.Module:
    """The model on its device.

    Args:
        cfg: the config.
        loads_all: a checkpoint will give all its weights, so that none are fetched for a backbone.
    """
    model_cfg = copy.deepcopy(cfg.model)
    if loads_all and "backbone" in model_cfg:
        model_cfg.backbone = without_weights(model_cfg.backbone)
    check_pixels(cfg)
    try:
        model = instantiate(model_cfg)
    except (ValueError, OSError, ImportError):
        raise
    except Exception as error:  # detectron2 asserts, and a foreign model may fail in any way
        raise ValueError(
            f"the model cannot be built as the config says: {type(error).__name__}, "
            f"{first_line(error)}"
        ) from error
    check_channels(model, cfg)
    return model.to(cfg.train.device)


def _last_checkpoint(folder: str) -> str | None:
    """The checkpoint that all processes continue from, as the main one sees it."""
    main = comm.is_main_process()
    file = comm.all_gather(last_whole(folder) if main else None)[0]
    if main and not file:
        logger.warning("there is no checkpoint to continue from in %s", folder)
    return file


def load_weights(
    cfg: DictConfig, checkpointer: Checkpointer, file: str | None, *, whole: bool = False
) -> None:
    """Load a checkpoint of the run, or else ``train.init_checkpoint`` where it is set.

    Args:
        cfg: the config.
        checkpointer: of the model.
        file: the checkpoint.
        whole: no weight may stay as it was drawn.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if a checkpoint is damaged, or does not fit the model.
    """
    init = cfg.train.init_checkpoint
    if file:
        check_fit(checkpointer.model, file)
        checkpointer.load(file)
    elif init:
        load_init_checkpoint(
            checkpointer.model,
            init,
            whole=whole,
            allow_pickle=cfg.train.allow_pickle,
            allow_partial=cfg.train.allow_partial,
        )


def fit(run: Run) -> Results:
    """Train to ``train.max_iter``, then evaluate and draw; returns the metrics.

    Raises:
        Interrupted: if a signal ended it; there is a checkpoint to continue from.
    """
    cfg, settings, model, main = run.cfg, run.cfg.train, run.model, comm.is_main_process()
    results: Results = {}
    interrupt = InterruptHook(run.checkpointer.save)
    keep = settings.checkpointer.max_to_keep
    saving = hooks.PeriodicCheckpointer(
        run.checkpointer, settings.checkpointer.period, max_to_keep=keep
    )
    saving.recent_checkpoints = run.checkpointer.kept(run.start_iter, keep)
    missed = missed_evaluation(
        Path(settings.output_dir, "metrics.json"),
        run.start_iter,
        settings.eval_period,
        settings.max_iter,
    )
    missed = comm.all_gather(missed)[0]  # as the main process sees it

    def evaluation() -> Results:
        results.update(evaluate_model(cfg, model, interrupt.check))
        return results

    timing = [hooks.IterationTimer(), hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier))]
    writing = []
    if main:
        file = MetricsWriter(os.path.join(settings.output_dir, "metrics.json"))
        screen = ProgressPrinter(settings.max_iter, cfg.dataloader.train.total_batch_size)
        writers = [screen, file, TensorboardXWriter(settings.output_dir)]
        writing = [hooks.PeriodicWriter(writers, settings.log_period)]
    evaluating = EvaluationHook(
        settings.eval_period, evaluation, before=file.write if main else None, missed=missed
    )
    saving = [saving] if main else []
    run.trainer.register_hooks([*timing, *saving, evaluating, *writing, interrupt])
    parameters = list(model.parameters())
    logger.info(
        "training %s on %s, iterations %d to %d, into %s: %.1f M parameters, %.1f M trainable",
        type(model).__name__,
        settings.device,
        run.start_iter,
        settings.max_iter,
        settings.output_dir,
        sum(p.numel() for p in parameters) / 1e6,
        sum(p.numel() for p in parameters if p.requires_grad) / 1e6,
    )
    run.trainer.train(run.start_iter, settings.max_iter)
    if main:
        folder = Path(settings.output_dir)
        written = draw_pictures(cfg, model, "predictions.png")
        written.append(draw_curves(folder / "metrics.json", folder / "curves.png"))
        names = ("model_final.pth", "metrics.json", "config.yaml", "log.txt")
        log_files([*written, *(folder / name for name in names)])
    return results


def evaluate_model(
    cfg: DictConfig, model: nn.Module, before_batch: Callable[[], None] | None = None
) -> Results:
    """Evaluate a model on the test set, with autocast if training has it.

    Batch norm that learns has other running statistics in each process. What is evaluated is what
    the main process writes to its checkpoints.

    Args:
        cfg: the config.
        model: the detector.
        before_batch: is called before each batch.
    """
    if comm.get_world_size() > 1:
        distribute_bn(model, comm.get_world_size())
    amp = cfg.train.amp
    dtype = AMP_DTYPES[amp.dtype] if amp.enabled else None
    with torch.autocast(cfg.train.device, dtype, enabled=amp.enabled):
        loader, evaluator = map(instantiate, (cfg.dataloader.test, cfg.dataloader.evaluator))
        callbacks = {"before_inference": before_batch} if before_batch else None
        with contextlib.redirect_stdout(io.StringIO()) as printed:  # by pycocotools
            results = inference_on_dataset(model, loader, evaluator, callbacks)
    logging.getLogger("detbackbones.evaluation").info("printed\n%s", printed.getvalue())
    if comm.is_main_process():
        logger.info("metrics\n%s", "\n\n".join(metric_tables(results)))
    return results


def metric_tables(results: Results) -> list[str]:
    """A table of each task's metrics, and one of those that it has of classes, such as AP-cat.

    What a class without a true box has is no number, and is left out.
    """
    tables = []
    for task, metrics in _without_nan(results).items():
        if not isinstance(metrics, dict):  # an evaluator may give single numbers
            metrics = {task: metrics}
        whole = {name: value for name, value in metrics.items() if "-" not in name}
        tables.append(_table([[task, *whole.values()]], ["", *whole]))
        classes: dict[str, dict[str, float | None]] = {}
        for name, value in metrics.items():
            kind, dash, class_name = name.partition("-")
            if dash:
                classes.setdefault(class_name, {})[kind] = value
        if classes:
            kinds = [*next(iter(classes.values()))]
            rows = [[name, *(row.get(kind) for kind in kinds)] for name, row in classes.items()]
            tables.append(_table(rows, ["class", *kinds]))
    return tables


def _table(rows: list[list], headers: list[str]) -> str:
    numbers = {"floatfmt": ".1f", "missingval": "-", "disable_numparse": [0]}
    return tabulate(rows, headers, tablefmt="github", **numbers)


def _without_nan(results: Any) -> Any:
    """The same with None for what is no number, which JSON has not."""
    if isinstance(results, dict):
        return {key: _without_nan(value) for key, value in results.items()}
    return None if isinstance(results, float) and math.isnan(results) else results


def log_files(written: list[Path]) -> None:
    """Say which files there are now."""
    logger.info("wrote %s", ", ".join(map(str, written)))


def draw_pictures(cfg: DictConfig, model: nn.Module, name: str) -> list[Path]:
    """Draw ground truth beside predictions; returns the file, if any pictures are asked for."""
    dataset = instantiate(cfg.dataloader.test.dataset)
    count = min(cfg.train.pictures, len(dataset))
    images = [dataset[i * len(dataset) // count] for i in range(count)]
    if not images:
        return []
    mapper = instantiate(cfg.dataloader.test.mapper)
    model.eval()
    with torch.no_grad():
        predictions = [model([mapper(image)])[0] for image in images]
    metadata = MetadataCatalog.get(instantiate(cfg.dataloader.test.dataset.names))
    read = getattr(mapper, "picture", None)
    path = Path(cfg.train.output_dir, name)
    return [draw_predictions(images, predictions, metadata, path, read=read)]
