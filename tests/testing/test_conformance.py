"""The conformance program: every family keeps the contract, and what breaks it is noticed."""

import dataclasses
import json
import os
import re
import signal
import time

import pytest
import timm
import torch
from detbackbones import TimmBackbone
from detbackbones.cli import conformance
from detbackbones.testing import contract
from detbackbones.testing.page import page as models_page
from detbackbones.testing.run import run_contract
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

# Of each family the architecture with the fewest parameters.
SMALLEST = {
    "timm": """
    beit_base_patch16_224 halonet_h1 test_byobnet cait_xxs24_224 coat_tiny convit_tiny
    convmixer_768_32 test_convnext cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s
    cspnext_tiny davit_tiny deepseek_vit_412m deit_tiny_patch16_224 densenet121 dla46x_c dpn48b
    edgenext_xx_small efficientformer_l1 efficientformerv2_s0 test_efficientnet efficientvim_m1
    efficientvit_b0 efficientvit_m0 vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8
    focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050 hardcorenas_b hgnetv2_b0
    hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t inception_next_atto
    inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s lowformer_b0
    test_mambaout test_coatnet poolformerv2_s12 gmlp_ti16_224 mobilenetv3_small_050
    mobilenetv5_base mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_parfac_gap nasnetalarge
    nest_tiny nextvit_small test_nfnet pit_ti_224 pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny
    regnetx_002 repghostnet_050 repvit_m1 res2next50 resnest14d test_resnet resnetv2_18 rexnet_100
    selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs
    swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224
    tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny test_vit
    vit_tiny_r_s16_p8_224 test_vit_relpos samvit_base_patch16_224 vitamin_small_224 volo_d1_224
    ese_vovnet19b_slim_dw legacy_xception xception41p xcit_nano_12_p8_224
    """.split(),
    "torchvision": """
    alexnet convnext_tiny densenet121 efficientnet_b0 googlenet inception_v3 maxvit_t mnasnet0_5
    mobilenet_v2 mobilenet_v3_small regnet_y_400mf resnet18 shufflenet_v2_x0_5 squeezenet1_1 swin_t
    vgg11 vit_b_16
    """.split(),
}
MAX_PARAMS = 12  # millions, for real numbers


@pytest.mark.parametrize("source", SMALLEST)
def test_table_has_one_of_each_family(source):
    family = contract.SUBJECTS[source].source.family
    families = {family(name) for name in contract.SUBJECTS[source].names()}
    assert sorted(map(family, SMALLEST[source])) == sorted(families)


@pytest.fixture(scope="module")
def rows(request):
    """Rows of the report, by name, of all models whose tests are to run: two at a time."""
    models = [
        (item.callspec.params["source"], item.callspec.params["name"])
        for item in request.session.items
        if item.originalname == "test_each_family_keeps_the_contract"
    ]
    todo = [contract.new_row(*model) for model in models]
    done = list(run_contract(todo, jobs=2, time_limit=900, max_params=MAX_PARAMS))
    return {(row["source"], row["name"]): row for row in done}


QUICK = "test_resnet test_efficientnet test_vit levit_128s shufflenet_v2_x0_5 squeezenet1_1".split()


@pytest.mark.parametrize(
    "source, name",
    [
        pytest.param(source, name, marks=() if name in QUICK else pytest.mark.slow)
        for source, names in SMALLEST.items()
        for name in names
    ],
)
def test_each_family_keeps_the_contract(source, name, rows):
    row = rows[source, name]
    assert not contract.failures(row)
    assert "skipped" not in row["points"].values() or row["parameters"] > MAX_PARAMS * 1e6


@pytest.fixture
def use(monkeypatch):
    """Make the program's source "timm" build another backbone, of the models that are named."""

    def change(build, *names):
        source = dataclasses.replace(
            contract.SUBJECTS["timm"], build=build, names=lambda: list(names)
        )
        monkeypatch.setitem(contract.SUBJECTS, "timm", source)

    return change


def outputs(change):
    """A wrong backbone: the right one with its dictionary of outputs changed."""

    def wrong(name, **kwargs):
        backbone = TimmBackbone(name, **kwargs)
        forward = backbone.forward
        backbone.forward = lambda x: change(forward(x))
        return backbone

    return wrong


