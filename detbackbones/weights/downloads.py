"""Downloads of weights, whose many errors become one sentence."""

import contextlib
from collections.abc import Iterator

import huggingface_hub

_INSTEAD = "give checkpoint_path= a file, train.init_checkpoint= a file, or pretrained=False"


@contextlib.contextmanager
def downloading(model_name: str, advice: str = _INSTEAD) -> Iterator[None]:
    """Turn the many errors of a failed download into one sentence.

    Args:
        model_name: what is downloaded.
        advice: what the user can do instead, the end of the sentence.

    Raises:
        ConnectionError: if what is done within fails for want of a network; other errors pass.
    """
    try:
        yield
    except Exception as error:
        if not _is_network_error(error):
            raise
        raise ConnectionError(
            f"the pretrained weights of {model_name!r} could not be downloaded "
            f"({type(error).__name__}): {advice}"
        ) from error


@contextlib.contextmanager
def downloading_from_hub(model_name: str, advice: str = _INSTEAD) -> Iterator[None]:
    """:func:`downloading`, from the Hugging Face hub if it answers, and else from its cache.

    Without the question each file is tried six times, which takes most of a minute.
    """
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        if not before:
            huggingface_hub.utils.get_session().head(
                huggingface_hub.constants.ENDPOINT,
                timeout=huggingface_hub.constants.DEFAULT_ETAG_TIMEOUT,
            )
    except Exception:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        with downloading(model_name, advice):
            yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


def _is_network_error(error: BaseException | None) -> bool:
    while error is not None:
        package = type(error).__module__.partition(".")[0]
        if isinstance(error, OSError) or package in ("httpx", "httpx2", "requests", "urllib"):
            return True
        error = error.__cause__ or error.__context__
    return False
