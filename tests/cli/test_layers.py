"""Layer discovery: measured facts, suggestions that work, refusals, and the page that it writes."""

import re

import pytest
import timm
import torch
from detbackbones import TimmBackbone
from detbackbones.backbones.timm_source import TimmSource
from detbackbones.cli import layers as layers_command
from detbackbones.measure.stages import deepest_layers, find_layers, find_stages
from support import ROOT, run_main
from torch import nn

# At 224 pixels. Lists in circulation are not always the deepest module of each stride.
FACTS = {
    "resnet50": "layer4=2048x7x7,layer3=1024x14x14,layer2=512x28x28,layer1=256x56x56",
    "densenet121": "features.denseblock4=1024x7x7,features.denseblock3=1024x14x14,"
    "features.denseblock2=512x28x28,features.denseblock1=256x56x56",
    "vgg16": "features.30=512x7x7,features.23=512x14x14,features.16=256x28x28,features.9=128x56x56",
    "vgg19": "features.36=512x7x7,features.27=512x14x14,features.18=256x28x28,features.9=128x56x56",
    "efficientnet_b0": "blocks.6=320x7x7,blocks.5=192x7x7,blocks.4=112x14x14,blocks.3=80x14x14,"
    "blocks.2=40x28x28,blocks.1=24x56x56",
    "convnext_tiny": "stages.3=768x7x7,stages.2=384x14x14,stages.1=192x28x28,stages.0=96x56x56",
    "mobilenetv3_large_100": "blocks.6=960x7x7,blocks.5=160x7x7,blocks.3=80x14x14,"
    "blocks.1=24x56x56",
    "mobilenetv3_small_100": "blocks.5=576x7x7,blocks.4=96x7x7,blocks.2=40x14x14,"
    "blocks.1=24x28x28,blocks.0=16x56x56",
    "regnetx_002": "s4=368x7x7,s3=152x14x14,s2=56x28x28,s1=24x56x56",
}

# model, the deepest of each stride from 4 on, deepest first, with channels x height x width
DEEPEST = [
    ("resnet50", FACTS["resnet50"]),
    ("densenet121", FACTS["densenet121"]),
    ("convnext_tiny", FACTS["convnext_tiny"]),
    ("regnetx_002", FACTS["regnetx_002"]),
    (
        "vgg16",
        "features.30=512x7x7,features.29=512x14x14,features.22=512x28x28,features.15=256x56x56",
    ),
    ("efficientnet_b0", "blocks.6=320x7x7,blocks.4=112x14x14,blocks.2=40x28x28,blocks.1=24x56x56"),
    (
        "mobilenetv3_large_100",
        "blocks.6=960x7x7,blocks.4=112x14x14,blocks.2=40x28x28,blocks.1=24x56x56",
    ),
    # (N, H, W, C)
    (
        "swin_tiny_patch4_window7_224",
        "layers.3=768x7x7,layers.2=384x14x14,layers.1=192x28x28,layers.0=96x56x56",
    ),
    # coarser maps inside the stages, of an attention to fewer keys
    ("pvt_v2_b0", "stages.3=256x7x7,stages.2=160x14x14,stages.1=64x28x28,stages.0=32x56x56"),
    # the last stage gives tokens
    ("efficientformer_l1", "stages.2=224x14x14,stages.1=96x28x28,stages.0=48x56x56"),
    # attentions of 49x49 in windows of a square image
    (
        "efficientformerv2_s0",
        "stages.3=176x7x7,stages.2=96x14x14,stages.1=48x28x28,stages.0=32x56x56",
    ),
    # an nn.Sequential of two strides is no stage
    ("selecsls42b", "head.3=1024x4x4,head.1=1024x7x7,from_seq=480x14x14"),
]


def shapes(layers):
    return ",".join(f"{layer.name}={layer.shape}" for layer in layers)


@pytest.mark.parametrize("name", FACTS)
def test_facts(name):
    assert list(layers_command.check("timm", name, FACTS[name], 224)) == []


