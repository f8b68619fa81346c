"""Data in the formats of others: read back as they were, and what is broken is named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from dataset_writers import WRITERS
from detbackbones.cli import data as program
from detbackbones.data.coco import register_coco
from detbackbones.data.formats import read_folder
from detbackbones.data.formats.convert import read_for_training, split_pictures, write_splits
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pycocotools import mask as mask_util
from support import TOOLS, load_tool, run_main


@pytest.fixture(scope="module")
def blood():
    """Real photographs with boxes."""
    splits = {
        split: json.loads((TOOLS / f"blood/{split}.json").read_text()) for split in ("train", "val")
    }
    return splits, TOOLS / "blood/images"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Drawn images with polygons."""
    folder = tmp_path_factory.mktemp("shapes")
    load_tool("draw_shapes").draw(folder, ("circle", "square"), train=6, val=3, size=64)
    splits, flat = {}, folder / "flat"
    flat.mkdir()
    for split in ("train", "val"):
        content = json.loads((folder / f"{split}.json").read_text())
        for image in content["images"]:
            name = f"{split}_{image['file_name']}"
            shutil.copy(folder / "images" / split / image["file_name"], flat / name)
            image["file_name"] = name
        splits[split] = content
    return splits, flat


def _dicts(json_file, images, mask_format=None):
    name = register_coco(str(json_file), str(images), mask_format)
    classes = MetadataCatalog.get(name).thing_classes
    found = {}
    for image in DatasetCatalog.get(name):
        things = []
        for x in image["annotations"]:
            mask = [np.round(p, 2).tolist() for p in x.get("segmentation", [])]
            things.append((classes[x["category_id"]], np.round(x["bbox"], 2).tolist(), mask))
        size = image["width"], image["height"]
        found[Path(image["file_name"]).name] = (size, sorted(things, key=str))
    return found


def _assert_read_back(name, splits, images, folder, mask_format=None):
    WRITERS[name](splits, images, folder)
    format, found = read_folder(folder)
    assert format == name and found.faults == []
    assert {split: len(p) for split, p in found.splits.items()} == {
        split: len(content["images"]) for split, content in splits.items()
    }
    files = write_splits(
        found, {s: [*p.values()] for s, p in found.splits.items()}, folder / "made"
    )
    for file in files:
        given = folder / f"given_{file.name}"
        given.write_text(json.dumps(splits[file.stem]))
        assert _dicts(file, folder, mask_format) == _dicts(given, images, mask_format)


@pytest.mark.parametrize("name", WRITERS)
def test_boxes_are_read_back(name, blood, tmp_path):
    splits, images = blood
    _assert_read_back(name, splits, images, tmp_path / "data")


@pytest.mark.parametrize("name", ["coco", "yolo", "labelme", "cvat", "label_studio"])
def test_polygons_are_read_back(name, shapes, tmp_path):
    splits, images = shapes
    _assert_read_back(name, splits, images, tmp_path / "data", "polygon")


