"""Registering a user's own data: what is loaded, and what is refused."""

import json
import os
from pathlib import Path

import detectron2.data.transforms as T
import numpy as np
import pytest
from detbackbones.data.coco import register_coco
from detbackbones.data.mapper import CheckedDatasetMapper
from detbackbones.data.registry import num_classes
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from PIL import Image

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the sample data is not there")

WIDTH, HEIGHT = 40, 30


def coco() -> dict:
    """Two images and two boxes, of categories 7 (dog) and 3 (cat)."""
    box = {"image_id": 1, "category_id": 7, "bbox": [1, 2, 10, 5], "area": 50, "iscrowd": 0}
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in (1, 2)
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [{**box, "id": 1}, {**box, "id": 2, "image_id": 2, "category_id": 3}],
    }


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for i in (1, 2):
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


def write(folder, data) -> str:
    path = folder / "train.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return str(path)


def test_coco_is_registered_once_with_its_metadata(folder):
    json_file, images = write(folder, coco()), str(folder / "images")
    name = register_coco(json_file, images)
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["cat", "dog"]
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 7: 1}
    assert metadata.evaluator_type == "coco"
    assert num_classes(name) == 2

    first, second = DatasetCatalog.get(name)
    assert first["file_name"] == os.path.join(images, "1.png")
    assert [a["category_id"] for a in first["annotations"] + second["annotations"]] == [1, 0]
    assert first["annotations"][0]["bbox"] == [1, 2, 10, 5]
    COCOEvaluator(name).reset()

    count = len(DatasetCatalog)
    assert register_coco(json_file, images) == name and len(DatasetCatalog) == count
    assert MetadataCatalog.get(name) is metadata
    (folder / "others").symlink_to(folder / "images")
    assert register_coco(json_file, str(folder / "others")) == name