@pytest.mark.parametrize("name, expected", DEEPEST)
def test_what_is_suggested_works(name, expected):
    model, size, layers, _ = layers_command.discover("timm", name)
    found = layers_command.suggested(model, layers)
    assert (size, shapes(found)) == (224, expected)
    with torch.device("meta"):
        backbone = TimmBackbone(name, layers=[layer.name for layer in found])
    measured = {n: (s.channels, s.stride) for n, s in backbone.output_shape().items()}
    assert measured == {layer.name: (layer.channels, layer.stride) for layer in found}


@pytest.mark.parametrize("size", [33, 65, 100, 223])
def test_strides_do_not_depend_on_the_size(size):
    model, _, layers, _ = layers_command.discover("timm", "resnet18", size)
    found = layers_command.suggested(model, layers)
    assert [(layer.name, layer.stride) for layer in found] == [
        ("layer4", 32),
        ("layer3", 16),
        ("layer2", 8),
        ("layer1", 4),
    ]
    assert not any(layer.resampled for layer in layers)
    assert found[0].height == -(-size // 32)


def test_a_size_that_hides_the_strides_is_refused():
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=250)
    with pytest.raises(ValueError, match="size=250x250 must be a multiple of 32 for the strides"):
        find_layers(model, (250, 250))


@pytest.mark.parametrize(
    "name, size",
    [
        ("hiera_tiny_224", None),
        ("cait_xxs24_224", None),
        ("vit_tiny_r_s16_p8_224", None),
        ("vit_tiny_patch16_224", 256),
    ],
)
def test_tokens_are_no_layers(name, size):
    model, n, layers, _ = layers_command.discover("timm", name, size)
    assert (n, layers_command.suggested(model, layers)) == (size or 224, [])


class Net(nn.Module):
    """A shared activation, a module that gives two maps, and one whose map has channels last."""

    class Two(nn.Conv2d):
        def forward(self, x):
            return super().forward(x), x

    class Last(nn.Conv2d):
        def forward(self, x):
            return super().forward(x).permute(0, 2, 3, 1)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 4, 4)
        self.act = nn.ReLU(inplace=True)
        self.two = Net.Two(4, 6, 2, 2)
        self.last = Net.Last(6, 8, 2, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        x = self.act(self.two(self.act(self.stem(x)))[0])
        return self.pool(self.last(x))


def test_a_model_of_ones_own():
    model = Net().train()
    layers = find_layers(model, (64, 96), in_channels=1)
    assert [
        (layer.name, layer.shape, layer.stride, layer.layout, layer.note) for layer in layers
    ] == [
        ("stem", "4x16x24", 4, "NCHW", ""),
        ("act", "4x16x24", 4, "NCHW", "runs 2 times"),
        ("two", "6x8x12", 8, "NCHW", "one of 2 tensors"),
        ("two", "4x16x24", 4, "NCHW", "one of 2 tensors"),
        ("act", "6x8x12", 8, "NCHW", "runs 2 times"),
        ("last", "8x4x6", 16, "NHWC", ""),
    ]
    assert shapes(deepest_layers(model, find_stages(model, layers))) == "last=8x4x6,stem=4x16x24"
    assert model.training and not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="size=2x2 does not suit Net: "):
        find_layers(model, (2, 2), in_channels=1)