XML = """<annotation>
<filename>a.jpg</filename>
<size><width>40</width><height>30</height></size>
<object><name>cat</name>
<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>10</xmax><ymax>12</ymax></bndbox></object>
</annotation>"""
BOX = '<box label="cat" xtl="1" ytl="2" xbr="10" ybr="12" rotation="0"/>'
TASK = {
    "id": 7,
    "data": {"image": "/data/local-files/?d=images/a.jpg"},
    "annotations": [
        {
            "result": [
                {
                    "type": "rectanglelabels",
                    "value": {
                        "x": 1,
                        "y": 2,
                        "width": 30,
                        "height": 40,
                        "rotation": 0,
                        "rectanglelabels": ["cat"],
                    },
                },
            ]
        }
    ],
}
SHAPES = {
    "shapes": [{"label": "cat", "shape_type": "polygon", "points": [[1, 2], [9, 3], [5, 20]]}],
    "imagePath": "../images/a.jpg",
    "imageWidth": 40,
    "imageHeight": 30,
}
COCO = {
    "images": [{"id": 3, "file_name": "a.jpg", "width": 40, "height": 30}],
    "annotations": [{"id": 5, "image_id": 3, "category_id": 1, "bbox": [1, 2, 9, 10]}],
    "categories": [{"id": 1, "name": "cat"}],
}
FILES = {  # of a small data set of each format, beside images/a.jpg and b.jpg
    "yolo": {
        "data.yaml": "names: [cat, dog]\nnc: 2\ntrain: images\n",
        "labels/a.txt": "0 0.5 0.5 0.2 0.2\n1 0.1 0.1 0.9 0.1 0.5 0.9\n",
    },
    "voc": {"Annotations/a.xml": XML},
    "csv": {"boxes.csv": "filename,class,xmin,ymin,xmax,ymax\na.jpg,cat,1,2,10,12\n"},
    "labelme": {"json/a.json": json.dumps(SHAPES)},
    "cvat": {
        "annotations.xml": "<annotations>\n<label><name>cat</name></label>\n"
        f'<image name="a.jpg" width="40" height="30">\n{BOX}\n</image>\n</annotations>'
    },
    "label_studio": {"project.json": json.dumps([TASK])},
    "coco": {"train.json": json.dumps(COCO)},
}
BROKEN = [  # format, what is replaced, by what, what is said
    ("yolo", "0 0.5 0.5", "x 0.5 0.5", "a.txt': line 1: 'x 0.5 0.5 0.2 0.2' must be numbers"),
    ("yolo", "0 0.5 0.5", "nan 0.5 0.5", "line 1: 'nan 0.5"),
    ("yolo", "0 0.5 0.5", "2 0.5 0.5", "line 1: class 2 must be a whole number from 0 to 1"),
    ("yolo", "0 0.5 0.5", "0.5 0.5 0.5", "line 1: class 0.5 must be"),
    ("yolo", "0 0.5 0.5", "-1 0.5 0.5", "line 1: class -1 must be"),
    ("yolo", "0 0.5 0.5", "0 20 0.5", "line 1: coordinates must be fractions"),
    ("yolo", "0 0.5 0.5", "0 -0.1 0.5", "line 1: coordinates must be fractions"),
    ("yolo", "0 0.5 0.5 0.2 0.2", "0 0.5 0.5 0.2", "line 1: 4 numbers must be 5"),
    ("yolo", "0 0.5 0.5 0.2 0.2", "0 0.5 0.5 0.2 0.2 0.9", "line 1: 6 numbers must be 5"),
    ("yolo", "0.2 0.2", "0 0.2", "line 1: box=[20, 12, 0, 6] (x, y, width, height) must have an"),
    ("yolo", "0.9 0.1 0.5 0.9", "0.9 0.1 0.5", "line 2: 6 numbers must be 5"),
    ("yolo", "0.1 0.1 0.9 0.1 0.5 0.9", "0.1 0.1 0.1 0.1 0.1 0.1", "line 2: box=[4, 3, 0, 0]"),
    ("yolo", "names: [cat, dog]", "names: cat", "names must be a list of names"),
    ("yolo", "names: [cat, dog]", "names: {1: cat}", "names must be a list of names"),
    ("yolo", "nc: 2", "nc: 3", "data.yaml': nc=3 must be 2, the number of names"),
    ("yolo", "nc: 2", "kpt_shape: [17, 3]", "kpt_shape: keypoints are not read"),
    ("yolo", "train: images", "train: image", "train='image' must be a folder of images"),
    ("yolo", "train: images", "train: labels", "train='labels' must hold images"),
    (
        "yolo",
        "0 0.5 0.5 0.2 0.2\n1 0.1 0.1 0.9 0.1 0.5 0.9",
        "0 .1 .1 .2 .1 .2 .2 .1 .2",
        "oriented boxes (OBB), which are not read",
    ),
    ("yolo", "0 0.5 0.5", "\xff", "a.txt': must be text"),
    ("voc", "<xmin>1</xmin>", "<xmin>one</xmin>", "a.xml': line 4: bndbox must have numbers"),
    ("voc", "<xmin>1</xmin>", "", "line 4: bndbox must have numbers xmin, ymin, xmax, ymax"),
    ("voc", "<xmin>1</xmin>", "<xmin>inf</xmin>", "line 4: bndbox must have numbers"),
    ("voc", "<xmin>1</xmin>", "<xmin>11</xmin>", "line 4: box=[10, 1, 0, 11]"),
    ("voc", "<xmin>1</xmin>", "<xmin>nan</xmin>", "line 4: bndbox must have numbers"),
    ("voc", "<xmax>10</xmax>", "<xmax>-10</xmax>", "line 4: box=[0, 1, -10, 11]"),
    ("voc", "<ymin>2</ymin>", "<ymin>40</ymin>", "line 4: box=[0, 39, 10, -27]"),
    ("voc", "<ymax>12</ymax>", "<ymax></ymax>", "line 4: bndbox must have numbers"),
    ("voc", "<name>cat</name>", "", "line 4: class None must be text"),
    ("voc", "<name>cat</name>", "<name> </name>", "line 4: class ' ' must be text"),
    ("voc", "a.jpg", "c.jpg", "a.xml': image 'c.jpg' must be in"),
    ("voc", "a.jpg", "b.png", "image 'b.png' must be in"),
    ("voc", "<width>40</width>", "<width>41</width>", "size=41x30 must be 40x30, that of"),
    ("voc", "<height>30</height>", "<height>0</height>", "size=40x0 must be 40x30"),
    ("voc", "</annotation>", "", "line 6: it must be XML: no element found"),
    ("voc", "</object>", "", "it must be XML: mismatched tag"),
    ("voc", "<annotation>", '<!DOCTYPE a [<!ENTITY b "c">]><annotation>', "line 1: it declares an"),
    ("voc", "<bndbox>", "<robndbox></robndbox><bndbox>", "line 4: robndbox: oriented boxes"),
    ("voc", "<bndbox>", "<box>", "it must be XML: mismatched tag"),
    ("voc", "<xmin>1</xmin>", "<xmin>100</xmin>", "line 4: box=[99, 1, -89, 11]"),
    ("csv", "1,2,10,12", "one,2,10,12", "boxes.csv': line 2: xmin, ymin, xmax, ymax=['one',"),
    ("csv", "1,2,10,12", "nan,2,10,12", "line 2: xmin, ymin, xmax, ymax=['nan',"),
    ("csv", "1,2,10,12", "inf,2,10,12", "line 2: xmin, ymin, xmax, ymax=['inf',"),
    ("csv", "1,2,10,12", "1,2,10", "line 2: it must have 6 fields"),
    ("csv", "1,2,10,12", "1,2,10,12,13", "line 2: it must have 6 fields"),
    ("csv", "1,2,10,12", "10,2,1,12", "line 2: box=[10, 2, -9, 10]"),
    ("csv", "1,2,10,12", "1,2,1,12", "line 2: box=[1, 2, 0, 10]"),
    ("csv", "1,2,10,12", "41,2,50,12", "line 2: box=[41, 2, 9, 10]"),
    ("csv", "1,2,10,12", "1,-9,10,-2", "line 2: box=[1, -9, 9, 7]"),
    (
        "csv",
        "1,2,10,12",
        "0.1,0.2,0.5,0.9",
        "line 2: xmin, ymin, xmax, ymax=['0.1', '0.2', '0.5', '0.9'] must be in pixels",
    ),
    ("csv", "1,2,10,12", ",2,10,12", "line 2: xmin, ymin, xmax, ymax=['',"),
    ("csv", "1,2,10,12", "1 2,2,10,12", "line 2: xmin, ymin, xmax, ymax=['1 2',"),
    ("csv", "1,2,10,12", "1e30,2,10,12", "line 2: xmin, ymin, xmax, ymax=['1e30',"),
    ("csv", "a.jpg,cat", "c.jpg,cat", "line 2: image 'c.jpg' must be in"),
    ("csv", "a.jpg,cat", ",cat", "line 2: image '' must be the path of"),
    ("csv", "a.jpg,cat", "a.png,cat", "line 2: image 'a.png' must be in"),
    ("csv", "a.jpg,cat", "a.jpg,", "line 2: class '' must be text"),
    ("csv", "a.jpg,cat", "a.jpg, ", "line 2: class '' must be text"),
    ("csv", "a.jpg,cat,", "a.jpg;cat;", "line 2: it must have 6 fields"),
    ("csv", "a.jpg,cat,1", "a.jpg,cat", "line 2: it must have 6 fields"),
    ("labelme", '"label": "cat"', '"label": ""', "a.json': shapes[0]: class '' must be text"),
    ("labelme", '"label": "cat"', '"label": 3', "shapes[0]: class 3 must be text"),
    ("labelme", '"label": "cat"', '"name": "cat"', "shapes[0]: class None must be text"),
    ("labelme", '"polygon"', '"circle"', "shapes[0]: shape_type='circle' must be 'polygon' or"),
    ("labelme", '"polygon"', '"mask"', "shapes[0]: shape_type='mask' must be"),
    ("labelme", '"polygon"', '"rectangle"', "shapes[0]: points of a rectangle must be two or four"),
    ("labelme", "[5, 20]", '[5, "x"]', "shapes[0]: points must be a list of pairs of numbers"),
    ("labelme", "[5, 20]", "[5]", "shapes[0]: points must be a list of pairs of numbers"),
    ("labelme", "[5, 20]", "[5, NaN]", "shapes[0]: points must be a list of pairs of numbers"),
    ("labelme", "[5, 20]", "[5, 1e12]", "shapes[0]: points must be a list of pairs of numbers"),
    ("labelme", "[5, 20]", "[5, 2000]", "shapes[0]: polygon must have three points or more in"),
    ("labelme", ", [5, 20]", "", "shapes[0]: polygon must have three points or more"),
    ("labelme", "[[1, 2], [9, 3], [5, 20]]", "7", "shapes[0]: points must be a list of pairs"),
    ("labelme", "[[1, 2], [9, 3], [5, 20]]", "[]", "shapes[0]: polygon must have three points"),
    ("labelme", "images/a.jpg", "images/c.jpg", "image '../images/c.jpg' must be in"),
    ("labelme", '"../images/a.jpg"', "null", "imagePath=None must be the path of an image"),
    ("labelme", '"../images/a.jpg"', '""', "imagePath='' must be the path of an image"),
    ("labelme", '"imageWidth": 40', '"imageWidth": 41', "size=41x30 must be 40x30"),
    ("labelme", '"imageHeight": 30', '"imageHeight": 3', "size=40x3 must be 40x30"),
    ("labelme", "}]", "}", "a.json': it must be JSON: Expecting"),
    ("cvat", 'xtl="1"', 'xtl="one"', "annotations.xml': line 4: a box must have numbers xtl, ytl"),
    ("cvat", 'xtl="1"', "", "line 4: a box must have numbers xtl, ytl, xbr, ybr"),
    ("cvat", 'xtl="1"', 'xtl="nan"', "line 4: a box must have numbers"),
    ("cvat", 'xtl="1"', 'xtl="10"', "line 4: box=[10, 2, 0, 10]"),
    ("cvat", 'xtl="1"', 'xtl="20"', "line 4: box=[20, 2, -10, 10]"),
    ("cvat", 'rotation="0"', 'rotation="30"', "line 4: rotation: oriented boxes are not read"),
    ("cvat", 'rotation="0"', 'rotation="a bit"', "line 4: rotation: oriented boxes"),
    (
        "cvat",
        'label="cat"',
        'label="dog"',
        "line 4: label 'dog' must be one of the task's, ['cat']",
    ),
    ("cvat", 'label="cat"', "", "line 4: label '' must be one of"),
    ("cvat", BOX, '<polyline label="cat" points="1,2;3,4"/>', "line 4: polyline must be a box, a"),
    ("cvat", BOX, '<points label="cat" points="1,2"/>', "line 4: points must be a box, a polygon"),
    ("cvat", BOX, '<ellipse label="cat"/>', "line 4: ellipse must be a box"),
    ("cvat", BOX, '<polygon label="cat" points="1,2;x,4;5,9"/>', "line 4: a polygon must have"),
    ("cvat", BOX, '<polygon label="cat"/>', "line 4: a polygon must have points"),
    ("cvat", BOX, '<polygon label="cat" points="1,2;3,4"/>', "line 4: polygon must have three"),
    (
        "cvat",
        BOX,
        '<mask label="cat" rle="1,2" left="0" top="0" width="2" height="2"/>',
        "line 4: a mask must lie in its image, with runs for all of its pixels",
    ),
    ("cvat", BOX, '<mask label="cat" rle="1" left="0"/>', "line 4: a mask must have rle and"),
    ("cvat", 'name="a.jpg"', 'name="c.jpg"', "line 3: image 'c.jpg' must be in"),
    ("cvat", 'width="40"', 'width="30"', "line 3: size=30x30 must be 40x30"),
    ("cvat", "</image>", "", "line 6: it must be XML: mismatched tag"),
    (
        "cvat",
        f"{BOX}\n</image>",
        f"</image><track>{BOX}</track>",
        "line 4: a track of a video must",
    ),
    ("label_studio", '"x": 1', '"x": "one"', "task 7: a rectangle must have numbers x, y, width"),
    ("label_studio", '"x": 1', '"x": null', "task 7: a rectangle must have numbers"),
    ("label_studio", '"x": 1', '"x": NaN', "task 7: a rectangle must have numbers"),
    ("label_studio", '"x": 1', '"x": 101', "task 7: box=[40.4, 0.6, 12, 12]"),
    ("label_studio", '"x": 1', '"z": 1', "task 7: a rectangle must have numbers"),
    ("label_studio", '"width": 30', '"width": 0', "task 7: box=[0.4, 0.6, 0, 12]"),
    ("label_studio", '"width": 30', '"width": -30', "task 7: box=[0.4, 0.6, -12, 12]"),
    ("label_studio", '"rotation": 0', '"rotation": 45', "task 7: rotation=45: oriented boxes"),
    ("label_studio", '["cat"]', "[]", "task 7: rectanglelabels=[] must be a list of one"),
    ("label_studio", '["cat"]', "[3]", "task 7: class 3 must be text"),
    ("label_studio", '["cat"]', '[" "]', "task 7: class ' ' must be text"),
    (
        "label_studio",
        '"type": "rectanglelabels"',
        '"type": "brushlabels"',
        "task 7: type='brushlabels'",
    ),
    (
        "label_studio",
        '"type": "rectanglelabels"',
        '"type": "ellipselabels"',
        "task 7: type='ellipsel",
    ),
    (
        "label_studio",
        '"type": "rectanglelabels"',
        '"type": "polygonlabels"',
        "task 7: polygonlabels=None must",
    ),
    ("label_studio", '"type": "rectanglelabels"', '"kind": 1', "task 7: type=None must be"),
    ("label_studio", "images/a.jpg", "images/c.jpg", "task 7: image 'images/c.jpg' must be in"),
    ("label_studio", '"image": "/data/local-files/?d=images/a.jpg"', "", "task 7: data must name"),
    (
        "label_studio",
        '"annotations"',
        '"label"',
        "task 7: it must have annotations with a list named",
    ),
    (
        "label_studio",
        '["cat"]',
        '["cat", "dog"]',
        "task 7: rectanglelabels=['cat', 'dog'] must be a",
    ),
    ("label_studio", '"annotations": [', '"annotations": [1, ', "task 7: it must have annotations"),
    ("label_studio", '"result": [', '"result": 3, "b": [', "task 7: it must have annotations"),
    ("label_studio", "]}]}]", "]}]", "project.json': it must be JSON"),
    (
        "label_studio",
        '"value": {',
        '"value": {"a": 1}, "b": {',
        "task 7: rectanglelabels=None must",
    ),
    ("coco", "[1, 2, 9, 10]", "[1, 2, 9]", "annotation 5: bbox must be [x, y, width, height]"),
    ("coco", "[1, 2, 9, 10]", "[1, 2, 9, -1]", "annotation 5: box=[1, 2, 9, -1]"),
    ("coco", "[1, 2, 9, 10]", "[1, 2, -9, 10]", "annotation 5: box=[1, 2, -9, 10]"),
    ("coco", "[1, 2, 9, 10]", "[50, 2, 9, 10]", "annotation 5: box=[50, 2, 9, 10]"),
    ("coco", "[1, 2, 9, 10]", '["a", 2, 9, 10]', "annotation 5: bbox must be"),
    ("coco", "[1, 2, 9, 10]", "[NaN, 2, 9, 10]", "annotation 5: bbox must be"),
    ("coco", "[1, 2, 9, 10]", "null", "annotation 5: bbox must be"),
    ("coco", '"image_id": 3', '"image_id": 4', "annotation 5: image_id=4 must be the id of one"),
    ("coco", '"image_id": 3', '"image_id": [3]', "annotation 5: image_id=[3] must be"),
    ("coco", '"category_id": 1', '"category_id": 2', "annotation 5: category_id=2 must be one of"),
    ("coco", '"category_id": 1', '"category_id": "1"', "annotation 5: category_id='1' must be"),
    ("coco", '"name": "cat"', '"name": ""', "categories[0]: name='' must be text of one"),
    ("coco", '"name": "cat"', '"name": 7', "categories[0]: name=7 must be text"),
    ("coco", '{"id": 1, "name": "cat"}', '{"name": "cat"}', "categories[0]: id=None must be a"),
    ("coco", '"file_name": "a.jpg"', '"file_name": "c.jpg"', "images[0]: image 'c.jpg' must be in"),
    ("coco", '"file_name": "a.jpg"', '"file_name": 3', "images[0]: file_name=3 must be the path"),
    ("coco", '"width": 40', '"width": 41', "images[0]: size=41x30 must be 40x30"),
    ("coco", '{"id": 3, "file', '{"file', "images[0]: id=None must be a number or text"),
    ("coco", '"bbox"', '"segmentation": [[1, 2, 900, 4, 5, 6]], "bbox"', "annotation 5: polygon"),
    (
        "coco",
        '"bbox"',
        '"segmentation": {"size": [1, 2], "counts": [2]}, "bbox"',
        "or RLE of its image's size",
    ),
    ("coco", '"annotations": [', '"annotations": [[], ', "it must have lists of entries"),
    ("coco", '"name": "cat"}]}', '"name": "cat"}]', "train.json': it must be JSON"),
]


