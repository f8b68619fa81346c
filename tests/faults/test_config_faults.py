"""Wrong settings and configs: each ends in one sentence before anything is built."""

import json
import os
import re

import pytest
import yaml
from detbackbones import get_config, list_configs, load_config
from detbackbones.data.evaluator import CocoEvaluator
from detbackbones.training.agreement import frozen_at_random
from detbackbones.training.run import check_config
from detectron2.config import LazyConfig, instantiate
from omegaconf import OmegaConf


def data_words(folder):
    return [
        f"dataset.{split}_{key}={folder}/{path}"
        for split in ("train", "val")
        for key, path in (("json", f"{split}.json"), ("images", f"images/{split}"))
    ]


def each(must, keys, *values):
    return {f"{key}={value}": f"{key}=.* must {must}" for key in keys for value in values}


MODELS = ("cascade_mask_rcnn", "detr", "faster_rcnn", "fcos", "mask_rcnn", "panoptic_fpn")
MODELS += ("retinanet", "semantic_fpn")
NO_COUNT = ("ten", "2.5", "0", "-3", "", "null", "[1]", "True", "1e3", "9" * 400 + ".5", "nan")
NO_COUNT_FROM_0 = tuple(value for value in NO_COUNT if value != "0")
NO_SWITCH = ("maybe", "1", "0", "null", "", "[True]", "yes please")
NO_SIZES = ("[]", "[0]", "[-5]", "[2.5]", "256", "text", "null", "[a]", "{a:1}", "[[256]]")
NO_POSITIVE = ("-1", "0", "text", "null", "", "[1]", "inf", "nan")

WRONG = {
    **each(
        "be a whole number from 1",
        ("train.max_iter", "train.log_period", "dataloader.train.total_batch_size")
        + ("train.checkpointer.period", "train.checkpointer.max_to_keep", "dataset.val_size")
        + ("dataset.max_size", "dataset.channels", "model.backbone.out_channels"),
        *NO_COUNT,
    ),
    **each(
        "be a whole number from 0",
        ("train.eval_period", "train.pictures", "train.seed")
        + ("dataloader.train.num_workers", "dataloader.test.num_workers"),
        *NO_COUNT_FROM_0,
    ),
    **each(
        "be True or False",
        ("train.amp.enabled", "train.clip_grad.enabled", "train.allow_pickle", "dataset.verify")
        + ("dataloader.train.aspect_ratio_grouping",),
        *NO_SWITCH,
    ),
    **each("be a list of whole numbers from 1", ("dataset.train_sizes",), *NO_SIZES),
    **each(
        "be a number above 0",
        ("train.clip_grad.params.max_norm", "train.clip_grad.params.norm_type", "optimizer.lr"),
        *NO_POSITIVE,
    ),
    **each("be a number above 0, or null", ("dataset.max_value",), "-1", "0", "text", "[1]", "nan"),
    **each(
        "be a number from 0 to 1",
        ("lr_multiplier.warmup_length", "lr_multiplier.warmup_factor"),
        *("3", "-0.1", "text", "null", "nan", "[0.1]"),
    ),
    **each("be a number from 0", ("optimizer.weight_decay",), "-1", "text", "null", "nan", "inf"),
    **each(
        "be a list of names, or null", ("dataset.classes",), "[]", "circle", "5", "[5]", "[[a]]"
    ),
    **each("be a folder", ("train.output_dir",), "null", ""),
    **each("be a section of settings", ("train", "model", "dataloader", "optimizer"), "null"),
    "train.amp.dtype=half": "train.amp.dtype='half' is unknown: .*'bfloat16'",
    "train.device=gpu": "train.device='gpu' is unknown: .*'cpu'",
    "dataset.val_json=": "dataset.val_json='' must be the path of a COCO JSON file",
    "dataset.train_images=": "dataset.train_images='' must be the folder of the images",
    "dataset.train_json={}": "dataset.train_json='.*' must be .* JSON file, and is a folder",
    "dataset.val_images={}/val.json": "dataset.val_images='.*' must be .*, and is a file",
    "dataset.val_json={}/vla.json": "dataset.val_json='.*' .* does not exist: .*'val.json'",
    "dataset.train_json=[1,2": r"train_json='\[1,2' must be .* does not exist",
    "dataset.val_json=a(b, c)=d": r"dataset.val_json='a\(b, c\)=d' must be .* does not exist",
    "train.max_iter=[1": "train.max_iter='.1' must be a whole number",
    "train.max_iter=${oc.env:HOME}": "train.max_iter='.*' must be a whole number",
    "train.max_iter=${no.such.key}": "train.max_iter must be a value: ",
    "train.max_iter=${train.max_iter}": "train.max_iter must be a value: ",
    "train.seed": "override 'train.seed' must be key=value",
    "=5": "override '=5' must be key=value",
    "train..seed=5": "'train..seed' is unknown",
    "train.seed.x=5": "must be key=value that the config takes: train.seed has no keys",
    "optimizer.lrr=1": "'optimizer.lrr' is unknown: .*'optimizer.lr'",
}


