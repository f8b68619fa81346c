"""One rule for each kind of image file, tried by its pixels; and what can be wrong with files."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import tifffile
import torch
from detbackbones import get_config
from detbackbones.data.images import ImageError, image_size, read_image
from detbackbones.data.mapper import DATA_ERRORS, CheckedDatasetMapper
from detbackbones.data.semantic import register_semantic
from detbackbones.data.verify import verify_images
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog
from PIL import Image

HEIGHT, WIDTH = 5, 7
RAMP = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)  # 0 to 34
GRAY = (7 * RAMP).astype(np.uint8)
COLOUR = np.stack([GRAY, GRAY[::-1], 255 - GRAY], axis=2)
PALETTE = [value for i in range(256) for value in (255 - i, i, i // 2)]


def palette(transparent=None):
    image = Image.fromarray(GRAY)
    image.putpalette(PALETTE)
    if transparent is not None:
        image.info["transparency"] = transparent
    return image


def rgba():
    return Image.fromarray(np.dstack([COLOUR, GRAY]))


def turned(orientation):
    """The image as a camera stores it: turned back it is COLOUR."""
    inverse = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[orientation]
    return Image.fromarray(COLOUR).transpose(inverse)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return {"exif": tags}


THREE = np.repeat(GRAY[:, :, None], 3, axis=2)
COLOURS = np.array(PALETTE, np.uint8).reshape(256, 3)[GRAY]
CMYK = Image.fromarray(COLOUR).convert("CMYK")
BITS = np.repeat(255 * (RAMP % 2)[:, :, None], 3, axis=2).astype(np.uint8)
RULES = {  # file, image, how it is saved, what is read
    "colour": ("a.png", lambda: Image.fromarray(COLOUR), {}, COLOUR),
    "gray": ("a.png", lambda: Image.fromarray(GRAY), {}, THREE),
    "gray with transparency": ("a.png", lambda: Image.fromarray(GRAY).convert("LA"), {}, THREE),
    "transparency": ("a.png", rgba, {}, COLOUR),
    "palette": ("a.png", palette, {}, COLOURS),
    "palette with transparency": ("a.png", lambda: palette(3), {}, COLOURS),
    "one bit": ("a.png", lambda: Image.fromarray(BITS[:, :, 0]).convert("1"), {}, BITS),
    "CMYK": ("a.tif", lambda: CMYK, {}, COLOUR),
    "EXIF, upside down": ("a.png", lambda: turned(3), exif(3), COLOUR),
    "EXIF, on its side": ("a.png", lambda: turned(6), exif(6), COLOUR),
    "GIF": ("a.gif", palette, {}, COLOURS),
    "WebP": ("a.webp", lambda: Image.fromarray(COLOUR), {"lossless": True}, COLOUR),
    "BMP": ("a.bmp", lambda: Image.fromarray(COLOUR), {}, COLOUR),
}


@pytest.mark.parametrize(("name", "image", "options", "pixels"), RULES.values(), ids=RULES)
@pytest.mark.parametrize("labels", [False, True], ids=["boxes", "label map"])
def test_pictures_of_8_bits(tmp_path, name, image, options, pixels, labels):
    """The same in detection and in semantic data, and for validation as for training."""
    image().save(tmp_path / name, **options)
    record = {"file_name": str(tmp_path / name), "height": HEIGHT, "width": WIDTH}
    if labels:
        Image.fromarray(GRAY).save(tmp_path / "label.png")
        record["sem_seg_file_name"] = str(tmp_path / "label.png")
    assert image_size(record["file_name"]) == (WIDTH, HEIGHT)
    for is_train in (True, False):
        sample = CheckedDatasetMapper(is_train, augmentations=[], image_format="RGB")(record)
        assert np.array_equal(sample["image"].permute(1, 2, 0).numpy(), pixels)
        if labels:
            assert np.array_equal(sample["sem_seg"].numpy(), GRAY)
    blue = CheckedDatasetMapper(False, augmentations=[], image_format="BGR")(record)["image"]
    assert np.array_equal(blue.permute(1, 2, 0).numpy(), pixels[:, :, ::-1])


DEEP = {
    "16-bit PNG": ("a.png", (1000 * RAMP).astype(np.uint16), 65535),
    "12-bit PNG": ("a.png", (120 * RAMP).astype(np.uint16), 4095),
    "16-bit TIFF": ("a.tif", (1000 * RAMP).astype(np.uint16), 65535),
    "16-bit TIFF, big-endian": ("a.tif", (1000 * RAMP).astype(">u2"), 65535),
    "32-bit TIFF": ("a.tif", (6 * 10**7 * RAMP).astype(np.int32), 2**31 - 1),
    "float TIFF": ("a.tif", (RAMP / 40).astype(np.float32), 1.0),
    "16-bit array": ("a.npy", (1000 * RAMP).astype(np.uint16), 65535),
    "float array": ("a.npy", RAMP / 40, 1.0),
}


@pytest.mark.parametrize(("name", "values", "most"), DEEP.values(), ids=DEEP)
@pytest.mark.parametrize("channels", [1, 3])
def test_more_than_8_bits_are_scaled_by_what_is_said(tmp_path, name, values, most, channels):
    path = str(tmp_path / name)
    if name.endswith("npy"):
        np.save(path, values)
    elif name.endswith("png"):
        Image.fromarray(values).save(path)
    else:
        tifffile.imwrite(path, values, byteorder=">" if values.dtype.str[0] == ">" else "<")
    assert image_size(path) == (WIDTH, HEIGHT)
    with pytest.raises(ImageError, match=f"image '{path}': its values are .* dataset.max_value"):
        read_image(path, channels)
    with pytest.raises(ImageError, match="must be from 0 to dataset.max_value"):
        read_image(path, channels, most / 10)
    pixels = read_image(path, channels, most)
    assert pixels.shape == (HEIGHT, WIDTH, channels)
    assert np.allclose(pixels, (values * (255 / most))[:, :, None], atol=1e-3)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("bands", [3, 4])
def test_colours_of_more_than_8_bits(tmp_path, suffix, bands):
    """Pillow would keep their high bytes alone."""
    values = np.stack([100 * RAMP + i for i in range(bands)], axis=2).astype(np.uint16)
    path = str(tmp_path / f"a.{suffix}")
    if suffix == "png":
        swapped = values[:, :, [2, 1, 0, 3][:bands]]  # OpenCV has blue first
        assert cv2.imwrite(path, swapped)
    else:
        tifffile.imwrite(path, values, photometric="rgb", planarconfig="contig")
    with pytest.raises(ImageError, match="its values are uint16, .* dataset.max_value"):
        read_image(path)
    assert np.allclose(read_image(path, 3, 4095), values[:, :, :3] * (255 / 4095), atol=1e-3)


def many(count):
    return np.stack([GRAY + np.uint8(3 * i) for i in range(count)], axis=2)


@pytest.mark.parametrize("channels", range(1, 14))
@pytest.mark.parametrize("kind", ["interleaved", "planes", "pages", "npy"])
def test_any_number_of_channels(tmp_path, channels, kind):
    pixels, path = many(channels), str(tmp_path / ("a.npy" if kind == "npy" else "a.tif"))
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    if kind == "npy":
        np.save(path, pixels)
    elif kind == "interleaved" or channels in (1, 3):
        photometric = "rgb" if channels == 3 else "minisblack"
        flat = pixels[:, :, 0] if channels == 1 else pixels
        contig = None if channels == 1 else "contig"
        tifffile.imwrite(path, flat, photometric=photometric, planarconfig=contig)
    elif kind == "planes":
        tifffile.imwrite(path, planes, photometric="minisblack", planarconfig="separate")
    else:
        tifffile.imwrite(path, planes, photometric="minisblack")
    assert np.array_equal(read_image(path, channels), pixels)
    if kind in ("interleaved", "npy"):  # a head alone cannot tell planes
        assert image_size(path) == (WIDTH, HEIGHT)
    with pytest.raises(DATA_ERRORS, match=f"image '{path}'"):
        read_image(path, channels + 20)
    mapper = CheckedDatasetMapper(True, augmentations=[], image_format="RGB", channels=channels)
    assert mapper({"file_name": path})["image"].shape == (channels, HEIGHT, WIDTH)


def png(width=WIDTH, height=HEIGHT, data=b""):
    def chunk(name, content):
        tail = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + tail

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def frames(suffix):
    file = io.BytesIO()
    all_frames = [Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)]
    all_frames[0].save(file, suffix, save_all=True, append_images=all_frames[1:])
    return file.getvalue()


def saved(suffix, **options):
    file = io.BytesIO()
    Image.fromarray(np.resize(COLOUR, (64, 64, 3))).save(file, suffix, **options)
    return file.getvalue()


def array(values, **options):
    file = io.BytesIO()
    np.save(file, values, **options)
    return file.getvalue()


HEAD = b"\x93NUMPY\x01\x00v\x00"
HUGE = HEAD + b"{'descr': '|u1', 'fortran_order': False, 'shape': (99999, 99999, 3), }".ljust(118)
BAD_FILES = {
    "empty": ("a.png", b""),
    "text": ("a.jpg", b"this is no picture"),
    "a web page": ("a.jpg", b"<!doctype html><html></html>"),
    "zeros": ("a.png", bytes(1000)),
    "PNG without pixels": ("a.png", png()),
    "PNG with wrong pixels": ("a.png", png(data=b"abc")),
    "PNG of too few pixels": ("a.png", png(data=zlib.compress(b"\0" * 9))),
    "bomb": ("a.png", png(60000, 60000)),
    "no width": ("a.png", png(0, 5)),
    "animated GIF": ("a.gif", frames("GIF")),
    "animated PNG": ("a.png", frames("PNG")),
    "animated WebP": ("a.webp", frames("WEBP")),
    "TIFF of two pages": ("a.tif", frames("TIFF")),
    "Python objects": ("a.npy", array(np.array([{}], object), allow_pickle=True)),
    "text array": ("a.npy", array(np.array([["a", "b"]]))),
    "boolean array": ("a.npy", array(np.ones((5, 7, 3), bool))),
    "complex array": ("a.npy", array(np.ones((5, 7, 3), complex))),
    "array of 4 dimensions": ("a.npy", array(np.ones((1, 5, 7, 3), np.uint8))),
    "array of nothing": ("a.npy", array(np.ones((0, 7, 3), np.uint8))),
    "array, channels first": ("a.npy", array(np.ones((3, 5, 7), np.uint8))),
    "array of NaN": ("a.npy", array(np.full((5, 7, 3), np.nan))),
    "negative array": ("a.npy", array(np.full((5, 7, 3), -1))),
    "array that is not all there": ("a.npy", HUGE),
    **{
        f"{suffix} cut after {keep} %": (
            f"a.{suffix.lower()}",
            (whole := saved(suffix))[: len(whole) * keep // 100],
        )
        for suffix in ("JPEG", "PNG", "BMP", "WEBP", "TIFF")
        for keep in (1, 30, 60)
    },
}


@pytest.mark.parametrize(("name", "content"), BAD_FILES.values(), ids=BAD_FILES)
def test_wrong_images_are_named(tmp_path, name, content, monkeypatch):
    """When one is met, and at the start if that is asked for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / name
    path.write_bytes(content)
    mapper = CheckedDatasetMapper(True, augmentations=[], image_format="RGB", max_value=255)
    with pytest.raises(DATA_ERRORS, match=f"image '{path}'") as error:
        mapper({"file_name": str(path)})
    assert "\n" not in str(error.value)
    Image.fromarray(COLOUR).save(tmp_path / "right.png")
    right = {"file_name": str(tmp_path / "right.png")}
    with pytest.raises(ValueError, match=rf"image '{path}'.* \(1 of 2 images are wrong\)$"):
        verify_images([right, {"file_name": str(path)}], mapper)


