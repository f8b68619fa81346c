"""The learning-rate range test: at which rates does the loss fall, and where does it rise?"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from detectron2.engine import HookBase
from detectron2.engine.hooks import LRScheduler
from detectron2.utils import comm
from fvcore.common.param_scheduler import ExponentialParamScheduler
from matplotlib.figure import Figure
from omegaconf import DictConfig

from .build import build_trainer, load_weights
from .checkpoint import Checkpointer
from .run import check_config

logger = logging.getLogger(__name__)

RISEN = 2.0  # times the least loss: the test ends
MEMORY = 0.9  # of the moving mean of the loss


@dataclass(frozen=True)
class RangeTest:
    """What a learning-rate range test saw.

    Attributes:
        rates: of the steps, growing.
        losses: a moving mean of the loss, as long as ``rates``.
        best: the middle of the tenth of the steps in which the loss falls most, before its least.
        picture: the PNG file.
    """

    rates: np.ndarray
    losses: np.ndarray
    best: float
    picture: Path


def find_lr(
    cfg: DictConfig, *, lowest: float = 1e-6, highest: float = 0.1, steps: int = 100
) -> RangeTest:
    """Train for some steps with a learning rate that grows from each to the next.

    As in Smith, arXiv 1506.01186, but with equal factors between the steps. It ends early where
    the loss has doubled. Nothing is kept of the training; ``find_lr.png`` in ``train.output_dir``
    shows the loss over the rates.

    Args:
        cfg: as of :func:`detbackbones.training.train`.
        lowest: the first value of ``optimizer.lr``.
        highest: the last.
        steps: how many.

    Raises:
        ValueError, OSError, ImportError: if a setting, a file or the data is wrong.
    """
    if not 0 < lowest < highest:
        raise ValueError(f"lowest={lowest} must be above 0, and below highest={highest}")
    if steps < 10:
        raise ValueError(f"steps={steps} must be at least 10")
    cfg = check_config(cfg)
    trainer = build_trainer(cfg, loads_all=False)
    load_weights(cfg, Checkpointer(trainer.bare_model, save_to_disk=False), None)
    factor = lowest / cfg.optimizer.lr
    schedule = ExponentialParamScheduler(factor, highest / lowest)
    watching = _Watch()
    trainer.annealed = []  # the loss is to change with the rate alone
    trainer.register_hooks([LRScheduler(scheduler=schedule), watching])
    try:
        trainer.train(0, steps)
    except (_Risen, FloatingPointError) as end:
        logger.info("the test ends after %d of %d steps: %s", len(watching.losses), steps, end)
    losses = np.array(watching.losses)
    rates = lowest * (highest / lowest) ** (np.arange(len(losses)) / steps)
    if len(losses) < 10:
        raise ValueError(
            f"lowest={lowest} must be less: the loss rises after {len(losses)} steps already"
        )
    span = steps // 10
    falls = losses[:-span] - losses[span:]
    best = float(rates[falls[: max(losses.argmin(), 1)].argmax() + span // 2])
    picture = Path(cfg.train.output_dir, "find_lr.png")
    if comm.is_main_process():
        _draw(rates, losses, best, picture)
        logger.info(
            "the loss falls fastest at optimizer.lr=%.1e, and is least at %.1e: wrote %s",
            best,
            rates[losses.argmin()],
            picture,
        )
    return RangeTest(rates, losses, best, picture)


class _Risen(BaseException):
    """The loss is far above its least; no ``Exception``, which detectron2 would log as a fault."""


class _Watch(HookBase):
    """Keeps a moving mean of the loss, corrected for its start as Adam does."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self._mean = 0.0

    def after_step(self) -> None:
        loss = comm.all_gather(self.trainer.storage.latest().get("total_loss", (None,))[0])[0]
        self._mean = MEMORY * self._mean + (1 - MEMORY) * loss
        self.losses.append(self._mean / (1 - MEMORY ** (len(self.losses) + 1)))
        if self.losses[-1] > RISEN * min(self.losses):
            raise _Risen(f"the loss has risen to {self.losses[-1]:.4g} from {min(self.losses):.4g}")


def _draw(rates: np.ndarray, losses: np.ndarray, best: float, path: Path) -> None:
    figure = Figure((7, 4.5), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses)
    axes.axvline(best, color="C1", label=f"falls fastest at {best:.1e}")
    axes.set(xscale="log", xlabel="optimizer.lr", ylabel="loss, moving mean")
    axes.set_ylim(top=min(losses.max(), 2 * losses[0]))
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