for word in ("train.checkpointer.max_to_keep=null", "train.clip_grad.params.norm_type=inf"):
    del WRONG[word]  # all are kept; the largest gradient counts


@pytest.mark.parametrize(("word", "message"), WRONG.items())
def test_wrong_settings_are_refused(tiny, word, message):
    words = [*data_words(tiny), word.replace("{}", str(tiny)) if "{}" in word else word]
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        check_config(get_config("finetune/faster_rcnn.py"), words)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1500


# config, words, the sentence: what can be seen when the data are read and the model is built
DISAGREEING = {
    "fewer classes": ("faster_rcnn", ["model.roi_heads.num_classes=1"], "num_classes=1 must be 2"),
    "no classes": ("faster_rcnn", ["model.roi_heads.num_classes=0"], "num_classes=0 must be 2"),
    "more classes": ("mask_rcnn", ["model.roi_heads.num_classes=9"], "num_classes=9 must be 2"),
    "classes of RetinaNet": ("retinanet", ["model.num_classes=3"], "num_classes=3 must be 2"),
    "classes of queries": (
        "mask2former_instance",
        ["model.num_classes=3"],
        "model.num_classes=3 must be 2",
    ),
    "classes of pixels": (
        "mask2former_semantic",
        ["model.num_classes=2"],
        "model.num_classes=2 must be 3",
    ),
    "classes of a DETR": ("rt_detr", ["model.num_classes=1"], "model.num_classes=1 must be 2"),
    "classes of masks": (
        "mask_rcnn",
        ["model.roi_heads.mask_head.num_classes=3"],
        "model.roi_heads.mask_head.num_classes=3 must be 2",
    ),
    "classes of label maps": (
        "semantic_fpn",
        ["model.sem_seg_head.num_classes=2"],
        "model.sem_seg_head.num_classes=2 must be 3",
    ),
    "one mean": ("faster_rcnn", ["model.pixel_mean=[116.0]"], "pixel_mean has 1 values, .* 3 chan"),
    "two deviations": ("retinanet", ["model.pixel_std=[1,2]"], "model.pixel_std has 2 values"),
    "gray backbone": (
        "faster_rcnn",
        ["model.backbone.bottom_up.in_channels=1", "model.pixel_mean=[1,2,3]"],
        "in_channels=1 of the backbone must be 3, the channels of the images",
    ),
    "no such class": ("faster_rcnn", ["dataset.classes=[squid]"], r"classes=\['squid'\] must be"),
    "images of other channels": (
        "faster_rcnn",
        ["dataset.channels=5", "dataset.verify=True"],
        r"image '.*': shape=\(64, 64, 3\) must be \(height, width, 5\) \(8 of 8 images are wrong\)",
    ),
}


