"""What the arguments of configs written for detrex's wrapper of timm mean here."""

from ..messages import one_of


def norm_from_detrex(features_only: bool, norm_layer: type | str | None, norm: str) -> str:
    """The ``norm`` that the arguments of a config written for detrex's wrapper mean.

    Args:
        features_only: what detrex passes on to timm.
        norm_layer: a class or its dotted name. Any class called FrozenBatchNorm2d, BatchNorm2d or
            SyncBatchNorm is understood; none is passed on to the model.
        norm: what the user gave as ``norm``.

    Raises:
        ValueError: if ``features_only`` is False, for another class, or if ``norm`` says something
            else than ``norm_layer``.
    """
    if not features_only:
        raise ValueError("features_only=False is not possible: a backbone gives feature maps")
    if norm_layer is None:
        return norm
    name = norm_layer if isinstance(norm_layer, str) else getattr(norm_layer, "__name__", "")
    name = name.rpartition(".")[-1]
    meanings = {"FrozenBatchNorm2d": "FrozenBN", "BatchNorm2d": "BN", "SyncBatchNorm": "SyncBN"}
    if name not in meanings:
        one_of("norm_layer", norm_layer, meanings, hint="; other layers go into model_kwargs")
    if norm not in ("", meanings[name]):
        raise ValueError(f"norm_layer={name} means norm={meanings[name]!r}, but norm={norm!r}")
    return meanings[name]
