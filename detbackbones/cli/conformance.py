"""Check that every timm architecture and every torchvision classifier works as a backbone.

    detbackbones conformance --output report.json --page docs/MODELS.md
    detbackbones conformance --source timm --pattern '*vit*'

The contract, with nothing but the name of the model given:

  build       the backbone builds with default levels
  sizes       two images of different odd sizes go through, padded as detectron2 pads them; so does
              a larger pair; a model of a fixed size refuses what is larger
  shapes      each level has the channels, rows and columns that output_shape() says
  neck        build_pyramid gives p2 to p6
  gradients   a loss on the levels reaches every parameter; no level leaves a parameter unused
  batch norm  with norm="FrozenBN", folded and not, the levels are the source model's; three
              training steps with weight decay change no norm, and every other parameter
  weights     the classification model's weights load, and the levels are the source model's

All but the last two run on the meta device, without memory or arithmetic. Each model has a process
and a time limit of its own, so that a crash is a row of the report and not its end. The exit status
is 1 if a model failed.
"""

import argparse
import fnmatch
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from ..backbones import BACKBONES
from ..testing.contract import SUBJECTS, failures, new_row
from ..testing.page import page
from ..testing.run import run_contract
from .program import fail, new_parser


def open_report(path: Path, resume: bool, overwrite: bool) -> list[dict[str, Any]]:
    """Prepare the file of the report.

    Returns:
        the rows that it has and keeps.
    """
    if path.exists() and not (resume or overwrite):
        raise FileExistsError(
            f"--output {path} exists: continue it with --resume or replace it with --overwrite"
        )
    text = path.read_text() if resume and path.exists() else ""
    text = text[: text.rfind("\n") + 1]  # a run that was killed may have left half a line
    try:
        rows = [json.loads(line) for line in text.splitlines()]
        if not all("points" in row for row in rows):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f"--output {path} is no report: it cannot be continued") from None
    path.write_text(text)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Families with their counts, the totals, and the failed models with the reasons."""
    groups = Counter((row["source"], row["family"]) for row in rows)
    failed = Counter((row["source"], row["family"]) for row in rows if failures(row))
    lines = [(*key, n, n - failed[key], failed[key]) for key, n in sorted(groups.items())]
    lines.append(("total", "", len(rows), len(rows) - failed.total(), failed.total()))
    parts = [tabulate(lines, ("source", "family", "architectures", "passed", "failed"))]
    parts += [
        f"{row['source']} {row['name']}: {point}: {why}"
        for row in sorted(rows, key=lambda row: (row["source"], row["name"]))
        for point, why in failures(row).items()
    ]
    return "\n".join(parts)


def _number(kind: type) -> Callable[[str], float]:
    def positive(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} must be above 0")
        return value

    return positive


def parse_args(words: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("conformance", __doc__)
    parser.add_argument("--source", choices=list(BACKBONES), help="default: all")
    parser.add_argument("--pattern", default="*", help="names of models; default: '%(default)s'")
    parser.add_argument("--jobs", type=_number(int), default=2, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="file for the report, a line of JSON a model")
    parser.add_argument(
        "--compare",
        choices=("raw",),
        help="try timm.create_model(name, features_only=True) instead of the backbones",
    )
    parser.add_argument(
        "--page", type=Path, help="file for the page of models; it is generated, and replaced"
    )
    parser.add_argument(
        "--time-limit", type=_number(float), default=300, help="seconds; default: %(default)s"
    )
    parser.add_argument(
        "--max-params",
        type=_number(float),
        default=10,
        help="millions of parameters, above which no real numbers are used; default: %(default)s",
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue the report in --output")
    existing.add_argument("--overwrite", action="store_true", help="replace the report")
    args = parser.parse_args(words)
    if args.compare and args.source == "torchvision":
        parser.error("--compare raw is for timm: torchvision has no extractors of its own")
    if (args.resume or args.overwrite) and not args.output:
        parser.error("--resume and --overwrite are for the file of --output")
    if args.page and not args.page.parent.is_dir():
        parser.error(f"--page {args.page} is in a folder that does not exist")
    return args


def main(words: Sequence[str] | None = None) -> None:
    args = parse_args(words)
    sources = [args.source] if args.source else list(BACKBONES)
    todo = [
        (source, name)
        for source in (["raw"] if args.compare else sources)
        for name in fnmatch.filter(SUBJECTS[source].names(), args.pattern)
    ]
    try:
        if not todo:
            raise ValueError(f"--pattern {args.pattern!r} is no model of {' or '.join(sources)}")
        rows = open_report(args.output, args.resume, args.overwrite) if args.output else []
        done = {(row["source"], row["name"]) for row in rows}
        todo = [new_row(*model) for model in todo if model not in done]
        with (
            open(args.output, "a") if args.output else nullcontext() as report,
            tqdm(total=len(todo), unit="model") as bar,
        ):
            for row in run_contract(todo, args.jobs, args.time_limit, args.max_params):
                rows.append(row)
                if report:
                    print(json.dumps(row), file=report, flush=True)
                bar.update()
                bar.set_postfix(failed=sum(bool(failures(row)) for row in rows))
        if args.page:
            args.page.write_text(page(rows))
    except (ValueError, OSError) as error:
        fail("conformance", error)
    except KeyboardInterrupt:
        print("detbackbones conformance: interrupted; --resume continues", file=sys.stderr)
        sys.exit(130)
    print(table(rows))
    sys.exit(any(map(failures, rows)))
