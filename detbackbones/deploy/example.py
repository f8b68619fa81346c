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
OPEN = {
    "onnx": """\
model = onnxruntime.InferenceSession(folder / about["file"], providers=["CPUExecutionProvider"])""",
    "openvino": """\
exact = {"INFERENCE_PRECISION_HINT": "f32"}  # without it bfloat16, where the processor has it
model = openvino.Core().compile_model(folder / about["file"], "CPU", exact)""",
    "torchscript": """\
model = torch.jit.load(folder / about["file"])""",
    "pt2": """\
model = torch.export.load(folder / about["file"]).module()""",
}
_BY_TORCH = """\
    with torch.no_grad():
        outputs = [output.numpy() for output in model(torch.from_numpy(pixels[None]))]"""
RUN = {
    "onnx": """\
    outputs = model.run([*about["outputs"]], {"images": pixels[None]})""",
    "openvino": """\
    outputs = model(pixels[None]).values()""",
    "torchscript": _BY_TORCH,
    "pt2": _BY_TORCH,
}
FITTING = {
    "fixed": """\
    size = rule["width"], rule["height"]""",
    "sides": """\
    scale = min(rule["shorter_side"] / min(image.size), rule["longer_side"] / max(image.size))
    size = [round(scale * length) for length in image.size]""",
    "as it is": """\
    size = image.size""",
}
MULTIPLE = """
    size = [max(round(length / rule["multiple"]), 1) * rule["multiple"] for length in size]"""
NORMALIZE = """
    mean, deviation = (np.float32(about[key])[:, None, None] for key in ("pixel_mean", "pixel_std"))
    pixels = (pixels - mean) / deviation"""

# By what is given: the function that gives it and what it says, how, and what the program shows.
GIVE = {
    "boxes": (
        "detect",
        "Objects in a PIL image: class, score, and box (x0, y0, x1, y1) in pixels.",
        """\
    scale = np.float32([image.width / size[0], image.height / size[1]] * 2)
    boxes, scores, classes = found["boxes"], found["scores"], found["classes"]
    objects = []
    for i, score in enumerate(scores.flatten().tolist()):
        if score >= about["score_threshold"]:
            name, box = NAME, (boxes.reshape(-1, 4)[i] * scale).tolist()
            objects.append({"class": name, "score": score, "box": box})MASK
    return objects""",
        """\
    for x in detect(Image.open(sys.argv[1])):
        print(x["class"], f"{x['score']:.2f}", *(f"{side:.1f}" for side in x["box"]))""",
    ),
    "sem_seg": (
        "segment",
        "The number of the class of each pixel of a PIL image.",
        """\
    labels = Image.fromarray(found["sem_seg"][0].argmax(0).astype(np.uint8))
    return np.asarray(labels.resize(image.size, Image.NEAREST))""",
        """\
    file = Path(sys.argv[1]).stem + "_labels.png"
    with open(file, "xb") as output:  # which is not there yet
        Image.fromarray(segment(Image.open(sys.argv[1]))).save(output, "PNG")
    print(f"wrote {file}: the class of each pixel")""",
    ),
    "maps": (
        "levels",
        "Maps of a PIL image.",
        "    return found",
        """\
    for name, level in levels(Image.open(sys.argv[1])).items():
        print(name, level.shape)""",
    ),
}
MASKS = {
    "box": """
            (x0, y0, x1, y1), mask = box, found["masks"][i]
            x, y = mask.shape[1] / max(x1 - x0, 1e-6), mask.shape[0] / max(y1 - y0, 1e-6)
            placed = (x, 0, 1 - x * x0, 0, y, 1 - y * y0)  # in the mask with nothing around it
            mask = Image.fromarray(np.pad(mask, 1))
            mask = mask.transform(image.size, Image.AFFINE, placed, Image.BILINEAR)
            objects[-1]["mask"] = np.asarray(mask) > 0.5  # bits (height, width)""",
    "image": """
            mask = Image.fromarray(found["masks"].reshape(-1, *size[::-1])[i])
            objects[-1]["mask"] = np.asarray(mask.resize(image.size, Image.NEAREST))""",
}


def write_example(folder: Path, about: dict[str, Any]) -> None:
    """Write a program that needs numpy, pillow and what runs the format, and neither of ours.

    It has a function that others can import.

    Args:
        folder: that was exported to.
        about: the content of its ``model.json``. Of images that are not gray or in colour, with 8
            bits, no program is written.
    """
    channels, outputs = about["input"]["shape"][1], about["outputs"]
    if channels not in (1, 3) or about.get("max_value"):
        return
    kind = next((key for key in ("boxes", "sem_seg") if key in outputs), "maps")
    rule = about["resize"]
    fitting = "fixed" if "height" in rule else "sides" if "shorter_side" in rule else "as it is"
    lines = FITTING[fitting] + (MULTIPLE if "multiple" in rule else "")
    order = "[::-1]" if about.get("channel_order") == "BGR" else ""
    read = f".transpose(2, 0, 1){order}" if channels == 3 else "[None]"
    label = "int(classes.flatten()[i])"
    name = f"""about["classes"][{label}]""" if about.get("classes") else label
    mask = MASKS["image" if "height" in outputs["masks"] else "box"] if "masks" in outputs else ""
    normalize = NORMALIZE if kind == "maps" and about.get("pixel_mean") else ""
    mode = "RGB" if channels == 3 else "L"
    function, says, give, show = GIVE[kind]
    text = f'''\
"""Run {about["file"]} on an image: python example.py IMAGE, or import {function}."""

import json
import sys
from pathlib import Path

import numpy as np
{IMPORTS[about["format"]]}
from PIL import Image, ImageOps

folder = Path(__file__).parent
about = json.loads((folder / "model.json").read_text())
rule = about["resize"]
{OPEN[about["format"]]}


def {function}(image):
    """{says}"""
    image = ImageOps.exif_transpose(image).convert("{mode}")
{lines}
    pixels = np.asarray(image.resize(size, Image.BILINEAR), dtype=np.float32){read}
    pixels = np.ascontiguousarray(pixels){normalize}
{RUN[about["format"]]}
    found = dict(zip(about["outputs"], outputs))
{give.replace("NAME", name).replace("MASK", mask)}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python example.py IMAGE")
{show}
'''
    (folder / FILE).write_text(text)