@pytest.mark.parametrize(
    "words, status, sentences",
    [
        (["resnet18", "--check", "layer4, layer3 = 256x14x14"], 0, []),
        (
            ["resnet18", "--check", "layer5,layer4=512x8x8,fc,layer3"],
            1,
            [
                "layers='layer5' is unknown: the nearest are 'layer4', 'layer3', 'layer2'",
                "'layer4' gives 512x7x7 for images of 224x224, not 512x8x8",
                "layers='fc' gives (2, 1000), not one feature map",
            ],
        ),
        (["resnet18", "--check", "layer4,layer4"], 1, ["must be a list of different names"]),
        (["resnet18", "--check", "layer1,layer1.1.bn2"], 1, ["overwritten by an in-place"]),
        (
            ["hrnet_w18_small", "--check", "stage2"],
            1,
            ["layers='stage2' gives (2, 16, 56, 56) and (2, 32, 28, 28), not one feature map"],
        ),
        (
            ["resnet18", "--source", "torchvision", "--check", "layer4=512x7x7,layer1.0.relu_1"],
            0,
            [],
        ),
        (
            ["resnet18", "--source", "torchvision", "--check", "layer1.0.relu_1=64x7x7,layer5"],
            1,
            ["'layer1.0.relu_1' gives 64x56x56", "return_nodes='layer5' is unknown"],
        ),
        (
            ["resnet18", "--source", "torchvision", "--size", "100", "--check"]
            + ["layer4.1.relu_1=512x4x4,layer3"],
            0,
            [],
        ),
        (
            ["inception_v3", "--source", "torchvision", "--check", "Mixed_5b.cat=256x35x35"],
            0,
            [],
        ),
        (
            ["regnet_y_400mf", "--source", "torchvision", "--check"]
            + ["trunk_output.block4=440x7x7,trunk_output.block3=208x14x14"],
            0,
            [],
        ),
        (
            ["inception_v3", "--source", "torchvision", "--size", "224"],
            2,
            ["size=224x224 does not suit Inception3 in train mode: "],
        ),
        (
            ["vit_b_16", "--source", "torchvision", "--size", "100"],
            2,
            ["size=100x100 does not suit VisionTransformer: Wrong image height! Expected 224"],
        ),
        (["resnet", "--check", "layer4"], 2, ["model_name='resnet' is no timm model: the nearest"]),
        (
            ["resnet", "--source", "torchvision"],
            2,
            ["model_name='resnet' is no torchvision classifier: the nearest"],
        ),
        (["alexnet"], 2, ["'alexnet' is no timm model: it is one of torchvision"]),
        ([], 2, ["give the name of a model, or --write without one"]),
        (["resnet18", "--size", "8"], 2, ["--size 8 must be at least 32"]),
    ],
)
def test_program(capsys, words, status, sentences):
    assert run_main(layers_command, *words) == status
    err = capsys.readouterr().err
    assert [sentence for sentence in sentences if sentence not in err] == []
    assert bool(err) == bool(status)


def test_report(capsys):
    assert run_main(layers_command, "resnet18", "--size", "64") == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "* layer4 512x2x2 32" in lines and "layer4.1.act2 512x2x2 32" in lines
    assert "32x32, 3 modules" in lines and "* act1 64x32x32 2" in lines
    assert lines[-1] == 'layers: ["layer4", "layer3", "layer2", "layer1"]'


def test_report_of_torchvision(capsys):
    assert run_main(layers_command, "googlenet", "--source", "torchvision") == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "* inception5b 1024x7x7 32" in lines
    assert "inception5b.cat 1024x7x7 train, eval" in lines
    assert "aux1.conv.conv 128x4x4 train" in lines
    assert lines[-1] == 'return_nodes: ["inception5b", "inception4e", "inception3b", "conv3"]'


@pytest.fixture(scope="module")
def page():
    return (ROOT / layers_command.PAGE).read_text()


def test_page_has_every_model(page):
    names = " ".join(layers_command.REFERENCE.values()).split()
    assert [line[4:] for line in page.splitlines() if line.startswith("### ")] == names
    assert [n for n in layers_command.OTHERS.split() if not re.search(f"[ `]{n}[ `]", page)] == []
    families = {TimmSource.family(name) for name in timm.list_models()}
    assert set(map(TimmSource.family, names + layers_command.OTHERS.split())) == families


def test_page_has_the_texts(page):
    top = layers_command.PAGE_TOP.format(timm=timm.__version__)
    others = (layers_command.OTHERS_TOP, layers_command.TOKENS_TOP, layers_command.WITHOUT_TOP)
    assert [text for text in (top, *others, layers_command.ADDING) if text not in page] == []


@pytest.mark.parametrize("title", layers_command.REFERENCE)
def test_page_is_what_the_code_says(title, page):
    name = layers_command.REFERENCE[title].split()[0]
    assert f"{layers_command.section(name)}\n" in page


@pytest.mark.parametrize("name", layers_command.OTHERS.split()[3::11])
def test_rows_are_what_the_code_says(name, page):
    _, row = layers_command.row(name)
    if row[-1]:
        lines = [" ".join(line.split()) for line in page.splitlines()]
        assert f"| {' | '.join(map(str, row))} |" in lines
    else:
        assert f"`{name}` ({row[0]})" in page
