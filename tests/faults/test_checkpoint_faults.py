"""Damaged, foreign and misleading checkpoints: noticed, named, and never half loaded in silence."""

import argparse
import struct

import numpy as np
import pytest
import timm
import torch
from detbackbones import TimmBackbone, TorchvisionBackbone
from detbackbones.training.checkpoint import (
    Checkpointer,
    checkpoints,
    last_whole,
    load_init_checkpoint,
)
from detbackbones.weights import (
    find_part,
    fitting,
    read_checkpoint,
    read_tensors,
    write_checkpoint,
)
from detectron2.modeling.backbone.resnet import BasicStem, ResNet
from safetensors.torch import save_file
from support import assert_close, images, randomise
from torch import nn


class Detector(nn.Module):
    def __init__(self, backbone, classes=3):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(4, classes)


def flips(size, step=4096):
    """Positions at a step over the file, and all at its two ends; with a bit each."""
    places = {*range(0, size, step), *range(min(size, 300)), *range(max(0, size - 300), size)}
    return [(place, 1 << place % 8) for place in sorted(places)]


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_every_flipped_bit_of_our_own_is_noticed(tmp_path, suffix):
    state = timm.create_model("test_resnet").state_dict()
    content = {"model": state, "iteration": 7} if suffix == "pth" else state
    path = tmp_path / f"whole.{suffix}"
    write_checkpoint(content, str(path))
    assert find_part(read_tensors(str(path))[0], state).state.keys() == state.keys()
    data, damaged = bytearray(path.read_bytes()), tmp_path / f"damaged.{suffix}"
    for place, bit in flips(len(data)):
        data[place] ^= bit
        damaged.write_bytes(data)
        data[place] ^= bit
        with pytest.raises(ValueError, match=f"checkpoint '{damaged}' is (truncated or )?damaged"):
            read_checkpoint(str(damaged))


def test_flipped_bits_of_weights_that_torch_saved_are_noticed(tmp_path):
    torch.save({"weight": torch.ones(100_000)}, tmp_path / "c.pth")
    data = bytearray((tmp_path / "c.pth").read_bytes())
    for place in range(10_000, 390_000, 4096):
        data[place] ^= 1
        (tmp_path / "c.pth").write_bytes(data)
        data[place] ^= 1
        assert torch.load(tmp_path / "c.pth", weights_only=True)["weight"].ne(1).any()  # no word
        with pytest.raises(ValueError, match="damaged: the CRC of c/data/0 in it is another"):
            read_tensors(str(tmp_path / "c.pth"))


RANDOM = np.random.default_rng(0).bytes(5000)
NO_CHECKPOINTS = {
    "empty": b"",
    "text": b"this is text",
    "numbers": b"1 2 3\n4 5 6\n",
    "random": RANDOM,
    "a zip's head": b"PK\x03\x04" + RANDOM,
    "a pickle's head": b"\x80\x02" + RANDOM,
    "a picture": b"\x89PNG\r\n\x1a\n" + RANDOM,
    "a tar": b"\0" * 512 + b"ustar",
    "JSON": b'{"model": {"weight": [1, 2]}}',
    "30 GiB": struct.pack("<Q", 30 * 2**30) + b"{}",
    "a header of 1 GiB": struct.pack("<Q", 2**30) + b"{" + RANDOM,
    "offsets": struct.pack("<Q", 64)
    + b'{"a":{"dtype":"F32","shape":[99999999],"data_offsets":[0,4]}}   ',
    "HDF5": b"\x89HDF\r\n\x1a\n" + RANDOM,
}


@pytest.mark.parametrize("content", NO_CHECKPOINTS.values(), ids=NO_CHECKPOINTS)
@pytest.mark.parametrize("suffix", ["pth", "pt", "safetensors", "bin"])
def test_what_is_no_checkpoint_is_named(tmp_path, content, suffix):
    path = tmp_path / f"c.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"checkpoint '{path}' ") as error:
        read_tensors(str(path))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_harmless_objects_of_training_scripts_are_read(tmp_path):
    state = timm.create_model("test_resnet").state_dict()
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=0.1)}, tmp_path / "c.pth")
    tensors, _ = read_tensors(str(tmp_path / "c.pth"))
    assert tensors.keys() == {f"state_dict.{key}" for key in state}


NAN = torch.tensor([1.0, float("nan"), 2.0])
WRONG_VALUES = {
    "NaN": NAN,
    "infinite": torch.tensor([float("inf"), 0, 0]),
    "negative infinite": torch.tensor([0, 0, -float("inf")]),
    "half NaN": NAN.half(),
    "bfloat16 NaN": NAN.bfloat16(),
    "double NaN": NAN.double(),
    "complex NaN": NAN + 1j,
}


