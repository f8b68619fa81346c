"""What can be wrong with a COCO file: each fault is refused in one sentence, or mended and said."""

import copy
import json
import logging
import math
import re
from pathlib import Path

import numpy as np
import pytest
from detbackbones.data.coco import register_coco
from detbackbones.data.evaluator import CocoEvaluator
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools import mask as mask_util

WIDTH, HEIGHT = 40, 30
NAN, INF = math.nan, math.inf
MANY_DIGITS = int("9" * 400)
SQUARE = [1, 2, 11, 2, 11, 7, 1, 7]
RLE = {"size": [HEIGHT, WIDTH], "counts": [30, 60, 1110]}


def coco() -> dict:
    """Three images; two boxes with masks, of categories 7 (dog) and 3 (cat)."""
    box = {"image_id": 1, "category_id": 7, "bbox": [1, 2, 10, 5], "area": 50, "iscrowd": 0}
    box["segmentation"] = [SQUARE]
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in (1, 2, 3)
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [{**box, "id": 1}, {**box, "id": 2, "image_id": 2, "category_id": 3}],
    }


def put(section, key, value, entry=0):
    """A fault: an entry of a section has a value."""

    def spoil(data):
        data[section][entry][key] = copy.deepcopy(value)

    return spoil


def without(section, key):
    """A fault: no entry of a section has a key."""

    def spoil(data):
        for entry in data[section]:
            del entry[key]

    return spoil


def everywhere(section, **values):
    def spoil(data):
        for entry in data[section]:
            entry.update(copy.deepcopy(values))

    return spoil


def wrong(section, key, must, *values):
    """Faults of one kind: an entry has one of some values. Ids are those of the first entries."""
    entry = {"images": "image 1", "categories": "category 7", "annotations": "annotation 1"}
    entry = rf"{section}\[0\]" if key == "id" else entry[section]
    return {
        f"{section} {key} {str(value)[:30]}": (
            put(section, key, value),
            f"{entry}: {key}=.* {must}",
        )
        for value in values
    }


NOT_TEXT = (None, 5, 2.5, True, [], ["a"], {}, "")
NOT_A_NUMBER = (None, "5", True, [5], {}, NAN, INF, -INF, MANY_DIGITS, -1)
BOXES = (
    *(None, 5, "1, 2, 3, 4", {}, [], [1, 2, 3], [1, 2, 3, 4, 5], [[1, 2, 3, 4]]),
    *([1, 2, "3", 4], [None] * 4, [True, True, True, True], [NAN, 2, 3, 4], [1, 2, 3, NAN]),
    *([1, 2, INF, 4], [-INF, 2, 3, 4], [1, 2, 3, MANY_DIGITS], [1e18, 2, 3, 4], [1, 2, 1e300, 4]),
)

