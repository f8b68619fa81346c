"""Train or evaluate a detector from a LazyConfig.

    python tools/train_net.py --config-file configs/finetune/faster_rcnn.py \
        dataset.train_json=train.json dataset.train_images=images \
        dataset.val_json=val.json dataset.val_images=images
"""

import argparse
import copy
import logging
import os
import re
import sys
import warnings
from pathlib import Path

import torch
from detbackbones.checkpoint import Checkpointer, load_init_checkpoint, read_state_dict
from detbackbones.config import get_config
from detbackbones.messages import nearest, one_of
from detbackbones.overrides import apply_overrides
from detbackbones.shapes import without_weights
from detbackbones.trainer import AMP_DTYPES, ProgressPrinter, Trainer, seed_step
from detbackbones.visualize import draw_curves, draw_predictions
from detectron2.config import LazyConfig, instantiate
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.engine import hooks, launch
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm
from detectron2.utils.events import JSONWriter, TensorboardXWriter
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate
from torch.multiprocessing import ProcessExitedException
from torch.nn.parallel import DistributedDataParallel

logger = logging.getLogger("detbackbones.train_net")

# detectron2's anchors and its check for tracing; both only warn
warnings.filterwarnings("ignore", message="torch.meshgrid: in an upcoming release")
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)

# wrong images, whose sentence is printed: detectron2 would log the traceback before it
DATA_ERRORS = (OSError, SizeMismatchError)
logging.getLogger("detectron2.engine.train_loop").addFilter(
    lambda record: not (record.exc_info and isinstance(record.exc_info[1], DATA_ERRORS))
)


def load_config(args: argparse.Namespace) -> DictConfig:
    """The config with its overrides, its settings checked and the device chosen."""
    if not os.path.isfile(args.config_file):
        folder = os.path.dirname(args.config_file) or "."
        names = os.listdir(folder) if os.path.isdir(folder) else []
        near = nearest(os.path.basename(args.config_file), names)
        raise FileNotFoundError(f"--config-file {args.config_file} does not exist: {near}")
    cfg = LazyConfig.load(args.config_file)
    for key in ("model", "dataloader", "optimizer", "lr_multiplier"):
        if key not in cfg:
            raise ValueError(f"--config-file {args.config_file} has no {key!r}")
    # a config made for detectron2's own program lacks some settings
    cfg.train = OmegaConf.merge(get_config("common/train.py").train, cfg.get("train", {}))
    settings = apply_overrides(cfg, args.opts).train
    if not isinstance(settings.seed, int) or settings.seed < 0:
        raise ValueError(f"train.seed={settings.seed!r} must be a whole number from 0")
    one_of("train.amp.dtype", settings.amp.dtype, AMP_DTYPES)
    gpu = torch.cuda.is_available()
    one_of("train.device", settings.device, ("auto", "cpu", "cuda") if gpu else ("auto", "cpu"))
    if settings.device == "auto":
        settings.device = "cuda" if gpu else "cpu"
    return cfg


def prepare_output(cfg: DictConfig, args: argparse.Namespace) -> None:
    """Make the output folder; refuse one that holds another run unless asked."""
    folder = Path(cfg.train.output_dir)
    if not args.eval_only and not args.resume:
        weights = ("last_checkpoint", "model_final.pth", "model_[0-9]*.pth")
        run = _existing(folder, "config.yaml", "metrics.json", *weights)
        if run and not args.overwrite:
            raise FileExistsError(
                f"train.output_dir={folder} holds a run already ({run[0].name}): choose another, "
                "continue it with --resume, or replace it with --overwrite"
            )
        if run:
            pictures = ("predictions.png", "curves.png")
            run += _existing(folder, "log.txt*", "events.out.tfevents.*", *pictures)
        for path in run:
            path.unlink()
    folder.mkdir(parents=True, exist_ok=True)


def _existing(folder: Path, *patterns: str) -> list[Path]:
    return [path for pattern in patterns for path in folder.glob(pattern)]


def evaluate(cfg: DictConfig, model: torch.nn.Module) -> dict:
    """Evaluate on the test set, with autocast if training has it."""
    amp = cfg.train.amp
    dtype = AMP_DTYPES[amp.dtype] if amp.enabled else None
    with torch.autocast(cfg.train.device, dtype, enabled=amp.enabled):
        return inference_on_dataset(
            model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
        )


