"""Panoptic quality: worked examples, the same by brute force, and its evaluator."""

import itertools
import json

import numpy as np
import pytest
import torch
from detbackbones.data import PanopticEvaluator
from detectron2.data import MetadataCatalog
from PIL import Image

THINGS, STUFF = {17: 0, 18: 1}, {119: 3}
CONTIGUOUS = {
    **{k: (True, v) for k, v in THINGS.items()},
    **{k: (False, v) for k, v in STUFF.items()},
}


def row(*parts):
    """A map of one row: (number, how many pixels)."""
    return np.array([[i for i, count in parts for _ in range(count)]])


def colours(ids):
    return Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 256**2], 2).astype("u1"))


def register(folder, annotations):
    (folder / "p.json").write_text(json.dumps({"annotations": annotations}))
    MetadataCatalog.get("panoptic_example").set(
        panoptic_json=str(folder / "p.json"),
        panoptic_root=str(folder),
        thing_dataset_id_to_contiguous_id=THINGS,
        stuff_dataset_id_to_contiguous_id=STUFF,
    )


@pytest.fixture
def quality(tmp_path):
    """What the evaluator says of one image: maps, and the class of each number in them."""

    def evaluate(truth, classes, found, found_classes, crowd=()):
        colours(truth).save(tmp_path / "a.png")
        segments = [
            {"id": i, "category_id": c, "iscrowd": int(i in crowd)} for i, c in classes.items()
        ]
        register(tmp_path, [{"image_id": "a", "file_name": "a.png", "segments_info": segments}])
        evaluator = PanopticEvaluator("panoptic_example")
        evaluator.reset()
        infos = [
            {"id": i, "isthing": CONTIGUOUS[c][0], "category_id": CONTIGUOUS[c][1]}
            for i, c in found_classes.items()
        ]
        evaluator.process([{"image_id": "a"}], [{"panoptic_seg": (torch.tensor(found), infos)}])
        return {k: v / 100 for k, v in evaluator.evaluate()["panoptic_seg"].items()}

    yield evaluate
    MetadataCatalog.remove("panoptic_example")


def test_a_perfect_map(quality):
    truth = row((1, 4), (2, 6))
    metrics = quality(truth, {1: 17, 2: 18}, truth, {1: 17, 2: 18})
    assert metrics["PQ"] == metrics["SQ"] == metrics["RQ"] == metrics["PQ_th"] == 1
    assert np.isnan(metrics["PQ_st"])


def test_one_is_found_one_is_missed_one_is_not_there(quality):
    """IoU 6 / 10 of the first; PQ = 0.6 / (1 + 1/2 + 1/2)."""
    truth = row((1, 8), (2, 4), (9, 8))
    found = row((1, 6), (3, 2), (4, 4), (1, 2), (9, 6))
    metrics = quality(truth, {1: 17, 2: 17, 9: 119}, found, {1: 17, 3: 119, 4: 119, 9: 119})
    assert metrics["PQ_th"] == pytest.approx(0.6 / 1.5)
    assert (metrics["SQ_th"], metrics["RQ_th"]) == pytest.approx((0.6, 1 / 1.5))
    assert metrics["PQ_st"] == pytest.approx(0.75 / 2)
    assert metrics["PQ"] == pytest.approx((0.6 / 1.5 + 0.75 / 2) / 2)


def test_the_same_place_of_another_class_is_not_found(quality):
    truth = row((1, 10))
    metrics = quality(truth, {1: 17}, truth, {1: 119})
    assert metrics["PQ_th"] == metrics["PQ_st"] == metrics["PQ"] == 0


def test_what_is_void_or_crowd_counts_neither_way(quality):
    """The union is without void; a segment mostly in void, or in a crowd of its class, is no FP."""
    truth = row((1, 4), (0, 8), (5, 8))
    found = row((1, 6), (2, 6), (3, 5), (4, 3))
    metrics = quality(truth, {1: 17, 5: 17}, found, {1: 17, 2: 17, 3: 17, 4: 119}, crowd=[5])
    assert metrics["PQ_th"] == 1  # the IoU of the first is 4 / (6 + 4 - 4 - 2)
    assert metrics["PQ_st"] == 0  # in a crowd of another class


