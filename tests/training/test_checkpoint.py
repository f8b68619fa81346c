"""Weights in and out: what fits is loaded, what is bad is refused, no pickle is executed."""

import copy
import pickle

import pytest
import timm
import torch
import torchvision
from detbackbones import TimmBackbone, TorchvisionBackbone, build_pyramid
from detbackbones.training.checkpoint import Checkpointer, load_init_checkpoint
from detbackbones.weights import backbone_state_dict, export_backbone, read_tensors
from safetensors.torch import load_file, save_file
from support import randomise
from torch import nn

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


class Marker:
    """Makes a file when it is unpickled by a reader that executes what it reads."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def detector(bottom_up, classes=3, neck=build_pyramid):
    """A detector as far as its state dict goes: backbone with pyramid, and a head."""
    model = nn.Module()
    model.backbone = neck(bottom_up, 8)
    model.roi_heads = nn.Linear(8, classes)
    return model


def test_read_safetensors(tmp_path):
    save_file(STATE, tmp_path / "c.safetensors")
    assert torch.equal(read_tensors(str(tmp_path / "c.safetensors"))[0]["a.bias"], STATE["a.bias"])


def bytes_of(save, path):
    save(STATE, path)
    return path.read_bytes()


def bad_files(folder):
    """Name of a bad file to (its content, what the message says)."""
    zipped = bytes_of(torch.save, folder / "a")
    legacy = bytes_of(
        lambda s, p: torch.save(s, p, _use_new_zipfile_serialization=False), folder / "b"
    )
    safe = bytes_of(save_file, folder / "c")
    marker = Marker(folder / "executed")
    return {
        "empty.pth": (b"", r"is empty \(0 bytes\)"),
        "empty.safetensors": (b"", r"is empty \(0 bytes\)"),
        "cut.pth": (zipped[: len(zipped) // 2], "is truncated or damaged"),
        "head.pth": (zipped[:3], "damaged"),
        "cut_legacy.pth": (legacy[:-20], "damaged"),
        "half_legacy.pth": (legacy[: len(legacy) // 2], "damaged"),
        "cut.safetensors": (safe[:-5], "is truncated or damaged"),
        "head.safetensors": (safe[:5], "is truncated or damaged"),
        "text.pth": (b"<html>404: no such page</html>\n", "damaged"),
        "pickle.pth": (pickle.dumps({"model": marker}), "never executed"),
        "objects.pth": (bytes_of(lambda _, p: torch.save({"x": marker}, p), folder / "d"), "never"),
        "list.pth": (bytes_of(lambda _, p: torch.save([1], p), folder / "e"), "no state dict"),
        "none.pth": (bytes_of(lambda _, p: torch.save({"x": 1}, p), folder / "f"), "no state dict"),
    }


@pytest.mark.parametrize(
    "name",
    "empty.pth empty.safetensors cut.pth head.pth cut_legacy.pth half_legacy.pth cut.safetensors "
    "head.safetensors text.pth pickle.pth objects.pth list.pth none.pth".split(),
)
def test_bad_files_are_refused(name, tmp_path):
    content, message = bad_files(tmp_path)[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_tensors(str(path))
    assert str(error.value).startswith(f"checkpoint {str(path)!r} ")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(ValueError, match=message):
        TimmBackbone("resnet18", checkpoint_path=str(path))


def test_the_marker_works(tmp_path):
    pickle.loads(pickle.dumps(Marker(tmp_path / "executed"))).close()
    assert (tmp_path / "executed").exists()


def test_missing_file_and_the_nearest_name(tmp_path):
    for i in range(10):
        (tmp_path / f"other{i}.txt").touch()
    (tmp_path / "resnet18.pth").touch()
    with pytest.raises(FileNotFoundError, match="resnet81.pth' does not exist: .*'resnet18.pth'"):
        read_tensors(str(tmp_path / "resnet81.pth"))
    with pytest.raises(FileNotFoundError, match="'/no/such.pth' does not exist"):
        TimmBackbone("resnet18", checkpoint_path="/no/such.pth")


@pytest.mark.parametrize(
    "make, source",
    [
        (lambda: TimmBackbone("resnet18"), lambda: timm.create_model("resnet18")),
        (lambda: TimmBackbone("convnext_atto"), lambda: timm.create_model("convnext_atto")),
        (
            lambda: TimmBackbone("vit_tiny_patch16_224"),
            lambda: timm.create_model("vit_tiny_patch16_224"),
        ),
        (
            lambda: TorchvisionBackbone("resnet18", norm="FrozenBN", freeze_at=2),
            lambda: torchvision.models.resnet18(),
        ),
    ],
)
def test_source_weights_into_a_detector(make, source, tmp_path):
    model = detector(make())
    weights = randomise(source()).state_dict()
    torch.save(weights, tmp_path / "c.pth")
    head = model.roi_heads.weight.clone()
    report = load_init_checkpoint(model, str(tmp_path / "c.pth"))
    state = backbone_state_dict(model.state_dict())
    assert state and all(torch.equal(value, weights[key]) for key, value in state.items())
    assert torch.equal(model.roi_heads.weight, head)
    count = len([key for key in state if not key.endswith("num_batches_tracked")])
    assert f"loaded {count} of the backbone's {count} tensors" in report
    every = len([key for key in weights if not key.endswith("num_batches_tracked")])
    assert f"; {every - count} of the tensors there" in report


def test_detector_weights_into_a_detector_of_other_classes(tmp_path):
    trained = detector(randomise(TimmBackbone("convnext_atto")), classes=3)
    torch.save({"model": trained.state_dict()}, tmp_path / "c.pth")
    fresh = detector(TimmBackbone("convnext_atto", norm="FrozenBN", freeze_at=2), classes=5)
    report = load_init_checkpoint(fresh, str(tmp_path / "c.pth"))
    own = trained.state_dict()
    for key, value in fresh.state_dict().items():
        if not key.startswith("roi_heads."):
            assert torch.equal(value, own[key]), key
    backbone = len(trained.backbone.bottom_up.state_dict())  # which counts no batches
    assert f"loaded {backbone} of the backbone's {backbone} tensors, which stand" in report
    others = len(own) - backbone
    assert f"and {others - 2} of the detector's {others} other tensors, which stand" in report
    assert report.endswith("; 2 of the tensors there are not used")


def test_a_part_of_the_backbone_is_reported(tmp_path):
    state = timm.create_model("resnet18").state_dict()
    torch.save({k: v for k, v in state.items() if k != "layer4.1.bn2.bias"}, tmp_path / "c.pth")
    report = load_init_checkpoint(detector(TimmBackbone("resnet18")), str(tmp_path / "c.pth"))
    assert "loaded 99 of the backbone's 100 tensors (layer4.1.bn2.bias" in report


@pytest.mark.parametrize(
    "other, message",
    [("convnext_atto", "none of its .* does"), ("resnet34", "no layer1.2.conv1.weight")],
)
def test_weights_of_another_model_are_refused(other, message, tmp_path):
    path = str(tmp_path / "c.pth")
    torch.save(timm.create_model(other).state_dict(), path)
    for backbone in (TimmBackbone("resnet18"), TorchvisionBackbone("resnet18")):
        model = detector(backbone)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=f"init_checkpoint='{path}' .*{message}"):
            load_init_checkpoint(model, path)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_pickles_need_permission(tmp_path):
    path = tmp_path / "c.pkl"
    path.write_bytes(pickle.dumps({"model": Marker(tmp_path / "executed")}))
    with pytest.raises(ValueError, match="init_checkpoint=.*allow_pickle=True"):
        load_init_checkpoint(detector(TimmBackbone("resnet18")), str(path))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("prefix", ["backbone.", "backbone.bottom_up.", "backbone.net."])
@pytest.mark.parametrize("outer", ["", "module."])
def test_backbone_state_dict(outer, prefix):
    state = {f"{outer}{prefix}model.conv.weight": STATE["a.bias"], "roi_heads.model.x": 0}
    assert backbone_state_dict(state) == {"conv.weight": STATE["a.bias"]}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_export_backbone(suffix, tmp_path):
    prefix = "backbone.bottom_up."
    backbone = randomise(TimmBackbone("convnext_atto"))
    state = {prefix + key: value for key, value in backbone.state_dict().items()}
    torch.save({"model": {**state, "roi_heads.weight": torch.zeros(2)}}, tmp_path / "last.pth")
    output = str(tmp_path / f"backbone.{suffix}")
    assert export_backbone(str(tmp_path / "last.pth"), output) == len(state)
    exported = load_file(output) if suffix == "safetensors" else torch.load(output)
    source = timm.create_model("convnext_atto")
    missing, unexpected = source.load_state_dict(exported, strict=False)
    assert not unexpected and all(key.startswith("head.") for key in missing)
    for key, value in source.state_dict().items():
        assert key.startswith("head.") or torch.equal(value, state[f"{prefix}model.{key}"])
    again = TimmBackbone("convnext_atto", checkpoint_path=output)
    assert all(torch.equal(v, state[prefix + k]) for k, v in again.state_dict().items())
    with pytest.raises(FileExistsError, match="exists"):
        export_backbone(str(tmp_path / "last.pth"), output)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"backbone.{suffix}", "last.pth"]


def test_export_without_a_backbone(tmp_path):
    torch.save(STATE, tmp_path / "c.pth")
    with pytest.raises(ValueError, match="has no tensors under 'backbone'"):
        export_backbone(str(tmp_path / "c.pth"), str(tmp_path / "out.pth"))
    assert not (tmp_path / "out.pth").exists()


def test_checkpointer_saves_and_resumes(tmp_path):
    model = detector(TimmBackbone("convnext_atto"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.125)
    Checkpointer(model, str(tmp_path), optimizer=optimizer).save("model_0000001", iteration=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_0000001.pth"]
    fresh = detector(TimmBackbone("convnext_atto"))
    other = torch.optim.AdamW(fresh.parameters(), lr=1.0)
    extra = Checkpointer(fresh, str(tmp_path), optimizer=other).resume_or_load("", resume=True)
    assert extra["iteration"] == 1 and other.param_groups[0]["lr"] == 0.125
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in fresh.state_dict().items())


@pytest.mark.parametrize("fails", ["torch.save", "os.replace"])
def test_a_save_that_fails_midway_leaves_the_last_checkpoint(fails, tmp_path, monkeypatch):
    model = nn.Linear(3, 3)
    checkpointer = Checkpointer(model, str(tmp_path))
    checkpointer.save("model")
    old = (tmp_path / "model.pth").read_bytes()
    nn.init.zeros_(model.weight)

    def write_half(data, path, *_):
        if fails == "torch.save":
            with open(path, "wb") as file:
                file.write(old[: len(old) // 2])
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fails, write_half)
        with pytest.raises(OSError, match="no space"):
            checkpointer.save("model")
    assert (tmp_path / "model.pth").read_bytes() == old
    assert (tmp_path / "last_checkpoint").read_text() == "model.pth"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model.pth"]
    checkpointer.save("model")
    assert read_tensors(str(tmp_path / "model.pth"))[0]["model.weight"].eq(0).all()


def test_checkpointer_executes_no_pickle(tmp_path):
    path = str(tmp_path / "model.pth")
    torch.save({"model": Marker(tmp_path / "executed")}, path)
    with pytest.raises(ValueError, match=r"Python objects \(io.open\), which are never exec"):
        Checkpointer(nn.Linear(3, 3), str(tmp_path)).load(path)
    assert not (tmp_path / "executed").exists()