def attributes(**values):
    """A wrong backbone: the right one, of a class with other attributes."""
    return lambda name, **kwargs: type("Wrong", (TimmBackbone,), values)(name, **kwargs)


def channels_off_by_one(name, **kwargs):
    backbone = TimmBackbone(name, **kwargs)
    backbone._out_feature_channels["res3"] += 1
    return backbone


def leftover_classifier(name, **kwargs):
    backbone = TimmBackbone(name, **kwargs)
    backbone.model.classifier = nn.Linear(8, 8)
    return backbone


def leftover_frozen(name, **kwargs):
    backbone = leftover_classifier(name, **kwargs)
    backbone.model.classifier.requires_grad_(False)
    return backbone


def later_stages_built(name, out_features=None, **kwargs):
    whole = TimmBackbone(name, **kwargs)
    forward = whole.forward
    whole.forward = lambda x: {
        k: v for k, v in forward(x).items() if out_features is None or k in out_features
    }
    return whole


def dropped_activation(name, norm="", **kwargs):
    backbone = TimmBackbone(name, **kwargs)
    if norm == "FrozenBN":
        backbone.model = FrozenBatchNorm2d.convert_frozen_batchnorm(backbone.model)
    return backbone


def statistics_that_move(name, norm="", **kwargs):
    return TimmBackbone(name, **kwargs)


def affine_that_learns(name, norm="", **kwargs):
    backbone = TimmBackbone(name, **kwargs)
    train = backbone.train
    backbone.train = lambda mode=True: train(False) if norm else train(mode)
    return backbone


def refuses(name, **kwargs):
    raise ValueError(f"model_name={name!r} has no feature maps")


def breaks(name, **kwargs):
    raise RuntimeError("broken\nin two lines")


WRONG = [
    (refuses, "build", r"refused: model_name='test_efficientnet' has no feature maps"),
    (breaks, "build", r"RuntimeError: broken"),
    (attributes(size_divisibility=1), "sizes", r".+"),
    (attributes(img_size=224), "sizes", r"img_size=224, but larger images are taken"),
    (channels_off_by_one, "shapes", r"res3 has shape \(2, 32, .* declared is \(2, 33, "),
    (
        outputs(lambda levels: {k: v.permute(0, 2, 3, 1) for k, v in levels.items()}),
        "shapes",
        r"res2 has shape \(2, 64, 88, 24\) .*256x352, declared is \(2, 24, 64, 88\)",
    ),
    (outputs(lambda levels: dict(reversed(levels.items()))), "shapes", r"the levels are \['res5'"),
    (
        outputs(lambda levels: {k: v.long() for k, v in levels.items()}),
        "shapes",
        r"res2 has shape .* of torch.int64",
    ),
    (channels_off_by_one, "neck", r"RuntimeError: .*"),
    (leftover_classifier, "gradients", r".*'res5'\] give no gradient to model.classifier.weight"),
    (leftover_frozen, "gradients", r".*'res5'\] do not need model.classifier.weight"),
    (later_stages_built, "gradients", r"\['res2'\] give no gradient to model.blocks.*more"),
    (dropped_activation, "batch norm", r"res2 differs from the source model's maps by"),
    (statistics_that_move, "batch norm", r"training changes .*running_mean.* more"),
    (affine_that_learns, "batch norm", r"training changes .*weight.* more"),
    (
        attributes(load_source=lambda self, state: (0, ["conv_stem.weight"])),
        "weights",
        r"the source model's weights leave out conv_stem.weight",
    ),
    (
        attributes(load_source=lambda self, state: (9, [])),
        "weights",
        r"res2 differs from the source model's maps by",
    ),
]


@pytest.mark.parametrize("build, point, why", WRONG)
def test_wrong_backbone(build, point, why, use, monkeypatch):
    use(build)
    points = {key: contract.POINTS[key] for key in ("build", "sizes", point)}
    monkeypatch.setattr(contract, "POINTS", points)
    row = contract.contract(contract.new_row("timm", "test_efficientnet"), 30)
    assert re.match(why, row["points"][point]), row["points"]


