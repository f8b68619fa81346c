"""Save the backbone of a trained detector as a checkpoint of timm or torchvision.

    detbackbones backbone output/mine/model_final.pth backbone.safetensors

The result loads through checkpoint_path= or train.init_checkpoint= of another detector, and into
the classification model itself with strict=False (it has no classifier).
"""

from collections.abc import Sequence

from ..weights import export_backbone
from .program import fail, new_parser


def main(words: Sequence[str] | None = None) -> None:
    parser = new_parser("backbone", __doc__)
    parser.add_argument("checkpoint", help="a checkpoint that detbackbones train wrote")
    parser.add_argument("output", help="the .safetensors or .pth file to write")
    args = parser.parse_args(words)
    try:
        count = export_backbone(args.checkpoint, args.output)
    except (ValueError, OSError) as error:
        fail("backbone", error)
    print(
        f"wrote {count} tensors to {args.output}: load them with strict=False into the "
        "classification model, or by checkpoint_path= into a backbone"
    )
