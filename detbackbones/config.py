"""Configs: the LazyConfigs that come with the package, and the yacs keys."""

from collections.abc import Collection, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, LazyConfig
from omegaconf import DictConfig, OmegaConf, SCMode

from .messages import nearest
from .untrusted import read_yaml


def config_folder() -> Path:
    """The folder of the configs: inside an installed package, beside it in a checkout."""
    package = Path(str(files("detbackbones")))
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def list_configs() -> list[str]:
    """Names of all configs that can be trained, as :func:`get_config` takes them."""
    folder = config_folder()
    names = (path.relative_to(folder).as_posix() for path in folder.glob("*/*.py"))
    return sorted(name for name in names if not name.startswith("common/"))


def get_config(name: str) -> DictConfig:
    """Load a config that comes with the package.

    Args:
        name: such as ``"mask_rcnn/timm_r50_fpn_1x.py"``, see :func:`list_configs`.

    Raises:
        FileNotFoundError: if there is none of that name.
    """
    path = config_folder() / name
    if not path.is_file():
        raise FileNotFoundError(f"there is no config {name!r}: {nearest(name, list_configs())}")
    return LazyConfig.load(str(path))


def load_config(file: str | Path, *, trust: bool = False) -> DictConfig:
    """Load a config from a file.

    A Python file is a program, which is run. Of a YAML file that is not trusted no tag is executed,
    and it may call what defines detectors, data and optimizers alone.

    Args:
        file: a ``.py`` LazyConfig, or a ``.yaml`` file such as a run's ``config.yaml``.
        trust: whether a YAML file may call anything.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it is no config, or must be trusted.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"config {str(file)!r} does not exist")
    if file.suffix in (".yaml", ".yml"):
        return OmegaConf.create(read_yaml(file, trust=trust), flags={"allow_objects": True})
    return LazyConfig.load(str(file))


def find_config(name: str) -> Path:
    """The file of a config: one of the user's by its path, or else the package's by its name.

    Args:
        name: such as ``"mine/detector.py"`` or ``"finetune/faster_rcnn.py"``.

    Raises:
        FileNotFoundError: if there is neither; names the nearest of both.
    """
    for path in (Path(name), config_folder() / name):
        if path.is_file():
            return path
    folder = Path(name).parent
    files = [path.name for path in folder.glob("*") if path.suffix in (".py", ".yaml")]
    near = f"of the configs of the package {nearest(name, list_configs())}"
    if files:
        near = f"of the files in {folder} {nearest(Path(name).name, files, most=0)}; {near}"
    raise FileNotFoundError(f"{name} does not exist: {near}")


def add_backbone_config(cfg: CfgNode) -> None:
    """Add the keys of the backbones and of TransformersDetector to a yacs config.

    The input becomes RGB with ImageNet's mean and standard deviation, for that is what the weights
    of timm and torchvision expect (detectron2's default is BGR).

    Args:
        cfg: detectron2's config; changed in place.
    """
    cfg.MODEL.TIMM = CfgNode()
    cfg.MODEL.TIMM.MODEL_NAME = "resnet50"
    cfg.MODEL.TIMM.PRETRAINED = False
    cfg.MODEL.TIMM.CHECKPOINT_PATH = ""
    cfg.MODEL.TIMM.OUT_FEATURES = []
    cfg.MODEL.TIMM.NORM = "FrozenBN"
    cfg.MODEL.TIMM.OUTPUT_STRIDE = 0
    cfg.MODEL.TIMM.IMG_SIZE = 0
    cfg.MODEL.TIMM.PATCH_SIZE = 0
    cfg.MODEL.TIMM.DROP_PATH_RATE = 0.0
    cfg.MODEL.TIMM.GRAD_CHECKPOINTING = False
    cfg.MODEL.TORCHVISION = CfgNode()
    cfg.MODEL.TORCHVISION.MODEL_NAME = "resnet50"
    cfg.MODEL.TORCHVISION.WEIGHTS = ""
    cfg.MODEL.TORCHVISION.OUT_FEATURES = []
    cfg.MODEL.TORCHVISION.NORM = "FrozenBN"
    cfg.MODEL.TORCHVISION.GRAD_CHECKPOINTING = False
    cfg.MODEL.DETR = CfgNode()
    cfg.MODEL.DETR.ARCHITECTURE = "rt_detr_v2"
    cfg.MODEL.DETR.NUM_CLASSES = 80
    cfg.MODEL.DETR.NUM_QUERIES = 300
    cfg.MODEL.DETR.PRETRAINED_DETECTOR = ""
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
    cfg.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]


def check_model_kwargs(model_kwargs: Mapping[str, Any], own: Collection[str]) -> None:
    """Refuse arguments for a model that are arguments of the backbone.

    Args:
        model_kwargs: what the user gave.
        own: names of arguments of the backbone.

    Raises:
        ValueError: if there is one.
    """
    for key in own:
        if key in model_kwargs:
            raise ValueError(
                f"model_kwargs={dict(model_kwargs)} must not have {key!r}: give {key}= itself"
            )


def plain_dict(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """Keyword arguments as a dict of its own, with plain lists and dicts where a config had its."""
    if OmegaConf.is_config(arguments):
        return OmegaConf.to_container(arguments, resolve=True)
    return dict(arguments or {})


NO_WEIGHTS = {"pretrained": False, "weights": None, "checkpoint_path": ""}


def without_weights(config: Any) -> Any:
    """A plain copy of a config that neither fetches nor reads weights.

    Args:
        config: of a backbone, with others in it such as ``bottom_up``; its interpolations are
            resolved. A TorchvisionBackbone keeps the name of its weights, for some of them ask for
            another model (a ViT for other images, an Inception that transforms its input).
    """
    if OmegaConf.is_config(config):
        config = OmegaConf.to_container(
            config, resolve=True, structured_config_mode=SCMode.INSTANTIATE
        )
    if isinstance(config, list):
        return [without_weights(value) for value in config]
    if not isinstance(config, dict):
        return config
    none = NO_WEIGHTS if "_target_" in config else {}
    plain = {k: none[k] if k in none else without_weights(v) for k, v in config.items()}
    target = config.get("_target_")
    if str(getattr(target, "__name__", target)).endswith("TorchvisionBackbone"):
        plain |= {"weights": config.get("weights"), "pretrained": False}
    return plain
