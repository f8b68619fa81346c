"""Label maps in the forms of others: read back as they were, and what is broken is named."""

import json

import numpy as np
import pytest
from detbackbones.cli import data as program
from detbackbones.data.formats import read_folder
from detbackbones.data.formats.convert import read_for_training, write_splits
from detbackbones.data.images import read_label_map
from detbackbones.data.semantic import register_semantic
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from support import run_main

NAMES = ["background", "cell", "nucleus"]
COLORS = np.array([[0, 0, 0], [200, 30, 30], [30, 200, 90]], dtype=np.uint8)


def _maps():
    """Label maps of three classes by the names of images, some in each split."""
    generator = np.random.default_rng(0)
    coarse = {f"a{i}": generator.integers(0, 3, (4, 6)) for i in range(8)}
    return {name: np.kron(x, np.ones((5, 5))).astype(np.uint8) for name, x in coarse.items()}


def _split(name):
    return "train" if int(name[1:]) < 6 else "val"


def _image(folder, name, size=(30, 20)):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 90, 200)).save(folder / f"{name}.jpg")


def _png(file, pixels, palette=None):
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette is not None:
        image = image.convert("P")
        image.putdata(pixels.ravel().tolist())
        image.putpalette(palette.ravel().tolist())
    image.save(file)


def indices(folder, maps):
    for name, labels in maps.items():
        _image(folder / "images" / _split(name), name)
        _png(folder / "labels" / _split(name) / f"{name}.png", labels)
    (folder / "classes.txt").write_text("\n".join(NAMES))


def palette_png(folder, maps):
    """As Pascal VOC has it, with void around things."""
    for name, labels in maps.items():
        _image(folder / _split(name) / "JPEGImages", name)
        _png(folder / _split(name) / "SegmentationClass" / f"{name}.png", labels, COLORS)
        _png(folder / _split(name) / "SegmentationObject" / f"{name}.png", labels * 7)
    (folder / "labels.txt").write_text("\n".join(NAMES))


def colors(folder, maps):
    """As CamVid is had: split before kind, a CSV file of colours."""
    for name, labels in maps.items():
        _image(folder / _split(name), name)
        _png(folder / f"{_split(name)}_labels" / f"{name}_L.png", COLORS[labels])
    rows = [f"{name},{r},{g},{b}" for name, (r, g, b) in zip(NAMES, COLORS.tolist())]
    (folder / "class_dict.csv").write_text("\n".join(["name,r,g,b", *rows]))


def cvat(folder, maps):
    """As CVAT's "Segmentation mask"."""
    colors(folder, maps)
    (folder / "class_dict.csv").unlink()
    rows = [f"{name}:{r},{g},{b}::" for name, (r, g, b) in zip(NAMES, COLORS.tolist())]
    (folder / "labelmap.txt").write_text("\n".join(["# label:color_rgb:parts:actions", *rows]))


def roboflow(folder, maps):
    """As Roboflow exports it: the label map beside the image."""
    for name, labels in maps.items():
        _image(folder / _split(name), name)
        _png(folder / _split(name) / f"{name}_mask.png", labels)
        rows = [f"{i}, {name}" for i, name in enumerate(NAMES)]
        (folder / _split(name) / "_classes.csv").write_text(
            "\n".join(["Pixel Value, Class", *rows])
        )


def folders_of_classes(folder, maps):
    for name, labels in maps.items():
        _image(folder / _split(name) / "images", name)
        for number, label in enumerate(NAMES[1:], 1):
            mask = np.uint8(255) * (labels == number)
            _png(folder / _split(name) / "masks" / label / f"{name}.png", mask)


def files_of_classes(folder, maps):
    for name, labels in maps.items():
        _image(folder / "images" / _split(name), name)
        for number, label in enumerate(NAMES[1:], 1):
            file = folder / "masks" / _split(name) / f"{name}_{label}.png"
            Image.fromarray(labels == number).convert("1").save(_made(file))