def _small(format, folder):
    (folder / "images").mkdir(parents=True)
    for name in "ab":
        pixels = np.full((30, 40, 3), ord(name), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{name}.jpg")
    for name, text in FILES[format].items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize("format", FILES)
def test_small_data_are_right(format, tmp_path):
    _small(format, tmp_path)
    name, found = read_folder(tmp_path)
    assert (name, found.faults) == (format, [])
    assert found.names == (["cat", "dog"] if format == "yolo" else ["cat"])
    assert sum(len(picture.things) for picture in found.pictures) == 1 + (format == "yolo")


def test_each_format_is_broken_in_twenty_ways():
    for format in FILES:
        assert sum(case[0] == format for case in BROKEN) >= 20


@pytest.mark.parametrize(("format", "old", "new", "said"), BROKEN)
def test_what_is_broken_is_named(format, old, new, said, tmp_path):
    _small(format, tmp_path)
    (file,) = [tmp_path / name for name, text in FILES[format].items() if old in text]
    text = file.read_text()
    assert text.count(old) >= 1
    file.write_bytes(text.replace(old, new, 1).encode("latin-1"))
    _, found = read_folder(tmp_path, format)
    assert any(said in fault for fault in found.faults), found.faults
    assert str(tmp_path) in found.faults[0]
    with pytest.raises(ValueError):
        write_splits(found, {}, tmp_path / "made")


def test_the_program_checks(tmp_path, capsys):
    _small("yolo", tmp_path)
    words = ["check", tmp_path, "--picture", tmp_path / "seen.png"]
    assert run_main(program, *words) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path}: yolo, 2 images" in said
    assert "| train   |        2 | 40x30   |                 1 |         2 |            1 |" in said
    assert Image.open(tmp_path / "seen.png").size[0] > 1000
    (tmp_path / "labels/a.txt").write_text("0 0.5 0.5 0.2 0.2\n5 0.5 0.5 0.2 0.2\n0 a b c d\n")
    assert run_main(program, *words) == 1
    said = capsys.readouterr()
    assert "a.txt': line 2: class 5" in said.out and "a.txt': line 3: '0 a b c d'" in said.out
    assert said.err == "2 wrong\n"
    assert run_main(program, "convert", tmp_path, "--output", tmp_path / "made") == 2
    assert "line 2: class 5 must be a whole number from 0 to 1 (and 1 more: " in (
        capsys.readouterr().err
    )