def draw_results(cfg: DictConfig, model: torch.nn.Module) -> list[Path]:
    """Draw ground truth beside predictions, and the curves of the run so far."""
    folder = Path(cfg.train.output_dir)
    written = []
    dataset = instantiate(cfg.dataloader.test.dataset)
    count = min(cfg.train.pictures, len(dataset))
    images = [dataset[i * len(dataset) // count] for i in range(count)]
    if images:
        mapper = instantiate(cfg.dataloader.test.mapper)
        model.eval()
        with torch.no_grad():
            predictions = [model([mapper(image)])[0] for image in images]
        metadata = MetadataCatalog.get(instantiate(cfg.dataloader.test.dataset.names))
        written += [draw_predictions(images, predictions, metadata, folder / "predictions.png")]
    if (folder / "metrics.json").is_file():
        written += [draw_curves(folder / "metrics.json", folder / "curves.png")]
    return written


def report(cfg: DictConfig, results: dict, written: list[Path]) -> None:
    """Log the metrics as a table, and the files that there are now."""
    rows = [(task, *item) for task, metrics in results.items() for item in metrics.items()]
    table = tabulate(rows, ("task", "metric", "value"), tablefmt="github", floatfmt=".4f")
    logger.info("metrics\n%s", table)
    folder = Path(cfg.train.output_dir)
    names = ("model_final.pth", "metrics.json", "config.yaml", "log.txt")
    files = [*written, *(folder / name for name in names if (folder / name).exists())]
    logger.info("wrote %s", ", ".join(map(str, files)))


def build_model(cfg: DictConfig, *, loads_all: bool) -> torch.nn.Module:
    """The model on its device; no weights are fetched for a backbone whose detector ``loads_all``
    from a checkpoint."""
    model_cfg = copy.deepcopy(cfg.model)
    if loads_all and "backbone" in model_cfg:
        model_cfg.backbone = without_weights(model_cfg.backbone)
    return instantiate(model_cfg).to(cfg.train.device)


def build_trainer(cfg: DictConfig, *, resume: bool = False) -> Trainer:
    """The model, its optimizer and its data, as the config says."""
    settings = cfg.train
    seed_step(settings.seed, 0, 0)
    loader = instantiate(cfg.dataloader.train)
    instantiate(cfg.dataloader.test.dataset)  # a fault in these is to be found now
    instantiate(cfg.dataloader.evaluator)
    tagged = os.path.isfile(os.path.join(settings.output_dir, "last_checkpoint"))
    model = build_model(cfg, loads_all=resume and tagged)
    optimizer_cfg = copy.deepcopy(cfg.optimizer)
    optimizer_cfg.params.model = model
    optimizer = instantiate(optimizer_cfg)
    device_ids = [comm.get_local_rank()] if settings.device == "cuda" else None
    return Trainer(
        create_ddp_model(model, device_ids=device_ids, **settings.ddp),
        loader,
        optimizer,
        device=settings.device,
        seed=settings.seed,
        rank=comm.get_rank(),
        amp_dtype=settings.amp.dtype if settings.amp.enabled else None,
        clip_grad=dict(settings.clip_grad.params) if settings.clip_grad.enabled else None,
    )


def load_weights(cfg: DictConfig, checkpointer: Checkpointer, *, last: bool) -> bool:
    """Load the last checkpoint of the run (if ``last``), or else ``train.init_checkpoint``.

    Returns:
        whether it was the last checkpoint.
    """
    init = cfg.train.init_checkpoint
    if last and checkpointer.has_checkpoint():
        file = checkpointer.get_checkpoint_file()
        check_fit(checkpointer.model, file)
        checkpointer.load(file)
        return True
    if init:
        load_init_checkpoint(checkpointer.model, init, allow_pickle=cfg.train.allow_pickle)
    return False


def check_fit(model: torch.nn.Module, file: str) -> None:
    """Refuse a checkpoint that leaves weights of the model as they were drawn."""
    own, state = model.state_dict(), read_state_dict(file)
    wrong = [k for k, v in own.items() if k not in state or state[k].shape != v.shape]
    wrong = [k for k in wrong if not k.endswith("num_batches_tracked")]
    if wrong:
        raise ValueError(
            f"checkpoint {file!r} is not of this model: {len(wrong)} of the model's {len(own)} "
            f"tensors are missing in it or of another shape ({wrong[0]}, ...)"
        )


def train(cfg: DictConfig, trainer: Trainer, checkpointer: Checkpointer, start_iter: int) -> None:
    """Train to ``train.max_iter``, then evaluate and draw."""
    settings, model, main = cfg.train, checkpointer.model, comm.is_main_process()
    results = {}
    trainer.register_hooks(
        [hooks.IterationTimer(), hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier))]
    )
    if main:
        period, keep = settings.checkpointer.period, settings.checkpointer.max_to_keep
        trainer.register_hooks([hooks.PeriodicCheckpointer(checkpointer, period, max_to_keep=keep)])
    trainer.register_hooks(
        [
            hooks.EvalHook(
                settings.eval_period, lambda: results.update(evaluate(cfg, model)) or results
            )
        ]
    )
    if main:
        writers = [
            ProgressPrinter(settings.max_iter, cfg.dataloader.train.total_batch_size),
            JSONWriter(os.path.join(settings.output_dir, "metrics.json")),
            TensorboardXWriter(settings.output_dir),
        ]
        trainer.register_hooks([hooks.PeriodicWriter(writers, period=settings.log_period)])
    parameters = list(model.parameters())
    logger.info(
        "training %s on %s from iteration %d: %.1f M parameters, %.1f M of them trainable",
        type(model).__name__,
        settings.device,
        start_iter,
        sum(p.numel() for p in parameters) / 1e6,
        sum(p.numel() for p in parameters if p.requires_grad) / 1e6,
    )
    trainer.train(start_iter, settings.max_iter)
    if main:
        report(cfg, results, draw_results(cfg, model))


