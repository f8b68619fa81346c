"""What is exported gives what the model gives, at sizes that it was not made with, or refuses."""

import json
import os
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from detbackbones import Predictor, TimmBackbone, get_config
from detbackbones.cli import export as program
from detbackbones.deploy.agreement import Agreement
from detbackbones.deploy.export import export
from detbackbones.deploy.export_detector import export_detector
from detbackbones.deploy.exported import Exported
from detbackbones.deploy.graphs import make_graph
from detbackbones.training import train
from detectron2.config import instantiate
from PIL import Image
from support import TOOLS, load_tool, run_main
from torch import nn

onnx = pytest.importorskip("onnx")
for package in ("onnxruntime", "openvino", "nncf"):
    pytest.importorskip(package)

ANY, SIZES = ("batch", "height", "width"), ("height", "width")
DETRS = ("rt_detr", "dino")
FREE = {  # what each detector takes in any length, by tracing
    "faster_rcnn": SIZES,
    "mask_rcnn": SIZES,
    "retinanet": SIZES,
    "fcos": SIZES,
    "semantic_fpn": ANY,
    "rt_detr": ANY,
    "dino": ANY,
    "mask2former_instance": (),  # transformers makes constants of the sizes of its maps
    "mask2former_semantic": (),
}


def _model(name, **settings):
    """A small detector with random weights."""
    torch.manual_seed(0)
    cfg = get_config(f"finetune/{name}.py")
    cfg.dataset.update(num_classes=3, channels=3)
    part = cfg.model.get("roi_heads", cfg.model)
    if "num_classes" in part:
        part.num_classes = 3
    backbone = cfg.model.backbone.get("bottom_up", cfg.model.backbone)
    backbone.update(model_name="test_resnet", pretrained=False)
    if name in DETRS or "task" in cfg.model:
        cfg.model.num_queries = 20
    if "eomt" in name:
        backbone.update(model_name="test_vit", patch_size=None)
    if name in ("retinanet", "fcos"):  # which find nothing before they learn
        cfg.model.test_score_thresh = 0.0
    cfg.model.update(settings)
    model = instantiate(cfg.model).eval()
    if "eomt" in name:
        model.model.anneal(1.0)  # as a trained one is
    heads = []  # that give nearly the same everywhere before they learn
    if name == "dino":
        heads = [*model.detr.class_embed, *(box.layers[-1] for box in model.detr.bbox_embed)]
    elif name in ("retinanet", "fcos"):
        heads = [model.head.cls_score, model.head.bbox_pred]
    elif name in ("faster_rcnn", "mask_rcnn"):
        heads = [model.proposal_generator.rpn_head.objectness_logits]
        heads.append(model.roi_heads.box_predictor.cls_score)
    if name == "mask_rcnn":  # whose masks are at the threshold
        heads.append(model.roi_heads.mask_head.predictor)
    for head in heads:
        nn.init.normal_(head.weight, std=0.3)
    return model


