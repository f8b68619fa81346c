"""Reading and writing weights: no pickle is executed, and no file is ever half-written."""

import contextlib
import logging
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from detectron2.checkpoint import DetectionCheckpointer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .feature_backbone import FeatureBackbone
from .messages import nearest

logger = logging.getLogger(__name__)

# Where our configs put a backbone within a detector, and where DDP puts the detector.
_INSTEAD = "give checkpoint_path= a file, train.init_checkpoint= a file, or pretrained=False"
_BACKBONE_KEY = re.compile(r"^(?:module\.)?backbone\.(?:(?:bottom_up|net)\.)?model\.")


def read_state_dict(path: str) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint file.

    Args:
        path: a ``.pth``, ``.pt`` or ``.safetensors`` file: a state dict, or a dict that has one
            under ``model``, ``state_dict`` or the like.

    Returns:
        names to tensors on the CPU, without the ``module.`` that DDP puts before them.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty, truncated, no state dict, or needs pickle.
    """
    file = Path(path)
    if not file.is_file():
        names = [p.name for p in file.parent.glob("*")] if file.parent.is_dir() else []
        raise FileNotFoundError(
            f"checkpoint {path!r} does not exist: in that folder {nearest(file.name, names)}"
        )
    if file.stat().st_size == 0:
        raise ValueError(f"checkpoint {path!r} is empty (0 bytes)")
    try:
        if file.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint {path!r} is damaged or holds Python objects, which are never executed: "
            "save its state dict alone with torch.save(model.state_dict(), path)"
        ) from error
    except (RuntimeError, EOFError, OSError, SafetensorError) as error:
        first_line = str(error).partition("\n")[0]
        raise ValueError(f"checkpoint {path!r} is truncated or damaged: {first_line}") from error
    content = content if isinstance(content, Mapping) else {}
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    tensors = {str(k): v for k, v in content.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise ValueError(f"checkpoint {path!r} holds no state dict")
    return {key.removeprefix("module."): value for key, value in tensors.items()}


def backbone_state_dict(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The backbone's tensors of a detector's state dict, by the source model's own names.

    timm and torchvision load the result into the classification model that the backbone was made
    from (``strict=False``, for the classifier is not in it). Empty if there is no backbone.
    """
    return {_BACKBONE_KEY.sub("", k): v for k, v in state.items() if _BACKBONE_KEY.match(k)}


def export_backbone(checkpoint: str, output: str) -> int:
    """Write the backbone of a trained detector as a checkpoint of timm or torchvision.

    Args:
        checkpoint: a file that the training program wrote.
        output: the ``.safetensors`` or ``.pth`` file to write; it must not exist.

    Returns:
        how many tensors were written.

    Raises:
        FileExistsError: if ``output`` exists.
        ValueError: if there is no backbone in the checkpoint.
    """
    if os.path.exists(output):
        raise FileExistsError(f"output {output!r} exists: choose another name or remove it")
    state = backbone_state_dict(read_state_dict(checkpoint))
    if not state:
        raise ValueError(f"checkpoint {checkpoint!r} has no tensors under backbone...model.")
    state = {key: value.contiguous() for key, value in state.items()}
    with replacing(output) as temporary:
        save_file(state, temporary) if output.endswith(".safetensors") else torch.save(
            state, temporary
        )
    return len(state)


def load_backbone_checkpoint(backbone: FeatureBackbone, path: str) -> None:
    """Load a checkpoint of the source model into a backbone, whole.

    Raises:
        ValueError: if any tensor that the backbone needs is missing or of another shape.
    """
    state = read_state_dict(path)
    state = backbone_state_dict(state) or state
    try:
        loaded, wanting = backbone.load_source(state)
    except ValueError as error:
        raise ValueError(
            f"checkpoint_path={path!r} is not of {backbone.model_name}: {error}"
        ) from error
    if wanting:
        raise ValueError(
            f"checkpoint_path={path!r} is not of {backbone.model_name}: {loaded} of "
            f"{loaded + len(wanting)} tensors fit, and {wanting[0]} is missing or of another shape"
        )
    logger.info("loaded %d tensors of %s from %s", loaded, backbone.model_name, path)


