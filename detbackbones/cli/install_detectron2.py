"""Install detectron2, which is not on the package index, into this interpreter's environment.

By default no compiler is needed: a wheel on the package index, LabGym's, carries a copy of
detectron2 as of January 2024 in which only the imports were renamed. This program downloads that
wheel, checks its hash, undoes the renaming and installs the result as a proper `detectron2` wheel.
Detectron2's compiled operators (rotated boxes, its own deformable convolution) and
`detectron2.projects` are not in it. `--upstream` compiles detectron2 from its own repository,
with all of them.

    detbackbones install-detectron2
    detbackbones install-detectron2 --upstream
"""

import base64
import hashlib
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from ..package_index import PackageIndexError, download_wheel, last_error, pip
from .program import new_parser

UPSTREAM = "git+https://github.com/facebookresearch/detectron2.git"
LABGYM = "LabGym==3.1.2"
LABGYM_SHA256 = "a2900cff8a3fb508e1975f19b5f9abd9f261966db87b0c332697fb4138c1cb2b"

VERSION = "0.6+864913f0"  # the release, and the upstream commit that the copy was taken from
METADATA = f"""\
Metadata-Version: 2.1
Name: detectron2
Version: {VERSION}
Summary: FAIR's platform for object detection and segmentation, without its compiled operators
Home-page: https://github.com/facebookresearch/detectron2
Author: FAIR
License: Apache-2.0
Requires-Python: >=3.7
"""
WHEEL = """\
Wheel-Version: 1.0
Generator: detbackbones
Root-Is-Purelib: true
Tag: py3-none-any
"""
OURS = ("safetensors", "timm")  # what setup.py asks for that detectron2 does not need

# A broken or half-written detectron2 has a location but no version.
PROBE = """
import importlib.util
spec = importlib.util.find_spec("detectron2")
if spec:
    print(spec.origin or spec.submodule_search_locations[0], flush=True)
    import detectron2
    detectron2.__version__
"""


class InstallError(Exception):
    """Why detectron2 could not be installed, in one sentence."""


def find_detectron2() -> tuple[str, str]:
    """Look for detectron2 from a new interpreter, in a folder that cannot shadow it.

    Returns:
        The file or folder where it is ("" if nowhere), and why importing it fails ("" if it works).
    """
    with tempfile.TemporaryDirectory() as folder:
        probe = subprocess.run(
            [sys.executable, "-c", PROBE], check=False, cwd=folder, capture_output=True, text=True
        )
    return probe.stdout.strip(), last_error(probe.stderr) if probe.returncode else ""


def repack(labgym: Path, folder: Path) -> Path:
    """Write the wheel of detectron2 that the wheel `labgym` carries into `folder`.

    LabGym's `detectron2.projects` differs from upstream's and nothing else imports it: left out.
    """
    files = {}
    with zipfile.ZipFile(labgym) as source:
        # Last to first: `detectron2/__init__.py` is then written last when pip installs, so that
        # an install that was cut short does not look like a whole one.
        for name in sorted(source.namelist(), reverse=True):
            is_core = name.startswith("LabGym/detectron2/") and not name.endswith("/")
            if is_core and not name.startswith("LabGym/detectron2/projects/"):
                content = source.read(name).replace(b"LabGym.detectron2", b"detectron2")
                files[name.removeprefix("LabGym/")] = content

    dist_info = f"detectron2-{VERSION}.dist-info"
    files[f"{dist_info}/licenses/LICENSE"] = license_text()
    requires = "".join(f"Requires-Dist: {requirement}\n" for requirement in requirements())
    files[f"{dist_info}/METADATA"] = (METADATA + requires).encode()
    files[f"{dist_info}/WHEEL"] = WHEEL.encode()
    record = [f"{name},{record_hash(content)},{len(content)}\n" for name, content in files.items()]
    files[f"{dist_info}/RECORD"] = "".join([*record, f"{dist_info}/RECORD,,\n"]).encode()

    wheel = folder / f"detectron2-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in files.items():
            target.writestr(name, content)
    return wheel


def own_metadata() -> metadata.Distribution:
    """What is known of detbackbones as it is installed."""
    try:
        return metadata.distribution("detbackbones")
    except metadata.PackageNotFoundError:
        raise InstallError("detbackbones itself is not installed: do that with pip first") from None


def requirements() -> list[str]:
    """What detectron2 needs: setup.py asks for it, so that there is one list."""
    every = own_metadata().requires or []
    return [one for one in every if "extra ==" not in one and not one.startswith(OURS)]


def license_text() -> bytes:
    """detbackbones' LICENSE: detectron2's is the same text."""
    files = own_metadata().files or []
    return next(file for file in files if file.name == "LICENSE").read_binary()


def record_hash(content: bytes) -> str:
    """The hash of a file as a wheel's RECORD has it."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest())
    return "sha256=" + digest.rstrip(b"=").decode()


def install(*args: str) -> str:
    """Install detectron2 with `pip install args`, whole or not at all, and return its location."""
    print("installing detectron2 ...", flush=True)
    try:
        pip("install", "--quiet", *args, failure="pip could not install detectron2")
        location, error = find_detectron2()
        if error or not location:
            raise InstallError(f"the detectron2 just installed does not work ({error}): removed it")
        return location
    except BaseException:
        remove()
        raise


def remove() -> None:
    """Remove what an install left behind, with pip's own record of it or without."""
    command = [sys.executable, "-m", "pip", "uninstall", "--yes", "--quiet", "detectron2"]
    subprocess.run(command, check=False, stderr=subprocess.DEVNULL)
    for site_packages in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for left in Path(site_packages).glob("detectron2*"):
            if left.name == "detectron2" or left.name.startswith("detectron2-"):
                shutil.rmtree(left, ignore_errors=True)


def main(words: Sequence[str] | None = None) -> None:
    parser = new_parser("install-detectron2", __doc__)
    parser.add_argument(
        "--upstream",
        action="store_true",
        help="compile detectron2 from its repository (needs torch, a C++ compiler and network)",
    )
    upstream = parser.parse_args(words).upstream
    try:
        location, error = find_detectron2()
        if error:
            raise InstallError(
                f"there is a detectron2 at {location} that cannot be imported ({error}): "
                "remove it with `pip uninstall detectron2`, or by hand, and try again"
            )
        if location:
            print(f"detectron2 is already installed at {location}: nothing to do")
            return
        if upstream:
            location = install("--no-build-isolation", UPSTREAM)
        else:
            with tempfile.TemporaryDirectory() as folder:
                wheel = download_wheel(LABGYM, LABGYM_SHA256, Path(folder), "detectron2")
                location = install(str(repack(wheel, Path(folder))))
        print(f"installed detectron2 at {location}")
        return
    except (InstallError, PackageIndexError) as error:
        message = str(error)
    except KeyboardInterrupt:
        message = "interrupted, nothing was installed"
    print(f"detbackbones install-detectron2: {message}", file=sys.stderr)
    sys.exit(1)