def _images(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [255 * torch.rand(3, *size, generator=generator) for size in sizes]


def _agree(model, exported, image, name):
    """Compare by detectron2's protocol, boxes being given of an image of twice the size."""
    objects = "semantic" not in name
    scale = 1 if "mask2former" in name or "eomt" in name else 2
    height, width = scale * image.shape[1], scale * image.shape[2]
    inputs = [{"image": image, "height": height, "width": width}]
    with torch.no_grad():
        (wanted,), (found,) = model(inputs), exported.detect(inputs)
    if not objects:
        torch.testing.assert_close(found["sem_seg"], wanted["sem_seg"], rtol=1e-3, atol=1e-4)
        return
    agreement = Agreement()
    agreement.add(*(_arrays(x["instances"]) for x in (wanted, found)))
    assert agreement.agrees and agreement.objects > 1, str(agreement)
    assert found["instances"].image_size == (height, width)


def _arrays(instances):
    names = {"boxes": "pred_boxes", "scores": "scores", "classes": "pred_classes"}
    if instances.has("pred_masks"):
        names["masks"] = "pred_masks"
    values = {key: instances.get(name) for key, name in names.items()}
    return {key: getattr(x, "tensor", x).numpy() for key, x in values.items()}


@pytest.mark.parametrize(
    "name, format",
    [
        *((name, "onnx") for name in FREE),
        *((name, "openvino") for name in ("faster_rcnn", "dino")),
        *((name, "torchscript") for name in ("mask_rcnn", "rt_detr", "semantic_fpn")),
    ],
)
def test_detectors_are_exported_by_tracing(name, format, tmp_path):
    model = _model(name)
    # random R-CNNs find slivers at the edges of smaller ones, which rounding suppresses or not
    sizes = ((96, 128), (128, 96)) if "rcnn" in name else ((64, 96), (96, 80))
    report = export(model, tmp_path / "x", _images(*sizes), format=format)
    assert report.free == FREE[name], report.refused
    exported = Exported(tmp_path / "x")
    shape = exported.about["input"]["shape"]
    if "height" not in report.free:
        assert shape == [1, 3, 64, 96]
        _agree(model, exported, _images((64, 96))[0], name)
        with pytest.raises(ValueError, match=r"of shape \(1, 3, 96, 64\) must be \(1, 3, 64, 96\)"):
            exported(np.zeros((1, 3, 96, 64)))
        return
    assert shape == ["batch" if "batch" in report.free else 1, 3, "height", "width"]
    for image in _images((96, 64), (77, 131)):
        _agree(model, exported, image, name)


@pytest.mark.parametrize(
    "name, size",
    [
        ("rt_detr", (64, 96)),
        ("mask2former_semantic", (64, 96)),
        ("eomt_semantic", None),
        ("eomt_instance", None),
        ("semantic_fpn", None),
    ],
)
def test_detectors_are_exported_by_torch_export(name, size, tmp_path):
    model = _model(name)
    images = _images(size or (128, 192))
    report = export(model, tmp_path / "x", images, format="pt2", size=size)
    exported = Exported(tmp_path / "x")
    if size:
        assert not {*report.free} & {"height", "width"}
        _agree(model, exported, images[0], name)
        return
    assert report.free == (SIZES if "eomt" in name else ANY)
    for image in _images((192, 128), (160, 256)):
        _agree(model, exported, image, name)
    if "eomt" in name:
        return
    assert exported.about["resize"] == {"multiple": 32}
    assert exported.fit(*_images((150, 250))).shape == (3, 160, 256)


def test_eomt_is_onnx_of_any_size(tmp_path):
    """timm resamples position embeddings by what ONNX has by torch.export alone."""
    model = _model("eomt_instance")
    report = export(model, tmp_path / "x", _images((128, 192)), format="onnx")
    assert report.free == SIZES
    for image in _images((128, 192), (96, 160)):
        _agree(model, Exported(tmp_path / "x"), image, "eomt_instance")


def test_an_r_cnn_is_not_exported_by_torch_export(tmp_path):
    with pytest.raises(ValueError, match="the model cannot be exported to 'pt2': "):
        export(_model("faster_rcnn"), tmp_path / "x", _images((64, 96)), format="pt2")
    assert not (tmp_path / "x").exists()


def test_deformable_detr_is_traced_for_any_size():
    """Its encoder divides by the sizes of maps, which were constants."""
    graph = make_graph(_model("rt_detr", architecture="deformable_detr")).eval()
    for name, module in graph.model.detr.model.encoder.named_modules():
        if name.endswith("sampling_offsets"):
            nn.init.normal_(module.weight, std=0.3)
    maps = []
    graph.model.detr.model.encoder.register_forward_hook(lambda *x: maps.append(x[2][0]))
    (image,) = _images((64, 96))

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.graph = graph

        def forward(self, images):
            maps.clear()
            return (*self.graph(images), *maps)

    encoder = Encoder()
    with torch.no_grad():
        traced = torch.jit.trace(encoder, (image[None],), check_trace=False)
        for image in _images((64, 96), (96, 64), (128, 160)):
            *_, wanted = encoder(image[None])
            *_, found = traced(image[None])
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_a_fixed_size_is_the_only_one(tmp_path):
    model = _model("rt_detr")
    report = export(model, tmp_path / "x", _images((60, 96)), size=(64, 128))
    assert report.free == ("batch",)
    exported = Exported(tmp_path / "x")
    assert exported.about["input"]["shape"] == ["batch", 3, 64, 128]
    assert exported.about["resize"] == {"height": 64, "width": 128}
    _agree(model, exported, *_images((64, 128)), "rt_detr")
    assert exported.fit(_images((40, 50))[0]).shape == (3, 64, 128)
    with pytest.raises(ValueError, match=r"96\) must be \(batch, 3, 64, 128\)"):
        exported(np.zeros((1, 3, 64, 96)))
    with pytest.raises(Exception, match="(?i)invalid dimensions"):  # the file itself
        exported._run(np.zeros((1, 3, 64, 96), np.float32))


class _Forgetful(TimmBackbone):
    """Bakes the size of the image that it is traced with in, as a position embedding may."""

    def forward(self, x):
        return {name: level + int(x.shape[-2]) for name, level in super().forward(x).items()}


def test_what_depends_on_the_size_refuses_others(tmp_path):
    backbone = _Forgetful("test_resnet", pretrained=False)
    report = export(backbone, tmp_path / "x", _images((64, 96)))
    assert report.free == ("batch",)
    assert [*report.refused] == [
        "batch and height and width free, by tracing",
        "height and width free, by tracing",
    ]
    exported = Exported(tmp_path / "x")
    with pytest.raises(Exception, match="(?i)invalid dimensions"):
        exported._run(np.zeros((1, 3, 96, 96), np.float32))


@pytest.mark.parametrize("format", ["onnx", "pt2"])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "mobilenetv3_small_050"])
def test_backbones_are_exported(name, format, tmp_path):
    backbone = TimmBackbone(name, pretrained=False, norm="FrozenBN").eval()
    images = [x / 255 for x in _images(backbone.probe_size)]
    report = export(backbone, tmp_path / "x", images, format=format)
    exported = Exported(tmp_path / "x")
    found = exported(images[0][None].numpy())
    with torch.no_grad():
        wanted = backbone(images[0][None])
    assert [*found] == [*wanted] == [*exported.about["outputs"]]
    for key, value in wanted.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-3, atol=1e-4)
    assert "batch" in report.free
    if format == "onnx" and name != "test_vit":
        nodes = {node.op_type for node in onnx.load(tmp_path / "x" / "model.onnx").graph.node}
        assert "BatchNormalization" not in nodes and "Conv" in nodes


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"format": "tflite"}, ValueError, "format='tflite' is unknown: valid are 'onnx'"),
        ({"images": []}, ValueError, "must be some images"),
    ],
)
def test_wrong_arguments(options, error, match, tmp_path):
    backbone = TimmBackbone("test_resnet", pretrained=False)
    arguments = {"images": _images((64, 64))} | options
    with pytest.raises(error, match=match):
        export(backbone, tmp_path / "x", **arguments)
    assert not (tmp_path / "x").exists()


