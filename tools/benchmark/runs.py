"""Trainings that a benchmark starts, and whose results it keeps so that none is repeated."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

Key = tuple[str | int, ...]


def train(words: Sequence[str], output: Path, metric: str) -> dict[str, Any]:
    """One run: its command, its seconds, and the metric by iterations; ends all if it fails.

    Args:
        words: of ``detbackbones train``, but for the output folder.
        output: the folder; a run that it holds is replaced.
        metric: such as ``bbox/AP``.
    """
    command = ["train", *words, f"train.output_dir={output}", "--overwrite"]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "detbackbones", *command],
        capture_output=True,
        text=True,
        env={"OMP_NUM_THREADS": "1", **os.environ},
    )
    result = {"words": [*words], "command": shlex.join(["detbackbones", *command])}
    result["seconds"] = time.perf_counter() - start
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        sys.exit(f"runs: {result['command']} failed: {said[-1]}")
    lines = map(json.loads, (output / "metrics.json").read_text().splitlines())
    return {
        **result,
        "curve": [(line["iteration"], line[metric]) for line in lines if metric in line],
    }


def folder_of(folder: Path, key: Key) -> Path:
    """That of a case's run in the folder of all results."""
    return folder / "".join(c if c.isalnum() else "_" for c in "-".join(map(str, key)))


def train_all(
    cases: Mapping[Key, tuple[Sequence[str], str]], folder: Path, jobs: int
) -> dict[Key, dict[str, Any]]:
    """The results of all cases; what ``runs.jsonl`` of the folder has of the same words is kept.

    Args:
        cases: by a key what :func:`train` takes, words and metric.
        folder: of the results; each run has a folder in it.
        jobs: runs at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "runs.jsonl"
    lines = map(json.loads, kept.read_text().splitlines() if kept.exists() else ())
    found = {tuple(line["key"]): line for line in lines}
    found = {k: line for k, line in found.items() if k in cases and line["words"] == [*cases[k][0]]}

    def run(key: Key) -> None:
        words, metric = cases[key]
        found[key] = {"key": key, **train(words, folder_of(folder, key), metric)}
        with open(kept, "a") as file:
            file.write(json.dumps(found[key]) + "\n")

    left = [key for key in cases if key not in found]
    with ThreadPoolExecutor(jobs) as pool:
        for _ in tqdm(pool.map(run, left), total=len(left), unit="run"):
            pass
    return {key: found[key] for key in cases}
