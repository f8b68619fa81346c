"""Checkpoints as other trainers write them: the part that fits is found, or the file is refused."""

import argparse
import json
import re

import numpy as np
import pytest
import timm
import torch
import torchvision
from detbackbones import TimmBackbone, TorchvisionBackbone
from detbackbones.training.checkpoint import load_init_checkpoint
from detbackbones.weights import export_backbone, fitting
from safetensors.torch import load_file, save_file
from support import randomise
from torch import nn
from torch.optim.swa_utils import AveragedModel


def behind(prefix, state):
    return {prefix + key: value for key, value in state.items()}


class Detector(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(2, 2)


def lightning(state):
    """A module that has the model as its attribute `model`, saved by Lightning."""
    return {
        "epoch": 3,
        "global_step": 900,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": behind("model.", state),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 3}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best_k_models": {}}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
        "hyper_parameters": {"lr": 0.1},
    }


def dino(state):
    """A student in DDP and a teacher, each with a projection head, as DINO and iBOT train them."""
    other = {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}
    head = {"head.mlp.0.weight": torch.ones(4, 4), "head.last_layer.weight_g": torch.ones(4, 1)}
    return {
        "student": behind("module.", {**behind("backbone.", other), **head}),
        "teacher": {**behind("backbone.", state), **head},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small"),
        "dino_loss": {"center": torch.ones(1, 4)},
    }


# What a trainer makes of a model's state dict, and what was taken off to have it back.
LAYOUTS = {
    "plain": (lambda s: s, ""),
    "state_dict": (lambda s: {"state_dict": s, "epoch": 3}, "state_dict."),
    "model": (lambda s: {"model": s, "optimizer": {"state": {}}}, "model."),
    "model and its average": (lambda s: {"model": zeros(s), "model_ema": s}, "model_ema."),
    "timm's own script": (
        lambda s: {"state_dict": zeros(s), "state_dict_ema": s, "args": argparse.Namespace(lr=1)},
        "state_dict_ema.",
    ),
    "ema.module": (lambda s: {"net": zeros(s), "ema": {"module": s, "updates": 7}}, "ema.module."),
    "torch's average": (
        lambda s: {"model": {"n_averaged": torch.tensor(3), **behind("module.", s)}},
        "model.module.",
    ),
    "network": (lambda s: {"network": s}, "network."),
    "student": (lambda s: {"student": s}, "student."),
    "DDP": (lambda s: behind("module.", s), "module."),
    "DDP in a dict": (lambda s: {"state_dict": behind("module.", s)}, "state_dict.module."),
    "torch.compile": (lambda s: behind("_orig_mod.", s), "_orig_mod."),
    "compile in DDP": (lambda s: behind("module._orig_mod.", s), "module._orig_mod."),
    "backbone": (lambda s: {"model": behind("backbone.", s)}, "model.backbone."),
    "encoder": (lambda s: behind("encoder.", s), "encoder."),
    "model.backbone": (lambda s: behind("model.backbone.", s), "model.backbone."),
    "teacher.backbone": (lambda s: {"teacher": behind("backbone.", s)}, "teacher.backbone."),
    "Lightning": (lightning, "state_dict.model."),
    "transformers' wrapper": (lambda s: behind("timm_model.", s), "timm_model."),
    "a word of one's own": (lambda s: {"my": {"run": behind("net.", s)}}, "my.run.net."),
    "with a decoder": (
        lambda s: {"model": {**s, "mask_token": torch.ones(1), "decoder.weight": torch.ones(9, 9)}},
        "model.",
    ),
}


def zeros(state):
    return {key: torch.zeros_like(value) for key, value in state.items()}


def made(name):
    """A model's state dict and a backbone that it is for, which has other values."""
    source = randomise(timm.create_model(name))
    return source.state_dict(), TimmBackbone(name)