def test_files_are_not_replaced(tmp_path):
    backbone = TimmBackbone("test_resnet", pretrained=False)
    (tmp_path / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="must be a new or an empty folder"):
        export(backbone, tmp_path, _images((64, 64)))
    with pytest.raises(ValueError, match="a Linear cannot be exported: GeneralizedRCNN"):
        export(nn.Linear(1, 1), tmp_path / "x", _images((64, 64)))
    with pytest.raises(FileNotFoundError, match="must hold model.json, and there is none"):
        Exported(tmp_path)
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(ValueError, match="model.json is damaged"):
        Exported(tmp_path)


def test_a_torchscript_file_refuses_other_shapes_by_itself(tmp_path):
    model = _model("mask2former_semantic")
    export(model, tmp_path / "x", _images((64, 96)), format="torchscript")
    file = torch.jit.load(tmp_path / "x" / "model.ts")
    assert file(torch.zeros(1, 3, 64, 96))[0].shape == (1, 3, 64, 96)
    for shape in ((1, 3, 96, 64), (2, 3, 64, 96)):
        with pytest.raises(torch.jit.Error, match="invalid dimensions"):
            file(torch.zeros(shape))


def test_maps_have_no_padding(tmp_path):
    backbone = TimmBackbone("test_resnet", pretrained=False).eval()
    export(backbone, tmp_path / "x", _images((64, 96)))
    found = Exported(tmp_path / "x")(np.zeros((1, 3, 100, 141)))
    with torch.no_grad():
        wanted = backbone(torch.zeros(1, 3, 100, 141))
    assert {k: v.shape for k, v in found.items()} == {k: tuple(v.shape) for k, v in wanted.items()}


