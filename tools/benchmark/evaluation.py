"""How long COCO's metrics take, by this package and by detectron2's own evaluator.

    python tools/benchmark/evaluation.py --images 5000 --detections 100

The ground truth is random: 80 classes, 7 objects an image in the mean, as in COCO. A third of the
detections are near one of them. Both evaluators get the same, and must give the same numbers.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from detbackbones.data import CocoEvaluator
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from tabulate import tabulate

CLASSES, OBJECTS = 80, 7
WIDTH, HEIGHT = 640, 480


def boxes(random: np.random.Generator, count: int) -> np.ndarray:
    """Boxes (n, 4) as x, y, w, h."""
    corners = random.uniform(0, [WIDTH * 0.8, HEIGHT * 0.8], (count, 2))
    sizes = random.lognormal(3.8, 0.9, (count, 2)).clip(3, [WIDTH, HEIGHT])
    return np.hstack([corners, np.minimum(sizes, [WIDTH, HEIGHT] - corners)])


def draw(num_images: int, num_detections: int) -> tuple[dict, list[Instances]]:
    """Ground truth in COCO's format, and what was detected in each image."""
    random, images, annotations, detected = np.random.default_rng(0), [], [], []
    for i in range(1, num_images + 1):
        images.append({"id": i, "width": WIDTH, "height": HEIGHT, "file_name": f"{i}.jpg"})
        truth = boxes(random, random.poisson(OBJECTS))
        kinds = random.integers(CLASSES, size=len(truth))
        for box, kind in zip(truth, kinds):
            entry = {"id": len(annotations) + 1, "image_id": i, "category_id": int(kind) + 1}
            entry |= {"bbox": box.tolist(), "area": float(box[2] * box[3]), "iscrowd": 0}
            annotations.append(entry)
        found = boxes(random, num_detections)
        guesses = random.integers(CLASSES, size=num_detections)
        near = np.flatnonzero(random.random(num_detections) < len(truth) / 20)
        if len(near):
            which = random.integers(len(truth), size=len(near))
            found[near] = truth[which] * random.normal(1, 0.05, (len(near), 4))
            guesses[near] = kinds[which]
        found[:, 2:] += found[:, :2]
        instances = Instances((HEIGHT, WIDTH))
        instances.pred_boxes = Boxes(torch.as_tensor(found, dtype=torch.float32))
        instances.scores = torch.as_tensor(random.random(num_detections), dtype=torch.float32)
        instances.pred_classes = torch.as_tensor(guesses)
        detected.append(instances)
    categories = [{"id": i + 1, "name": str(i)} for i in range(CLASSES)]
    return {"images": images, "annotations": annotations, "categories": categories}, detected


def measure(evaluator: COCOEvaluator, detected: list[Instances]) -> tuple[list[float], dict]:
    """Seconds to take the detections and to evaluate, and the metrics."""
    evaluator.reset()
    start = time.perf_counter()
    for i, instances in enumerate(detected, 1):
        evaluator.process([{"image_id": i}], [{"instances": instances}])
    middle = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        metrics = evaluator.evaluate()["bbox"]
    return [middle - start, time.perf_counter() - middle], metrics


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000, help="default: %(default)s")
    parser.add_argument("--detections", type=int, default=100, help="default: %(default)s")
    args = parser.parse_args()
    truth, detected = draw(args.images, args.detections)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "truth.json")
        file.write_text(json.dumps(truth))
        MetadataCatalog.get("random").set(
            json_file=str(file), thing_classes=[x["name"] for x in truth["categories"]]
        )
        MetadataCatalog.get("random").set(
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(CLASSES)}
        )
        rows, numbers = [], []
        for evaluator in (COCOEvaluator, CocoEvaluator):
            seconds, metrics = measure(evaluator("random"), detected)
            name = f"{evaluator.__module__.partition('.')[0]}.{evaluator.__name__}"
            rows.append([name, *seconds, metrics["AP"]])
            numbers.append(json.dumps(metrics))
    if numbers[0] != numbers[1]:
        raise SystemExit("the two evaluators differ")
    headers = ["evaluator", "taking detections, s", "evaluating, s", "AP"]
    print(tabulate(rows, headers, "github", floatfmt=".2f"))
    print(f"evaluating: {rows[0][2] / rows[1][2]:.1f} times as fast, all numbers equal")


if __name__ == "__main__":
    main()
