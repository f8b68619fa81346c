"""The program that is written beside what was exported, and shows how it is run elsewhere."""

from pathlib import Path
from typing import Any

FILE = "example.py"
IMPORTS = {
    "onnx": "import onnxruntime",
    "openvino": "import openvino",
    "torchscript": "import torch\nimport torchvision  # has the operators of detectors",
    "pt2": "import torch\nimport torchvision  # has the operators of detectors",
}
RUN = {
    "onnx": """\
session = onnxruntime.InferenceSession(folder / about["file"], providers=["CPUExecutionProvider"])
outputs = session.run(None, {"images": pixels[None]})""",
    "openvino": """\
exact = {"INFERENCE_PRECISION_HINT": "f32"}  # without it bfloat16, where the processor has it
model = openvino.Core().compile_model(folder / about["file"], "CPU", exact)
outputs = model(pixels[None]).values()""",
    "torchscript": """\
model = torch.jit.load(folder / about["file"])
with torch.no_grad():
    outputs = [output.numpy() for output in model(torch.from_numpy(pixels[None]))]""",
    "pt2": """\
model = torch.export.load(folder / about["file"]).module()
with torch.no_grad():
    outputs = [output.numpy() for output in model(torch.from_numpy(pixels[None]))]""",
}
FITTING = {
    "fixed": """size = rule["width"], rule["height"]""",
    "sides": """\
scale = min(rule["shorter_side"] / min(image.size), rule["longer_side"] / max(image.size))
size = [round(scale * length) for length in image.size]""",
    "as it is": "size = image.size",
}
MULTIPLE = """
size = [max(round(length / rule["multiple"]), 1) * rule["multiple"] for length in size]"""
NORMALIZE = """
mean, deviation = (np.float32(about[key])[:, None, None] for key in ("pixel_mean", "pixel_std"))
pixels = (pixels - mean) / deviation"""
SHOW = {
    "boxes": """\
scale = np.float32([image.width / size[0], image.height / size[1]] * 2)
boxes, scores, classes = found["boxes"], found["scores"], found["classes"]
for box, score, label in zip(boxes.reshape(-1, 4) * scale, scores.flatten(), classes.flatten()):
    if score >= about["score_threshold"]:
        print(NAME, f"{score:.2f}", *box.round(1))""",
    "sem_seg": """\
labels = Image.fromarray(found["sem_seg"][0].argmax(0).astype(np.uint8))
file = Path(sys.argv[1]).stem + "_labels.png"
with open(file, "xb") as output:  # which is not there yet
    labels.resize(image.size, Image.NEAREST).save(output, "PNG")
print(f"wrote {file}: the class of each pixel")""",
    "maps": """\
for name, level in found.items():
    print(name, level.shape)""",
}


def write_example(folder: Path, about: dict[str, Any]) -> None:
    """Write a program that needs numpy, pillow and what runs the format, and neither of ours.

    Args:
        folder: that was exported to.
        about: the content of its ``model.json``. Of images that are not gray or in colour, with 8
            bits, no program is written.
    """
    channels = about["input"]["shape"][1]
    if channels not in (1, 3) or about.get("max_value"):
        return
    kind = next((key for key in ("boxes", "sem_seg") if key in about["outputs"]), "maps")
    rule = about["resize"]
    fitting = "fixed" if "height" in rule else "sides" if "shorter_side" in rule else "as it is"
    lines = FITTING[fitting] + (MULTIPLE if "multiple" in rule else "")
    order = "[::-1]" if about.get("channel_order") == "BGR" else ""
    read = f".transpose(2, 0, 1){order}" if channels == 3 else "[None]"
    name = """about["classes"][int(label)]""" if about.get("classes") else "int(label)"
    normalize = NORMALIZE if kind == "maps" and about.get("pixel_mean") else ""
    mode = "RGB" if channels == 3 else "L"
    text = f'''\
"""Run {about["file"]} on an image: python example.py IMAGE."""

import json
import sys
from pathlib import Path

import numpy as np
{IMPORTS[about["format"]]}
from PIL import Image, ImageOps

folder = Path(__file__).parent
about = json.loads((folder / "model.json").read_text())
rule = about["resize"]

image = ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("{mode}")
{lines}
pixels = np.asarray(image.resize(size, Image.BILINEAR), dtype=np.float32){read}
pixels = np.ascontiguousarray(pixels){normalize}

{RUN[about["format"]]}
found = dict(zip(about["outputs"], outputs))

{SHOW[kind].replace("NAME", name)}
'''
    (folder / FILE).write_text(text)
