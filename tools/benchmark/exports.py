"""Which backbones can be exported: the smallest model of each of timm's modules.

    python tools/benchmark/exports.py --output exports.md

Each has random weights and frozen batch norm, and is exported to ONNX with as many free axes as can
be. What was exported is compared with the backbone on images of several sizes, see
detbackbones.deploy.export. The table says for each model which axes are free, the largest
difference relative to the largest value of a map, and how many times as fast onnxruntime is as
PyTorch on one image; for a failure the reason. An interrupted run continues.
"""

import argparse
import contextlib
import json
import logging
import tempfile
import warnings
from pathlib import Path

import timm
import torch
from detbackbones import TimmBackbone
from detbackbones.catalog.facts import facts
from detbackbones.deploy.export import export
from tabulate import tabulate
from timm.models import list_modules
from tqdm import tqdm


def smallest() -> dict[str, str]:
    """The model of fewest multiply-adds of each of timm's modules."""
    known, found = facts("timm"), {}
    for module in list_modules():
        names = [name for name in timm.list_models(module=module) if name in known]
        if names:
            found[module] = min(names, key=lambda name: known[name].gmacs)
    return found


def measure(name: str, format: str) -> dict[str, str]:
    """Export a model; a row of the table."""
    torch.manual_seed(0)
    try:
        backbone = TimmBackbone(name, pretrained=False, norm="FrozenBN").eval()
        images = [torch.randn(3, *backbone.probe_size)]
        with tempfile.TemporaryDirectory() as folder:
            report = export(backbone, Path(folder, "x"), images, format=format)
    except Exception as error:  # a model may fail in any way, and the others count
        return {"failed": " ".join(str(error).split())[:300]}
    exported, eager = report.seconds
    return {
        "any length": ", ".join(report.free),
        "difference": f"{report.agreement.tensors:.0e}",
        "times as fast": f"{eager / exported:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="the table; beside it a .json")
    parser.add_argument("--format", default="onnx", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    kept = args.output.with_suffix(".json")
    rows = json.loads(kept.read_text()) if kept.exists() else {}
    for module, name in tqdm(smallest().items(), unit="model"):
        if name not in rows:
            with contextlib.redirect_stderr(None):
                rows[name] = {"module": module, "model": name, **measure(name, args.format)}
            kept.write_text(json.dumps(rows, indent=1) + "\n")
    columns = ["module", "model", "any length", "difference", "times as fast", "failed"]
    cells = [[row.get(column, "") for column in columns] for row in rows.values()]
    args.output.write_text(tabulate(cells, columns, "github", disable_numparse=True) + "\n")
    done = sum("failed" not in row for row in rows.values())
    print(f"{done} of {len(rows)} are exported; wrote {args.output} and {kept}")


if __name__ == "__main__":
    main()