def test_images_without_a_file_of_labels_are_told(blood, tmp_path, capsys):
    WRITERS["yolo"](*blood, tmp_path / "data")
    (lost, *_) = sorted((tmp_path / "data/train/labels").iterdir())
    lost.unlink()
    words = ["check", tmp_path / "data", "--picture", tmp_path / "x.png"]
    assert run_main(program, *words) == 0
    out = capsys.readouterr().out
    assert (
        f"1 images have no file of labels, such as '{tmp_path}/data/train/images/{lost.stem}" in out
    )
    assert "| sizes " in out and "nothing is wrong" in out


def test_what_is_suspicious_is_said(tmp_path, capsys):
    _small("yolo", tmp_path)
    (tmp_path / "val").mkdir()
    shutil.copy(tmp_path / "images/a.jpg", tmp_path / "val/copy.jpg")
    shutil.copy(tmp_path / "images/b.jpg", tmp_path / "images/again.jpg")
    (tmp_path / "data.yaml").write_text("names: [cat, Cat, ant]\ntrain: images\nval: val\n")
    (tmp_path / "labels/b.txt").write_text("0 0.5 0.5 0.01 0.5\n")
    (tmp_path / "val/copy.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    assert run_main(program, "check", tmp_path, "--picture", tmp_path / "seen.png") == 0
    said = capsys.readouterr().out
    assert "suspicious: class 'Cat' is in train alone" in said
    assert "suspicious: class 'ant' has no object" in said
    assert "suspicious: classes 'cat', 'Cat' may be one" in said
    assert "suspicious: one image is in train and val: " in said
    assert "suspicious: one image is there twice: " in said
    assert "suspicious: 1 boxes are at most one pixel wide or high, such as a 'cat' in" in said


def test_a_split_is_stratified_and_the_same_again(blood, tmp_path):
    splits, images = blood
    WRITERS["yolo"](splits, images, tmp_path / "data")
    _, found = read_folder(tmp_path / "data")
    pictures, fractions = [*found.pictures], {"train": 0.7, "val": 0.2, "test": 0.1}
    made = split_pictures(pictures, fractions, seed=3)
    again = split_pictures(pictures[::-1], fractions, seed=3)
    assert {split: part[::-1] for split, part in again.items()} == made
    assert made != split_pictures(pictures, fractions, seed=4)
    assert sorted(p.file for part in made.values() for p in part) == sorted(
        p.file for p in pictures
    )
    for label in found.names:
        count = {
            s: sum(t.label == label for p in part for t in p.things) for s, part in made.items()
        }
        for split, part in fractions.items():
            assert count[split] / sum(count.values()) == pytest.approx(part, abs=0.05)
    words = ["split", tmp_path / "data", "--output", tmp_path / "made", "--val", 0.25]
    assert run_main(program, *words) == 0
    content = json.loads((tmp_path / "made/val.json").read_text())
    assert abs(len(content["images"]) - 0.25 * len(pictures)) <= 2
    register_coco(str(tmp_path / "made/val.json"), str(tmp_path / "data"))
    assert run_main(program, *words) == 0  # the same again
    assert run_main(program, *words, "--seed", 1) == 2  # nothing is overwritten


def test_a_format_is_found_or_asked_for(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="must hold one of yolo, voc, cvat"):
        read_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="must be a folder of data"):
        read_folder(tmp_path / "none")
    _small("yolo", tmp_path / "a")
    (tmp_path / "a" / "boxes.csv").write_text(FILES["csv"]["boxes.csv"])
    with pytest.raises(ValueError, match=r"several formats, yolo \(data.yaml\), csv \(boxes.csv\)"):
        read_folder(tmp_path / "a")
    assert read_folder(tmp_path / "a", "csv")[0] == "csv"
    with pytest.raises(FileNotFoundError, match="must hold data of format='voc'"):
        read_folder(tmp_path / "a", "voc")
    with pytest.raises(ValueError, match="format='yolov8' is unknown: valid are 'yolo'"):
        read_folder(tmp_path / "a", "yolov8")


