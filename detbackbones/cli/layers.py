"""Find the modules of a model that give feature maps, and those to take as levels.

    detbackbones layers resnet50
    detbackbones layers resnet50 --source torchvision --size 256
    detbackbones layers resnet50 --check "layer4=2048x7x7,layer3"
    detbackbones layers --write

The first two print every module with a 4-D output, grouped by the size of its map: path, channels x
height x width, stride. A * marks the deepest module at each stride; those of stride 4 and above
come last, deepest first, as layers: [...] of TimmBackbone, or return_nodes: [...] of
TorchvisionBackbone. For torchvision there are the nodes of the graph too, with their modes.

--check verifies names, and shapes where they are given: the exit status is 1 if one is wrong, with
a sentence for each that is. --write regenerates docs/LAYERS.md.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from functools import partial

import timm
import torch
from detectron2.modeling import Backbone
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from ..backbones import BACKBONES
from ..backbones.timm_source import TimmSource
from ..measure.stages import (
    Layer,
    deepest_layers,
    find_layers,
    find_stages,
    followed_by_tokens,
)
from .program import checkout, fail, new_parser

SIZE = 224
PAGE = "docs/LAYERS.md"

# The models of docs/LAYERS.md: these in full,
REFERENCE = {
    "ResNet": "resnet18 resnet34 resnet50 resnet101 resnet152",
    "DenseNet": "densenet121 densenet161 densenet169 densenet201",
    "VGG": "vgg16 vgg19",
    "EfficientNet": "efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3",
    "ConvNeXt": "convnext_tiny convnext_small convnext_base convnext_large",
    "MobileNetV3": "mobilenetv3_large_100 mobilenetv3_small_100",
    "RegNet": "regnetx_002 regnetx_008 regnety_002 regnety_008",
}
# and one of every other family of timm.
OTHERS = """
    beit_base_patch16_224 halonet_h1 repvgg_a0 cait_xxs24_224 coat_tiny convit_tiny
    convmixer_768_32 cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny
    davit_tiny deepseek_vit_412m deit_tiny_patch16_224 dla34 dpn48b edgenext_xx_small
    efficientformer_l1 efficientformerv2_s0 efficientvim_m1 efficientvit_b0 efficientvit_m0
    eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m
    ghostnet_100 hardcorenas_a hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t
    inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s
    lowformer_b0 mambaout_femto coatnet_nano_rw_224 poolformerv2_s12 mixer_s16_224 mobilenetv5_base
    mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_gap nasnetalarge nest_tiny nextvit_small
    nf_regnet_b0 pit_ti_224 pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny repghostnet_100
    repvit_m1 res2net50_14w_8s resnest14d resnetv2_18 rexnet_100 selecsls42b legacy_seresnet18
    sequencer2d_s shvit_s1 skresnet18 starnet_s1 swiftformer_xs swin_tiny_patch4_window7_224
    swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_patch16_224 tresnet_m
    twins_svt_small visformer_tiny vit_tiny_patch16_224 vit_tiny_r_s16_p8_224
    vit_relpos_small_patch16_224 samvit_base_patch16_224 vitamin_small_224 volo_d1_224
    ese_vovnet19b_dw legacy_xception xception41 xcit_nano_12_p16_224