def run(cfg: DictConfig, args: argparse.Namespace) -> None:
    """What each process does; wrong input ends it with one sentence."""
    folder = cfg.train.output_dir
    for name in ("detbackbones", "detectron2", "fvcore"):
        setup_logger(folder, distributed_rank=comm.get_rank(), name=name, abbrev_name=name)
    if cfg.train.device == "cpu" and comm.get_world_size() > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // comm.get_local_size()))
    try:
        if args.eval_only:
            evaluate_only(cfg)
            return
        trainer = build_trainer(cfg, resume=args.resume)
        model = trainer.model
        model = model.module if isinstance(model, DistributedDataParallel) else model
        main = comm.is_main_process()
        checkpointer = Checkpointer(model, folder, save_to_disk=main, trainer=trainer)
        resumed = load_weights(cfg, checkpointer, last=args.resume)
        if main:
            LazyConfig.save(cfg, os.path.join(folder, "config.yaml"))
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    try:
        train(cfg, trainer, checkpointer, trainer.iter + 1 if resumed else 0)
    except DATA_ERRORS as error:
        fail(error)


def evaluate_only(cfg: DictConfig) -> None:
    """Evaluate ``train.init_checkpoint``, or the last checkpoint in the output folder."""
    model = build_model(cfg, loads_all=True)
    checkpointer = Checkpointer(model, cfg.train.output_dir, save_to_disk=False)
    init = cfg.train.init_checkpoint
    if init and not cfg.train.allow_pickle:
        check_fit(model, init)
    found = load_weights(cfg, checkpointer, last=not init)
    if not found and not init:
        raise FileNotFoundError(
            f"--eval-only has nothing to evaluate: train.output_dir={cfg.train.output_dir} holds "
            "no checkpoint, and train.init_checkpoint is empty"
        )
    results = evaluate(cfg, model)
    if comm.is_main_process():
        report(cfg, results, draw_results(cfg, model))


def fail(error: Exception) -> None:
    """End with the error's sentence, on one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].startswith("Caught "):  # and raised again, with a traceback, by a data loader
        lines = [re.sub(r"^[\w.]+: ", "", lines[-1])]
    print("train_net:", *lines, file=sys.stderr)
    sys.exit(2)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="a LazyConfig")
    parser.add_argument("--resume", action="store_true", help="continue the run in the output dir")
    parser.add_argument("--eval-only", action="store_true", help="evaluate, do not train")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the run in the output dir"
    )
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="GPUs per machine")
    parser.add_argument(
        "--num-processes", type=int, default=0, metavar="N", help="train on N CPU processes instead"
    )
    parser.add_argument("--num-machines", type=int, default=1, metavar="M")
    parser.add_argument("--machine-rank", type=int, default=0, metavar="R")
    parser.add_argument("--dist-url", default="auto", metavar="URL", help="tcp://host:port")
    parser.add_argument("opts", nargs="*", metavar="key=value", help="overrides of the config")
    return parser.parse_intermixed_args()


def processes_per_machine(args: argparse.Namespace) -> int:
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


def join_torchrun(gpu: bool) -> None:
    """Join the group of processes that torchrun has started."""
    torch.distributed.init_process_group("nccl" if gpu else "gloo")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def main() -> None:
    """Check what can be checked at once, then start the processes."""
    args = parse_arguments()
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    try:
        processes = processes_per_machine(args)
        cfg = load_config(args)
        if int(os.environ.get("RANK", 0)) == 0 and args.machine_rank == 0:
            prepare_output(cfg, args)
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    if by_torchrun:
        join_torchrun(cfg.train.device == "cuda")
        run(cfg, args)
        return
    try:
        launch(
            run, processes, args.num_machines, args.machine_rank, args.dist_url, args=(cfg, args)
        )
    except ProcessExitedException as error:  # that process has said why
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
