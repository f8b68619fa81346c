"""Check that every timm architecture and every torchvision classifier works as a backbone.

    python tools/conformance.py --output report.json --page configs/MODELS.md
    python tools/conformance.py --source timm --pattern '*vit*'

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
import gc
import json
import logging
import multiprocessing
import sys
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from multiprocessing import connection
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from contract import POINTS, SOURCES, contract, failures, new_row
from tabulate import tabulate
from tqdm import tqdm

PAGE_COMMAND = "python tools/conformance.py --output report.json --page configs/MODELS.md"


def _child(sender: connection.Connection, row: dict[str, Any], max_params: float) -> None:
    warnings.simplefilter("ignore")
    logging.disable()
    contract(row, max_params, sender.send)


def run(
    rows: Iterable[dict[str, Any]], jobs: int, time_limit: float, max_params: float
) -> Iterator[dict[str, Any]]:
    """Try models at the same time, each in a process of its own; yields their rows when done.

    The processes are forks of this one, which has imported all that they need.
    """
    fork = multiprocessing.get_context("fork")
    waiting = deque(rows)
    running = {}  # receiving end of the pipe -> process, deadline, last row that came
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                row = waiting.popleft()
                receiver, sender = fork.Pipe(duplex=False)
                process = fork.Process(target=_child, args=(sender, row, max_params), daemon=True)
                process.start()
                sender.close()  # or its end would not be seen when the process ends
                running[receiver] = process, time.monotonic() + time_limit, row
            first = min(deadline for _, deadline, _ in running.values())
            ready = connection.wait(running, max(0, first - time.monotonic()))
            for receiver, (process, deadline, row) in list(running.items()):
                if receiver in ready:
                    try:
                        running[receiver] = process, deadline, receiver.recv()
                        continue
                    except EOFError:
                        process.join()
                        why = f"its process ended with exit code {process.exitcode}"
                elif time.monotonic() >= deadline:
                    process.kill()
                    process.join()
                    why = f"not done after {time_limit:g} s"
                else:
                    continue
                del running[receiver]
                receiver.close()
                for point in POINTS:  # the first that is not there is the one under way
                    if point not in row["points"]:
                        row["points"][point], why = why, "skipped"
                row.setdefault("seconds", time_limit)
                yield row
    finally:
        for process, _, _ in running.values():
            process.kill()


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


def mixed(values: Iterable[str]) -> str:
    """The value that all share, or each with its count."""
    counts = Counter(values)
    if len(counts) < 2:
        return "".join(counts)
    order = sorted(counts, key=lambda value: (-counts[value], value))
    return ", ".join(f"{value} ({counts[value]})" for value in order)


def page(rows: list[dict[str, Any]]) -> str:
    """What a user reads before choosing a model, as Markdown."""
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
        f"What `tools/conformance.py` found with timm {timm.__version__} and torchvision "
        f"{torchvision.__version__.partition('+')[0]}; `{PAGE_COMMAND}` writes this page. What a "
        "model must do to pass is said at the top of that program.",
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


def _number(kind: type) -> Callable[[str], float]:
    def positive(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} must be above 0")
        return value

    return positive


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", choices=("timm", "torchvision"), help="default: both")
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
    args = parser.parse_args()
    if args.compare and args.source == "torchvision":
        parser.error("--compare raw is for timm: torchvision has no extractors of its own")
    if (args.resume or args.overwrite) and not args.output:
        parser.error("--resume and --overwrite are for the file of --output")
    if args.page and not args.page.parent.is_dir():
        parser.error(f"--page {args.page} is in a folder that does not exist")
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    tqdm.monitor_interval = 0  # nor would tqdm's
    gc.freeze()  # what is imported need not be searched for garbage in every fork
    sources = [args.source] if args.source else ["timm", "torchvision"]
    todo = [
        (source, name)
        for source in (["raw"] if args.compare else sources)
        for name in fnmatch.filter(SOURCES[source].names(), args.pattern)
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
            for row in run(todo, args.jobs, args.time_limit, args.max_params):
                rows.append(row)
                if report:
                    print(json.dumps(row), file=report, flush=True)
                bar.update()
                bar.set_postfix(failed=sum(bool(failures(row)) for row in rows))
        if args.page:
            args.page.write_text(page(rows))
    except (ValueError, OSError) as error:
        print(f"conformance: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("conformance: interrupted; --resume continues", file=sys.stderr)
        sys.exit(130)
    print(table(rows))
    sys.exit(any(map(failures, rows)))


if __name__ == "__main__":
    main()
