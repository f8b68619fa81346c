"""Probes: their configs, on data of one's own and on registered data, and detbackbones probe."""

import json

import huggingface_hub
import pytest
import torch
from detbackbones import FeatureBackbone, TimmBackbone, get_config
from detbackbones.cli import probe
from detbackbones.data.coco import register_coco
from detbackbones.training.checkpoint import Checkpointer
from detbackbones.training.overrides import apply_overrides
from detbackbones.training.run import fit, prepare
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_panoptic_separated
from PIL import Image
from support import run_main

SMALL = [
    "dataset.num_classes=3",
    "dataset.train_sizes=[64]",
    "dataset.val_size=64",
    "dataloader.train.total_batch_size=2",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
    "train.device=cpu",
    "train.pictures=1",
    "train.log_period=1",
]


def paths(tiny):
    return [
        f"dataset.{split}_{kind}={tiny}/{kind}/{split}"
        for split in ("train", "val")
        for kind in ("images", "labels")
    ]


def load(head, model_name, *words):
    cfg = get_config(f"probe/{head}.py")
    backbone = cfg.model.backbone.get("bottom_up", cfg.model.backbone)
    backbone.update(model_name=model_name, pretrained=False)
    return apply_overrides(cfg, [*SMALL, "train.max_iter=2", *words])


def train(cfg, folder):
    cfg.train.output_dir = str(folder)
    run = prepare(cfg)
    model = run.model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fit(run)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return model, moved, rows


