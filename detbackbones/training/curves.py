"""The curves of a training run: losses, learning rate and metrics over the iterations."""

import json
import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .progress import main_losses

METRICS = r"(bbox|segm|keypoints)/AP(50)?$|sem_seg/mIoU$|panoptic_seg/PQ$|similarity/cosine$"


def draw_curves(metrics_file: str | Path, path: str | Path) -> Path:
    """Draw the losses, the learning rate and the metrics of a training run over its iterations.

    Left are the total loss, its parts and, below them, the learning rate; right are AP, AP50, mIoU
    and PQ, if the run was evaluated. Losses of a decoder's inner layers are left out.
    Where a resumed run repeats an iteration, the later value counts.

    Args:
        metrics_file: the `metrics.json` that detectron2's `JSONWriter` wrote.
        path: the PNG file to write; its folder is made.

    Returns:
        `path`.

    Raises:
        ValueError: if the file has no losses.
    """
    curves = read_curves(metrics_file)
    losses = main_losses(curves)
    hidden = any(name.startswith("loss") and name not in losses for name in curves)
    metrics = [k for k in curves if re.search(METRICS, k)]
    if not losses:
        raise ValueError(
            f"metrics_file={str(metrics_file)!r} must have losses, such as 'total_loss'"
        )

    columns = [["loss", "metric"], ["lr", "metric"]] if metrics else [["loss"], ["lr"]]
    figure = Figure((6.5 * len(columns[0]), 5), dpi=100, layout="constrained")
    axes = figure.subplot_mosaic(columns, height_ratios=[4, 1])
    for name in sorted(losses, key=lambda name: (name != "total_loss", name)):
        iterations, values = _smooth(*curves[name])
        look = {"lw": 2, "color": "black"} if name == "total_loss" else {"lw": 1.2}
        label = f"{name}, auxiliary losses included" if name == "total_loss" and hidden else name
        axes["loss"].plot(iterations, values, _marker(values), label=label, **look)
    if "lr" in curves:
        axes["lr"].plot(*curves["lr"], _marker(curves["lr"][0]), color="gray", lw=1)
    for name in sorted(metrics):
        axes["metric"].plot(*curves[name], marker="o", markersize=4, label=name)
    for key, label in ("loss", "loss"), ("lr", "learning rate"), ("metric", "percent"):
        if key in axes:
            axes[key].set_ylabel(label)
            axes[key].grid(alpha=0.3)
            axes[key].set_ylim(bottom=min(0, axes[key].dataLim.y0))
            if key != "lr":
                axes[key].sharex(axes["lr"])
                axes[key].legend(fontsize=9)
            axes[key].set_xlabel("iteration")
            axes[key].xaxis.set_major_locator(MaxNLocator(integer=True))
    iterations = np.concatenate([curves[name][0] for name in [*losses, *metrics]])
    margin = 0.03 * np.ptp(iterations) + 0.5  # the last evaluation comes after the last loss
    axes["lr"].set_xlim(min(0, iterations.min()) - margin, iterations.max() + margin)
    axes["loss"].tick_params(labelbottom=False)
    axes["loss"].set_xlabel("")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def read_curves(metrics_file: str | Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the iterations and the values of each scalar, in the order of the iterations."""
    scalars: dict[str, dict[int, float]] = {}
    for line in Path(metrics_file).read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # a run that was killed leaves a line unfinished
        iteration = row.pop("iteration")
        for name, value in row.items():
            scalars.setdefault(name, {})[iteration] = value
    return {
        name: tuple(np.array(sorted(values.items()), dtype=float).T)
        for name, values in scalars.items()
    }


def _marker(values: np.ndarray) -> str:
    """The format of a curve: a line, or a dot where there is one value alone."""
    return "-" if len(values) > 1 else "."


def _smooth(iterations: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    half = len(values) // 100  # a moving mean over 2% of the run
    window = np.ones(2 * half + 1) / (2 * half + 1)
    return iterations[half : len(values) - half], np.convolve(values, window, mode="valid")
