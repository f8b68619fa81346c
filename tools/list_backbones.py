"""List backbones with their parameters, GMACs, levels, image sizes and weights.

    python tools/list_backbones.py 'convnext*' --sort params
    python tools/list_backbones.py --max-params 30 --stride 4 --neck fpn --csv
    python tools/list_backbones.py --html backbones.html    # a page to search, sort and filter

The numbers come from detbackbones/catalog.json, which --write measures on the meta device with the
installed timm and torchvision: what the file has for these versions is kept, so that a run that was
interrupted goes on.

  params      parameters of the backbone, without classifier and what else no level needs
  GMACs       10^9 multiply-adds of one 224 x 224 image by fvcore's FlopCountAnalysis, attention
              and norms included; padded to the size after the @ where a model does not take 224
  strides     of the levels res2 to res5, with the channels of each
  images      "any" size; else multiples of a number, or a square
"""

import argparse
import csv
import fnmatch
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from detbackbones import catalog
from detbackbones.messages import nearest
from fvcore.nn import FlopCountAnalysis
from tabulate import tabulate
from torch import nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

PAGE = Path(__file__).with_suffix(".html")
COLUMNS = ("source", "name", "params", "gmacs", "side", "strides", "channels", "images")
COLUMNS += ("batch_norm", "weights")
SIDE = 224
SAVE_EVERY = 10  # models
VERSIONS = {"timm": timm.__version__, "torchvision": torchvision.__version__.partition("+")[0]}


