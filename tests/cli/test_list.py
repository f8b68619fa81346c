"""The program that lists backbones: its data is what it measures, and it prints and draws it."""

import csv
import io
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
from detbackbones.backbones import BACKBONES
from detbackbones.catalog import Facts, facts, list_backbones, measure
from detbackbones.cli import list as list_command
from detbackbones.testing import contract, trial
from fvcore.nn import FlopCountAnalysis

SWIN = "swin_tiny_patch4_window7_224"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def program(capsys):
    """Call the program's main in this process; what it prints is returned."""

    def call(*words):
        list_command.main(list(map(str, words)))
        out, err = capsys.readouterr()
        sys.stderr.write(err)  # for a test to read
        return out

    return call


def test_data_is_of_every_model():
    for source, names in (
        ("timm", timm.list_models()),
        ("torchvision", list_backbones(source="torchvision")),
    ):
        assert facts(source).keys() == set(names)


@pytest.mark.parametrize(
    "source, name",
    [
        ("timm", "resnet18"),
        ("timm", "test_vit"),
        ("timm", "vit_small_patch14_dinov2"),
        ("timm", "pit_ti_224"),  # resampled
        ("timm", "levit_128s"),  # of one size
        ("timm", "coatnet_nano_cc_224"),  # of whole windows
        ("torchvision", "regnet_y_400mf"),
        ("torchvision", "swin_t"),
    ],
)
def test_data_is_what_is_measured(source, name):
    known = facts(source)[name]
    assert Facts(source, *measure.measure(source, name)) == known


@pytest.mark.parametrize(
    "source, name",
    [
        ("timm", "resnet18"),
        ("timm", "vit_tiny_patch16_224"),
        ("timm", "vit_small_patch14_dinov2"),
        ("timm", "vit_tiny_r_s16_p8_224"),  # one level of stride 32
        ("timm", "xcit_nano_12_p8_224"),  # one level of stride 8
        ("timm", "levit_128s"),
        ("torchvision", "alexnet"),
        ("torchvision", "vit_b_16"),
        ("torchvision", "vit_b_32"),
        ("torchvision", "vit_h_14"),
    ],
)
def test_the_neck_is_what_build_pyramid_makes(source, name):
    tried = trial.Trial(name, trial.SUBJECTS[source])
    contract.check_build(tried)
    contract.check_neck(tried)
    kinds = {"SimpleFeaturePyramid": "sfp", "FPN": "fpn", "completed FPN": "fpn", "none": None}
    kind = tried.row["neck"].removesuffix(" with patch_size=16")
    assert kinds[kind] == facts(source)[name].neck


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_gmacs_are_those_of_fvcore_with_real_numbers(name):
    image = 1, 3, 96, 96
    models = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            models.append(timm.create_model(name, num_classes=0, global_pool="").eval())
    counts = FlopCountAnalysis(models[0], torch.zeros(image)).by_operator()
    expected = sum(count for operator, count in counts.items() if not operator.endswith("_norm"))
    assert expected > 1e6
    assert measure.count_macs(models[1], image) == expected


def test_gmacs_of_a_transposed_convolution():
    image = 1, 4, 9, 9
    convolution = torch.nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
    expected = FlopCountAnalysis(convolution, torch.zeros(image)).total()
    assert measure.count_macs(convolution.to("meta"), image) == expected > 0


def test_gmacs_have_the_attention():
    tokens, channels = 50, 64
    attention = timm.layers.Attention(channels, num_heads=2).to("meta").eval()
    linear, products = 4 * tokens * channels**2, 2 * tokens**2 * channels
    assert measure.count_macs(attention, (1, tokens, channels)) == linear + products


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    data = tmp_path / "catalog.json"
    monkeypatch.setattr(measure, "DATA", data)
    names = {"timm": ["test_resnet"], "torchvision": ["no such model"]}

    def few(source):
        kind = BACKBONES[source].source_class
        few = type("Few", (kind,), {"names": classmethod(lambda cls: names[source])})
        return SimpleNamespace(source_class=few)

    monkeypatch.setattr(measure, "BACKBONES", {source: few(source) for source in BACKBONES})
    (failure,) = list(measure.write())
    assert failure.startswith("torchvision no such model: ValueError: model_name='no such model'")
    first = json.loads(data.read_text())
    assert first["versions"] == measure.VERSIONS
    assert first["models"]["timm"].keys() == {"test_resnet"}

    names |= {"timm": ["test_resnet", "test_vit"], "torchvision": []}
    monkeypatch.setattr(measure, "measure", lambda source, name: [name])
    assert list(measure.write()) == []
    models = json.loads(data.read_text())["models"]
    assert models["timm"] == {**first["models"]["timm"], "test_vit": ["test_vit"]}


def test_table(program):
    lines = program("resnet1[08]*", "--sort", "params").splitlines()
    assert lines[0].split()[:5] == ["source", "name", "params,", "M", "GMACs"]
    rows = [line.split() for line in lines[2:] if line.startswith(("timm", "torchvision"))]
    assert [row[1] for row in rows[:2]] == ["resnet10t", "resnet18"]
    resnet18 = rows[1]
    assert resnet18[2:12] == "11.2 1.81 4 8 16 32 64 128 256 512".split()
    assert resnet18[12:14] == ["any", "BatchNorm2d"]
    params = [float(row[2]) for row in rows]
    assert params == sorted(params)
    assert "a1_in1k" in program("resnet18")
    assert " @384 " in program("maxvit_tiny_tf_384")


