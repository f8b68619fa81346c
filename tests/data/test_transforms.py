"""Quick decoding, resizing and flipping give what PIL's and detectron2's give."""

import random

import detectron2.data.transforms as T
import numpy as np
import pytest
import torch
from detbackbones.data import CheckedDatasetMapper
from detbackbones.data.images import read_image
from detbackbones.data.transforms import quick
from detectron2.data import DatasetMapper
from detectron2.structures import BoxMode
from PIL import Image, ImageOps
from pycocotools import mask as mask_util

WIDTH, HEIGHT = 90, 60


def pixels(width=WIDTH, height=HEIGHT, channels=3):
    """A smooth picture with noise."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (height // 10, width // 10, channels), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse.squeeze()).resize((width, height), Image.BICUBIC))
    return (image + generator.normal(0, 9, image.shape)).clip(0, 255).astype(np.uint8)


JPEGS = {
    **{f"orientation {i}": ("RGB", {"exif": i}) for i in range(1, 9)},
    "gray": ("L", {}),
    "gray, turned": ("L", {"exif": 6}),
    "CMYK": ("CMYK", {}),
    "progressive": ("RGB", {"progressive": True}),
    "not subsampled": ("RGB", {"subsampling": 0}),
    "one pixel": ("RGB", {"size": (1, 1)}),
}


@pytest.mark.parametrize(("mode", "how"), JPEGS.values(), ids=JPEGS)
def test_a_jpeg_has_the_pixels_of_pil(tmp_path, mode, how):
    image = Image.fromarray(pixels()).convert(mode).crop((0, 0, *how.get("size", (WIDTH, HEIGHT))))
    if "exif" in how:
        exif = image.getexif()
        exif[0x0112] = how["exif"]
        how = {**how, "exif": exif}
    path = tmp_path / "a.jpg"
    image.save(path, quality=93, **how)
    with Image.open(path) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    got = read_image(str(path))
    assert np.array_equal(got, expected)
    assert got.flags.c_contiguous and got.flags.writeable and got.dtype == np.uint8


def test_a_jpeg_that_ends_too_early_is_refused(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(pixels(300, 200)).save(path)
    data = path.read_bytes()
    for end in (len(data) // 2, len(data) - 200):
        path.write_bytes(data[:end])
        with pytest.raises(OSError, match="a.jpg' cannot be read"):
            read_image(str(path))
    path.write_bytes(data + b"more")  # which cameras and editors write
    assert read_image(str(path)).shape == (200, 300, 3)


def dataset_dict(path, kind):
    """An image with three objects: one that a crop removes, one crowd, one that stays."""
    entries = []
    for x, y, w, h in ((2.5, 3, 5, 4), (20.5, 10, 30, 20), (40.5, 21.25, 33.5, 30)):
        outline = [x, y, x + w, y, x + w, y + h, x + w / 2, y + h]
        entry = {"bbox": [x, y, w, h], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1}
        if kind == "rle":
            (entry["segmentation"],) = mask_util.frPyObjects([outline], HEIGHT, WIDTH)
        else:
            entry["segmentation"] = [outline]
        entries.append(entry)
    entries[1]["iscrowd"] = 1
    return {"file_name": str(path), "height": HEIGHT, "width": WIDTH, "annotations": entries}


AUGMENTATIONS = {
    "larger": [T.ResizeShortestEdge([97, 150], 400, "choice"), T.RandomFlip()],
    "smaller": [T.ResizeShortestEdge([31, 44], 400, "choice"), T.RandomFlip()],
    "vertical": [T.RandomFlip(0.5, horizontal=False, vertical=True), T.Resize((70, 41))],
    "crop": [T.CropTransform(15, 8, 70, 50), T.ResizeShortestEdge(73)],
    "scale jitter": [T.ResizeScale(0.5, 2.0, 80, 80), T.FixedSizeCrop((80, 80))],
    "colour": [T.RandomBrightness(0.5, 1.5), T.RandomRotation([0, 30]), T.ResizeShortestEdge(80)],
}


@pytest.mark.parametrize("augmentations", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
@pytest.mark.parametrize("kind", ["polygon", "bits of polygons", "rle", "boxes"])
def test_a_sample_is_that_of_detectron2(tmp_path, augmentations, kind):
    path = tmp_path / "a.jpg"
    Image.fromarray(pixels()).save(path)
    masks = {"instance_mask_format": "polygon" if kind == "polygon" else "bitmask"}
    masks |= {"use_instance_mask": kind != "boxes", "recompute_boxes": kind == "rle"}
    for seed in range(4):
        samples = []
        for mapper in (DatasetMapper, CheckedDatasetMapper):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            mapper = mapper(True, augmentations=augmentations, image_format="RGB", **masks)
            samples.append(mapper(dataset_dict(path, kind)))
        theirs, ours = samples
        assert ours["image"].shape == theirs["image"].shape
        assert ours["image"].dtype == theirs["image"].dtype
        difference = (ours["image"].float() - theirs["image"].float()).abs()
        assert difference.max() <= (2 if "colour" in str(augmentations) else 1.01)
        assert difference.mean() < 0.05
        ours, theirs = ours["instances"], theirs["instances"]
        if kind == "rle" and augmentations == AUGMENTATIONS["scale jitter"]:
            continue  # of detectron2's all padding is in every mask
        assert torch.equal(ours.gt_boxes.tensor, theirs.gt_boxes.tensor)
        assert torch.equal(ours.gt_classes, theirs.gt_classes)
        assert ours.has("gt_masks") == theirs.has("gt_masks") == (kind != "boxes")
        if kind == "polygon":
            for one, other in zip(ours.gt_masks.polygons, theirs.gt_masks.polygons, strict=True):
                assert all(map(np.array_equal, one, other))
        elif kind != "boxes":
            assert torch.equal(ours.gt_masks.tensor, theirs.gt_masks.tensor)


def test_boxes_of_whole_numbers_keep_their_fractions(tmp_path):
    """detectron2's mapper rounds them off where a file has no other numbers."""
    path = tmp_path / "a.jpg"
    Image.fromarray(pixels()).save(path)
    image = dataset_dict(path, "boxes")
    outline = [3, 5, 23, 5, 23, 35]
    image["annotations"] = [{**image["annotations"][0], "bbox": [3, 5, 20, 30]}]
    image["annotations"][0]["segmentation"] = [outline]
    mapper = CheckedDatasetMapper(
        True, augmentations=[T.Resize((90, 99))], image_format="RGB", use_instance_mask=True
    )
    instances = mapper(image)["instances"]
    boxes = instances.gt_boxes.tensor
    torch.testing.assert_close(boxes, torch.tensor([[3.3, 7.5, 25.3, 52.5]]))
    ((polygon,),) = instances.gt_masks.polygons
    np.testing.assert_allclose(polygon, [3.3, 7.5, 25.3, 7.5, 25.3, 52.5])
    assert outline == [3, 5, 23, 5, 23, 35]


