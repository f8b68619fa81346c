import json

import numpy as np
import pytest
from detbackbones.training.curves import draw_curves, read_curves
from PIL import Image


def metrics_file(tmp_path, rows, end=""):
    path = tmp_path / "metrics.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return path


def test_curves_take_the_last_of_repeated_iterations_and_skip_torn_lines(tmp_path):
    rows = [{"iteration": i, "total_loss": 9.0, "lr": 0.1} for i in (19, 39, 59)]
    rows += [{"iteration": i, "total_loss": 3.0, "lr": 0.1} for i in (39, 59)]
    rows += [{"iteration": 59, "bbox/AP": 12.5}]
    curves = read_curves(metrics_file(tmp_path, rows, end='{"iteration": 79, "total_l'))
    np.testing.assert_array_equal(curves["total_loss"], [[19, 39, 59], [9, 3, 3]])
    np.testing.assert_array_equal(curves["bbox/AP"], [[59], [12.5]])


def test_metrics_get_their_own_axes(tmp_path):
    rows = [{"iteration": i, "total_loss": 1.0 + 1 / i, "lr": 0.1} for i in range(1, 300)]
    path = tmp_path / "new" / "curves.png"
    assert draw_curves(metrics_file(tmp_path, rows), path) == path
    assert Image.open(path).size == (650, 500)
    diagnostics = {"iteration": 299, "fast_rcnn/cls_accuracy": 0.9, "bbox/AP-person": 3.0}
    draw_curves(metrics_file(tmp_path, [*rows, diagnostics]), path)
    assert Image.open(path).size == (650, 500)
    metric = {"iteration": 299, "shapes_val/segm/AP50": 40.0, "sem_seg/mIoU": float("nan")}
    draw_curves(metrics_file(tmp_path, [*rows, metric]), path)
    assert Image.open(path).size == (1300, 500)


def test_losses_of_inner_layers_are_left_out(tmp_path):
    rows = [{"iteration": i, "total_loss": 2.0, "loss_ce": 1.0, "lr": 0.1} for i in (1, 2)]
    plain = draw_curves(metrics_file(tmp_path, rows), tmp_path / "a.png").read_bytes()
    inner = [{"loss_ce_0": 1.5}, {"loss_ce_aux_1": 1.2}, {"loss_ce_dn_0": 2.0, "loss_ce_enc": 3.0}]
    pictures = {
        draw_curves(
            metrics_file(tmp_path, [row | more for row in rows]), tmp_path / "b.png"
        ).read_bytes()
        for more in inner
    }
    assert len(pictures) == 1 and plain not in pictures  # the legend says that they are there
    other = [row | {"loss_mask": 1.5} for row in rows]
    assert draw_curves(metrics_file(tmp_path, other), tmp_path / "c.png").read_bytes() != plain


def test_a_file_without_losses_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must have losses"):
        draw_curves(metrics_file(tmp_path, [{"iteration": 1, "lr": 0.1}]), tmp_path / "a.png")
