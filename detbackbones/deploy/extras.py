"""What is installed by an extra of the package."""

from importlib import import_module
from types import ModuleType


def import_extra(name: str, extra: str) -> ModuleType:
    """A package, or one sentence that says how to get it.

    Args:
        name: of the package.
        extra: of this package, which has it.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"this needs {error.name or name}: pip install '.[{extra}]', or {name} alone"
        ) from error


def import_supervision() -> ModuleType:
    """supervision, of the extra ``predict``."""
    return import_extra("supervision", "predict")


def import_exporter(name: str) -> ModuleType:
    """A package of the extra ``export``."""
    return import_extra(name, "export")