def test_a_large_file_is_checked_once(folder, monkeypatch, caplog):
    """Another process takes what the first has found, until the file changes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr("detbackbones.data.coco.LARGE", 0)
    data, images = coco(), str(folder / "images")
    data["annotations"][0]["bbox"] = [35, 2, 10, 5]
    json_file = write(folder, data)

    def dicts():
        monkeypatch.setattr("detbackbones.data.registry._versions", {})
        caplog.clear()
        name = register_coco(json_file, images)
        return DatasetCatalog.get(name), caplog.text, MetadataCatalog.get(name).as_dict()

    first = dicts()
    assert "1 boxes stick out of their images: clipped" in first[1]
    monkeypatch.setattr("detbackbones.data.coco.read_coco", None)  # cannot be called
    assert dicts() == first
    (folder / "images" / "2.png").rename(folder / "2.png")
    with pytest.raises(FileNotFoundError, match="image 2: file_name=.*2.png' must be in"):
        dicts()
    write(folder, {**data, "images": []})
    with pytest.raises(TypeError):
        dicts()


def test_what_cannot_be_remembered_is_checked_again(folder, monkeypatch):
    (folder / "cache").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr("detbackbones.data.coco.LARGE", 0)
    assert register_coco(write(folder, coco()), str(folder / "images")) in DatasetCatalog


def test_what_was_mended_is_mended_again(folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr("detbackbones.data.coco.LARGE", 0)
    data = coco()
    del data["annotations"][0]["iscrowd"]
    register_coco(write(folder, data), str(folder / "images"))
    assert not (folder / "cache").exists()


def test_coco_name_depends_on_both_paths(folder):
    json_file = write(folder, coco())
    os.makedirs(folder / "b")
    for i in (1, 2):
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "b" / f"{i}.png")
    names = {register_coco(json_file, str(folder / d)) for d in ("images", "b")}
    assert len(names) == 2


def test_coco_is_registered_anew_when_the_file_has_changed(folder):
    data = coco()
    name = register_coco(write(folder, data), str(folder / "images"))
    data["categories"].append({"id": 9, "name": "a third animal"})
    assert register_coco(write(folder, data), str(folder / "images")) == name
    assert num_classes(name) == 3
    assert len(DatasetCatalog.get(name)) == 2


@pytest.mark.parametrize(
    ("bbox", "expected"),
    [
        ([-2, 3, 10, 5], [0, 3, 8, 5]),
        ([35, 28, 10, 5], [35, 28, 5, 2]),
        ([-1, -1, 100, 100], [0, 0, WIDTH, HEIGHT]),
    ],
)
def test_a_box_that_sticks_out_is_clipped_with_one_warning(folder, caplog, bbox, expected):
    data = coco()
    for annotation in data["annotations"]:
        annotation["bbox"] = bbox
    name = register_coco(write(folder, data), str(folder / "images"))
    assert [a["bbox"] for d in DatasetCatalog.get(name) for a in d["annotations"]] == [expected] * 2
    warnings = [r for r in caplog.records if r.name == "detbackbones.data.coco"]
    assert len(warnings) == 1 and "2 boxes" in warnings[0].getMessage()


POLYGON, RLE = [[1, 2, 11, 2, 11, 7]], {"size": [HEIGHT, WIDTH], "counts": [0, 1200]}


@pytest.mark.parametrize(
    ("mask_format", "masks", "message"),
    [
        (None, {}, None),
        ("polygon", {"segmentation": POLYGON}, None),
        ("bitmask", {"segmentation": RLE}, None),
        ("polygon", {"segmentation": RLE, "iscrowd": 1}, None),
        (
            "polygon",
            {"segmentation": RLE},
            "annotation 1: segmentation=.* must be polygons: for RLE set .*=bitmask",
        ),
        ("polygons", {"segmentation": POLYGON}, "mask_format='polygons' .* 'polygon', 'bitmask'"),
    ],
)
def test_masks_are_there_if_the_model_needs_them(folder, mask_format, masks, message):
    data = coco()
    for annotation in data["annotations"]:
        annotation.update(masks)
    data["annotations"].append({**coco()["annotations"][0], "id": 3, "segmentation": POLYGON})
    json_file, images = write(folder, data), str(folder / "images")
    register_coco(json_file, images)  # without masks all is right
    if message is None:
        register_coco(json_file, images, mask_format)
    else:
        with pytest.raises(ValueError, match=message):
            register_coco(json_file, images, mask_format)


@pytest.mark.parametrize(
    ("json_file", "images", "error", "message"),
    [
        ("", "images", ValueError, "json_file='' must be the path of a COCO JSON file$"),
        ("trian.json", "images", FileNotFoundError, "json_file='trian.json' .* 'train.json'$"),
        ("images", "images", ValueError, "json_file='images' must be .*, and is a folder$"),
        ("train.json", "train.json", ValueError, "image_root='train.json' .*, and is a file$"),
        ("train.json", "", ValueError, "image_root='' must be the folder of the images$"),
        ("train.json", "imags", FileNotFoundError, "image_root='imags' .*nearest are 'images'$"),
        ("train.json", "no/such", FileNotFoundError, "image_root='no/such' .* does not exist"),
        (
            "train.json",
            ".",
            FileNotFoundError,
            r"image 1: file_name='1.png' must be in image_root=.* \(2 of 2 are missing\)$",
        ),
    ],
)
def test_missing_files_are_named(folder, monkeypatch, json_file, images, error, message):
    write(folder, coco())
    monkeypatch.chdir(folder)
    with pytest.raises(error, match=message):
        register_coco(json_file, images)


def test_num_classes_of_a_dataset_that_is_not_registered():
    with pytest.raises(ValueError, match="dataset=.*'coco_2017_train'"):
        num_classes("coco_2017_trian")
    assert num_classes("coco_2017_train") == 80


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("keep", [0, 10, 0.5])
def test_mapper_names_an_image_that_cannot_be_decoded(tmp_path, suffix, keep):
    path = tmp_path / f"broken.{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    mapper = CheckedDatasetMapper(
        True, augmentations=[T.RandomFlip()], image_format="BGR", use_instance_mask=True
    )
    with pytest.raises(OSError, match=f"image '{path}' cannot be read"):
        mapper({"file_name": str(path), "width": WIDTH, "height": HEIGHT, "annotations": []})


def test_mapper_names_an_image_of_another_size(folder):
    path = str(folder / "images" / "1.png")
    mapper = CheckedDatasetMapper(False, augmentations=[], image_format="BGR")
    with pytest.raises(ValueError, match=f"image '{path}': size=40x31 .* must be 40x30"):
        mapper({"file_name": path, "width": 40, "height": 31})
    assert mapper({"file_name": path, "width": 40, "height": 30})["image"].shape == (3, 30, 40)


@needs_data
@pytest.mark.parametrize(
    ("json_file", "images", "count", "classes"),
    [
        ("bccd/train.json", "bccd/images", 205, ["Platelets", "RBC", "WBC"]),
        ("nuclei/val.json", "nuclei/images", 40, None),
    ],
)
def test_coco_sample_data(json_file, images, count, classes):
    name = register_coco(str(DATA / json_file), str(DATA / images))
    assert len(DatasetCatalog.get(name)) == count
    assert classes is None or MetadataCatalog.get(name).thing_classes == classes