@pytest.mark.parametrize("form", ["--json", "--csv"])
def test_json_and_csv(program, form):
    text = program("swin_t*", form)
    rows = json.loads(text) if form == "--json" else list(csv.DictReader(io.StringIO(text)))
    assert {row["source"] for row in rows} == {"timm", "torchvision"}
    (row,) = (row for row in rows if row["name"] == "swin_t")
    known = facts("torchvision")["swin_t"]
    assert int(row["params"]) == known.params
    assert float(row["gmacs"]) == known.gmacs
    lists = {"strides": [4, 8, 16, 32], "channels": [96, 192, 384, 768]}
    lists |= {"weights": ["IMAGENET1K_V1"], "batch_norm": []}
    for key, value in lists.items():
        assert row[key] == (value if form == "--json" else " ".join(map(str, value)))


def test_filters(program):
    words = ["*net*", "--max-params", 10, "--max-gmacs", 1, "--stride", 4, "--neck", "fpn"]
    rows = json.loads(program(*words, "--json", "--sort", "gmacs", "--pretrained"))
    assert {"efficientnet_b0", "mobilenetv3_large_100"} <= {row["name"] for row in rows}
    assert all(
        row["params"] <= 10e6 and row["gmacs"] <= 1 and 4 in row["strides"] and row["weights"]
        for row in rows
    )
    gmacs = [row["gmacs"] for row in rows]
    assert gmacs == sorted(gmacs)


def test_nothing_found(program, capsys):
    for words, hint in (
        (("resnet18", "--max-params", 1), ""),
        (("convnxt_tiny", "resnet*", "--max-params", 1), "; to 'convnxt_tiny' the nearest are"),
    ):
        with pytest.raises(SystemExit, match="2"):
            program(*words)
        error = capsys.readouterr().err
        assert error.startswith(f"detbackbones list: no model fits what is asked{hint}")
        assert ("nearest" in error) == bool(hint)


@pytest.mark.parametrize("words", [(), ("--max-params", 20)])
def test_it_says_that_models_are_not_measured(program, capsys, monkeypatch, tmp_path, words):
    data = json.loads(measure.DATA.read_text())
    del data["models"]["timm"]["resnet18"], data["models"]["torchvision"]["resnet18"]
    monkeypatch.setattr(sys.modules[facts.__module__], "DATA", tmp_path / "catalog.json")
    (tmp_path / "catalog.json").write_text(json.dumps(data))
    facts.cache_clear()
    try:
        assert "resnet18 " not in program("resnet18*", *words)
    finally:
        facts.cache_clear()
    assert "2 models are not in the data: --write measures them" in capsys.readouterr().err


def test_write_takes_no_pattern(program, capsys):
    with pytest.raises(SystemExit, match="2"):
        program("resnet*", "--write")
    assert "--write measures all models: give it alone" in capsys.readouterr().err


def test_several_patterns(program):
    rows = json.loads(program("resnet18", "resnet3?", "--source", "timm", "--json"))
    assert [row["name"] for row in rows] == ["resnet18", "resnet34"]


def test_a_page_is_not_written_over_a_file(program, tmp_path, capsys):
    file = tmp_path / "mine.html"
    file.write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        program("resnet18", "--html", file)
    assert f"File exists: '{file}'" in capsys.readouterr().err
    assert file.read_text() == "mine"


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if not CHROMIUM:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def test_page(program, browser, tmp_path):
    file = tmp_path / "backbones.html"
    program("--html", file)
    page = browser.new_page(viewport={"width": 1500, "height": 900})
    page.set_default_timeout(240_000)  # ms; a busy machine takes long for 1451 rows
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(file.as_uri())

    def column(title):
        titles = page.locator("thead th").all_inner_texts()
        index = next(i for i, text in enumerate(titles) if text.startswith(title))
        return page.locator(f"tbody tr td:nth-child({index + 1})").all_inner_texts()

    def shown():
        return [facts(source)[name] for source, name in zip(column("Source"), column("Model"))]

    count = sum(len(facts(source)) for source in ("timm", "torchvision"))
    assert len(column("Model")) == count
    assert page.inner_text("#count") == f"{count} of {count} models"

    page.fill("#search", "swin")
    names = column("Model")
    assert len(names) < count and SWIN in names
    assert all("swin" in name + weights for name, weights in zip(names, column("Weights")))

    by_params = page.get_by_role("button", name="Params")
    by_params.click()
    params = [known.params for known in shown()]
    assert params == sorted(params) and len(params) == len(names)
    by_params.click()
    assert [known.params for known in shown()] == params[::-1]
    page.select_option("#stride", "4")
    page.screenshot(path=tmp_path / "page.png")
    assert {text.split()[0] for text in column("Strides")} == {"4"}

    page.fill("#search", "")
    listed = {source: list_backbones(source=source, stride=4) for source in ("timm", "torchvision")}
    assert sorted(column("Model")) == sorted(listed["timm"] + listed["torchvision"])
    page.fill("#params", "10")
    page.select_option("#source", "torchvision")
    found = list_backbones(source="torchvision", stride=4, max_params=10e6)
    assert sorted(column("Model")) == sorted(found)
    page.get_by_role("button", name="Reset").click()
    page.wait_for_function(f"document.querySelectorAll('tbody tr').length === {count}")
    assert requests == [file.as_uri()] and not errors
