import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_wheel_has_every_module_and_config(tmp_path):
    for name in ["setup.py", "pyproject.toml"]:
        shutil.copy(ROOT / name, tmp_path)
    for name in ["detbackbones", "configs"]:
        shutil.copytree(ROOT / name, tmp_path / name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        + ["--wheel-dir", str(tmp_path), str(tmp_path)],
        check=True,
    )

    (wheel,) = tmp_path.glob("detbackbones-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "detbackbones/catalog.json" in names
    packed = {name for name in names if name.endswith(".py")}
    modules = {str(path.relative_to(ROOT)) for path in ROOT.glob("detbackbones/**/*.py")}
    configs = {f"detbackbones/{p.relative_to(ROOT)}" for p in ROOT.glob("configs/**/*.py")}
    assert configs
    assert packed == modules | configs