def test_pixels_of_voc_count_from_0_where_a_box_begins_there(tmp_path):
    _small("voc", tmp_path)
    boxes = []
    for first in (1, 0):
        text = XML.replace("<xmin>1</xmin>", f"<xmin>{first}</xmin>")
        (tmp_path / "Annotations/a.xml").write_text(text)
        _, found = read_folder(tmp_path)
        assert found.notes == [f"pixels count from {first}, by the corners of all boxes"]
        boxes += [thing.box for picture in found.pictures for thing in picture.things]
    assert boxes == [(0, 1, 10, 11), (0, 2, 10, 10)]


def test_masks_of_cvat_and_a_table_without_names_are_read(tmp_path):
    _small("cvat", tmp_path / "cvat")
    file = tmp_path / "cvat/annotations.xml"
    mask = '<mask label="cat" rle="1,2,1,2" left="4" top="5" width="3" height="2"/>'
    file.write_text(file.read_text().replace(BOX, mask))
    _, found = read_folder(tmp_path / "cvat")
    ((thing,),) = ([*picture.things] for picture in found.pictures)
    assert thing.box == (5, 5, 2, 2)
    bits = mask_util.decode(thing.mask)
    assert bits.shape == (30, 40) and bits.sum() == 4
    assert bits[5:7, 4:7].tolist() == [[0, 1, 1], [0, 1, 1]]
    _small("csv", tmp_path / "csv")
    (tmp_path / "csv/boxes.csv").write_text("images/a.jpg,1,2,10,12,cat\nimages/b.jpg,,,,,\n")
    _, found = read_folder(tmp_path / "csv")
    assert found.faults == []
    assert [len(picture.things) for picture in found.pictures] == [1, 0]


