"""Draw a data set of shapes in COCO's format, to try a detector without downloading anything.

    python tools/draw_shapes.py --output shapes/source --classes circle,square,triangle,star,cross
    python tools/draw_shapes.py --output shapes/target --classes ring,heart,arrow --train 20

Each image has a few shapes on a textured background. Size, rotation, colours, texture and outline
are drawn at random, alike for all the classes, so that only its outline tells what a shape is.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

DESCRIPTION = "Shapes drawn by tools/draw_shapes.py"
OVERSAMPLING = 4  # shapes are drawn larger and scaled down, for smooth edges
BACKGROUNDS = ("gradient", "stripes", "dots", "clouds")
FILLS = ("flat", "stripes", "dots", "noise")


def _arc(start: float, stop: float, radius: float = 1.0, points: int = 48) -> np.ndarray:
    angles = np.radians(np.linspace(start, stop, points))
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _star() -> np.ndarray:
    points = _arc(0, 324, points=10)
    points[1::2] *= 0.45
    return points


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 64)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y - 2.5], axis=1) / 17


def _crescent() -> np.ndarray:
    # Both arcs end in the same two points: cos(60) - 0.5 = 0 and the radius sin(60).
    outer = _arc(60, 300) + (-0.1, 0)
    inner = _arc(270, 90, radius=np.sin(np.radians(60))) * (0.75, 1) + (0.4, 0)
    return np.concatenate([outer, inner])


_CROSS = [(1, 3), (1, 1), (3, 1), (3, -1), (1, -1), (1, -3)]
_ARROW = [(1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3), (-1, -0.3), (0.1, -0.3), (0.1, -0.8)]

# For each class its outline, and after it the outlines of its holes, within a radius of 1.
SHAPES = {
    "circle": [_arc(0, 360)],
    "square": [_arc(45, 315, points=4)],
    "triangle": [_arc(0, 240, points=3)],
    "star": [_star()],
    "cross": [np.array(_CROSS + [(-x, -y) for x, y in _CROSS]) / 3.2],
    "ring": [_arc(0, 360), _arc(0, 360, radius=0.5)],
    "crescent": [_crescent()],
    "hexagon": [_arc(0, 300, points=6)],
    "arrow": [np.array(_ARROW)],
    "heart": [_heart()],
}


def draw(
    output: str | Path,
    classes: Sequence[str] = tuple(SHAPES),
    train: int = 200,
    val: int = 50,
    size: int = 160,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, int]:
    """Draw the images, the label maps and the COCO annotations of a data set of shapes.

    It writes ``images/{train,val}/*.jpg``, ``{train,val}.json`` with boxes and polygons of the
    visible part of each shape, and ``labels/{train,val}/*.png``: 0 is the background, i + 1 is
    ``classes[i]``. The same arguments write the same bytes.

    Args:
        output: the folder to write to; it must be empty or not exist.
        classes: the names of the shapes to draw, of ``SHAPES``; their category ids are 1, 2, ...
        train: the number of images to train on.
        val: the number of images to validate on.
        size: the height and width of the images, in pixels, at least 64.
        seed: what the random numbers start from, at least 0.
        overwrite: replace a data set that this function made before.

    Returns:
        the number of shapes in each split: ``{"train": ..., "val": ...}``.

    Raises:
        ValueError: if an argument is out of its range, or a class is unknown or given twice.
        FileExistsError: if ``output`` has something in it that must not be replaced.
    """
    output = Path(output)
    _check(classes, train, val, size, seed)
    _empty(output, overwrite)
    shapes = {}
    for stream, (split, count) in enumerate({"train": train, "val": val}.items()):
        for kind in ("images", "labels"):
            (output / kind / split).mkdir(parents=True)
        images, annotations = [], []
        for index in tqdm(range(1, count + 1), desc=split, unit="image"):
            rng = np.random.default_rng([seed, stream, index])
            pixels, owner, drawn = _draw_image(rng, classes, size)
            name = f"{index:05d}.jpg"
            Image.fromarray(pixels).save(output / "images" / split / name, quality=95)
            labels = np.array([0, *drawn], dtype=np.uint8)[owner]
            Image.fromarray(labels).save(output / "labels" / split / f"{index:05d}.png")
            images.append({"id": index, "file_name": name, "width": size, "height": size})
            for shape, category in enumerate(drawn, start=1):
                annotation = {"id": len(annotations) + 1, "image_id": index}
                annotation |= {"category_id": category, "iscrowd": 0}
                annotations.append(annotation | _outline(owner == shape))
        content = {
            "info": {"description": DESCRIPTION},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for i, name in enumerate(classes, start=1)],
        }
        (output / f"{split}.json").write_text(json.dumps(content))
        shapes[split] = len(annotations)
    return shapes


def _check(classes: Sequence[str], train: int, val: int, size: int, seed: int) -> None:
    for name in classes:
        if name not in SHAPES:
            raise ValueError(f"classes={name!r} must be one of {', '.join(SHAPES)}")
    if not classes or len(set(classes)) < len(classes):
        raise ValueError(f"classes={','.join(classes)!r} must name one or more shapes, each once")
    for name, value, least in (
        ("train", train, 1),
        ("val", val, 1),
        ("size", size, 64),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")


def _empty(output: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    made_here = (output / "val.json").is_file() and DESCRIPTION in (output / "val.json").read_text()
    if not made_here:
        raise FileExistsError(f"output={str(output)!r} must be a new or empty folder")
    if not overwrite:
        raise FileExistsError(
            f"output={str(output)!r} must be a new or empty folder: it has a data set of shapes, "
            "which overwrite=True (--overwrite) replaces"
        )
    for kind in ("images", "labels"):
        shutil.rmtree(output / kind)
    for split in ("train", "val"):
        (output / f"{split}.json").unlink()


def _draw_image(
    rng: np.random.Generator, classes: Sequence[str], size: int
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Draw one image.

    Returns:
        the RGB image (size, size, 3); for each pixel the number of the shape that it shows
        (size, size), 0 for none; and the category ids of the shapes 1, 2, ...
    """
    canvas = _paint(rng, rng.choice(BACKGROUNDS), size) * 0.6
    canvas += _paint(rng, "clouds", size) * 0.4
    owner = np.zeros((size, size), dtype=np.int64)
    drawn, areas = [], []
    wanted, may_overlap = rng.integers(2, 7), rng.random() < 0.4
    for _ in range(30):
        if len(drawn) == wanted:
            break
        category = int(rng.integers(len(classes))) + 1
        contours = _place(rng, SHAPES[classes[category - 1]], size)
        cover, edge = _rasterize(rng, contours, size)
        mask = cover >= 0.5
        hidden = np.bincount(owner[mask], minlength=len(drawn) + 1)[1:]
        left = np.bincount(owner.ravel(), minlength=len(drawn) + 1)[1:] - hidden
        if (left < 0.75 * np.array(areas)).any() or (hidden.any() and not may_overlap):
            continue
        fill = _contrasting_paint(rng, canvas, mask, size)
        if rng.random() < 0.5:
            fill += (rng.uniform(0, 255, 3) - fill) * edge[..., None]
        canvas += (fill - canvas) * cover[..., None]
        drawn.append(category)
        areas.append(mask.sum())
        owner[mask] = len(drawn)
    canvas += rng.normal(0, rng.uniform(2, 10), canvas.shape)
    return canvas.clip(0, 255).astype(np.uint8), owner, drawn


def _place(rng: np.random.Generator, contours: list[np.ndarray], size: int) -> list[np.ndarray]:
    radius = size * rng.uniform(0.08, 0.2)
    angle = rng.uniform(0, 2 * np.pi)
    center = rng.uniform(radius, size - radius, 2)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    stretch = radius * np.array([1, rng.uniform(0.8, 1)])
    return [center + (points * stretch) @ rotation.T for points in contours]


def _rasterize(
    rng: np.random.Generator, contours: list[np.ndarray], size: int
) -> tuple[np.ndarray, np.ndarray]:
    """How much of each pixel the shape and its outline cover, both (size, size) in 0..1."""
    layers = [Image.new("L", (size * OVERSAMPLING,) * 2) for _ in range(2)]
    cover, edge = (ImageDraw.Draw(layer) for layer in layers)
    width = round(OVERSAMPLING * size * rng.uniform(0.01, 0.025))
    for fill, points in zip([255] + [0] * len(contours), contours):
        corners = [tuple(point) for point in points * OVERSAMPLING]
        cover.polygon(corners, fill=fill)
        edge.line([*corners, *corners[:2]], fill=255, width=width, joint="curve")
    return tuple(
        np.asarray(layer.resize((size, size), Image.Resampling.BOX)) / 255.0 for layer in layers
    )


def _contrasting_paint(
    rng: np.random.Generator, canvas: np.ndarray, mask: np.ndarray, size: int
) -> np.ndarray:
    kind = rng.choice(FILLS)
    behind = canvas[mask].mean(axis=0)
    for _ in range(20):
        paint = _paint(rng, kind, size)
        if np.linalg.norm(paint[mask].mean(axis=0) - behind) > 70:
            break
    return paint


def _paint(rng: np.random.Generator, kind: str, size: int) -> np.ndarray:
    """A texture (size, size, 3) that blends two random colours."""
    first, second = rng.uniform(0, 255, (2, 3))
    return first + (second - first) * _texture(rng, kind, size)[..., None]


def _texture(rng: np.random.Generator, kind: str, size: int) -> np.ndarray:
    y, x = np.mgrid[:size, :size] / size
    angle = rng.uniform(0, np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    frequency = 2 * np.pi * rng.uniform(8, 22)
    if kind == "flat":
        return np.zeros((size, size))
    if kind == "gradient":
        return (along - along.min()) / np.ptp(along)
    if kind == "stripes":
        return 0.5 + 0.5 * np.tanh(3 * np.sin(frequency * along))
    if kind == "dots":
        return 0.5 + 0.5 * np.tanh(
            6 * (np.sin(frequency * along) * np.sin(frequency * across) - 0.4)
        )
    cells = (size // 3,) if kind == "noise" else (3, 6, 12, 24)
    field = np.zeros((size, size))
    for n in cells:
        grid = Image.fromarray(rng.random((n, n)).astype(np.float32))
        field += np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC)) / np.sqrt(n)
    return (field - field.min()) / np.ptp(field)


def _outline(mask: np.ndarray) -> dict:
    """COCO's area, box (x, y, width, height) and polygons of a mask (H, W)."""
    ys, xs = np.nonzero(mask)
    x, y = int(xs.min()), int(ys.min())
    return {
        "area": int(mask.sum()),
        "bbox": [x, y, int(xs.max()) + 1 - x, int(ys.max()) + 1 - y],
        "segmentation": _polygons(mask),
    }


def _polygons(mask: np.ndarray) -> list[list[int]]:
    """The polygons (x, y, x, y, ...) that cover exactly the pixels of a mask (H, W).

    COCO's polygons have no holes: a mask with a hole is cut in two through the hole.
    """
    polygons = []
    for loop in _boundaries(mask):
        x, y = np.array(loop).T
        if (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() < 0:
            left = mask.copy()
            left[:, (x.min() + x.max()) // 2 :] = False
            return _polygons(left) + _polygons(mask & ~left)
        corner = (np.roll(x, 1) != np.roll(x, -1)) & (np.roll(y, 1) != np.roll(y, -1))
        polygons.append(np.stack([x, y], axis=1)[corner].ravel().tolist())
    return polygons


def _boundaries(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """The closed paths along pixel edges that have the mask on their right-hand side."""
    inside = np.pad(mask, 1)
    steps: dict[tuple[int, int], list[tuple[int, int]]] = {}
    # For each side: the neighbour that must be outside, and the edge's start and direction.
    for neighbour, (x0, y0), (dx, dy) in (
        (inside[:-2, 1:-1], (0, 0), (1, 0)),
        (inside[1:-1, 2:], (1, 0), (0, 1)),
        (inside[2:, 1:-1], (1, 1), (-1, 0)),
        (inside[1:-1, :-2], (0, 1), (0, -1)),
    ):
        for y, x in np.argwhere(mask & ~neighbour).tolist():
            steps.setdefault((x + x0, y + y0), []).append((dx, dy))
    loops = []
    while steps:
        start = point = next(iter(steps))
        loop = []
        while point != start or not loop:
            loop.append(point)
            dx, dy = steps[point].pop()
            if not steps[point]:
                del steps[point]
            point = (point[0] + dx, point[1] + dy)
        loops.append(loop)
    return loops


def main() -> None:
    """Read the command line and draw the data set."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", required=True, help="folder to write to, new or empty")
    parser.add_argument("--classes", default=",".join(SHAPES), help="default: %(default)s")
    parser.add_argument("--train", type=int, default=200, help="images; default: %(default)s")
    parser.add_argument("--val", type=int, default=50, help="images; default: %(default)s")
    parser.add_argument("--size", type=int, default=160, help="pixels; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace shapes drawn before")
    args = parser.parse_args()
    arguments = vars(args) | {"classes": [c for c in args.classes.split(",") if c]}
    try:
        shapes = draw(**arguments)
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))
    for split, count in shapes.items():
        images = getattr(args, split)
        print(f"{args.output}/{split}.json: {images} images with {count} shapes")


if __name__ == "__main__":
    main()