def test_a_model_that_finds_nothing_is_not_exported(tmp_path):
    model = _model("fcos", test_score_thresh=0.9999)
    with pytest.raises(ValueError, match="finds nothing in the images to try it with"):
        export(model, tmp_path / "x", _images((64, 96)))
    model = _model("faster_rcnn")
    model.roi_heads.keypoint_on = True
    with pytest.raises(ValueError, match="a GeneralizedRCNN with keypoints cannot be exported"):
        export(model, tmp_path / "x", _images((64, 96)))
    with pytest.raises(ValueError, match=r"size=\(100, 64\) must be multiples of \d+ in 'pt2'"):
        export(_model("rt_detr"), tmp_path / "x", _images((64, 96)), format="pt2", size=(100, 64))
    with pytest.raises(ValueError, match="size=0 must be a whole number"):
        export(_model("rt_detr"), tmp_path / "x", _images((64, 96)), size=(0, 64))
    assert not [*tmp_path.iterdir()]


def test_each_image_must_agree():
    one = {"boxes": np.float32([[0, 0, 9, 9]]), "scores": np.float32([0.9]), "classes": np.ones(1)}
    none = {key: value[:0] for key, value in one.items()}
    many = {key: np.repeat(value, 50, 0) for key, value in one.items()}
    for expected, found in ((one, none), (none, one), (one, many), (none, many)):
        agreement = Agreement()
        for _ in range(9):
            agreement.add(many, many)
        assert agreement.agrees
        agreement.add(expected, found)
        assert not agreement.agrees
    masks = np.zeros((1, 640, 640), bool)
    masks[0, 100:150, 100:150] = True
    agreement = Agreement()
    agreement.add(one | {"masks": masks}, one | {"masks": ~masks & np.roll(masks, 30, 1)})
    assert not agreement.agrees


