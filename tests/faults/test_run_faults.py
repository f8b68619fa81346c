"""Runs that are interrupted, killed, alone in their folder, out of disk: none loses what it had."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from detbackbones import get_config
from detbackbones.training import train
from detbackbones.training.lock import locked
from detbackbones.training.metrics import EVALUATED, cut_metrics, missed_evaluation
from detbackbones.training.overrides import apply_overrides
from support import TOOLS, load_tool

sys.path.insert(0, str(TOOLS))  # as for the program: it imports its neighbour
same = load_tool("kill_runs").same

BACKBONE = "model.backbone.bottom_up"


def words(tiny, output, *more):
    small = ["model.backbone.out_channels=16", "model.roi_heads.box_head.fc_dims=[16,16]"]
    small += [f"{BACKBONE}.model_name=test_resnet", f"{BACKBONE}.pretrained=False"]
    data = [
        f"dataset.{split}_{key}={tiny}/{path}"
        for split in ("train", "val")
        for key, path in (("json", f"{split}.json"), ("images", f"images/{split}"))
    ]
    sizes = ["dataset.train_sizes=[64]", "dataset.val_size=64", "dataloader.train.num_workers=0"]
    sizes += ["dataloader.test.num_workers=0", "dataloader.train.total_batch_size=2"]
    run = [f"train.output_dir={output}", "train.pictures=0", "train.log_period=1", *more]
    return ["--config-file", "finetune/faster_rcnn.py", *data, *small, *sizes, *run]


def start(*arguments, **kwargs):
    """The program as a process of its own, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "detbackbones", "train", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **kwargs,
    )


def wait_for(process, pattern):
    """Read what the process prints until a line matches; the lines so far."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return lines
    raise AssertionError("".join(lines))


def rest(process, seconds):
    """What the process still prints, and how long it takes to end."""
    begin = time.monotonic()
    output, _ = process.communicate(timeout=seconds)
    return output, time.monotonic() - begin


def weights(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)


def assert_equal_runs(one, other):
    """All that the checkpoint holds is the same to the bit, and so are the metrics."""
    assert same(weights(one), weights(other))
    logged, wanted = metrics(one), metrics(other)
    assert {i: line.keys() for i, line in logged.items()} == {
        i: line.keys() for i, line in wanted.items()
    }
    for i, line in wanted.items():  # losses are medians over what this process has seen
        evaluated = {key: value for key, value in line.items() if key.startswith("bbox/")}
        assert json.dumps({key: logged[i][key] for key in evaluated}) == json.dumps(evaluated)


def metrics(folder):
    """The lines of metrics.json, without times; those of one iteration together."""
    found = {}
    for text in (folder / "metrics.json").read_text().splitlines():
        line = json.loads(text)
        timing = ("time", "seconds")
        line = {k: v for k, v in line.items() if not any(word in k for word in timing)}
        found.setdefault(line["iteration"], {}).update(line)
    return found


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A run of 12 iterations that nothing disturbed, evaluated after 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    process = start(*words(tiny, folder, *PLAN))
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return folder


PLAN = ["train.max_iter=12", "train.eval_period=4", "train.checkpointer.period=3"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["iter 5/12", "Start inference"])
def test_a_signal_ends_a_run_with_a_checkpoint(tiny, tmp_path, whole, number, moment):
    folder = tmp_path / "run"
    process = start(*words(tiny, folder, *PLAN))
    wait_for(process, moment)
    process.send_signal(number)
    output, seconds = rest(process, 60)
    assert process.returncode == 128 + number, output
    assert seconds < 10
    (line,) = [x for x in output.splitlines() if x.startswith("detbackbones train: ")]
    wanted = rf"interrupted by {number.name} after iteration \d+, .*: continue with --resume"
    assert re.search(wanted, line)
    assert "Traceback" not in output
    assert not (folder / "run.lock").exists()
    process = start(*words(tiny, folder, *PLAN), "--resume")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert_equal_runs(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_run_at_once(tiny, tmp_path, number):
    process = start(*words(tiny, tmp_path / "run", "train.max_iter=100000"))
    wait_for(process, "iter 3/")
    os.kill(process.pid, signal.SIGSTOP)  # both come before an iteration can end
    process.send_signal(number)
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(1.1)
    process.send_signal(number)
    output, seconds = rest(process, 20)
    assert process.returncode != 0 and seconds < 10 and "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_of_two_processes(tiny, tmp_path, number):
    folder = tmp_path / "run"
    process = start(*words(tiny, folder, "train.max_iter=100000", "--num-processes", 2))
    wait_for(process, "iter 4/")
    process.send_signal(number)
    output, seconds = rest(process, 60)
    assert process.returncode == 128 + number, output
    assert seconds < 10 and "Traceback" not in output
    assert [line for line in output.splitlines() if "continue with --resume" in line]
    assert len([*folder.glob("model_*.pth")]) == 1
    assert_all_end(process.pid)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_evaluation_and_its_workers(tiny, tmp_path, whole, number, processes):
    data = json.loads((tiny / "val.json").read_text())
    data["images"] += [{**data["images"][i % 4], "id": 10_000 + i} for i in range(3000)]
    (tmp_path / "val.json").write_text(json.dumps(data))
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    process = start(
        *words(tiny, folder, f"dataset.val_json={tmp_path}/val.json", "--eval-only"),
        *("dataloader.test.num_workers=1", "--num-processes", processes),
    )
    wait_for(process, "Inference done")
    process.send_signal(number)
    output, seconds = rest(process, 60)
    assert process.returncode == 128 + number, output
    assert f"detbackbones train: interrupted by {number.name}\n" in output
    assert seconds < 10 and "Traceback" not in output
    assert_all_end(process.pid)


def members(session):
    """The processes of a session, which the program is the leader of."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.name))
    return found


