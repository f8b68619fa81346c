"""What `train` and `eval` share: the config that is asked for, and the processes."""

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
from detectron2.engine import launch
from detectron2.utils import comm
from omegaconf import DictConfig
from torch.multiprocessing import ProcessExitedException

from ..config import find_config, load_config
from ..training.run import check_config
from .program import fail

WRONG_INPUT = (ValueError, OSError, ImportError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of both commands."""
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="a LazyConfig: its path or name")
    add("--trust", action="store_true", help="let a YAML config call code of other packages")
    add("--num-gpus", type=int, default=1, metavar="N", help="GPUs per machine")
    add("--num-processes", type=int, default=0, metavar="N", help="use N CPU processes instead")
    add("--num-machines", type=int, default=1, metavar="M")
    add("--machine-rank", type=int, default=0, metavar="R")
    add("--dist-url", default="auto", metavar="URL", help="tcp://host:port")
    add("opts", nargs="*", metavar="key=value", help="overrides of the config")


def read_config(args: argparse.Namespace) -> DictConfig:
    """The config with its overrides, checked."""
    try:
        file = find_config(args.config_file)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--config-file {error}") from None
    cfg = load_config(file, trust=args.trust)
    return check_config(cfg, args.opts, name=f"--config-file {args.config_file}")


def start(
    command: str,
    args: argparse.Namespace,
    work: Callable[..., None],
    before: Callable[[DictConfig], None] = lambda cfg: None,
    **arguments: Any,
) -> None:
    """Check what can be checked at once, then do the work in as many processes as are asked for.

    Args:
        command: whose name stands before an error.
        args: with those of :func:`add_arguments`.
        work: what each process does with the command, the config and ``arguments``.
        before: what only the first process does, before the others are started.
    """
    try:
        processes = _processes_per_machine(args)
        cfg = read_config(args)
        if int(os.environ.get("RANK", 0)) == 0 and args.machine_rank == 0:
            before(cfg)
    except WRONG_INPUT as error:
        fail(command, error)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _join_torchrun(cfg.train.device == "cuda")
        _share_cores(work, command, cfg, arguments)
        return
    try:
        launch(
            _share_cores,
            processes,
            args.num_machines,
            args.machine_rank,
            args.dist_url,
            args=(work, command, cfg, arguments),
        )
    except ProcessExitedException as error:  # that process has said why
        raise SystemExit(error.exit_code) from None


def _processes_per_machine(args: argparse.Namespace) -> int:
    """How many processes to launch here; refuses more GPUs than there are."""
    if args.num_processes:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return args.num_processes
    found = torch.cuda.device_count()
    if args.num_gpus > max(found, 1):
        raise ValueError(
            f"--num-gpus {args.num_gpus} is more than the {found} that this machine has"
            + ("" if found else ": for CPU processes give --num-processes")
        )
    return args.num_gpus


def _join_torchrun(gpu: bool) -> None:
    """Join the group of processes that torchrun has started."""
    torch.distributed.init_process_group("nccl" if gpu else "gloo")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def _share_cores(
    work: Callable[..., None], command: str, cfg: DictConfig, arguments: dict[str, Any]
) -> None:
    """Do the work with a fair part of the machine's cores."""
    if cfg.train.device == "cpu" and comm.get_world_size() > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // comm.get_local_size()))
    work(command, cfg, **arguments)
