"""What the commands share: their parser of arguments, how they end on wrong input."""

import argparse
import re
import sys
from pathlib import Path
from typing import NoReturn


def new_parser(command: str, doc: str) -> argparse.ArgumentParser:
    """The parser of a command, whose help begins with the docstring of the command's file."""
    return argparse.ArgumentParser(
        prog=f"detbackbones {command}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def fail(command: str, error: Exception | str) -> NoReturn:
    """End with exit status 2 and the error's sentence, on one line."""
    if isinstance(error, BrokenPipeError):  # whoever reads what is printed has had enough
        raise error
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].startswith("Caught "):  # and raised again, with a traceback, by a data loader
        lines = [re.sub(r"^[\w.]+: ", "", lines[-1])]
    print(f"detbackbones {command}".strip() + ":", *lines, file=sys.stderr)
    sys.exit(2)


def checkout() -> Path:
    """The folder of the project that this package is used from.

    Raises:
        FileNotFoundError: if it is an installed package.
    """
    folder = Path(__file__).parents[2]
    if not (folder / "setup.py").is_file():
        raise FileNotFoundError(
            "--write changes a file of the project: it is for a checkout, and this is an installed "
            "package"
        )
    return folder
