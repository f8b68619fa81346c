"""Registering a user's own data: what is loaded, and what is refused."""

import json
import os
from pathlib import Path

import detectron2.data.transforms as T
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, SemSegEvaluator
from PIL import Image

from detbackbones.data import (
    CheckedDatasetMapper,
    num_classes,
    read_label_map,
    register_coco,
    register_semantic,
)

DATA = Path(__file__).parents[2] / "shared" / "data"
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
    warnings = [r for r in caplog.records if r.name == "detbackbones.data"]
    assert len(warnings) == 1 and "2 boxes" in warnings[0].getMessage()


def change(section, **values):
    def apply(data):
        data[section][0].update(values)

    return apply


BAD_COCO = {
    "no annotations": (lambda d: d["annotations"].clear(), "has no annotations"),
    "no section": (lambda d: d.pop("images"), "no list 'images'"),
    "no key": (lambda d: d["annotations"][1].pop("iscrowd"), r"annotations\[1\] has no 'iscrowd'"),
    "box outside": (change("annotations", bbox=[40, 2, 5, 5]), "annotation 1 of image '1.png'"),
    "no area": (change("annotations", bbox=[4, 2, 0, 5]), "annotation 1 .* no area"),
    "bbox of 3": (change("annotations", bbox=[4, 2, 5]), r"annotation 1 has bbox \[4, 2, 5\]"),
    "bbox of text": (change("annotations", bbox=["4", 2, 5, 5]), "annotation 1 has bbox"),
    "bbox NaN": (change("annotations", bbox=[float("nan"), 2, 5, 5]), "annotation 1 has bbox"),
    "category": (change("annotations", category_id=8), "category_id 8; categories has 3, 7"),
    "image id": (change("annotations", image_id=99), "image_id 99"),
    "ignore": (change("annotations", ignore=1), "'ignore'"),
    "duplicate annotation": (change("annotations", id=2), "id 2 appears more than once in annot"),
    "duplicate image": (change("images", id=2), "id 2 appears more than once in images"),
    "image width": (change("images", width=0), "image 1 has width 0"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_COCO.values(), ids=BAD_COCO)
def test_wrong_coco_is_refused(folder, spoil, message):
    data = coco()
    spoil(data)
    with pytest.raises(ValueError, match=message) as error:
        register_coco(write(folder, data), str(folder / "images"))
    assert "train.json" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not JSON"), ("", "not JSON"), ("[1]", "not a COCO file")]
)
def test_a_file_that_is_not_coco_is_refused(folder, text, message):
    with pytest.raises(ValueError, match=message):
        register_coco(write(folder, text), str(folder / "images"))