REFUSED = {
    "no list of images": (lambda d: d.pop("images"), "must be a COCO file, with a list 'images'"),
    "no list of classes": (lambda d: d.pop("categories"), "with a list 'categories'"),
    "no list of boxes": (lambda d: d.pop("annotations"), "with a list 'annotations'"),
    "images are a dict": (lambda d: d.update(images={}), "with a list 'images'"),
    "categories are null": (lambda d: d.update(categories=None), "with a list 'categories'"),
    "no images": (lambda d: d["images"].clear(), r"images=\[\] must have at least one entry"),
    "no classes": (lambda d: d["categories"].clear(), r"categories=\[\] must have at least one"),
    "no boxes": (lambda d: d["annotations"].clear(), r"annotations=\[\] must have at least one"),
    "an image is null": (lambda d: d["images"].append(None), r"images\[3\] must have 'id'"),
    "a box is a list": (lambda d: d["annotations"].append([]), r"\[2\] must have 'image_id'"),
    "a class is text": (lambda d: d["categories"].append("a"), r"categories\[2\] must have 'id'"),
    **{
        f"{section} without {key}": (without(section, key), rf"{section}\[0\] must have '{key}'")
        for section, keys in {
            "images": ("id", "file_name", "width", "height"),
            "categories": ("id", "name"),
            "annotations": ("image_id", "category_id", "bbox"),
        }.items()
        for key in keys
    },
    **wrong("images", "id", "must be", None, 1.5, True, [1], {}, NAN, MANY_DIGITS),
    **wrong("categories", "id", "must be", None, 1.5, False, [1], {}, NAN, MANY_DIGITS),
    "mixed ids of images": (put("images", "id", "2", 1), r"images\[1\]: id='2' must be a whole"),
    "mixed ids of classes": (put("categories", "id", "3", 1), r"categories\[1\]: id='3' must be"),
    "an image twice": (put("images", "id", 2), "images: id=2 must belong to one entry alone"),
    "a class twice": (put("categories", "id", 3), "categories: id=3 must belong to one entry"),
    "a name twice": (put("categories", "name", "cat"), "name='cat' must not be that of category 7"),
    **wrong("categories", "name", "must be text", *NOT_TEXT, "  "),
    **wrong("images", "file_name", "must be the path of a file", *NOT_TEXT, "\0.png"),
    **wrong("images", "width", "must be a whole number", *NOT_A_NUMBER, 0, 0.5, 1e18),
    **wrong("images", "height", "must be a whole number", *NOT_A_NUMBER, 0, 0.5, 1e18),
    **wrong(
        *("annotations", "image_id", "must be the id of one of the images"),
        *(None, 99, 1.0, "1", True, [1], {}, NAN, MANY_DIGITS),
    ),
    **wrong(
        *("annotations", "category_id", "must be one of 3, 7"),
        *(None, 8, 7.0, "7", True, [7], {}, NAN, MANY_DIGITS),
    ),
    **wrong("annotations", "bbox", r"must be \[x, y, width, height\] in pixels", *BOXES),
    **wrong(
        *("annotations", "bbox", "must have an area inside its image, '1.png' of 40x30 pixels"),
        *(
            [40, 2, 5, 5],
            [4, 2, 5, -5],
            [-9, -9, 5, 5],
            [4, 30, 5, 5],
            [9, 9, -3, 3],
        ),
    ),
    **wrong("annotations", "area", "must be a number of pixels", *NOT_A_NUMBER),
    **wrong("annotations", "iscrowd", "must be 0 or 1", None, "0", "1", 2, -1, 0.5, 1.0, [], NAN),
    **wrong("annotations", "ignore", "must be left out", 1, True),
    **wrong(
        "annotations", "keypoints", "must be a list of numbers", "a", [None], [1, "2"], {"a": 1}
    ),
    "all are crowds": (everywhere("annotations", iscrowd=1), "iscrowd=1 must be 0 in at least one"),
    "fractions": (
        everywhere("annotations", bbox=[0.1, 0.2, 0.5, 0.25]),
        "annotation 1: bbox=.* must be in pixels, .* are they fractions",
    ),
}

MASKS = "must be polygons .* of three points or more, in pixels"
REFUSED_MASKS = {
    "no segmentation": (without("annotations", "segmentation"), "=None must be a mask"),
    **wrong("annotations", "segmentation", "must be a mask", None, [], 5, "text", True, 1.5),
    **wrong(
        *("annotations", "segmentation", MASKS),
        *(SQUARE, [[]], [[1, 2]], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5]], [SQUARE + [1]], [None], ["a"]),
        *([[1, 2, 3, 4, 5, "6"]], [[1, 2, 3, 4, 5, None]], [[True] * 6], [[NAN] * 6], [[[1] * 6]]),
        *([SQUARE, [1, 2, 3, 4, 5, NAN]], [SQUARE[:-1] + [INF]], [SQUARE[:-1] + [1e18]]),
        *([SQUARE[:-1] + [-1e18]], [SQUARE[:-1] + [MANY_DIGITS]], [[40 * v for v in SQUARE]]),
    ),
}

