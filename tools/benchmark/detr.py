"""A training step of a detector on transformers beside the model of transformers called directly.

    python tools/benchmark/detr.py --architecture rt_detr_v2 --model resnet18
    python tools/benchmark/detr.py --architecture mask2former --queries 100

Both have the same weights and frozen batch norm, and take the same images, of equal size. The peer
is the model as transformers builds it, on its own timm backbone, and gets padded tensors and labels
that are ready; TransformersDetector, or TransformersSegmenter, gets what a detectron2 loader gives.
A step is: forward pass with losses, backward pass, a step of SGD with a tiny learning rate,
gradients set to None. As in tools/benchmark/backbones.py each round runs both in random order, and
"peer / ours" is the median of the ratios of the rounds: above 1 ours is faster.
"""

import argparse
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from backbones import OURS, WARM_UP, setting, summarise, table
from detbackbones import TimmBackbone, TransformersDetector, TransformersSegmenter
from detbackbones.detr.architectures import EVERY, SEGMENTERS
from detbackbones.detr.images import images_and_mask
from detbackbones.weights import fitting
from detectron2.structures import BitMasks, Boxes, Instances
from torch import nn
from tqdm import tqdm

CLASSES = 80


def batch(count: int, size: tuple[int, int], boxes: int) -> list[dict[str, Any]]:
    """What a loader gives: images of 0 to 255, with boxes in pixels and masks that fill them."""
    height, width = size
    inputs = []
    for _ in range(count):
        corners = torch.rand(boxes, 2, 2).sort(1).values.flatten(1)
        instances = Instances(size)
        instances.gt_boxes = Boxes(corners * torch.tensor([width, height, width, height]))
        instances.gt_classes = torch.randint(0, CLASSES, (boxes,))
        bits = torch.zeros(boxes, *size, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(bits, instances.gt_boxes.tensor.long()):
            mask[top : bottom + 1, left : right + 1] = True
        instances.gt_masks = BitMasks(bits)
        image = torch.randint(0, 256, (3, height, width)).byte()
        inputs.append({"image": image, "instances": instances})
    return inputs


def contestants(args: argparse.Namespace) -> dict[str, tuple[nn.Module, Callable]]:
    """Models by name, each with the function that gives its loss."""
    backbone = TimmBackbone(args.model, norm="FrozenBN")
    kwargs = {"num_queries": args.queries, "num_classes": CLASSES}
    inputs = batch(args.batch, args.size, args.boxes)
    segments = args.architecture in SEGMENTERS
    ours, peer, loss_of_peer = (segmenters if segments else detectors)(
        args, backbone, inputs, kwargs
    )
    made = {OURS: (ours, lambda: sum(ours(inputs).values())), "transformers": (peer, loss_of_peer)}
    losses = []
    for model, loss in made.values():  # the same numbers, or there is nothing to compare
        torch.manual_seed(0)
        losses.append(loss().item() if model.train() else None)
    if abs(losses[0] - losses[1]) > 1e-3 * abs(losses[1]):
        raise ValueError(f"the losses differ: {losses[0]} and {losses[1]}")
    return made


def detectors(
    args: argparse.Namespace, backbone: TimmBackbone, inputs: list[dict], kwargs: dict[str, Any]
) -> tuple[nn.Module, nn.Module, Callable]:
    """Ours, transformers' own with the same weights, and the loss of that."""
    ours = TransformersDetector(architecture=args.architecture, backbone=backbone, **kwargs)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        config = transformers.AutoConfig.from_pretrained(folder)
        if hasattr(config, "freeze_backbone_batch_norms"):
            config.freeze_backbone_batch_norms = True
        peer = transformers.AutoModelForObjectDetection.from_pretrained(folder, config=config)
    images = ours.preprocess_image(inputs)
    labels = ours.prepare_targets(images, [x["instances"] for x in inputs])
    return ours, peer, lambda: peer(**images_and_mask(images), labels=labels).loss


def segmenters(
    args: argparse.Namespace, backbone: TimmBackbone, inputs: list[dict], kwargs: dict[str, Any]
) -> tuple[nn.Module, nn.Module, Callable]:
    """The same of a segmenter, whose peer takes the true masks as floats."""
    ours = TransformersSegmenter(architecture=args.architecture, backbone=backbone, **kwargs)
    indices = [backbone.indices[name] for name in ours.in_features]
    settings = ours.model.config.to_dict()
    settings["backbone_config"] = transformers.TimmBackboneConfig(
        backbone=args.model, out_indices=indices, freeze_batch_norm_2d=True
    )
    peer = type(ours.model)(type(ours.model.config).from_dict(settings))
    peer.load_state_dict(ours.model.state_dict(), strict=False)
    encoder = peer.model.pixel_level_module.encoder._backbone
    own = encoder.state_dict()
    encoder.load_state_dict(fitting(backbone.model.state_dict(), own), strict=False)
    images = ours.preprocess_image(inputs)
    truth = [ours.prepare_targets(x, images.tensor.shape[-2:]) for x in inputs]
    classes, masks = [c for c, _ in truth], [m.float() for _, m in truth]
    return (
        ours,
        peer,
        lambda: peer(pixel_values=images.tensor, mask_labels=masks, class_labels=classes).loss,
    )


def measure(made: dict[str, tuple[nn.Module, Callable]], rounds: int) -> list[dict[str, Any]]:
    """Seconds of each round, as ``backbones.summarise`` takes them."""
    rows = [{"mode": "train", "contestant": label, "seconds": []} for label in made]
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-6) for model, _ in made.values()]
    for count in tqdm(range(-WARM_UP, rounds), unit="round"):
        for (_, loss), optimizer, row in random.sample(
            [*zip(made.values(), optimizers, rows)], len(made)
        ):
            start = time.perf_counter()
            loss().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if count >= 0:
                row["seconds"].append(time.perf_counter() - start)
    return rows


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    # those on their own kind of ViT cannot be built by transformers on the same backbone
    names = [name for name, wanted in EVERY.items() if not wanted.vit]
    add("--architecture", choices=names, default="rt_detr_v2", help="default: %(default)s")
    add("--model", default="resnet18", help="of timm; default: %(default)s")
    add("--size", type=int, nargs=2, default=[384, 384], metavar=("H", "W"))
    add("--batch", type=int, default=2, help="images in a step; default: %(default)s")
    add("--boxes", type=int, default=8, help="in an image; default: %(default)s")
    add("--queries", type=int, default=300, help="default: %(default)s")
    add("--threads", type=int, default=2, help="of the CPU; default: %(default)s")
    add("--rounds", type=int, default=15, help="default: %(default)s")
    same = {"norm": "FrozenBN", "freeze_at": 0, "device": "cpu"}
    parser.set_defaults(
        **same, amp=False, options_off=False, grad_checkpointing=False, compile=False
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    random.seed(0)
    try:
        made = contestants(args)
    except ValueError as error:
        print(f"detr: {error}", file=sys.stderr)
        sys.exit(2)
    rows = measure(made, args.rounds)
    for row in rows:
        row["model"] = f"{args.architecture} on {args.model}"
    print(setting(args), end="\n\n")
    print(table(summarise(rows), {}))


if __name__ == "__main__":
    main()
