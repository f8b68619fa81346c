"""A cache of a frozen backbone's feature maps, where heads alone are trained on it."""

import hashlib
import logging

import torch

from ..backbones.feature_backbone import FeatureBackbone

logger = logging.getLogger(__name__)


def cache_features(backbone: FeatureBackbone, max_bytes: int) -> None:
    """Let a frozen backbone remember the feature maps of the images that it has seen.

    An image is known by its pixels, so augmentation and padding may be what they are: the maps of
    each different image are computed once, until the memory is full. In evaluations nothing is
    kept.

    Args:
        backbone: changed in place; nothing in it learns, ``freeze_at=5``.
        max_bytes: of the feature maps that are kept, on the backbone's device.

    Raises:
        ValueError: if the backbone has parameters that learn.
    """
    trainable = [name for name, p in backbone.named_parameters() if p.requires_grad]
    if trainable:
        raise ValueError(
            "backbone must have freeze_at=5 for its feature maps to be cached: it has "
            f"{len(trainable)} parameters that learn ({trainable[0]}, ...)"
        )
    backbone.forward = _Cache(backbone, max_bytes)


class _Cache:
    """A backbone's forward that looks each image up before it computes."""

    def __init__(self, backbone: FeatureBackbone, max_bytes: int):
        self._backbone, self._forward = backbone, backbone.forward
        self._left = max_bytes
        self._maps: dict[bytes, dict[str, torch.Tensor]] = {}

    @torch.no_grad()
    def __call__(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self._backbone.training:
            return self._forward(x)
        keys = [_key(image) for image in x]
        new = {key: i for i, key in enumerate(keys) if key not in self._maps}
        found = {key: self._maps[key] for key in keys if key in self._maps}
        if new:
            computed = self._forward(x[list(new.values())])
            for row, key in enumerate(new):
                found[key] = {name: maps[row].clone() for name, maps in computed.items()}
                self._keep(key, found[key])
        names = found[keys[0]]
        return {name: torch.stack([found[key][name] for key in keys]) for name in names}

    def _keep(self, key: bytes, maps: dict[str, torch.Tensor]) -> None:
        size = sum(level.nbytes for level in maps.values())
        if size <= self._left:
            self._maps[key] = maps
            self._left -= size
        elif self._left:
            logger.info("the cache is full, with the features of %d images", len(self._maps))
            self._left = 0


def _key(image: torch.Tensor) -> bytes:
    """A digest of an image (C, H, W), and of what else its feature maps depend on."""
    kind = f"{tuple(image.shape)} {image.dtype} {torch.is_autocast_enabled(image.device.type)}"
    return hashlib.blake2b(image.cpu().numpy().tobytes(), key=kind.encode()[:64]).digest()
