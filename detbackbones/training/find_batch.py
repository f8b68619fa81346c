"""The largest batch that the memory of a device holds, from a few training steps."""

import itertools
import logging
import os
import resource
import sys
from dataclasses import dataclass
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
STEADY = 1.25  # by which an image may take more than those of the try before


@dataclass(frozen=True)
class BatchSize:
    """How many images fit.

    Attributes:
        images: of all processes, for ``dataloader.train.total_batch_size``.
        fixed: bytes in a process that do not depend on the images.
        each: bytes for each image.
        memory: bytes that a process has.
    """

    images: int
    fixed: float
    each: float
    memory: float


def find_batch(cfg: DictConfig, *, memory: float | None = None) -> BatchSize:
    """Find the largest batch that fits into memory.

    Steps are trained with 1, 2, 4, ... images, at most 32, until an image takes what one took
    before; from there memory is taken to grow in a line, and nine tenths of it may be used. The
    images are the largest of the first 32 of the training. Nothing is kept of the training.

    Args:
        cfg: as of :func:`detbackbones.training.train`.
        memory: bytes that a process has; by default those of the GPU, or a fair part of the
            machine's.

    Raises:
        ValueError, OSError, ImportError: if a setting, a file or the data is wrong, or the memory
            does not hold one image.
    """
    cfg = check_config(cfg)
    trainer = build_trainer(cfg, loads_all=False)
    load_weights(cfg, Checkpointer(trainer.bare_model, save_to_disk=False), None)
    gpu = cfg.train.device == "cuda"
    if memory is None:
        memory = torch.cuda.mem_get_info()[1] if gpu else _memory() / comm.get_local_size()
    batches = itertools.islice(trainer.data_loader, LARGEST)
    images = itertools.islice(itertools.chain.from_iterable(batches), LARGEST)
    image = max(images, key=lambda image: image["image"].numel())
    trainer.accumulation_steps = 1
    sizes, peaks, each = [], [], []
    with EventStorage():
        size = 1
        while size <= LARGEST:
            _step(trainer, [image] * size)
            sizes.append(size)
            peaks.append(torch.cuda.max_memory_reserved() if gpu else _peak())
            if size > 1:
                each.append((peaks[-1] - peaks[-2]) / (sizes[-1] - sizes[-2]))
            steady = len(each) > 1 and 0 < each[-1] <= STEADY * each[-2]
            full = each and peaks[-1] + size * each[-1] > SHARE * memory
            if steady or full:
                break
            size *= 2
    fixed = peaks[-1] - sizes[-1] * each[-1]
    if each[-1] > 0:
        found = max(int((SHARE * memory - fixed) // each[-1]), 0)
    else:  # more took no more than what building the model took
        found = sizes[-1] if fixed <= SHARE * memory else 0
    found = min(comm.all_gather(found))
    shape = " x ".join(map(str, image["image"].shape[1:]))
    needs = f"{fixed / GIB:.2f} GiB and {each[-1] / GIB:.3f} GiB for each image of {shape}"
    steps = cfg.train.accumulation_steps
    if not found:
        raise ValueError(f"one image must fit into {memory / GIB:.2f} GiB: a step takes {needs}")
    result = BatchSize(found * steps * comm.get_world_size(), fixed, each[-1], memory)
    if comm.is_main_process():
        logger.info(
            "a step takes %s: %.0f %% of %.1f GiB hold dataloader.train.total_batch_size=%d",
            *(needs, 100 * SHARE, memory / GIB, result.images),
        )
    return result


def _step(trainer: Trainer, batch: list[dict]) -> None:
    trainer._accumulate(batch)
    trainer.optimizer.step()  # from the first on there are its moments, too
    trainer.optimizer.zero_grad()


def _peak() -> int:
    """The most bytes that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _memory() -> int:
    """The bytes of the machine, or of the container."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return memory if text == "max" else min(memory, int(text))
