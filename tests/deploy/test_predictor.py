"""A trained detector at work: without its data, on images of all kinds, from the program."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from detbackbones import Predictor, get_config
from detbackbones.cli import predict
from detbackbones.config import load_config
from detbackbones.data.coco import register_coco
from detbackbones.data.images import read_image
from detbackbones.deploy.predict import predict_files
from detbackbones.deploy.sources import list_sources
from detbackbones.training import evaluate, train
from detbackbones.training.build import build_model, load_trained
from detbackbones.training.record import _classes, fill_config, make_record, read_record
from detbackbones.training.run import check_config
from detbackbones.weights import read_checkpoint, write_checkpoint
from detectron2.config import instantiate
from PIL import Image
from support import load_tool, run_main
from torchvision.ops import box_iou

supervision = pytest.importorskip("supervision")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Circles and squares; it goes away when the runs are trained."""
    folder = tmp_path_factory.mktemp("deploy") / "data"
    load_tool("draw_shapes").draw(folder, ("circle", "square"), train=8, val=4, size=64)
    return folder


def _cfg(data, name, output, **dataset):
    cfg = get_config(f"finetune/{name}.py")
    cfg.dataset.update(train_sizes=[64], val_size=64, **dataset)
    cfg.dataset.update({f"{split}_images": f"{data}/images/{split}" for split in ("train", "val")})
    backbone = cfg.model.backbone.get("bottom_up", cfg.model.backbone)
    backbone.update(model_name="test_resnet", pretrained=False)
    cfg.dataloader.train.update(total_batch_size=2, num_workers=0)
    cfg.dataloader.test.num_workers = 0
    cfg.train.update(max_iter=2, pictures=0, log_period=1, output_dir=str(output))
    return cfg


