"""The training loop: mixed precision, clipping, accumulation, an average; exactly resumable."""

import contextlib
import logging
import random
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.engine import SimpleTrainer
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..messages import first_line, one_of
from .sharding import copy_weights, is_sharded, moments_like_parameters

AMP_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def seed_step(seed: int, rank: int, iteration: int) -> None:
    """Seed python, NumPy and torch for one iteration of one process.

    With random numbers a function of the iteration, a resumed run draws those that the interrupted
    one would have drawn, without any generator's state being saved.

    Args:
        seed: of the run.
        rank: of the process.
        iteration: from 0.
    """
    words = np.random.SeedSequence((seed, rank, iteration)).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]))


class Trainer(SimpleTrainer):
    """detectron2's SimpleTrainer with mixed precision, clipping and a seed for each step.

    Its state dict holds the optimizer, the gradient scaler, the average of the weights and what the
    model keeps outside its own state dict; the order of the data, the random numbers and the
    learning rate follow from the seed and the iteration.

    Attributes:
        average: the moving average of the weights, or None.
        copy: of a divided model, a whole one that is evaluated, or None.
        annealed: modules of the model with a method ``anneal``, which is told before each step how
            much of the training has passed, from 0 to 1.
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
        accumulation_steps: int = 1,
        ema_decay: float | None = None,
        copy: nn.Module | None = None,
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
            accumulation_steps: in so many parts goes a batch through the model, one after the
                other; the gradients are those of the whole batch. It must divide the batch's size.
                A model whose losses are divided by another number than that of its images, such as
                that of the boxes, has a method ``loss_divisor`` that gives it for a batch.
            ema_decay: of timm's ``ModelEmaV3``, which averages the weights; at iteration n it is
                at most 1 - n^(-2/3), or else the first weights would stay in the average for long.
                None keeps no average.
            copy: of a model that is divided among processes, a whole one for evaluating it.

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
        self.accumulation_steps = accumulation_steps
        self.copy = copy
        self.annealed = [m for m in self.bare_model.modules() if hasattr(m, "anneal")]
        self.average = None
        if ema_decay is not None:
            self.average = ModelEmaV3(self.bare_model, ema_decay, use_warmup=True)

    @property
    def bare_model(self) -> nn.Module:
        """The model without the wrapper of distributed training."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    @property
    def evaluated_model(self) -> nn.Module:
        """The model that is evaluated: the average or the copy, where there is one."""
        if self.copy is not None:
            return self.copy
        return self.bare_model if self.average is None else self.average.module

    def gather(self) -> None:
        """Give the copy of a divided model its weights; all processes must call it together."""
        if self.copy is not None:
            copy_weights(self.model, self.copy.to(self.device))

    def release(self) -> None:
        """Put the copy of a divided model out of the device's memory."""
        if self.copy is not None:
            self.copy.cpu()

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
        for module in self.annealed:
            module.anneal(self.iter / self.max_iter)
        self.optimizer.zero_grad()
        losses = self._accumulate(data)
        if self.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, **self.clip_grad)
        values = [loss.float().reshape(()) for loss in losses.values()]
        losses = dict(zip(losses, torch.stack(values).cpu().unbind()))  # in one transfer
        try:
            self._write_metrics(losses, data_time)
        except FloatingPointError as error:
            values = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
            raise self._diverged(f"the loss is not finite ({values})") from error
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.bare_model, step=self.iter + 1)

    def _accumulate(self, data: Sequence) -> dict[str, torch.Tensor]:
        """Add the gradients of a batch, part by part; returns its losses."""
        parts, shares = self._split(data)
        losses: dict[str, torch.Tensor] = {}
        for part, share in zip(parts, shares):
            with self._synchronizing(part is parts[-1]):
                with torch.autocast(self.device, self.amp_dtype, enabled=bool(self.amp_dtype)):
                    try:
                        found = self.model(part)
                    except FloatingPointError as error:  # as detectron2 calls predictions of NaN
                        raise self._diverged(first_line(error).rstrip(".")) from error
                    found = {name: share * loss for name, loss in found.items()}
                self.scaler.scale(sum(found.values())).backward()
            for name, loss in found.items():
                losses[name] = losses.get(name, 0) + loss.detach()
        return losses

    def _split(self, data: Sequence) -> tuple[list[Sequence], list[float]]:
        """The parts of a batch, and what their losses are multiplied by to add up to its own."""
        steps = self.accumulation_steps
        if steps == 1:
            return [data], [1.0]
        size = len(data) // steps
        parts = [data[i * size : (i + 1) * size] for i in range(steps)]
        divisor = getattr(self.bare_model, "loss_divisor", len)
        whole = divisor(data)
        return parts, [divisor(part) / whole for part in parts]

    def _synchronizing(self, last: bool) -> contextlib.AbstractContextManager:
        """Processes share the gradients of the last part of a batch alone, and so of all."""
        if is_sharded(self.model):
            self.model.set_requires_gradient_sync(last)
        if last or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def _diverged(self, what: str) -> FloatingPointError:
        advice = "a lower optimizer.lr or train.clip_grad.enabled=True may help"
        return FloatingPointError(f"iteration {self.iter}: {what}: {advice}")

    def state_dict(self) -> dict[str, Any]:
        """Iteration, optimizer, gradient scaler, seed, loss normalizers and the average."""
        state = super().state_dict()
        state.pop("hooks", None)  # the learning rate's is a function of the iteration
        normalizers = {
            name: module.loss_normalizer
            for name, module in self._dense_detectors()
            if hasattr(module, "loss_normalizer")
        }
        if self.average is not None:
            state["ema"] = self.average.module.state_dict()
        scaler = self.scaler.state_dict()
        return {**state, "scaler": scaler, "seed": self.seed, "loss_normalizers": normalizers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue an interrupted run.

        Args:
            state_dict: what :meth:`state_dict` gave in that run.

        Raises:
            ValueError: if this run's seed is another, or but one of the two has an average.
        """
        missing = {"seed", "scaler", "loss_normalizers"} - set(state_dict)
        if missing:
            raise ValueError(
                f"the checkpoint has no {', '.join(sorted(missing))}: it is of another program, "
                "and can be train.init_checkpoint, but not be continued"
            )
        if state_dict["seed"] != self.seed:
            raise ValueError(
                f"train.seed={self.seed} must be {state_dict['seed']}, that of the interrupted run"
            )
        averaged = "ema" in state_dict
        if averaged != (self.average is not None):
            raise ValueError(
                f"train.model_ema.enabled={not averaged} must be {averaged}, as it was in the "
                "interrupted run"
            )
        if self.average is not None:
            self.average.module.load_state_dict(state_dict["ema"])
        moments = moments_like_parameters(self.optimizer, state_dict["optimizer"])
        super().load_state_dict({**state_dict, "optimizer": moments})
        if state_dict["scaler"]:  # empty where the interrupted run needed none
            self.scaler.load_state_dict(state_dict["scaler"])
        for name, module in self._dense_detectors():
            if name in state_dict["loss_normalizers"]:
                module.loss_normalizer = state_dict["loss_normalizers"][name]

    def _dense_detectors(self) -> list[tuple[str, DenseDetector]]:
        """RetinaNet and FCOS, which divide losses by a running mean that is no buffer of theirs."""
        modules = self.bare_model.named_modules()
        return [(name, module) for name, module in modules if isinstance(module, DenseDetector)]