def brute_force(truth, classes, found, found_classes):
    """PQ, the mean over the classes that are there."""
    result = []
    for category in {*classes.values(), *found_classes.values()}:
        own = [i for i, c in classes.items() if c == category]
        theirs = [j for j, c in found_classes.items() if c == category and (found == j).any()]
        ious = []
        for i, j in itertools.product(own, theirs):
            union = ((truth == i) | (found == j)) & ~((truth == 0) & (found == j))
            iou = ((truth == i) & (found == j)).sum() / union.sum()
            if iou > 0.5:
                ious.append((iou, j))
        wrong = [
            j
            for j in theirs
            if j not in [x[1] for x in ious]
            and ((truth == 0) & (found == j)).sum() <= (found == j).sum() / 2
        ]
        missed = len(own) - len(ious)
        if ious or wrong or missed:
            result.append(sum(x[0] for x in ious) / (len(ious) + len(wrong) / 2 + missed / 2))
    return np.mean(result)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_what_its_definition_says(quality, seed):
    """On blocks of random numbers, the prediction a shifted truth."""
    random = np.random.default_rng(seed)
    truth = np.kron(random.integers(0, 7, (5, 6)), np.ones((8, 8), dtype=int))
    found = np.roll(truth, (1, 2), (0, 1))
    found[random.random(found.shape) < 0.1] = 3
    there = [i for i in range(1, 7) if (truth == i).any()]
    classes = dict(zip(there, random.choice([17, 18, 119], len(there)).tolist()))
    found_classes = {**classes, 2: 119, 3: 17}
    expected = brute_force(truth, classes, found, found_classes)
    assert quality(truth, classes, found, found_classes)["PQ"] == pytest.approx(expected)


@pytest.fixture
def dataset(tmp_path):
    """Two images: a thing of number 300 in stuff of number 70000."""
    ids = np.full((4, 6), 70_000)
    ids[1:3, 1:3] = 300
    colours(ids).save(tmp_path / "a.png")
    segments = [{"id": 300, "category_id": 18}, {"id": 70_000, "category_id": 119}]
    annotation = {"file_name": "a.png", "segments_info": segments}
    register(tmp_path, [{"image_id": i, **annotation} for i in (5, 6)])
    yield "panoptic_example"
    MetadataCatalog.remove("panoptic_example")


FOUND = torch.full((4, 6), 2, dtype=torch.int32)
FOUND[1:3, 1:4] = 1
SEGMENTS = [
    {"id": 1, "isthing": True, "category_id": 1, "score": 0.9},
    {"id": 2, "isthing": False, "category_id": 3, "score": 0.9},
]


def test_the_evaluator(dataset, tmp_path):
    evaluator = PanopticEvaluator(dataset)
    evaluator.reset()
    evaluator.process([{"image_id": 5}], [{"panoptic_seg": (FOUND, SEGMENTS)}])
    metrics = evaluator.evaluate()["panoptic_seg"]
    assert metrics["PQ_th"] == pytest.approx(100 * 4 / 6)
    assert metrics["PQ_st"] == pytest.approx(100 * 18 / 20)
    assert metrics["PQ"] == pytest.approx(50 * (4 / 6 + 18 / 20)) and metrics["RQ"] == 100
    (tmp_path / "p.json").unlink()
    with pytest.raises(FileNotFoundError, match="must have its segments in '.*p.json'"):
        PanopticEvaluator(dataset)


def evaluate_an_image(rank, annotations, folder):
    """Each process finds one thing, the second where none is, and the first stuff besides."""
    register(folder, annotations)
    file = (folder / "rendezvous").as_uri()
    torch.distributed.init_process_group("gloo", file, rank=rank, world_size=2)
    evaluator = PanopticEvaluator("panoptic_example")
    evaluator.reset()
    outputs = [(FOUND, SEGMENTS), (FOUND.roll(3, 1), SEGMENTS[:1])]
    evaluator.process([{"image_id": 5 + rank}], [{"panoptic_seg": outputs[rank]}])
    (folder / f"{rank}.json").write_text(json.dumps(evaluator.evaluate()))
    torch.distributed.destroy_process_group()


def test_what_several_processes_count_is_added(dataset, tmp_path):
    annotations = json.loads((tmp_path / "p.json").read_text())["annotations"]
    torch.multiprocessing.spawn(evaluate_an_image, (annotations, tmp_path), nprocs=2)
    assert json.loads((tmp_path / "1.json").read_text()) is None
    metrics = json.loads((tmp_path / "0.json").read_text())["panoptic_seg"]
    assert metrics["PQ_th"] == pytest.approx(100 * (4 / 6) / (1 + 1 / 2 + 1 / 2))
    assert metrics["PQ_st"] == pytest.approx(100 * (18 / 20) / (1 + 1 / 2))