"""


def build(source: str, name: str, layers: Sequence[str]) -> Backbone:
    """The backbone of some layers of a model, on the meta device."""
    with torch.device("meta"):
        kind = BACKBONES[source]
        return kind(name, **{kind.source_class.by_name: list(layers)})


def discover(
    source: str, name: str, size: int | None = None
) -> tuple[nn.Module, int, list[Layer], dict[str, tuple[str, str]]]:
    """Build a model on the meta device and find its layers.

    Args:
        source: "timm" or "torchvision".
        name: of the model.
        size: height and width of the images; by default 224, or what the model takes instead.

    Returns:
        the model, the size, the layers, and of torchvision's models the nodes of the graph.

    Raises:
        ValueError: if there is no such model, or it does not take the size.
    """
    kind = BACKBONES[source].source_class
    own = kind(name)
    # built for the size before other ways to it: so the backbone sees which modules give maps
    makers = [own.create, lambda: kind(name, img_size=size or SIZE).create()]
    makers += [partial(own.create, **options) for options in own.size_options[1:]]
    failures = []
    for n in [size] if size else [SIZE, own.native_size]:
        for make in makers:
            try:
                with torch.device("meta"):
                    model = make()
                layers = find_layers(model, (n, n))
                return model, n, layers, kind.graph_nodes(model, (n, n))
            except ValueError as error:
                failures.append(error)
    raise failures[0]


def suggested(model: nn.Module, layers: Sequence[Layer]) -> list[Layer]:
    """The deepest layers from stride 4 on: finer maps are of no use to a detector."""
    deepest = deepest_layers(model, find_stages(model, layers))
    return [layer for layer in deepest if layer.stride >= 4]


def report(source: str, name: str, size: int | None) -> str:
    """What the program prints about a model."""
    model, n, layers, nodes = discover(source, name, size)
    deepest = deepest_layers(model, find_stages(model, layers))
    parts = [f"{name} ({source}), images of {n}x{n}; * is the deepest module at its stride"]
    groups: dict[tuple[int, int], list[Layer]] = {}
    for layer in layers:
        groups.setdefault((layer.height, layer.width), []).append(layer)
    for (height, width), group in groups.items():
        rows = [
            (
                "*" * (layer in deepest),
                layer.name,
                layer.shape,
                f"{'about ' * layer.resampled}{layer.stride}",
                layer.note,
            )
            for layer in group
        ]
        parts += [
            f"{height}x{width}, {len(group)} modules",
            tabulate(rows, ("", "module", "channels x size", "stride", ""), disable_numparse=True),
        ]
    if nodes:
        rows = [(node, *about) for node, about in nodes.items()]
        parts += ["graph nodes", tabulate(rows, ("node", "output", "modes"), disable_numparse=True)]
    names = [layer.name for layer in suggested(model, layers)]
    if not names:
        parts.append("no stage of the model gives one map: leave layers out")
    elif followed_by_tokens(model, names[0], (n, n)):
        parts.append(f"tokens follow {names[0]}: for maps of them leave layers out")
    try:
        if names:
            build(source, name, names)
            parts.append(f"{BACKBONES[source].source_class.by_name}: {json.dumps(names)}")
    except ValueError as error:
        parts.append(f"not to be had as levels: {error}")
    return "\n\n".join(parts)


def check(source: str, name: str, words: str, size: int | None) -> Iterator[str]:
    """Verify names of layers, and shapes where they are given.

    Args:
        source, name, size: as in :func:`discover`.
        words: ``name`` or ``name=CHANNELSxHEIGHTxWIDTH``, with commas between.

    Yields:
        a sentence for each that is wrong; if none is, one for what makes the list unusable.
    """
    _, n, layers, nodes = discover(source, name, size)
    modules = {layer.name: layer.shape for layer in layers if not layer.note}
    shapes = {node: shape for node, (shape, _) in nodes.items()} | modules
    wrong, names = False, []
    for word in words.split(","):
        layer, _, expected = (part.strip() for part in word.partition("="))
        names.append(layer)
        fault = ""
        try:
            if layer not in modules:
                build(source, name, [layer])
        except ValueError as error:
            fault = str(error)
        if not fault and expected and expected != shapes.get(layer):
            given = shapes.get(layer, "no map")
            fault = f"{layer!r} gives {given} for images of {n}x{n}, not {expected}"
        if fault:
            wrong = True
            yield fault
    if not wrong:
        try:
            build(source, name, names)
        except ValueError as error:
            yield str(error)


def section(name: str) -> str:
    """A model of the reference in full: the modules at each stride."""
    model, n, layers, _ = discover("timm", name)
    stages = find_stages(model, layers)
    deepest = deepest_layers(model, stages)
    rows = []
    for last in deepest:
        same = [
            f"**{stage.name}** {stage.channels}"
            if stage is last
            else f"{stage.name} {stage.channels}"
            for stage in stages
            if stage.stride == last.stride
        ]
        rows.append((last.stride, f"{last.height}x{last.width}", ", ".join(same)))
    names = json.dumps([layer.name for layer in suggested(model, layers)])
    table = tabulate(rows, ("stride", f"size at {n}", "modules and their channels"), "pipe")
    return f"### {name}\n\n`layers: {names}`\n\n{table}"


def row(name: str) -> tuple[bool, tuple[str, str, int, str, str]]:
    """A model of another family: whether it goes on with tokens, and its row of a table."""
    model, n, layers, _ = discover("timm", name)
    found = suggested(model, layers)
    tokens = bool(found) and followed_by_tokens(model, found[0].name, (n, n))
    names = json.dumps([layer.name for layer in found])
    return tokens, (
        TimmSource.family(name),
        name,
        n,
        f"`{names}`",
        " ".join(layer.shape for layer in found),
    )


def page() -> str:
    """The text of docs/LAYERS.md."""
    parts = [PAGE_TOP.format(timm=timm.__version__)]
    for title, names in REFERENCE.items():
        parts += [f"## {title}", *(section(name) for name in tqdm(names.split(), desc=title))]
    rows = sorted(map(row, tqdm(OTHERS.split())))
    header = ("family", "model", "image", "layers", "channels x height x width")
    for title, text, tokens in (
        ("Other families", OTHERS_TOP, False),
        ("Families that go on with tokens", TOKENS_TOP, True),
    ):
        lines = [line for follow, line in rows if follow == tokens and line[-1]]
        parts += [f"## {title}", text, tabulate(lines, header, "pipe")]
    without = [f"`{line[1]}` ({line[0]})" for _, line in rows if not line[-1]]
    parts += [f"{WITHOUT_TOP}\n{', '.join(without)}.", ADDING]
    return "\n\n".join(parts) + "\n"


PAGE_TOP = """\
# Layers