def _made(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


WRITERS = (
    indices,
    palette_png,
    colors,
    cvat,
    roboflow,
    folders_of_classes,
    files_of_classes,
)


def _written(folder, output):
    """Label maps that were written for each image, as they are registered."""
    format, found = read_folder(folder)
    assert format == "label_maps"
    assert not found.faults
    splits = {split: [*pictures.values()] for split, pictures in found.splits.items()}
    read = {}
    for file in write_splits(found, splits, output):
        labels = str(output / "labels" / file.stem)
        name = register_semantic(str(file), labels, len(found.names), found.names, partial=True)
        for record in DatasetCatalog.get(name):
            key = record["image_id"]
            read[key] = file.stem, read_label_map(record["sem_seg_file_name"], np.int64)
            assert record["file_name"].endswith(f"{key}.jpg")
        assert MetadataCatalog.get(name).stuff_classes == found.names
    return found, read


@pytest.mark.parametrize("write", WRITERS)
def test_label_maps_are_read_back(write, tmp_path):
    write(tmp_path / "data", maps := _maps())
    found, read = _written(tmp_path / "data", tmp_path / "made")
    assert found.names == NAMES
    assert (tmp_path / "made" / "classes.txt").read_text().split() == NAMES
    assert {name: split for name, (split, _) in read.items()} == {x: _split(x) for x in maps}
    for name, labels in maps.items():
        np.testing.assert_array_equal(read[name][1], labels)


def test_colors_without_a_palette_are_the_classes(tmp_path):
    colors(tmp_path / "data", maps := _maps())
    (tmp_path / "data" / "class_dict.csv").unlink()
    found, read = _written(tmp_path / "data", tmp_path / "made")
    assert found.names == ["#000000", "#1ec85a", "#c81e1e"]
    assert "colours are the classes" in found.notes[0]
    order = np.array([0, 2, 1])
    np.testing.assert_array_equal(read["a0"][1], order[maps["a0"]])


def test_values_without_names_are_numbered_and_255_is_no_class(tmp_path):
    values = np.array([10, 255, 30], dtype=np.uint8)
    indices(tmp_path / "data", {name: values[labels] for name, labels in _maps().items()})
    (tmp_path / "data" / "classes.txt").unlink()
    found, read = _written(tmp_path / "data", tmp_path / "made")
    assert found.names == ["class_10", "class_30"]
    np.testing.assert_array_equal(read["a0"][1], np.array([0, 255, 1])[_maps()["a0"]])


@pytest.mark.parametrize("names", [None, ["background", "cell"]])
def test_0_and_255_are_background_and_foreground(names, tmp_path):
    maps = {name: np.uint8(255) * (labels == 1) for name, labels in _maps().items()}
    indices(tmp_path / "data", maps)
    if names:
        (tmp_path / "data" / "classes.txt").write_text("\n".join(names))
    else:
        (tmp_path / "data" / "classes.txt").unlink()
    found, read = _written(tmp_path / "data", tmp_path / "made")
    assert found.names == (names or ["background", "foreground"])
    np.testing.assert_array_equal(read["a3"][1], maps["a3"] == 255)


def test_gray_maps_of_three_channels_are_indices(tmp_path):
    indices(tmp_path / "data", {n: np.stack([x] * 3, axis=2) for n, x in _maps().items()})
    found, read = _written(tmp_path / "data", tmp_path / "made")
    assert found.names == NAMES
    np.testing.assert_array_equal(read["a0"][1], _maps()["a0"])


def test_what_is_void_is_no_class(tmp_path):
    cvat(tmp_path / "data", _maps())
    file = tmp_path / "data" / "labelmap.txt"
    file.write_text(file.read_text().replace("background", "void"))
    found, read = _written(tmp_path / "data", tmp_path / "made")
    assert found.names == NAMES[1:]
    np.testing.assert_array_equal(read["a1"][1], np.array([255, 0, 1])[_maps()["a1"]])


def _labels(folder, name="a0"):
    return folder / "labels" / _split(name) / f"{name}.png"


def _resave(change):
    def broken(folder):
        file = _labels(folder)
        _png(file, change(np.array(Image.open(file))))

    return broken


def _write(name, text):
    return lambda folder: (folder / name).write_text(text)


def _jpeg(folder):
    Image.open(_labels(folder)).save(_labels(folder).with_suffix(".jpg"))
    _labels(folder).unlink()


def _damage(folder):
    file = _labels(folder)
    file.write_bytes(file.read_bytes()[:60])


def _second(folder):
    _png(folder / "labels" / "train" / "a0.bmp", _maps()["a0"])


def _image_of_no_use(folder):
    (folder / "images" / "train" / "a0.jpg").write_bytes(b"none")


def _same_names(folder):
    for part in ("x", "y"):
        _image(folder / "images" / "train" / part, "a0")


BROKEN = [
    (indices, _resave(lambda x: x[:10]), "a0.png': size=30x10 must be 30x20, that of '"),
    (indices, _resave(lambda x: x * 9), "a0.png': '9', '18' must be in the palette, and is not"),
    (indices, _resave(lambda x: COLORS[x]), "a0.png': it has colours, and the palette is of val"),
    (indices, _jpeg, "a0.jpg': a label map must be one of .png, .bmp, .tif, .tiff: others change"),
    (indices, _damage, "a0.png': it cannot be read: "),
    (indices, lambda f: _png(f / "labels/train/b.png", _maps()["a0"]), "b.png': no image has its"),
    (indices, _second, "a0.jpg' has another label map too"),
    (indices, _image_of_no_use, "a0.jpg"),
    (indices, _same_names, "several images have its name"),
    (indices, _write("classes.txt", ""), "classes.txt': it must name classes, and names none"),
    (indices, _write("labels.txt", "x"), "differ: give --palette"),
    (indices, _write("x.csv", "name,r,g,b\ncell,1,2"), "x.csv': line 2: it must have a name and"),
    (indices, _write("x.csv", "name,r,g,b\ncell,1,2,300"), "x.csv': line 2: 300 is too large"),
    (indices, _write("x.csv", "name,id\ncell,1\nb,1"), "x.csv': line 3: 1 is there twice"),
    (indices, _write("x.csv", "name,id\ncell,-1"), "x.csv': line 2: it must have a name and"),
    (cvat, _write("labelmap.txt", "a:0,0,0::\nb"), "labelmap.txt': line 2: it must have a name"),
    (cvat, _write("labelmap.txt", "a:0,0,0::"), "a0_L.png': '#1ec85a', '#c81e1e' must be in"),
    (cvat, lambda f: (f / "labelmap.txt").write_bytes(b"\xff"), "labelmap.txt': it cannot be read"),
    (
        folders_of_classes,
        lambda f: _png(f / "train/masks/cell/a0.png", np.full((20, 30), 255, np.uint8)),
        "of its pixels are of 'cell' too",
    ),
    (
        folders_of_classes,
        lambda f: _png(f / "train/masks/cell/a0.png", _maps()["a0"]),
        "cell/a0.png': a mask of one class must have two values, one of them 0",
    ),
    (
        folders_of_classes,
        lambda f: _png(f / "train/masks/a0.png", _maps()["a0"]),
        "masks/a0.png': it is of no class, and those of other images are",
    ),
    (
        indices,
        lambda f: _png(f / "labels/train/cell/a0.png", _maps()["a0"]),
        "cell/a0.png': it is of 'cell', and others of all classes",
    ),
]


@pytest.mark.parametrize(("write", "harm", "said"), BROKEN)
def test_what_is_broken_is_named(write, harm, said, tmp_path):
    write(tmp_path, _maps())
    harm(tmp_path)
    try:
        faults = read_folder(tmp_path, "label_maps")[1].faults
    except ValueError as error:
        faults = [str(error)]
    assert any(said in fault for fault in faults), faults


def test_many_values_are_no_classes(tmp_path):
    indices(tmp_path, {n: np.arange(600).reshape(20, 30).astype(np.uint8) for n in _maps()})
    (tmp_path / "classes.txt").unlink()
    (fault,) = read_folder(tmp_path)[1].faults
    assert "its label maps have 256 values, too many to be classes" in fault


def test_masks_of_objects_do_not_stand_in_the_way_of_boxes(tmp_path):
    indices(tmp_path, _maps())
    image = {"id": 1, "file_name": "images/train/a0.jpg", "width": 30, "height": 20}
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 5, 6]}
    content = {"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "x"}]}
    (tmp_path / "train.json").write_text(json.dumps(content))
    assert read_folder(tmp_path)[0] == "coco"
    assert read_folder(tmp_path, "label_maps")[0] == "label_maps"
    with pytest.raises(ValueError, match="palette='x.csv' is for label maps, not for 'coco'"):
        read_folder(tmp_path, "coco", "x.csv")


def test_the_program_checks_and_splits(tmp_path, capsys):
    colors(tmp_path / "data", _maps())
    folder = str(tmp_path / "data")
    assert run_main(program, "check", folder, "--picture", tmp_path / "x.png") == 0
    said = capsys.readouterr().out
    assert "label_maps, 8 images" in said
    assert "| train   |        6 | 30x20   |" in said
    share = np.mean([_maps()[n] == 1 for n in _maps() if _split(n) == "train"])
    assert f"| cell       | 6, {share:.1%} " in said
    assert Image.open(tmp_path / "x.png").width > 1000
    assert run_main(program, "split", folder, "--output", tmp_path / "new", "--val", 0.5) == 0
    assert len((tmp_path / "new" / "val.txt").read_text().split()) == 4
    assert len([*(tmp_path / "new" / "labels" / "val").iterdir()]) == 4
    palette = tmp_path / "other.csv"
    palette.write_text("name,r,g,b\nground,0,0,0\ncell,200,30,30\ncell,30,200,90\n")
    words = ["convert", folder, "--palette", palette, "--output", tmp_path / "two"]
    assert run_main(program, *words) == 0
    assert (tmp_path / "two" / "classes.txt").read_text() == "ground\ncell"


def test_what_is_written_is_not_overwritten(tmp_path):
    indices(tmp_path / "data", _maps())
    data = read_for_training(tmp_path / "data")
    assert data.task == "semantic"
    settings = data.write(tmp_path / "made")
    assert data.write(tmp_path / "made") == settings
    _png(tmp_path / "made" / "labels" / "train" / "a0.png", np.zeros((20, 30), np.uint8))
    with pytest.raises(FileExistsError, match="a0.png' holds other data"):
        data.write(tmp_path / "made")


def test_images_of_one_name_cannot_be_of_one_split(tmp_path, capsys):
    maps = _maps()
    for name, split in (("a0", "train"), ("a0", "val"), ("a1", "train")):
        _image(tmp_path / "data" / "images" / split, name)
        _png(tmp_path / "data" / "labels" / split / f"{name}.png", maps[name])
    found = read_folder(tmp_path / "data")[1]
    splits = {split: [*pictures.values()] for split, pictures in found.splits.items()}
    assert len(write_splits(found, splits, tmp_path / "as_found")) == 2
    with pytest.raises(ValueError, match="train/a0.jpg' and .*val/a0.jpg' must have names"):
        write_splits(found, {"train": [*found.pictures]}, tmp_path / "one")
    assert not (tmp_path / "one").exists()
    picture = tmp_path / "x.png"
    assert run_main(program, "check", str(tmp_path / "data"), "--picture", picture) == 0
    assert "no picture" not in capsys.readouterr().out and picture.exists()


def test_a_folder_is_trained_on(tmp_path, run_train_net):
    folders_of_classes(tmp_path / "data", _maps())
    output = tmp_path / "out"
    run_train_net(
        *("--data", str(tmp_path / "data"), "model.backbone.bottom_up.pretrained=False"),
        *(f"train.output_dir={output}", "train.max_iter=2", "dataset.train_sizes=[64]"),
        *("dataset.val_size=64", "dataloader.train.num_workers=0", "train.pictures=1"),
    )
    metrics = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert any("sem_seg/mIoU" in line for line in metrics)
    assert "IoU-nucleus" in (output / "metrics.json").read_text()


def test_the_task_must_be_what_the_data_have(tmp_path, capsys):
    from detbackbones.cli import train

    indices(tmp_path / "data", _maps())
    words = ["--data", str(tmp_path / "data"), "--task", "boxes", f"train.output_dir={tmp_path}/o"]
    with pytest.raises(SystemExit):
        train.main(words)
    assert "--task boxes must be what the data have: semantic" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main(["--task", "boxes", "--config-file", "finetune/faster_rcnn.py"])
    assert "--task boxes must stand with --data" in capsys.readouterr().err


@pytest.mark.parametrize("write", [indices, colors])
def test_the_program_says_what_is_wrong_and_draws_the_rest(write, tmp_path, capsys):
    write(tmp_path / "data", _maps())
    palette = tmp_path / "other.csv"
    rows = "name,r,g,b\nground,0,0,0" if write is colors else "name,id\nground,0"
    palette.write_text(f"{rows}\n")
    words = ["check", tmp_path / "data", "--palette", palette, "--picture", tmp_path / "x.png"]
    assert run_main(program, *words) == 1
    said = capsys.readouterr()
    assert "must be in the palette, and is not" in said.out and "8 wrong" in said.err
    assert (tmp_path / "x.png").exists() and "nothing is wrong" not in said.out
