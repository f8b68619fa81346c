"""Training and evaluating from Python, as in a notebook."""

import copy
import json
import logging
import re

import pytest
import torch
from detbackbones import FeatureBackbone, get_config
from detbackbones.training import evaluate, train
from detbackbones.training.log import logging_to
from detbackbones.training.run import check_config


@pytest.fixture
def cfg(tiny_cfg):
    return tiny_cfg


def test_a_config_is_trained_and_evaluated(cfg, tmp_path, capsys):
    before = copy.deepcopy(cfg)
    assert cfg.train.device == "auto"
    handlers = logging.getLogger("detbackbones").handlers[:]
    results = train(cfg)
    assert cfg == before
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]
    metrics = {key: value for line in lines for key, value in line.items()}
    assert results["bbox"]["AP50"] == pytest.approx(metrics["bbox/AP50"], nan_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert f"device: {device}" in (run / "config.yaml").read_text()
    for name in ("model_final.pth", "predictions.png", "curves.png", "log.txt"):
        assert (run / name).stat().st_size > 0
    assert logging.getLogger("detbackbones").handlers == handlers
    assert "iter 2/2" in capsys.readouterr().out

    assert evaluate(cfg)["bbox"] == pytest.approx(results["bbox"], nan_ok=True)
    with pytest.raises(FileExistsError, match="holds a run already .*resume=True.*overwrite=True"):
        train(cfg)
    cfg.train.max_iter = 3
    train(cfg, resume=True)
    assert "from iteration 2" in (run / "log.txt").read_text()
    train(cfg, overwrite=True)
    text = (run / "log.txt").read_text()
    assert re.findall("from iteration ([0-9])", text) == ["0"]
    assert "iter 3/3" in text


def test_what_is_wrong_is_an_error(cfg, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to evaluate: train.output_dir=.*run "):
        evaluate(cfg)
    cfg.train.init_checkpoint = str(tmp_path / "no.pth")
    with pytest.raises(FileNotFoundError, match="no.pth' does not exist"):
        train(cfg)
    cfg.train.seed = -1
    with pytest.raises(ValueError, match="train.seed=-1 must be"):
        train(cfg)
    del cfg.optimizer
    with pytest.raises(ValueError, match="the config has no 'optimizer'"):
        train(cfg)


def test_settings_that_a_config_lacks_are_there(cfg):
    cfg.train = {"max_iter": 7}
    full = check_config(cfg, ["train.seed=3"])
    assert (full.train.max_iter, full.train.seed, full.train.amp.enabled) == (7, 3, False)
    assert "seed" not in cfg.train


def test_each_log_has_its_own_file(tmp_path, capsys):
    log = logging.getLogger("detbackbones.test")
    for name in "ab":
        (tmp_path / name).mkdir()
        with logging_to(str(tmp_path / name)):
            log.info("this is %s", name)
    log.info("this is nowhere")
    for name in "ab":
        (line,) = (tmp_path / name / "log.txt").read_text().splitlines()
        assert line.endswith(f"INFO: this is {name}")
    assert [line[-9:] for line in capsys.readouterr().out.splitlines()] == [
        "this is a",
        "this is b",
    ]


def test_cached_features_train_as_computed_ones_do(cfg, tmp_path, monkeypatch):
    """Of a frozen backbone: the same losses and metrics, and each image is computed once."""
    cfg.model.backbone.bottom_up.freeze_at = 5
    cfg.train.max_iter = 30
    computed = []
    forward = FeatureBackbone.forward

    def counted(self, x):
        if self.training:
            computed.extend(image.numpy().tobytes() for image in x)
        return forward(self, x)

    monkeypatch.setattr(FeatureBackbone, "forward", counted)
    results, counts = [], []
    for size in (0, 0.5):
        cfg.train.update(feature_cache=size, output_dir=str(tmp_path / f"cache_{size}"))
        computed.clear()
        results.append(train(cfg)["bbox"])
        counts.append((len(computed), len(set(computed))))
    assert results[0] == pytest.approx(results[1], nan_ok=True)
    assert counts[0] == (60, counts[1][0]) and counts[1][0] == counts[1][1] < 60
    losses = [
        [json.loads(line).get("total_loss") for line in file.read_text().splitlines()]
        for file in sorted(tmp_path.glob("cache_*/metrics.json"))
    ]
    assert losses[0] == pytest.approx(losses[1])
    cfg.model.backbone.bottom_up.freeze_at = 2
    cfg.train.output_dir = str(tmp_path / "learns")
    with pytest.raises(ValueError, match="backbone must have freeze_at=5 for its feature maps"):
        train(cfg)


def test_what_no_cache_can_keep(cfg):
    cfg.train.feature_cache = 1
    eomt = get_config("finetune/eomt_instance.py")
    cfg.model = eomt.model
    cfg.model.backbone.update(model_name="test_vit", pretrained=False, freeze_at=5)
    with pytest.raises(ValueError, match="train.feature_cache=1 must be 0 with .*'eomt'"):
        train(cfg)
