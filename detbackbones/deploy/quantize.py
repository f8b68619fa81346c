"""Int8: an exported model whose weights and activations are integers of 8 bits.

OpenVINO's files by NNCF, ONNX by onnxruntime: NNCF 3.4 ends in an error at ONNX files whose last
node is a cast, as it is in R-CNNs.
"""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from .formats import FORMATS, import_extra

LAYERS = ["Conv", "Gemm", "MatMul"]  # with all that onnxruntime can, an AP of 51.2 became 30.8


def quantize(folder: Path, images: Sequence[np.ndarray], *, format: str, attends: bool) -> None:
    """Replace the exported file by one of 8 bits.

    The ranges of the activations are those of the images: post-training static quantisation.

    Args:
        folder: that was exported to.
        images: (1, C, H, W) of sizes that the model takes, 100 to 300 of them.
        format: one of :data:`QUANTIZE`.
        attends: whether the model has attention, of which NNCF keeps more in full precision.

    Raises:
        ImportError: if NNCF or onnxruntime is not installed.
    """
    QUANTIZE[format](folder / FORMATS[format].file, images, attends)


def _by_nncf(file: Path, images: Sequence[np.ndarray], attends: bool) -> None:
    nncf, openvino = import_extra("nncf"), import_extra("openvino")
    logging.getLogger("nncf").setLevel(logging.ERROR)
    options = {"model_type": nncf.ModelType.TRANSFORMER} if attends else {}
    model = openvino.Core().read_model(file)
    small = nncf.quantize(model, nncf.Dataset([*images]), subset_size=len(images), **options)
    between = file.with_name("int8.xml")  # the file is in use while it is written
    openvino.save_model(small, between, compress_to_fp16=False)
    del model
    for suffix in (".xml", ".bin"):
        between.with_suffix(suffix).replace(file.with_suffix(suffix))


def _by_onnxruntime(file: Path, images: Sequence[np.ndarray], attends: bool) -> None:
    import_extra("onnxruntime")
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.images = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.images, None)
            return None if image is None else {"images": image}

    with TemporaryDirectory() as between:
        ready, small = (str(Path(between, name)) for name in ("ready.onnx", "small.onnx"))
        quant_pre_process(str(file), ready, skip_symbolic_shape=True)
        quantize_static(ready, small, Reader(), op_types_to_quantize=LAYERS, per_channel=True)
        shutil.move(small, file)


QUANTIZE = {"onnx": _by_onnxruntime, "openvino": _by_nncf}
