"""The best model of a run, and runs that end where they get no better."""

import json
import math

import pytest
import torch
from detbackbones.training.best import BestModel
from detbackbones.training.run import check_config, train
from torch import nn


def best(folder, **kwargs):
    return BestModel(nn.Linear(1, 1), str(folder), **kwargs)


def saved(folder):
    return torch.load(folder / "model_best.pth", weights_only=True)


def test_the_best_is_kept(tmp_path):
    first = best(tmp_path, metric="bbox/AP50")
    for iteration, value in ((9, math.nan), (19, 3.0), (29, 5.0), (39, 4.0), (49, math.nan)):
        first.update({"bbox": {"AP": -value, "AP50": value}}, iteration)
    file = saved(tmp_path)
    assert (file["metric"], file["value"], file["iteration"]) == ("bbox/AP50", 5.0, 29)
    second = best(tmp_path)
    second.read(30)
    second.update({"bbox": {"AP": 9.0, "AP50": 4.5}}, 59)
    assert saved(tmp_path)["iteration"] == 29
    second.update({"bbox": {"AP": 0.0, "AP50": 5.5}}, 69)
    assert saved(tmp_path)["iteration"] == 69


def test_a_metric_that_is_not_there(tmp_path, caplog):
    """Such as that of masks, while nothing is found."""
    first = best(tmp_path, metric="segm/AP")
    first.update({"bbox": {"AP": math.nan}}, 9)
    assert "train.best_metric='segm/AP' is not among 'bbox/AP': " in caplog.text
    assert not (tmp_path / "model_best.pth").exists()
    first.update({"bbox": {"AP": 2.0}, "segm": {"AP": 1.0}}, 19)
    assert saved(tmp_path)["iteration"] == 19
    (tmp_path / "model_best.pth").unlink()
    best(tmp_path, metric="bbox/AP").update({"bbox": {"AP": 1.0}}, 9)
    with pytest.raises(ValueError, match="best_metric='bbox/AP50' must be 'bbox/AP', that of"):
        best(tmp_path, metric="bbox/AP50").read(10)


@pytest.fixture
def cfg(tiny_cfg):
    """A run that learns nothing, so that its second evaluation is no better than its first."""
    tiny_cfg.optimizer.lr = 1e-9
    tiny_cfg.train.update(max_iter=9, eval_period=2, patience=2)
    return tiny_cfg


def test_a_run_that_gets_no_better_ends(cfg, tmp_path):
    results = train(cfg)
    run = tmp_path / "run"
    file = saved(run)
    assert (file["metric"], file["iteration"]) == ("bbox/AP", 1)
    final = torch.load(run / "model_final.pth", weights_only=True)
    assert final["trainer"]["iteration"] == 5
    lines = [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "bbox/AP" in line] == [1, 3, 5]
    log = (run / "log.txt").read_text()
    assert "ends after 6 iterations: bbox/AP was never better than " in log
    assert "Exception during training" not in log
    assert f"{run}/model_best.pth" in log.rpartition("wrote ")[2]

    assert train(cfg, resume=True)["bbox"] == pytest.approx(results["bbox"], nan_ok=True)
    assert torch.load(run / "model_final.pth", weights_only=True)["trainer"]["iteration"] == 5
    cfg.train.patience = 3
    train(cfg, resume=True)
    assert torch.load(run / "model_final.pth", weights_only=True)["trainer"]["iteration"] == 7
    cfg.train.patience = None
    train(cfg, overwrite=True)
    assert torch.load(run / "model_final.pth", weights_only=True)["trainer"]["iteration"] == 8


def test_a_metric_that_cannot_be_is_refused_early(cfg):
    cfg.train.best_metric = "bbox/AP5"
    with pytest.raises(ValueError, match="train.best_metric='bbox/AP5' is unknown: .*'bbox/AP50'"):
        train(cfg)
    cfg.train.update(best_metric="bbox/AP-square", max_iter=1)
    train(cfg)


def test_patience_needs_evaluations(cfg):
    cfg.train.eval_period = 0
    with pytest.raises(ValueError, match="train.patience=2 must be null where train.eval_period"):
        check_config(cfg)
