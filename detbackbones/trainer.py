"""The training loop: mixed precision on any device, gradient clipping, exactly resumable."""

import logging
import random
import re
import resource
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from detectron2.engine import SimpleTrainer
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils.events import EventWriter, get_event_storage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .messages import one_of

AMP_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def seed_step(seed: int, rank: int, iteration: int) -> None:
    """Seed python, NumPy and torch for one iteration of one process.

    With random numbers a function of the iteration, a resumed run draws those that the interrupted
    one would have drawn, without any generator's state being saved.
    """
    words = np.random.SeedSequence((seed, rank, iteration)).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]))


class Trainer(SimpleTrainer):
    """detectron2's SimpleTrainer with mixed precision, clipping and a seed for each step.

    Its state dict holds the optimizer, the gradient scaler and what the model keeps outside its own
    state dict; the order of the data, the random numbers and the learning rate follow from the seed
    and the iteration.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable,
        optimizer: torch.optim.Optimizer,
        *,
        device: str,
        seed: int,
        rank: int = 0,
        amp_dtype: str | None = None,
        clip_grad: dict[str, float] | None = None,
    ):
        """
        Args:
            model: returns a dict of losses for a batch in training mode.
            data_loader: endless batches; ``start_iter`` is set on it when training resumes.
            optimizer: over the model's parameters.
            device: "cuda" or "cpu", what the model lies on.
            seed: of all random numbers that the model draws.
            rank: this process.
            amp_dtype: "float16" (with a gradient scaler) or "bfloat16"; None is full precision.
            clip_grad: arguments of ``torch.nn.utils.clip_grad_norm_``, such as ``max_norm``.

        Raises:
            ValueError: for another ``amp_dtype``.
        """
        if amp_dtype is not None:
            one_of("train.amp.dtype", amp_dtype, AMP_DTYPES)
        super().__init__(model, data_loader, optimizer)
        self.device = device
        self.seed, self.rank = seed, rank
        self.amp_dtype = AMP_DTYPES.get(amp_dtype)
        self.scaler = torch.amp.GradScaler(device, enabled=amp_dtype == "float16")
        self.clip_grad = clip_grad

    def before_train(self) -> None:
        """Let the data start where training does."""
        if hasattr(self.data_loader, "start_iter"):
            self.data_loader.start_iter = self.start_iter
        elif self.start_iter:
            logging.getLogger(__name__).warning(
                "the data loader has no start_iter: it begins anew, so this run does not continue "
                "exactly where the last one ended"
            )
        super().before_train()

    def run_step(self) -> None:
        """One iteration: data, losses, gradients, clipping, update."""
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        seed_step(self.seed, self.rank, self.iter)
        with torch.autocast(self.device, self.amp_dtype, enabled=self.amp_dtype is not None):
            losses = self.model(data)
            total = sum(losses.values())
        self.optimizer.zero_grad()
        self.scaler.scale(total).backward()
        if self.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, **self.clip_grad)
        self._write_metrics(losses, data_time)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """Iteration, optimizer, gradient scaler, seed and loss normalizers."""
        state = super().state_dict()
        state.pop("hooks", None)  # the learning rate's is a function of the iteration
        normalizers = {
            name: module.loss_normalizer
            for name, module in self._dense_detectors()
            if hasattr(module, "loss_normalizer")
        }
        scaler = self.scaler.state_dict()
        return {**state, "scaler": scaler, "seed": self.seed, "loss_normalizers": normalizers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state; the seed must be that of the interrupted run."""
        if state_dict["seed"] != self.seed:
            raise ValueError(
                f"train.seed={self.seed} differs from the interrupted run's {state_dict['seed']}: "
                "resume with that one"
            )
        super().load_state_dict(state_dict)
        if state_dict["scaler"]:  # empty where the interrupted run needed none
            self.scaler.load_state_dict(state_dict["scaler"])
        for name, module in self._dense_detectors():
            if name in state_dict["loss_normalizers"]:
                module.loss_normalizer = state_dict["loss_normalizers"][name]

    def _dense_detectors(self) -> list[tuple[str, DenseDetector]]:
        """RetinaNet and FCOS, which divide losses by a running mean that is no buffer of theirs."""
        model = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        return [(n, m) for n, m in model.named_modules() if isinstance(m, DenseDetector)]


def main_losses(names: Iterable[str]) -> list[str]:
    """Those of the names that are losses, without a decoder's inner layers and denoising.

    A DETR has ``loss_bbox``, and beside it ``loss_bbox_0`` or ``loss_bbox_aux_0`` and
    ``loss_bbox_dn_0`` for each layer.
    """
    losses = [name for name in names if name == "total_loss" or name.startswith("loss")]
    return [n for n in losses if re.sub(r"_(aux_|dn_)?\d+$", "", n) not in set(losses) - {n}]


class ProgressPrinter(EventWriter):
    """Logs iteration, time left, losses, learning rate, speed and memory in one line."""

    def __init__(self, max_iter: int, images_per_iter: int, window: int = 20):
        """
        Args:
            max_iter: where training ends.
            images_per_iter: images in a batch, over all processes.
            window: iterations that losses and speed are medians and means of.
        """
        self.max_iter, self.images_per_iter, self.window = max_iter, images_per_iter, window
        self.logger = logging.getLogger("detbackbones.progress")
        self._last: tuple[int, float] | None = None

    def write(self) -> None:
        """Log the state after the current iteration."""
        storage = get_event_storage()
        iteration = storage.iter + 1
        if iteration > self.max_iter:  # detectron2 writes once more after training
            return
        histories = storage.histories()
        losses = {name: histories[name].median(self.window) for name in main_losses(histories)}
        now = time.perf_counter()
        speed = eta = ""
        if self._last is not None and iteration > self._last[0]:
            seconds = (now - self._last[1]) / (iteration - self._last[0])
            left = int(seconds * (self.max_iter - iteration))
            eta = f"  eta {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
            speed = f"  {self.images_per_iter / seconds:.1f} img/s"
        self._last = (iteration, now)
        lr = storage.latest().get("lr", (float("nan"), 0))[0]
        self.logger.info(
            f"iter {iteration}/{self.max_iter}{eta}  "
            + "  ".join(f"{name} {value:.4g}" for name, value in losses.items())
            + f"  lr {lr:.3g}{speed}  {_memory()}"
        )


def _memory() -> str:
    """The peak of memory: the GPU's, or that of this process."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB on the GPU"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB"
