"""The formats of exported files: how each is written, and how it is run."""

import contextlib
import io
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import torch
from detectron2.export.torchscript_patch import patch_builtin_len

from .extras import import_exporter
from .graphs import Graph

_FLOAT = 1  # ONNX's number of float32
Run = Callable[[np.ndarray], Sequence[np.ndarray]]


class Format(ABC):
    """A format.

    Attributes:
        file: name of the file that is written.
        packages: that write it.
        pads: whether images of all sizes can be padded in the file, or must have sizes that the
            model takes.
        opset: of ONNX.
        by: what the way is called.
        other_way: to write the same format, for models that this one fails at.
    """

    file: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    pads: ClassVar[bool] = True
    opset: ClassVar[int | None] = None
    by: ClassVar[str] = "torch.export"
    other_way: ClassVar["type[Format] | None"] = None

    @classmethod
    @abstractmethod
    def write(cls, graph: Graph, images: torch.Tensor, free: Collection[str], file: Path) -> None:
        """Write a graph.

        Args:
            graph: of a model.
            images: (N, C, H, W) that it takes.
            free: which axes may have other lengths than in ``images``: "batch", "height", "width".
            file: to write.
        """

    @staticmethod
    @abstractmethod
    def open(file: Path) -> Run:
        """What runs a file on the CPU: images (N, C, H, W) in float32 to the outputs, in order."""