def assert_loaded(backbone, state):
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, state[key.removeprefix("model.")]), key


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
@pytest.mark.parametrize(("layout", "prefix"), LAYOUTS.values(), ids=LAYOUTS)
def test_what_trainers_write_is_loaded(tmp_path, caplog, layout, prefix, name):
    caplog.set_level("INFO")
    state, backbone = made(name)
    path = str(tmp_path / "c.pth")
    torch.save(layout(state), path)
    wanted = len([key for key in backbone.state_dict() if "num_batches" not in key])
    backbone.load_checkpoint(path)
    assert_loaded(backbone, state)
    assert f"loaded {wanted} of {wanted} tensors of {name} from {path}" in caplog.text
    detector = Detector(TimmBackbone(name))
    report = load_init_checkpoint(detector, path)
    assert_loaded(detector.backbone, state)
    for said in (caplog.text, report):
        assert (f"which stand behind '{prefix}'" in said) == bool(prefix)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_teacher_and_a_student_are_not_guessed(tmp_path, name):
    state, backbone = made(name)
    path = str(tmp_path / "c.pth")
    torch.save(dino(state), path)
    message = r"c.pth' .*'student.module.backbone' and 'teacher.backbone': .* as in #student.mod"
    with pytest.raises(ValueError, match=message) as error:
        backbone.load_checkpoint(path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="init_checkpoint='.*weights that fit behind"):
        load_init_checkpoint(Detector(TimmBackbone(name)), path)
    for part in ("teacher.backbone", "teacher"):
        backbone = TimmBackbone(name, checkpoint_path=f"{path}#{part}")
        assert_loaded(backbone, state)
    detector = Detector(TimmBackbone(name))
    load_init_checkpoint(detector, f"{path}#student")
    for key, value in detector.backbone.state_dict().items():
        moved = 1 if value.is_floating_point() else 0
        assert torch.equal(value, state[key.removeprefix("model.")] + moved), key
    with pytest.raises(
        ValueError, match=r"nothing behind 'techer': valid are 'student', 'teacher'"
    ):
        TimmBackbone(name, checkpoint_path=f"{path}#techer")


def test_two_copies_of_the_same_values_are_one(tmp_path):
    state, backbone = made("test_resnet")
    torch.save({"encoder_q": state, "encoder_k": state}, tmp_path / "c.pth")
    backbone.load_checkpoint(str(tmp_path / "c.pth"))
    assert_loaded(backbone, state)


def test_a_number_sign_in_a_files_own_name(tmp_path):
    state, backbone = made("test_resnet")
    torch.save(state, tmp_path / "a#b.pth")
    backbone.load_checkpoint(str(tmp_path / "a#b.pth"))
    assert_loaded(backbone, state)


def test_torchs_averaged_model(tmp_path):
    state, backbone = made("test_resnet")
    source = timm.create_model("test_resnet")
    source.load_state_dict(state)
    torch.save(AveragedModel(source).state_dict(), tmp_path / "c.pth")
    backbone.load_checkpoint(str(tmp_path / "c.pth"))
    assert_loaded(backbone, state)


def test_torchvisions_detector_gives_its_backbone(tmp_path):
    make = torchvision.models.detection.fasterrcnn_resnet50_fpn
    theirs = randomise(make(weights=None, weights_backbone=None, num_classes=3))
    torch.save(theirs.state_dict(), tmp_path / "c.pth")
    state = theirs.backbone.body.state_dict()
    for make in (TimmBackbone, TorchvisionBackbone):
        backbone = make("resnet50", norm="FrozenBN", checkpoint_path=str(tmp_path / "c.pth"))
        for key, value in backbone.state_dict().items():
            assert torch.equal(value, state[key.removeprefix("model.")]), key


def test_a_masked_autoencoder_gives_its_encoder(tmp_path):
    """MAE's decoder has blocks of the same names, in a module list of its own."""
    state, backbone = made("vit_tiny_patch16_224")
    state = {key: value for key, value in state.items() if not key.startswith("head.")}
    blocks = {f"decoder_{key}": value for key, value in state.items() if key.startswith("blocks.")}
    extra = {"mask_token": torch.ones(1, 1, 192), "decoder_pos_embed": torch.ones(1, 197, 192)}
    torch.save({"model": {**state, **blocks, **extra}, "epoch": 400}, tmp_path / "c.pth")
    backbone.load_checkpoint(str(tmp_path / "c.pth"))
    assert_loaded(backbone, state)