@pytest.mark.parametrize(("config", "more", "sentence"), DISAGREEING.values(), ids=DISAGREEING)
def test_parts_that_do_not_go_together(
    tiny, run_train_net, tmp_path, capsys, monkeypatch, config, more, sentence
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = data_words(tiny)
    backbone = (
        "model.backbone" if config == "rt_detr" or "mask2" in config else "model.backbone.bottom_up"
    )
    if "semantic" in config:
        words = [word.replace("json=", "labels=").replace(".json", "") for word in words]
        words = [w.replace(f"{tiny}/train", f"{tiny}/labels/train") for w in words]
        words = [w.replace(f"{tiny}/val", f"{tiny}/labels/val") for w in words]
        words.append("dataset.num_classes=3")
    words += [f"{backbone}.model_name=test_resnet", f"{backbone}.pretrained=False"]
    words += [f"train.output_dir={tmp_path / 'run'}", "train.max_iter=1", *more]
    assert run_train_net("--config-file", f"finetune/{config}.py", *words) == 2
    captured = capsys.readouterr()
    (line,) = [x for x in captured.err.splitlines() if x.startswith("detbackbones train: ")]
    assert re.search(sentence, line), line
    assert "Traceback" not in captured.out + captured.err


MARK = "marked"  # a file that code in a config would make
TAGS = {
    "apply": '!!python/object/apply:os.system ["touch {}"]',
    "new": "!!python/object/new:os.system [touch {}]",
    "object": "!!python/object:os.system {{}}",
    "name": "!!python/name:os.system ''",
    "module": "!!python/module:os ''",
    "eval": "!!python/object/apply:eval [\"open('{}', 'w')\"]",
    "subprocess": "!!python/object/apply:subprocess.run [[touch, {}]]",
    "another": "!mine 5",
    "bytes": "!!python/bytes abc",
}


@pytest.mark.parametrize("tag", TAGS.values(), ids=TAGS)
def test_no_tag_is_executed(tmp_path, tag):
    file = tmp_path / "config.yaml"
    file.write_text(f"train:\n  x: {tag.format(tmp_path / MARK)}\n")
    with pytest.raises(
        ValueError, match="config.yaml, line 2: could not determine .*--trust"
    ) as error:
        load_config(file)
    assert "\n" not in str(error.value)
    assert not (tmp_path / MARK).exists()


CALLS = (
    *("os.system", "subprocess.run", "builtins.eval", "builtins.exec", "shutil.rmtree"),
    *("torch.os.system", "detectron2.data.common.np.load", "timm.models._hub.os.remove"),
    *("torch.load", "torch.hub.load", "torch.serialization.load", "torch.package.PackageImporter"),
    *("torch.utils.cpp_extension.load", "detectron2.config.LazyConfig.load", "numpy.load"),
    *("detectron2.utils.registry.locate", "mine.Detector", "no.such", "torch.no.such", "", 5, None),
    *(
        "torch.utils.collect_env.run",
        "detbackbones.config.load_config",
        "detbackbones.cli.main.main",
    ),
    *("detectron2.model_zoo.get_config", "detectron2.checkpoint.DetectionCheckpointer"),
    *("timm.models._hub.load_state_dict_from_hf", "detbackbones.weights.read_checkpoint"),
    *("detectron2.config.lazy._cast_to_config", "pickle.loads", "importlib.import_module"),
)


@pytest.mark.parametrize("target", CALLS)
@pytest.mark.parametrize("place", ["model", "a list"])
def test_calls_outside_of_the_field_need_trust(tmp_path, target, place):
    file = tmp_path / "config.yaml"
    call = {"_target_": target, "x": 1}
    content = {"model": call} if place == "model" else {"hooks": [1, {"deep": [call]}]}
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(
        ValueError, match=r"_target_=.* calls what is in no module .*--trust"
    ) as error:
        load_config(file)
    assert "\n" not in str(error.value)
    assert OmegaConf.to_container(load_config(file, trust=True)) == content


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "a ${oc.create:{_target_: os.system}} b"])
def test_resolvers_need_trust(tmp_path, text):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"a": [{"b": text}], "c": "${a}"}))
    with pytest.raises(ValueError, match="a.0.b=.* calls a resolver of OmegaConf: .*--trust"):
        load_config(tmp_path / "config.yaml")
    load_config(tmp_path / "config.yaml", trust=True)


NOT_YAML = {
    "tab": "a:\n\tb: 1",
    "colon": "a: b: c",
    "bracket": "a: [1, 2",
    "quote": "a: 'b",
    "list": "- 1\n- 2",
    "text": "hello",
    "nothing": "",
    "number": "5",
    "binary": "\x00\x01\x02",
    "anchor": "a: *b",
    "deep": "[" * 5000,
}


@pytest.mark.parametrize("text", NOT_YAML.values(), ids=NOT_YAML)
def test_what_is_no_config_is_refused(tmp_path, text):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match="config.yaml") as error:
        load_config(file)
    assert "\n" not in str(error.value)


