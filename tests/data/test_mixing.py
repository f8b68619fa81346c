"""Images made of several: where each pixel, box and mask of the parts ends up."""

import numpy as np
import pytest
import torch
from detbackbones.data.loader import build_train_loader
from detbackbones.data.mixing import Mixing, copy_paste, mixup, mosaic, window
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks


def sample(shade, box, size=(40, 60), masks="bits", kind=0):
    """An image of one shade, with a rectangle that is ten brighter."""
    image = torch.full((3, *size), shade, dtype=torch.uint8)
    x0, y0, x1, y1 = box
    image[:, y0:y1, x0:x1] += 10
    instances = Instances(size, gt_boxes=Boxes([box]), gt_classes=torch.tensor([kind]))
    if masks == "bits":
        instances.gt_masks = BitMasks(image[:1] == shade + 10)
    elif masks == "polygons":
        outline = [x0, y0, x1, y0, x1, y1, x0, y1]
        instances.gt_masks = PolygonMasks([[np.array(outline, float)]])
    return {"image": image, "instances": instances, "height": 400}


def assert_together(got):
    """Each box is tight about its mask, under which the image is bright."""
    instances = got["instances"]
    assert instances.image_size == tuple(got["image"].shape[1:])
    for box, mask in zip(instances.gt_boxes.tensor, instances.gt_masks.tensor):
        y, x = torch.nonzero(mask, as_tuple=True)
        assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
        assert (got["image"][0][mask] % 20 == 10).all()


@pytest.mark.parametrize("masks", ["bits", "polygons"])
def test_a_window(masks):
    whole = sample(100, (10, 5, 30, 25), masks=masks)
    seen = window(whole, 15, 20, 50, 30)
    assert seen["image"].shape == (3, 50, 30) and seen["height"] == 400
    assert seen["instances"].gt_boxes.tensor.tolist() == [[0, 0, 10, 10]]
    assert (seen["image"][:, :10, :10] == 110).all() and (seen["image"][:, 25:] == 128).all()
    assert_together(seen)
    beyond = window(whole, -3, -4, 60, 90)
    assert beyond["instances"].gt_boxes.tensor.tolist() == [[14, 8, 34, 28]]
    assert torch.equal(beyond["image"][:, 3:43, 4:64], whole["image"])
    assert_together(beyond)
    assert len(window(whole, 24, 29, 30, 30)["instances"]) == 0  # a four-hundredth is left
    assert len(window(whole, 39, 59, 5, 5)["instances"]) == 0
    assert whole["instances"].gt_boxes.tensor.tolist() == [[10, 5, 30, 25]]


def test_a_mosaic():
    boxes = [(45, 25, 60, 40), (0, 30, 12, 40), (50, 0, 60, 9), (1, 2, 11, 12)]
    found = set()
    for seed in range(8):
        np.random.seed(seed)
        sizes = [(40, 60), (50, 40), (30, 70), (40, 60)]
        parts = [sample(40 * i, box, size=s) for i, (box, s) in enumerate(zip(boxes, sizes))]
        parts[1] = sample(40, (0, 40, 12, 50), size=(50, 40))
        parts[2] = sample(80, (60, 0, 70, 9), size=(30, 70))
        got = mosaic(parts)
        assert got["image"].shape == (3, 40, 60)
        assert len(got["instances"]) == 4
        assert_together(got)
        corner = [got["image"][0, y, x].item() for y in (0, -1) for x in (0, -1)]
        assert corner[0] == 0 and corner[3] in (120, 128)
        found.add(tuple(got["instances"].gt_boxes.tensor[3].int().tolist()))
    assert len(found) > 4


def test_a_mosaic_of_label_maps():
    np.random.seed(0)
    parts = [
        {"image": torch.full((3, 40, 60), 10 * i, dtype=torch.uint8)}
        | {"sem_seg": torch.full((40, 60), i)}
        for i in range(4)
    ]
    got = mosaic(parts)
    assert torch.equal(got["image"][0].long(), 10 * got["sem_seg"])
    assert got["sem_seg"].unique().tolist() == [0, 1, 2, 3]
    small = [parts[0], *({k: v[..., :3, :3] for k, v in part.items()} for part in parts[1:])]
    got = mosaic(small)
    assert set(got["sem_seg"].unique().tolist()) == {0, 1, 2, 3, 255}
    assert (got["image"][0][got["sem_seg"] == 255] == 128).all()


