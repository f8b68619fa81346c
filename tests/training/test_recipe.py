"""The parts of the training recipe on real detectors: accumulation, and the average of weights."""

import pytest
import torch
from detbackbones import get_config
from detbackbones.training.build import build_model, build_trainer, load_trained
from detbackbones.training.run import check_config, fit, prepare


def small(tiny, tmp_path, name):
    """A config for the tiny data, whose images are all of the same size."""
    cfg = get_config(f"finetune/{name}.py")
    for split in ("train", "val"):
        cfg.dataset[f"{split}_images"] = f"{tiny}/images/{split}"
        key = "labels" if name == "semantic_fpn" else "json"
        path = f"labels/{split}" if key == "labels" else f"{split}.json"
        cfg.dataset[f"{split}_{key}"] = f"{tiny}/{path}"
    if name == "semantic_fpn":
        cfg.dataset.num_classes = 3
    if "num_queries" in cfg.model:
        cfg.model.num_queries = 20
    cfg.dataset.update(train_sizes=[64], val_size=64)
    backbone = cfg.model.backbone.get("bottom_up", cfg.model.backbone)
    backbone.update(model_name="test_resnet", pretrained=False, freeze_at=0)
    cfg.dataloader.train.update(total_batch_size=4, num_workers=0)
    cfg.dataloader.test.num_workers = 0
    cfg.train.update(max_iter=4, eval_period=0, log_period=1, pictures=0)
    cfg.train.output_dir = str(tmp_path / "run")
    return cfg


def step(cfg, steps):
    """The gradient of the first batch in so many parts, and its losses."""
    cfg = check_config(cfg, [f"train.accumulation_steps={steps}"])
    trainer = build_trainer(cfg, loads_all=False)
    data = next(iter(trainer.data_loader))
    torch.manual_seed(0)
    losses = trainer._accumulate(data)
    gradients = {k: p.grad for k, p in trainer.model.named_parameters() if p.requires_grad}
    return gradients, losses


@pytest.mark.parametrize("name", ["semantic_fpn", "dino", "rt_detr"])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(tiny, tmp_path, name):
    """With frozen batch norm, and images with other numbers of boxes."""
    cfg = small(tiny, tmp_path, name)
    if name == "dino":
        cfg.model.config_kwargs.num_denoising = 0  # whose noise is drawn for a batch
    if name == "rt_detr":  # whose encoder has batch norm
        cfg.model.architecture = "deformable_detr"
        cfg.model.config_kwargs = {"encoder_layers": 1, "decoder_layers": 2, "dropout": 0.0}
    (whole, losses), (parts, others) = step(cfg, 1), step(cfg, 2)
    torch.testing.assert_close(others, losses, rtol=1e-5, atol=1e-6)
    largest = max(gradient.abs().max() for gradient in whole.values())
    for key, gradient in whole.items():
        assert (parts[key] - gradient).abs().max() <= 1e-5 * largest, key


def test_a_batch_that_cannot_be_divided(tiny, tmp_path):
    cfg = small(tiny, tmp_path, "rt_detr")
    with pytest.raises(ValueError, match="train.accumulation_steps=3 must divide the 4 images"):
        step(cfg, 3)


@pytest.mark.parametrize(
    "name", ["faster_rcnn", "fcos", "mask_rcnn", "semantic_fpn", "dino", "mask2former_instance"]
)
def test_the_average_is_what_is_evaluated_and_written(tiny, tmp_path, name):
    """A model that loads it gives what the average gave, whose weights were changed in place."""
    cfg = small(tiny, tmp_path, name)
    cfg.train.model_ema.update(enabled=True, decay=0.9)
    run = tmp_path / "run"
    run.mkdir()
    trained = prepare(check_config(cfg))
    fit(trained)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    best = ["model_best.pth"] if (run / "model_best.pth").is_file() else []
    assert best or name not in ("faster_rcnn", "semantic_fpn")  # others find nothing
    for file in ("model_final.pth", *best):
        model = build_model(check_config(cfg), loads_all=False).eval()
        load_trained(cfg, model, str(run / file))
        assert_equal(model.state_dict(), trained.evaluated.state_dict())
        assert_equal(model.backbone(x), trained.evaluated.backbone(x))
    raw = trained.model.backbone.eval()(x)
    assert all(not torch.equal(raw[key], value) for key, value in model.backbone(x).items())


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