def test_images_are_verified_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    mapper = CheckedDatasetMapper(True, augmentations=[], image_format="RGB")
    for i in range(3):
        Image.fromarray(COLOUR).save(tmp_path / f"{i}.png")
    records = [
        {"file_name": str(tmp_path / f"{i}.png"), "width": WIDTH, "height": HEIGHT}
        for i in range(3)
    ]
    read = []
    monkeypatch.setattr(
        CheckedDatasetMapper, "read", lambda self, record: read.append(record["file_name"])
    )
    verify_images(records, mapper)
    assert sorted(read) == [r["file_name"] for r in records]
    assert "reading all images" in capsys.readouterr().err
    verify_images(records, mapper)
    assert len(read) == 3
    Image.fromarray(COLOUR).save(tmp_path / "1.png", compress_level=0)
    verify_images(records, mapper)
    assert read[3:] == [records[1]["file_name"]]
    (tmp_path / "cache" / "detbackbones" / "verified.json").write_text("{")
    verify_images(records, mapper)
    assert len(read) == 7


@pytest.fixture
def semantic(tmp_path):
    """Two images with label maps of the classes 0 and 1."""
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for i in (1, 2):
        Image.fromarray(COLOUR).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray((RAMP % 2).astype(np.uint8)).save(tmp_path / "labels" / f"{i}.png")
    return tmp_path