def test_a_folder_is_trained_on(shapes, tmp_path, run_train_net, capsys):
    splits, images = shapes
    WRITERS["yolo"](splits, images, tmp_path / "data")
    words = ["--data", tmp_path / "data", f"train.output_dir={tmp_path / 'run'}"]
    words += ["model.backbone.bottom_up.model_name=test_resnet", "train.max_iter=1"]
    words += ["model.backbone.bottom_up.pretrained=False", "dataset.val_size=64"]
    words += ["dataset.train_sizes=[64]", "dataloader.train.total_batch_size=2", "train.pictures=0"]
    words += ["dataloader.train.num_workers=0", "dataloader.test.num_workers=0"]
    assert run_train_net(*words, "train.max_iters=1") == 2
    assert "the nearest are 'train.max_iter'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()  # nothing is written for what is wrong
    assert run_train_net(*words) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'data'}: yolo, split as train and val; 6 and 3 images" in said
    assert f"wrote {tmp_path / 'run' / 'data'}" in said
    (tmp_path / "run/data/train.json").unlink()
    assert run_train_net(*words) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert not (tmp_path / "run/data/train.json").exists()
    config = (tmp_path / "run/config.yaml").read_text()
    assert "MaskRCNNConvUpsampleHead" in config and f"{tmp_path}/run/data/train.json" in config
    assert run_train_net(*words, "train.max_iter=2", "--resume") == 0
    (tmp_path / "data/train/labels").rename(tmp_path / "data/train/gone")
    assert run_train_net(*words, "--overwrite") == 2
    assert "train.json' holds other data" in capsys.readouterr().err
    assert run_train_net("train.max_iter=1", "--format", "yolo") == 2
    assert "--format yolo must stand with --data" in capsys.readouterr().err
    assert run_train_net("train.max_iter=1") == 2
    assert "--config-file must be a LazyConfig" in capsys.readouterr().err