def test_dinov2s_own_layout(tmp_path):
    """Its names are timm's but for ls1.gamma, its register tokens and its position embeddings."""
    name = "vit_small_patch14_reg4_dinov2"
    state = randomise(timm.create_model(name, num_classes=0)).state_dict()
    theirs = {key: value for key, value in state.items() if key != "reg_token"}
    theirs["register_tokens"] = state["reg_token"]
    theirs["mask_token"] = torch.zeros(1, 384)
    # there the class token has a position embedding too, and the values are added up in timm
    theirs["cls_token"] = state["cls_token"] - 1
    theirs["pos_embed"] = torch.cat([torch.ones(1, 1, 384), state["pos_embed"]], 1)
    torch.save({"teacher": behind("backbone.", theirs)}, tmp_path / "c.pth")
    backbone = TimmBackbone(name, checkpoint_path=str(tmp_path / "c.pth"))
    for key, value in backbone.state_dict().items():
        torch.testing.assert_close(value, state[key.removeprefix("model.")], msg=key)


def test_the_first_convolution_is_adapted_behind_a_prefix(tmp_path):
    state, _ = made("test_resnet")
    torch.save({"state_dict": behind("module.", state)}, tmp_path / "c.pth")
    backbone = TimmBackbone("test_resnet", in_channels=1, checkpoint_path=str(tmp_path / "c.pth"))
    first = backbone.state_dict()["model.conv1.0.weight"]
    torch.testing.assert_close(first, state["conv1.0.weight"].sum(1, keepdim=True))


def sharded(folder, state, places=None):
    keys = sorted(state)
    halves = {"model-1.safetensors": keys[::2], "model-2.safetensors": keys[1::2]}
    for name, names in halves.items():
        save_file({key: state[key] for key in names}, folder / name)
    index = {key: name for name, names in halves.items() for key in names}
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": {**index, **(places or {})}})
    (folder / "model.safetensors.index.json").write_text(text)
    return str(folder / "model.safetensors.index.json")


def test_sharded_files_are_read_by_their_index(tmp_path):
    state, backbone = made("test_resnet")
    backbone.load_checkpoint(sharded(tmp_path, behind("timm_model.", state)))
    assert_loaded(backbone, state)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"x": "../other.safetensors"}, "must name files beside it, and names '../other.safet"),
        ({"x": "gone.safetensors"}, "gone.safetensors' does not exist"),
        ({"x": "model-1.safetensors"}, "names 'x', which is not in 'model-1.safetensors'"),
        ({"x": 3}, "is no index of files|must name files beside it"),
        ({"x": ["a"]}, "is no index of files"),
    ],
)
def test_wrong_indices_are_refused(tmp_path, places, message):
    path = sharded(tmp_path, made("test_resnet")[0], places)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        TimmBackbone("test_resnet", checkpoint_path=path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": 3}', '{"weight_map": [1]}', "\0"])
def test_what_is_no_index_is_named(tmp_path, text):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="index.json' is no index of files of weights"):
        TimmBackbone("test_resnet", checkpoint_path=str(path))


def saved(folder, content, name="c.pth"):
    torch.save(content, folder / name)
    return str(folder / name)


def of(name, **kwargs):
    """A detector with a backbone of other values than a new one's."""
    return Detector(randomise(TimmBackbone(name, **kwargs), seed=1))


@pytest.mark.parametrize(
    ("larger", "smaller"), [("resnet34", "resnet18"), ("convnext_femto", "convnext_atto")]
)
def test_a_deeper_backbone_under_the_detectors_names_is_refused(tmp_path, larger, smaller):
    path = saved(tmp_path, {"model": Detector(TimmBackbone(larger)).state_dict()})
    model = of(smaller)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="cannot be taken: the model has no |half of the backbone"):
        load_init_checkpoint(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    load_init_checkpoint(model, path, allow_partial=True)  # its heads
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items() if "head" not in k)
    broken = {key: value * float("nan") for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="not finite"):
        load_init_checkpoint(model, saved(tmp_path, broken), allow_partial=True)