def test_a_strangers_config_is_refused_by_the_program(tmp_path, run_train_net, capsys):
    file = tmp_path / "config.yaml"
    file.write_text(f"x: !!python/object/apply:os.system ['touch {tmp_path / MARK}']")
    assert run_train_net("--config-file", file) == 2
    assert "line 1" in capsys.readouterr().err
    file.write_text("train: {allow_pickle: true}")
    assert run_train_net("--config-file", file) == 2
    assert "lets a checkpoint execute any code: give --trust" in (capsys.readouterr().err)
    assert not (tmp_path / MARK).exists()


@pytest.mark.parametrize("name", [n for n in list_configs() if not n.startswith("detrex/")])
def test_our_own_configs_are_read_back(tmp_path, name):
    cfg = get_config(name)
    cfg.train.extra = {"a": 1, "b": [1.5, None, True]}
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    assert load_config(tmp_path / "config.yaml") == LazyConfig.load(str(tmp_path / "config.yaml"))


def test_a_tuple_is_read_back(tmp_path):
    (tmp_path / "config.yaml").write_text("a: !!python/tuple [1, 2]\n")
    assert load_config(tmp_path / "config.yaml").a == [1, 2]


ODD_NAMES = ("a (1)", "b, c", "[2024] d", "e=f", "g h", "{i}", "j'k", "l#m", "ñ", "1e5", "null x")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_paths_are_paths_and_no_syntax(tiny, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    for entry in os.listdir(tiny):
        (folder / entry).symlink_to(tiny / entry)
    words = [*data_words(folder), f"train.output_dir={folder / 'run'}"]
    cfg = check_config(get_config("finetune/faster_rcnn.py"), words)
    assert cfg.train.output_dir == str(folder / "run")
    dataset = instantiate(cfg.dataloader.train.dataset)
    assert len(dataset) == len(json.loads((tiny / "train.json").read_text())["images"])


@pytest.mark.parametrize("key", ["train.max_itr", "train.evalperiod", "dataset.train_jsn"])
def test_misspelled_settings_of_a_program_are_refused(tiny, key):
    """In Python nothing else would notice them; settings of other trainers pass."""
    cfg = get_config("finetune/faster_rcnn.py")
    for word in data_words(tiny):
        name, _, value = word.partition("=")
        OmegaConf.update(cfg, name, value)
    OmegaConf.update(cfg, "train.wandb.enabled", False, force_add=True)
    OmegaConf.update(cfg, "train.model_ema", {"enabled": False}, force_add=True)
    check_config(cfg)
    OmegaConf.update(cfg, key, 3, force_add=True)
    with pytest.raises(ValueError, match=f"config key '{key}' is unknown: the nearest is '"):
        check_config(cfg)


@pytest.mark.parametrize("name", [n for n in list_configs() if n.split("/")[0] in MODELS])
def test_configs_for_data_of_detectron2_are_right(name):
    """They have no section for files of one's own."""
    cfg = check_config(get_config(name), ["train.max_iter=3"])
    assert "dataset" not in cfg and cfg.train.max_iter == 3


FROZEN = {
    "as it is": ({}, "freeze_at=2 and norm=FrozenBN keep a part of them as they are"),
    "a checkpoint": ({"checkpoint_path": "a.pth"}, ""),
    "pretrained": ({"pretrained": True}, ""),
    "a part": ({"norm": "BN"}, "freeze_at=2 keep a part of them"),
    "nothing": ({"norm": "BN", "freeze_at": 0}, ""),
}


@pytest.mark.parametrize(("change", "said"), FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("name", ["faster_rcnn", "rt_detr", "mask_rcnn_torchvision"])
def test_random_weights_that_are_frozen_are_said(change, said, name):
    cfg = get_config(f"finetune/{name}.py")
    backbone = cfg.model.backbone.get("bottom_up") or cfg.model.backbone
    none = {"weights": None} if "torchvision" in name else {"pretrained": False}
    backbone.update({"pretrained": False, **none, **change})
    found = frozen_at_random(cfg)
    assert said in found if said else not found


@pytest.mark.parametrize("limits", [[1, 10], [1, 10, 100, 300], [10, 1, 100], [0, 1, 2], ["a"] * 3])
def test_wrong_limits_of_detections_are_refused(limits):
    with pytest.raises(ValueError, match="max_dets_per_image=.* must be a whole number from 1, or"):
        CocoEvaluator("coco_2017_val", limits)
