"""The training loader: one stream of batches, whatever the start, the workers and the process."""

import itertools
import random

import detectron2.data.transforms as T
import numpy as np
import pytest
import torch
from detbackbones.data.loader import TrainBatchSampler, build_train_loader
from detectron2.data import DatasetMapper
from PIL import Image

SIZES = [(30, 20), (20, 30), (30, 20), (25, 20), (20, 20), (20, 40), (40, 20)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    dicts = []
    for i, (width, height) in enumerate(SIZES):
        path = str(folder / f"{i}.png")
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(path)
        dicts.append({"file_name": path, "image_id": i, "width": width, "height": height})
    return dicts


def build(dataset, **changes):
    mapper = DatasetMapper(
        True,
        augmentations=[
            T.ResizeShortestEdge((12, 16, 20, 24), 40, "choice"),
            T.RandomFlip(),
            T.RandomBrightness(0.5, 1.5),
        ],
        image_format="BGR",
    )
    return build_train_loader(dataset, **{"mapper": mapper, "total_batch_size": 2, **changes})


def take(loader, count):
    return [
        [(sample["image_id"], sample["image"]) for sample in batch]
        for batch in itertools.islice(loader, count)
    ]


def same(a, b):
    pairs = list(zip(itertools.chain(*a), itertools.chain(*b), strict=True))
    return all(i == j and torch.equal(x, y) for (i, x), (j, y) in pairs)


@pytest.mark.parametrize("grouping", [True, False])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_gives_the_same_batches_with_any_workers(dataset, grouping, num_workers):
    expected = take(build(dataset, aspect_ratio_grouping=grouping), 12)
    loader = build(dataset, aspect_ratio_grouping=grouping, num_workers=num_workers)
    for start in (0, 5):
        loader.start_iter = start
        assert same(take(loader, 12 - start), expected[start:])


def test_augmentation_differs_between_epochs_and_seeds(dataset):
    one_image = dataset[:1]
    shapes = [x.shape for ((_, x),) in take(build(one_image, total_batch_size=1), 30)]
    assert len(set(shapes)) == 4
    first, other = (take(build(dataset, seed=seed), 5) for seed in (0, 1))
    assert not same(first, other)


def rng_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_process_keeps_its_own_random_state(dataset, num_workers):
    before = rng_states()
    take(build(dataset, num_workers=num_workers), 3)
    assert rng_states() == before


def test_the_process_random_state_does_not_matter(dataset):
    expected = take(build(dataset), 4)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert same(take(build(dataset), 4), expected)


def test_all_three_generators_are_seeded(dataset):
    def draw(record):
        return {"draw": (random.random(), np.random.rand(), torch.rand(1).item())}

    def draws():
        loader = build(dataset, mapper=draw)
        return [s["draw"] for batch in itertools.islice(loader, 7) for s in batch]

    first = draws()
    assert first == draws()
    assert all(len(set(column)) == 14 for column in zip(*first, strict=True))


def test_a_failing_mapper_leaves_the_random_state_alone(dataset):
    def fail(record):
        random.random()
        raise RuntimeError("no such image")

    before = rng_states()
    with pytest.raises(RuntimeError, match="no such image"):
        next(iter(build(dataset, mapper=fail)))
    assert rng_states() == before


def test_a_group_is_all_wide_or_all_not(dataset):
    batches = list(itertools.islice(build(dataset, total_batch_size=3), 40))
    wide = [[s["width"] > s["height"] for s in batch] for batch in batches]
    assert all(len(set(w)) == 1 for w in wide)
    assert {w[0] for w in wide} == {True, False}


def test_no_grouping_without_width_and_height(dataset):
    dicts = [{k: d[k] for k in ("file_name", "image_id")} for d in dataset]
    assert same(take(build(dicts), 5), take(build(dataset, aspect_ratio_grouping=False), 5))


def test_each_image_once_an_epoch_in_a_new_order():
    stream = itertools.chain(*itertools.islice(TrainBatchSampler(7, 1), 70))
    epochs = np.array([index for _, index in stream]).reshape(10, 7)
    assert (np.sort(epochs, axis=1) == np.arange(7)).all()
    assert len({tuple(e) for e in epochs}) > 5


@pytest.mark.parametrize(("size", "world"), [(12, 2), (12, 3), (7, 2)])
def test_the_processes_share_one_stream(size, world):
    whole = list(itertools.chain(*itertools.islice(TrainBatchSampler(size, 1), size * world)))
    for rank in range(world):
        sampler = TrainBatchSampler(size, 1, rank=rank, world_size=world)
        part = list(itertools.chain(*itertools.islice(sampler, size)))
        assert part == whole[rank::world]
    assert [position for position, _ in whole] == list(range(size * world))
    assert sorted(index for _, index in whole[:size]) == list(range(size))


def test_a_batch_may_be_larger_than_the_dataset(dataset):
    (batch,) = take(build(dataset, total_batch_size=16, aspect_ratio_grouping=False), 1)
    assert len(batch) == 16 and {i for i, _ in batch} == set(range(7))


def test_the_start_is_cheap():
    sampler = TrainBatchSampler(1000, 4, groups=[i % 2 for i in range(1000)])
    expected = next(itertools.islice(sampler, 100_000, None))
    sampler.start_iter = 100_000
    assert next(iter(sampler)) == expected
    assert 400_000 <= max(position for position, _ in expected) < 400_010


def test_mapper_that_returns_none_takes_the_next_image(dataset):
    def skip_three(record):
        return None if record["image_id"] == 3 else record

    ids = [
        s["image_id"] for b in itertools.islice(build(dataset, mapper=skip_three), 21) for s in b
    ]
    assert sorted(ids) == sorted([0, 1, 2, 4, 4, 5, 6] * 6)
    with pytest.raises(ValueError, match="None for all 7 images"):
        next(iter(build(dataset, mapper=lambda record: None)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dataset": []}, ValueError, "dataset of size=0 must have"),
        ({"dataset": "bccd_train"}, TypeError, "dataset of type str must be a list"),
        ({"total_batch_size": 0}, ValueError, "total_batch_size=0 must be"),
        ({"seed": -1}, ValueError, "seed=-1 must be at least 0"),
    ],
)
def test_wrong_arguments_are_refused(dataset, changes, error, message):
    with pytest.raises(error, match=message):
        build(**{"dataset": dataset, **changes})


def run_process(rank, store, dataset, queue):
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    with pytest.raises(ValueError, match="total_batch_size=3 must .* number of processes, 2$"):
        build(dataset, total_batch_size=3)
    loader = build(dataset, total_batch_size=4, mapper=lambda record: record)
    loader.start_iter = 2
    queue.put((rank, [s["image_id"] for s in next(iter(loader))]))
    torch.distributed.destroy_process_group()


def test_two_processes(dataset, tmp_path):
    context = torch.multiprocessing.get_context("fork")
    queue = context.Queue()
    arguments = (f"file://{tmp_path}/store", dataset, queue)
    processes = [context.Process(target=run_process, args=(r, *arguments)) for r in range(2)]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0, 0]

    groups = [int(width > height) for width, height in SIZES]
    for rank in range(2):
        sampler = TrainBatchSampler(7, 2, groups=groups, rank=rank, world_size=2)
        expected = next(itertools.islice(sampler, 2, None))
        assert results[rank] == [index for _, index in expected]


