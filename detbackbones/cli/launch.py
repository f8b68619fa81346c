"""What `train` and `eval` share: the config that is asked for, and the processes."""

import argparse
import os
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
import torch.multiprocessing as mp
from detectron2.utils import comm
from omegaconf import DictConfig
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from ..config import find_config, load_config
from ..messages import whole_number
from ..training.interrupt import forwarding
from ..training.run import check_config
from .program import fail

GRACE = 3  # seconds that the other processes have when one has ended, twice
WRONG_INPUT = (ValueError, OSError, ImportError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of both commands."""
    add = parser.add_argument
    add("--config-file", metavar="FILE", help="a LazyConfig: its path or name")
    add("--trust", action="store_true", help="let a YAML config call code of other packages")
    add("--num-gpus", type=int, default=1, metavar="N", help="GPUs per machine")
    add("--num-processes", type=int, default=0, metavar="N", help="use N CPU processes instead")
    add("--num-machines", type=int, default=1, metavar="M")
    add("--machine-rank", type=int, default=0, metavar="R")
    add("--dist-url", default="auto", metavar="URL", help="tcp://host:port")
    add("opts", nargs="*", metavar="key=value", help="overrides of the config")


def load_asked(args: argparse.Namespace) -> DictConfig:
    """The config that --config-file names."""
    if not args.config_file:
        raise ValueError("--config-file must be a LazyConfig: its path or name")
    try:
        file = find_config(args.config_file)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--config-file {error}") from None
    return load_config(file, trust=args.trust)


def read_config(args: argparse.Namespace, *, trains: bool) -> DictConfig:
    """The config with its overrides, checked; of the training data only if it trains."""
    cfg = load_asked(args)
    name = f"--config-file {args.config_file}"
    return check_config(cfg, args.opts, name, trains=trains)


def start(
    command: str,
    args: argparse.Namespace,
    work: Callable[..., None],
    during: Callable[[DictConfig], AbstractContextManager] = nullcontext,
    trains: bool = True,
    **arguments: Any,
) -> None:
    """Check what can be checked at once, then do the work in as many processes as are asked for.

    Args:
        command: whose name stands before an error.
        args: with those of :func:`add_arguments`.
        work: what each process does with the command, the config and ``arguments``.
        during: a context of the first process alone, around the work of all.
        trains: whether the training data must be there.
    """
    main = int(os.environ.get("RANK", 0)) == 0 and args.machine_rank == 0
    with ExitStack() as stack:
        try:
            processes = _processes_per_machine(args)
            cfg = read_config(args, trains=trains)
            if main:
                stack.enter_context(during(cfg))
        except WRONG_INPUT as error:
            fail(command, error)
        gpu = cfg.train.device == "cuda"
        if "TORCHELASTIC_RUN_ID" in os.environ:
            _join(gpu, int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
            _share_cores(work, command, cfg, arguments)
        elif processes * args.num_machines > 1:
            _launch(command, args, processes, (gpu, work, command, cfg, arguments))
        else:
            work(command, cfg, **arguments)


def _launch(command: str, args: argparse.Namespace, processes: int, job: tuple) -> None:
    """Do a job in processes of this machine; when one ends early, the others end soon after."""
    url = args.dist_url
    if url == "auto":
        if args.num_machines > 1:
            fail(command, "--dist-url must be tcp://host:port for several machines")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    place = (url, processes, processes * args.num_machines, processes * args.machine_rank)
    context = mp.start_processes(
        _rank, args=(*place, job), nprocs=processes, join=False, start_method="spawn"
    )
    try:
        with forwarding(context.pids) as come:
            while not context.join(grace_period=GRACE):
                pass
        if come:  # a process that a signal ends between two works says nothing of it
            raise SystemExit(128 + come[0])
    except ProcessExitedException as error:
        if error.signal_name is None:  # that process has said why
            raise SystemExit(error.exit_code) from None
        fail(command, f"process {error.error_index} was ended by {error.signal_name}")
    except ProcessRaisedException as error:
        fail(command, f"process {error.error_index} failed: {str(error).strip().splitlines()[-1]}")


def _rank(local: int, url: str, processes: int, world: int, first: int, job: tuple) -> None:
    gpu, *rest = job
    torch.distributed.init_process_group(
        "nccl" if gpu else "gloo", init_method=url, world_size=world, rank=first + local
    )
    _join(gpu, local, processes)
    _share_cores(*rest)


def _processes_per_machine(args: argparse.Namespace) -> int:
    """How many processes to launch here; refuses more GPUs than there are."""
    whole_number("--num-gpus", args.num_gpus)
    if args.num_processes:
        whole_number("--num-processes", args.num_processes)
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return args.num_processes
    found = torch.cuda.device_count()
    if args.num_gpus > max(found, 1):
        raise ValueError(
            f"--num-gpus {args.num_gpus} is more than the {found} that this machine has"
            + ("" if found else ": for CPU processes give --num-processes")
        )
    return args.num_gpus


def _join(gpu: bool, local: int, processes: int) -> None:
    """Join the group of all processes, as number ``local`` of those of this machine."""
    if not torch.distributed.is_initialized():  # torchrun has said all in the environment
        torch.distributed.init_process_group("nccl" if gpu else "gloo")
    comm.create_local_process_group(processes)
    if gpu:
        torch.cuda.set_device(local)


def _cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _share_cores(
    work: Callable[..., None], command: str, cfg: DictConfig, arguments: dict[str, Any]
) -> None:
    """Do the work with a fair part of the machine's cores, and leave the group of processes."""
    if cfg.train.device == "cpu" and comm.get_world_size() > 1:
        torch.set_num_threads(max(1, _cores() // comm.get_local_size()))
    work(command, cfg, **arguments)
    comm.synchronize()  # gloo aborts a process that ends while others are at work
    torch.distributed.destroy_process_group()
