"""The page of models, from what the contract found."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import timm
import torchvision
from tabulate import tabulate

from .contract import failures

COMMAND = "detbackbones conformance --output report.json --page docs/MODELS.md"


def mixed(values: Iterable[str]) -> str:
    """The value that all share, or each with its count."""
    counts = Counter(values)
    if len(counts) < 2:
        return "".join(counts)
    order = sorted(counts, key=lambda value: (-counts[value], value))
    return ", ".join(f"{value} ({counts[value]})" for value in order)


def page(rows: list[dict[str, Any]]) -> str:
    """What a user reads before choosing a model, as Markdown.

    Args:
        rows: of :func:`run_contract`, in any order.
    """
    rows = sorted(rows, key=lambda row: (row["source"], row["family"], row["name"]))
    sources = sorted({row["source"] for row in rows})
    built = [row for row in rows if row["points"]["build"] == "ok"]
    refused = [row for row in rows if row["points"]["build"].startswith("refused: ")]
    failed = [row for row in rows if failures(row) and row not in refused]
    counts = {
        "architectures": rows,
        "pass": [row for row in rows if not failures(row)],
        "pass, levels compared with the source model's": [
            row for row in rows if set(row["points"].values()) == {"ok"}
        ],
        "refused": refused,
        "fail": failed,
    }
    for rule in sorted({row["size"] for row in built}, key=lambda rule: (rule != "any", rule)):
        counts[f"images: {rule}"] = [row for row in built if row["size"] == rule]
    totals = [
        (name, *(sum(row["source"] == source for row in found) for source in sources))
        for name, found in counts.items()
    ]
    parts = [
        "# Models",
        f"What `detbackbones conformance` found with timm {timm.__version__} and torchvision "
        f"{torchvision.__version__.partition('+')[0]}; `{COMMAND}` writes this page. What "
        "a model must do to pass is said by `detbackbones conformance --help`.",
        tabulate(totals, ("", *sources), "pipe"),
        "Levels are given by their strides. A level is resampled (bilinearly) where the model's "
        "own map is no whole fraction of the image, or of one that is no power of two. Images of "
        "any size are padded to multiples of the coarsest stride; else to multiples of the number "
        "given, or to a square, and larger images are refused: *or img_size* where the model can "
        "be built for a larger square by that argument, *only* where it cannot. The neck is what "
        "`build_pyramid` makes: p2 to p6. The levels of models of more than 10 million "
        "parameters are not compared with the source model's unless `--max-params` is raised.",
    ]
    for source in sources:
        families = {}
        for row in rows:
            if row["source"] == source:
                families.setdefault(row["family"], []).append(row)
        columns = {
            "levels": lambda row: " ".join(
                f"{stride}{' resampled' * resampled}" for _, _, stride, resampled in row["levels"]
            ),
            "size": lambda row: row["size"],
            "neck": lambda row: row.get("neck", "none"),
            "batch norm": lambda row: " + ".join(row["batch_norm"]) or "none",
        }
        lines = [
            (
                family,
                len(group),
                *(mixed(value(row) for row in group if row in built) for value in columns.values()),
            )
            for family, group in families.items()
        ]
        header = ("family", "architectures", *columns)
        parts += [f"## {source}", tabulate(lines, header, "pipe")]
    for title, found in (("Refused", refused), ("Failed", failed)):
        if found:
            reasons = [
                f"- {row['source']} `{row['name']}`: {point}: {why}"
                for row in found
                for point, why in failures(row).items()
            ]
            parts += [f"## {title}", "\n".join(reasons)]
    return "\n\n".join(parts) + "\n"