@pytest.mark.parametrize("masks", ["polygon", "bitmask"])
@pytest.mark.parametrize("recompute", [False, True])
def test_an_image_whose_objects_are_cropped_off_has_no_masks(tmp_path, masks, recompute):
    path = tmp_path / "a.jpg"
    Image.fromarray(pixels()).save(path)
    mapper = CheckedDatasetMapper(
        True,
        augmentations=[T.CropTransform(0, 40, 15, 15)],
        image_format="RGB",
        use_instance_mask=True,
        instance_mask_format=masks,
        recompute_boxes=recompute,
    )
    for kind in ("polygon", "rle") if masks == "bitmask" else ("polygon",):
        instances = mapper(dataset_dict(path, kind))["instances"]
        assert len(instances) == len(instances.gt_masks) == len(instances.gt_boxes) == 0


@pytest.mark.parametrize("size", [(30, 45), (61, 91), (200, 17)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_masks_and_label_maps_have_the_nearest_pixels(size, order):
    mask = np.array(
        np.random.default_rng(1).integers(0, 200, (HEIGHT, WIDTH)), np.uint8, order=order
    )
    resizing = T.ResizeTransform(HEIGHT, WIDTH, *size)
    expected = resizing.apply_segmentation(mask)
    assert np.array_equal(quick(resizing).apply_segmentation(mask), expected)
    floats = mask.astype(np.float32)
    assert np.array_equal(
        quick(resizing).apply_segmentation(floats), resizing.apply_segmentation(floats)
    )


@pytest.mark.parametrize("channels", [1, 5])
def test_images_of_other_channels(channels):
    image = np.repeat(pixels(channels=1)[:, :, None], channels, axis=2)
    if channels == 5:  # which are floats wherever they are read
        image = image.astype(np.float32)
    for transform in (T.ResizeTransform(HEIGHT, WIDTH, 40, 70), T.HFlipTransform(WIDTH)):
        expected = transform.apply_image(image).astype(float)
        assert np.abs(quick(transform).apply_image(image).astype(float) - expected).max() <= 1
