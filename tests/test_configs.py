"""Every config trains, evaluates and can be saved, with a tiny backbone on tiny data."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detbackbones import get_config, list_configs
from detbackbones.data.coco import register_coco
from detbackbones.training.overrides import apply_overrides
from detbackbones.training.run import fit, prepare
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_panoptic_separated
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf
from PIL import Image

BOTTOM_UP = "model.backbone.bottom_up"  # or model.backbone, where there is no pyramid
STUFF = 54  # classes of the heads for COCO's stuff

# What takes the place of a config's backbone: the first that is in its file's name.
TINY = {
    "torchvision": [
        f"{BOTTOM_UP}.model_name=mobilenet_v3_small",
        f"{BOTTOM_UP}.weights=null",
        f"{BOTTOM_UP}.norm=BN",  # frozen, its random weights let the features explode
    ],
    "convnext": [f"{BOTTOM_UP}.model_name=test_convnext", f"{BOTTOM_UP}.pretrained=False"],
    "efficientnet": [
        f"{BOTTOM_UP}.model_name=test_efficientnet",
        f"{BOTTOM_UP}.pretrained=False",
    ],
    "swin": [
        f"{BOTTOM_UP}.pretrained=False",
        f"{BOTTOM_UP}.model_kwargs.embed_dim=16",
        f"{BOTTOM_UP}.model_kwargs.depths=[1, 1, 1, 1]",
        f"{BOTTOM_UP}.model_kwargs.num_heads=[1, 2, 2, 2]",
    ],
    "adapter": [
        f"{BOTTOM_UP}.net.model_name=test_vit",
        f"{BOTTOM_UP}.net.pretrained=False",
        f"{BOTTOM_UP}.net.patch_size=null",
    ],
    "eomt": [f"{BOTTOM_UP}.model_name=vit_tiny_patch16_224", f"{BOTTOM_UP}.pretrained=False"],
    "dinov2": [f"{BOTTOM_UP}.model_name=vit_tiny_patch16_224", f"{BOTTOM_UP}.pretrained=False"],
    "vit": [f"{BOTTOM_UP}.model_name=test_vit", f"{BOTTOM_UP}.pretrained=False"],
    "": [f"{BOTTOM_UP}.model_name=test_resnet", f"{BOTTOM_UP}.pretrained=False"],
}

EVERY = [name for name in list_configs() if not name.startswith("detrex/")]  # they need detrex
CONFIGS = [name for name in EVERY if not name.startswith("distill/")]  # which detects nothing
DETRS = [
    name for name in CONFIGS if any(w in name for w in ("detr", "dino", "mask2former", "eomt"))
]
PYRAMIDS = [
    name for name in CONFIGS if ("timm_r50" in name or "finetune" in name) and name not in DETRS
]
METRIC = {
    "semantic": "sem_seg/mIoU",
    "probe": "sem_seg/mIoU",
    "mask_rcnn": "segm/AP",
    "instance": "segm/AP",
    "panoptic": "panoptic_seg/PQ",
}


def draw_panoptic(tiny, split, folder):
    """The label maps as COCO's panoptic maps, a segment for each class; returns the JSON file."""
    annotations = []
    for image in json.loads((tiny / f"{split}.json").read_text())["images"]:
        name = f"{Path(image['file_name']).stem}.png"
        labels = np.asarray(Image.open(tiny / "labels" / split / name))
        colours = np.stack([labels, 0 * labels, 0 * labels], 2)
        Image.fromarray(colours).save(folder / name)
        infos = [{"id": int(i), "category_id": 100 + int(i)} for i in np.unique(labels) if i]
        annotations.append({"image_id": image["id"], "file_name": name, "segments_info": infos})
    (folder / "panoptic.json").write_text(json.dumps({"annotations": annotations}))
    return str(folder / "panoptic.json")


