"""The largest batch that the memory of a device holds, from a few training steps."""

import itertools
import logging
import math
import os
import resource
import sys
from pathlib import Path

import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig

from .build import build_trainer, load_weights
from .checkpoint import Checkpointer
from .run import check_config
from .trainer import Trainer

logger = logging.getLogger(__name__)

GIB = 2**30
SHARE = 0.9  # of the memory that may be used: batches differ, and memory becomes fragmented
LARGEST = 32  # images that are tried at once


def find_batch(cfg: DictConfig, *, memory: float | None = None) -> int:
    """Find the largest batch that fits into memory.

    Steps are tried with 1, 2, 4, ... images, at most 32, until twice as many do not fit; from
    there memory is taken to grow in a line, and nine tenths of it may be used. Each image is the
    largest of the first 32 of the training. Nothing is kept of the training.

    Args:
        cfg: as of :func:`detbackbones.training.train`.
        memory: bytes that a process has; by default those of the GPU, or a fair part of the
            machine's.

    Returns:
        the images of all processes, for ``dataloader.train.total_batch_size``.

    Raises:
        ValueError, OSError, ImportError: if a setting, a file or the data is wrong, or the memory
            does not hold one image.
    """
    cfg = check_config(cfg)
    cfg.train.feature_cache = 0  # what is tried is one image, many times
    trainer = build_trainer(cfg, loads_all=False)
    load_weights(cfg, Checkpointer(trainer.bare_model, save_to_disk=False), None)
    gpu = cfg.train.device == "cuda"
    if memory is None:
        memory = torch.cuda.mem_get_info()[1] if gpu else _memory() / comm.get_local_size()
    memory = min(comm.all_gather(memory))
    batches = itertools.islice(trainer.data_loader, LARGEST)
    images = itertools.islice(itertools.chain.from_iterable(batches), LARGEST)
    image = max(images, key=lambda image: image["image"].numel())
    trainer.accumulation_steps = 1
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0  # so that no step can diverge
    sizes, peaks = [], []
    each = 0.0  # the bytes that an image more takes
    most = math.inf
    with EventStorage():
        while not sizes or (sizes[-1] < LARGEST and peaks[-1] + sizes[-1] * each <= SHARE * memory):
            size = 2 * sizes[-1] if sizes else 1
            fits = _fits(trainer, [image] * size)
            peak = torch.cuda.max_memory_reserved() if gpu else _peak()
            peak = max(comm.all_gather(peak if fits else math.inf))
            if peak > memory:
                most = size - 1
                break
            if sizes:
                each = (peak - peaks[-1]) / (size - sizes[-1])
            sizes.append(size)
            peaks.append(peak)
    if not sizes:
        raise ValueError(f"one image must fit into the {memory / GIB:.2f} GiB that there are")
    found = sizes[-1]
    needs = f"{peaks[-1] / GIB:.2f} GiB for {found} images"
    if each > 0:  # else building the model took more
        fixed = peaks[-1] - sizes[-1] * each
        found = max(int(min((SHARE * memory - fixed) // each, most)), 1)
        needs = f"{fixed / GIB:.2f} GiB and {each / GIB:.3f} GiB for each image"
    found *= cfg.train.accumulation_steps * comm.get_world_size()
    if comm.is_main_process():
        logger.info(
            "a step takes %s, of %s pixels: %.0f %% of %.1f GiB hold "
            "dataloader.train.total_batch_size=%d",
            needs,
            " x ".join(map(str, image["image"].shape[1:])),
            *(100 * SHARE, memory / GIB, found),
        )
    return found


def _fits(trainer: Trainer, batch: list[dict]) -> bool:
    """A training step, with the optimizer's moments from the first on; whether it was possible."""
    model, trainer.model = trainer.model, trainer.bare_model  # no process waits for another
    try:
        trainer._accumulate(batch)
        trainer.scaler.step(trainer.optimizer)
        trainer.scaler.update()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        trainer.model = model
        trainer.optimizer.zero_grad()


def _peak() -> int:
    """The most bytes that this process has had."""
    status = Path("/proc/self/status")
    if status.is_file():  # the other figure may be that of the process which has started this one
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _memory() -> int:
    """The bytes of the machine, or of the container."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return memory if text == "max" else min(memory, int(text))