def test_what_labelimg_has_verified_and_names_with_spaces_are_read(tmp_path):
    _small("voc", tmp_path)
    (tmp_path / "Annotations/a.xml").unlink()
    (tmp_path / "images/a.jpg").rename(tmp_path / "images/my a.jpg")
    text = XML.replace("a.jpg", "my a.jpg").replace("<annotation>", '<annotation verified="yes">')
    (tmp_path / "Annotations/my a.xml").write_text(text.replace("<xmin>1<", "<xmin>1.5<"))
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "ImageSets/Main/trainval.txt").write_text("my a\n")
    _, found = read_folder(tmp_path)
    assert found.faults == [] and [*found.splits] == ["train"]
    (picture,) = found.pictures
    assert picture.things[0].box == (1.5, 2, 8.5, 10)  # fractions of pixels count from 0


def test_classes_of_coco_are_ordered_by_their_ids(tmp_path):
    _small("coco", tmp_path)
    content = json.loads((tmp_path / "train.json").read_text())
    content["categories"] = [{"id": i, "name": f"c{i}"} for i in (11, 2, 0, 1, 10)]
    (tmp_path / "train.json").write_text(json.dumps(content))
    assert read_folder(tmp_path)[1].names == ["c1", "c2", "c10", "c11"]
    content["annotations"][0]["category_id"] = 0
    (tmp_path / "train.json").write_text(json.dumps(content))
    assert read_folder(tmp_path)[1].names == ["c0", "c1", "c2", "c10", "c11"]


def test_coco_keeps_crowds_rle_and_areas(tmp_path):
    _small("coco", tmp_path)
    content = json.loads((tmp_path / "train.json").read_text())
    bits = np.zeros((30, 40), np.uint8, order="F")
    bits[3:9, 4:8] = 1
    rle = mask_util.encode(bits)
    rle["counts"] = rle["counts"].decode()
    first = content["annotations"][0] | {"segmentation": rle, "area": 7, "iscrowd": 1}
    flat = content["annotations"][0] | {"id": 6, "bbox": [1, 2, 0, 5]}
    content["annotations"] = [first, flat]
    (tmp_path / "train.json").write_text(json.dumps(content))
    (tmp_path / "captions.json").write_text('{"images": [], "annotations": []}')
    _, found = read_folder(tmp_path)
    assert found.faults == []
    assert any("captions.json' has no categories" in note for note in found.notes)
    assert "1 boxes have no width or height: they are left out" in found.notes
    (entry,) = found.coco(found.pictures)["annotations"]
    assert (entry["segmentation"], entry["area"], entry["iscrowd"]) == (rle, 7, 1)


def test_an_image_is_spoken_of_once(tmp_path):
    _small("coco", tmp_path)
    shutil.copy(tmp_path / "train.json", tmp_path / "train_keypoints.json")
    fault = read_folder(tmp_path)[1].faults[0]
    assert "a.jpg' must be spoken of once, and '" in fault and "train.json', images[0]," in fault


def test_what_the_program_wrote_is_no_data(tmp_path):
    for format in ("yolo", "coco"):
        folder = tmp_path / format
        _small(format, folder)
        words = ["convert", folder, "--output", folder / "made"]
        assert run_main(program, *words) == 0
        assert run_main(program, *words) == 0  # again, and the same is found
        name, found = read_folder(folder)
        assert (name, found.faults) == (format, [])


