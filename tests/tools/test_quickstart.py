import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detbackbones.weights import read_tensors
from PIL import Image
from support import TOOLS, load_tool, needs_package

pytestmark = pytest.mark.slow

TOOL = TOOLS / "quickstart.py"
PREFIX = "backbone.bottom_up.model."
RUNS = ("pretrained", "random")
quickstart = load_tool("quickstart")


def execute(*arguments, tool=TOOL):
    command = [sys.executable, tool, *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def backbone_of(run):
    state = torch.load(run / "model_final.pth", weights_only=True)["model"]
    return {key.removeprefix(PREFIX): t for key, t in state.items() if key.startswith(PREFIX)}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """The tool as it is, beside a few of its photographs."""
    tool = shutil.copy(TOOL, tmp_path_factory.mktemp("tools"))
    data = Path(tool).parent / "blood"
    data.mkdir()
    (data / "images").symlink_to(quickstart.DATA.resolve() / "images")
    for split, count in (("train", 12), ("val", 6)):
        content = json.loads((quickstart.DATA / f"{split}.json").read_text())
        content["images"] = content["images"][:count]
        ids = {image["id"] for image in content["images"]}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
        (data / f"{split}.json").write_text(json.dumps(content))
    return tool


@pytest.fixture(scope="module")
def quick(tmp_path_factory, few):
    needs_package()
    output = tmp_path_factory.mktemp("quickstart") / "my output"
    done = execute("--output", output, "--iterations=2", "--seed=1", tool=few)
    assert done.returncode == 0, done.stdout + done.stderr
    return output, done.stdout


def test_the_table_has_the_metrics_of_both_runs(quick):
    output, text = quick
    rows = [line.strip("| ").split("|") for line in text.splitlines() if "weights " in line[:25]]
    rows = [[cell.strip() for cell in row] for row in rows if len(row) == 5]
    assert [row[:2] for row in rows] == [["ImageNet weights", "2"], ["random weights", "2"]]
    for (*_, ap, ap50, seconds), name in zip(rows, RUNS):
        log = (output / name / "log.txt").read_text()
        assert float(ap) == pytest.approx(
            float(re.findall(r"\| bbox +\| +([\d.]+)", log)[-1]), abs=0.06
        )
        assert float(ap) <= float(ap50) <= 100 and int(seconds) > 0


def test_one_starts_from_imagenet_and_stays_frozen(quick):
    output, _ = quick
    weights, _ = read_tensors(f"package:{needs_package()}")
    pretrained, random = (backbone_of(output / name) for name in RUNS)
    frozen = [key for key in pretrained if key.startswith(("conv_stem", "blocks.0")) or "bn" in key]
    assert len(frozen) > 150
    assert all(torch.equal(pretrained[key], weights[key]) for key in frozen)
    moved = "blocks.6.0.conv_pwl.weight"
    assert not torch.equal(pretrained[moved], weights[moved])
    torch.testing.assert_close(pretrained[moved], weights[moved], atol=1e-2, rtol=0)
    assert not torch.equal(random["conv_stem.weight"], weights["conv_stem.weight"])
    assert random["bn1.running_mean"].abs().max() > 0  # its batch norm has learned


def test_pictures_and_commands_are_written(quick):
    output, text = quick
    pictures = ["curves.png", *(f"{name}/predictions.png" for name in RUNS)]
    for picture in pictures:
        assert str(output / picture) in text
        assert min(Image.open(output / picture).size) > 100
    commands = (output / "commands.sh").read_text()
    assert [c.strip() in text for c in commands.split("\n\n")[1:]] == [True] * 2
    assert "finetune/faster_rcnn.py" in text.rpartition("of your own")[2]


def test_a_second_run_is_refused(quick):
    done = execute("--output", quick[0])
    assert done.returncode == 2
    assert "holds an earlier quickstart" in done.stderr and "Traceback" not in done.stderr


def test_an_interrupted_one_goes_on(quick, few, tmp_path):
    """The first run had ended, the second is not there yet."""
    shutil.copytree(quick[0] / "pretrained", tmp_path / "pretrained")
    shutil.copy(quick[0] / "commands.sh", tmp_path)
    done = execute("--output", tmp_path, "--iterations=2", "--seed=1", "--resume", tool=few)
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = (backbone_of(folder / "pretrained") for folder in (quick[0], tmp_path))
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    row = re.compile(r"^\| (?:ImageNet|random) weights.*", re.MULTILINE)
    first, second = (row.findall(text) for text in (quick[1], done.stdout))
    assert len(first) == 2  # without the seconds they are the same
    assert [x.split("|")[1:5] for x in first] == [x.split("|")[1:5] for x in second]


def test_only_an_earlier_quickstart_is_replaced(tmp_path):
    quickstart.prepare_output(tmp_path, overwrite=False)
    (tmp_path / "random").mkdir()
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(FileExistsError, match="--overwrite"):
        quickstart.prepare_output(tmp_path, overwrite=False)
    quickstart.prepare_output(tmp_path, overwrite=True)
    assert {p.name for p in tmp_path.iterdir()} == {"commands.sh", "mine.txt"}
    (tmp_path / "commands.sh").unlink()
    with pytest.raises(FileExistsError, match="is not empty"):
        quickstart.prepare_output(tmp_path, overwrite=True)


def test_a_training_that_fails_ends_the_quickstart(tmp_path, capfd):
    quickstart.prepare_output(tmp_path, overwrite=False)
    with pytest.raises(SystemExit) as stop:
        quickstart.train("wrong", tmp_path, "random", "train.max_iter=ten")
    assert stop.value.code == 2
    assert "train.max_iter" in capfd.readouterr().err


@pytest.mark.parametrize("argument", ["--seed=-1", "--iterations=0"])
def test_wrong_arguments_are_refused(tmp_path, argument):
    done = execute("--output", tmp_path / "a", argument)
    assert done.returncode == 2 and argument.partition("=")[0] in done.stderr
    assert not (tmp_path / "a").exists()


def test_the_photographs_are_whole():
    """120 of BCCD's, each in one of the two sets, all of whose boxes lie in their images."""
    names = []
    for split, count in (("train", 80), ("val", 40)):
        data = json.loads((quickstart.DATA / f"{split}.json").read_text())
        sizes = {image["id"]: (image["width"], image["height"]) for image in data["images"]}
        assert len(sizes) == count
        for image in data["images"]:
            names.append(image["file_name"])
            assert Image.open(quickstart.DATA / "images" / names[-1]).size == sizes[image["id"]]
        for box, (width, height) in (
            (a["bbox"], sizes[a["image_id"]]) for a in data["annotations"]
        ):
            assert box[0] + box[2] <= width + 1 and box[1] + box[3] <= height + 1
    assert len(set(names)) == 120 == len([*(quickstart.DATA / "images").iterdir()])
    assert "MIT License" in (quickstart.DATA / "LICENSE").read_text()
