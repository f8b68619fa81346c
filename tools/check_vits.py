"""Try windows of attention and the spatial tuning adapter on every plain ViT of timm.

    python tools/check_vits.py --jobs 2 --pattern 'vit_*'

With windows, a ViT must keep the contract of `detbackbones conformance`: with windows as large as
its own image it gives the maps of the source model, with real numbers up to --max-params millions
of parameters, and larger images are divided. On the adapter, levels must have the channels and
strides that are said, for two sizes, and all that learns must have a gradient; models of up to
--max-params have real numbers there, too, which must be finite. What is refused is counted by the
reason.
"""

import argparse
import fnmatch
import multiprocessing
import re
import sys
import warnings
from collections import Counter
from functools import partial

import timm
import torch
from detbackbones import SpatialTuningAdapter, TimmBackbone
from detbackbones.backbones.timm_source import TimmSource
from detbackbones.messages import first_line
from detbackbones.testing import contract as tries
from detbackbones.testing.trial import Subject
from tabulate import tabulate
from tqdm import tqdm

DEPTHS = (0.5, 0.75, 1.0)


def windows(name: str, max_params: float) -> str:
    """Whether the contract is kept with windows as large as the model's own image."""
    source = TimmSource(name)
    grid = source.native_size // (source.patch_size or 16)
    build = partial(TimmBackbone, window_size=grid, global_blocks=min(4, len(source.level_keys)))
    try:
        with torch.device("meta"):
            build(name)
    except ValueError as error:
        return f"refused: {_reason(error)}"
    row = {"source": "timm", "name": name, "family": "", "points": {}}
    found = tries.failures(tries.contract(row, max_params, subject=Subject.of(TimmSource, build)))
    return "; ".join(f"{point}: {why}" for point, why in found.items()) or "ok"


def adapter(name: str, max_params: float) -> str:
    """Whether the levels of the adapter are what it says, and all of it learns."""
    torch.manual_seed(0)
    small = sum(p.numel() for p in TimmSource(name).model.parameters()) <= max_params * 1e6
    device = "cpu" if small else "meta"
    try:
        with torch.device(device):
            net = SpatialTuningAdapter(TimmBackbone(name, out_depths=DEPTHS)).train()
    except ValueError as error:
        return f"refused: {_reason(error)}"
    step = net.size_divisibility
    sizes = {(step, step)} if net.img_size else {(step, 2 * step), (3 * step, step)}
    for size in sizes:
        x = torch.randn(2, 3, *size, device=device)
        levels = net(x)
        tries.compare_shapes(levels, net, x)
        if small and not all(level.isfinite().all() for level in levels.values()):
            return f"values for {size[0]}x{size[1]} are not finite"
        net.zero_grad()
        sum(level.sum() for level in levels.values()).backward()
    missed = [key for key, p in net.named_parameters() if p.requires_grad and p.grad is None]
    return f"no gradient: {', '.join(missed[:3])}" if missed else "ok"


def _reason(error: Exception) -> str:
    """A refusal without what is of one model alone, so that refusals can be counted."""
    return re.sub(r"window_size=\d+|model_name='\S+' ", "", first_line(error)).strip()


def _try(max_params: float, name: str) -> dict[str, str]:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    row = {"model": name}
    for key, check in (("windows", windows), ("adapter", adapter)):
        try:
            row[key] = check(name, max_params)
        except Exception as error:  # a model may fail in any way
            row[key] = f"failed: {type(error).__name__}: {first_line(error)}"
    return row


def is_plain(name: str) -> bool:
    """Whether a model is a plain ViT: its blocks all give maps of one stride, of patches."""
    try:
        source = TimmSource(name)
        return source.patch_size is not None and source.is_plain_vit
    except ValueError:
        return False


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pattern", default="*", help="names of models; default: all")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--max-params", type=float, default=10, help="millions")
    args = parser.parse_args(words)
    names = fnmatch.filter(timm.list_models(), args.pattern)
    with multiprocessing.get_context("fork").Pool(args.jobs, maxtasksperchild=8) as pool:
        plain = pool.imap(is_plain, names, chunksize=8)
        names = [n for n, ok in zip(names, tqdm(plain, total=len(names), unit="model")) if ok]
        done = pool.imap_unordered(partial(_try, args.max_params), names)
        rows = list(tqdm(done, total=len(names), unit="ViT"))
    counts = Counter((key, row[key]) for row in rows for key in ("windows", "adapter"))
    print(tabulate([(*k, n) for k, n in sorted(counts.items())], ("of", "result", "ViTs")))
    failed = [
        (row["model"], key, row[key])
        for row in rows
        for key in ("windows", "adapter")
        if row[key] != "ok" and not row[key].startswith("refused")
    ]
    print(f"{len(rows)} plain ViTs, {len(failed)} failures")
    print(tabulate(sorted(failed), tablefmt="plain"))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
