"""Runs that send their metrics to trackers, which here keep them on the disk."""

import json

import pytest
from detbackbones.training import train
from detbackbones.training.run import check_config


@pytest.fixture
def cfg(tiny_cfg):
    tiny_cfg.train.update(max_iter=3, eval_period=2, log_period=1, pictures=0)
    return tiny_cfg


def test_mlflow(cfg, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    cfg.train.trackers = ["mlflow"]
    train(cfg)
    run = json.loads((tmp_path / "run" / "trackers.json").read_text())["mlflow"]
    client = mlflow.MlflowClient(f"file:{tmp_path}/mlruns")
    data = client.get_run(run).data
    assert data.params["train.max_iter"] == "3"
    assert data.params["model.backbone.bottom_up.model_name"] == "test_resnet"
    assert {"total_loss", "lr", "bbox/AP50"} <= data.metrics.keys()
    assert [x.step for x in client.get_metric_history(run, "total_loss")] == [0, 1, 2]
    cfg.train.max_iter = 5
    train(cfg, resume=True)
    assert json.loads((tmp_path / "run" / "trackers.json").read_text())["mlflow"] == run
    assert [x.step for x in client.get_metric_history(run, "total_loss")] == [0, 1, 2, 3, 4]


def test_wandb(cfg, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    cfg.train.trackers = ["wandb"]
    train(cfg)
    run = json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]
    (file,) = (tmp_path / "run" / "wandb").glob(f"offline-run-*-{run}/run-{run}.wandb")
    content = file.read_bytes()
    for text in (b"total_loss", b"bbox/AP50", b"model.backbone.bottom_up.model_name"):
        assert text in content
    cfg.train.max_iter = 5
    train(cfg, resume=True)
    assert json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"] == run
    assert len([*(tmp_path / "run" / "wandb").glob(f"offline-run-*-{run}")]) >= 1


def test_an_unknown_tracker_is_refused(cfg):
    cfg.train.trackers = ["wandbb"]
    with pytest.raises(ValueError, match="train.trackers='wandbb' is unknown: .*'wandb'"):
        check_config(cfg)
