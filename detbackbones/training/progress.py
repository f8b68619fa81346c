"""What a training run prints of its progress."""

import logging
import re
import resource
import time
from collections.abc import Iterable

import torch
from detectron2.utils.events import EventWriter, get_event_storage


def main_losses(names: Iterable[str]) -> list[str]:
    """The losses among some metrics, without those of inner layers, encoders and denoising.

    A DETR has ``loss_bbox``, and beside it ``loss_bbox_enc``, ``loss_bbox_0`` or
    ``loss_bbox_aux_0``, and ``loss_bbox_dn_0``.

    Args:
        names: of the metrics.

    Returns:
        those of the losses, in the order given.
    """
    losses = [name for name in names if name == "total_loss" or name.startswith("loss")]
    main = {name: re.sub(r"(_aux|_dn|_enc)?(_\d+)?$", "", name) for name in losses}
    return [name for name in losses if main[name] == name or main[name] not in main]


class ProgressPrinter(EventWriter):
    """Logs iteration, time left, losses, learning rate, speed and memory in one line."""

    def __init__(self, max_iter: int, images_per_iter: int, window: int = 20):
        """
        Args:
            max_iter: where training ends.
            images_per_iter: images in a batch, over all processes.
            window: the losses are medians over this many iterations.
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