@pytest.mark.parametrize(
    ("name", "extra", "message"),
    [
        ("vit_tiny_patch16_224", "blocks.0.ls1.gamma", "no blocks.0.ls1.gamma"),
        ("vit_tiny_patch16_224", "reg_token", "no reg_token"),
        ("vit_tiny_patch16_224", "dist_token", "no dist_token"),
        ("resnet18", "layer1.0.conv1.bias", "no layer1.0.conv1.bias"),
        ("resnet18", "layer1.2.conv1.weight", "no layer1.2.conv1.weight"),
    ],
)
def test_what_the_model_would_compute_without_is_refused(tmp_path, name, extra, message):
    state = {**timm.create_model(name).state_dict(), extra: torch.ones(192)}
    with pytest.raises(ValueError, match=f"c.pth' is not of {name}: the model has {message}"):
        TimmBackbone(name, checkpoint_path=saved(tmp_path, state))


def parameters(state):
    kept = ("running_mean", "running_var", "num_batches_tracked")
    return {key: value + 1 for key, value in state.items() if not key.endswith(kept)}


# What is ambiguous, what is said of it, and what chooses the part with the model's values.
CHOICES = {
    "an average that lacks a part": (
        lambda s: {"model": s, "ema": {"decay": 0.9, "shadow": parameters(s)}},
        "behind 'model' and 'ema.shadow'",
        "#model",
    ),
    "the outer level": (
        lambda s: {**s, **behind("target_encoder.", zeros(s))},
        "weights that fit behind",
        "#",
    ),
}


@pytest.mark.parametrize(("layout", "message", "choice"), CHOICES.values(), ids=CHOICES)
def test_a_part_that_is_not_guessed_can_be_chosen(tmp_path, layout, message, choice):
    state, backbone = made("test_resnet")
    path = saved(tmp_path, layout(state))
    with pytest.raises(ValueError, match=message):
        backbone.load_checkpoint(path)
    backbone.load_checkpoint(f"{path}{choice}")
    assert_loaded(backbone, state)


def test_several_averages_are_not_guessed(tmp_path):
    state, backbone = made("test_resnet")
    kept = {"model": zeros(state), "model_ema": state, "model_ema2": parameters(state)}
    with pytest.raises(ValueError, match="'model_ema'.*'model_ema2'|'model_ema2'.*'model_ema'"):
        backbone.load_checkpoint(saved(tmp_path, kept))


def test_a_detector_for_another_image_size_or_other_channels(tmp_path):
    """What stands behind the detector's names is converted as a file of the model alone is."""
    name = "vit_tiny_patch16_224"
    path = saved(tmp_path, {"model": of(name).state_dict()})
    model = Detector(TimmBackbone(name, img_size=448))
    report = load_init_checkpoint(model, path)
    alone = TimmBackbone(name, img_size=448, checkpoint_path=path)
    assert torch.equal(model.backbone.model.pos_embed, alone.model.pos_embed)
    assert "wanting" not in report
    path = saved(tmp_path, {"model": of("test_resnet").state_dict()})
    model = Detector(TimmBackbone("test_resnet", in_channels=1))
    assert "wanting" not in load_init_checkpoint(model, path)


def test_norms_of_the_same_shape_are_no_backbone(tmp_path):
    norm = {f"bn1.{key}": torch.zeros(64) for key in ("weight", "running_mean", "running_var")}
    content = {"model": {"head.weight": torch.ones(2, 2), "head.bias": torch.ones(2)}}
    content["model"] |= {f"x{i}": torch.ones(1) for i in range(9)}
    content["decoder"] = {"0": norm, "1": norm}
    model = of("resnet18")
    before = model.backbone.model.bn1.weight.clone()
    load_init_checkpoint(model, saved(tmp_path, content), allow_partial=True)
    assert torch.equal(model.backbone.model.bn1.weight, before)
    assert torch.equal(model.head.weight, torch.ones(2, 2))


