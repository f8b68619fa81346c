"""Panoptic quality: worked examples, the same by brute force, and its evaluator."""

import itertools
import json

import numpy as np
import pytest
import torch
from detbackbones.data import PanopticEvaluator
from detbackbones.data.panoptic import count_segments, panoptic_quality
from detectron2.data import MetadataCatalog
from PIL import Image


def infos(**classes):
    """A segment for each number after the letter s."""
    return [{"id": int(key[1:]), "category_id": value} for key, value in classes.items()]


def row(*parts):
    """A map of one row: (number, how many pixels)."""
    return np.array([[i for i, count in parts for _ in range(count)]])


def test_a_perfect_map():
    truth = row((1, 4), (2, 6))
    counts = count_segments(truth, infos(s1=7, s2=8), truth, infos(s1=7, s2=8))
    assert panoptic_quality(counts.values()) == (1, 1, 1)


def test_one_is_found_one_is_missed_one_is_not_there():
    """IoU 6 / 10 of the first; PQ = 0.6 / (1 + 1/2 + 1/2)."""
    truth = row((1, 8), (2, 4), (9, 8))
    found = row((1, 6), (3, 2), (4, 4), (1, 2), (9, 6))
    counts = count_segments(truth, infos(s1=7, s2=7, s9=8), found, infos(s1=7, s3=8, s4=8, s9=8))
    assert counts[7].tolist() == pytest.approx([0.6, 1, 0, 1])
    assert counts[8].tolist() == pytest.approx([0.75, 1, 2, 0])
    pq, sq, rq = panoptic_quality([counts[7]])
    assert (pq, sq, rq) == pytest.approx((0.6 / 1.5, 0.6, 1 / 1.5))
    pq, sq, rq = panoptic_quality([counts[7], counts[8]])
    assert pq == pytest.approx((0.6 / 1.5 + 0.75 / 2) / 2)
    assert rq == pytest.approx((1 / 1.5 + 1 / 2) / 2) and sq == pytest.approx((0.6 + 0.75) / 2)


def test_the_same_place_of_another_class_is_not_found():
    truth = row((1, 10))
    counts = count_segments(truth, infos(s1=7), truth, infos(s1=8))
    assert counts[7].tolist() == [0, 0, 0, 1] and counts[8].tolist() == [0, 0, 1, 0]
    assert panoptic_quality(counts.values()) == (0, 0, 0)
    assert np.isnan(panoptic_quality([])).all()


def test_what_is_void_or_crowd_counts_neither_way():
    """The union is without void; a segment mostly in void, or in a crowd of its class, is no FP."""
    truth = row((1, 4), (0, 8), (5, 8))
    crowd = [*infos(s1=7), {"id": 5, "category_id": 7, "iscrowd": 1}]
    found = row((1, 6), (2, 6), (3, 5), (4, 3))
    counts = count_segments(truth, crowd, found, infos(s1=7, s2=7, s3=7, s4=8))
    assert counts[7].tolist() == [1, 1, 0, 0]  # the first's IoU is 4 / (6 + 4 - 4 - 2)
    assert counts[8].tolist() == [0, 0, 1, 0]  # in a crowd of another class


def brute_force(truth, classes, found, found_classes):
    result = {}
    for category in {*classes.values(), *found_classes.values()}:
        own = [i for i, c in classes.items() if c == category]
        theirs = [j for j, c in found_classes.items() if c == category and (found == j).any()]
        ious = []
        for i, j in itertools.product(own, theirs):
            union = ((truth == i) | (found == j)) & ~((truth == 0) & (found == j))
            iou = ((truth == i) & (found == j)).sum() / union.sum()
            if iou > 0.5:
                ious.append((iou, i, j))
        wrong = [
            j
            for j in theirs
            if j not in [x[2] for x in ious]
            and ((truth == 0) & (found == j)).sum() <= (found == j).sum() / 2
        ]
        missed = len(own) - len(ious)
        result[category] = [sum(x[0] for x in ious), len(ious), len(wrong), missed]
    return {c: v for c, v in result.items() if any(v)}


@pytest.mark.parametrize("seed", range(5))
def test_it_is_what_its_definition_says(seed):
    """On blocks of random numbers, the prediction a shifted truth."""
    random = np.random.default_rng(seed)
    truth = np.kron(random.integers(0, 7, (5, 6)), np.ones((8, 8), dtype=int))
    found = np.roll(truth, (1, 2), (0, 1))
    found[random.random(found.shape) < 0.1] = 3
    classes = {i: int(random.integers(10, 13)) for i in range(1, 7) if (truth == i).any()}
    found_classes = {**{i: c for i, c in classes.items() if i != 2}, 2: 12}
    counts = count_segments(
        truth,
        [{"id": i, "category_id": c} for i, c in classes.items()],
        found,
        [{"id": i, "category_id": c} for i, c in found_classes.items()],
    )
    expected = brute_force(truth, classes, found, found_classes)
    assert counts.keys() == expected.keys()
    for category, values in counts.items():
        assert values.tolist() == pytest.approx(expected[category])


@pytest.fixture
def dataset(tmp_path):
    """Two images: a thing of number 300 in stuff of number 70000."""
    ids = np.full((4, 6), 70_000)
    ids[1:3, 1:3] = 300
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 256**2], 2).astype(np.uint8)
    Image.fromarray(colours).save(tmp_path / "a.png")
    segments = [{"id": 300, "category_id": 18}, {"id": 70_000, "category_id": 119}]
    annotation = {"file_name": "a.png", "segments_info": segments}
    annotations = [{"image_id": i, **annotation} for i in (5, 6)]
    (tmp_path / "p.json").write_text(json.dumps({"annotations": annotations}))
    MetadataCatalog.get("panoptic_example").set(
        panoptic_json=str(tmp_path / "p.json"),
        panoptic_root=str(tmp_path),
        thing_dataset_id_to_contiguous_id={17: 0, 18: 1},
        stuff_dataset_id_to_contiguous_id={119: 3},
    )
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


def evaluate_an_image(rank, dataset, folder):
    """Each process finds one thing, the second where none is, and the first stuff besides."""
    file = (folder / "rendezvous").as_uri()
    torch.distributed.init_process_group("gloo", file, rank=rank, world_size=2)
    evaluator = PanopticEvaluator(dataset)
    evaluator.reset()
    outputs = [(FOUND, SEGMENTS), (FOUND.roll(3, 1), SEGMENTS[:1])]
    evaluator.process([{"image_id": 5 + rank}], [{"panoptic_seg": outputs[rank]}])
    (folder / f"{rank}.json").write_text(json.dumps(evaluator.evaluate()))
    torch.distributed.destroy_process_group()


def test_what_several_processes_count_is_added(dataset, tmp_path):
    context = torch.multiprocessing.get_context("fork")  # which keeps the metadata
    arguments = [(rank, dataset, tmp_path) for rank in range(2)]
    processes = [context.Process(target=evaluate_an_image, args=args) for args in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert json.loads((tmp_path / "1.json").read_text()) is None
    metrics = json.loads((tmp_path / "0.json").read_text())["panoptic_seg"]
    assert metrics["PQ_th"] == pytest.approx(100 * (4 / 6) / (1 + 1 / 2 + 1 / 2))
    assert metrics["PQ_st"] == pytest.approx(100 * (18 / 20) / (1 + 1 / 2))