class _TraceableConvolution(TorchFunctionMode):
    """Calls convolutions by the name that torch.jit traces.

    On the meta device it looks for the others' shapes in numbers that tracing has made tensors.
    """

    dimensions = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.dimensions:
            return _convolution(self.dimensions[func], *args, **(kwargs or {}))
        if func is torch.conv_transpose2d:
            return _transposed_convolution(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _convolution(n, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, **transposed):
    if padding == "same":  # of an odd kernel
        padding = [dilation[0] * (size // 2) for size in weight.shape[2:]]
    sizes = [[v] * n if isinstance(v, int) else v for v in (stride, padding, dilation)]
    extra = transposed.get("output_padding", 0)
    extra = [extra] * n if isinstance(extra, int) else extra
    flags = [False] * 4  # of the GPU's library
    return torch._convolution(x, weight, bias, *sizes, bool(transposed), extra, groups, *flags)


def _transposed_convolution(
    x, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
):
    sizes = (stride, padding, dilation, groups)
    return _convolution(2, x, weight, bias, *sizes, output_padding=output_padding)


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Multiply-adds of scaled dot-product attention, which fvcore does not count."""
    q, k, v = (value.type().sizes() for value in inputs[:3])
    return math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def count_macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-adds of a model for an input of a shape."""
    device = next(model.parameters()).device
    analysis = FlopCountAnalysis(model, torch.zeros(shape, device=device))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_macs)
    with _TraceableConvolution(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the trace is for this image alone, as it warns
        return analysis.total()


def measure(source: str, name: str) -> list[Any]:
    """Measure a model, as a backbone with default levels.

    Returns:
        the arguments of :class:`detbackbones.catalog.Facts` after the source.
    """
    from contract import SOURCES, Trial, check_build, check_sizes

    trial = Trial(name, SOURCES[source])
    check_build(trial)
    backbone = trial.backbone
    if backbone.img_size:  # whether it can be built for another
        check_sizes(trial)
    step = backbone.size_divisibility
    side = backbone.img_size or math.ceil(SIDE / step) * step
    model, shape = backbone.model.eval(), (1, 3, side, side)
    try:
        macs = count_macs(model, shape)
    except NotImplementedError:  # CrossViT is traced without resampling its maps alone
        with torch.device("meta"):
            macs = count_macs(timm.create_model(name, features_only=True).eval(), shape)
    gmacs = float(f"{macs / 1e9:.4g}")
    row = trial.row
    levels = [level[1:] if level[3] else level[1:3] for level in row["levels"]]
    return [row["parameters"], gmacs, side, row["size"], levels, row["batch_norm"]]


def write() -> list[str]:
    """Measure what the data file lacks, and write it.

    Returns:
        why models could not be measured, a line each.
    """
    from contract import SOURCES

    data = json.loads(catalog.DATA.read_text()) if catalog.DATA.exists() else {}
    if data.get("versions") != VERSIONS:
        data = {"versions": VERSIONS, "models": {}}
    models = {source: data["models"].get(source, {}) for source in VERSIONS}
    failures = []
    todo = [(s, n) for s in VERSIONS for n in SOURCES[s].names() if n not in models[s]]
    for count, (source, name) in enumerate(tqdm(todo, unit="model"), 1):
        try:
            models[source][name] = measure(source, name)
        except Exception as error:  # a model may fail in any way
            failures.append(f"{source} {name}: {type(error).__name__}: {error}".partition("\n")[0])
        if count % SAVE_EVERY == 0 or count == len(todo):
            catalog.DATA.write_text(_data_text(models))
    return failures


def _data_text(models: dict[str, dict[str, list]]) -> str:
    """The data file, a line a model."""
    parts = []
    for source, rows in models.items():
        lines = [
            f"{json.dumps(name)}: {json.dumps(row, separators=(',', ':'))}"
            for name, row in sorted(rows.items())
        ]
        parts.append(f"{json.dumps(source)}: {{\n" + ",\n".join(lines) + "\n}")
    return f'{{"versions": {json.dumps(VERSIONS)}, "models": {{\n' + ",\n".join(parts) + "}}\n"


def select(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The models that are asked for, a dict of ``COLUMNS`` each.

    Raises:
        ValueError: if there are none.
    """
    rows, unknown = [], 0
    for source in [args.source] if args.source else list(VERSIONS):
        tags = pretrained_tags(source)
        known = catalog.facts(source)
        unknown += len({*catalog.list_backbones(args.patterns, source=source)} - known.keys())
        names = catalog.list_backbones(
            args.patterns,
            source=source,
            max_params=args.max_params and args.max_params * 1e6,
            max_gmacs=args.max_gmacs,
            stride=args.stride,
            necks=args.neck,
        )
        for name in names:
            if name in known and (tags.get(name) or not args.pretrained):
                facts = known[name]
                rows.append(
                    {
                        "source": source,
                        "name": name,
                        "params": facts.params,
                        "gmacs": facts.gmacs,
                        "side": facts.side,
                        "strides": facts.strides,
                        "channels": facts.channels,
                        "images": facts.size,
                        "batch_norm": facts.batch_norm,
                        "weights": tags.get(name, []),
                    }
                )
    if unknown:
        print(f"{unknown} models are not in the data: --write measures them", file=sys.stderr)
    if not rows:
        every = {name for source in VERSIONS for name in catalog.facts(source)}
        none = [pattern for pattern in args.patterns if not fnmatch.filter(every, pattern)]
        hints = [f"to {pattern!r} {nearest(pattern, every)}" for pattern in none]
        raise ValueError("; ".join(["no model fits what is asked", *hints]))
    return sorted(rows, key=lambda row: row[args.sort]) if args.sort else rows


def pretrained_tags(source: str) -> dict[str, list[str]]:
    """Names of the architectures that have weights, and the names of these."""
    tags = {}
    if source == "timm":
        for name in timm.list_models(pretrained=True):
            architecture, _, tag = name.partition(".")
            tags.setdefault(architecture, []).append(tag)
    else:
        for name in torchvision.models.list_models(module=torchvision.models):
            tags[name] = [weights.name for weights in torchvision.models.get_model_weights(name)]
    return tags


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


def page(rows: list[dict[str, Any]]) -> str:
    """One HTML page with the rows in it, to search, sort and filter."""
    data = json.dumps({"versions": VERSIONS, "rows": rows}, separators=(",", ":"))
    return PAGE.read_text().replace("{{data}}", data.replace("<", "\\u003c"))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "patterns", nargs="*", metavar="PATTERN", help="of the names, with wildcards"
    )
    parser.add_argument("--source", choices=tuple(VERSIONS), help="default: both")
    parser.add_argument("--pretrained", action="store_true", help="only models with weights")
    parser.add_argument("--max-params", type=float, metavar="MILLIONS")
    parser.add_argument("--max-gmacs", type=float, metavar="GMACS")
    parser.add_argument("--stride", type=int, help="of a level that the model must have")
    parser.add_argument(
        "--neck", action="append", choices=catalog.NECKS, help="pyramid; may be given twice"
    )
    parser.add_argument("--sort", choices=("name", "params", "gmacs"), help="default: as listed")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print a list of objects")
    output.add_argument("--csv", action="store_true", help="print comma-separated values")
    output.add_argument("--html", type=Path, metavar="FILE", help="write a page")
    output.add_argument("--write", action="store_true", help="measure what the data file lacks")
    args = parser.parse_args()
    if args.write and len(sys.argv) > 2:
        parser.error("--write measures all models: give it alone")
    return args


def main() -> None:
    args = parse_args()
    if args.write:
        failures = write()
        print("\n".join(failures))
        sys.exit(bool(failures))
    try:
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
        print(f"list_backbones: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
