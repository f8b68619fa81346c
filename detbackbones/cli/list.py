"""List backbones with their parameters, GMACs, levels, image sizes and weights.

    detbackbones list 'convnext*' --sort params
    detbackbones list --max-params 30 --stride 4 --neck fpn --csv
    detbackbones list --html backbones.html    # a page to search, sort and filter

The numbers come from the package's catalog.json, which --write measures on the meta device with the
installed timm and torchvision: what the file has for these versions is kept, so that a run that was
interrupted goes on.

  params      parameters of the backbone, without the classifier and other parts that no level
              depends on
  GMACs       10^9 multiply-adds of one 224 x 224 image in convolutions, linear maps and attention;
              padded to the size after the @ where a model does not take 224
  strides     of the levels res2 to res5, with the channels of each
  images      "any" size; else multiples of a number, or a square
"""

import argparse
import csv
import fnmatch
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ..backbones import BACKBONES
from ..catalog import NECKS, facts, list_backbones
from ..catalog.facts import describe
from ..catalog.measure import SIDE, write
from ..catalog.page import page
from ..messages import nearest
from .program import checkout, fail, new_parser

COLUMNS = ("source", "name", "params", "gmacs", "side", "strides", "channels", "images")
COLUMNS += ("batch_norm", "weights")


def select(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The models that are asked for, a dict of ``COLUMNS`` each.

    Raises:
        ValueError: if there are none.
    """
    rows, unknown = [], 0
    for source in [args.source] if args.source else BACKBONES:
        unknown += len({*list_backbones(args.patterns, source=source)} - facts(source).keys())
        names = list_backbones(
            args.patterns,
            source=source,
            max_params=args.max_params and args.max_params * 1e6,
            max_gmacs=args.max_gmacs,
            stride=args.stride,
            necks=args.neck,
        )
        rows += describe(source, names)
    if args.pretrained:
        rows = [row for row in rows if row["weights"]]
    if unknown:
        print(f"{unknown} models are not in the data: --write measures them", file=sys.stderr)
    if not rows:
        every = {name for source in BACKBONES for name in facts(source)}
        none = [pattern for pattern in args.patterns if not fnmatch.filter(every, pattern)]
        hints = [f"to {pattern!r} {nearest(pattern, every)}" for pattern in none]
        raise ValueError("; ".join(["no model fits what is asked", *hints]))
    return sorted(rows, key=lambda row: row[args.sort]) if args.sort else rows


def flat(row: dict[str, Any], separator: str = " ") -> dict[str, Any]:
    """A row whose lists are texts."""
    return {
        key: separator.join(map(str, value)) if isinstance(value, list) else value
        for key, value in row.items()
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text for a terminal."""
    lines = []
    for row in map(flat, rows):
        at = "" if row["side"] == SIDE else f" @{row['side']}"
        row["batch_norm"] = row["batch_norm"] or "none"
        row |= {"params": f"{row['params'] / 1e6:.1f}", "gmacs": f"{row['gmacs']:.2f}{at}"}
        lines.append([value for key, value in row.items() if key != "side"])
    header = ("source", "name", "params, M", "GMACs", "strides", "channels", "images")
    header += ("batch norm", "weights")
    align = ["right" if key in ("params, M", "GMACs") else "left" for key in header]
    widths = [None] * (len(header) - 1) + [40]
    return tabulate(lines, header, maxcolwidths=widths, colalign=align, disable_numparse=True)


def parse_args(words: Sequence[str] | None) -> argparse.Namespace:
    words = sys.argv[1:] if words is None else words
    parser = new_parser("list", __doc__)
    parser.add_argument(
        "patterns", nargs="*", metavar="PATTERN", help="of the names, with wildcards"
    )
    parser.add_argument("--source", choices=list(BACKBONES), help="default: both")
    parser.add_argument("--pretrained", action="store_true", help="only models with weights")
    parser.add_argument("--max-params", type=float, metavar="MILLIONS")
    parser.add_argument("--max-gmacs", type=float, metavar="GMACS")
    parser.add_argument("--stride", type=int, help="of a level that the model must have")
    parser.add_argument(
        "--neck", action="append", choices=NECKS, help="pyramid; may be given twice"
    )
    parser.add_argument("--sort", choices=("name", "params", "gmacs"), help="default: as listed")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print a list of objects")
    output.add_argument("--csv", action="store_true", help="print comma-separated values")
    output.add_argument("--html", type=Path, metavar="FILE", help="write a page")
    output.add_argument("--write", action="store_true", help="measure what the data file lacks")
    args = parser.parse_args(words)
    if args.write and len(words) > 1:
        parser.error("--write measures all models: give it alone")
    return args


def main(words: Sequence[str] | None = None) -> None:
    args = parse_args(words)
    try:
        if args.write:
            checkout()
            failures = list(write())
            print("\n".join(failures))
            sys.exit(bool(failures))
        rows = select(args)
        if args.json:
            print(json.dumps(rows, indent=1))
        elif args.csv:
            writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(map(flat, rows))
        elif args.html:
            with args.html.open("x") as file:  # never over another
                file.write(page(rows))
            print(f"wrote {args.html}", file=sys.stderr)
        else:
            print(table(rows))
    except (ValueError, OSError) as error:
        fail("list", error)