def _objects(data, name, output):
    files = {f"{split}_json": f"{data}/{split}.json" for split in ("train", "val")}
    return _cfg(data, name, output, **files)


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Runs of some kinds, and for each what the model gives for an image by the config alone."""
    folder, expected = tmp_path_factory.mktemp("runs"), {}
    labels = {f"{split}_labels": f"{data}/labels/{split}" for split in ("train", "val")}
    configs = {
        "faster_rcnn": _objects(data, "faster_rcnn", folder / "faster_rcnn"),
        "mask_rcnn": _objects(data, "mask_rcnn", folder / "mask_rcnn"),
        "rt_detr": _objects(data, "rt_detr", folder / "rt_detr"),
        "semantic_fpn": _cfg(
            data, "semantic_fpn", folder / "semantic_fpn", num_classes=3, **labels
        ),
    }
    configs["rt_detr"].model.num_queries = 20
    image = f"{data}/images/val/00001.jpg"
    for name, cfg in configs.items():
        train(cfg)
        cfg = load_config(folder / name / "config.yaml")
        model = build_model(cfg, loads_all=True).eval()
        load_trained(cfg, model, str(folder / name / "model_final.pth"))
        with torch.no_grad():
            expected[name] = model([instantiate(cfg.dataloader.test.mapper)({"file_name": image})])
    kept = folder / "00001.jpg"
    shutil.copy(image, kept)
    shutil.rmtree(data)
    return folder, kept, expected


@pytest.mark.parametrize("name", ["faster_rcnn", "mask_rcnn", "rt_detr", "semantic_fpn"])
def test_a_run_needs_none_of_its_data(runs, name):
    folder, image, expected = runs
    predictor = Predictor(folder / name, score_threshold=0)
    (wanted,) = expected[name]
    found = predictor(image)
    assert predictor.gives_objects == (name != "semantic_fpn")
    if name == "semantic_fpn":
        assert torch.equal(found["sem_seg"], wanted["sem_seg"])
        assert predictor.classes == ["class_0", "class_1", "class_2"]
        return
    assert predictor.classes == ["circle", "square"]
    found, wanted = found["instances"], wanted["instances"]
    assert len(found) == len(wanted) > 0
    assert found.image_size == (64, 64)
    for key, value in wanted.get_fields().items():
        value = getattr(value, "tensor", value)
        assert torch.equal(getattr(found.get(key), "tensor", found.get(key)), value)


def test_an_image_comes_in_all_kinds(runs):
    folder, image, _ = runs
    predictor = Predictor(folder / "faster_rcnn" / "model_final.pth", score_threshold=0)
    pixels = read_image(str(image))
    kinds = [str(image), pixels, Image.open(image), torch.tensor(pixels).permute(2, 0, 1)]
    boxes = [predictor(kind)["instances"].pred_boxes.tensor for kind in kinds]
    assert len(boxes[0])
    for other in boxes[1:]:
        torch.testing.assert_close(other, boxes[0])
    gray = Image.open(image).convert("L")
    three = np.repeat(np.asarray(gray)[:, :, None], 3, axis=2)
    one, other = predictor([gray, three])  # a batch
    torch.testing.assert_close(
        one["instances"].pred_boxes.tensor, other["instances"].pred_boxes.tensor
    )
    assert predictor([]) == []
    with pytest.raises(ValueError, match="'https://a/b.jpg' must be a file: download it first"):
        predictor("https://a/b.jpg")
    with pytest.raises(FileNotFoundError, match="image='none.jpg' must be a file"):
        predictor("none.jpg")
    with pytest.raises(ValueError, match="image: its values are float32, from 0.0 to 1.0"):
        predictor(np.eye(9, dtype=np.float32))
    with pytest.raises(ValueError, match=r"shape=\(9, 9, 5\) must be \(height, width, 3\)"):
        predictor(np.zeros((9, 9, 5), np.uint8))
    with pytest.raises(ValueError, match="image of int must be a path"):
        predictor(3)


def test_thresholds_and_supervision(runs):
    folder, image, _ = runs
    every = Predictor(folder / "mask_rcnn", score_threshold=0)
    scores = every(image)["instances"].scores
    middle = scores.median().item()
    best = Predictor(folder / "mask_rcnn", score_threshold=middle)
    assert len(best(image)["instances"]) == (scores >= middle).sum() < len(scores)
    found = every.detections(image)
    assert isinstance(found, supervision.Detections) and len(found) == len(scores)
    names = np.array(["circle", "square"])
    assert (found.data["class_name"] == names[found.class_id]).all()
    assert found.mask.shape == (len(scores), 64, 64)
    alone = Predictor(folder / "mask_rcnn", score_threshold=0, nms_threshold=0.1)
    kept = alone(image)["instances"]
    assert 0 < len(kept) < len(scores)
    for label in (0, 1):
        boxes = kept.pred_boxes.tensor[kept.pred_classes == label]
        assert box_iou(boxes, boxes).fill_diagonal_(0).max() <= 0.1
    for value in (1.5, True):
        with pytest.raises(ValueError, match=f"score_threshold={value} must be a number from 0"):
            Predictor(folder / "mask_rcnn", score_threshold=value)


def test_the_best_checkpoint_is_taken(runs, tmp_path):
    folder, _, _ = runs
    assert Predictor(folder / "rt_detr").checkpoint.endswith("model_best.pth")
    for name in ("model_final.pth", "last_checkpoint"):
        shutil.copy(folder / "rt_detr" / name, tmp_path)
    assert Predictor(tmp_path).checkpoint.endswith("model_final.pth")
    with pytest.raises(FileNotFoundError, match="must be the folder of a training or a checkpoint"):
        Predictor(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="must hold a checkpoint"):
        Predictor(tmp_path / "empty")


def _altered(folder, tmp_path, alter):
    """A checkpoint whose record is another."""
    content = read_checkpoint(str(folder / "faster_rcnn" / "model_final.pth"))
    alter(content["detector"])
    file = str(tmp_path / "model.pth")
    write_checkpoint(content, file)
    return file


def test_what_a_checkpoint_would_call_is_known(runs, tmp_path):
    folder, _, _ = runs
    call = {"_target_": "os.system", "command": "id"}
    file = _altered(folder, tmp_path, lambda r: r["model"].update(proposal_generator=call))
    with pytest.raises(ValueError, match="model.proposal_generator._target_='os.system' calls"):
        Predictor(file)
    named = {"${${a}:${b}}": 1}
    file = _altered(folder, tmp_path, lambda r: r["model"].update(proposal_generator=named))
    with pytest.raises(ValueError, match="calls a resolver of OmegaConf"):
        Predictor(file)
    file = _altered(folder, tmp_path, lambda r: r["model"].update(vis_period="${pixel_mean}"))
    with pytest.raises(ValueError, match="detector must have no interpolations"):
        Predictor(file)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "_target_: os.system\ncommand: id"},
        {"mapper": "_target_: os.system\ncommand: id"},
        {"thing_classes": {"_target_": "os.system", "command": "id"}},
        {"thing_classes": [{"_target_": "os.system", "command": "id"}]},
        {"categories": ["a", None]},
        {"versions": None},
    ],
)
def test_what_has_another_form_is_no_record(runs, tmp_path, change):
    file = _altered(runs[0], tmp_path, lambda record: record.update(change))
    assert read_record(file, trust=True) is None
    with pytest.raises(FileNotFoundError, match="holds no config, and there is no config.yaml"):
        Predictor(file)


def test_an_evaluation_calls_nothing_of_a_checkpoint(runs, tmp_path):
    folder, _, _ = runs
    call = {"_target_": "os.system", "command": "id"}

    def alter(record):
        record["model"].update(pixel_mean=[call, 0, 0])
        record["model"]["roi_heads"].update(num_classes=call)

    record = read_record(_altered(folder, tmp_path, alter), trust=True)
    cfg = load_config(folder / "faster_rcnn" / "config.yaml")
    fill_config(cfg, record)
    assert "os.system" not in str(cfg)
    assert cfg.model.pixel_std == record["model"]["pixel_std"]
    assert cfg.dataloader.test.dataset.names.like == ["circle", "square"]


def test_deep_images_are_scaled_once(runs, tmp_path):
    folder, image, _ = runs
    plain = Predictor(folder / "faster_rcnn" / "model_final.pth", score_threshold=0)
    file = _altered(folder, tmp_path, lambda record: record["mapper"].update(max_value=65535.0))
    deep = Predictor(file, score_threshold=0)
    pixels = read_image(str(image))[:, :, 0]
    Image.fromarray(pixels).save(tmp_path / "plain.png")
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    boxes = plain(tmp_path / "plain.png")["instances"].pred_boxes.tensor
    for one in (tmp_path / "deep.png", Image.open(tmp_path / "deep.png")):
        found = deep(one)["instances"].pred_boxes.tensor
        torch.testing.assert_close(found, boxes, rtol=1e-3, atol=1e-2)
    files = []
    for predictor, name in ((plain, "plain"), (deep, "deep")):
        sources = list_sources([str(tmp_path / f"{name}.png")])
        assert predict_files(predictor, sources, tmp_path / name, save=["coco"]) == []
        files.append(json.loads((tmp_path / name / "coco.json").read_text())["annotations"])
    assert len(files[0]) == len(files[1]) > 0
    for one, other in zip(*files):
        assert one["bbox"] == pytest.approx(other["bbox"], rel=1e-3, abs=1e-2)


def test_ids_are_those_of_the_users_file(tiny):
    files = f"{tiny}/train.json", f"{tiny}/images/train"
    names = register_coco(*files, classes=["square", "circle"])
    content = json.loads((tiny / "train.json").read_text())
    ids = {category["name"]: category["id"] for category in content["categories"]}
    assert _classes(names) == {
        "thing_classes": ["square", "circle"],
        "stuff_classes": [],
        "categories": [ids["square"], ids["circle"]],
    }


def test_a_config_with_other_values_trains_without_a_record(runs, data, tmp_path, caplog):
    load_tool("draw_shapes").draw(data, ("circle", "square"), train=8, val=4, size=64)
    try:
        cfg = _objects(data, "faster_rcnn", tmp_path)
        cfg.model.roi_heads.box_head.conv_norm = torch.nn.Identity
        with pytest.raises(ValueError, match="the config must have plain values alone: .*type"):
            make_record(check_config(cfg))
        del cfg.dataloader.test["mapper"]
        with pytest.raises(ValueError, match="must have dataloader.train.dataset.names and"):
            make_record(cfg)
    finally:
        shutil.rmtree(data)


def test_nothing_found_is_written_too(runs, tmp_path):
    folder, image, _ = runs
    words = [folder / "mask_rcnn", image, "--output", tmp_path / "found", "--threshold", 1]
    assert run_main(predict, *words, "--save", "pictures", "coco", "csv", "yolo") == 0
    assert json.loads((tmp_path / "found/coco.json").read_text())["annotations"] == []
    assert (tmp_path / "found/yolo/00001.txt").read_text() == ""
    assert len((tmp_path / "found/boxes.csv").read_text().splitlines()) == 1


def test_an_older_checkpoint_needs_its_config_and_data(runs, data, tmp_path):
    folder, image, _ = runs
    content = read_checkpoint(str(folder / "faster_rcnn" / "model_final.pth"))
    del content["detector"]
    write_checkpoint(content, str(tmp_path / "model_final.pth"))
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    with pytest.raises(FileNotFoundError, match="holds no config"):
        Predictor(tmp_path)
    config = folder / "faster_rcnn" / "config.yaml"
    with pytest.raises(FileNotFoundError, match="dataset.train_json=.*train.json"):
        Predictor(tmp_path, config=config)
    load_tool("draw_shapes").draw(data, ("circle", "square"), train=8, val=4, size=64)
    try:
        older = Predictor(tmp_path, config=config, score_threshold=0)
        newer = Predictor(folder / "faster_rcnn" / "model_final.pth", score_threshold=0)
        a, b = (p(image)["instances"].scores for p in (older, newer))
        assert torch.equal(a, b)
    finally:
        shutil.rmtree(data)


def test_another_file_is_evaluated_without_that_of_the_training(runs, tmp_path):
    folder, _, _ = runs
    load_tool("draw_shapes").draw(tmp_path, ("square", "circle"), train=8, val=4, size=64)
    cfg = load_config(folder / "faster_rcnn" / "config.yaml")
    cfg.dataset.update(val_json=f"{tmp_path}/val.json", val_images=f"{tmp_path}/images/val")
    cfg.model.roi_heads.box_predictor.test_score_thresh = 0.0
    metrics = evaluate(cfg)["bbox"]
    assert {"AP-circle", "AP-square"} <= set(metrics)
    (tmp_path / "val.json").write_text((tmp_path / "val.json").read_text().replace("square", "ant"))
    with pytest.raises(ValueError, match="name='ant' must be a class of the training data"):
        evaluate(cfg)


def test_images_are_predicted_by_the_program(runs, tmp_path, capsys):
    folder, image, _ = runs
    images = tmp_path / "images"
    images.mkdir()
    shutil.copy(image, images / "a.jpg")
    Image.open(image).resize((96, 80)).save(images / "b.png")
    (images / "broken.jpg").write_bytes(image.read_bytes()[:500])
    words = [folder / "mask_rcnn", images, "--output", tmp_path / "found", "--threshold", 0.1]
    words += ["--batch", 2, "--save", "pictures", "coco", "csv", "yolo"]
    assert run_main(predict, *words) == 1
    said = capsys.readouterr().err
    assert "broken.jpg' cannot be read" in said
    content = json.loads((tmp_path / "found" / "coco.json").read_text())
    assert [x["file_name"] for x in content["images"]] == ["a.jpg", "b.png"]
    assert [x["name"] for x in content["categories"]] == ["circle", "square"]
    of_b = [x for x in content["annotations"] if x["image_id"] == 2]
    assert of_b and all(x["segmentation"]["size"] == [80, 96] for x in of_b)
    with open(tmp_path / "found" / "boxes.csv", newline="") as file:
        rows = [*csv.DictReader(file)]
    assert len(rows) == len(content["annotations"])
    first, x = rows[0], content["annotations"][0]
    assert float(first["x_max"]) == pytest.approx(x["bbox"][0] + x["bbox"][2], abs=1e-3)
    assert (first["file_name"], first["class_name"]) == (
        "a.jpg",
        "circle" if x["category_id"] == content["categories"][0]["id"] else "square",
    )
    lines = (tmp_path / "found" / "yolo" / "b.txt").read_text().splitlines()
    places = np.array([[*map(float, line.split()[1:-1])] for line in lines[:1]])
    assert (places >= 0).all() and (places <= 1).all()
    assert Image.open(tmp_path / "found" / "pictures" / "b.jpg").size == (96, 80)
    assert run_main(predict, *words) == 2
    assert "must be a new or an empty folder" in capsys.readouterr().err


def test_boxes_become_lines_of_yolo(runs, tmp_path):
    folder, image, _ = runs
    words = [folder / "faster_rcnn", image, "--output", tmp_path / "found", "--threshold", 0.1]
    assert run_main(predict, *words, "--save", "yolo", "coco") == 0
    content = json.loads((tmp_path / "found" / "coco.json").read_text())
    lines = (tmp_path / "found" / "yolo" / "00001.txt").read_text().splitlines()
    assert len(lines) == len(content["annotations"]) > 0
    for line, x in zip(lines, content["annotations"]):
        left, top, width, height = np.array(x["bbox"]) / 64
        wanted = [left + width / 2, top + height / 2, width, height, x["score"]]
        assert [*map(float, line.split()[1:])] == pytest.approx(wanted, abs=1e-5)


def test_maps_are_written(runs, tmp_path, capsys):
    folder, image, expected = runs
    words = [folder / "semantic_fpn", image, "--output", tmp_path / "found"]
    assert run_main(predict, *words, "--save", "maps", "pictures") == 0
    labels = np.asarray(Image.open(tmp_path / "found" / "maps" / "00001.png"))
    assert (labels == expected["semantic_fpn"][0]["sem_seg"].argmax(0).numpy()).all()
    assert run_main(predict, *words[:2], "--output", tmp_path / "x", "--save", "coco") == 2
    assert "save='coco' is unknown: valid are 'pictures', 'maps'" in capsys.readouterr().err


def test_tiles_of_a_large_image_move_to_their_places(runs):
    folder, image, _ = runs
    best = Predictor(folder / "mask_rcnn", score_threshold=0)(image)["instances"].scores.max()
    predictor = Predictor(folder / "mask_rcnn", score_threshold=best.item() - 1e-6)
    pixels = read_image(str(image))
    one = predictor.detections(pixels)
    assert len(one) == 1
    found = predictor.tiled(np.tile(pixels, (2, 3, 1)), 64, overlap=0)
    found = found[np.lexsort((found.xyxy[:, 0], found.xyxy[:, 1]))]
    places = [np.array([64 * j, 64 * i] * 2) for i in range(2) for j in range(3)]
    assert found.xyxy == pytest.approx(np.concatenate([one.xyxy + x for x in places]), abs=1e-3)
    for mask, (left, top, *_) in zip(found.mask, places):
        assert mask.shape == (128, 192) and mask.sum() == one.mask.sum() > 0
        assert (mask[top : top + 64, left : left + 64] == one.mask[0]).all()
    with pytest.raises(ValueError, match="tile=0 must be a whole number from 1"):
        predictor.tiled(pixels, 0)


def test_a_video_becomes_a_video(runs, tmp_path, capsys):
    folder, image, _ = runs
    pixels = read_image(str(image))
    video = tmp_path / "film.mp4"
    info = supervision.VideoInfo(width=64, height=64, fps=10)
    with supervision.VideoSink(str(video), info) as sink:
        for _ in range(6):
            sink.write_frame(np.ascontiguousarray(pixels[:, :, ::-1]))
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    words = [folder / "faster_rcnn", video, tmp_path / "broken.mp4", "--output", tmp_path / "found"]
    words += ["--every", 2, "--batch", 2, "--threshold", 0.1, "--save", "pictures", "coco"]
    assert run_main(predict, *words) == 1
    assert "broken.mp4' cannot be read" in capsys.readouterr().err
    made = supervision.VideoInfo.from_video_path(str(tmp_path / "found" / "film.mp4"))
    assert (made.width, made.height, made.fps, made.total_frames) == (64, 64, 5, 3)
    content = json.loads((tmp_path / "found" / "coco.json").read_text())
    names = [x["file_name"] for x in content["images"]]
    assert names == ["film_000000", "film_000002", "film_000004"]


def test_files_of_one_name_are_refused(runs, tmp_path, capsys):
    folder, image, _ = runs
    for name in "ab":
        (tmp_path / name).mkdir()
        shutil.copy(image, tmp_path / name / "x.jpg")
    words = [folder / "faster_rcnn", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "found"]
    assert run_main(predict, *words) == 2
    assert "images must have different names" in capsys.readouterr().err


def test_classes_are_chosen(runs, tmp_path, capsys):
    folder, image, _ = runs
    every = Predictor(folder / "faster_rcnn", score_threshold=0)(image)["instances"]
    squares = Predictor(folder / "faster_rcnn", score_threshold=0, classes=["square"])
    found = squares(image)["instances"]
    assert set(found.pred_classes.tolist()) == {1}
    assert 0 < len(found) == (every.pred_classes == 1).sum() < len(every)
    with pytest.raises(ValueError, match="classes='sqare' is unknown: valid are 'circle', 'squ"):
        Predictor(folder / "faster_rcnn", classes=["sqare"])
    with pytest.raises(ValueError, match="must be left out for a model of label maps"):
        Predictor(folder / "semantic_fpn", classes=["class_0"])
    words = [folder / "faster_rcnn", image, "--output", tmp_path / "found", "--threshold", 0]
    assert run_main(predict, *words, "--save", "csv", "--classes", "square") == 0
    rows = [*csv.DictReader((tmp_path / "found/boxes.csv").open(newline=""))]
    assert {row["class_name"] for row in rows} == {"square"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--threshold", 2], "--threshold=2.0 must be a number from 0 to 1"),
        (["--nms", -1], "--nms=-1.0 must be a number from 0 to 1"),
        (["--batch", 0], "--batch=0 must be a whole number from 1"),
        (["--every", 0], "--every=0 must be a whole number from 1"),
        (["--tile", 0], "tile=0 must be a whole number from 1"),
        (["--tile", 9, "--overlap", 1], "overlap=1.0 must be a fraction, from 0 to below 1"),
        (["--device", "gpu"], "device='gpu' is unknown: valid are 'auto', 'cpu'"),
    ],
)
def test_a_wrong_argument_is_named(runs, tmp_path, capsys, words, said):
    folder, image, _ = runs
    every = [folder / "faster_rcnn", image, "--output", tmp_path / "found", *words]
    assert run_main(predict, *every) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "found").exists()


@pytest.mark.parametrize("name", ["mask_rcnn", "rt_detr"])
def test_views_of_an_image_are_merged(runs, name):
    folder, image, _ = runs
    predictor = Predictor(folder / name, score_threshold=0)
    pixels = read_image(str(image))
    mirror = np.ascontiguousarray(pixels[:, ::-1])
    once = predictor(pixels)["instances"]
    alone = predictor.augmented(pixels, scales=[1], flip=False)["instances"]
    assert 0 < len(alone) <= len(once)
    # by what the views are of: a mirrored image has the mirrored objects
    ones, others = (predictor.augmented(x, scales=[1])["instances"] for x in (pixels, mirror))
    assert len(ones) == len(others)
    width = pixels.shape[1]
    boxes = others.pred_boxes.tensor[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1])
    boxes += torch.tensor([width, 0, width, 0])
    order, same = (torch.argsort(x.scores, stable=True) for x in (ones, others))
    torch.testing.assert_close(ones.scores[order], others.scores[same])
    near = (ones.pred_boxes.tensor[:, None] - boxes[None]).abs().amax(2)
    assert near.min(1).values.max() < 1e-3
    if name == "mask_rcnn":
        best = near.argmin(1)
        assert torch.equal(ones.pred_masks, others.pred_masks[best].flip(-1))
    for label in (0, 1):
        boxes = ones.pred_boxes.tensor[ones.pred_classes == label]
        assert box_iou(boxes, boxes).fill_diagonal_(0).max() <= 0.5
    many = predictor.augmented(pixels, scales=[0.5, 2])["instances"]
    assert len(many) and many.image_size == pixels.shape[:2]
    assert not torch.equal(many.scores[:3], ones.scores[:3])


def test_what_cannot_be_augmented_is_said(runs, tmp_path, capsys):
    folder, image, _ = runs
    words = [image, "--output", tmp_path / "found", "--augment"]
    assert run_main(predict, folder / "semantic_fpn", *words) == 2
    assert (
        "augment=[1.0] must be left out for a model that gives label maps"
        in capsys.readouterr().err
    )
    assert run_main(predict, folder / "faster_rcnn", *words, "--tile", 64) == 2
    assert "augment=[1.0] must stand without tile=64" in capsys.readouterr().err
    assert run_main(predict, folder / "faster_rcnn", *words, 1, -1) == 2
    assert "augment=-1.0 must be a number above 0" in capsys.readouterr().err
    words += [1, 1.5, "--threshold", 0, "--save", "csv"]
    assert run_main(predict, folder / "faster_rcnn", *words) == 0
    rows = [*csv.DictReader((tmp_path / "found/boxes.csv").open(newline=""))]
    predictor = Predictor(folder / "faster_rcnn", score_threshold=0)
    found = predictor.augmented(image, [1, 1.5])["instances"]
    assert len(rows) == len(found) > 0
