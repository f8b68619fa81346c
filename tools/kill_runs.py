"""Kill trainings at random moments, resume them, and compare them with one that nothing disturbed.

    python tools/kill_runs.py --kills 20
    python tools/kill_runs.py --kills 10 --processes 2

A small detector learns drawn shapes for 12 iterations, is evaluated after 4, 8 and 12, and writes a
checkpoint every 3. Each run is killed (SIGKILL) once, somewhere between its first iteration and its
end, and resumed. At the end its final checkpoint must be the same to the bit (weights, optimizer,
iteration), metrics.json must have the same metrics of every iteration, and there must be no more
checkpoints than were to be kept. The exit status is 1 if a run differs.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from draw_shapes import draw
from tabulate import tabulate
from tqdm import tqdm

KEPT = 2
PLAN = ["train.max_iter=12", "train.eval_period=4", "train.checkpointer.period=3"]
PLAN += [f"train.checkpointer.max_to_keep={KEPT}", "train.log_period=1", "train.pictures=2"]
SMALL = ["model.backbone.out_channels=16", "model.roi_heads.box_head.fc_dims=[16,16]"]
SMALL += [f"model.backbone.bottom_up.{word}" for word in ("model_name=test_resnet", "norm=BN")]
SMALL += [f"model.backbone.bottom_up.{word}" for word in ("pretrained=False", "freeze_at=0")]
SMALL += ["dataset.train_sizes=[64]", "dataset.val_size=64", "dataloader.train.num_workers=1"]


def start(data: Path, output: Path, processes: int, *more: str) -> subprocess.Popen:
    """A training as a process group of its own."""
    words = [
        f"dataset.{split}_{key}={data}/{path}"
        for split in ("train", "val")
        for key, path in (("json", f"{split}.json"), ("images", f"images/{split}"))
    ]
    words += [*PLAN, *SMALL, f"train.output_dir={output}", *more]
    words += ["--num-processes", str(processes)] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, "-m", "detbackbones", "train", "--config-file"]
        + ["finetune/faster_rcnn.py", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_training(process: subprocess.Popen) -> None:
    """Read what a run prints until its first iteration is done."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "iter 1/" in line:
            return
    sys.exit("kill_runs: a run ended before its first iteration:\n" + "".join(lines))


def finish(process: subprocess.Popen) -> None:
    """Let a run end."""
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(f"kill_runs: a run ended with status {process.returncode}:\n{output}")


def same(one: Any, other: Any) -> bool:
    """Whether what two checkpoints hold is equal to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def metrics(folder: Path) -> dict[int, dict[str, Any]]:
    """What was measured in each iteration: of losses, which are medians, the names alone."""
    found: dict[int, dict[str, Any]] = {}
    for text in (folder / "metrics.json").read_text().splitlines():
        line = json.loads(text)
        values = {key: value if key.startswith("bbox/") else 0 for key, value in line.items()}
        found.setdefault(line["iteration"], {}).update(values)
    for line in found.values():  # a run that is resumed has no time for its first iteration
        for key in ("time", "rank_data_time", "data_time", "eta_seconds"):
            line.pop(key, None)
    return found


def differences(folder: Path, whole: Path) -> str:
    """In what a run differs from the undisturbed one; empty if in nothing."""
    found = []
    one, other = (
        torch.load(path / "model_final.pth", weights_only=True) for path in (folder, whole)
    )
    if not same(one, other):
        found.append("checkpoint")
    if json.dumps(metrics(folder), sort_keys=True) != json.dumps(metrics(whole), sort_keys=True):
        found.append("metrics")
    if len([*folder.glob("model_0*.pth")]) > KEPT:
        found.append("too many checkpoints")
    if [*folder.glob("*.tmp")]:
        found.append("half a file")
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default: %(default)s")
    args = parser.parse_args()
    random.seed(args.seed)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "data"
        draw(data, ("circle", "square"), train=8, val=4, size=64)
        process = start(data, folder / "whole", args.processes)
        wait_for_training(process)
        begin = time.monotonic()
        finish(process)
        seconds = time.monotonic() - begin
        for number in tqdm(range(args.kills), "killing", unit="run"):
            output = folder / f"run{number}"
            process = start(data, output, args.processes)
            wait_for_training(process)
            moment = random.uniform(0, seconds)
            time.sleep(moment)
            over = process.poll() is not None
            os.killpg(process.pid, signal.SIGKILL) if not over else None
            said = [line for line in process.communicate()[0].splitlines() if line.strip()]
            last = "after its end" if over else said[-1].partition("]: ")[2][:40] if said else ""
            finish(start(data, output, args.processes, "--resume"))
            rows.append((number, f"{moment:.1f}", last, differences(output, folder / "whole")))
    print(tabulate(rows, ("run", "seconds", "the last that it said", "differs in"), "github"))
    print(f"{sum(not row[-1] for row in rows)} of {len(rows)} runs ended as if never killed")
    sys.exit(any(row[-1] for row in rows))


if __name__ == "__main__":
    main()