def label(values, mode="L", **options):
    def spoil(folder):
        image = Image.fromarray(np.resize(np.asarray(values), (HEIGHT, WIDTH)).astype(np.uint8))
        image.convert(mode).save(folder / "labels" / "1.png", **options)

    return spoil


def both(values):
    def spoil(folder):
        for i in (1, 2):
            image = np.resize(np.array(values, np.uint8), (HEIGHT, WIDTH))
            Image.fromarray(image).save(folder / "labels" / f"{i}.png")

    return spoil


def file(name, content):
    return lambda folder: (folder / name).write_bytes(content)


LABELS = {
    **{
        f"mode {mode}": (label([0, 1], mode), f"1.png': mode='{mode}' must be 'L'")
        for mode in ("1", "P", "LA", "RGB", "RGBA", "I;16")
    },
    "value 2": (label([0, 1, 2]), "1.png': values=2 must be from 0 to 1"),
    "value 254": (label([0, 254]), "1.png': values=254 must be from 0 to 1"),
    "many values": (label(range(2, 30)), "values=2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ... must be"),
    "0 and 255 alone": (both([0, 255]), "or 255, of which 255 is no class: the 2 classes must be"),
    "255 alone": (both([255]), "all pixels of all label maps are 255, and must have a class"),
    "another size": (
        lambda f: Image.new("L", (WIDTH, HEIGHT + 1)).save(f / "labels" / "1.png"),
        "1.png': size=7x6 must be 7x5, that of its image",
    ),
    "empty label": (file("labels/1.png", b""), "label map .*1.png' cannot be read"),
    "no PNG": (file("labels/1.png", b"abc"), "label map .*1.png' cannot be read"),
    "label bomb": (file("labels/1.png", png(60000, 60000)), "label map .*1.png' cannot be read"),
    "cut label": (file("labels/1.png", png(data=b"abc")), "label map .*1.png'"),
    "empty image": (file("images/1.png", b""), "image .*1.png' cannot be read"),
    "image bomb": (file("images/1.png", png(60000, 60000)), "image .*1.png' cannot be read"),
}


