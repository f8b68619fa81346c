"""The training program: what it writes, how it continues, and how it ends on wrong input."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from detbackbones.config import config_folder, load_config
from detbackbones.training.run import evaluate
from PIL import Image
from support import TOOLS

FINETUNE = config_folder() / "finetune"
MODEL = "model.backbone.bottom_up.model_name"


def words(tiny, output, config="faster_rcnn", *more):
    """The command line for a small and short run on the tiny data."""
    roi = ["model.roi_heads.batch_size_per_image=16", "model.roi_heads.box_head.fc_dims=[32, 32]"]
    labels = [f"dataset.{s}_labels={tiny}/labels/{s}" for s in ("train", "val")]
    jsons = [f"dataset.{s}_json={tiny}/{s}.json" for s in ("train", "val")]
    semantic, backbone = config == "semantic_fpn", "model.backbone.bottom_up"
    neck = ["model.backbone.out_channels=32"]
    if config in ("rt_detr", "dino", "mask2former_instance"):
        backbone = "model.backbone"
        neck = ["model.num_queries=20", "model.config_kwargs.decoder_layers=2"]
    return [
        *["--config-file", str(FINETUNE / f"{config}.py"), f"train.output_dir='{output}'"],
        *[f"dataset.{s}_images={tiny}/images/{s}" for s in ("train", "val")],
        *([*labels, "dataset.num_classes=3"] if semantic else jsons),
        *(roi if config.endswith("rcnn") else []),
        *["dataset.train_sizes=[64, 80]", "dataset.val_size=64", "train.device=cpu"],
        *[f"{backbone}.pretrained=False", f"{backbone}.model_name=test_resnet"],
        *[*neck, "optimizer.lr=0.001"],
        *["dataloader.train.total_batch_size=2", "dataloader.train.num_workers=0"],
        *["dataloader.test.num_workers=0", "train.pictures=0", "train.log_period=1"],
        *["train.max_iter=4", "train.checkpointer.period=2", "train.eval_period=0"],
        *more,
    ]


def weights(file):
    """Those of a checkpoint, and their average if it has one."""
    content = torch.load(file, weights_only=True)
    average = content["trainer"].get("ema", {})
    return content["model"] | {f"ema.{key}": value for key, value in average.items()}


def same(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    return all(torch.equal(first[key], second[key]) for key in first)


def start(arguments, launcher=(), **settings):
    """Start the program in a process and session of its own, with one thread."""
    command = [sys.executable, *launcher, str(TOOLS / "train_net.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, start_new_session=True, **settings)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """The folder of a whole run."""
    folder = tmp_path_factory.mktemp("finished")
    assert start([*words(tiny, folder), "train.max_iter=20", "train.pictures=2"]).wait() == 0
    return folder


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return {key: value for row in rows for key, value in row.items()}


def test_a_run_writes_what_it_reports(finished):
    log = (finished / "log.txt").read_text()
    last = metrics(finished)
    assert {"total_loss", "loss_cls", "loss_rpn_loc", "lr", "bbox/AP", "bbox/AP50"} <= last.keys()
    assert f"|bbox|{last['bbox/AP']:.1f}|{last['bbox/AP50']:.1f}|" in log.replace(" ", "")
    names = ("model_final.pth", "metrics.json", "config.yaml", "log.txt")
    assert f"wrote {finished}/batch.png" in log and (finished / "batch.png").stat().st_size > 0
    for name in (*names, "predictions.png", "curves.png"):
        assert (finished / name).stat().st_size > 0
        assert str(finished / name) in log.rpartition("wrote ")[2]
    assert Image.open(finished / "predictions.png").size[0] > 500
    assert list(finished.glob("events.out.tfevents.*"))
    assert "iter 20/20" in log and "img/s" in log
    assert len(list(finished.glob("model_00*.pth"))) == 2  # max_to_keep


@pytest.mark.parametrize("by", ["output_dir", "init_checkpoint"])
def test_eval_only_repeats_the_metrics(finished, tiny, run_train_net, tmp_path, capsys, by):
    """With the config that the run has written."""
    arguments = ["--config-file", finished / "config.yaml", "--eval-only"]
    if by == "output_dir":
        shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    else:
        arguments += [f"train.init_checkpoint={finished}/model_final.pth"]
    before = metrics(finished)
    assert run_train_net(*arguments, f"train.output_dir={tmp_path}") == 0
    out = capsys.readouterr().out
    row = f"| bbox | {before['bbox/AP']:.1f} | {before['bbox/AP50']:.1f} |"
    assert row in re.sub(" +", " ", out)
    for line in ("Average Precision", "Serializing", "Evaluation results for bbox"):
        assert line not in out  # what detectron2 says of the same is in the log alone
    assert "Evaluation results for bbox" in (tmp_path / "log.txt").read_text()
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written.pop("checkpoint").endswith("model_final.pth")
    assert {"AP", "AP50", "AP75"} <= written["bbox"].keys()
    for name, value in written["bbox"].items():  # nan is null there
        value = float("nan") if value is None else value
        assert value == pytest.approx(before[f"bbox/{name}"], abs=1e-4, nan_ok=True)
    assert Image.open(tmp_path / "evaluation_predictions.png").size[0] > 500
    wrote = ("evaluation.json", "evaluation_predictions.png", "evaluation_errors.png")
    assert f"wrote {', '.join(f'{tmp_path}/{name}' for name in wrote)}" in out


RESUMED = {
    "roi sampling": ("faster_rcnn",),
    "worker": ("faster_rcnn", "dataloader.train.num_workers=1"),
    "running mean": ("retinanet",),
    "denoising": ("rt_detr",),
    "dino": ("dino",),
    "average, in parts, mixed, LoRA": (
        "dino",
        "train.model_ema.enabled=True",
        "train.accumulation_steps=2",
        "dataset.mixing.mosaic=0.5",
        "dataset.augmentation.color=0.4",
        "model.backbone.lora_rank=2",
    ),
    "points of masks": ("mask2former_instance", "model.config_kwargs.train_num_points=50"),
    "bfloat16": ("faster_rcnn", "train.amp.enabled=True"),
    "float16": (
        "semantic_fpn",
        "train.amp.enabled=True",
        "train.amp.dtype=float16",
        "train.max_iter=20",
        "model.sem_seg_head.conv_dims=32",  # a CPU takes long for float16
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_ends_like_a_whole_one(tiny, run_train_net, tmp_path, case):
    whole, part = tmp_path / "whole", tmp_path / "part"
    more = ["train.checkpointer.max_to_keep=99", "train.eval_period=3"]
    assert run_train_net(*words(tiny, whole, *case), *more) == 0
    part.mkdir()
    shutil.copy(whole / "model_0000001.pth", part)
    (part / "last_checkpoint").write_text("model_0000001.pth")
    saved = torch.load(part / "model_0000001.pth", weights_only=True)
    assert bool(saved["trainer"]["scaler"]) == ("train.amp.dtype=float16" in case)

    assert run_train_net("--resume", *words(tiny, part, *case), *more) == 0
    assert "from iteration 2" in (part / "log.txt").read_text()
    assert same(whole / "model_final.pth", part / "model_final.pth")
    assert not same(whole / "model_final.pth", whole / "model_0000001.pth")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_killed_run_ends_like_a_whole_one(tiny, run_train_net, tmp_path, one_thread, workers):
    more = [f"dataloader.train.num_workers={workers}", "train.max_iter=12"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_train_net(*words(tiny, whole), *more) == 0

    with start([*words(tiny, killed), *more], stdout=subprocess.DEVNULL) as process:
        while not (killed / "last_checkpoint").exists() and process.poll() is None:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "model_final.pth").exists()

    assert run_train_net("--resume", *words(tiny, killed), *more) == 0
    starts = re.findall(
        "Starting training from iteration ([0-9]+)", (killed / "log.txt").read_text()
    )
    assert len(starts) == 2 and int(starts[1]) >= 2
    assert same(whole / "model_final.pth", killed / "model_final.pth")


@pytest.mark.slow
def test_the_seed_decides(tiny, run_train_net, tmp_path):
    seeds = {"a": 5, "b": 5, "c": 6}
    for name, seed in seeds.items():
        more = [f"train.seed={seed}", "train.max_iter=2"]
        assert run_train_net(*words(tiny, tmp_path / name), *more) == 0
    a, b, c = (tmp_path / name / "model_final.pth" for name in seeds)
    assert same(a, b) and not same(a, c)


LAUNCHERS = {
    "launch": ([], ["--num-processes", 2]),
    "torchrun": (
        ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"],
        [],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "arguments"), LAUNCHERS.values(), ids=LAUNCHERS)
def test_two_processes_train_like_one(tiny, run_train_net, tmp_path, launcher, arguments):
    """The loss is a mean over pixels, no norm depends on the batch, and the step is linear."""
    one, two = tmp_path / "one", tmp_path / "two"
    more = ["dataset.train_sizes=[64]", "optimizer.eps=1", "optimizer.lr=1"]
    assert run_train_net(*words(tiny, one, "semantic_fpn"), *more) == 0
    process = start([*arguments, *words(tiny, two, "semantic_fpn"), *more], launcher)
    assert process.wait(timeout=600) == 0
    assert distance(one / "model_final.pth", two / "model_final.pth") < 1e-4
    assert distance(one / "model_final.pth", one / "model_0000001.pth") > 1e-2
    assert metrics(two)["sem_seg/mIoU"] == pytest.approx(metrics(one)["sem_seg/mIoU"], abs=0.5)
    assert "iter 4/4" in (two / "log.txt").read_text()
    assert (two / "log.txt.rank1").exists()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def one_core():
    """All processes compute with one thread, however many there are on a machine."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


