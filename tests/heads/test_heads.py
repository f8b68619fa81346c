"""The heads for semantic segmentation: sizes, losses, what each computes, what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from detbackbones import TimmBackbone, add_backbone_config, build_pyramid
from detbackbones.heads import DPTHead, LinearHead
from detbackbones.heads.dpt import FACTORS, dpt_indices
from detbackbones.heads.linear import Standardise
from detbackbones.training.feature_cache import cache_features
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY, SemanticSegmentor, build_model
from support import assert_close, images
from torch import nn
from transformers import DPTConfig
from transformers.models.dpt import modeling_dpt

VIT_DEPTHS = {"model_name": "vit_tiny_patch16_224", "out_indices": (2, 5, 8, 11)}

# backbone, strides that the DPTHead fuses, stride of its logits
PYRAMIDS = {
    "resnet": ({"model_name": "resnet18"}, [4, 8, 16, 32], 2),
    "convnext": ({"model_name": "convnext_atto"}, [4, 8, 16, 32], 2),
    "three levels": (
        {"model_name": "resnet18", "out_features": ["res3", "res4", "res5"]},
        [8, 16, 32],
        4,
    ),
    "vit": (VIT_DEPTHS, [4, 8, 16, 32], 2),
    "vit, patch 8": (
        {"model_name": "test_vit", "patch_size": 8, "out_indices": (0, 2, 3, 5)},
        [2, 4, 8, 16],
        1,
    ),
    "vit, patch 14": (
        {"model_name": "test_vit", "patch_size": 14, "out_indices": (0, 2, 3, 5)},
        [3.5, 7, 14, 28],
        1.75,
    ),
}


def features_of(backbone, x):
    with torch.no_grad():
        return backbone.eval()(x)


@pytest.mark.parametrize(("arguments", "strides", "stride"), PYRAMIDS.values(), ids=PYRAMIDS)
def test_dpt_fuses_a_pyramid_and_gives_logits_of_the_input_size(arguments, strides, stride):
    backbone = TimmBackbone(**arguments)
    height, width = 3 * backbone.size_divisibility, 2 * backbone.size_divisibility  # odd grids
    features = features_of(backbone, images(2, 3, height, width))
    head = DPTHead(backbone.output_shape(), num_classes=5, conv_dims=32)
    seen = []
    for fusion in head.fuse:
        fusion.register_forward_hook(lambda _, args, out: seen.append((args[0].shape, out.shape)))
    assert head.layers(features).shape == (2, 5, int(height / stride), int(width / stride))
    at = [(-(-height // s), -(-width // s)) for s in reversed(strides)]  # the coarsest first
    assert [before for before, _ in seen] == [(2, 32, int(h), int(w)) for h, w in at]
    assert all(after[-1] == 2 * before[-1] for before, after in seen)
    logits, losses = head.eval()(features)
    assert logits.shape == (2, 5, height, width) and losses == {}


def test_dpt_computes_what_transformers_does():
    """With neither norm nor the alignment of corners, in which the two differ."""
    config = DPTConfig(hidden_size=8, fusion_hidden_size=16, num_labels=3)
    torch.manual_seed(0)
    reassemble = [modeling_dpt.DPTReassembleLayer(config, 16, factor) for factor in FACTORS]
    fuse = [modeling_dpt.DPTFeatureFusionLayer(config, align_corners=False) for _ in FACTORS]
    predictor = modeling_dpt.DPTSemanticSegmentationHead(config).head[:-1].eval()
    maps = [images(2, 8, 6, 10, seed=n) for n in range(4)]
    expected = None
    for level, layer, fusion in zip(reversed(maps), reversed(reassemble), fuse):
        level = layer(level)
        expected = fusion(level) if expected is None else fusion(expected, level)
    expected = predictor(expected)

    shapes = {f"p{n}": ShapeSpec(channels=8, stride=16) for n in range(4)}
    head = DPTHead(shapes, num_classes=3, conv_dims=16, norm="").eval()
    pairs = [(head.predictor[0], predictor[0]), (head.predictor[2], predictor[4])]
    for mine, theirs in zip(head.reassemble, reassemble):
        pairs.append((mine[0], theirs.projection))
        pairs += [(mine[1], theirs.resize)] if len(mine) > 1 else []
    for mine, theirs in zip(reversed(head.fuse), fuse):
        pairs.append((mine.project, theirs.projection))
        units = [(mine.skip, theirs.residual_layer1), (mine.refine, theirs.residual_layer2)]
        for unit, residual in units[mine.skip is None :]:
            pairs += zip(unit.convs, (residual.convolution1, residual.convolution2))
    assert len(pairs) == 2 + 4 + 3 + 4 + 2 * 7
    for mine, theirs in pairs:
        mine.load_state_dict({"bias": torch.zeros(len(mine.bias)), **theirs.state_dict()})
    assert {id(p) for p in head.parameters()} == {id(p) for m, _ in pairs for p in m.parameters()}
    assert_close(head.layers(dict(zip(shapes, maps))), expected)


LINEAR = {
    "all of a pyramid": ({"model_name": "resnet18"}, None, 64 + 128 + 256 + 512),
    "one level": ({"model_name": "resnet18"}, ["res5"], 512),
    "two levels": ({"model_name": "convnext_atto"}, ["res4", "res2"], 40 + 160),
    "a plain vit": ({"model_name": "vit_tiny_patch16_224"}, None, 192),
    "depths of a vit": (VIT_DEPTHS, ["p2", "p11"], 2 * 192),
}


@pytest.mark.parametrize(("arguments", "in_features", "channels"), LINEAR.values(), ids=LINEAR)
def test_linear_is_one_convolution_of_the_joined_levels(arguments, in_features, channels):
    backbone = TimmBackbone(**arguments)
    features = features_of(backbone, images(2, 3, 64, 96))
    shapes = backbone.output_shape()
    head = LinearHead(shapes, num_classes=3, in_features=in_features)
    head.layers(features_of(backbone, images(2, 3, 64, 64, seed=1)))
    head.eval()
    names = [name for name in features if in_features is None or name in in_features]
    assert head.in_features == names  # fine to coarse
    assert sum(p.numel() for p in head.parameters()) == channels * 3 + 3

    size = features[names[0]].shape[-2:]
    norms, convs = zip(*head.classifiers)
    resized = [
        F.interpolate(norm(features[name]), size, mode="bilinear")
        for name, norm in zip(names, norms)
    ]
    weight = torch.cat([conv.weight for conv in convs], 1)
    expected = F.conv2d(torch.cat(resized, 1), weight, convs[0].bias)
    logits, losses = head(features)
    assert losses == {}
    assert_close(logits, F.interpolate(expected, (64, 96), mode="bilinear"))


def test_features_are_standardised_by_all_batches_so_far():
    shapes = {"res2": ShapeSpec(channels=2, stride=4)}
    head = LinearHead(shapes, num_classes=3)
    batches = [5 * n + (1 + n) * images(2, 2, 32, 32, seed=n) for n in range(3)]
    for level in batches:
        logits = head.layers({"res2": level})
    standardise = head.classifiers[0][0]
    seen = torch.cat(batches)
    assert_close(standardise.mean, seen.mean((0, 2, 3)))
    assert_close(standardise.var, seen.var((0, 2, 3), correction=0))
    standardised = standardise.eval()(seen)
    assert standardised.mean().item() == pytest.approx(0, abs=1e-3)
    assert standardised.std().item() == pytest.approx(1, abs=1e-3)
    assert_close(head.eval().layers({"res2": level}), logits)  # not by those of the last batch


def standardise_in_two_processes(rank, folder):
    torch.set_num_threads(1)
    file = (folder / "rendezvous").as_uri()
    torch.distributed.init_process_group("gloo", file, rank=rank, world_size=2)
    standardise = Standardise(2)
    for n in range(2):
        standardise(5 * n + (1 + rank) * images(2, 2, 32, 32, seed=2 * n + rank))
    torch.save(standardise.state_dict(), folder / f"{rank}.pth")
    torch.distributed.destroy_process_group()


def test_features_are_standardised_by_the_batches_of_all_processes(tmp_path):
    torch.multiprocessing.spawn(standardise_in_two_processes, (tmp_path,), nprocs=2)
    batches = [
        5 * n + (1 + rank) * images(2, 2, 32, 32, seed=2 * n + rank)
        for n in range(2)
        for rank in range(2)
    ]
    seen = torch.cat(batches)
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pth")
        assert_close(state["mean"], seen.mean((0, 2, 3)))
        assert_close(state["var"], seen.var((0, 2, 3), correction=0))
        assert state["num_batches"] == 4


@pytest.mark.parametrize("scale", [0.1, 1e3])
@pytest.mark.parametrize("head_class", [LinearHead, DPTHead])
def test_the_scale_of_the_features_does_not_matter(head_class, scale):
    shapes = {f"res{n}": ShapeSpec(channels=16, stride=2**n) for n in range(2, 6)}
    features = {name: images(2, 16, 64 // s.stride, 64 // s.stride) for name, s in shapes.items()}
    torch.manual_seed(0)
    head = head_class(shapes, num_classes=3)
    results = []
    for factor in (1.0, scale):
        torch.manual_seed(0)  # of the dropout
        scaled = {name: factor * level for name, level in features.items()}
        results.append(copy.deepcopy(head).layers(scaled))
    expected, got = results
    assert (got - expected).abs().max() < 0.02 * expected.std()


HEADS = {"linear": (LinearHead, {}), "dpt": (DPTHead, {"conv_dims": 32})}


@pytest.fixture(scope="module")
def resnet():
    return TimmBackbone("resnet18", freeze_at=5)


@pytest.mark.parametrize(("head_class", "arguments"), HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("num_classes", [1, 2, 300])
def test_the_loss_is_the_mean_over_the_pixels_that_count(
    resnet, head_class, arguments, num_classes
):
    shapes = resnet.output_shape()
    arguments = {"num_classes": num_classes, "ignore_value": -1, **arguments}
    head = head_class(shapes, loss_weight=0.5, **arguments)
    features = features_of(resnet, images(1, 3, 64, 96))
    targets = torch.randint(num_classes, (1, 64, 96))
    targets[:, 16:, :] = -1
    torch.manual_seed(0)
    logits, losses = head(features, targets)
    assert logits is None
    torch.manual_seed(0)
    at_full_size = F.interpolate(head.layers(features), (64, 96), mode="bilinear")
    expected = F.cross_entropy(at_full_size[:, :, :16], targets[:, :16])
    assert losses["loss_sem_seg"].item() == pytest.approx(0.5 * expected.item(), rel=1e-4)

    losses["loss_sem_seg"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    assert all(p.grad is None for p in resnet.parameters())
    nothing = head(features, torch.full_like(targets, -1))[1]["loss_sem_seg"]
    assert nothing.item() == 0 and nothing.requires_grad


@pytest.mark.parametrize(("head_class", "arguments"), HEADS.values(), ids=HEADS)
def test_half_precision_gives_about_the_same(resnet, head_class, arguments):
    torch.manual_seed(0)
    head = head_class(resnet.output_shape(), num_classes=3, **arguments)
    x, targets = images(2, 3, 64, 96), torch.randint(3, (2, 64, 96))
    losses, logits = [], []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), torch.no_grad():
            torch.manual_seed(0)  # of the dropout
            losses.append(head.train()(resnet(x), targets)[1]["loss_sem_seg"])
            logits.append(head.eval()(resnet(x))[0])
    assert losses[1].dtype == torch.float32
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.02)
    assert (logits[1] - logits[0]).abs().max() < 0.05 * logits[0].abs().max()


@pytest.mark.parametrize(("head_class", "arguments"), HEADS.values(), ids=HEADS)
def test_a_head_learns_which_side_of_an_edge_a_pixel_is_on(resnet, head_class, arguments):
    """Random features are enough for it, if the logits lie where the pixels do."""
    torch.manual_seed(0)
    head = head_class(resnet.output_shape(), num_classes=2, **arguments)
    model = SemanticSegmentor(
        backbone=resnet, sem_seg_head=head, pixel_mean=[128] * 3, pixel_std=[64] * 3
    )
    image = torch.zeros(3, 90, 120)
    image[:, :, 75:] = 255
    labels = (image[0] > 0).long()
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(40):
        loss = model([{"image": image, "sem_seg": labels}])["loss_sem_seg"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        scores = model([{"image": image, "height": 180, "width": 240}])[0]["sem_seg"]
    assert scores.shape == (2, 180, 240)
    wrong = scores.argmax(0) != F.interpolate(labels[None, None].float(), scale_factor=2)[0, 0]
    assert wrong[:, :140].sum() == 0 and wrong[:, 160:].sum() == 0


def test_levels_that_reach_beyond_the_image_are_cut():
    """A ViT that takes 240 pixels alone has a p5 of 8 x 32 pixels."""
    backbone = build_pyramid(TimmBackbone("vit_tiny_patch16_224", img_size=240), 16)
    features = features_of(backbone, images(1, 3, 240, 240))
    assert features["p5"].shape[-1] == 8
    shapes = {name: backbone.output_shape()[name] for name in ("p2", "p3", "p4", "p5")}
    targets = torch.zeros(1, 240, 240, dtype=torch.long)
    for head in (
        LinearHead(shapes, num_classes=2),
        LinearHead(shapes, num_classes=2, in_features=["p5"]),
        DPTHead(shapes, num_classes=2, conv_dims=32),
    ):
        assert head(features, targets)[1]["loss_sem_seg"].isfinite()
    assert head.eval()(features)[0].shape == (1, 2, 240, 240)


@pytest.mark.parametrize(("name", "head_class"), [("LinearHead", LinearHead), ("DPTHead", DPTHead)])
def test_yacs_keys_build_the_heads(name, head_class):
    cfg = get_cfg()
    add_backbone_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    cfg.MODEL.BACKBONE.NAME = "TimmBackbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 5
    cfg.MODEL.TIMM.MODEL_NAME = "resnet18"
    keys = {"NAME": name, "NUM_CLASSES": 7, "NORM": "", "CONVS_DIM": 24, "IGNORE_VALUE": 99}
    keys |= {"IN_FEATURES": ["res3", "res4"], "LOSS_WEIGHT": 2.0}
    cfg.MODEL.SEM_SEG_HEAD.update(keys)
    model = build_model(cfg).eval()
    head = model.sem_seg_head
    assert type(head) is head_class is SEM_SEG_HEADS_REGISTRY.get(name)
    assert (head.in_features, head.ignore_value, head.loss_weight) == (["res3", "res4"], 99, 2.0)
    assert not [m for m in head.modules() if isinstance(m, nn.GroupNorm)]
    if name == "DPTHead":
        assert head.predictor[-1].in_channels == 24
    assert model([{"image": torch.zeros(3, 50, 70)}])[0]["sem_seg"].shape == (7, 50, 70)


def shapes(*strides):
    return {f"p{i}": ShapeSpec(channels=8, stride=stride) for i, stride in enumerate(strides)}


REFUSED = {
    "one level": (DPTHead, shapes(16), {}, "with strides 16 must be 4 levels of one"),
    "three depths": (
        DPTHead,
        shapes(16, 16, 16),
        {},
        "strides 16, 16, 16 must .* ViT with 12 blocks",
    ),
    "a gap": (DPTHead, shapes(4, 16, 32), {}, "strides 4, 16, 32 must .* each stride is twice"),
    "mixed": (DPTHead, shapes(8, 16, 16, 16), {}, "strides 8, 16, 16, 16 must be"),
    "level": (
        LinearHead,
        shapes(4, 8),
        {"in_features": ["p7"]},
        "in_features=.'p7'. .* 'p0', 'p1'",
    ),
    "no level": (LinearHead, shapes(4, 8), {"in_features": []}, r"in_features=\[\]"),
    "classes": (LinearHead, shapes(4), {"num_classes": 0}, "num_classes=0 must be a whole number"),
    "ignored class": (
        DPTHead,
        shapes(4, 8),
        {"num_classes": 300},
        "ignore_value=255 must be none of the classes 0 to 299",
    ),
}


@pytest.mark.parametrize(
    ("head_class", "input_shape", "arguments", "message"), REFUSED.values(), ids=REFUSED
)
def test_what_does_not_fit_is_refused(head_class, input_shape, arguments, message):
    with pytest.raises(ValueError, match=message):
        head_class(input_shape, **{"num_classes": 2, **arguments})


INDICES = {
    "resnet18": None,
    "swin_tiny_patch4_window7_224": None,
    "vit_tiny_patch16_224": [2, 5, 8, 11],
    "vit_large_patch16_224": [5, 11, 17, 23],
    "mixer_b16_224": [2, 5, 8, 11],
    "test_vit": [0, 2, 3, 5],
}


@pytest.mark.parametrize(("model_name", "indices"), INDICES.items(), ids=INDICES)
def test_four_depths_of_a_plain_vit(model_name, indices):
    assert dpt_indices(model_name) == indices


class Counted:
    """A backbone's forward that counts the images."""

    def __init__(self, backbone):
        self.forward, self.images = backbone.forward, 0

    def __call__(self, x):
        self.images += len(x)
        return self.forward(x)


