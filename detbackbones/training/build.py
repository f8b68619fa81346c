"""What a training is made of: model, weights, data and optimizer, as a config says."""

import copy
import logging

from detectron2.config import instantiate
from detectron2.engine.defaults import create_ddp_model
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn

from ..backbones.feature_backbone import FeatureBackbone
from ..config import without_weights
from ..data.evaluator import CocoEvaluator
from ..messages import first_line, one_of
from .agreement import check_channels, check_classes, check_fit, check_pixels
from .checkpoint import Checkpointer, last_whole, load_init_checkpoint
from .feature_cache import cache_features
from .sharding import shard
from .trainer import Trainer, seed_step

logger = logging.getLogger(__name__)


def build_trainer(cfg: DictConfig, *, loads_all: bool) -> Trainer:
    """The model, its optimizer and its data, as the config says."""
    settings, world_size = cfg.train, comm.get_world_size()
    if settings.fsdp and world_size == 1:
        raise ValueError("train.fsdp=True must be False for a single process")
    size, steps = cfg.dataloader.train.total_batch_size, settings.accumulation_steps
    if size % world_size == 0 and size % (steps * world_size):
        raise ValueError(
            f"train.accumulation_steps={steps} must divide the {size // world_size} images that a "
            "process has of a batch (dataloader.train.total_batch_size)"
        )
    seed_step(settings.seed, 0, 0)
    loader = instantiate(cfg.dataloader.train)
    instantiate(cfg.dataloader.test.dataset)  # a fault in these is to be found now
    evaluator = instantiate(cfg.dataloader.evaluator)
    if settings.best_metric and isinstance(evaluator, CocoEvaluator):
        one_of("train.best_metric", settings.best_metric, evaluator.metric_names())
    check_classes(cfg)
    # a model that is to be divided goes to the devices part by part
    model = build_model(cfg, loads_all=loads_all, device="cpu" if settings.fsdp else None)
    if settings.feature_cache:
        _cache(cfg, model)
    whole_model = None
    if settings.fsdp:
        whole_model = copy.deepcopy(model)
        shard(model, settings.device)
    optimizer_cfg = copy.deepcopy(cfg.optimizer)
    optimizer_cfg.params.model = model
    optimizer = instantiate(optimizer_cfg)
    if not settings.fsdp:
        device_ids = [comm.get_local_rank()] if settings.device == "cuda" else None
        model = create_ddp_model(model, device_ids=device_ids, **settings.ddp)
    return Trainer(
        model,
        loader,
        optimizer,
        device=settings.device,
        seed=settings.seed,
        rank=comm.get_rank(),
        amp_dtype=settings.amp.dtype if settings.amp.enabled else None,
        clip_grad=dict(settings.clip_grad.params) if settings.clip_grad.enabled else None,
        accumulation_steps=steps,
        ema_decay=settings.model_ema.decay if settings.model_ema.enabled else None,
        copy=whole_model,
    )


def _cache(cfg: DictConfig, model: nn.Module) -> None:
    """Let the backbones of a model remember the maps that they have computed in training.

    Raises:
        ValueError: if there is none whose maps can be kept.
    """
    size = cfg.train.feature_cache
    if cfg.model.get("architecture") == "eomt":
        raise ValueError(
            f"train.feature_cache={size} must be 0 with architecture='eomt', whose queries are in "
            "the blocks of the backbone"
        )
    backbones = [m for m in model.modules() if isinstance(m, FeatureBackbone)]
    if not backbones:
        raise ValueError(f"train.feature_cache={size} must be 0: the model has no FeatureBackbone")
    for backbone in backbones:
        cache_features(backbone, round(size * 2**30))


def build_model(cfg: DictConfig, *, loads_all: bool, device: str | None = None) -> nn.Module:
    """The model on its device.

    Args:
        cfg: the config.
        loads_all: a checkpoint will give all its weights, so that none are fetched for a backbone.
        device: that of ``train.device`` by default.
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
    return model.to(device or cfg.train.device)


def last_checkpoint(folder: str) -> str | None:
    """The checkpoint that all processes continue from, as the main one sees it."""
    main = comm.is_main_process()
    file = comm.all_gather(last_whole(folder) if main else None)[0]
    if main and not file:
        logger.warning("there is no checkpoint to continue from in %s", folder)
    return file


def load_weights(cfg: DictConfig, checkpointer: Checkpointer, file: str | None) -> None:
    """Load a checkpoint of the run, or else ``train.init_checkpoint`` where it is set.

    Args:
        cfg: the config.
        checkpointer: of the model.
        file: the checkpoint.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if a checkpoint is damaged, or does not fit the model.
    """
    if file:
        check_fit(checkpointer.model, file)
        checkpointer.load(file)
    elif init := cfg.train.init_checkpoint:
        load_init_checkpoint(checkpointer.model, init, **_allowed(cfg))


def load_trained(cfg: DictConfig, model: nn.Module, file: str) -> None:
    """Load what a run has trained; of the weights and their average the average.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or leaves a weight of the model as it was drawn.
    """
    load_init_checkpoint(model, file, whole=True, **_allowed(cfg))


def _allowed(cfg: DictConfig) -> dict[str, bool]:
    return {key: cfg.train[key] for key in ("allow_pickle", "allow_partial")}
