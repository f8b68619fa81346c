"""Detectors on the Hugging Face hub."""

from pathlib import Path

import huggingface_hub

from ..messages import first_line
from ..training.record import CONFIG
from ..weights.downloads import downloading_from_hub

PREFIX = "hf-hub:"  # of the name of a detector on the hub
WEIGHTS = "model.safetensors"


def download(name: str) -> Path:
    """The folder of a detector on the Hugging Face hub, downloaded or from the cache.

    Args:
        name: such as ``hf-hub:user/name``, or ``hf-hub:user/name@revision``.

    Raises:
        ConnectionError: if it is not in the cache, and the hub cannot be reached.
        ValueError: if there is no such model.
    """
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    try:
        with downloading_from_hub(repository, "download its folder, and give that"):
            folder = huggingface_hub.snapshot_download(
                repository, revision=revision or None, allow_patterns=[WEIGHTS, CONFIG]
            )
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.HFValidationError) as e:
        raise ValueError(f"run={name!r} must be a model on the hub: {first_line(e)}") from e
    return Path(folder)