class OnnxOfProgram(Format):
    """ONNX, by way of the program of ``torch.export``."""

    file = "model.onnx"
    packages = ("onnx", "onnxscript", "onnxruntime")
    pads = False
    opset = 18  # which torch writes without converting

    @classmethod
    def write(cls, graph: Graph, images: torch.Tensor, free: Collection[str], file: Path) -> None:
        torch.onnx.export(
            graph,
            (images,),
            str(file),
            dynamo=True,
            opset_version=cls.opset,
            external_data=False,
            verbose=False,
            input_names=["images"],
            output_names=[*graph.outputs],
            dynamic_shapes=[_dims(graph, free)],
        )

    @staticmethod
    def open(file: Path) -> Run:
        onnxruntime = import_exporter("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        session = onnxruntime.InferenceSession(str(file), options, ["CPUExecutionProvider"])
        return lambda images: session.run(None, {"images": images})


class Onnx(OnnxOfProgram):
    """ONNX, by tracing, which alone manages detectron2's R-CNNs."""

    packages = ("onnx", "onnxruntime")
    pads = True
    by = "tracing"
    opset = 17  # below 16 the ROIAlign of R-CNNs is another, and boxes are wrong
    other_way = OnnxOfProgram

    @classmethod
    def write(cls, graph: Graph, images: torch.Tensor, free: Collection[str], file: Path) -> None:
        axes = {"images": ("batch", images.shape[1], "height", "width"), **graph.outputs}
        fixed = {"batch", "height", "width"} - {*free}
        torch.onnx.register_custom_op_symbolic("aten::linspace", _linspace, cls.opset)
        try:
            torch.onnx.export(
                graph,
                (images,),
                str(file),
                dynamo=False,
                opset_version=cls.opset,
                input_names=["images"],
                output_names=[*graph.outputs],
                dynamic_axes={
                    name: {i: x for i, x in enumerate(own) if isinstance(x, str) and x not in fixed}
                    for name, own in axes.items()
                },
            )
        finally:  # others may export, too
            torch.onnx.unregister_custom_op_symbolic("aten::linspace", cls.opset)


def _linspace(g: Any, start: Any, end: Any, steps: Any, dtype: int, *_: Any) -> Any:
    """torch.linspace in ONNX; torch's own translation drops the type, and the steps are integers.

    The anchors of DINO and Deformable DETR are made by it, and were wrong without an error.
    """
    start, end, count = (g.op("Cast", x, to_i=_FLOAT) for x in (start, end, steps))
    zero, one = (g.op("Constant", value_t=torch.tensor(x)) for x in (0.0, 1.0))
    gaps = g.op("Max", g.op("Sub", count, one), one)
    step = g.op("Div", g.op("Sub", end, start), gaps)
    return g.op("Add", g.op("Mul", g.op("Range", zero, count, one), step), start)


class OpenVinoOfProgram(Format):
    """OpenVINO's own, converted from ONNX."""

    file = "model.xml"
    packages = (*OnnxOfProgram.packages, "openvino")
    pads = False
    between: ClassVar[type[Format]] = OnnxOfProgram

    @classmethod
    def write(cls, graph: Graph, images: torch.Tensor, free: Collection[str], file: Path) -> None:
        openvino = import_exporter("openvino")
        with TemporaryDirectory() as folder:
            between = Path(folder, cls.between.file)
            cls.between.write(graph, images, free, between)
            openvino.save_model(openvino.convert_model(between), file, compress_to_fp16=False)

    @staticmethod
    def open(file: Path) -> Run:
        openvino = import_exporter("openvino")
        # by default it computes in bfloat16 where the processor has it
        options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        options["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
        model = openvino.Core().compile_model(file, "CPU", options)
        return lambda images: [*model(images).values()]


class OpenVino(OpenVinoOfProgram):
    """OpenVINO's own, converted from ONNX that was traced."""

    packages = (*Onnx.packages, "openvino")
    pads = True
    by = "tracing"
    other_way = OpenVinoOfProgram
    between = Onnx


class TorchScript(Format):
    """TorchScript, by tracing."""

    file = "model.ts"
    by = "tracing"

    @classmethod
    def write(cls, graph: Graph, images: torch.Tensor, free: Collection[str], file: Path) -> None:
        traced = torch.jit.trace(graph, images, check_trace=False)
        axes = ("batch", "channels", "height", "width")
        shape = [0 if axis in free else n for axis, n in zip(axes, images.shape)]
        torch.jit.script(_OfShape(traced, shape)).save(str(file))

    @staticmethod
    def open(file: Path) -> Run:
        return _run_by_torch(torch.jit.load(file))


class _OfShape(torch.nn.Module):
    """A traced graph that refuses images of another shape: by itself it takes all."""

    def __init__(self, traced: torch.jit.ScriptModule, shape: list[int]):
        super().__init__()
        self.traced = traced
        self.shape: list[int] = shape  # 0 is any length

    def forward(self, images: torch.Tensor):  # noqa: ANN201, TorchScript infers it
        for i in range(4):
            if self.shape[i] > 0 and self.shape[i] != images.shape[i]:
                raise ValueError(f"invalid dimensions: images must be {self.shape}, 0 being any")
        return self.traced(images)


class ExportedProgram(Format):
    """The program of ``torch.export``."""

    file = "model.pt2"
    pads = False

    @classmethod
    def write(cls, graph: Graph, images: torch.Tensor, free: Collection[str], file: Path) -> None:
        program = torch.export.export(graph, (images,), dynamic_shapes=[_dims(graph, free)])
        torch.export.save(program, file)

    @staticmethod
    def open(file: Path) -> Run:
        return _run_by_torch(torch.export.load(file).module())


FORMATS: dict[str, type[Format]] = {
    "onnx": Onnx,
    "openvino": OpenVino,
    "torchscript": TorchScript,
    "pt2": ExportedProgram,
}


def _dims(graph: Graph, free: Collection[str]) -> dict[int, Any]:
    """The axes of the images that torch.export leaves free."""
    dims = {0: ("batch", 1), 2: ("height", graph.multiple), 3: ("width", graph.multiple)}
    return {i: times * torch.export.Dim(name) for i, (name, times) in dims.items() if name in free}


def _run_by_torch(module: torch.nn.Module) -> Run:
    def run(images: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            return [output.numpy() for output in module(torch.from_numpy(images))]

    return run


def write_quietly(
    form: type[Format], graph: Graph, images: torch.Tensor, free: Collection[str], file: Path
) -> None:
    """Write a graph without the warnings of tracing: what they warn of is tried afterwards."""
    # A trace does not follow len(), so that detectron2 has another one while it traces.
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),  # a graph that failed is printed
        torch.no_grad(),
        patch_builtin_len(),
    ):
        warnings.simplefilter("ignore")
        form.write(graph, images, free, file)
