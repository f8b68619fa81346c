"""Train or evaluate a detector: `detbackbones train`, where users of detectron2 look for it.

    python tools/train_net.py --config-file configs/finetune/faster_rcnn.py key=value ...

All its options are those of `detbackbones train`.
"""

from detbackbones.cli.train import main

if __name__ == "__main__":
    main()
