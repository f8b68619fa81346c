"""Runs that send their metrics to trackers, which here keep them on the disk."""

import json

import pytest
from detbackbones.training import train
from detbackbones.training.run import check_config
from detbackbones.training.trackers import MLflowWriter


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
    content = b"".join(
        path.read_bytes() for path in (tmp_path / "run" / "wandb").glob(f"*/run-{run}.wandb")
    )
    assert content.count(b"total_loss") >= 5


def test_a_tracker_that_fails_ends_no_training(cfg, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    cfg.train.trackers = ["mlflow"]
    monkeypatch.setattr(MLflowWriter, "put", lambda *_: 1 / 0)
    train(cfg)
    assert (tmp_path / "run" / "log.txt").read_text().count("MLflowWriter cannot send") == 1
    assert mlflow.active_run() is None


def test_a_run_that_is_open_gets_the_metrics(cfg, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    cfg.train.trackers = ["mlflow"]
    mlflow.set_experiment("mine")  # or it would be that of another test
    with mlflow.start_run() as mine:
        train(cfg)
        assert mlflow.active_run().info.run_id == mine.info.run_id
    client = mlflow.MlflowClient(f"file:{tmp_path}/mlruns")
    assert len(client.get_metric_history(mine.info.run_id, "total_loss")) == 3


def test_a_tracker_that_cannot_start_is_said(cfg, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://at-all")
    cfg.train.trackers = ["mlflow"]
    with pytest.raises(ConnectionError, match=r"train.trackers=\['mlflow'\]: mlflow cannot start"):
        train(cfg)
    cfg.train.trackers = []
    train(cfg)  # the folder holds no run


def test_an_unknown_tracker_is_refused(cfg):
    cfg.train.trackers = ["wandbb"]
    with pytest.raises(ValueError, match="train.trackers='wandbb' is unknown: .*'wandb'"):
        check_config(cfg)