def test_start_iter_must_not_be_negative(dataset):
    with pytest.raises(ValueError, match="start_iter=-1 must be at least 0"):
        build(dataset).start_iter = -1


def test_images_of_rare_classes_come_more_often(dataset):
    """By the square root of threshold over frequency: here that of 0.5 over 1 in 7."""
    kinds = [0, 0, 0, 0, 0, 0, 1]
    dicts = [{**d, "annotations": [{"category_id": k}]} for d, k in zip(dataset, kinds)]
    few = {"mapper": lambda d: d, "total_batch_size": 1, "aspect_ratio_grouping": False}
    loader = build_train_loader(dicts, repeat_threshold=0.5, **few)
    seen = [sample["image_id"] for (sample,) in itertools.islice(loader, 4000)]
    share = (7 / 2) ** 0.5
    assert seen.count(6) / len(seen) == pytest.approx(share / (6 + share), rel=0.05)
    loader.start_iter = 1234
    later = [sample["image_id"] for (sample,) in itertools.islice(loader, 20)]
    assert later == seen[1234:1254]
    plain = build_train_loader(dicts, **few)
    assert sorted(s["image_id"] for (s,) in itertools.islice(plain, 7)) == list(range(7))
    with pytest.raises(ValueError, match="repeat_threshold=0.5 must be 0 for images without"):
        build_train_loader(dataset, repeat_threshold=0.5, **few)
