"""CocoEvaluator gives the numbers of detectron2's own COCOEvaluator, to the last digit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detbackbones.data import CocoEvaluator, register_coco
from detbackbones.training.errors import draw_errors
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools import mask as mask_util

CLASSES = {4: "cat", 9: "dog", 2: "hen"}  # there is no hen
WIDTH, HEIGHT = 60, 50


def blob(random):
    """A mask (H, W) with holes."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    y, x = random.integers(HEIGHT - 4), random.integers(WIDTH - 4)
    mask[y : y + random.integers(3, HEIGHT), x : x + random.integers(3, WIDTH)] = True
    return mask & (random.random(mask.shape) < 0.9)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A data set of crowds and others, and predictions with equal scores, some right."""
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("coco")
    images, annotations, batch = [], [], []
    for i in range(25):
        images.append({"id": i + 5, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT})
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / f"{i}.png")
        found = []
        for _ in range(random.integers(0, 8)):
            mask, kind = blob(random), int(random.choice([4, 9]))
            rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
            rle["counts"] = rle["counts"].decode()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 5,
                    "category_id": kind,
                    "bbox": mask_util.toBbox(rle).tolist(),
                    "area": float(mask.sum()),
                    "iscrowd": int(random.random() < 0.1),
                    "segmentation": rle,
                }
            )
            for _ in range(random.integers(0, 4)):
                moved = np.roll(mask, random.integers(0, 4), random.integers(0, 2))
                guess = [4, 9].index(kind) if random.random() < 0.8 else 0
                found.append((moved, guess, round(random.random(), 1)))
        instances = Instances((HEIGHT, WIDTH))
        masks = np.array([mask for mask, _, _ in found]).reshape(-1, HEIGHT, WIDTH)
        instances.pred_masks = torch.as_tensor(masks)
        corners = [
            mask_util.toBbox(mask_util.encode(np.asfortranarray(m, np.uint8))) for m in masks
        ]
        boxes = torch.tensor(np.array(corners).reshape(-1, 4), dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        instances.pred_boxes = Boxes(boxes)
        instances.scores = torch.tensor([score for _, _, score in found])
        instances.pred_classes = torch.tensor([guess for _, guess, _ in found], dtype=torch.long)
        batch.append(({"image_id": i + 5}, {"instances": instances}))
    categories = [{"id": key, "name": name} for key, name in CLASSES.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "a.json").write_text(json.dumps(content))
    name = register_coco(
        str(folder / "a.json"), str(folder), "bitmask", classes=["cat", "dog", "hen"]
    )
    return name, batch


def evaluate(evaluator, batch, **kwargs):
    evaluator.reset()
    for inputs, outputs in batch:
        evaluator.process([inputs], [outputs])
    return evaluator.evaluate(**kwargs)


@pytest.mark.parametrize("limit", [None, 12, 300])
@pytest.mark.parametrize("images", [None, [5, 7, 11, 12]])
def test_the_numbers_are_those_of_detectron2(case, limit, images):
    name, batch = case
    theirs = evaluate(COCOEvaluator(name, max_dets_per_image=limit), batch, img_ids=images)
    ours = evaluate(CocoEvaluator(name, limit), batch, img_ids=images)
    assert ours.keys() == theirs.keys() == {"bbox", "segm"}
    for task in ours:
        assert json.dumps(ours[task]) == json.dumps(theirs[task])
        assert 5 < ours[task]["AP"] < 95 and ours[task]["AP50"] > ours[task]["AP75"]
        assert ours[task]["AP-cat"] != ours[task]["AP-dog"]
        assert np.isnan(ours[task]["AP-hen"])


@pytest.mark.parametrize("limit", [3, [1, 2, 3]])
def test_few_detections(case, limit):
    """detectron2's has at least 10."""
    name, batch = case
    best = []
    for inputs, outputs in batch:
        found = outputs["instances"]
        order = found.scores.argsort(descending=True, stable=True)
        kept = [order[found.pred_classes[order] == kind][:3] for kind in range(3)]
        best.append((inputs, {"instances": found[torch.cat(kept).sort().values]}))
    expected = evaluate(COCOEvaluator(name), best)
    few = evaluate(CocoEvaluator(name, limit), batch)
    assert json.dumps(few) == json.dumps(expected)
    assert few["bbox"]["AP"] < evaluate(CocoEvaluator(name), batch)["bbox"]["AP"]


def test_where_nothing_is_found_there_is_no_number(case):
    name, _ = case
    nothing = Instances((HEIGHT, WIDTH))
    nothing.pred_boxes, nothing.scores = Boxes(torch.zeros(0, 4)), torch.zeros(0)
    nothing.pred_classes = torch.zeros(0, dtype=torch.long)
    evaluator = CocoEvaluator(name, tasks=("bbox", "segm"))
    results = evaluate(evaluator, [({"image_id": 5}, {"instances": nothing})])
    assert all(np.isnan(results[task]["AP"]) for task in ("bbox", "segm"))
    assert not evaluator.evaluations