@pytest.fixture(scope="module")
def datasets(tiny, tmp_path_factory):
    """The tiny data set in the forms of COCO: the name that stands for each builtin one."""
    names = {}
    for split in ("train", "val"):
        images, labels = str(tiny / "images" / split), str(tiny / "labels" / split)
        json_file = str(tiny / f"{split}.json")
        names[f"coco_2017_{split}"] = register_coco(json_file, images, "polygon")
        metadata = {
            "thing_classes": ["circle", "square"],
            "thing_dataset_id_to_contiguous_id": {1: 0, 2: 1},
            "stuff_classes": [f"stuff {i}" for i in range(STUFF)],
            "stuff_dataset_id_to_contiguous_id": {100 + i: i for i in range(STUFF)},
        }
        panoptic = tmp_path_factory.mktemp("panoptic")
        register_coco_panoptic_separated(
            f"tiny_{split}_panoptic",
            metadata,
            images,
            str(panoptic),
            draw_panoptic(tiny, split, panoptic),
            labels,
            json_file,
        )
        for form in ("separated", "stuffonly"):
            names[f"coco_2017_{split}_panoptic_{form}"] = f"tiny_{split}_panoptic_{form}"
    yield names
    for name in names.values():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def load(tiny, datasets, tmp_path):
    """Load a config that is as it is but small: 64 pixels, 64 channels, two iterations."""

    def load_small(name, *words):
        cfg = get_config(name)
        file = name.rpartition("/")[2]
        words = words or next(w for part, w in TINY.items() if part in file)
        if "bottom_up" not in cfg.model.backbone:
            words = [word.replace(BOTTOM_UP, "model.backbone") for word in words]
        apply_overrides(cfg, list(words))
        apply_overrides(
            cfg,
            [
                f"train.max_iter={5 if name in DETRS else 2}",
                "train.log_period=1",
                "train.pictures=1",
                "train.device=cpu",
                f"train.output_dir='{tmp_path}'",
                "dataloader.train.total_batch_size=2",
                "dataloader.train.num_workers=0",
                "dataloader.test.num_workers=0",
                "dataloader.test.mapper.augmentations.0.short_edge_length=64",
            ],
        )
        if "out_channels" in cfg.model.backbone:
            cfg.model.backbone.out_channels = 64
        if "train_sizes" in cfg.get("dataset", {}):
            cfg.dataset.train_sizes = [64]
        for augmentation in cfg.dataloader.train.mapper.augmentations:
            if "target_height" in augmentation:
                augmentation.update(target_height=64, target_width=64)
            elif "crop_size" in augmentation:
                augmentation.crop_size = (64, 64)
            elif "short_edge_length" in augmentation:
                augmentation.short_edge_length = [64]
            elif "tfm_or_aug" in augmentation:
                resize, crop = augmentation.tfm_or_aug.augs
                resize.short_edge_length, crop.crop_size = [64, 80], (48, 64)
        if "config_kwargs" in cfg.model:
            cfg.model.num_queries = 20
            blocks = "num_blocks" if cfg.model.get("architecture") == "eomt" else "decoder_layers"
            cfg.model.config_kwargs[blocks] = 2
        if "task" in cfg.model:
            cfg.model.config_kwargs.train_num_points = 100
        if "dataset" in cfg:
            for split in ("train", "val"):
                cfg.dataset[f"{split}_images"] = str(tiny / "images" / split)
                key, value = ("json", f"{split}.json")
                if "num_classes" in cfg.dataset:
                    key, value = ("labels", f"labels/{split}")
                    cfg.dataset.num_classes = 3
                cfg.dataset[f"{split}_{key}"] = str(tiny / value)
        else:
            for loader in (cfg.dataloader.train, cfg.dataloader.test):
                loader.dataset.names = datasets[loader.dataset.names]
            detector = cfg.model.get("roi_heads", cfg.model)
            if detector.get("num_things"):
                detector.update(num_things=2, num_classes=2 + STUFF - 1)
            elif "num_classes" in detector and detector.get("task") != "semantic":
                detector.num_classes = 2
        roi_heads = cfg.model.get("roi_heads", {})
        for head in [*roi_heads.get("box_heads", ()), roi_heads.get("box_head")]:
            if head:
                head.fc_dims = [32, 32]
        # detections whatever the score, or COCOEvaluator has nothing to evaluate
        for predictor in [*roi_heads.get("box_predictors", ()), roi_heads.get("box_predictor")]:
            if predictor:
                predictor.update(test_score_thresh=-1.0, test_topk_per_image=10)
        if roi_heads:
            roi_heads.batch_size_per_image = 32
        elif "head" in cfg.model:
            cfg.model.test_score_thresh = -1.0
        if "mask_head" in roi_heads:
            roi_heads.mask_head.conv_dims = [16, 16]
        return cfg

    return load_small


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_trains_and_evaluates(load, tmp_path, name):
    cfg = load(name)
    run = prepare(cfg)
    model = run.model
    before = {k: v.detach().clone() for k, v in model.named_parameters()}
    fit(run)

    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    losses = [row for row in rows if "total_loss" in row]
    assert [row["iteration"] for row in losses] == list(range(cfg.train.max_iter))
    assert all(math.isfinite(v) for row in losses for k, v in row.items() if "loss" in k)
    assert any(next((m for d, m in METRIC.items() if d in name), "bbox/AP") in row for row in rows)
    for file in ("predictions.png", "curves.png", "model_final.pth"):
        assert (tmp_path / file).stat().st_size > 0

    trainable = {k: p for k, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable.values())
    after = dict(model.named_parameters())
    parts = {".".join(k.split(".")[:2]) for k in trainable}
    backbone = cfg.model.backbone.get("bottom_up", cfg.model.backbone)
    backbone = backbone.get("net", backbone)
    learns = {"backbone.bottom_up", "backbone.net", "backbone.model"} & parts
    assert bool(learns) == (backbone.get("freeze_at", 0) < 5)
    for part in parts:  # the backbone, the pyramid's convolutions, each head
        keys = [k for k in trainable if k.startswith(part)]
        assert any(not torch.equal(before[k], after[k]) for k in keys), part
    frozen = [k for k, p in model.named_parameters() if not p.requires_grad]
    assert frozen or backbone.get("freeze_at", 0) == 0
    assert all(torch.equal(before[k], after[k]) for k in frozen)