def test_wrong_pyramid(monkeypatch):
    build_pyramid = contract.build_pyramid

    def without_p6(bottom_up, top_block):
        return build_pyramid(bottom_up)

    monkeypatch.setattr(contract, "build_pyramid", without_p6)
    row = contract.contract(contract.new_row("timm", "resnet10t"), 1)
    assert contract.failures(row) == {
        "neck": "the pyramid has the levels and strides {'p2': 4, 'p3': 8, 'p4': 16, 'p5': 32}"
    }


def test_facts_of_a_row():
    row = contract.contract(contract.new_row("timm", "mobilenetv3_small_050"), 0.1)
    assert row.pop("seconds") > 0
    assert row == {
        "source": "timm",
        "name": "mobilenetv3_small_050",
        "family": "mobilenetv3",
        "parameters": 272288,
        "levels": [
            ["res2", 8, 4, False],
            ["res3", 16, 8, False],
            ["res4", 24, 16, False],
            ["res5", 288, 32, False],
        ],
        "size": "any",
        "batch_norm": ["BatchNormAct2d"],
        "neck": "FPN",
        "points": {
            **dict.fromkeys(contract.POINTS, "ok"),
            "batch norm": "skipped",
            "weights": "skipped",
        },
    }


@pytest.fixture
def program(capsys):
    """Run the program; its exit status and what it printed are returned."""
    threads = torch.get_num_threads()

    def call(*words):
        with pytest.raises(SystemExit) as end:
            conformance.main(list(map(str, words)))
        assert torch.get_num_threads() == threads
        return int(end.value.code), capsys.readouterr()

    return call


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def kills_itself(name, norm="", **kwargs):
    if name == "resnet10t" and norm:
        os.kill(os.getpid(), signal.SIGKILL)
    return TimmBackbone(name, norm=norm, **kwargs)


def sleeps(name, **kwargs):
    time.sleep(600)


def test_crash_is_a_row(program, use, tmp_path):
    use(kills_itself, "resnet10t", "test_resnet")
    report = tmp_path / "report.json"
    status, printed = program("--source", "timm", "--output", report)
    assert status == 1
    rows = {row["name"]: row["points"] for row in rows_of(report)}
    assert rows["resnet10t"] == {
        **rows["test_resnet"],
        "batch norm": "its process ended with exit code -9",
        "weights": "skipped",
    }
    assert set(rows["test_resnet"].values()) == {"ok"}
    table = [line.split() for line in printed.out.splitlines()]
    assert ["timm", "resnet", "2", "1", "1"] in table and ["total", "2", "1", "1"] in table
    assert printed.out.endswith("timm resnet10t: batch norm: its process ended with exit code -9\n")


def test_time_limit_is_a_row(program, use, tmp_path):
    use(sleeps, "test_resnet")
    report = tmp_path / "report.json"
    status, _ = program("--source", "timm", "--output", report, "--time-limit", 1)
    assert status == 1
    points = rows_of(report)[0]["points"]
    assert points.pop("build") == "not done after 1 s"
    assert set(points.values()) == {"skipped"}


def test_existing_report_is_continued_or_refused(program, use, tmp_path):
    report, page = tmp_path / "report.json", tmp_path / "MODELS.md"
    arguments = ("--source", "timm", "--max-params", 0.1, "--output", report)
    use(TimmBackbone, "test_resnet")
    assert program(*arguments)[0] == 0
    first = report.read_text()

    status, printed = program(*arguments)
    assert status == 2 and report.read_text() == first
    assert printed.err == (
        f"detbackbones conformance: --output {report} exists: continue it with --resume or replace "
        "it with --overwrite\n"
    )
    report.write_text(first + first[:50])  # as a killed run leaves it
    use(TimmBackbone, "test_resnet", "test_vit")
    assert program(*arguments, "--resume")[0] == 0
    assert report.read_text().startswith(first)
    assert [row["name"] for row in rows_of(report)] == ["test_resnet", "test_vit"]
    assert program(*arguments, "--resume", "--page", page)[0] == 0
    assert page.read_text() == models_page(rows_of(report)[::-1])

    use(TimmBackbone, "test_vit")
    assert program(*arguments, "--overwrite")[0] == 0
    assert [row["name"] for row in rows_of(report)] == ["test_vit"]

    report.write_text("[1]\n")
    status, printed = program(*arguments, "--resume")
    assert status == 2 and "is no report" in printed.err and report.read_text() == "[1]\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--pattern", "no_such_*"], "--pattern 'no_such_*' is no model of timm or torchvision"),
        (["--source", "torchvision", "--compare", "raw"], "--compare raw is for timm"),
        (["--resume"], "--resume and --overwrite are for the file of --output"),
        (["--jobs", "0"], "argument --jobs: 0 must be above 0"),
        (["--page", "no/such/MODELS.md"], "--page no/such/MODELS.md is in a folder that does not"),
        (["--pattern", "resnet18", "--output", "no/such/report.json"], "No such file or directory"),
    ],
)
def test_wrong_arguments(arguments, message, program):
    status, printed = program(*arguments)
    assert status == 2
    assert message in printed.err.splitlines()[-1]


