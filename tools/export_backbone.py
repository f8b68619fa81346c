"""Write the backbone of a trained detector as a checkpoint of timm or torchvision.

    python tools/export_backbone.py output/model_final.pth backbone.safetensors

The result loads through checkpoint_path= or train.init_checkpoint= of another detector, and into
the classification model itself with strict=False (it has no classifier).
"""

import argparse
import sys

from detbackbones.checkpoint import export_backbone


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a checkpoint that tools/train_net.py wrote")
    parser.add_argument("output", help="the .safetensors or .pth file to write")
    args = parser.parse_args()
    try:
        count = export_backbone(args.checkpoint, args.output)
    except (ValueError, OSError) as error:
        print(f"export_backbone: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {count} tensors to {args.output}")


if __name__ == "__main__":
    main()
