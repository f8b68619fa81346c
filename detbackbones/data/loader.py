"""A training data loader whose batches are a pure function of the seed: it can resume exactly.

The batch of iteration k is the same whether the run started at 0 or at k, and with any number of
worker processes. Only integers are skipped to get to k: no image is read for nothing.
"""

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from detectron2.data import DatasetFromList
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from .mixing import Mixing


def build_train_loader(
    dataset: list[dict],
    *,
    mapper: Callable[[dict], dict | None],
    total_batch_size: int,
    aspect_ratio_grouping: bool = True,
    repeat_threshold: float = 0.0,
    mixing: Mixing | None = None,
    num_workers: int = 0,
    seed: int = 0,
) -> "TrainLoader":
    """Build an endless loader of training batches that can start at any iteration.

    It takes the place of detectron2's ``build_detection_train_loader``, whose order and random
    augmentations depend on the number of workers and cannot be resumed.

    Args:
        dataset: the dataset dicts, as ``get_detection_dataset_dicts`` returns them.
        mapper: makes the model's input of a dataset dict; where it returns None, the next image
            of the dataset is taken.
        total_batch_size: images per iteration over all processes.
        aspect_ratio_grouping: whether the images of a batch are all wider than high, or none is;
            without effect where the dicts have no ``width`` and ``height``.
        repeat_threshold: images of classes that less than this part of all images have come more
            often, by the square root of how much less (Gupta et al., arXiv 1908.03195); 0 is never.
        mixing: makes an image of several.
        num_workers: worker processes that load data; 0 loads in this process.
        seed: seed of the order and the augmentations, >= 0, the same in all processes.

    Returns:
        a loader of ``list[dict]``, each ``total_batch_size / world size`` long. Set its
        ``start_iter`` to resume.

    Raises:
        TypeError: if the dataset is not a list.
        ValueError: if the dataset is empty, the seed is negative, the batch cannot be divided by
            the number of processes, or images without annotations are to be repeated or mixed.
    """
    world_size = comm.get_world_size()
    if not isinstance(dataset, list):
        raise TypeError(f"dataset of type {type(dataset).__name__} must be a list of dicts")
    if total_batch_size < 1 or total_batch_size % world_size:
        raise ValueError(
            f"total_batch_size={total_batch_size} must be a positive multiple of the number of "
            f"processes, {world_size}"
        )
    groups = None
    if aspect_ratio_grouping and all("width" in d and "height" in d for d in dataset):
        groups = [int(d["width"] > d["height"]) for d in dataset]
    factors = None
    if repeat_threshold:
        if not all("annotations" in d for d in dataset):
            raise ValueError(
                f"repeat_threshold={repeat_threshold} must be 0 for images without annotations, "
                "such as those of label maps"
            )
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dataset, repeat_threshold
        ).numpy()
    if mixing is not None:
        label_maps = "sem_seg_file_name" in (dataset[0] if dataset else {})
        mixing.check(
            label_maps=label_maps,
            masks=getattr(mapper, "use_instance_mask", False),
            keypoints=getattr(mapper, "use_keypoint", False),
        )
    sampler = TrainBatchSampler(
        len(dataset),
        total_batch_size // world_size,
        groups=groups,
        factors=factors,
        seed=seed,
        rank=comm.get_rank(),
        world_size=world_size,
    )
    return TrainLoader(
        _SeededDataset(dataset, mapper, seed, mixing, total_batch_size),
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_no_collation,
        pin_memory=torch.cuda.is_available(),  # from there images are copied faster
        generator=torch.Generator(),  # its own, so that iter() leaves the global one alone
    )


