"""Finding a backbone: which models there are, by name, size, levels and library."""

from collections.abc import Collection
from enum import Enum

import huggingface_hub

from ..backbones import BACKBONES
from ..messages import one_of
from ..weights.downloads import downloading_from_hub
from .facts import NECKS, Facts, facts


class ModelSource(str, Enum):  # noqa: UP042 (Python 3.10 has no StrEnum)
    """Where a model comes from."""

    TIMM = "timm"
    HF_HUB = "hf_hub"
    TORCHVISION = "torchvision"


def timm_name(model_name: str) -> str:
    """The name as timm has it now: ``timm/...`` and ``hf_hub:...`` are on the hub."""
    model_name = model_name.replace("hf_hub:", "hf-hub:", 1)
    return f"hf-hub:{model_name}" if model_name.startswith("timm/") else model_name


def list_backbones(
    pattern: str = "",
    pretrained_only: bool = False,
    with_source: bool = False,
    *,
    source: str = "timm",
    max_params: float | None = None,
    max_gmacs: float | None = None,
    stride: int | None = None,
    necks: str | Collection[str] | None = None,
) -> list[str] | list[tuple[str, ModelSource]]:
    """List models that can be backbones; those of unknown size pass no filter but the first two.

    Args:
        pattern: of the names, with wildcards: ``"*resnet*"``.
        pretrained_only: only models with pretrained weights; timm's then have their tags.
        with_source: give pairs of name and :class:`ModelSource`.
        source: "timm" or "torchvision".
        max_params: the most parameters, such as 30e6.
        max_gmacs: the most multiply-adds for an image of 224 x 224 pixels, in 10^9.
        stride: of a level that the model must have.
        necks: kinds of pyramid one of which must stand on it, "fpn" or "sfp" (on the one level of
            a ViT with patches of 16 pixels, or of 14 and timm's ``patch_size=16``); see
            :func:`detbackbones.build_pyramid`.

    Raises:
        ValueError: if the source or a neck is unknown, or a filter fits no model of any source.
    """
    one_of("source", source, BACKBONES)
    necks = {necks} if isinstance(necks, str) else necks
    for neck in necks or ():
        one_of("necks", neck, NECKS)
    if any(limit is not None for limit in (max_params, max_gmacs, stride)):
        everything = [known for name in BACKBONES for known in facts(name).values()]
        if stride is not None:
            one_of("stride", stride, sorted({s for known in everything for s in known.strides}))
        for parameter, limit in (("params", max_params), ("gmacs", max_gmacs)):
            least = min(getattr(known, parameter) for known in everything)
            if limit is not None and not limit >= least:
                raise ValueError(f"max_{parameter}={limit} fits no model: the smallest has {least}")
    names = BACKBONES[source].source_class.find(pattern or "*", pretrained_only)

    def fits(known: Facts | None) -> bool:
        return known is not None and (
            (max_params is None or known.params <= max_params)
            and (max_gmacs is None or known.gmacs <= max_gmacs)
            and (stride is None or stride in known.strides)
            and (necks is None or known.neck in necks)
        )

    if any(limit is not None for limit in (max_params, max_gmacs, stride, necks)):
        names = [name for name in names if fits(facts(source).get(name.partition(".")[0]))]
    return [(name, ModelSource(source)) for name in names] if with_source else names


def get_model_source(model_name: str) -> ModelSource:
    """The hub for ``hf-hub:``, ``hf_hub:`` and ``timm/`` before the name, else the library.

    Raises:
        ValueError: if neither timm nor torchvision has such a model.
    """
    if timm_name(model_name).startswith("hf-hub:"):
        return ModelSource.HF_HUB
    name = model_name.partition(".")[0]
    for source, kind in BACKBONES.items():  # resnet50 is of both: create_backbone creates timm's
        if kind.source_class.has(name):
            return ModelSource(source)
    every = [kind.source_class.names() for kind in BACKBONES.values()]
    one_of("model_name", name, dict.fromkeys(n for names in every for n in names))


def list_hf_hub_backbones(
    author: str = "timm",
    model_name: str | None = None,
    limit: int = 50,
    with_source: bool = False,
) -> list[str] | list[tuple[str, ModelSource]]:
    """List timm's models on the Hugging Face hub, those of the most downloads first.

    Args:
        author: of the models, ``""`` for any.
        model_name: a part of their names.
        limit: the most names to list.
        with_source: give pairs of name and :class:`ModelSource`.

    Returns:
        names for :func:`create_backbone`, ``hf-hub:timm/resnet50.a1_in1k``.

    Raises:
        RuntimeError: if the hub does not answer.
    """
    try:
        with downloading_from_hub("list"):
            found = huggingface_hub.HfApi().list_models(
                filter="timm", author=author or None, search=model_name, sort="downloads",
                limit=limit,
            )  # fmt: skip
            names = [f"hf-hub:{model.id}" for model in found]
    except Exception as error:  # of the hub's client, of HTTP, of the system
        raise RuntimeError(
            f"the Hugging Face hub does not answer ({type(error).__name__}): "
            "list_backbones lists the models of timm without a network"
        ) from error
    return [(name, ModelSource.HF_HUB) for name in names] if with_source else names