REFUSED_RLE = wrong(
    *(
        "annotations",
        "segmentation",
        r"must be RLE of size \[30, 40\], whose counts add up to 1200",
    ),
    *({}, {"size": [30, 40]}, {"counts": [1200]}, {"size": [40, 30], "counts": [1200]}),
    *({"size": [3, 4], "counts": [12]}, {"size": None, "counts": [1200]}, {**RLE, "counts": []}),
    *({**RLE, "counts": [30, 60]}, {**RLE, "counts": [30, 60, 1111]}, {**RLE, "counts": None}),
    *({**RLE, "counts": [1210, -10]}, {**RLE, "counts": [30.0, 1170.0]}, {**RLE, "counts": ["9"]}),
    *({**RLE, "counts": "garbage"}, {**RLE, "counts": ""}, {**RLE, "counts": "\x00\xff"}),
    *({**RLE, "counts": "oooooo"}, {**RLE, "counts": "0" * 999}, {**RLE, "counts": 1200}),
    *({**RLE, "counts": [MANY_DIGITS]}, {**RLE, "counts": [[30, 60, 1110]]}),
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for i in (1, 2, 3):
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


def register(folder, data, name="val", mask_format=None, like=None, **kwargs):
    path = folder / f"{name}.json"
    content = data if isinstance(data, str | bytes) else json.dumps(data)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return register_coco(str(path), str(folder / "images"), mask_format, like=like, **kwargs)


def assert_refused(folder, spoil, message, mask_format=None):
    """Refused as training and as validation data, in one sentence with the file."""
    data = coco()
    spoil(data)
    train = register(folder, coco(), "right", mask_format)
    for like in (None, train):
        with pytest.raises(ValueError, match=message) as error:
            register(folder, data, "val", mask_format, like)
        assert "val.json'" in str(error.value) and "\n" not in str(error.value)
        assert not str(error.value).endswith(".") and len(str(error.value)) < 800


@pytest.mark.parametrize(("spoil", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("mask_format", [None, "polygon", "bitmask"])
def test_wrong_entries_are_refused(folder, spoil, message, mask_format):
    assert_refused(folder, spoil, message, mask_format)


@pytest.mark.parametrize(("spoil", "message"), REFUSED_MASKS.values(), ids=REFUSED_MASKS)
@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_wrong_masks_are_refused(folder, spoil, message, mask_format):
    assert_refused(folder, spoil, message, mask_format)


@pytest.mark.parametrize(("spoil", "message"), REFUSED_RLE.values(), ids=REFUSED_RLE)
def test_wrong_rle_is_refused(folder, spoil, message):
    assert_refused(folder, spoil, message, "bitmask")


@pytest.mark.parametrize(
    "spoil",
    [spoil for spoil, _ in (REFUSED_MASKS | REFUSED_RLE).values()],
    ids=REFUSED_MASKS | REFUSED_RLE,
)
def test_wrong_masks_leave_the_boxes(folder, spoil, caplog):
    """Where boxes alone are trained, none is dropped, and an evaluation runs."""
    data = coco()
    spoil(data)
    name = register(folder, data)
    dicts = DatasetCatalog.get(name)
    assert [len(d["annotations"]) for d in dicts] == [1, 1, 0]
    assert perfect(name)["AP"] == pytest.approx(100)


def perfect(name=None, evaluator=None):
    """The metrics of predictions that are the truth."""
    evaluator = evaluator or CocoEvaluator(name, tasks=("bbox",))
    evaluator.reset()
    for record in DatasetCatalog.get(name or evaluator._metadata.name):
        found = Instances((record["height"], record["width"]))
        corners = [
            [x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in record["annotations"])
        ]
        found.pred_boxes = Boxes(corners)
        found.scores = found.pred_boxes.tensor.new_ones(len(corners))
        found.pred_classes = found.pred_boxes.tensor.new_tensor(
            [a["category_id"] for a in record["annotations"]]
        ).long()
        evaluator.process([record], [{"instances": found}])
    return evaluator.evaluate()["bbox"]


def background(data):
    data["categories"].insert(0, {"id": 0, "name": "background"})


def renumbered(data):
    for key, new in ((7, 1), (3, 2)):
        for entry in data["categories"]:
            entry["id"] = new if entry["id"] == key else entry["id"]
        for entry in data["annotations"]:
            entry["category_id"] = new if entry["category_id"] == key else entry["category_id"]


def only_dogs(data):
    del data["categories"][1], data["annotations"][1]


def text_ids(data):
    for section, key in (("images", "id"), ("annotations", "image_id")):
        for entry in data[section]:
            entry[key] = f"image {entry[key]}"


NUMBERED = "2 annotations have ids that are no different numbers above 0: numbered anew"
MENDED = {
    "annotation id 0": (put("annotations", "id", 0), NUMBERED),
    "annotation id twice": (put("annotations", "id", 2), NUMBERED),
    "annotation id null": (put("annotations", "id", None), NUMBERED),
    "annotation id text": (put("annotations", "id", "a"), NUMBERED),
    "annotation id list": (put("annotations", "id", [1]), NUMBERED),
    "annotation id huge": (put("annotations", "id", MANY_DIGITS), NUMBERED),
    "no annotation ids": (without("annotations", "id"), NUMBERED),
    "no area": (without("annotations", "area"), "2 annotations have no area: computed"),
    "no iscrowd": (without("annotations", "iscrowd"), "2 annotations have no iscrowd: it is 0"),
    "iscrowd false": (everywhere("annotations", iscrowd=False), None),
    "whole width": (everywhere("images", width=40.0), None),
    "an unused class": (background, "the classes 'background' and their 0 annotations are left"),
    "classes renumbered": (renumbered, r"categories are numbered 1 to 2, .* \['cat', 'dog'\]"),
    "a class is missing": (only_dogs, r"categories are numbered 1 to 2, .* \['cat', 'dog'\]"),
    "ids of images are text": (text_ids, None),
    "a flat box": (
        lambda d: d["annotations"].append({**d["annotations"][0], "id": 3, "bbox": [4, 2, 0, 5]}),
        "1 boxes have no width or height: they are not learned",
    ),
    "a box sticks out": (put("annotations", "bbox", [35, 28, 9, 9]), "1 boxes stick out"),
}


@pytest.mark.parametrize(("spoil", "message"), MENDED.values(), ids=MENDED)
@pytest.mark.parametrize("mask_format", [None, "polygon"])
def test_what_is_odd_is_mended_and_said(folder, spoil, message, mask_format, caplog):
    """Classes are numbered as in training, and a perfect detector is perfect."""
    train = register(folder, coco(), "train", mask_format)
    caplog.clear()
    data = coco()
    spoil(data)
    name = register(folder, data, "val", mask_format, like=train)
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(said) == (message is not None)
    if message is not None:
        assert "val.json'" in said[0]
        assert re.search(message, said[0])
    classes = MetadataCatalog.get(name).thing_classes
    assert classes == ["cat", "dog"]
    boxes = [a for d in DatasetCatalog.get(name) for a in d["annotations"]]
    names = {c["id"]: c["name"] for c in data["categories"]}
    wanted = [names[a["category_id"]] for a in data["annotations"]]
    assert sorted(classes[a["category_id"]] for a in boxes) == sorted(wanted)
    if not message or not any(odd in message for odd in ("stick out", "no width")):
        assert perfect(name)["AP"] == pytest.approx(100)


OTHER_CLASSES = {
    "another name": (put("categories", "name", "Dog"), "'Dog' must be a class of the training"),
    "another name of an unused class": (
        lambda d: (background(d), put("annotations", "category_id", 0)(d)),
        "'background' must be a class of the training data, 'cat', 'dog'; those here are 'backgr",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), OTHER_CLASSES.values(), ids=OTHER_CLASSES)
def test_other_classes_are_refused_for_validation(folder, spoil, message):
    train = register(folder, coco(), "train")
    data = coco()
    spoil(data)
    with pytest.raises(ValueError, match=message):
        register(folder, data, like=train)


def test_a_subset_of_the_classes_may_be_asked_for(folder, caplog):
    train = register(folder, coco(), "train", classes=["dog"])
    assert "the classes 'cat' and their 1 annotations are left out" in caplog.text
    assert MetadataCatalog.get(train).thing_classes == ["dog"]
    val = register(folder, coco(), classes=["dog"], like=train)
    assert [len(d["annotations"]) for d in DatasetCatalog.get(val)] == [1, 0, 0]
    assert perfect(val)["AP"] == pytest.approx(100)
    both = register(folder, coco(), "both", classes=["dog", "cat"])
    assert MetadataCatalog.get(both).thing_classes == ["dog", "cat"]
    for classes in (["dgo"], ["dog", "dog"]):
        with pytest.raises(
            ValueError, match=r"classes=.* must be different classes of '.*val.json"
        ):
            register(folder, coco(), classes=classes)


ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_of_any_unicode_encoding_is_read(folder, encoding):
    data = coco()
    data["categories"][0]["name"] = "Hündin"
    name = register(folder, json.dumps(data, ensure_ascii=False).encode(encoding))
    assert MetadataCatalog.get(name).thing_classes == ["cat", "Hündin"]
    assert perfect(name)["AP"] == pytest.approx(100)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1", b"nul", b"\xff\xfe", b"\x80abc", b"\x89PNG\r\n", b"[" * 10**5]
    + [b"9" * 5000, b'{"images": [}', b"a,b\n1,2\n"],
    ids=lambda content: str(content[:9]),
)
def test_what_is_no_json_is_refused(folder, content):
    with pytest.raises(ValueError, match="json_file='.*val.json' must be JSON: ") as error:
        register(folder, content)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["[]", "[1]", "{}", "5", "null", '"text"', "true"])
def test_what_is_no_coco_is_refused(folder, content):
    with pytest.raises(ValueError, match="json_file='.*val.json' must be a COCO file, with a list"):
        register(folder, content)


def test_rle_of_pycocotools_is_read(folder):
    """Random masks in both of its formats, whose areas are as pycocotools has them."""
    rng = np.random.default_rng(0)
    for density in (0, 0.01, 0.5, 0.99, 1):
        mask = np.asfortranarray(rng.random((HEIGHT, WIDTH)) < density, np.uint8)
        text = mask_util.encode(mask)["counts"].decode()
        changes = np.flatnonzero(np.diff(mask.flatten("F"), prepend=0))
        counts = np.diff([0, *changes, mask.size]).tolist()
        for rle in ({**RLE, "counts": text}, {**RLE, "counts": counts}):
            data = coco()
            data["annotations"][0]["segmentation"] = rle
            del data["annotations"][0]["area"]
            json_file = MetadataCatalog.get(register(folder, data, mask_format="bitmask")).json_file
            assert json.loads(Path(json_file).read_text())["annotations"][0]["area"] == mask.sum()


@pytest.mark.parametrize("mask", [[SQUARE, [1, 2, 3, 4]], [[], SQUARE], [[5], SQUARE, [1, 2]]])
def test_short_polygons_beside_good_ones_are_left_out(folder, mask, caplog):
    data = coco()
    data["annotations"][0]["segmentation"] = mask
    name = register(folder, data, mask_format="polygon")
    assert f"{len(mask) - 1} polygons have less than three points: left out" in caplog.text
    assert DatasetCatalog.get(name)[0]["annotations"][0]["segmentation"] == [SQUARE]


@pytest.mark.parametrize("limits", [None, 50, [1, 10, 100], [2, 5, 7]])
def test_detections_are_limited_as_coco_does(folder, limits):
    evaluator = CocoEvaluator(register(folder, coco()), limits, tasks=("bbox",))
    assert perfect(evaluator=evaluator)["AP"] == pytest.approx(100)