def load_init_checkpoint(model: nn.Module, path: str, *, allow_pickle: bool = False) -> str:
    """Start a detector from weights: its own, or those of its backbone's source model alone.

    Tensors whose name or shape the detector does not have (a classifier, heads for other classes)
    are passed over; the report counts them.

    Args:
        model: a detector, or any module.
        path: see :func:`read_state_dict`; with ``allow_pickle`` also detectron2's ``.pkl`` files
            and model-zoo addresses.
        allow_pickle: let detectron2 read ``.pkl`` files, which can execute any code.

    Returns:
        the report, one line.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is bad or no tensor fits.
    """
    if path.endswith(".pkl") or "://" in path:
        if not allow_pickle:
            raise ValueError(
                f"init_checkpoint={path!r} would be read with pickle, which can execute any code: "
                "set train.allow_pickle=True if you trust it"
            )
        DetectionCheckpointer(model).load(path)
        return f"loaded {path}"
    state = read_state_dict(path)
    own = model.state_dict()
    fit = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    if fit:
        model.load_state_dict(fit, strict=False)
        report = f"loaded {len(fit)} of the detector's {len(own)} tensors"
        skipped = len(state) - len(fit)
    else:
        backbones = [m for m in model.modules() if isinstance(m, FeatureBackbone)]
        source = backbone_state_dict(state) or state
        try:
            loads = [backbone.load_source(source) for backbone in backbones]
        except ValueError as error:
            raise ValueError(f"init_checkpoint={path!r} does not fit: {error}") from error
        loaded, wanting = sum(n for n, _ in loads), sum((w for _, w in loads), [])
        if not loaded:
            raise ValueError(
                f"init_checkpoint={path!r} has {len(state)} tensors ({next(iter(state))}, ...), "
                "and none fits the detector or its backbone"
            )
        report = f"loaded {loaded} of the backbone's {loaded + len(wanting)} tensors"
        skipped = len(state) - loaded
        if wanting:
            report += f" ({wanting[0]} and {len(wanting) - 1} others are wanting)"
    report += f" from {path}; {skipped} of the file's tensors are of no use here"
    logger.info(report)
    return report


@contextlib.contextmanager
def downloading(model_name: str, advice: str = _INSTEAD) -> Iterator[None]:
    """Turn the many errors of a failed download into one sentence, with what to do instead."""
    try:
        yield
    except Exception as error:
        if not _is_network_error(error):
            raise
        raise ConnectionError(
            f"the pretrained weights of {model_name!r} could not be downloaded "
            f"({type(error).__name__}): {advice}"
        ) from error


@contextlib.contextmanager
def downloading_from_hub(model_name: str, advice: str = _INSTEAD) -> Iterator[None]:
    """:func:`downloading`, from the Hugging Face hub if it answers, and else from its cache.

    Without the question each file is tried six times, which takes most of a minute.
    """
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        if not before:
            huggingface_hub.utils.get_session().head(
                huggingface_hub.constants.ENDPOINT,
                timeout=huggingface_hub.constants.DEFAULT_ETAG_TIMEOUT,
            )
    except Exception:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        with downloading(model_name, advice):
            yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


def _is_network_error(error: BaseException | None) -> bool:
    while error is not None:
        package = type(error).__module__.partition(".")[0]
        if isinstance(error, OSError) or package in ("httpx", "httpx2", "requests", "urllib"):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """A temporary name beside ``path`` that becomes it when all is written."""
    temporary = f"{path}.tmp"
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


class Checkpointer(DetectionCheckpointer):
    """detectron2's checkpointer, safe to kill while it saves, and reading without pickle."""

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``{name}.pth`` under a temporary name, rename it, then tag it as the last one."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict(), **kwargs}
        for key, obj in self.checkpointables.items():
            data[key] = obj.state_dict()
        file = os.path.join(self.save_dir, f"{name}.pth")
        with replacing(file) as temporary:
            torch.save(data, temporary)
        self.tag_last_checkpoint(f"{name}.pth")
        logger.info("wrote %s", file)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Name the checkpoint that a resumed run starts from."""
        with replacing(os.path.join(self.save_dir, "last_checkpoint")) as temporary:
            Path(temporary).write_text(last_filename_basename)

    def _load_file(self, filename: str) -> dict[str, Any]:
        return torch.load(filename, map_location="cpu", weights_only=True)
