"""The learning-rate range test."""

import numpy as np
import pytest
from detbackbones.training.find_lr import find_lr
from PIL import Image


def test_the_loss_falls_and_then_rises(tiny_cfg, tmp_path):
    tiny_cfg.model.backbone.bottom_up.update(norm="BN", freeze_at=0)
    tiny_cfg.train.clip_grad.enabled = False
    found = find_lr(tiny_cfg, lowest=1e-5, highest=1e3, steps=40)
    assert len(found.rates) == len(found.losses) < 40  # it rose
    assert found.rates[0] == pytest.approx(1e-5)
    assert found.rates[5] / found.rates[4] == pytest.approx(10 ** (8 / 40))
    assert 1e-5 < found.best < found.rates[-1]
    assert found.best <= found.rates[found.losses.argmin()]
    assert found.losses[-1] > found.losses.min() or not np.isfinite(found.losses[-1])
    assert found.picture == tmp_path / "run" / "find_lr.png"
    assert Image.open(found.picture).size == (700, 450)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"find_lr.png"}


@pytest.mark.parametrize(
    ("words", "must"),
    [
        ({"lowest": 0.0}, "lowest=0.0 must be above 0, and below highest=0.1"),
        ({"lowest": 1.0}, "lowest=1.0 must be above 0, and below highest=0.1"),
        ({"steps": 3}, "steps=3 must be at least 10"),
    ],
)
def test_wrong_ranges(tiny_cfg, words, must):
    with pytest.raises(ValueError, match=must):
        find_lr(tiny_cfg, **words)


@pytest.mark.parametrize("mode", ["--find-lr", "--find-batch"])
@pytest.mark.parametrize("other", ["--resume", "--overwrite", "--eval-only"])
def test_it_stands_alone(run_train_net, capsys, mode, other):
    assert run_train_net("--config-file", "finetune/fcos.py", mode, other) == 2
    assert f"{mode} must stand without {other}" in capsys.readouterr().err