RAW = {
    "resnet18": {},
    "swin_tiny_patch4_window7_224": {
        "sizes": "AssertionError: Input height (256) doesn't match model (224).",
        "shapes": "p0 has shape (2, 56, 56, 96) of torch.float32 for an input of 224x224, "
        "declared is (2, 96, 56, 56)",
    },
    "vit_tiny_patch16_224": {
        "sizes": "AssertionError: Input height (256) doesn't match model (224).",
    },
    "test_efficientnet": {},
}


def test_raw_extractors(program, tmp_path):
    report = tmp_path / "report.json"
    for name in RAW:
        arguments = ("--compare", "raw", "--pattern", name, "--output", report, "--resume")
        program(*arguments)
    for row in rows_of(report):
        found = {k: why for k, why in contract.failures(row).items() if k in ("sizes", "shapes")}
        assert row["source"] == "raw" and found == RAW[row["name"]]
    failed = {row["name"]: set(contract.failures(row)) for row in rows_of(report)}
    assert not failed["resnet18"]
    assert "batch norm" in failed["test_efficientnet"]  # the activation is lost


def test_rounding_that_grows_is_no_difference():
    row = contract.contract(contract.new_row("timm", "visformer_tiny"), 30)
    assert row["points"]["batch norm"] == row["points"]["weights"] == "ok"


def made_row(name, family, size="any", levels=(4, 8, 16, 32), **changes):
    points = {**dict.fromkeys(contract.POINTS, "ok"), **changes}
    return {
        "source": "timm",
        "name": name,
        "family": family,
        "size": size,
        "levels": [[f"res{n}", 8, stride, stride == 8] for n, stride in enumerate(levels, 2)],
        "neck": "FPN" if len(levels) == 4 else "SimpleFeaturePyramid",
        "batch_norm": ["BatchNorm2d"] if family == "net" else [],
        "points": points,
    }


def test_page():
    rows = [
        made_row("net_b", "net", "multiples of 224"),
        made_row("net_a", "net", weights="skipped"),
        made_row("net_c", "net"),
        made_row("vit_a", "vit", "square 224", (16,), neck="the pyramid is wrong"),
        {
            "source": "timm",
            "name": "vit_b",
            "family": "vit",
            "points": {
                **dict.fromkeys(contract.POINTS, "skipped"),
                "build": "refused: model_name='vit_b' has no feature maps",
            },
        },
    ]
    text = models_page(rows)
    assert text == models_page(rows[::-1])
    assert f"timm {timm.__version__}" in text and "`detbackbones conformance" in text
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    for row in (
        ["architectures", "5"],
        ["pass", "3"],
        ["pass, levels compared with the source model's", "2"],
        ["refused", "1"],
        ["fail", "1"],
        ["images: any", "2"],
        ["images: multiples of 224", "1"],
        ["images: square 224", "1"],
        ["net", "3", "4 8 resampled 16 32", "any (2), multiples of 224 (1)", "FPN", "BatchNorm2d"],
        ["vit", "2", "16", "square 224", "SimpleFeaturePyramid", "none"],
    ):
        assert row in cells
    assert text.endswith(
        "## Refused\n\n- timm `vit_b`: build: refused: model_name='vit_b' has no feature maps\n\n"
        "## Failed\n\n- timm `vit_a`: neck: the pyramid is wrong\n"
    )
