"""What several test modules share: the programs of tools/ as modules, and a tiny data set."""

import importlib.util
import logging
import sys
from functools import partial
from pathlib import Path

import pytest
from detectron2.utils.logger import _cached_log_stream, setup_logger

TOOLS = Path(__file__).parents[1] / "tools"


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Eight images to train on and four to validate on, of 64 pixels, with circles and squares."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    load_tool("draw_shapes").draw(folder, ("circle", "square"), train=8, val=4, size=64)
    return folder


@pytest.fixture(scope="session")
def train_net():
    return load_tool("train_net")


def run_main(program, *words):
    """Call a training program's main in this process; the exit code is returned."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program.__name__, *map(str, words)])
        try:
            program.main()
        except SystemExit as end:
            return end.code
        finally:  # or the next call would log here too
            for name in ("detbackbones", "detectron2", "fvcore"):
                logging.getLogger(name).handlers.clear()
                logging.getLogger(name).propagate = True
            setup_logger.cache_clear()
            _cached_log_stream.cache_clear()
    return 0


@pytest.fixture
def run_train_net(train_net):
    """Call the program's main in this process; the exit code is returned."""
    return partial(run_main, train_net)
