import numpy as np
import pytest
import torch
from detbackbones.training.pictures import draw_batch, draw_predictions
from detectron2.data import Metadata
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, PolygonMasks
from PIL import Image
from pycocotools.mask import encode

# pycocotools converts its arrays in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

HEIGHT, WIDTH = 60, 80
BOX = [10, 10, 40, 50]
METADATA = Metadata(
    name="cells", thing_classes=["cell", "clump"], stuff_classes=["background", "tissue"]
)


@pytest.fixture
def image(tmp_path):
    """A dataset dict of a gray image with one box, its polygon and its label map."""
    Image.new("RGB", (WIDTH, HEIGHT), (128, 128, 128)).save(tmp_path / "image.png")
    labels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    labels[10:50, 10:40] = 1
    labels[:5] = 255
    Image.fromarray(labels).save(tmp_path / "labels.png")
    x0, y0, x1, y1 = BOX
    return {
        "file_name": str(tmp_path / "image.png"),
        "sem_seg_file_name": str(tmp_path / "labels.png"),
        "annotations": [
            {
                "bbox": BOX,
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": 0,
                "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
            }
        ],
    }


def instances(scores, classes, masks=True, size=(HEIGHT, WIDTH)):
    result = Instances(size)
    result.pred_boxes = Boxes(torch.tensor([BOX] * len(scores), dtype=torch.float).reshape(-1, 4))
    result.scores = torch.tensor(scores)
    result.pred_classes = torch.tensor(classes, dtype=torch.int64)
    if masks:
        result.pred_masks = torch.zeros(len(scores), *size, dtype=torch.bool)
        result.pred_masks[:, 10:50, 10:40] = True
    return {"instances": result}


