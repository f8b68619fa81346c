"""A picture of what a detector gets wrong: which classes, and which kinds of errors."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from hotcoco import COCOeval
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SCORE = 0.5  # a detection below it is none in the matrix
MOST = 10  # classes in a plot
KINDS = {  # of errors, by TIDE's names
    "Cls": "wrong class",
    "Loc": "poor overlap",
    "Both": "both of these",
    "Dupe": "found twice",
    "Bkg": "nothing is there",
    "Miss": "not found",
}


def draw_errors(evaluations: Mapping[str, COCOeval], path: Path) -> Path:
    """Draw a row for each task: precision over recall, confused classes, and costs of errors.

    A detection is right whose overlap is at least 0.5. The kinds of errors, and what each costs in
    AP50, are those of TIDE (Bolya et al., arXiv 2008.08115).

    Args:
        evaluations: by task, of :class:`detbackbones.data.CocoEvaluator`; at least one.
        path: of the PNG file.

    Returns:
        the path.
    """
    figure = Figure((19, 6 * len(evaluations)), dpi=80, layout="constrained")
    rows = figure.subplots(len(evaluations), 3, squeeze=False)
    for (task, evaluation), (curves, matrix, kinds) in zip(evaluations.items(), rows):
        _draw_curves(evaluation, curves)
        curves.set_title(f"{task}: precision over recall")
        _draw_matrix(evaluation, matrix)
        matrix.set_title(f"{task}: objects, and detections with scores from {SCORE}")
        _draw_kinds(evaluation, kinds)
        kinds.set_title(f"{task}: what AP50 would gain without these errors")
    figure.savefig(path)
    return path


def _draw_curves(evaluation: COCOeval, axes: Axes) -> None:
    """Precision over recall of the classes that are hardest."""
    precision = evaluation.eval["precision"][0, :, :, 0, -1]  # IoU 0.5, all sizes: (101, classes)
    names = [x["name"] for x in evaluation.coco_gt.load_cats(evaluation.params.cat_ids)]
    there = [i for i in range(len(names)) if precision[0, i] >= 0]
    for i in sorted(there, key=lambda i: precision[:, i].mean())[:MOST]:
        ap = 100 * precision[:, i].mean()
        axes.plot(evaluation.params.rec_thrs, precision[:, i], label=f"{names[i]}, AP50 {ap:.1f}")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", title="hardest classes" if len(there) > MOST else None)


def _draw_matrix(evaluation: COCOeval, axes: Axes) -> None:
    """How many objects of a class were detected as which, of the classes most confused."""
    confused = evaluation.confusion_matrix(min_score=SCORE)
    matrix, names = confused["matrix"].astype(int), [*confused["cat_names"], "nothing"]
    wrong = matrix - np.diag(np.diag(matrix))
    classes = np.argsort(-(wrong[:-1, :-1].sum(0) + wrong[:-1, :-1].sum(1)), kind="stable")
    kept = [*sorted(classes[:MOST]), len(names) - 1]
    matrix, names = matrix[np.ix_(kept, kept)], [names[i] for i in kept]
    axes.imshow(matrix, cmap="Blues", vmax=1.5 * max(matrix.max(), 1), aspect="auto")
    for (row, column), count in np.ndenumerate(matrix):
        if (row, column) != (len(kept) - 1, len(kept) - 1):
            axes.text(column, row, count, ha="center", va="center")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="detected", ylabel="object")


def _draw_kinds(evaluation: COCOeval, axes: Axes) -> None:
    """What each kind of error costs, in points of AP50."""
    costs = evaluation.tide_errors()["delta_ap"]
    bars = axes.barh([*KINDS.values()], [100 * costs[kind] for kind in KINDS])
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("AP50, percent")
