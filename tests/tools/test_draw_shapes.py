import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from detectron2.data.datasets import load_coco_json
from detectron2.structures import polygons_to_bitmask
from PIL import Image
from support import TOOLS, load_tool

# pycocotools converts its arrays in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TOOL = TOOLS / "draw_shapes.py"
draw_shapes = load_tool("draw_shapes")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    output = tmp_path_factory.mktemp("shapes")
    return output, draw_shapes.draw(output, train=30, val=6, size=96)


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_annotations_match_the_label_maps(shapes):
    output, counts = shapes
    for split, images in ("train", 30), ("val", 6):
        dicts = load_coco_json(output / f"{split}.json", output / "images" / split)
        assert len(dicts) == images
        assert sum(len(d["annotations"]) for d in dicts) == counts[split]
        for d in dicts:
            assert np.asarray(Image.open(d["file_name"])).shape == (96, 96, 3)
            labels = np.zeros((96, 96), dtype=np.uint8)
            for annotation in d["annotations"]:
                mask = polygons_to_bitmask(annotation["segmentation"], 96, 96)
                ys, xs = np.nonzero(mask)
                x, y, width, height = annotation["bbox"]
                assert (xs.min(), xs.max() + 1) == (x, x + width)
                assert (ys.min(), ys.max() + 1) == (y, y + height)
                assert not labels[mask].any(), "visible parts overlap"
                labels[mask] = annotation["category_id"]
            name = Path(d["file_name"]).with_suffix(".png").name
            drawn = np.asarray(Image.open(output / "labels" / split / name))
            np.testing.assert_array_equal(labels, drawn)


def test_areas_are_the_visible_pixels_and_every_class_occurs(shapes):
    train = json.loads((shapes[0] / "train.json").read_text())
    assert [c["name"] for c in train["categories"]] == list(draw_shapes.SHAPES)
    assert {a["category_id"] for a in train["annotations"]} == set(range(1, 11))
    for annotation in train["annotations"]:
        mask = polygons_to_bitmask(annotation["segmentation"], 96, 96)
        assert annotation["area"] == mask.sum() > 40


def test_shapes_differ_from_each_other():
    masks = {}
    for name, contours in draw_shapes.SHAPES.items():
        assert max(np.linalg.norm(points, axis=1).max() for points in contours) < 1.15
        rng = np.random.default_rng(0)
        placed = [32 + 28 * points for points in contours]
        masks[name] = draw_shapes._rasterize(rng, placed, 64)[0] >= 0.5
    for first, a in masks.items():
        for second, b in masks.items():
            assert first == second or (a & b).sum() / (a | b).sum() < 0.9, (first, second)


@pytest.mark.parametrize(
    "rows",
    [
        ["###", "#.#", "###"],
        ["##..", "##..", "..##", "..##"],
        ["#####", "#.#.#", "#####", "#.#.#", "#####"],
        [".#.", "#.#", ".#."],
    ],
    ids=["hole", "corner", "holes", "hole with open corners"],
)
def test_polygons_cover_exactly_the_mask(rows):
    mask = np.array([[c == "#" for c in row] for row in rows])
    polygons = draw_shapes._polygons(mask)
    np.testing.assert_array_equal(polygons_to_bitmask(polygons, *mask.shape), mask)


def test_a_seed_gives_one_data_set(tmp_path):
    for name, seed in ("a", 3), ("b", 3), ("c", 4):
        draw_shapes.draw(tmp_path / name, ["ring", "star"], train=2, val=1, size=64, seed=seed)
    a, b, c = (content(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert not set(a.values()) & set(c.values())


def test_the_train_and_val_images_differ(shapes):
    pictures = [p.read_bytes() for p in (shapes[0] / "images").rglob("*.jpg")]
    assert len(set(pictures)) == len(pictures) == 36


def test_a_folder_in_use_is_refused(tmp_path):
    arguments = {"train": 1, "val": 1, "size": 64}
    draw_shapes.draw(tmp_path / "a", ["star"], **arguments)
    with pytest.raises(
        FileExistsError, match="must be a new or empty folder: it has a data set .*overwrite"
    ):
        draw_shapes.draw(tmp_path / "a", ["ring"], **arguments)
    draw_shapes.draw(tmp_path / "a", ["ring"], **arguments, overwrite=True)
    assert "ring" in (tmp_path / "a" / "train.json").read_text()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "val.json").write_text("{}")
    with pytest.raises(FileExistsError, match="must be a new or empty folder$"):
        draw_shapes.draw(tmp_path / "b", ["ring"], **arguments, overwrite=True)
    assert content(tmp_path / "b") == {Path("val.json"): b"{}"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"classes": ["cirle"]}, "classes='cirle' must be one of circle, square, "),
        ({"classes": []}, "classes='' must name one or more"),
        ({"classes": ["star", "star"]}, "each once"),
        ({"train": 0}, "train=0 must be at least 1"),
        ({"size": 8}, "size=8 must be at least 64"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        draw_shapes.draw(tmp_path / "a", **arguments)
    assert not (tmp_path / "a").exists()


def test_the_command_line(tmp_path):
    command = [sys.executable, TOOL, "--output", tmp_path / "a", "--train=2", "--val=1"]
    command += ["--size=64", "--classes=heart,arrow"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0
    assert "train.json: 2 images with" in done.stdout
    again = subprocess.run(command, check=False, capture_output=True, text=True)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr and "Traceback" not in again.stderr
