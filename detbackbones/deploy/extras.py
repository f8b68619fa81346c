"""What is installed by an extra of the package."""

from types import ModuleType


def import_supervision() -> ModuleType:
    """The package supervision, or one sentence that says how to get it."""
    try:
        import supervision
    except ImportError as error:
        raise ImportError(
            f"this needs {error.name}: pip install '.[predict]', or supervision alone"
        ) from error
    return supervision