def assert_all_end(session, seconds=10):
    end = time.monotonic() + seconds
    while members(session):
        assert time.monotonic() < end, members(session)
        time.sleep(0.1)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others(tiny, tmp_path):
    folder = tmp_path / "run"
    process = start(*words(tiny, folder, "train.max_iter=100000", "--num-processes", 2))
    wait_for(process, "iter 4/")
    ranks = [
        pid
        for pid in members(process.pid)
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    output, seconds = rest(process, 60)
    assert process.returncode == 2, output
    assert seconds < 10
    assert re.search(r"detbackbones train: process \d was ended by SIGKILL", output) or re.search(
        r"detbackbones train: process \d failed: ", output
    )
    assert_all_end(process.pid)


@pytest.mark.slow
def test_a_killed_run_that_was_evaluating_makes_up_for_it(tiny, tmp_path, whole):
    folder = tmp_path / "run"
    process = start(*words(tiny, folder, *PLAN[:2], "train.checkpointer.period=4"))
    for _ in range(2):  # at 4, and at 8
        wait_for(process, "Start inference")
    process.kill()
    process.communicate()
    assert (folder / "last_checkpoint").read_text() == "model_0000007.pth"
    assert "bbox/AP" not in metrics(folder)[7] and "total_loss" in metrics(folder)[7]
    process = start(*words(tiny, folder, *PLAN[:2], "train.checkpointer.period=4"), "--resume")
    output, _ = process.communicate()
    assert process.returncode == 0, output  # its lock was that of a process that is no more
    assert_equal_runs(folder, whole)


@pytest.mark.slow
def test_no_more_checkpoints_are_kept_over_resumes(tiny, run_train_net, tmp_path):
    folder, keep = tmp_path / "run", "train.checkpointer.max_to_keep=2"
    for most in (4, 8, 12):
        plan = [f"train.max_iter={most}", "train.checkpointer.period=1", "train.eval_period=0"]
        assert run_train_net(*words(tiny, folder, *plan, keep), "--resume") == 0
    names = sorted(path.name for path in folder.glob("model_[0-9f]*.pth"))
    assert names == ["model_0000010.pth", "model_0000011.pth", "model_final.pth"]


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_a_period(tiny, tmp_path, whole, run_train_net, one_thread):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for name in ("model_final.pth", "model_0000011.pth"):
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 3] ^= 8
        (folder / name).write_bytes(data)
    assert run_train_net(*words(tiny, folder, *PLAN), "--resume") == 0
    log = (folder / "log.txt").read_text()
    assert re.search(r"model_final.pth' is truncated or damaged: .*the one before is taken, ", log)
    assert_equal_runs(folder, whole)


def limit_files(size):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