@pytest.mark.parametrize("value", WRONG_VALUES.values(), ids=WRONG_VALUES)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path, value, suffix):
    if value.is_complex() and suffix == "safetensors":
        pytest.skip("safetensors writes no complex numbers")
    path = str(tmp_path / f"c.{suffix}")
    state = {"right": torch.ones(3), "layer.weight": value}
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    own = {"layer.weight": torch.ones(3, dtype=value.dtype), "right": torch.ones(3)}
    with pytest.raises(ValueError, match=r"'layer.weight' .* has 1 values .* not finite, of 3"):
        fitting(read_tensors(path)[0], own)
    assert fitting(read_tensors(path)[0], {"right": own["right"]})  # what is of no use may be so
    own["layer.weight"][:] = float("inf")  # and so may what the model has so, such as a mask
    assert len(fitting(read_tensors(path)[0], own)) == 2


def test_counters_of_averaged_checkpoints_are_fractions(tmp_path):
    state = timm.create_model("test_resnet").state_dict()
    averaged = {key: value.float() for key, value in state.items()}
    torch.save(averaged, tmp_path / "c.pth")
    TimmBackbone("test_resnet", checkpoint_path=str(tmp_path / "c.pth"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_other_kinds_of_numbers_are_refused_by_name(tmp_path, dtype):
    state = timm.create_model("test_resnet").state_dict()
    state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"].to(dtype)
    torch.save(state, tmp_path / "c.pth")
    message = f"'layer1.0.conv1.weight' .* is of {dtype}, and must be of torch.float32"
    with pytest.raises(ValueError, match=message):
        TimmBackbone("test_resnet", checkpoint_path=str(tmp_path / "c.pth"))
    with pytest.raises(ValueError, match=message):
        load_init_checkpoint(Detector(TimmBackbone("test_resnet")), str(tmp_path / "c.pth"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_read(tmp_path, dtype):
    state = timm.create_model("test_resnet").state_dict()
    half = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    torch.save(half, tmp_path / "c.pth")
    backbone = TimmBackbone("test_resnet", checkpoint_path=str(tmp_path / "c.pth"))
    key = "layer1.0.conv1.weight"
    assert torch.equal(backbone.state_dict()[f"model.{key}"], half[key].float())


# What a file has of a detector: of its backbone, and of the rest; and what is said of it.
def part(share, head=True):
    def keep(state):
        keys = [key for key in state if key.startswith("backbone.")]
        kept = set(keys[: round(share * len(keys))])
        kept |= {"head.weight", "head.bias"} if head else set()
        return {key: value for key, value in state.items() if key in kept}

    return keep


REFUSED = {
    "a third": (
        part(0.33),
        "must have at least half of the backbone, and has .*allow_partial=True",
    ),
    "the head alone": (part(0), "must have at least half of the backbone, and has 0 of its .*True"),
    "one tensor": (part(0.02, head=False), "must have at least half of the backbone"),
    "other names": (lambda state: {"a": torch.ones(3), "b.c": torch.ones(2)}, "none of its 2 tens"),
}


@pytest.mark.parametrize(("keep", "message"), REFUSED.values(), ids=REFUSED)
def test_less_than_half_of_a_backbone_is_refused(tmp_path, keep, message):
    state = Detector(TimmBackbone("test_resnet")).state_dict()
    torch.save({"model": keep(state)}, tmp_path / "c.pth")
    model = Detector(TimmBackbone("test_resnet"))
    with pytest.raises(ValueError, match=message):
        load_init_checkpoint(model, str(tmp_path / "c.pth"))
    if "allow_partial" in message:
        load_init_checkpoint(model, str(tmp_path / "c.pth"), allow_partial=True)


def test_more_than_half_of_a_backbone_is_a_warning(tmp_path, caplog):
    state = Detector(TimmBackbone("test_resnet")).state_dict()
    torch.save({"model": part(0.8)(state)}, tmp_path / "c.pth")
    load_init_checkpoint(Detector(TimmBackbone("test_resnet")), str(tmp_path / "c.pth"))
    (record,) = [r for r in caplog.records if "loaded" in r.getMessage()]
    assert record.levelname == "WARNING" and "others of the backbone are wanting" in caplog.text


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("prefix", ["backbone.", "module.backbone.bottom_up."])
def test_detectron2s_resnet_is_translated(tmp_path, depth, prefix):
    """Every tensor finds its place, in timm's and torchvision's model; the maps are the same."""
    name = f"resnet{depth}"
    kwargs = {"stride_in_1x1": False} if depth >= 50 else {}
    theirs = ResNet(
        BasicStem(norm="BN"),
        ResNet.make_default_stages(depth, norm="BN", **kwargs),
        out_features=["res2", "res3", "res4", "res5"],
    )
    theirs = randomise(theirs).eval()
    state = {f"{prefix}{key}": value for key, value in theirs.state_dict().items()}
    state["roi_heads.weight"] = torch.ones(3)
    torch.save({"model": state}, tmp_path / "c.pth")
    for backbone in (TimmBackbone(name, norm="FrozenBN"), TorchvisionBackbone(name)):
        report = load_init_checkpoint(Detector(backbone), str(tmp_path / "c.pth"))
        wanted = len(backbone.state_dict())
        assert f"loaded {wanted} of the backbone's {wanted} tensors" in report or (
            "num_batches_tracked" in "".join(backbone.state_dict())
        )
        x = images(1, 3, 64, 64)
        with torch.no_grad():
            ours, wanted = backbone.eval()(x), theirs(x)
        for level in wanted:
            assert_close(ours[level], wanted[level])


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "test_vit", "mobilenetv3_small_050"])
def test_detrexs_wrapper_is_translated(tmp_path, name):
    """Its timm_model is timm's extractor of features alone."""
    theirs = timm.create_model(name, features_only=True)
    randomise(theirs)
    state = {f"backbone.timm_model.{key}": v for key, v in theirs.state_dict().items()}
    torch.save({"model": {**state, "head.weight": torch.ones(3, 4)}}, tmp_path / "c.pth")
    model = Detector(TimmBackbone(name))
    load_init_checkpoint(model, str(tmp_path / "c.pth"))
    own, values = model.backbone.state_dict(), {k.replace(".", "_"): v for k, v in state.items()}
    for key, value in own.items():
        if "num_batches_tracked" not in key:
            flat = "backbone_timm_model_" + key.removeprefix("model.").replace(".", "_")
            other = flat.replace("timm_model_", "timm_model_model_")  # round a ViT
            assert torch.equal(value, values[flat] if flat in values else values[other]), key
    assert torch.equal(model.head.weight, torch.ones(3, 4))


def saved(folder, *iterations):
    model = Detector(TimmBackbone("test_resnet"))
    checkpointer = Checkpointer(model, str(folder))
    for iteration in iterations:
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    return checkpointer


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, caplog):
    saved(tmp_path, 9, 19, 29)
    files = [str(tmp_path / f"model_{i:07d}.pth") for i in (29, 19, 9)]
    assert checkpoints(str(tmp_path)) == files and last_whole(str(tmp_path)) == files[0]
    damage(tmp_path / "model_0000029.pth")
    assert last_whole(str(tmp_path)) == files[1]
    assert f"'{files[0]}' is truncated or damaged" in caplog.text
    assert f"the one before is taken, {files[1]}" in caplog.text
    (tmp_path / "last_checkpoint").write_text("model_00")
    assert last_whole(str(tmp_path)) == files[1]
    (tmp_path / "last_checkpoint").unlink()
    (tmp_path / "model_0000019.pth").write_bytes(b"")
    assert last_whole(str(tmp_path)) == files[2]
    damage(tmp_path / "model_0000009.pth")
    with pytest.raises(ValueError, match="model_0000029.pth' is truncated or damaged"):
        last_whole(str(tmp_path))
    assert last_whole(str(tmp_path / "other")) is None


def test_old_checkpoints_of_a_resumed_run_count(tmp_path):
    checkpointer = saved(tmp_path, 9, 19, 29, 39)
    names = [f"model_{i:07d}.pth" for i in (9, 19, 29)]
    assert checkpointer.kept(0, 2) == checkpointer.kept(30, None) == []
    assert checkpointer.kept(30, 2) == [str(tmp_path / name) for name in names[1:]]
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == [*names[1:], "model_0000039.pth"]


def test_switches_are_true_or_false():
    for make, name in ((TimmBackbone, "test_resnet"), (TorchvisionBackbone, "resnet18")):
        for key in ("pretrained", "fold", "compile", "grad_checkpointing"):
            for value in ("yes", "False", 2, []):
                with pytest.raises(
                    ValueError, match=rf"{key}=.* is unknown: valid are True, False"
                ):
                    make(name, **{key: value})
        with pytest.raises(ValueError, match="channels_last='yes' .* valid are None, True"):
            make(name, channels_last="yes")