def test_copies_cover_what_is_below():
    below = sample(100, (10, 5, 30, 25))
    above = sample(200, (20, 5, 40, 25), kind=2)
    np.random.seed(0)
    seen = set()
    for _ in range(12):
        got = copy_paste(below, above)
        count = len(got["instances"])
        seen.add(count)
        if count == 2:
            assert got["instances"].gt_boxes.tensor.tolist() == [[10, 5, 20, 25], [20, 5, 40, 25]]
            assert got["instances"].gt_classes.tolist() == [0, 2]
            assert (got["image"][:, 5:25, 20:40] == 210).all()
        assert_together(got)
    assert seen == {1, 2}
    hidden = sample(200, (5, 0, 40, 30))
    while (got := copy_paste(below, hidden))["image"].max() < 210:
        pass
    assert got["instances"].gt_boxes.tensor.tolist() == [[5, 0, 40, 30]]


def test_mixup_has_the_objects_of_both():
    np.random.seed(0)
    got = mixup(sample(100, (10, 5, 30, 25)), sample(200, (0, 0, 20, 20), size=(30, 80), kind=1))
    assert got["image"].dtype == torch.uint8 and got["image"].shape == (3, 40, 60)
    assert got["instances"].gt_boxes.tensor.tolist() == [[10, 5, 30, 25], [0, 0, 20, 20]]
    assert 100 < got["image"][0, 29, 50] < 200 and got["image"][0, 35, 50] > 100


@pytest.mark.parametrize("masks", ["bits", "polygons"])
@pytest.mark.parametrize("mix", [mosaic, mixup, copy_paste])
@pytest.mark.parametrize("empty", [0, 1])
def test_an_image_without_objects(mix, masks, empty):
    parts = [sample(40 * i, (20, 10, 40, 30), masks=masks) for i in range(4)]
    parts[empty]["instances"] = parts[empty]["instances"][torch.zeros(1).bool()]
    np.random.seed(2)
    got = mix(parts) if mix is mosaic else mix(*parts[:2])
    assert got["instances"].has("gt_masks")
    assert len(got["instances"]) in {mosaic: (1, 2, 3), mixup: (1,), copy_paste: (0, 1)}[mix]
    assert len(got["instances"]) == 1 or mix is not copy_paste or empty == 0


def test_without_masks():
    parts = [sample(40 * i, (20, 10, 40, 30), masks=None) for i in range(4)]
    np.random.seed(1)
    assert not mosaic(parts)["instances"].has("gt_masks")
    assert len(mixup(*parts[:2])["instances"]) == 2


@pytest.mark.parametrize("chances", [{"mosaic": 1.0}, {"mosaic": 0.5, "mixup": 0.5}])
def test_batches_follow_from_the_seed_and_the_tail_is_clean(chances):
    dataset = [{"shade": 20 * i} for i in range(8)]

    def build(workers):
        return build_train_loader(
            dataset,
            mapper=lambda d: sample(d["shade"], (20, 10, 40, 30)),
            total_batch_size=2,
            aspect_ratio_grouping=False,
            mixing=Mixing(**chances, until=0.5, max_iter=12),
            num_workers=workers,
        )

    def take(loader, count):
        return [batch for _, batch in zip(range(count), loader)]

    whole = take(build(0), 12)
    later = build(1)
    later.start_iter = 3
    for one, other in zip(whole[3:], take(later, 9), strict=True):
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(one, other, strict=True))
    counts = [[len(s["instances"]) for s in batch] for batch in whole]
    assert max(map(max, counts[:6])) > 1 and all(batch == [1, 1] for batch in counts[6:])


def test_what_the_data_do_not_allow():
    def build(dataset, mapper=None, **chances):
        mapper = mapper or (lambda d: d)
        mixing = Mixing(**chances, max_iter=9)
        build_train_loader([dataset], mapper=mapper, total_batch_size=1, mixing=mixing)

    with pytest.raises(ValueError, match="mixup=0.5 must be 0 for label maps"):
        build({"sem_seg_file_name": "a.png"}, mixup=0.5)
    with pytest.raises(ValueError, match="mosaic=0.5 must be 0 where keypoints are learned"):
        Mixing(mosaic=0.5, max_iter=9).check(label_maps=False, masks=False, keypoints=True)
    with pytest.raises(ValueError, match="copy_paste=0.1 must be 0 where no masks are learned"):
        build({}, copy_paste=0.1)
    build({"sem_seg_file_name": "a.png"}, mosaic=0.5)


@pytest.mark.parametrize("name", ["mosaic", "mixup", "copy_paste", "until"])
@pytest.mark.parametrize("value", [1.5, -0.1, "half", None])
def test_a_probability_that_is_none(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r} must be a number from 0 to 1"):
        Mixing(**{name: value}, max_iter=9)
