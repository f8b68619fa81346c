"""Reading every image of a dataset once, before the training, to find those that are wrong."""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from ..messages import first_line
from .mapper import DATA_ERRORS, CheckedDatasetMapper
from .memory import recall, remember

logger = logging.getLogger(__name__)


def verify_images(dataset: Sequence[dict], mapper: CheckedDatasetMapper) -> None:
    """Read all images of a dataset, and their label maps, as a training will.

    Those that were right are remembered by size and time stamp, in ``verified.json`` in
    ``~/.cache/detbackbones``, and are not read again.

    Args:
        dataset: the dataset dicts.
        mapper: that of the data loader.

    Raises:
        ValueError: if there are wrong ones; names the first, and the log has all.
    """
    if not isinstance(mapper, CheckedDatasetMapper):
        raise ValueError(
            "dataset.verify=True needs the mapper CheckedDatasetMapper, and the config has a "
            f"{type(mapper).__name__}"
        )
    known = recall("verified")
    states = {record["file_name"]: _state(record, mapper) for record in dataset}
    todo = [r for r in dataset if known.get(r["file_name"]) != states[r["file_name"]]]

    def fault(record: dict) -> str:
        try:
            mapper.read(record)
        except DATA_ERRORS as error:
            return first_line(error)
        return ""

    with ThreadPoolExecutor() as pool:  # decoding releases the GIL
        found = pool.map(fault, todo)
        faults = list(tqdm(found, "reading all images", len(todo), unit="image", disable=not todo))
    wrong = [text for text in faults if text]
    known |= {r["file_name"]: states[r["file_name"]] for r, text in zip(todo, faults) if not text}
    if todo:
        remember("verified", known)
    for text in wrong:
        logger.error(text)
    if wrong:
        raise ValueError(f"{wrong[0]} ({len(wrong)} of {len(dataset)} images are wrong)")
    logger.info("%d images can be read, %d of them were read now", len(dataset), len(todo))


def _state(record: dict, mapper: CheckedDatasetMapper) -> list:
    """What tells whether an image is to be read again."""
    files = (record["file_name"], record.get("sem_seg_file_name"))
    stats = [os.stat(file) for file in files if file and os.path.exists(file)]
    state = [value for stat in stats for value in (stat.st_size, stat.st_mtime_ns)]
    return [record.get("width"), record.get("height"), mapper.channels, mapper.max_value, *state]
