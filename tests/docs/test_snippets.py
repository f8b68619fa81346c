"""Every command and snippet of README.md and docs/ that needs no network runs as it is written.

They run in order, page by page, in one folder that has the tiny data set as data/; a later one may
need what an earlier one wrote. A comment before a block says what is special about it:

    <!-- not run: REASON -->    it needs what the tests have not: the network, COCO, hours
    <!-- needs MODULE -->       it is skipped where the module is not installed
    <!-- slow -->               it is for tools/test.sh --all
"""

import ast
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import detbackbones
import pytest
from detbackbones.cli import main as cli
from detbackbones.training.overrides import apply_overrides
from support import ROOT, load_tool, run_main

GENERATED = ("MODELS.md", "LAYERS.md")
PAGES = [ROOT / "README.md"]
PAGES += sorted(path for path in ROOT.glob("docs/*.md") if path.name not in GENERATED)
BLOCK = re.compile(r"(?:<!-- ([^>]*) -->\n)?```(sh|python)\n(.*?)```", re.S)

# Added to every training, which then ends in seconds.
QUICK = (
    "train.max_iter=2 train.pictures=1 dataset.train_sizes=[64] dataset.val_size=64 "
    "dataloader.train.total_batch_size=2 dataloader.train.num_workers=0 "
    "dataloader.test.num_workers=0"
).split()

# The shell reads a block's commands, and hands their words to the test, which is quicker than to
# start python for each.
RECORDER = r"""#!/bin/sh
printf '%s\0' "$(basename "$0")" "$@" >>commands
printf '\n' >>commands
"""


@dataclass(frozen=True)
class Snippet:
    """A block of a page; ``mark`` is the comment before it."""

    page: Path
    line: int
    mark: str
    language: str
    code: str


def snippets():
    for page in PAGES:
        text = page.read_text()
        for block in BLOCK.finditer(text):
            line = text.count("\n", 0, block.start(2)) + 1
            snippet = Snippet(page, line, block[1] or "", *block.group(2, 3))
            marks = [pytest.mark.slow] if snippet.mark == "slow" else []
            yield pytest.param(snippet, id=f"{page.name}:{line}", marks=marks)


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tiny):
    """What a user has: data, the tools and the program."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "data").symlink_to(tiny)
    (folder / "tools").symlink_to(ROOT / "tools")
    (folder / "bin").mkdir()
    for name in ("detbackbones", "python"):
        (folder / "bin" / name).write_text(RECORDER)
        (folder / "bin" / name).chmod(0o755)
    return folder


def run_shell(code, folder):
    """Run a block; the variables that it sets are there in the next ones."""
    commands = folder / "commands"
    commands.write_text("")
    subprocess.run(
        ["bash", "-c", f"set -ea; [ ! -e state ] || . ./state\n{code}\nexport -p >state"],
        cwd=folder,
        env={**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"},
        check=True,
    )
    for line in commands.read_text().splitlines():
        program, *words = line.split("\0")[:-1]
        if program == "python":
            assert run_main(load_tool(Path(words[0]).stem), *words[1:]) == 0, words
        else:
            assert run_main(cli, *words, *quick(words)) == 0, words


def quick(words):
    """What is added to a command, so that it ends in seconds and downloads nothing."""
    more = []
    if words[0] == "train":
        detr = any(re.search("/(rt_detr|dino|mask2former)", word) for word in words)
        bottom_up = "model.backbone" if detr else "model.backbone.bottom_up"
        more = ["--overwrite", *QUICK]  # several pages train into the same folder
        more += [f"{bottom_up}.pretrained=False"]
        more += ["model.num_queries=20"] * detr
    elif words[0] == "probe":
        more = QUICK
    return more + ["dataset.num_classes=3"] * any("dataset.num_classes" in word for word in words)


def run_python(code, folder, monkeypatch):
    """Run a block statement by statement; `expression  # literal` must be true."""

    def quick_config(name):
        cfg = get_config(name)
        if "dataset" in cfg:
            apply_overrides(cfg, [*QUICK, "model.backbone.bottom_up.pretrained=False"])
        return cfg

    get_config = detbackbones.get_config
    monkeypatch.setattr(detbackbones, "get_config", quick_config)
    monkeypatch.chdir(folder)
    names = {}
    for statement in ast.parse(code).body:
        text = ast.unparse(statement)
        comment = code.splitlines()[statement.end_lineno - 1].partition("  # ")[2]
        if isinstance(statement, ast.Expr) and re.match(r"[\d\[('\"]", comment):
            assert eval(text, names) == ast.literal_eval(comment), text
        else:
            exec(text, names)


@pytest.mark.parametrize("snippet", snippets())
def test_snippet(snippet, folder, monkeypatch):
    word, _, rest = snippet.mark.partition(" ")
    if word == "not":
        if snippet.language == "python":
            ast.parse(snippet.code)
        else:
            subprocess.run(["bash", "-n", "-c", snippet.code], check=True)
        pytest.skip(rest.removeprefix("run: "))
    if word == "needs":
        pytest.importorskip(rest)
    if snippet.language == "python":
        run_python(snippet.code, folder, monkeypatch)
    else:
        monkeypatch.chdir(folder)
        run_shell(snippet.code, folder)


def test_the_readme_is_a_front_door():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


def test_the_readme_has_the_figures_of_the_results():
    results = (ROOT / "docs" / "results.md").read_text()
    (table,) = re.findall(
        r"\| what \| figure \|\n(.*?)\n\n", (ROOT / "README.md").read_text(), re.S
    )
    figures = re.findall(r"\d+\.\d+(?:\.\d+)?", table)
    assert len(figures) >= 8
    for figure in figures:
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.]*\d)", results), figure