@pytest.mark.parametrize("model_name", ["resnet18", "vit_tiny_patch16_224"])
def test_a_cache_computes_each_image_once(model_name):
    backbone = TimmBackbone(model_name, freeze_at=5, drop_path_rate=0.5).train()
    x, other = images(3, 3, 64, 64), images(2, 3, 64, 96, seed=1)
    expected = backbone(x)
    counted = backbone.forward = Counted(backbone)
    cache_features(backbone, 2**30)
    flipped = x.flip(-1)
    batches = [x[[1, 0, 1]], x, x[[2, 0, 0]], flipped, other, x]
    new = [2, 1, 0, 3, 2, 0]
    for batch, count in zip(batches, new):
        before = counted.images
        maps = backbone(batch)
        assert counted.images - before == count
        assert list(maps) == list(expected)
        assert all(len(level) == len(batch) for level in maps.values())
    for name, level in expected.items():
        assert_close(maps[name], level)
        assert_close(backbone(flipped)[name], counted.forward(flipped)[name])
    before = counted.images
    with torch.autocast("cpu", torch.bfloat16):
        backbone(x)
    assert counted.images - before == 3


def test_a_cache_keeps_to_its_size():
    backbone = TimmBackbone("resnet18", out_features=["res5"], freeze_at=5)
    counted = backbone.forward = Counted(backbone)
    x = images(4, 3, 64, 64)
    cache_features(backbone, 2 * 512 * 2 * 2 * 4)  # bytes of two images
    backbone(x)
    assert backbone(x)["res5"].shape == (4, 512, 2, 2)
    assert counted.images == 4 + 2


def test_a_cache_of_what_learns_is_refused():
    backbone = TimmBackbone("resnet18", freeze_at=2)
    learning = sum(p.requires_grad for p in backbone.parameters())
    with pytest.raises(
        ValueError, match=f"must have freeze_at=5 .* {learning} parameters that learn"
    ):
        cache_features(backbone, 2**30)


def test_nothing_in_a_frozen_backbone_moves(resnet):
    before = {key: value.clone() for key, value in resnet.state_dict().items()}
    resnet.train()(images(2, 3, 64, 64))
    after = resnet.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(p.requires_grad for p in resnet.parameters())
