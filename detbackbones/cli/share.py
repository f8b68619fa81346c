r"""Write a trained detector to a folder that can be put on the Hugging Face hub.

    detbackbones share output/mine --output blood-cells --license apache-2.0 --data "blood cells"
    hf upload USER/blood-cells blood-cells

The folder gets model.safetensors, config.json and README.md, the model card: classes, metrics of
the run, settings, where the backbone's weights are from. Read the card before you upload it. The
detector is used as Predictor("hf-hub:USER/blood-cells").
"""

import sys
from collections.abc import Sequence

from ..deploy.predictor import Predictor
from ..deploy.share import save_pretrained
from ..training.log import without_warnings_of_torch
from .program import fail, new_parser


def main(words: Sequence[str] | None = None) -> None:
    parser = new_parser("share", __doc__)
    add = parser.add_argument
    add("run", help="the folder of a training, or a checkpoint")
    add("--output", required=True, metavar="FOLDER", help="a new folder")
    add("--name", help="of the model; default: the folder's")
    add("--data", metavar="TEXT", help="what it was trained on, for the card")
    add("--license", help="of the model, such as apache-2.0")
    add("--config-file", metavar="FILE", help="of a checkpoint that holds no config")
    add("--trust", action="store_true", help="let a config call code of other packages")
    args = parser.parse_args(words)
    try:
        with without_warnings_of_torch():
            predictor = Predictor(args.run, config=args.config_file, device="cpu", trust=args.trust)
            options = {key: getattr(args, key) for key in ("name", "data", "license")}
            folder = save_pretrained(predictor, args.output, **options)
    except (ValueError, OSError, ImportError) as error:
        fail("share", error)
    for key in ("data", "license"):
        if not getattr(args, key):
            print(f"the card says nothing of --{key}: none was given", file=sys.stderr)
    print(f"wrote {folder}: the weights of {predictor.checkpoint}, config.json and a model card")