@pytest.mark.parametrize(("spoil", "message"), LABELS.values(), ids=LABELS)
def test_wrong_label_maps_are_refused(semantic, spoil, message):
    spoil(semantic)
    with pytest.raises(ValueError, match=message) as error:
        register_semantic(str(semantic / "images"), str(semantic / "labels"), 2)
    assert "\n" not in str(error.value)


def test_a_class_without_pixels_is_said(semantic, caplog):
    images, labels = str(semantic / "images"), str(semantic / "labels")
    register_semantic(images, labels, 2, ["cell", "nucleus"])
    assert not caplog.text
    register_semantic(images, labels, 4, ["cell", "nucleus", "wall", "debris"])
    assert "no pixel is of the classes 'wall', 'debris'" in caplog.text
    both([0, 255])(semantic)
    assert register_semantic(images, labels, 3, partial=True)  # a small validation set
    both([0, 1])(semantic)
    label([0, 255])(semantic)  # one of two: the other has class 1
    name = register_semantic(images, labels, 2)
    assert len(DatasetCatalog.get(name)) == 2


@pytest.mark.parametrize("name", ["semantic_fpn", "linear", "dpt", "fpn"])
def test_a_batch_without_labels_counts_nothing(name):
    folder = "finetune" if name == "semantic_fpn" else "probe"
    cfg = get_config(f"{folder}/{name}.py")
    cfg.dataset.num_classes = 3
    for backbone in (cfg.model.backbone.get("bottom_up"), cfg.model.backbone):
        if backbone and "pretrained" in backbone:
            backbone.pretrained = False
    model = instantiate(cfg.model).train()
    image = torch.rand(3, 64, 64)
    losses = model([{"image": image, "sem_seg": torch.full((64, 64), 255)}] * 2)
    assert {key: loss.item() for key, loss in losses.items()} == {"loss_sem_seg": 0}
    losses["loss_sem_seg"].backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert gradients and all(g is not None and not g.any() for g in gradients)
