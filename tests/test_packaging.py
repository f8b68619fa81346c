"""The wheel: what is in it, and that it works where there is no checkout."""

import email
import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest
from support import ROOT

pytestmark = pytest.mark.slow


def test_the_wheel_has_every_module_and_config(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"detbackbones/catalog/catalog.json", "detbackbones/catalog/page.html"} <= {*names}
    packed = {name for name in names if name.endswith(".py")}
    modules = {str(path.relative_to(ROOT)) for path in ROOT.glob("detbackbones/**/*.py")}
    configs = {f"detbackbones/{p.relative_to(ROOT)}" for p in ROOT.glob("configs/**/*.py")}
    assert configs
    assert packed == modules | configs


def test_the_metadata_says_what_the_package_is(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    fields = email.message_from_string(archive.read(name).decode())
    assert fields["License"] == "Apache-2.0" and fields["Description-Content-Type"]
    assert fields.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    assert len(fields.get_all("Classifier")) > 3 and len(fields.get_all("Project-URL")) == 3


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Call a program of a new environment that has the wheel, outside the checkout."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "env")
    python = folder / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", str(wheel)], check=True)
    (site,) = folder.glob("env/lib/python3*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))  # torch, detectron2, ...
    env = {**os.environ, "PYTHONPATH": "", "PYTHONSAFEPATH": "1"}

    def call(program, *words):
        command = [str(python.with_name(program)), *map(str, words)]
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)

    return call


def test_the_wheel_lists_backbones_and_layers(installed):
    where = installed("python", "-c", "import detbackbones; print(detbackbones.__file__)")
    assert "env/lib" in where.stdout
    done = installed("detbackbones", "list", "resnet18", "--json")
    assert [row["source"] for row in json.loads(done.stdout)] == ["timm", "torchvision"]
    done = installed("detbackbones", "layers", "resnet18")
    assert done.stdout.endswith('layers: ["layer4", "layer3", "layer2", "layer1"]\n')


@pytest.mark.parametrize("command", ["list", "layers"])
def test_the_wheel_does_not_write_the_projects_files(installed, command):
    done = installed("detbackbones", command, "--write")
    assert done.returncode == 2
    assert done.stderr == (
        f"detbackbones {command}: --write changes a file of the project: it is for a checkout, and "
        "this is an installed package\n"
    )


def test_the_wheel_trains(installed, tiny, tmp_path):
    words = ["--config-file", "finetune/faster_rcnn.py", f"train.output_dir={tmp_path}"]
    words += [f"dataset.{s}_images={tiny}/images/{s}" for s in ("train", "val")]
    words += [f"dataset.{s}_json={tiny}/{s}.json" for s in ("train", "val")]
    words += ["model.backbone.bottom_up.model_name=test_resnet", "train.max_iter=2"]
    words += ["model.backbone.bottom_up.pretrained=False", "train.device=cpu"]
    words += ["dataset.train_sizes=[64]", "dataset.val_size=64"]
    words += ["dataloader.train.num_workers=0", "dataloader.test.num_workers=0"]
    done = installed("detbackbones", "train", *words)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert "bbox/AP50" in rows[-1] and (tmp_path / "model_final.pth").exists()
    done = installed("detbackbones", "eval", "--config-file", tmp_path / "config.yaml")
    assert done.returncode == 0, done.stderr
    assert re.search(r"\| bbox +\| +[\d.]+", done.stdout)
