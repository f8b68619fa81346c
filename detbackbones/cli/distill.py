r"""Teach a backbone to give the feature maps of another, from images alone.

    detbackbones distill tf_efficientnet_lite0 vit_tiny_patch16_224 images --output output/vit
    detbackbones train --data FOLDER model.backbone.bottom_up.model_name=vit_tiny_patch16_224 \
        model.backbone.bottom_up.final_norm=True \
        model.backbone.bottom_up.checkpoint_path=output/vit/student.safetensors

Both are names of timm; the teacher has its pretrained weights. The images are a folder, a pattern,
or a text file of paths; each tenth is for validation, where the similarity of the maps is told. A
ViT gives and learns its maps through the norm behind its last block, where it has one (final_norm).
The output folder gets student.safetensors, with timm's names, and what `detbackbones train` writes.
key=value words override configs/distill/features.py: train.max_iter=5000 dataset.size=320.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from detectron2.utils import comm
from omegaconf import DictConfig

from ..backbones.timm_source import TimmSource
from ..training.output import reserved
from ..weights.export import export_backbone
from . import train
from .launch import add_arguments, start
from .program import new_parser

STUDENT = "student.safetensors"


def work(command: str, cfg: DictConfig, resume: bool) -> None:
    """What each process does: the training, and then the main one writes the student."""
    train.work(command, cfg, resume)
    if comm.is_main_process():
        folder = Path(cfg.train.output_dir)
        (folder / STUDENT).unlink(missing_ok=True)
        export_backbone(str(folder / "model_final.pth"), str(folder / STUDENT))
        print(f"wrote {folder / STUDENT}")


def _has_norm(model_name: str) -> bool:
    """Whether there is a norm behind the last block, that a pretrained ViT has learned through."""
    try:
        TimmSource(model_name, final_norm=True)
    except ValueError:  # other mistakes are found later
        return False
    return True


def main(words: Sequence[str] | None = None) -> None:
    parser = new_parser("distill", __doc__)
    add = parser.add_argument
    add("teacher", metavar="TEACHER", help="a model of timm, with its pretrained weights")
    add("student", metavar="STUDENT", help="a model of timm")
    add("images", metavar="FOLDER", help="of images, a pattern, or a text file of their paths")
    add("--output", required=True, metavar="FOLDER")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue the run in the folder")
    existing.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    add_arguments(parser)
    parser.set_defaults(config_file="distill/features.py")
    args = parser.parse_intermixed_args(words)
    args.opts = [
        f"model.teacher.model_name={args.teacher}",
        f"model.backbone.model_name={args.student}",
        f"model.teacher.final_norm={_has_norm(args.teacher)}",
        f"model.backbone.final_norm={_has_norm(args.student)}",
        f"dataset.images={args.images}",
        f"train.output_dir={args.output}",
        *args.opts,
    ]
    during = partial(reserved, resume=args.resume, overwrite=args.overwrite)
    start("distill", args, work, during, resume=args.resume)