@pytest.mark.parametrize(
    ("json_file", "images", "error", "message"),
    [
        ("", "images", ValueError, "json_file is empty"),
        ("trian.json", "images", FileNotFoundError, "json_file .*did you mean 'train.json'"),
        ("images", "images", FileNotFoundError, "json_file .* does not exist"),
        ("train.json", "", ValueError, "image_root is empty"),
        ("train.json", "imags", FileNotFoundError, "image_root .*did you mean 'images'"),
        ("train.json", "no/such", FileNotFoundError, "image_root .* does not exist"),
        ("train.json", ".", FileNotFoundError, r"image '1.png' is not in .* \(2 of 2"),
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


@pytest.fixture
def semantic(folder):
    (folder / "labels").mkdir()
    for i in (1, 2):
        label = np.full((HEIGHT, WIDTH), i - 1, np.uint8)
        label[0, :3] = 255
        Image.fromarray(label).save(folder / "labels" / f"{i}.png")
    return folder


def test_semantic_is_registered(semantic):
    images, labels = str(semantic / "images"), str(semantic / "labels")
    name = register_semantic(images, labels, 2, ["cell", "nucleus"])
    assert register_semantic(images, labels, 2, ["cell", "nucleus"]) == name
    second = DatasetCatalog.get(name)[1]
    assert second == {
        "file_name": os.path.join(images, "2.png"),
        "sem_seg_file_name": os.path.join(labels, "2.png"),
        "image_id": "2",
        "height": HEIGHT,
        "width": WIDTH,
    }
    metadata = MetadataCatalog.get(name)
    assert (metadata.stuff_classes, metadata.ignore_label) == (["cell", "nucleus"], 255)
    with pytest.raises(ValueError, match="no thing classes"):
        num_classes(name)

    mapped = CheckedDatasetMapper(True, augmentations=[], image_format="RGB")(second)
    assert mapped["sem_seg"].unique().tolist() == [1, 255]


def test_semantic_pattern_selects_images(semantic):
    labels = str(semantic / "labels")
    one = register_semantic(str(semantic / "images" / "2*"), labels, 3)
    both = register_semantic(str(semantic / "images"), labels, 3)
    assert one != both
    assert [d["image_id"] for d in DatasetCatalog.get(one)] == ["2"]
    assert len(DatasetCatalog.get(both)) == 2
    assert MetadataCatalog.get(one).stuff_classes == ["class_0", "class_1", "class_2"]


def test_semantic_evaluator_takes_the_dataset(semantic):
    name = register_semantic(str(semantic / "images"), str(semantic / "labels"), 2)
    evaluator = SemSegEvaluator(name, distributed=False, sem_seg_loading_fn=read_label_map)
    evaluator.reset()
    truth = DatasetCatalog.get(name)
    for record in truth:  # class 0 everywhere: right in the first image, wrong in the second
        scores = torch.zeros(2, HEIGHT, WIDTH)
        scores[0] = 1
        evaluator.process([record], [{"sem_seg": scores}])
    assert evaluator.evaluate()["sem_seg"]["pACC"] == pytest.approx(50)


def save_label(folder, values, mode="L"):
    image = Image.fromarray(np.resize(np.array(values, np.uint8), (HEIGHT, WIDTH)))
    image.convert(mode).save(folder / "labels" / "1.png")


BAD_SEMANTIC = {
    "value": (lambda f: save_label(f, [0, 1, 2, 9]), ValueError, "1.png' has the values 2, 9;"),
    "palette": (lambda f: save_label(f, [0, 1], "P"), ValueError, "1.png' has PIL mode P"),
    "no label": (
        lambda f: (f / "labels" / "2.png").unlink(),
        FileNotFoundError,
        r"no label map '2.png' \(1 of 2",
    ),
    "size": (
        lambda f: Image.new("L", (5, 6)).save(f / "labels" / "1.png"),
        ValueError,
        "1.png' is 5x6 pixels; its image is 40x30",
    ),
    "broken label": (
        lambda f: (f / "labels" / "1.png").write_bytes(b"no png"),
        ValueError,
        "label map .*1.png' cannot be read",
    ),
}


@pytest.mark.parametrize(("spoil", "error", "message"), BAD_SEMANTIC.values(), ids=BAD_SEMANTIC)
def test_wrong_label_maps_are_refused(semantic, spoil, error, message):
    spoil(semantic)
    with pytest.raises(error, match=message):
        register_semantic(str(semantic / "images"), str(semantic / "labels"), 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_classes": 0}, ValueError, "num_classes is 0"),
        ({"num_classes": 256}, ValueError, r"must be in 1\.\.255"),
        ({"class_names": ["a"]}, ValueError, "class_names has 1 names; num_classes is 2"),
        ({"image_root": ""}, ValueError, "image_root is empty"),
        ({"image_root": "image"}, FileNotFoundError, "did you mean 'images'"),
        ({"image_root": "images/train_*"}, FileNotFoundError, "has no .jpg"),
        ({"image_root": "."}, FileNotFoundError, "has no .jpg"),
        ({"image_root": "labels"}, ValueError, "is its own label map"),
        ({"label_root": "label"}, FileNotFoundError, "did you mean 'labels'"),
    ],
)
def test_wrong_semantic_arguments_are_refused(semantic, monkeypatch, change, error, message):
    monkeypatch.chdir(semantic)
    arguments = {"image_root": "images", "label_root": "labels", "num_classes": 2, **change}
    with pytest.raises(error, match=message):
        register_semantic(**arguments)


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
    with pytest.raises(ValueError, match=f"image '{path}' has 40x30 pixels, .* states 40x31"):
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


@needs_data
@pytest.mark.parametrize(("split", "count"), [("train", 120), ("val", 40)])
def test_semantic_sample_data(split, count):
    images = DATA / "nuclei" / "images" / f"{split}_*.jpg"
    name = register_semantic(str(images), str(DATA / "nuclei" / "labels"), 2)
    assert len(DatasetCatalog.get(name)) == count