def test_an_image_elsewhere_is_not_taken_for_another(tmp_path):
    _small("coco", tmp_path)
    (tmp_path / "images").rename(tmp_path / "seq1")
    content = json.loads((tmp_path / "train.json").read_text())
    content["images"][0]["file_name"] = "seq2/a.jpg"
    (tmp_path / "train.json").write_text(json.dumps(content))
    (fault,) = read_folder(tmp_path)[1].faults
    assert "image 'seq2/a.jpg' must be in" in fault
    content["images"][0]["file_name"] = "C:\\old\\seq2\\a.jpg"
    (tmp_path / "train.json").write_text(json.dumps(content))
    assert read_folder(tmp_path)[1].faults == []


def test_folders_behind_links_are_read(tmp_path):
    _small("labelme", tmp_path / "disk")
    (tmp_path / "data").mkdir()
    for name in ("images", "json"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "disk" / name)
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data")  # and do not go round
    _, found = read_folder(tmp_path / "data")
    assert found.faults == [] and len([*found.pictures]) == 1


def test_groups_of_labelme_are_one_object(tmp_path):
    _small("labelme", tmp_path)
    content = json.loads(FILES["labelme"]["json/a.json"])
    other = content["shapes"][0] | {"points": [[20, 2], [30, 3], [25, 20]], "group_id": 4}
    content["shapes"] = [content["shapes"][0] | {"group_id": 4}, other]
    content = {"imageData": "A" * 200_000, **content}
    (tmp_path / "json/a.json").write_text(json.dumps(content))
    _, found = read_folder(tmp_path)
    ((thing,),) = ([*picture.things] for picture in found.pictures)
    assert len(thing.mask) == 2 and thing.box == (1, 2, 29, 18)


def test_tasks_that_are_not_done_are_left_out(tmp_path):
    _small("label_studio", tmp_path)
    other = {"id": 8, "data": {"image": "/data/upload/0a1b2c3d-b.jpg"}}
    (tmp_path / "project.json").write_text(json.dumps([TASK, other | {"annotations": []}]))
    _, found = read_folder(tmp_path)
    assert found.faults == [] and len([*found.pictures]) == 1
    assert found.notes == ["1 tasks have no annotation yet: they are left out"]


def test_columns_of_sizes_splits_and_semicolons_are_read(tmp_path):
    _small("csv", tmp_path)
    file = tmp_path / "boxes.csv"
    head = "filename;width;height;class;xmin;ymin;xmax;ymax;split\n"
    file.write_text(f"{head}a.jpg;40;30;cat;1;2;10;12;Train\nb.jpg;40;30;cat;1;2;10;12;valid\n")
    _, found = read_folder(tmp_path)
    assert found.faults == [] and sorted(found.splits) == ["train", "val"]
    file.write_text(f"{head}a.jpg;80;60;cat;1;2;10;12;Train\nb.jpg;40;30;cat;1;2;10;12;dev\n")
    first, second = read_folder(tmp_path)[1].faults
    assert "line 2: size=80x60 must be 40x30" in first
    assert "line 3: split='dev' must be train, val or test" in second


def test_the_folder_says_the_split_before_the_name(tmp_path):
    _small("yolo", tmp_path)
    _, found = read_folder(tmp_path)
    for path, split in {
        "train/test_1.jpg": "train",
        "valid/train_2.jpg": "val",
        "annotations/instances_val2017.json": "val",
        "a/b.jpg": "all",
    }.items():
        assert found.split_of(tmp_path / path) == split


def test_what_no_split_has_is_said(tmp_path):
    for name, split in (("a", "train"), ("b", "val"), ("c", "more")):
        (tmp_path / split).mkdir()
        Image.new("RGB", (40, 30)).save(tmp_path / split / f"{name}.png")
        text = f"filename,class,xmin,ymin,xmax,ymax\n{name}.png,cat,1,2,10,12\n"
        (tmp_path / split / "boxes.csv").write_text(text)
    data = read_for_training(tmp_path)
    assert "csv, split as train and val, 1 images of all left out; 1 and 1 images" in data.said
    assert data.task == "boxes"


def test_a_picture_is_not_overwritten_unasked(tmp_path, monkeypatch, capsys):
    _small("yolo", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert run_main(program, "check", "data") == 0
    before = (tmp_path / "data.png").read_bytes()
    (tmp_path / "data.png").write_bytes(b"mine")
    assert run_main(program, "check", "data") == 0
    assert "no picture is drawn: data.png is there already" in capsys.readouterr().out
    assert (tmp_path / "data.png").read_bytes() == b"mine"
    assert run_main(program, "check", "data", "--picture", "data.png") == 0
    assert (tmp_path / "data.png").read_bytes()[:8] == before[:8]


def test_images_of_yolo_behind_links_are_read(tmp_path):
    _small("yolo", tmp_path / "disk")
    (tmp_path / "data").mkdir()
    shutil.copy(tmp_path / "disk/data.yaml", tmp_path / "data")
    (tmp_path / "data/images").mkdir()
    (tmp_path / "data/images/part").symlink_to(tmp_path / "disk/images")
    (tmp_path / "data/labels").mkdir()
    (tmp_path / "data/labels/part").symlink_to(tmp_path / "disk/labels")
    _, found = read_folder(tmp_path / "data")
    assert found.faults == []
    assert sum(len(picture.things) for picture in found.pictures) == 2