@pytest.fixture(scope="module")
def of_two_processes(tiny, tmp_path_factory):
    """A run of two processes on one machine."""
    folder = tmp_path_factory.mktemp("whole")
    arguments = [*words(tiny, folder, "faster_rcnn", *MACHINES), "--num-processes", 2]
    assert start(arguments, preexec_fn=one_core).wait(timeout=600) == 0
    return folder


MACHINES = ("train.max_iter=8", "train.model_ema.enabled=True")


@pytest.mark.slow
def test_two_machines_train_like_one(tiny, tmp_path, of_two_processes):
    url = f"tcp://127.0.0.1:{free_port()}"
    machines = [
        start(
            [
                *words(tiny, tmp_path, "faster_rcnn", *MACHINES),
                *["--num-processes", 1, "--num-machines", 2, "--machine-rank", rank],
                *["--dist-url", url],
            ],
            preexec_fn=one_core,
        )
        for rank in (1, 0)
    ]
    assert [machine.wait(timeout=600) for machine in machines] == [0, 0]
    assert same(tmp_path / "model_final.pth", of_two_processes / "model_final.pth")


@pytest.mark.slow
def test_a_machine_that_fails_is_restarted(tiny, tmp_path, of_two_processes, monkeypatch):
    """torchrun on two machines: one's process is killed, both start again and go on."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # docs/training.md says why
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    launcher = ["-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1]
    launcher += [*rendezvous, "--rdzv-id", "test", "--local-addr", "127.0.0.1"]
    launcher += ["--max-restarts", 2]
    arguments = [*words(tiny, tmp_path, "faster_rcnn", *MACHINES), "--resume"]
    machines = [
        start(arguments, map(str, launcher), preexec_fn=one_core, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    while not (tmp_path / "last_checkpoint").exists() and machines[0].poll() is None:
        time.sleep(0.01)
    children = Path(f"/proc/{machines[1].pid}/task/{machines[1].pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    assert [machine.wait(timeout=600) for machine in machines] == [0, 0], machines[0].stderr.read()
    starts = re.findall("Starting training from iteration ([0-9]+)", log_of(tmp_path))
    assert len(starts) >= 2 and int(starts[-1]) > 0
    assert same(tmp_path / "model_final.pth", of_two_processes / "model_final.pth")


def losses(folder):
    rows = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return [row["total_loss"] for row in rows if "total_loss" in row]


@pytest.mark.slow
def test_a_divided_model_trains_like_a_whole_one(tiny, tmp_path):
    """FSDP and DDP have the same losses, and each continues the checkpoints of the other."""
    case = ["dataset.train_sizes=[64]", "train.max_iter=6", "train.checkpointer.period=3"]
    case += ["train.clip_grad.enabled=True", "train.accumulation_steps=2"]
    case += ["dataloader.train.total_batch_size=4", "--num-processes", 2]
    folders = {fsdp: tmp_path / str(fsdp) for fsdp in (False, True)}
    for fsdp, folder in folders.items():
        arguments = [*words(tiny, folder, "semantic_fpn"), *case, f"train.fsdp={fsdp}"]
        assert start(arguments).wait(timeout=600) == 0
    ddp, fsdp = folders.values()
    assert losses(fsdp) == pytest.approx(losses(ddp), rel=1e-5)
    assert metrics(fsdp)["sem_seg/mIoU"] == pytest.approx(metrics(ddp)["sem_seg/mIoU"], abs=0.1)
    assert distance(ddp / "model_final.pth", fsdp / "model_final.pth") < 5e-5
    assert distance(ddp / "model_final.pth", ddp / "model_0000002.pth") > 5e-4
    for kind, folder in folders.items():
        other = tmp_path / f"continued {kind}"
        other.mkdir()
        shutil.copy(folder / "model_0000002.pth", other)
        (other / "last_checkpoint").write_text("model_0000002.pth")
        arguments = [*words(tiny, other, "semantic_fpn"), *case, f"train.fsdp={not kind}"]
        assert start([*arguments, "--resume"]).wait(timeout=600) == 0
        assert distance(other / "model_final.pth", ddp / "model_final.pth") < 5e-5


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ([], "train.fsdp=True must be False for a single process"),
        (["train.model_ema.enabled=True"], "train.fsdp=True must stand without train.model_ema"),
        (
            ["train.amp.enabled=True", "train.amp.dtype=float16"],
            "train.amp.dtype='float16' must be bfloat16 with train.fsdp",
        ),
    ],
)
def test_what_cannot_be_divided(tiny, run_train_net, tmp_path, capsys, more, sentence):
    assert run_train_net(*words(tiny, tmp_path), "train.fsdp=True", *more) == 2
    assert sentence in capsys.readouterr().err


def log_of(folder):
    return "".join(file.read_text() for file in folder.glob("log.txt*"))


@pytest.mark.slow
@pytest.mark.parametrize("average", [False, True])
def test_two_processes_evaluate_what_they_write(tiny, tmp_path, average):
    """Batch norm that learns has other running statistics in each of them."""
    bottom_up = "model.backbone.bottom_up"
    more = [f"{bottom_up}.norm=BN", f"{bottom_up}.freeze_at=0", "model.roi_heads.num_classes=2"]
    more += ["optimizer.lr=0.01", "train.max_iter=24", "--num-processes", 2]
    more += [f"train.model_ema.enabled={average}", "train.eval_period=8"]
    assert start([*words(tiny, tmp_path), *more]).wait(timeout=600) == 0
    again = evaluate(load_config(str(tmp_path / "config.yaml")))["bbox"]
    assert again["AP50"] > 0
    for key in ("AP", "AP50", "AP-circle"):
        assert metrics(tmp_path)[f"bbox/{key}"] == pytest.approx(again[key], abs=1e-6)
    best = torch.load(tmp_path / "model_best.pth", weights_only=True)
    config = load_config(str(tmp_path / "config.yaml"))
    config.train.init_checkpoint = str(tmp_path / "model_best.pth")
    assert evaluate(config)["bbox"]["AP"] == pytest.approx(best["value"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["rt_detr_v2", "deformable_detr", "dino", "deimv2"])
def test_a_detr_trains_on_two_processes(tiny, tmp_path, architecture):
    """Each parameter has a gradient in each process, or the second step would fail.

    In half of the images there is no box, so that a process may have none.
    """
    data = json.loads((tiny / "train.json").read_text())
    kept = {image["id"] for image in data["images"][::2]}
    data["annotations"] = [x for x in data["annotations"] if x["image_id"] in kept]
    (tmp_path / "train.json").write_text(json.dumps(data))
    more = [f"model.architecture={architecture}", "--num-processes", 2]
    more += [f"dataset.train_json={tmp_path}/train.json"]
    more += ["dataloader.train.dataset.filter_empty=False"]
    folder = tmp_path / "run"
    assert start([*words(tiny, folder, "rt_detr"), *more]).wait(timeout=600) == 0
    assert {"loss_bbox", "bbox/AP50"} <= metrics(folder).keys()
    assert "iter 4/4" in (folder / "log.txt").read_text()


@pytest.mark.slow
def test_mask2former_trains_on_two_processes(tiny, tmp_path):
    more = ["model.config_kwargs.train_num_points=50", "--num-processes", 2]
    assert start([*words(tiny, tmp_path, "mask2former_instance"), *more]).wait(timeout=600) == 0
    assert {"loss_mask", "segm/AP50"} <= metrics(tmp_path).keys()
    assert "iter 4/4" in (tmp_path / "log.txt").read_text()


def distance(first, second):
    first, second = weights(first), weights(second)
    return max((first[key] - second[key]).abs().max().item() for key in first)


def test_a_config_of_detectron2_trains(tiny, run_train_net, tmp_path):
    """One whose settings lack those that only this program has."""
    file = tmp_path / "config.py"
    file.write_text(
        "from detectron2.config import LazyConfig\n"
        f"cfg = LazyConfig.load({str(FINETUNE / 'faster_rcnn.py')!r})\n"
        "dataset, dataloader, model = cfg.dataset, cfg.dataloader, cfg.model\n"
        "optimizer, lr_multiplier = cfg.optimizer, cfg.lr_multiplier\n"
        "dataloader.train.seed = 0\n"
        "train = dict(max_iter=1, amp=dict(enabled=True))\n"
    )
    arguments = words(tiny, tmp_path / "run")[2:]
    assert run_train_net("--config-file", file, *arguments, "train.max_iter=1") == 0
    assert "loss_cls" in metrics(tmp_path / "run")


def test_a_folder_that_holds_a_run_is_refused(tiny, run_train_net, tmp_path, capsys):
    arguments = [*words(tiny, tmp_path), "train.max_iter=1"]
    (tmp_path / "mine.png").touch()
    (tmp_path / "model_zoo.pth").touch()
    assert run_train_net(*arguments) == 0
    before = (tmp_path / "model_final.pth").read_bytes()
    assert run_train_net(*arguments, "train.seed=1") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search("train.output_dir=.* holds a run already .*--resume .*--overwrite", line)
    assert (tmp_path / "model_final.pth").read_bytes() == before
    assert run_train_net("--overwrite", *arguments, "train.seed=1") == 0
    assert (tmp_path / "model_final.pth").read_bytes() != before
    assert "iter 1/1" in (tmp_path / "log.txt").read_text()
    assert (tmp_path / "mine.png").exists() and (tmp_path / "model_zoo.pth").exists()


@pytest.mark.parametrize(
    ("words_", "sentence"),
    [
        (["train.seed=1"], "train.seed=1 must be 0, that of the interrupted run"),
        ([f"{MODEL}=resnet18"], "model_final.pth' is not of this model: [0-9]+ of the model's"),
        ([f"{MODEL}=resnet18", "--eval-only"], "model_final.pth' is not of this model"),
    ],
)
def test_another_run_cannot_be_continued(finished, tiny, run_train_net, capsys, words_, sentence):
    assert run_train_net("--resume", *words(tiny, finished), *words_) == 2
    assert re.search(sentence, capsys.readouterr().err.strip().splitlines()[-1])


def spoil_json(change):
    def apply(folder):
        data = json.loads((folder / "train.json").read_text())
        change(data["annotations"])
        (folder / "train.json").write_text(json.dumps(data))

    return apply


def without_masks(annotations):
    for annotation in annotations:
        del annotation["segmentation"]


def spoil_images(folder):
    for image in (folder / "images" / "train").iterdir():
        image.write_bytes(image.read_bytes()[:200])


def shrink_images(folder):
    for image in (folder / "images" / "train").iterdir():
        Image.new("RGB", (32, 48)).save(image)


def checkpoint(content):
    def apply(folder):
        content(folder / "weights.pth")

    return apply


def truncated(file):
    torch.save(timm.create_model("test_resnet").state_dict(), file)
    file.write_bytes(file.read_bytes()[:5000])


def other(file):
    torch.save(timm.create_model("test_vit").state_dict(), file)


INIT = "train.init_checkpoint={}/weights.pth"
PATH = "model.backbone.bottom_up.checkpoint_path={}/weights.pth"
MISSING = "weights.pth' does not exist"

# config, words ({} is the data's folder), what is done to the data, the sentence (a pattern)
WRONG = {
    "model": ("faster_rcnn", [f"{MODEL}=resnet5O"], None, "model_name='resnet5O' .*'resnet50'"),
    "norm": ("faster_rcnn", ["model.backbone.bottom_up.norm=frozen"], None, "norm='frozen' .*BN'"),
    "key": ("faster_rcnn", ["train.max_itr=1"], None, "'train.max_itr' .*'train.max_iter'"),
    "freeze_at": ("faster_rcnn", ["model.backbone.bottom_up.freeze_at=6"], None, "freeze_at=6"),
    "seed": ("faster_rcnn", ["train.seed=-1"], None, "train.seed=-1 must be"),
    "dtype": ("faster_rcnn", ["train.amp.dtype=half"], None, "train.amp.dtype='half' .*'bfloat16'"),
    "device": ("faster_rcnn", ["train.device=gpu"], None, "train.device='gpu' .*'cpu'"),
    "batch": (
        "faster_rcnn",
        ["dataloader.train.total_batch_size=0"],
        None,
        "total_batch_size=0 must be a whole number from 1",
    ),
    "json": ("faster_rcnn", ["dataset.train_json={}/trian.json"], None, "trian.json.*'train.json'"),
    "val json": ("faster_rcnn", ["dataset.val_json={}/vla.json"], None, "vla.json.*'val.json'"),
    "no json": (
        "faster_rcnn",
        ["dataset.train_json="],
        None,
        "dataset.train_json='' must be the path of a COCO JSON",
    ),
    "images": ("faster_rcnn", ["dataset.train_images={}/image"], None, "image' .*'images'"),
    "no boxes": (
        "retinanet",
        [],
        spoil_json(list.clear),
        r"train.json.: annotations=\[\] must have at least one",
    ),
    "category": (
        "faster_rcnn",
        [],
        spoil_json(lambda a: a[3].update(category_id=9)),
        "annotation 4: category_id=9 must be one of 1, 2",
    ),
    "box": (
        "faster_rcnn",
        [],
        spoil_json(lambda a: a[3].update(bbox=[64, 64, 9, 9])),
        r"annotation 4: bbox=\[64, 64, 9, 9\] must have an area",
    ),
    "no masks": (
        "mask_rcnn",
        [],
        spoil_json(without_masks),
        "annotation 1: segmentation=None must be a mask",
    ),
    "classes": (
        "semantic_fpn",
        ["dataset.num_classes=2"],
        None,
        "values=2 must be from 0 to 1",
    ),
    "no classes": (
        "semantic_fpn",
        ["dataset.num_classes=0"],
        None,
        "dataset.num_classes=0 must be a whole number from 1 to 255",
    ),
    "labels": ("semantic_fpn", ["dataset.train_labels={}/label"], None, "label' .*'labels'"),
    "image": ("faster_rcnn", [], spoil_images, r"image '.*\.jpg' cannot be read"),
    "image in a worker": (
        "faster_rcnn",
        ["dataloader.train.num_workers=1"],
        spoil_images,
        r"image '.*\.jpg' cannot be read",
    ),
    "size": ("faster_rcnn", [], shrink_images, "size=64x64 .* in the dataset must be 32x48"),
    "size in a worker": (
        "faster_rcnn",
        ["dataloader.train.num_workers=1"],
        shrink_images,
        "size=64x64 .* in the dataset must be 32x48",
    ),
    "init missing": ("faster_rcnn", [INIT], None, MISSING),
    "init empty": ("faster_rcnn", [INIT], checkpoint(lambda f: f.touch()), "is empty"),
    "init truncated": ("faster_rcnn", [INIT], checkpoint(truncated), "damaged"),
    "init other": ("faster_rcnn", [INIT], checkpoint(other), "init_checkpoint='.*weights.pth'"),
    "init pickle": (
        "faster_rcnn",
        ["train.init_checkpoint=a.pkl"],
        None,
        "train.allow_pickle=True",
    ),
    "path missing": ("faster_rcnn", [PATH], None, MISSING),
    "path empty": ("faster_rcnn", [PATH], checkpoint(lambda f: f.touch()), "is empty"),
    "path truncated": ("faster_rcnn", [PATH], checkpoint(truncated), "damaged"),
    "path other": ("faster_rcnn", [PATH], checkpoint(other), "is not of test_resnet"),
    "nothing": ("faster_rcnn", ["--eval-only"], None, "there is nothing to evaluate"),
    "backbone alone": (
        "faster_rcnn",
        ["--eval-only", INIT],
        checkpoint(lambda f: torch.save(timm.create_model("test_resnet").state_dict(), f)),
        "weights.pth' is not of this model: .* missing",
    ),
    "gpus": ("faster_rcnn", ["--num-gpus", "99"], None, "--num-gpus 99 is more than the [0-9]"),
}


@pytest.mark.parametrize(("config", "more", "spoil", "sentence"), WRONG.values(), ids=WRONG)
def test_wrong_input_ends_in_one_sentence(
    tiny, run_train_net, tmp_path, capsys, config, more, spoil, sentence
):
    data = tiny
    if spoil is not None:
        data = shutil.copytree(tiny, tmp_path / "data")
        spoil(data)
    arguments = [*words(data, tmp_path / "run", config), *(w.format(data) for w in more)]
    assert run_train_net(*arguments) == 2
    output = capsys.readouterr()
    lines = output.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("detbackbones train: ")
    assert re.search(sentence, lines[0]), lines[0]
    assert "Traceback" not in output.out
    assert not (tmp_path / "run" / "model_final.pth").exists()


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("finetune/faster_rcn.py", "--config-file .* does not exist: .*'faster_rcnn.py'"),
        ("no/such.py", "--config-file .* does not exist"),
        ("common/models/mask_rcnn.py", "mask_rcnn.py has no 'dataloader'"),
        pytest.param(
            "detrex/dino_timm_4scale_12ep.py",
            "the configs in detrex/ need detrex",
            marks=pytest.mark.skipif(find_spec("detrex") is not None, reason="detrex is there"),
        ),
    ],
)
def test_a_wrong_config_file(run_train_net, capsys, file, sentence):
    assert run_train_net("--config-file", config_folder() / file) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(sentence, line), line