`detbackbones layers --write` writes this page; it was measured with timm {timm}.
`TimmBackbone(name)` finds the levels of a model by itself. This is for choosing others, by the
names of timm's modules: `TimmBackbone(name, layers=[...])`. `detbackbones layers NAME` says the
same of any model, module by module.

Listed are the outermost modules that give one map and lower the resolution at most once. **Bold**
is the deepest at its stride: the last to run, or at the coarsest stride the last that has parts
with weights, for a lone convolution or norm after it belongs to the classifier. The line `layers`
has those of stride 4 and above, deepest first. Sizes are of images of 224 x 224, or as given."""

OTHERS_TOP = """\
One model of each, the deepest modules of stride 4 and above. Where the stages themselves give
several tensors (EfficientViM, HRNet), these are what lies around them."""

TOKENS_TOP = """\
What follows these modules are tokens, which `layers` cannot have. `TimmBackbone(name)` makes maps
of them: leave `layers` out."""

WITHOUT_TOP = "No stage of these gives one map; `TimmBackbone(name)` has their levels:"

ADDING = """\
## Adding a new model

```sh
detbackbones layers NAME                                   # its modules, and the list to paste
detbackbones layers NAME --check "LAYER=CHANNELSxROWSxCOLUMNS,LAYER"
detbackbones conformance --source timm --pattern NAME      # the whole contract of a backbone
detbackbones train --config-file finetune/faster_rcnn.py $DATA \\
    model.backbone.bottom_up.model_name=NAME 'model.backbone.bottom_up.layers=[LAYER,LAYER]'
```

`$DATA` stands for the four `dataset.` paths of your data. A model in `REFERENCE` or `OTHERS` of
`detbackbones/cli/layers.py` has a place in this page after `--write`."""


def parse_args(words: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("layers", __doc__)
    parser.add_argument("model", nargs="?", help="a name of timm's or torchvision's")
    parser.add_argument("--source", choices=list(BACKBONES), default="timm")
    parser.add_argument(
        "--size", type=int, help=f"of the images; default: {SIZE}, or what the model takes"
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", metavar="LAYERS", help="name or name=CxHxW, with commas between")
    action.add_argument("--write", action="store_true", help="regenerate docs/LAYERS.md")
    args = parser.parse_args(words)
    if args.write == bool(args.model):
        parser.error("give the name of a model, or --write without one")
    if args.size is not None and args.size < 32:
        parser.error(f"--size {args.size} must be at least 32")
    return args


def main(words: Sequence[str] | None = None) -> None:
    args = parse_args(words)
    warnings.simplefilter("ignore")
    try:
        if args.write:
            (checkout() / PAGE).write_text(page())
        elif args.check is not None:
            faults = list(check(args.source, args.model, args.check, args.size))
            for fault in faults:
                print(f"detbackbones layers: {fault}", file=sys.stderr)
            if faults:
                sys.exit(1)
            print(f"{args.model}: {args.check}: as measured")
        else:
            print(report(args.source, args.model, args.size))
    except (ValueError, OSError) as error:
        fail("layers", error)