@pytest.mark.slow
def test_a_full_disk_is_said_and_the_last_checkpoint_stays(tiny, tmp_path, run_train_net):
    folder = tmp_path / "run"
    plan = ["train.checkpointer.period=2", "train.eval_period=0"]
    assert run_train_net(*words(tiny, folder, "train.max_iter=2", *plan)) == 0
    before = (folder / "model_final.pth").read_bytes()
    process = start(
        *words(tiny, folder, "train.max_iter=9", *plan),
        "--resume",
        preexec_fn=lambda: limit_files(len(before) // 2),
    )
    output, _ = process.communicate()
    assert process.returncode == 2, output
    line = output.strip().splitlines()[-1]
    assert re.match(
        rf"detbackbones train: checkpoint '{folder}/model_0000003.pth' cannot be written: .*; the "
        rf"last one is {folder}/model_final.pth$",
        line,
    ), line
    assert "Traceback" not in output
    assert (folder / "model_final.pth").read_bytes() == before
    assert not [*folder.glob("*.tmp")]


@pytest.mark.slow
def test_a_folder_that_is_removed_is_said(tiny, tmp_path):
    folder = tmp_path / "run"
    plan = ["train.max_iter=100000", "train.checkpointer.period=20", "train.eval_period=0"]
    process = start(*words(tiny, folder, *plan))
    wait_for(process, "iter 5/")
    shutil.rmtree(folder)
    output, _ = process.communicate()
    assert process.returncode == 2, output
    line = output.strip().splitlines()[-1]
    assert re.match(rf"detbackbones train: .*'{folder}/.*'", line), line
    assert "Traceback" not in output


def test_a_folder_that_is_a_file_is_refused(tiny, run_train_net, tmp_path, capsys):
    (tmp_path / "run").write_text("")
    assert run_train_net(*words(tiny, tmp_path / "run")) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.match(r"detbackbones train: .*run'", line)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_in_one_sentence(tiny, tmp_path, run_train_net, capsys):
    more = ["optimizer.lr=1e30", "train.clip_grad.enabled=False", "lr_multiplier.warmup_factor=1"]
    assert run_train_net(*words(tiny, tmp_path / "run", *more)) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    wanted = r"detbackbones train: iteration \d+: .*(not finite|diverged).*: a lower optimizer.lr"
    assert re.match(wanted, line)
    assert "Traceback" not in captured.out


def test_one_run_in_one_folder(tiny, tmp_path, run_train_net, capsys):
    folder = tmp_path / "run"
    with locked(folder):
        assert run_train_net(*words(tiny, folder)) == 2
        assert f"is that of a run in progress, process {os.getpid()}" in capsys.readouterr().err
        assert [p.name for p in folder.iterdir()] == ["run.lock"]
        lock = json.loads((folder / "run.lock").read_text())
    assert [*folder.iterdir()] == []
    for stale in (
        {**lock, "started": lock["started"] + 1},  # another process of that number
        {**lock, "pid": 2**22 + 1},
        {"pid": 1},
        [],
        "x",
    ):
        (folder / "run.lock").write_text(json.dumps(stale))
        with locked(folder):
            assert json.loads((folder / "run.lock").read_text()) == lock
    (folder / "run.lock").write_text(json.dumps({**lock, "host": "elsewhere"}))
    with pytest.raises(FileExistsError, match="run on elsewhere, process .* remove run.lock"):
        with locked(folder):
            pass


def test_two_that_start_at_once_do_not_share_a_folder(tmp_path):
    got, gate = [], threading.Barrier(2)

    def run():
        gate.wait()
        try:
            with locked(tmp_path / "run"):
                got.append("locked")
                time.sleep(0.5)
        except FileExistsError:
            got.append("refused")

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == ["locked", "refused"]


LINES = [{"iteration": 3, "loss": 1.0}, {"iteration": 3, EVALUATED: 5.0}, {"iteration": 7, "lr": 1}]


def test_metrics_of_an_interrupted_run_are_cut(tmp_path):
    file = tmp_path / "metrics.json"
    cut_metrics(file, 5)
    assert not file.exists()
    file.write_text("\n".join(map(json.dumps, LINES)) + '\n{"iteration": 9, "lo')
    assert not missed_evaluation(file, 4, 4, 12)
    assert missed_evaluation(file, 8, 4, 12)
    assert not missed_evaluation(file, 7, 4, 12)  # nothing was to be evaluated
    assert not missed_evaluation(file, 12, 4, 12)  # the last comes anyway
    assert not missed_evaluation(file, 8, 0, 12)
    assert not missed_evaluation(file, 0, 4, 12)
    assert missed_evaluation(tmp_path / "none", 4, 4, 12)
    cut_metrics(file, 5)
    assert [json.loads(line) for line in file.read_text().splitlines()] == LINES[:2]


def test_a_training_outside_of_the_main_thread(tiny, tmp_path):
    """Where Python takes no signals, as in some notebooks."""
    cfg = get_config("finetune/faster_rcnn.py")
    result = []
    arguments = words(tiny, tmp_path / "run", "train.max_iter=1")
    apply_overrides(cfg, arguments[2:])
    thread = threading.Thread(target=lambda: result.append(train(cfg)))
    thread.start()
    thread.join()
    assert "bbox" in result[0]
