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
    assert model.pairs == {f"res{n}": (f"res{n}", "res4") for n in range(2, 6)}
    model.teacher_pixel_mean += torch.tensor([10.0, 20.0, 30.0])[:, None, None]
    model.teacher_pixel_std *= torch.tensor([0.5, 1.0, 2.0])[:, None, None]
    inputs = batch((64, 96), (64, 96))
    losses = model(inputs)
    x = model.preprocess_image(inputs).tensor
    pixels = torch.stack([each["image"] for each in inputs]).float()
    mean = 127.5 + torch.tensor([10.0, 20.0, 30.0])[:, None, None]
    std = torch.tensor([63.75, 127.5, 255.0])[:, None, None]
    targets = model.teacher((pixels - mean) / std)
    for (name, target), projection in zip(targets.items(), model.projections.values()):
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
    assert model.pairs == {f"res{n}": (f"res{n}", f"res{n}") for n in range(2, 6)}


def test_all_of_a_student_learns_from_a_teacher_of_one_level():
    teacher = TimmBackbone("test_vit", freeze_at=5)
    model = FeatureDistiller(backbone=TimmBackbone("test_resnet"), teacher=teacher)
    sum(model(batch((64, 64), (64, 64))).values()).backward()
    assert without_gradient(model) == []
    assert len(model.pairs) == 4 and model.pairs["res4"] == ("res4", "res4")


def test_an_evaluation_is_the_mean_cosine():
    model = distiller()
    randomise(model.teacher)
    model(batch((64, 64), (64, 64)))  # the teacher's mean and deviation
    evaluator = SimilarityEvaluator()
    evaluator.reset()
    model.eval()
    inputs = batch((64, 64), (70, 90))
    expected = dict.fromkeys(("res2", "res3", "res4", "res5"), 0.0)
    with torch.no_grad():
        evaluator.process(inputs, model(inputs))
        for each in inputs:
            x = model.preprocess_image([each]).tensor
            for name, target in model.teacher(x).items():  # of the same mean and deviation
                norm = model.standards[name]
                mean, var = (v[:, None, None] for v in (norm.running_mean, norm.running_var))
                target = (target - mean) / (var + norm.eps).sqrt()
                found = model.projections[name](model.backbone(x)["res4"])
                found = F.interpolate(found, size=target.shape[-2:], mode="bilinear")
                cosine = (found * target).sum(1) / found.norm(dim=1) / target.norm(dim=1)
                expected[name] += 50 * float(cosine.mean())
    metrics = evaluator.evaluate()["similarity"]
    assert metrics.pop("cosine") == pytest.approx(sum(expected.values()) / 4, abs=1e-3)
    expected = {f"cosine-{name}": value for name, value in expected.items()}
    assert metrics == pytest.approx(expected, abs=1e-3)


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
    folder = tmp_path / "one's student"
    words = ["test_resnet", "test_vit", tiny / "images" / "train", "--output", folder]
    words += ["model.teacher.pretrained=False", "train.max_iter=30", "train.eval_period=15"]
    words += [
        "dataset.size=64",
        "dataset.train_sizes=[64,80]",
        "train.device=cpu",
        "dataloader.train.total_batch_size=4",
    ]
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
