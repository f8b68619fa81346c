"""Distillation: the loss, what learns, the program and the student that it writes."""

import json

import pytest
import torch
import torch.nn.functional as F
from detbackbones import TimmBackbone
from detbackbones.cli import distill
from detbackbones.data.unlabelled import register_images
from detbackbones.training.distillation import FeatureDistiller, SimilarityEvaluator
from detectron2.data import DatasetCatalog
from support import images, randomise, run_main, without_gradient


def distiller(student="test_vit", **kwargs):
    torch.manual_seed(0)
    teacher = TimmBackbone("test_resnet", norm="FrozenBN", freeze_at=5)
    return FeatureDistiller(backbone=TimmBackbone(student), teacher=teacher, **kwargs)


def batch(*sizes):
    return [{"image": (127 + 50 * images(3, *size)).clamp(0, 255).byte()} for size in sizes]


def test_the_loss_is_of_standardised_maps():
    model = distiller()
    assert model.pairs == dict.fromkeys(("res2", "res3", "res4", "res5"), "res4")
    inputs = batch((64, 96), (64, 96))
    losses = model(inputs)
    x = model.preprocess_image(inputs).tensor
    pixels = torch.stack([each["image"] for each in inputs]).float()
    own = model.teacher
    mean, std = (torch.tensor(value)[:, None, None] for value in (own.pixel_mean, own.pixel_std))
    targets = own((pixels - mean) / std)
    for (name, target), projection in zip(targets.items(), model.projections):
        mean, std = target.mean((0, 2, 3), True), target.var((0, 2, 3), False, True)
        target = (target - mean) / (std + 1e-5).sqrt()
        found = projection(model.backbone(x)["res4"])
        found = F.interpolate(found, size=target.shape[-2:], mode="bilinear")
        cosine = (found * target).sum(1) / found.norm(dim=1) / target.norm(dim=1)
        expected = 0.9 * (1 - cosine.mean()) + 0.1 * F.smooth_l1_loss(found, target)
        torch.testing.assert_close(losses[f"loss_{name}"], expected, rtol=1e-4, atol=1e-5)
    sum(losses.values()).backward()
    assert without_gradient(model) == []
    assert not any(p.requires_grad for p in model.teacher.parameters())


def test_a_level_learns_from_that_of_the_nearest_stride():
    model = distiller("test_convnext")
    assert model.pairs == {f"res{n}": f"res{n}" for n in range(2, 6)}


def test_an_evaluation_is_the_mean_cosine():
    model = distiller()
    randomise(model.teacher)
    model(batch((64, 64), (64, 64)))  # the teacher's mean and deviation
    evaluator = SimilarityEvaluator()
    evaluator.reset()
    model.eval()
    with torch.no_grad():
        for inputs in (batch((64, 64)), batch((70, 90))):
            evaluator.process(inputs, model(inputs))
    metrics = evaluator.evaluate()["similarity"]
    assert list(metrics) == ["cosine", *(f"cosine-res{n}" for n in range(2, 6))]
    levels = [metrics[f"cosine-res{n}"] for n in range(2, 6)]
    assert metrics["cosine"] == pytest.approx(sum(levels) / 4) and -100 <= min(levels) < 100


def test_a_teacher_does_not_learn():
    with pytest.raises(ValueError, match="teacher must have freeze_at=5"):
        FeatureDistiller(backbone=TimmBackbone("test_vit"), teacher=TimmBackbone("test_resnet"))


def test_each_tenth_image_is_for_validation(tiny):
    root = str(tiny / "images" / "train")
    parts = [DatasetCatalog.get(register_images(root, part)) for part in ("all", "train", "val")]
    every, train, val = ([d["file_name"] for d in part] for part in parts)
    assert val == every[::10] and sorted(train + val) == every


def test_wrong_images(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="image_root='.*' must be the folder of the images"):
        register_images(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="part='test' is unknown"):
        register_images(str(tiny), "test")
    (tmp_path / "one.txt").write_text(str(next((tiny / "images" / "train").iterdir())))
    with pytest.raises(ValueError, match="must have at least 2 images, and has 1"):
        register_images(str(tmp_path / "one.txt"), "train")


def test_the_program_writes_a_student_that_has_learned(tiny, tmp_path, capsys):
    folder = tmp_path / "student"
    words = ["test_resnet", "test_vit", tiny / "images" / "train", "--output", folder]
    words += ["model.teacher.pretrained=False", "train.max_iter=30", "train.eval_period=15"]
    words += ["dataset.size=64", "train.device=cpu", "dataloader.train.total_batch_size=4"]
    words += ["dataloader.train.num_workers=0", "dataloader.test.num_workers=0"]
    assert run_main(distill, *words, "train.log_period=1") == 0
    assert f"wrote {folder / 'student.safetensors'}" in capsys.readouterr().out
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    found = [row["similarity/cosine"] for row in rows if "similarity/cosine" in row]
    assert len(found) == 2 and found[1] > found[0] > 0
    state = torch.load(folder / "model_final.pth", weights_only=True)["model"]
    student = TimmBackbone("test_vit", checkpoint_path=str(folder / "student.safetensors"))
    for key, value in student.state_dict().items():
        assert torch.equal(value, state[f"backbone.{key}"])
    assert any(key == "backbone.model.norm.weight" for key in state)  # it learned through it
    assert (folder / "curves.png").stat().st_size > 0

    assert run_main(distill, *words) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert run_main(distill, *words, "--resume", "train.max_iter=32") == 0
    assert "iterations 30 to 32" in (folder / "log.txt").read_text()


def test_wrong_words(tiny, tmp_path, capsys):
    words = [tiny / "images" / "train", "--output", tmp_path / "new"]
    assert run_main(distill, "test_resnet", "test_vitt", *words) == 2
    assert "model_name='test_vitt' is no timm model" in capsys.readouterr().err
    none = tmp_path / "none"
    words = ["test_resnet", "test_vit", none, "--output", tmp_path / "new"]
    assert run_main(distill, *words, "model.teacher.pretrained=False") == 2
    assert f"image_root='{none}' must be" in capsys.readouterr().err
