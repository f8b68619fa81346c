"""DINO with 4 scales and 12 epochs of COCO, from a checkout of detrex."""

from pathlib import Path

from detectron2.config import LazyConfig

try:
    import projects.dino.modeling
except ImportError as error:
    if (error.name or "").startswith("detectron2.projects"):
        raise ImportError(
            f"detrex needs {error.name}, which is not in this detectron2: install detectron2 from "
            "its repository, as `detbackbones install-detectron2 --upstream` does"
        ) from error
    raise ImportError(
        "the configs in detrex/ need detrex and its projects/dino, which cannot be imported "
        f"({error}): install detrex from a checkout of https://github.com/IDEA-Research/detrex and "
        "run with PYTHONPATH set to that checkout"
    ) from error

_folder = Path(projects.dino.modeling.__file__).parents[1] / "configs"
_files = [*_folder.glob("**/dino_r50_4scale_12ep.py")]
if not _files:
    raise ImportError(
        f"the configs in detrex/ need dino_r50_4scale_12ep.py, and {_folder} has none"
    )
dataloader, lr_multiplier, model, optimizer, train = LazyConfig.load(
    str(_files[0]), keys=("dataloader", "lr_multiplier", "model", "optimizer", "train")
)
train.init_checkpoint = ""  # the backbone loads its own weights
train.update(device="auto", seed=0)  # detrex has "cuda" and -1
if "device" in model:
    model.device = "${train.device}"
dataloader.evaluator.output_dir = "${train.output_dir}"