def test_a_number_sign_in_a_folders_name(tmp_path):
    state, backbone = made("test_resnet")
    folder = tmp_path / "run#3"
    folder.mkdir()
    backbone.load_checkpoint(
        saved(folder, {"teacher": state, "student": zeros(state)}) + "#teacher"
    )
    assert_loaded(backbone, state)


def test_a_refused_file_changes_nothing(tmp_path):
    state, _ = made("test_resnet")
    backbone = TimmBackbone("test_resnet")
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    path = saved(tmp_path, dict([*state.items()][:20]))
    with pytest.raises(ValueError, match="tensors fit, and"):
        backbone.load_checkpoint(path)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


ODD_TENSORS = {
    "sparse": torch.eye(3).to_sparse(),
    "meta": torch.ones(3, 3, device="meta"),
    "quantised": torch.quantize_per_tensor(torch.ones(3, 3), 1.0, 0, torch.qint8),
}


@pytest.mark.parametrize("tensor", ODD_TENSORS.values(), ids=ODD_TENSORS)
def test_tensors_without_plain_values_are_refused(tensor):
    with pytest.raises(ValueError, match="tensor 'a' of the checkpoint must be dense"):
        fitting({"a": tensor}, {"a": torch.zeros(3, 3)})


def test_small_floats_are_read():
    tensor = torch.ones(3).to(torch.float8_e4m3fn)
    assert fitting({"a": tensor}, {"a": torch.zeros(3)})


def test_paths_and_folders(tmp_path):
    state, backbone = made("test_resnet")
    saved(tmp_path, {"state_dict": state, "best": np.float64(0.5)})
    backbone.load_checkpoint(tmp_path / "c.pth")
    assert_loaded(backbone, state)
    with pytest.raises(ValueError, match="is a folder, and must be a file"):
        backbone.load_checkpoint(str(tmp_path))


def test_an_exported_backbone_is_chosen_like_a_loaded_one(tmp_path):
    state = of("test_resnet").state_dict()
    averaged = saved(tmp_path, {"model": zeros(state), "model_ema": state}, "a.pth")
    export_backbone(averaged, str(tmp_path / "a.safetensors"))
    exported = load_file(tmp_path / "a.safetensors")
    assert torch.equal(exported["bn1.weight"], state["backbone.model.bn1.weight"])
    both = saved(tmp_path, {"teacher": state, "student": zeros(state)}, "b.pth")
    with pytest.raises(ValueError, match="b.pth' cannot be taken: .*'teacher' and 'student'"):
        export_backbone(both, str(tmp_path / "b.safetensors"))
    export_backbone(f"{both}#teacher", str(tmp_path / "b.safetensors"))


def test_wrappers_within_names_and_groups_of_blocks(tmp_path):
    state, backbone = made("test_resnet")
    wrapped = {key.replace("layer1.", "layer1._orig_mod."): v for key, v in state.items()}
    backbone.load_checkpoint(saved(tmp_path, {"model": wrapped}))
    assert_loaded(backbone, state)
    state, backbone = made("vit_tiny_patch16_224")
    grouped = {
        re.sub(r"^blocks\.(\d+)\.", lambda m: f"blocks.{int(m[1]) // 6}.{m[1]}.", key): value
        for key, value in state.items()
    }
    backbone.load_checkpoint(saved(tmp_path, {"teacher": behind("backbone.", grouped)}))
    assert_loaded(backbone, state)


def test_torchvisions_densenet_as_it_is_downloaded(tmp_path):
    state = randomise(torchvision.models.densenet121()).state_dict()
    theirs = {re.sub(r"(denselayer\d+\.\w+?)(\d)\.", r"\1.\2.", k): v for k, v in state.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in theirs
    path = saved(tmp_path, theirs)
    backbone = TorchvisionBackbone("densenet121", checkpoint_path=path)
    assert_loaded(backbone, state)
