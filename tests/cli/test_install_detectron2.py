import base64
import csv
import hashlib
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from detbackbones import package_index
from detbackbones.cli import install_detectron2

pytestmark = pytest.mark.slow

MADE_WHEEL = {
    "LabGym/__init__.py": "",
    "LabGym/detectron2/__init__.py": '__version__ = "0.6"\n',
    "LabGym/detectron2/engine/__init__.py": "from LabGym.detectron2 import __version__\n",
    "LabGym/detectron2/model_zoo/__init__.py": "",
    "LabGym/detectron2/model_zoo/configs/common/train.py": "max_iter = 90000\n",
    "LabGym/detectron2/projects/__init__.py": "",
    "labgym-3.1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: LabGym\nVersion: 3.1.2\n",
    "labgym-3.1.2.dist-info/WHEEL": install_detectron2.WHEEL,
    "labgym-3.1.2.dist-info/RECORD": "",
}


@pytest.fixture(scope="module")
def made_wheel(tmp_path_factory):
    """A small wheel with the layout of LabGym's."""
    wheel = tmp_path_factory.mktemp("made") / "labgym-3.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as target:
        for name, content in MADE_WHEEL.items():
            target.writestr(name, content)
    return wheel


@pytest.fixture(scope="module")
def real_wheel(tmp_path_factory):
    try:
        return package_index.download_wheel(
            install_detectron2.LABGYM,
            install_detectron2.LABGYM_SHA256,
            tmp_path_factory.mktemp("real"),
            "detectron2",
        )
    except package_index.PackageIndexError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def bare_python(wheel, tmp_path_factory):
    """The interpreter of an environment with nothing but pip and the wheel of this package."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True)
    return python


def run_script(python, **env):
    """Run the program with no index that answers, and with `env` on top of that."""
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PIP_")},
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_RETRIES": "0",
        "PYTHONPATH": "",
        **env,
    }
    command = [str(python.with_name("detbackbones")), "install-detectron2"]
    return subprocess.run(command, check=False, env=env, capture_output=True, text=True)


def check_refusal(result, *words):
    """One clear sentence on stderr, with these words in it, and exit code 1."""
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("detbackbones install-detectron2: ")
    for word in words:
        assert word in line


def left_behind(python):
    return list(Path(python).parent.parent.glob("lib/python3*/site-packages/detectron2*"))


@pytest.mark.parametrize("source", ["made_wheel", "real_wheel"])
def test_repack(source, tmp_path, request):
    wheel = install_detectron2.repack(request.getfixturevalue(source), tmp_path)

    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    assert not [name for name, content in files.items() if b"LabGym" in content]
    assert not [name for name in files if name.startswith(("LabGym", "detectron2/projects"))]
    assert "detectron2/model_zoo/configs/common/train.py" in files
    assert [name for name in files if ".dist-info/" not in name][-1] == "detectron2/__init__.py"

    dist_info = "detectron2-0.6+864913f0.dist-info"
    record = list(csv.reader(files[f"{dist_info}/RECORD"].decode().splitlines()))
    assert [row[0] for row in record] == list(files)
    assert record[-1] == [f"{dist_info}/RECORD", "", ""]
    for name, digest, size in record[:-1]:
        expected = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).decode()
        assert digest == "sha256=" + expected.rstrip("=")
        assert int(size) == len(files[name])


def test_the_repacked_wheel_works(real_wheel, tmp_path):
    wheel = install_detectron2.repack(real_wheel, tmp_path)
    target = tmp_path / "site"
    pip_install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip_install, "--target", str(target), str(wheel)], check=True)

    code = (
        "from detectron2 import model_zoo\n"
        "cfg = model_zoo.get_config('common/models/mask_rcnn_fpn.py')\n"
        "print(model_zoo.__file__, cfg.model.backbone.out_channels)"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        check=True,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
    )
    assert result.stdout.split() == [f"{target}/detectron2/model_zoo/__init__.py", "256"]


def test_an_importable_detectron2_is_left_alone(bare_python, tmp_path):
    package = tmp_path / "detectron2"
    package.mkdir()
    (package / "__init__.py").write_text('__version__ = "0.6"')
    result = run_script(bare_python, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0
    assert f"already installed at {package}/__init__.py" in result.stdout


@pytest.mark.parametrize(
    "module, error",
    [
        ("__init__.py", "ModuleNotFoundError: No module named 'not_there'"),
        ("half_written.py", "has no attribute '__version__'"),
    ],
)
def test_a_broken_detectron2_is_named(bare_python, tmp_path, module, error):
    package = tmp_path / "detectron2"
    package.mkdir()
    (package / module).write_text("import not_there")
    result = run_script(bare_python, PYTHONPATH=str(tmp_path))
    check_refusal(result, f"at {package}", error, "pip uninstall detectron2")


def test_no_network(bare_python):
    check_refusal(run_script(bare_python), "cannot download LabGym==3.1.2", "No matching")


def test_a_wrong_hash(bare_python, made_wheel):
    result = run_script(bare_python, PIP_FIND_LINKS=str(made_wheel.parent), PIP_NO_INDEX="1")
    sha256 = hashlib.sha256(made_wheel.read_bytes()).hexdigest()
    check_refusal(result, sha256, install_detectron2.LABGYM_SHA256)
    assert not left_behind(bare_python)


@pytest.mark.parametrize(
    "no_deps, error",
    [
        ("0", "pip could not install detectron2: ERROR: No matching distribution found for"),
        ("1", "ModuleNotFoundError: No module named"),  # installed without what it imports
    ],
)
def test_a_failed_install_leaves_nothing(bare_python, real_wheel, no_deps, error):
    links = {"PIP_FIND_LINKS": str(real_wheel.parent), "PIP_NO_INDEX": "1"}
    result = run_script(bare_python, PIP_NO_DEPS=no_deps, **links)
    check_refusal(result, error)
    assert not left_behind(bare_python)