def painted(path):
    """Return how many pixels of each panel are colored: neither gray nor text."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    panels = pixels[:-45]  # less the legend
    color = np.ptp(panels, axis=2) > 25
    middle = color.shape[1] // 2
    return int(color[:, :middle].sum()), int(color[:, middle:].sum())


def test_a_right_prediction_is_painted_like_the_ground_truth(image, tmp_path):
    path = tmp_path / "new" / "out.png"
    assert draw_predictions([image], [instances([0.9], [0])], METADATA, path) == path
    left, right = painted(path)
    panel = 600**2 * HEIGHT / WIDTH
    assert left == pytest.approx(panel * (30 * 40) / (HEIGHT * WIDTH), rel=0.06)
    assert right == pytest.approx(left, rel=0.03)


def test_every_image_gets_a_row(image, tmp_path):
    one, two = (
        Image.open(draw_predictions([image] * n, [instances([], [])] * n, METADATA, tmp_path / "p"))
        for n in (1, 2)
    )
    assert one.width == two.width == 1220
    assert two.height - one.height == 592 * HEIGHT // WIDTH + 8


def test_many_images_are_four_in_a_row(image, tmp_path):
    sizes = {}
    for count in (4, 5, 8):
        predictions = [instances([0.9], [0])] * count
        path = draw_predictions([image] * count, predictions, METADATA, tmp_path / "p")
        sizes[count] = Image.open(path).size
    assert sizes[5][0] == sizes[8][0] == 4 * 450 + 20
    assert sizes[8][1] - sizes[5][1] == round(442 * HEIGHT / WIDTH) + 8  # rows of two images
    assert sizes[8][1] < 0.8 * sizes[4][1]


def test_scores_below_the_threshold_are_left_out(image, tmp_path):
    prediction = [instances([0.3], [0])]
    left, right = painted(draw_predictions([image], prediction, METADATA, tmp_path / "a.png"))
    assert left > 0 and right == 0
    _, right = painted(draw_predictions([image], prediction, METADATA, tmp_path / "b.png", 0.2))
    assert right > 0


def test_boxes_alone_are_drawn_as_outlines_on_both_sides(image, tmp_path):
    masks = draw_predictions([image], [instances([0.9], [0])], METADATA, tmp_path / "a.png")
    prediction = [instances([0.9], [0], masks=False)]
    boxes = draw_predictions([image], prediction, METADATA, tmp_path / "b.png")
    for outline, filled in zip(painted(boxes), painted(masks)):
        assert 0 < outline < filled / 10


def test_many_objects_have_no_labels(image, tmp_path):
    few, many = (
        Image.open(
            draw_predictions([image], [instances([0.9] * n, [0] * n)], METADATA, tmp_path / "p")
        ).convert("L")
        for n in (1, 11)
    )
    few, many = (np.asarray(picture)[:, picture.width // 2 :] for picture in (few, many))
    assert (few < 60).sum() > (many < 60).sum() + 500  # the black behind the label


def test_semantic_segmentation_leaves_background_and_ignored_pixels(image, tmp_path):
    scores = torch.zeros(2, HEIGHT, WIDTH)
    scores[1, :, 40:] = 1
    path = draw_predictions([image], [{"sem_seg": scores}], METADATA, tmp_path / "a.png")
    left, right = painted(path)
    panel = 600**2 * HEIGHT / WIDTH
    assert left == pytest.approx(panel * (30 * 40) / (HEIGHT * WIDTH), rel=0.06)
    assert right == pytest.approx(panel / 2, rel=0.06)


@pytest.mark.parametrize("isthing", [True, False])
def test_panoptic_segments_are_decoded(image, tmp_path, isthing):
    ids = np.full((HEIGHT, WIDTH, 3), (0, 0, 0), dtype=np.uint8)
    ids[10:50, 10:40] = (7, 1, 0)  # 7 + 256
    Image.fromarray(ids).save(tmp_path / "panoptic.png")
    segments = [{"id": 263, "category_id": 1, "isthing": isthing}]
    image |= {"pan_seg_file_name": str(tmp_path / "panoptic.png"), "segments_info": segments}
    segmentation = torch.from_numpy(ids.astype(int) @ [1, 256, 0])
    prediction = {"panoptic_seg": (segmentation, segments), "sem_seg": torch.zeros(2, 1, 1)}
    left, right = painted(draw_predictions([image], [prediction], METADATA, tmp_path / "a.png"))
    assert left == pytest.approx(right, rel=0.01)
    assert right > 50_000


def test_an_image_without_ground_truth_is_plain_on_the_left(image, tmp_path):
    plain = {"file_name": image["file_name"]}
    semantic = {"sem_seg": torch.tensor([0.0, 1.0])[:, None, None].expand(2, HEIGHT, WIDTH)}
    for prediction in (instances([0.9], [0]), semantic):
        left, right = painted(draw_predictions([plain], [prediction], METADATA, tmp_path / "a.png"))
        assert left == 0
        assert right > 0


@pytest.mark.parametrize(
    "predictions, message",
    [
        ([], "of one length, at least 1; got 1 and 0"),
        ([{"proposals": None}], r"found the keys \['proposals'\]"),
        ([instances([0.9], [0], size=(60, 81))], r"\(60, 81\) for .*, which has \(60, 80\)"),
        ([instances([0.9], [2])], "2 thing_classes, which is too few to name class 2"),
        ([{"panoptic_seg": (torch.zeros(HEIGHT, WIDTH), None)}], "needs its segments_info"),
    ],
)
def test_wrong_predictions_are_refused(image, tmp_path, predictions, message):
    with pytest.raises(ValueError, match=message):
        draw_predictions([image], predictions, METADATA, tmp_path / "a.png")


def test_a_class_has_one_colour_in_every_picture(image, tmp_path):
    clump = image | {"annotations": [image["annotations"][0] | {"category_id": 1}]}
    predictions = [instances([0.9], [category]) for category in (0, 1, 0)]
    path = draw_predictions([image, clump, image], predictions, METADATA, tmp_path / "a.png")
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    inside = [[pixels[150 + 450 * row, 165 + 600 * side] for side in (0, 1)] for row in range(3)]
    cell, clump, again = np.array(inside)
    assert (cell == again).all()
    assert (cell[0] == cell[1]).all() and (clump[0] == clump[1]).all()
    assert np.abs(cell[0] - clump[0]).max() > 80


def test_a_hole_stays_open(image, tmp_path):
    prediction = instances([0.9], [0])
    whole = painted(draw_predictions([image], [prediction], METADATA, tmp_path / "a.png"))
    prediction["instances"].pred_masks[:, 20:30, 15:35] = False
    left, right = painted(draw_predictions([image], [prediction], METADATA, tmp_path / "b.png"))
    assert left == whole[0]
    assert whole[1] - right == pytest.approx(592**2 * 200 / WIDTH**2, rel=0.2)


def test_labels_lie_inside_the_picture(image, tmp_path):
    """The black behind a label is as large in a corner as in the middle."""
    black = []
    for box in [20, 20, 60, 40], [70, 50, 80, 60]:
        prediction = instances([0.9], [0], masks=False)
        prediction["instances"].pred_boxes = Boxes([box])
        path = draw_predictions([image], [prediction], METADATA, tmp_path / "a.png")
        black.append((np.asarray(Image.open(path).convert("L"))[30:-45, 615:] < 60).sum())
    assert black[1] == pytest.approx(black[0], rel=0.05)


def test_objects_with_and_without_a_mask_stand_side_by_side(image, tmp_path):
    annotation = image["annotations"][0]
    box = {key: annotation[key] for key in ("bbox", "bbox_mode", "category_id")}
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    mask[10:50, 10:40] = 1
    prediction = instances([0.9], [0])
    prediction["instances"].remove("pred_boxes")
    sizes = []
    for annotations in [annotation], [annotation | {"segmentation": encode(mask)}, box]:
        image["annotations"] = annotations
        path = draw_predictions([image], [prediction], METADATA, tmp_path / "a.png")
        sizes.append(painted(path))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


@pytest.mark.parametrize("kind", ["polygon", "bits", "label map"])
def test_a_batch_is_drawn_as_the_model_sees_it(tmp_path, kind):
    """The second of two images of different heights has nothing in it."""
    samples = []
    for height in (HEIGHT, HEIGHT - 20):
        sample = {"image": torch.full((3, height, WIDTH), 128, dtype=torch.uint8)}
        bits = torch.zeros(1, height, WIDTH, dtype=torch.bool)
        if not samples:
            bits[:, 10:50, 10:40] = True
        if kind == "label map":
            sample["sem_seg"] = bits[0].long()
        else:
            objects = Instances((height, WIDTH), gt_boxes=Boxes([BOX]), gt_classes=torch.zeros(1))
            x0, y0, x1, y1 = BOX
            outline = np.array([x0, y0, x1, y0, x1, y1, x0, y1], float)
            masks = PolygonMasks([[outline]]) if kind == "polygon" else BitMasks(bits)
            objects.gt_masks = masks
            sample["instances"] = objects if not samples else objects[torch.zeros(1).bool()]
        samples.append(sample)
    left, right = painted(draw_batch(samples, METADATA, tmp_path / "batch.png"))
    panel = 600**2 * HEIGHT / WIDTH
    assert left == pytest.approx(panel * (30 * 40) / (HEIGHT * WIDTH), rel=0.06)
    assert right == 0
    three = Image.open(draw_batch([*samples, samples[0]], METADATA, tmp_path / "three.png"))
    assert three.size[1] > 1.8 * HEIGHT / WIDTH * 600


def test_blue_is_blue(tmp_path):
    image = torch.zeros(3, 30, 40, dtype=torch.uint8)
    image[0] = 200
    for bgr, channel in ((True, 2), (False, 0)):
        path = draw_batch([{"image": image}], METADATA, tmp_path / "a.png", bgr)
        pixel = Image.open(path).convert("RGB").getpixel((100, 100))
        assert pixel[channel] == 200 and sum(pixel) == 200
