"""A probe: a head for semantic segmentation is trained on a frozen backbone, and evaluated."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import LazyConfig
from matplotlib.figure import Figure
from omegaconf import DictConfig
from tabulate import tabulate

from ..backbones.feature_backbone import FeatureBackbone
from ..config import config_folder
from .feature_cache import cache_features
from .run import check_config, fit, prepare

COLUMNS = {
    "model": "model",
    "weights": "weights",
    "head": "head",
    "mIoU": "mIoU",
    "accuracy": "accuracy",
    "seconds": "seconds",
    "backbone_parameters": "parameters of the backbone, M",
    "trained_parameters": "trained, M",
}


def list_heads() -> list[str]:
    """Names of the heads, each a config in configs/probe."""
    return sorted(path.stem for path in (config_folder() / "probe").glob("*.py"))


def probe_config(model: str, weights: str, head: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The config of a probe.

    Args:
        model: a name of timm's.
        weights: "pretrained", "random" (as timm draws them), or the file of a checkpoint.
        head: see :func:`list_heads`.
        overrides: ``key=value`` words for the head's config.
    """
    cfg = check_config(LazyConfig.load(str(config_folder() / "probe" / f"{head}.py")), overrides)
    backbone = cfg.model.backbone.get("bottom_up", cfg.model.backbone)
    backbone.model_name = model
    backbone.pretrained = weights == "pretrained"
    if weights not in ("pretrained", "random"):
        backbone.checkpoint_path = weights
    return cfg


def probe(cfg: DictConfig, max_bytes: int) -> dict[str, Any]:
    """Train the head and evaluate it.

    Args:
        cfg: of :func:`probe_config`; ``train.output_dir`` exists.
        max_bytes: of the features that are kept; 0 keeps none.

    Returns:
        mIoU and the accuracy of the pixels in percent, the seconds of training with evaluation and
        pictures, and the number of parameters: of the frozen backbone, and of what is trained.
    """
    run = prepare(cfg)
    backbone = next(m for m in run.model.modules() if isinstance(m, FeatureBackbone))
    if max_bytes:
        cache_features(backbone, max_bytes)
    start = time.perf_counter()
    metrics = fit(run)["sem_seg"]
    seconds = time.perf_counter() - start
    return {
        "mIoU": metrics["mIoU"],
        "accuracy": metrics["pACC"],
        "seconds": seconds,
        "backbone_parameters": sum(p.numel() for p in backbone.parameters()),
        "trained_parameters": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
    }


def label(row: dict[str, Any]) -> str:
    """What the pictures call the backbone of a probe."""
    return row["model"] + ("" if row["weights"] == "pretrained" else f", {row['weights']}")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Probes as a Markdown table, and a line for each that failed.

    Args:
        rows: dicts of model, weights, head, and what :func:`probe` returns or an "error".
    """
    shown = []
    for row in rows:
        millions = {k: row[k] / 1e6 for k in row if k.endswith("_parameters")}
        shown.append([{**row, **millions}.get(key) for key in COLUMNS])
    formats = ("", "", "", ".1f", ".1f", ".0f", ".2f", ".4f")
    text = tabulate(shown, COLUMNS.values(), tablefmt="github", floatfmt=formats, missingval="-")
    failed = [f"\n- {label(row)}, {row['head']}: {row['error']}" for row in rows if "error" in row]
    return text + "\n" + "".join(failed)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the mIoU of each backbone, a bar for each head.

    Args:
        rows: as of :func:`table`.
        path: the picture to write.
    """
    backbones = list(dict.fromkeys(label(row) for row in rows))
    heads = list(dict.fromkeys(row["head"] for row in rows))
    height = 0.8 / len(heads)
    figure = Figure((8, 1.4 + 0.3 * len(backbones) * (len(heads) + 1)), 100, layout="constrained")
    axes = figure.subplots()
    for i, head in enumerate(heads):
        runs = [row for row in rows if row["head"] == head]
        at = [backbones.index(label(row)) + (i - (len(heads) - 1) / 2) * height for row in runs]
        bars = axes.barh(at, [row.get("mIoU", 0) for row in runs], height, label=head)
        texts = [f"{row['mIoU']:.1f}" if "mIoU" in row else "failed" for row in runs]
        axes.bar_label(bars, texts, padding=3, fontsize=9)
    axes.set_yticks(range(len(backbones)), backbones)
    axes.set_ylim(len(backbones) - 0.5, -0.5)
    axes.set_xlim(0, 108)  # with room for the figure of a long bar
    axes.set_xlabel("mIoU, percent")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(title="head", loc="outside right upper", frameon=False)
    figure.savefig(path)
