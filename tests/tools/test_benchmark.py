"""The benchmark program: whom it compares, what it measures, and what it does with the numbers."""

import argparse
import json
import statistics
import sys

import pytest
import torch
from support import TOOLS, load_tool
from torch import nn

pytestmark = pytest.mark.slow

sys.path.insert(0, str(TOOLS / "benchmark"))  # as for the program: it imports its neighbour
benchmark = load_tool("benchmark/backbones")
contestants = sys.modules["contestants"]


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the program's main in this process; the exit code, and what it printed."""
    threads = torch.get_num_threads()

    def call(*words):
        words = ["--size=64", "--rounds=2", "--threads=1", *words]
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            benchmark.main()
        return end.value.code, *capsys.readouterr()

    yield call
    torch.set_num_threads(threads)


def settings(**kwargs):
    defaults = {"source": "timm", "size": (64, 64), "norm": "FrozenBN", "freeze_at": 0}
    switches = ("amp", "compile", "grad_checkpointing", "options_off", "variants")
    return argparse.Namespace(**defaults | dict.fromkeys(switches, False) | kwargs)


def cells(text):
    """The rows of the printed table."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_numbers_table_and_picture(run, tmp_path):
    code, out, _ = run("--models=resnet18,mobilenetv3_small_050", "--output", tmp_path / "a")
    assert code == 0
    assert [row[:3] for row in cells(out)] == [
        *(["resnet18", "train", name] for name in ("detbackbones", "timm", "detectron2")),
        *(["resnet18", "inference", name] for name in ("detbackbones", "timm", "detectron2")),
        *(["mobilenetv3_small_050", "train", name] for name in ("detbackbones", "timm")),
        *(["mobilenetv3_small_050", "inference", name] for name in ("detbackbones", "timm")),
        ["geometric mean of 2", "train", "timm"],
        ["geometric mean of 1", "train", "detectron2"],
        ["geometric mean of 2", "inference", "timm"],
        ["geometric mean of 1", "inference", "detectron2"],
    ]
    assert (tmp_path / "a/benchmark.md").read_text() == out
    assert "2 images of 64 x 64, float32; norm=FrozenBN, freeze_at=0; 2 rounds" in out

    content = json.loads((tmp_path / "a/benchmark.json").read_text())
    ours = {}
    for row, line in zip(content["results"], cells(out)):
        assert len(row["seconds"]) == 2
        assert row["seconds_median"] == pytest.approx(statistics.median(row["seconds"]))
        assert line[3] == f"{1000 * row['seconds_median']:.1f}"
        if row["contestant"] == "detbackbones":
            ours[row["model"], row["mode"]] = row["seconds"]
            assert "ratio_median" not in row
        else:
            pairs = zip(row["seconds"], ours[row["model"], row["mode"]])
            ratio = statistics.median(peer / own for peer, own in pairs)
            assert row["ratio_median"] == pytest.approx(ratio)
            assert line[5] == f"{ratio:.3f}"
        assert ("saved_mib" in row) == (row["mode"] == "train")
    timm = [row for row in content["results"] if row["contestant"] == "timm"]
    product = timm[0]["ratio_median"] * timm[2]["ratio_median"]
    assert content["geometric_means"][0]["ratio_median"] == pytest.approx(product**0.5)
    assert timm[0]["saved_mib"] > 1 and timm[0]["saved_weights_mib"] == 0
    assert (tmp_path / "a/benchmark.png").read_bytes().startswith(b"\x89PNG\r\n")

    code, out, err = run("--models=resnet18", "--output", tmp_path / "a")
    assert (code, out) == (2, "")
    assert err == f"error: {tmp_path / 'a/benchmark.md'} exists: replace it with --overwrite\n"
    assert json.loads((tmp_path / "a/benchmark.json").read_text()) == content
    words = ("--models=test_resnet", "--inference", "--output", tmp_path / "a", "--overwrite")
    assert run(*words)[0] == 0
    content = json.loads((tmp_path / "a/benchmark.json").read_text())
    assert {row["model"] for row in content["results"]} == {"test_resnet"}


def test_torchvision(run):
    code, out, _ = run("--source=torchvision", "--models=resnet18", "--inference")
    assert code == 0
    peers = ["create_feature_extractor", "IntermediateLayerGetter", "detectron2"]
    assert [row[2] for row in cells(out)] == ["detbackbones", *peers, *peers]


def test_amp_beside_peers_with_and_without(run):
    code, out, _ = run("--models=test_resnet", "--train", "--amp", "--freeze-at=2")
    assert code == 0
    assert [row[2] for row in cells(out)][:3] == ["detbackbones", "timm", "timm, AMP"]
    weights = [float(row[8]) for row in cells(out)[:3]]
    assert weights[1] == 0 < weights[2]  # cast to bfloat16


def test_where_nothing_learns_a_step_is_a_forward_pass(run):
    code, out, _ = run("--models=resnet18", "--train", "--freeze-at=5")
    assert code == 0
    kept = {row[2]: row[7] for row in cells(out) if row[0] == "resnet18"}
    assert kept == dict.fromkeys(["detbackbones", "timm", "detectron2"], "0.0")


def test_options_off(run):
    code, out, _ = run("--models=test_resnet", "--options-off")
    assert code == 0
    assert "all options off" in out
    ours, peer = cells(out)[:2]
    assert ours[7] == peer[7] != ""  # saves the same


def test_variants_are_peers_too(run):
    _, out, _ = run("--models=test_resnet,test_vit", "--inference", "--variants")
    labels = [(row[0], row[2]) for row in cells(out)]
    other = ["fold=False", "channels_last=False", "channels_last=False, fold=False"]
    for label in other:
        assert ("test_resnet", label) in labels
    assert [label for name, label in labels if name == "test_vit"] == [
        *("detbackbones", "timm", "channels_last=True")
    ]


def test_grad_checkpointing_saves_less(run):
    code, out, _ = run("--models=resnet18", "--train", "--grad-checkpointing")
    assert code == 0
    ours, peer = cells(out)[:2]
    assert float(ours[7]) - float(ours[8]) < float(peer[7])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--models=resnet5"], "--models='resnet5' is unknown: the nearest are 'resnet50'"),
        (["--models=resnet18,resnet18"], "'resnet18,resnet18' must be different names"),
        (["--models=resnet18", "--rounds=0"], "--rounds=0 must be a whole number from 1"),
        (["--models=resnet18", "--overwrite"], "--overwrite is for the files of --output"),
        (["--models=resnet18", "--options-off", "--freeze-at=1"], "--options-off goes with no"),
        (["--source=torchvision", "--models=resnet18d"], "the nearest are 'resnet18'"),
    ],
)
def test_wrong_arguments_are_refused_in_a_sentence(run, words, message):
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_a_model_that_fails_is_a_row(run, tmp_path):
    models = "--models=levit_128s,test_resnet"  # the first is for images of up to 224 x 224
    code, out, _ = run(models, "--inference", "--size=256", "--output", tmp_path)
    assert code == 1
    assert [row[0] for row in cells(out)] == [
        *("test_resnet",) * 2,
        "levit_128s",
        "geometric mean of 1",
    ]
    assert "images of 256x256 do not fit" in cells(out)[2][-1]
    assert list(json.loads((tmp_path / "benchmark.json").read_text())["failures"]) == ["levit_128s"]


def test_ctrl_c_keeps_the_whole_rounds(run, monkeypatch, tmp_path):
    steps = []

    def step(self, images):
        steps.append(self.label)
        if len(steps) == 2 * (benchmark.WARM_UP + 3) + 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(contestants.Contestant, "step", step)
    code, out, err = run("--models=test_resnet", "--rounds=9", "--train", "--output", tmp_path)
    assert code == 130
    assert "interrupted" in err
    rows = json.loads((tmp_path / "benchmark.json").read_text())["results"]
    assert [len(row["seconds"]) for row in rows] == [3, 3]
    assert (tmp_path / "benchmark.png").exists()
    assert {*steps[: 2 * benchmark.WARM_UP]} == {"detbackbones", "timm"}


@pytest.mark.parametrize("source", ["timm", "torchvision"])
def test_peers_have_the_frozen_parameters_of_the_backbone(source):
    images = torch.randn(2, 3, 64, 64)
    made = contestants.contestants("resnet18", settings(source=source, freeze_at=2), images)
    assert len(made) == (3 if source == "timm" else 4)
    blocks = 4 * 9 * (64 * 128 + 3 * 128**2) // 4  # layer2 without its shortcut
    trained = blocks * (1 + 4 + 16) + 64 * 128 * (1 + 4 + 16)  # each layer has four times as many
    for one in made:
        assert sum(p.numel() for p in one.model.parameters() if p.requires_grad) == trained
        (group,) = one.optimizer.param_groups
        assert sum(p.numel() for p in group["params"]) == trained


@pytest.mark.parametrize("altered", [0, 1, 2])
def test_other_feature_maps_are_noticed(altered):
    images = torch.randn(2, 3, 64, 64)
    made = contestants.contestants("resnet18", settings(), images)
    models = {one.label: one.model for one in made}
    contestants.check_agreement(models, images)
    weights = [p for p in made[altered].model.parameters() if p.dim() == 4]
    with torch.no_grad():
        weights[-1][0] *= 1.1
    with pytest.raises(ValueError, match="gives other feature maps than timm: at"):
        contestants.check_agreement(models, images)
    with torch.no_grad():
        weights[0][0] *= 1.1
    with pytest.raises(ValueError, match="gives other feature maps than timm: at"):
        contestants.check_setting(made, images)


def test_maps_that_are_no_numbers_do_not_agree():
    images = torch.full((2, 3, 64, 64), torch.nan)
    with pytest.raises(ValueError, match="nan of the largest value"):
        contestants.contestants("test_resnet", settings(), images)


def test_saved_bytes_of_two_convolutions():
    first, second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)
    model = nn.Sequential(first, nn.ReLU(), second)
    images = torch.randn(2, 3, 8, 8)
    activation = 2 * 4 * 8 * 8 * 4  # what ReLU gives: its own result and the second's input
    assert contestants.saved_bytes(model, images, model) == (activation, 0)

    def folded(images):  # the product is saved for the gradient of the images, not the factors
        x = model[:2](images)
        return torch.conv2d(x, second.weight * 2.0, second.bias, padding=1)

    weight = 5 * 4 * 3 * 3 * 4
    assert contestants.saved_bytes(model, images, folded) == (activation + weight, weight)
    with torch.no_grad():
        assert contestants.saved_bytes(model, images, model) == (0, 0)