class TrainBatchSampler(Sampler[list[tuple[int, int]]]):
    """Endless batches of ``(position, index)`` for one process, from a stream shared by all.

    The stream is one shuffled permutation of the dataset after another, in which an image comes as
    often as its factor says; the fraction of a factor is drawn anew each time, as by detectron2's
    ``RepeatFactorTrainingSampler``. ``position`` counts along it, ``index`` is into the dataset,
    and process ``rank`` has the positions ``rank``, ``rank + world_size``, ... as in detectron2's
    ``TrainingSampler``. Grouping follows detectron2's ``AspectRatioGroupedDataset``: a batch is
    given out when its group has ``batch_size`` images.

    Attributes:
        start_iter: number of batches that each new iterator skips.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        groups: Sequence[int] | None = None,
        factors: np.ndarray | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        """Describe the stream; nothing is drawn before it is iterated.

        Args:
            size: number of images in the dataset.
            batch_size: images per batch of this process.
            groups: group of each image; a batch has images of one group. None is one group.
            factors: how often each image comes in a permutation, (size,), at least 1; None is once.
            seed: seed of the permutations, >= 0.
            rank: this process, 0 to ``world_size - 1``.
            world_size: number of processes.

        Raises:
            ValueError: if the dataset is empty or the seed is negative.
        """
        if size < 1:
            raise ValueError(f"dataset of size={size} must have at least one image")
        if seed < 0:
            raise ValueError(f"seed={seed} must be at least 0, and the same in all processes")
        self.start_iter = 0
        self._size, self._batch_size, self._groups = size, batch_size, groups
        self._factors = factors
        self._seed, self._rank, self._world_size = seed, rank, world_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return itertools.islice(self._batches(), self.start_iter, None)

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        waiting: dict[int, list[tuple[int, int]]] = {}
        stream = enumerate(self._indices())
        for position, index in itertools.islice(stream, self._rank, None, self._world_size):
            group = self._groups[index] if self._groups else 0
            batch = waiting.setdefault(group, [])
            batch.append((position, index))
            if len(batch) == self._batch_size:
                yield waiting.pop(group)

    def _indices(self) -> Iterator[int]:
        for epoch in itertools.count():
            random = np.random.RandomState(_seed_words(self._seed, 0, epoch))
            images = np.arange(self._size)
            if self._factors is not None:
                whole = self._factors.astype(int)
                more = random.rand(self._size) < self._factors - whole
                images = np.repeat(images, whole + more)
            yield from random.permutation(images).tolist()


class TrainLoader(DataLoader):
    """A ``DataLoader`` that can start at any iteration; ``build_train_loader`` makes it."""

    @property
    def start_iter(self) -> int:
        """The iteration whose batch each new iterator gives first; 0 unless set."""
        return self.batch_sampler.start_iter

    def first_batch(self, most: int) -> list[dict]:
        """The first images of the batch of ``start_iter``, loaded in this process.

        Args:
            most: how many at most.
        """
        return [self.dataset[key] for key in next(iter(self.batch_sampler))[:most]]

    @start_iter.setter
    def start_iter(self, iteration: int) -> None:
        if iteration < 0:
            raise ValueError(f"start_iter={iteration} must be at least 0")
        self.batch_sampler.start_iter = iteration


class _SeededDataset(Dataset):
    """Maps ``(position, index)`` to a sample; seed and position alone decide its augmentation."""

    def __init__(
        self,
        dataset: list[dict],
        mapper: Callable[[dict], dict | None],
        seed: int,
        mixing: Mixing | None,
        total_batch_size: int,
    ):
        # Serialised: the workers share the memory, and each access gives a fresh copy.
        self._dataset = DatasetFromList(dataset, copy=False)
        self._mapper = mapper
        self._seed = seed
        self._mixing = mixing
        self._mixed = mixing.iterations * total_batch_size if mixing else 0

    def __getitem__(self, key: tuple[int, int]) -> dict:
        position, index = key
        with _seeded_rngs(_seed_words(self._seed, 1, position)):
            sample = self._map(index)
            if self._mixing is None or position >= self._mixed:
                return sample
            size = len(self._dataset)
            return self._mixing(sample, lambda: self._map(np.random.randint(size)))

    def _map(self, index: int) -> dict:
        size = len(self._dataset)
        for i in range(index, index + size):
            sample = self._mapper(self._dataset[i % size])
            if sample is not None:
                return sample
        raise ValueError(
            f"mapper must give a sample of some image: it returned None for all {size} images"
        )


def _seed_words(seed: int, purpose: int, count: int) -> np.ndarray:
    return np.random.SeedSequence((seed, purpose, count)).generate_state(4)


@contextlib.contextmanager
def _seeded_rngs(words: np.ndarray) -> Iterator[None]:
    """Seed the global generators of python, NumPy and torch (CPU), and restore them after."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(int(words[0]))
    np.random.seed(words)
    # torch.manual_seed would also reseed CUDA, whose generator is the model's.
    torch.default_generator.manual_seed(int(words[1]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _no_collation(batch: list[dict]) -> list[dict]:
    return batch