@pytest.mark.parametrize("model_name", ["test_resnet", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("head", ["linear", "fpn", "dpt"])
def test_only_the_head_moves(tiny, tmp_path, head, model_name):
    cfg = load(head, model_name, *paths(tiny))
    if head == "fpn":
        cfg.model.backbone.out_channels = 32
    model, moved, rows = train(cfg, tmp_path)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    buffers = {name for name, _ in model.named_buffers() if name.startswith("sem_seg_head")}
    assert trained and trained <= moved <= trained | buffers
    backbone = next(m for m in model.modules() if isinstance(m, FeatureBackbone))
    assert not any(p.requires_grad for p in backbone.parameters())
    assert 0 <= rows[-1]["sem_seg/mIoU"] <= 100
    assert (tmp_path / "predictions.png").stat().st_size > 0
    if head == "dpt":
        levels = {"test_resnet": "res2 res3 res4 res5", "vit_tiny_patch16_224": "p2 p5 p8 p11"}
        assert " ".join(backbone.output_shape()) == levels[model_name]


@pytest.fixture
def registered(tiny):
    """COCO-style stuff data sets in detectron2's catalog."""
    for split in ("train", "val"):
        images, labels = str(tiny / "images" / split), str(tiny / "labels" / split)
        json_file = str(tiny / f"{split}.json")
        register_coco(json_file, images, "polygon")
        metadata = {
            "thing_classes": ["circle", "square"],
            "stuff_classes": ["background", "circle", "square"],
        }
        register_coco_panoptic_separated(
            f"probe_{split}", metadata, images, "", "", labels, json_file
        )
    yield "probe_train_stuffonly", "probe_val_stuffonly"
    for split in ("train", "val"):
        for form in ("separated", "stuffonly"):
            DatasetCatalog.remove(f"probe_{split}_{form}")
            MetadataCatalog.remove(f"probe_{split}_{form}")


def test_data_that_detectron2_knows(registered, tmp_path):
    names = [f"dataloader.{s}.dataset.names={n}" for s, n in zip(("train", "test"), registered)]
    _, _, rows = train(load("linear", "test_resnet", *names), tmp_path)
    assert {f"sem_seg/IoU-{name}" for name in ("background", "circle", "square")} <= rows[-1].keys()


@pytest.fixture(scope="module")
def run(tiny):
    """Call the program's main in this process; the exit code is returned."""

    def call(output, *words):
        words = [*words, "--output", output, *paths(tiny), *SMALL, "train.max_iter=3"]
        return run_main(probe, *words)

    return call


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "backbone.pth"
    torch.manual_seed(7)
    state = TimmBackbone("test_resnet").state_dict()
    torch.save({key.removeprefix("model."): value for key, value in state.items()}, file)
    return file


@pytest.fixture(scope="module")
def probed(run, checkpoint, tmp_path_factory):
    output = tmp_path_factory.mktemp("probe") / "my probes"
    models = f"test_resnet=random,test_resnet={checkpoint},test_rasnet,test_vit=random"
    code = run(output, "--models", models, "--heads=linear,dpt")
    return output, code, json.loads((output / "probe.json").read_text())["runs"]


def test_one_that_fails_does_not_end_the_others(probed, checkpoint):
    _, code, runs = probed
    weights = ["random", str(checkpoint), "pretrained", "random"]
    assert code == 1
    assert [run["weights"] for run in runs] == 2 * weights
    assert [run["head"] for run in runs] == 4 * ["linear"] + 4 * ["dpt"]
    for run in runs:
        if run["model"] == "test_rasnet":
            assert "'test_rasnet' is no timm model: the nearest are" in run["error"]
        else:
            assert 0 <= run["mIoU"] <= run["accuracy"] <= 100 and run["seconds"] > 0


def test_the_figures_are_those_of_the_runs(probed):
    output, _, runs = probed
    (first, *_, last) = runs
    metrics = (output / "linear_test_resnet_random" / "metrics.json").read_text().splitlines()
    assert first["mIoU"] == json.loads(metrics[-1])["sem_seg/mIoU"]
    sizes = {}
    for name, run in ("test_resnet", first), ("test_vit", last):
        sizes[name] = sum(p.numel() for p in TimmBackbone(name, freeze_at=5).parameters())
        assert run["backbone_parameters"] == sizes[name]
    channels = [shape.channels for shape in TimmBackbone("test_resnet").output_shape().values()]
    assert first["trained_parameters"] == 3 * sum(channels) + 3


def test_table_and_picture(probed):
    output, _, runs = probed
    lines = (output / "probe.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:10]]
    for run, row in zip(runs, cells):
        figures = [f"{run['mIoU']:.1f}", f"{run['accuracy']:.1f}"] if "mIoU" in run else ["-", "-"]
        assert row[:5] == [run["model"], run["weights"], run["head"], *figures]
    assert sum("test_rasnet, linear: model_name" in line for line in lines) == 1
    assert min(Image.open(output / "probe.png").size) > 200


def test_weights_of_a_file_are_the_backbone_s(probed, checkpoint):
    output, *_ = probed
    (folder,) = output.glob("linear_test_resnet_*backbone.pth")
    state = torch.load(folder / "model_final.pth", weights_only=True)["model"]
    weights = torch.load(checkpoint, weights_only=True)
    kept = {k: v for k, v in weights.items() if f"backbone.model.{k}" in state}
    assert len(kept) > 30
    assert all(torch.equal(v, state[f"backbone.model.{k}"]) for k, v in kept.items())


def test_the_cache_changes_nothing_but_the_time(probed, run, tmp_path):
    output, *_ = probed
    assert run(tmp_path, "--models=test_resnet=random", "--cache=0") == 0
    cached, plain = [
        [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
        for folder in (output / "linear_test_resnet_random", tmp_path / "linear_test_resnet_random")
    ]
    assert len(cached) == len(plain) > 3
    for one, other in zip(cached, plain):
        for key in one.keys() & {"total_loss", "sem_seg/mIoU", "sem_seg/pACC"}:
            assert one[key] == pytest.approx(other[key], rel=1e-3)
    assert len({row["total_loss"] for row in plain if "total_loss" in row}) >= 3


def test_resume_does_what_is_not_finished(run, checkpoint, tmp_path, capsys):
    fine, other = "test_resnet=random", f"test_resnet={checkpoint}"
    assert run(tmp_path, f"--models={fine},test_rasnet") == 1
    path = tmp_path / "linear_test_resnet_random" / "model_final.pth"
    before, first = path.stat().st_mtime_ns, json.loads((tmp_path / "probe.json").read_text())
    assert run(tmp_path, f"--models={fine},{other}", "train.seed=1", "--resume") == 2
    assert "have the overrides dataset.train_images=" in capsys.readouterr().err
    (tmp_path / "probe.json").write_text("{")
    assert run(tmp_path, f"--models={fine},{other}", "--resume") == 2
    assert f"--resume: {tmp_path / 'probe.json'} cannot be read: " in capsys.readouterr().err
    (tmp_path / "probe.json").write_text(json.dumps(first))
    assert run(tmp_path, f"--models={fine},{other}", "--resume") == 0
    runs = json.loads((tmp_path / "probe.json").read_text())["runs"]
    assert runs[0] == first["runs"][0] and path.stat().st_mtime_ns == before
    assert [row["weights"] for row in runs] == ["random", str(checkpoint)]


def test_an_interrupted_run_begins_again(run, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, "--models=test_resnet=random")
    assert run(tmp_path, "--models=test_resnet=random") == 2
    assert "choose another, go on with --resume, or replace" in capsys.readouterr().err
    assert run(tmp_path, "--models=test_resnet=random", "--resume") == 0
    assert (tmp_path / "linear_test_resnet_random" / "model_final.pth").exists()


def test_a_second_probe_is_refused_unless_asked(probed, run, capsys):
    output, *_ = probed
    assert run(output, "--models=test_resnet=random") == 2
    assert "holds probes already: choose another" in capsys.readouterr().err
    assert run(output, "--models=test_resnet=random", "--overwrite") == 0
    assert len(json.loads((output / "probe.json").read_text())["runs"]) == 1


def test_without_weights_it_says_how_to_give_others(run, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert run(tmp_path, "--models=test_resnet") == 1
    text = (tmp_path / "probe.md").read_text()
    assert "could not be downloaded" in text
    assert "; here that is --models test_resnet=FILE or test_resnet=random" in text


WRONG = {
    "head": (["--heads=liner"], "--heads='liner' is unknown: valid are 'dpt', 'fpn', 'linear'"),
    "cache": (["--cache=-1"], "--cache -1.0 must be a number of GiB from 0"),
    "key": (["model.backbone.model_nam=x"], "'model.backbone.model_nam' is unknown"),
    "output": (["train.output_dir=x"], "train.output_dir is a folder of each run: set --output"),
    "weights": (["train.init_checkpoint=x"], "train.init_checkpoint is of each run: set --models"),
    "model": (["model.backbone.model_name=x"], "model.backbone.model_name is of each run: set"),
    "data": (["dataset.train_images=nowhere"], "image_root='nowhere' must be"),
    "classes": (["dataset.num_classes=0"], "num_classes=0 must be"),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused(tiny, tmp_path, capsys, words, message):
    argv = ["--models=test_resnet=random", f"--output={tmp_path / 'new'}", *paths(tiny), *SMALL]
    assert run_main(probe, *argv, *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
