import re
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support import TOOLS, load_tool
from timm import create_model

pytestmark = pytest.mark.slow

TOOL = TOOLS / "quickstart.py"
PREFIX = "backbone.bottom_up.model."
quickstart = load_tool("quickstart")


def execute(*arguments):
    command = [sys.executable, TOOL, *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def backbone_of(run):
    state = torch.load(run / "model_final.pth", weights_only=True)["model"]
    return {key.removeprefix(PREFIX): t for key, t in state.items() if key.startswith(PREFIX)}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    output = tmp_path_factory.mktemp("quickstart") / "my output"
    done = execute("--output", output, "--iterations=2", "--seed=1")
    assert done.returncode == 0, done.stdout + done.stderr
    return output, done.stdout


def test_the_table_has_the_metrics_of_the_three_runs(quick):
    output, text = quick
    rows = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith("| (")]
    rows = [[cell.strip() for cell in (row[0].strip()[:3], *row[1:])] for row in rows]
    assert [row[:2] for row in rows] == [["(a)", "12"], ["(c)", "2"], ["(d)", "2"]]
    for (*_, ap, ap50, seconds), name in zip(rows, ("source", "finetune", "scratch")):
        log = (output / name / "log.txt").read_text()
        assert float(ap) == pytest.approx(float(re.search(r"AP +\| +([\d.]+)", log)[1]), abs=0.06)
        assert float(ap) <= float(ap50) <= 100 and int(seconds) > 0


def test_the_exported_backbone_is_loaded_whole_and_frozen(quick):
    output, text = quick
    exported = load_file(output / "backbone.safetensors")
    model = create_model("resnet10t", features_only=True)
    assert exported.keys() == model.state_dict().keys()
    assert f"wrote {len(exported)} tensors" in text
    exported = {k: t for k, t in exported.items() if not k.endswith("num_batches_tracked")}
    assert f"loaded {len(exported)} tensors of resnet10t from {output}" in text
    source, finetune, scratch = (backbone_of(output / n) for n in ("source", "finetune", "scratch"))
    for key, tensor in exported.items():
        torch.testing.assert_close(tensor, source[key], rtol=0, atol=0)
    frozen = [k for k in exported if k.startswith(("conv1", "layer1")) or "bn" in k]
    assert all(torch.equal(exported[k], finetune[k]) for k in frozen)
    assert not torch.equal(exported["layer4.0.conv1.weight"], finetune["layer4.0.conv1.weight"])
    assert not torch.equal(source["conv1.0.weight"], scratch["conv1.0.weight"])


def test_pictures_and_commands_are_written(quick):
    output, text = quick
    for name in ("source", "finetune", "scratch"):
        for picture in ("predictions.png", "curves.png"):
            assert str(output / name / picture) in text
            assert min(Image.open(output / name / picture).size) > 100
    commands = (output / "commands.sh").read_text()
    assert [c in text for c in commands.split("\n\n")[1:]] == [True] * 6
    assert "norm=FrozenBN" in commands and "freeze_at=2" in commands


def test_a_second_run_is_refused(quick):
    done = execute("--output", quick[0])
    assert done.returncode == 2
    assert "holds an earlier quickstart" in done.stderr and "Traceback" not in done.stderr


def test_only_an_earlier_quickstart_is_replaced(tmp_path):
    quickstart.prepare_output(tmp_path, overwrite=False)
    (tmp_path / "source").mkdir()
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(FileExistsError, match="--overwrite"):
        quickstart.prepare_output(tmp_path, overwrite=False)
    quickstart.prepare_output(tmp_path, overwrite=True)
    assert {p.name for p in tmp_path.iterdir()} == {"commands.sh", "mine.txt"}
    (tmp_path / "commands.sh").unlink()
    with pytest.raises(FileExistsError, match="is not empty"):
        quickstart.prepare_output(tmp_path, overwrite=True)


def test_a_step_that_fails_ends_the_quickstart(tmp_path, capfd):
    quickstart.prepare_output(tmp_path, overwrite=False)
    with pytest.raises(SystemExit) as stop:
        quickstart.run("draw", tmp_path, quickstart.DRAW_SHAPES, "--classes=cirle", "--output=x")
    assert stop.value.code == 2
    assert "classes='cirle' must be one of" in capfd.readouterr().err


@pytest.mark.parametrize("argument", ["--seed=-1", "--iterations=0"])
def test_wrong_arguments_are_refused(tmp_path, argument):
    done = execute("--output", tmp_path / "a", argument)
    assert done.returncode == 2 and argument.partition("=")[0] in done.stderr
    assert not (tmp_path / "a").exists()
