"""What is installed by an extra of the package."""

from types import ModuleType


def import_supervision() -> ModuleType:
    """The package supervision, or one sentence that says how to get it."""
    try:
        import supervision
    except ImportError as error:
        raise ImportError(
            f"this needs the package {error.name}: pip install detbackbones[predict]"
        ) from error
    return supervision