def perfect(evaluator):
    """Predictions that are the ground truth, all of them certain."""
    batch = []
    for key, image in evaluator._coco_api.imgs.items():
        truth = [x for x in evaluator._coco_api.imgToAnns[key] if not x["iscrowd"]]
        found = Instances((image["height"], image["width"]))
        boxes = torch.tensor([x["bbox"] for x in truth]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        found.pred_boxes, found.scores = Boxes(boxes), torch.ones(len(truth))
        kinds = evaluator._metadata.thing_dataset_id_to_contiguous_id
        found.pred_classes = torch.tensor([kinds[x["category_id"]] for x in truth]).long()
        batch.append(({"image_id": key}, {"instances": found}))
    return batch


def test_the_hardest_images_are_those_with_most_errors(case):
    name, _ = case
    evaluator = CocoEvaluator(name, tasks=("bbox",))
    batch = perfect(evaluator)
    assert evaluate(evaluator, batch)["bbox"]["AP"] == pytest.approx(100)
    assert evaluator.hardest_images(3) == []
    many = [i for i, (_, outputs) in enumerate(batch) if len(outputs["instances"]) > 2]
    none, some = many[4], many[2]
    for i, kept in ((none, 0), (some, 1)):
        batch[i][1]["instances"] = batch[i][1]["instances"][:kept]
    evaluate(evaluator, batch)
    assert evaluator.hardest_images(3) == [batch[i][0]["image_id"] for i in (none, some)]
    assert evaluator.hardest_images(1) == [batch[none][0]["image_id"]]


def test_uncertain_detections_make_no_image_hard(case):
    """But an object that only they find is not found."""
    name, _ = case
    evaluator = CocoEvaluator(name, tasks=("bbox",))
    batch = perfect(evaluator)
    many = [i for i, (_, outputs) in enumerate(batch) if len(outputs["instances"]) > 2]
    noisy, missed = many[1], many[3]
    found = batch[noisy][1]["instances"]
    noise = Instances(found.image_size, **found[[0] * 50].get_fields())
    noise.scores = torch.full((50,), 0.01)
    batch[noisy][1]["instances"] = Instances.cat([found, noise])
    batch[missed][1]["instances"].scores[:2] = 0.1
    evaluate(evaluator, batch)
    assert evaluator.hardest_images(5) == [batch[missed][0]["image_id"]]


@pytest.mark.parametrize("change", ["license", "category id", "no masks", "text ids"])
def test_what_detectron2_takes_is_taken(case, tmp_path, change):
    """Entries that COCO has otherwise, and ids that are no numbers above 0."""
    data = json.loads(Path(MetadataCatalog.get(case[0]).json_file).read_text())
    batch = case[1]
    if change == "license":
        data["images"][0] |= {"license": "MIT", "date_captured": 2020}
        data["categories"][0] |= {"supercategory": 3}
    elif change == "category id":
        for entry in data["categories"]:
            entry["id"] -= 20
        for entry in data["annotations"]:
            entry["category_id"] -= 20
    elif change == "no masks":
        for entry in data["annotations"]:
            del entry["segmentation"]
    else:
        for section, key in (("images", "id"), ("annotations", "image_id")):
            for entry in data[section]:
                entry[key] = f"image {entry[key]:03}"
        batch = [({"image_id": f"image {x['image_id']:03}"}, y) for x, y in batch]
    (tmp_path / "a.json").write_text(json.dumps(data))
    ids = sorted(entry["id"] for entry in data["categories"])
    name = f"as detectron2 has it, {change}"
    MetadataCatalog.get(name).set(
        json_file=str(tmp_path / "a.json"),
        thing_classes=["cat", "dog", "hen"],
        thing_dataset_id_to_contiguous_id={k: i for i, k in enumerate(ids)},
    )
    theirs = evaluate(COCOEvaluator(name, tasks=("bbox",)), batch)
    assert json.dumps(evaluate(CocoEvaluator(name, tasks=("bbox",)), batch)) == json.dumps(theirs)
    assert theirs["bbox"]["AP"] > 5
    if change == "no masks":
        with pytest.raises(KeyError, match="segmentation"):
            evaluate(CocoEvaluator(name, tasks=("segm",)), batch)


def test_a_detection_that_is_no_number_is_said(case):
    name, _ = case
    evaluator = CocoEvaluator(name, tasks=("bbox",))
    batch = perfect(evaluator)
    next(y for _, y in batch if len(y["instances"]))["instances"].scores[0] = float("nan")
    with pytest.raises(FloatingPointError, match="the detections cannot be evaluated"):
        evaluate(evaluator, batch)


def test_errors_are_drawn(case, tmp_path):
    """A row for each task; a class that has no objects is in the matrix alone."""
    name, batch = case
    evaluator = CocoEvaluator(name)
    evaluate(evaluator, batch)
    picture = np.asarray(Image.open(draw_errors(evaluator.evaluations, tmp_path / "a.png")))
    assert picture.shape[:2] == (960, 1520)
    for row in np.split(picture[..., :3], 2):
        assert all((part != 255).mean() > 0.02 for part in np.array_split(row, 3, axis=1))
