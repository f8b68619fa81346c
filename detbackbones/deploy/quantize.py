"""Int8: an exported model whose weights and activations are integers of 8 bits.

OpenVINO's files by NNCF, ONNX by onnxruntime: NNCF 3.4 ends in an error at ONNX files whose last
node is a cast, as it is in R-CNNs.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..messages import first_line
from .extras import import_exporter
from .formats import FORMATS

LAYERS = ["Conv", "Gemm", "MatMul"]  # with all that onnxruntime can, an AP of 51.2 became 30.8


def quantize(folder: Path, images: Sequence[torch.Tensor], *, format: str, attends: bool) -> None:
    """Replace the exported file by one of 8 bits.

    The ranges of the activations are those of the images: post-training static quantisation.

    Args:
        folder: that was exported to.
        images: (C, H, W) of sizes that the model takes, 100 to 300 of them.
        format: one of :data:`QUANTIZE`.
        attends: whether the model has attention, of which NNCF keeps more in full precision.

    Raises:
        ImportError: if NNCF or onnxruntime is not installed.
        ValueError: if they cannot quantise the model.
    """
    try:
        QUANTIZE[format](folder / FORMATS[format].file, images, attends)
    except ImportError:
        raise
    except Exception as error:  # they fail in any way
        raise ValueError(f"the model cannot be quantised: {first_line(error)}") from error


def _array(image: torch.Tensor) -> np.ndarray:
    return image[None].float().numpy()


def _by_nncf(file: Path, images: Sequence[torch.Tensor], attends: bool) -> None:
    nncf, openvino = import_exporter("nncf"), import_exporter("openvino")
    logging.getLogger("nncf").setLevel(logging.ERROR)
    options = {"model_type": nncf.ModelType.TRANSFORMER} if attends else {}
    model, dataset = openvino.Core().read_model(file), nncf.Dataset([*images], _array)
    small = nncf.quantize(model, dataset, subset_size=len(images), **options)
    between = file.with_name("int8.xml")  # the file is in use while it is written
    openvino.save_model(small, between, compress_to_fp16=False)
    del model
    for suffix in (".xml", ".bin"):
        between.with_suffix(suffix).replace(file.with_suffix(suffix))


def _by_onnxruntime(file: Path, images: Sequence[torch.Tensor], attends: bool) -> None:
    import_exporter("onnxruntime")
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.images = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.images, None)
            return None if image is None else {"images": _array(image)}

    ready, small = (file.with_name(name) for name in ("ready.onnx", "small.onnx"))
    quant_pre_process(str(file), str(ready), skip_symbolic_shape=True)
    quantize_static(ready, small, Reader(), op_types_to_quantize=LAYERS, per_channel=True)
    ready.unlink()
    small.replace(file)


QUANTIZE = {"onnx": _by_onnxruntime, "openvino": _by_nncf}
PACKAGES = {"onnx": ("onnxruntime",), "openvino": ("nncf", "openvino")}
