"""Registering a user's own label maps: what is loaded, what is refused, and its evaluation."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from detbackbones.data.mapper import CheckedDatasetMapper
from detbackbones.data.registry import num_classes
from detbackbones.data.semantic import register_semantic, sem_seg_evaluator
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the sample data is not there")

WIDTH, HEIGHT = 40, 30


@pytest.fixture
def semantic(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for i in (1, 2):
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / f"{i}.png")
        label = np.full((HEIGHT, WIDTH), i - 1, np.uint8)
        label[0, :3] = 255
        Image.fromarray(label).save(tmp_path / "labels" / f"{i}.png")
    return tmp_path


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
    with pytest.raises(ValueError, match=f"dataset='{name}' must have thing classes"):
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
    evaluator = sem_seg_evaluator(name)
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
    "value": (
        lambda f: save_label(f, [0, 1, 2, 9]),
        ValueError,
        "1.png': values=2, 9 must be from 0 to 1 ",
    ),
    "palette": (lambda f: save_label(f, [0, 1], "P"), ValueError, "1.png': mode='P' must be 'L'"),
    "no label": (
        lambda f: (f / "labels" / "2.png").unlink(),
        FileNotFoundError,
        r"label_root='.*' must have a label map '2.png' \(1 of 2",
    ),
    "size": (
        lambda f: Image.new("L", (5, 6)).save(f / "labels" / "1.png"),
        ValueError,
        "1.png': size=5x6 must be 40x30, that of its image",
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
        ({"num_classes": 0}, ValueError, "num_classes=0 must be"),
        ({"num_classes": 256}, ValueError, "num_classes=256 must be from 1 to 255"),
        (
            {"class_names": ["a"]},
            ValueError,
            r"class_names=\['a'\] must have num_classes=2 names, not 1",
        ),
        ({"image_root": ""}, ValueError, "image_root='' must be the folder"),
        ({"image_root": "image"}, FileNotFoundError, "image_root='image' .*nearest are 'images'"),
        ({"image_root": "images/train_*"}, FileNotFoundError, "must have images with .* .jpg"),
        ({"image_root": "."}, FileNotFoundError, "image_root='.' must have images with .* .jpg"),
        ({"image_root": "labels"}, ValueError, "label_root=.* would be its own label map"),
        ({"label_root": "label"}, FileNotFoundError, "label_root='label' .*nearest are 'labels'"),
    ],
)
def test_wrong_semantic_arguments_are_refused(semantic, monkeypatch, change, error, message):
    monkeypatch.chdir(semantic)
    arguments = {"image_root": "images", "label_root": "labels", "num_classes": 2, **change}
    with pytest.raises(error, match=message):
        register_semantic(**arguments)


@needs_data
@pytest.mark.parametrize(("split", "count"), [("train", 120), ("val", 40)])
def test_semantic_sample_data(split, count):
    images = DATA / "nuclei" / "images" / f"{split}_*.jpg"
    name = register_semantic(str(images), str(DATA / "nuclei" / "labels"), 2)
    assert len(DatasetCatalog.get(name)) == count
