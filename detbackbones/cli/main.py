"""The program `detbackbones`, which imports the file of a command when that is called.

Nothing here needs detectron2 or torch, which may not be installed yet.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import _MISSING
from ..messages import nearest
from .program import fail

COMMANDS = {
    "data": "check, convert or split a data set",
    "train": "train a detector from a config",
    "eval": "evaluate a trained detector",
    "predict": "predict what is in images and videos",
    "export": "export a detector or a backbone to ONNX, OpenVINO, TorchScript or .pt2",
    "share": "write a trained detector to a folder for the Hugging Face hub",
    "list": "list backbones with their size, levels and weights",
    "layers": "find the modules of a model that can be levels",
    "distill": "teach a backbone to give the feature maps of another",
    "probe": "compare frozen backbones by a head for semantic segmentation",
    "backbone": "save a detector's backbone for timm or torchvision",
    "conformance": "check that models work as backbones",
    "install-detectron2": "install detectron2, which is not on the package index",
}
HELP = (
    "usage: detbackbones COMMAND ...\n\n"
    "Any timm or torchvision model as a detectron2 backbone.\n\n"
    + "".join(f"  {name:20}{line}\n" for name, line in COMMANDS.items())
    + "\n`detbackbones COMMAND --help` says more of a command, with an example."
)


def main(words: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        words: the command and its arguments; by default those that the program was called with.
    """
    words = list(sys.argv[1:] if words is None else words)
    if not words or words[0] in ("-h", "--help"):
        print(HELP, file=sys.stdout if words else sys.stderr)
        sys.exit(0 if words else 2)
    command = words[0]
    if command not in COMMANDS:
        near = nearest(command, COMMANDS, most=0)
        fail("", f"command={command!r} is unknown: {near}; detbackbones --help lists all")
    if _MISSING and command != "install-detectron2":
        fail(command, _MISSING)
    module = import_module(f".{command.replace('-', '_')}", __package__)
    try:
        module.main(words[1:])
    except BrokenPipeError:  # whoever read what is printed has had enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
