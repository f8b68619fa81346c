"""The program and its commands: help, what is unknown, configs by path and by name."""

import os
import re
import subprocess
import sys

import pytest
from detbackbones.cli import main as cli
from support import ROOT, TOOLS, run_main


def python(*words, **kwargs):
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, **kwargs
    )


def test_help_lists_the_commands(capsys):
    assert run_main(cli, "--help") == 0
    text = capsys.readouterr().out
    files = {path.stem.replace("_", "-") for path in (ROOT / "detbackbones/cli").glob("*.py")}
    assert set(cli.COMMANDS) == files - {"--init--", "main", "program", "launch"}
    for name, line in cli.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(line)}$", text, re.MULTILINE)
    assert run_main(cli) == 2
    assert capsys.readouterr().err == text


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_a_command_has_an_example(command, capsys):
    assert run_main(cli, command, "--help") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: detbackbones {command} ")
    assert re.search(rf"^    detbackbones {command}\b", text, re.MULTILINE)
    assert all(len(line) <= 110 for line in text.splitlines())


@pytest.mark.parametrize(
    "word, near",
    [("trian", "the nearest are 'train'"), ("layer", "'layers'"), ("x", "no name is near it")],
)
def test_an_unknown_command(word, near, capsys):
    assert run_main(cli, word) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"detbackbones: command={word!r} is unknown: ") and near in line


BARE = """
import sys
sys.modules |= {"detectron2": None, "torch": None}  # as if they were not installed
from detbackbones.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("command", [[], ["install-detectron2"]])
def test_help_where_neither_torch_nor_detectron2_is(command):
    done = python("-c", BARE, *command, "--help")
    assert done.stdout.startswith(f"usage: {' '.join(['detbackbones', *command])} ")


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if not name.startswith("in")])
def test_without_detectron2_it_says_how_to_get_it(command):
    done = python("-c", BARE, command, "--help")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"detbackbones {command}: detbackbones needs detectron2, which cannot")
    assert line.endswith(": run detbackbones install-detectron2")


@pytest.mark.parametrize("door", [("-m", "detbackbones", "train"), (TOOLS / "train_net.py",)])
def test_doors_to_the_training(door, tmp_path):
    done = python(*door, "--config-file", "finetune/faster_rcn.py", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "detbackbones train: --config-file finetune/faster_rcn.py does not exist: of the configs "
        "of the package the nearest are 'finetune/faster_rcnn.py'"
    )


def test_a_file_is_taken_before_a_config_of_that_name(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--config-file", "finetune/faster_rcnn.py"]
    assert run_main(cli, "train", *words) == 2  # that of the package, which needs data
    assert "dataset.train_json='' must be" in capsys.readouterr().err
    os.mkdir("finetune")
    with open("finetune/faster_rcnn.py", "w") as file:
        file.write("model = dict()\n")
    assert run_main(cli, "train", *words) == 2
    assert "finetune/faster_rcnn.py has no 'dataloader'" in capsys.readouterr().err
    assert run_main(cli, "eval", "--config-file", "finetune/faster_rcn.py") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("detbackbones eval: ")
    for name in ("of the files in finetune the nearest are 'faster_rcnn.py'", "'finetune/faster"):
        assert name in line


def test_backbone_of_what_is_no_checkpoint(tmp_path, capsys):
    assert run_main(cli, "backbone", tmp_path / "no.pth", tmp_path / "out.pth") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("detbackbones backbone: ") and "no.pth" in line


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("nowhere/b.pth", "nowhere/b.pth' must be in a folder that exists"),
        ("b.pt", "b.pt' must end on .safetensors or .pth"),
        ("backbone", "backbone' must end on .safetensors or .pth"),
    ],
)
def test_a_backbone_is_not_written_anywhere(tmp_path, capsys, output, message):
    assert run_main(cli, "backbone", tmp_path / "model_final.pth", tmp_path / output) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("detbackbones backbone: output ") and line.endswith(message)