def test_disagreement_is_seen():
    found = {
        "boxes": np.float32([[0, 0, 9, 9], [5, 5, 50, 50]]),
        "scores": np.float32([0.9, 0.8]),
        "classes": np.int64([0, 1]),
    }
    for key, change in (("boxes", 3), ("scores", 0.1), ("classes", 1)):
        other = {k: v + change if k == key else v for k, v in found.items()}
        agreement = Agreement()
        agreement.add(found, other)
        assert not agreement.agrees and agreement.lost == 2
    agreement = Agreement()
    agreement.add(found, {k: v[::-1] for k, v in found.items()})
    assert agreement.agrees and agreement.objects == 2 and not agreement.lost
    agreement = Agreement()
    agreement.add({"res2": np.ones(3)}, {"res2": np.float32([1, 1, np.nan])})
    assert not agreement.agrees


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run, its data and one of its images."""
    folder = tmp_path_factory.mktemp("export")
    data = folder / "data"
    load_tool("draw_shapes").draw(data, ("circle", "square"), train=8, val=4, size=64)
    cfg = get_config("finetune/faster_rcnn.py")
    cfg.dataset.update(train_sizes=[64], val_size=80)
    cfg.dataset.update({f"{split}_images": f"{data}/images/{split}" for split in ("train", "val")})
    cfg.dataset.update({f"{split}_json": f"{data}/{split}.json" for split in ("train", "val")})
    cfg.model.backbone.bottom_up.update(model_name="test_resnet", pretrained=False)
    cfg.dataloader.train.update(total_batch_size=2, num_workers=0)
    cfg.dataloader.test.num_workers = 0
    cfg.train.update(max_iter=4, pictures=0, output_dir=str(folder / "run"))
    train(cfg)
    return folder / "run", data, f"{data}/images/val/00001.jpg"


@pytest.mark.parametrize("format", ["onnx", "openvino", "torchscript"])
def test_a_run_from_the_command_line(run, format, tmp_path, capsys):
    folder, _, image = run
    output = tmp_path / "x"
    words = [str(folder), "--output", str(output), "--format", format, "--threshold", "0.05"]
    assert run_main(program, *words) == 0
    out = capsys.readouterr().out
    assert f"wrote {output}: {format}, of images 1 x 3 x height x width (any height" in out
    assert f"try it: python {output / 'example.py'} IMAGE" in out
    assert "boxes differ by at most" in out and "\nmodel\n" in out and "\nexported\n" in out
    about = json.loads((output / "model.json").read_text())
    assert about["classes"] == ["circle", "square"] and about["categories"] == [1, 2]
    assert about["resize"] == {"shorter_side": 80, "longer_side": 640}
    model, exported = (about["metrics"][key]["bbox"]["AP"] for key in ("model", "exported"))
    assert abs(model - exported) < 0.1
    # the example runs where neither this package nor detectron2 is, nor torch if it need not be
    hidden = ["detbackbones", "detectron2", *["torch"] * (format != "torchscript")]
    hide = f"import sys; sys.modules.update(dict.fromkeys({hidden}));"
    code = f"{hide} import runpy; sys.argv = ['example.py', {image!r}];"
    code += f"runpy.run_path({str(output / 'example.py')!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True
    )
    instances = Predictor(folder, score_threshold=0.05)(image)["instances"]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == len(instances) > 0
    boxes = np.float32([line[2:] for line in lines])
    np.testing.assert_allclose(boxes, instances.pred_boxes.tensor, atol=1)  # PIL resizes
    assert [line[0] for line in lines] == [about["classes"][i] for i in instances.pred_classes]


@pytest.mark.parametrize("name", ["mask_rcnn", "mask2former_instance"])
def test_the_example_gives_masks(name, tmp_path):
    """Those of the model, but for pixels at edges."""
    model = _model(name)
    photograph = Image.open(next(iter((TOOLS / "blood/images").iterdir()))).resize((96, 64))
    tensor = torch.from_numpy(np.array(photograph)).permute(2, 0, 1)
    about = {"score_threshold": 0.0, "classes": [f"c{i}" for i in range(10)]}
    export(model, tmp_path / "x", [tensor], about=about)
    objects = runpy.run_path(str(tmp_path / "x" / "example.py"))["detect"](photograph)
    with torch.no_grad():
        found = model([{"image": tensor, "height": 64, "width": 96}])[0]["instances"]
    assert len(objects) == len(found) > 0
    for x, box, mask in zip(objects, found.pred_boxes.tensor.numpy(), found.pred_masks.numpy()):
        np.testing.assert_allclose(x["box"], box, atol=0.1)
        assert x["mask"].shape == (64, 96)
        assert (x["mask"] != mask).sum() <= 2
    assert any(x["mask"].any() and not x["mask"].all() for x in objects)


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_int8(run, format, tmp_path, capsys):
    folder, data, _ = run
    sizes = {}
    for name, words in (("float", []), ("int8", ["--int8", f"{data}/images/train"])):
        words = [str(folder), "--output", str(tmp_path / name), "--format", format, *words]
        assert run_main(program, *words) == 0
        files = (tmp_path / name).glob("model.[!j]*")
        sizes[name] = sum(file.stat().st_size for file in files)
    assert sizes["int8"] < 0.4 * sizes["float"]
    assert "\nint8\n" in capsys.readouterr().out
    about = json.loads((tmp_path / "int8" / "model.json").read_text())
    assert "AP" in about["metrics"]["int8"]["bbox"]


def test_what_fails_leaves_nothing(run, tmp_path, monkeypatch):
    predictor = Predictor(run[0], device="cpu")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_text("no image")
    with pytest.raises(OSError, match="a.jpg' cannot be read"):
        export_detector(predictor, tmp_path / "x", int8=tmp_path / "bad")

    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("detbackbones.deploy.export_detector._metrics", stopped)
    with pytest.raises(KeyboardInterrupt):
        export_detector(predictor, tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize(
    "words, match",
    [
        (["test_resnett"], "'test_resnett' must be a run, a checkpoint or a model: the nearest"),
        (["test_resnet", "--int8", "x"], "--int8 is for a trained detector"),
        (["RUN", "--threshold", "2"], "--threshold=2.0 must be a number from 0 to 1"),
        (["RUN", "--int8", "none"], "int8='none' must be"),
        (["test_resnet", "--trust"], "--trust is for a trained detector"),
        (["test_resnet", "--size", "64"], "--size 64 must be HEIGHTxWIDTH in pixels"),
        (
            ["RUN", "--format", "pt2", "--int8", "x"],
            "format='pt2' is unknown: valid are 'onnx', 'openvino' for int8",
        ),
        (["RUN", "--int8", "none"], "must be the folder of the images"),
    ],
)
def test_wrong_words(run, words, match, tmp_path, capsys):
    words = [str(run[0]) if word == "RUN" else word for word in words]
    assert run_main(program, *words, "--output", tmp_path / "x") == 2
    assert match in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
