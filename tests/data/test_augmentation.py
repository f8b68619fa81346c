"""Augmentations: pixels, boxes, masks and label maps stay together."""

import random

import detectron2.data.transforms as T
import numpy as np
import pytest
from detbackbones import get_config
from detbackbones.data import CheckedDatasetMapper
from detbackbones.data.augmentation import RandomZoomOut, Turn, build_augmentations
from detbackbones.training.run import check_config
from detectron2.config import instantiate
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as mask_util

WIDTH, HEIGHT = 120, 80
CENTERS = ((30, 25), (75, 50))


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """Two white discs on black, with boxes, masks, and a label map of 1 in 2."""
    folder = tmp_path_factory.mktemp("discs")
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    masks = [(x - a) ** 2 + (y - b) ** 2 < 15**2 for a, b in CENTERS]
    Image.fromarray(255 * np.any(masks, 0).astype(np.uint8)).save(folder / "a.png")
    Image.fromarray(1 + np.any(masks, 0).astype(np.uint8)).save(folder / "labels.png")
    annotations = []
    for mask in masks:
        rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
        box = mask_util.toBbox(rle).tolist()
        annotations.append({"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0})
        annotations[-1]["segmentation"] = rle
    return {
        "file_name": str(folder / "a.png"),
        "sem_seg_file_name": str(folder / "labels.png"),
        "annotations": annotations,
    }


def sample(picture, augmentations, seed):
    random.seed(seed)
    np.random.seed(seed)
    masks = {"use_instance_mask": True, "instance_mask_format": "bitmask"}
    return CheckedDatasetMapper(True, augmentations=augmentations, image_format="RGB", **masks)(
        picture
    )


RECIPES = {
    "nothing": {},
    "turns": {"upright": False},
    "zoom out": {"zoom_out": 1.0},
    "crop": {"crop": 1.0},
    "scale jitter": {"scale_jitter": [0.4, 2.0]},
    "all": {"upright": False, "zoom_out": 0.5, "crop": 0.5, "scale_jitter": [0.5, 1.5]},
    "rotation": [T.RandomRotation([-40, 40])],
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_all_that_belongs_to_an_image_stays_together(picture, recipe):
    augmentations = recipe
    if isinstance(recipe, dict):
        augmentations = build_augmentations([80, 120], 200, **recipe)
    sizes, inside = set(), 0
    for seed in range(12):
        got = sample(picture, augmentations, seed)
        white = got["image"][0].numpy() > 140  # and padding is gray
        labels, objects = got["sem_seg"].numpy(), got["instances"]
        masks = objects.gt_masks.tensor.numpy()
        assert white.shape == labels.shape == masks.shape[1:] == objects.image_size
        edge = 0.03 * white.size
        assert (masks.any(0) != white).sum() < edge
        assert ((labels == 2) != white).sum() < edge
        assert set(np.unique(labels)) <= {1, 2, 255}
        assert not (white & (labels == 255)).any()
        for mask, box in zip(masks, objects.gt_boxes.tensor.numpy()):
            y, x = np.nonzero(mask)
            tight = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])
            loose = 12 if recipe == RECIPES["rotation"] else 1.6  # it has the turned box around it
            assert np.abs(box - tight).max() < loose
        sizes.add(white.shape)
        inside += len(masks)
    assert inside > 8
    assert len(sizes) > 1 or "scale_jitter" in recipe


def test_a_turn_moves_pixels_and_points_alike():
    image = np.arange(6 * 4).reshape(6, 4).astype(np.uint8)
    points = np.array([[1.5, 2.5], [0.5, 5.5]])  # centres of pixels
    for quarters in range(4):
        turn = Turn(quarters, 6, 4)
        turned = turn.apply_image(image)
        for (x, y), (a, b) in zip(points, turn.apply_coords(points.copy())):
            assert turned[int(b), int(a)] == image[int(y), int(x)]
        assert np.array_equal(turn.inverse().apply_image(turned), image)
        back = turn.inverse().apply_coords(turn.apply_coords(points.copy()))
        np.testing.assert_allclose(back, points)


def test_zooming_out_keeps_the_pixels(picture):
    np.random.seed(3)
    image = np.full((HEIGHT, WIDTH, 3), 7, np.uint8)
    larger = RandomZoomOut().get_transform(image).apply_image(image)
    assert larger.dtype == np.uint8 and larger.size > image.size
    assert (larger == 7).sum() == image.size and set(np.unique(larger)) == {7, 128}


@pytest.mark.parametrize("channels", [1, 3])
def test_colours(channels):
    image = np.full((8, 9, channels), 90, np.uint8)
    image[:4] = [[[50, 100, 130]]] if channels == 3 else 60
    found = set()
    for seed in range(5):
        np.random.seed(seed)
        inputs = T.AugInput(image)
        T.AugmentationList(build_augmentations([8], 9, color=0.4)[:3])(inputs)
        assert inputs.image.shape == image.shape and inputs.image.dtype == np.uint8
        found.add(inputs.image[0, 0].tobytes())
    assert len(found) > 3


def test_settings_of_a_config(tmp_path):
    cfg = get_config("finetune/retinanet.py")
    cfg.dataset.augmentation.update(crop=0.5, upright=False, scale_jitter=[0.5, 2])
    kinds = [type(x).__name__ for x in instantiate(cfg.dataloader.train.mapper.augmentations)]
    assert kinds == ["RandomApply", "ResizeScale", "FixedSizeCrop", "RandomFlip", "RandomTurn"]
    for key in ("train_json", "val_json"):
        cfg.dataset[key] = str(tmp_path / "a.json")
        (tmp_path / "a.json").write_text("{}")
    cfg.dataset.update(train_images=str(tmp_path), val_images=str(tmp_path))
    for word, must in (
        ("crop=1.5", "be a number from 0 to 1"),
        ("scale_jitter=[2,1]", "be two numbers above 0 that grow, or null"),
        ("upright=1", "be True or False"),
    ):
        with pytest.raises(ValueError, match=f"dataset.augmentation.{word[:4]}.* must {must}"):
            check_config(cfg, [f"dataset.augmentation.{word}"])


@pytest.mark.parametrize("name", ["crop", "zoom_out", "color"])
@pytest.mark.parametrize("value", [1.5, -0.1, "half"])
def test_a_strength_that_is_none(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r} must be a number from 0 to 1"):
        build_augmentations([80], 100, **{name: value})