@pytest.mark.parametrize("name", EVERY)
def test_every_config_can_be_saved(name, tmp_path):
    cfg, file = get_config(name), str(tmp_path / "config.yaml")
    LazyConfig.save(cfg, file)
    assert not (tmp_path / "config.yaml.pkl").exists()
    loaded = LazyConfig.load(file)
    LazyConfig.save(loaded, str(tmp_path / "again.yaml"))
    assert (tmp_path / "again.yaml").read_text() == (tmp_path / "config.yaml").read_text()
    assert OmegaConf.to_container(loaded, resolve=True).keys() == cfg.keys()
    assert loaded.model.backbone.get("out_channels") == cfg.model.backbone.get("out_channels")


@pytest.mark.parametrize("model_name", ["regnety_002", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("detector", ["mask_rcnn", "retinanet", "semantic_fpn"])
def test_the_name_alone_changes_the_backbone(load, detector, model_name):
    words = (f"{BOTTOM_UP}.model_name={model_name}", f"{BOTTOM_UP}.pretrained=False")
    cfg = load(f"{detector}/timm_r50_fpn_1x.py", *words)
    model = instantiate(cfg.model)
    batch = next(iter(instantiate(cfg.dataloader.train)))
    with EventStorage():
        losses = model(batch)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", PYRAMIDS)
def test_no_channel_number_is_typed_in(load, name):
    """Another width of the pyramid is taken up by every layer that follows it."""
    cfg = load(name)
    narrow = instantiate(cfg.model)
    cfg.model.backbone.out_channels = 128
    wide = instantiate(cfg.model)
    changed = {
        key.rpartition(".")[0]: (before.shape, after.shape)
        for (key, before), after in zip(narrow.named_parameters(), wide.parameters())
        if before.shape != after.shape
    }
    assert len(changed) > 4
    for before, after in changed.values():
        assert all(b == a or a == 2 * b for b, a in zip(before, after))


def test_a_config_that_does_not_exist():
    with pytest.raises(FileNotFoundError, match="'mask_rcnn/timm_r50.py'.*timm_r50_fpn_1x.py"):
        get_config("mask_rcnn/timm_r50.py")
    assert len(list_configs()) >= 22
    assert not [name for name in list_configs() if "common" in name]
