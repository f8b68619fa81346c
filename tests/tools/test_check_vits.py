"""A ViT keeps the contract with windows and with the adapter, and what breaks it is seen."""

import sys

import pytest
import torch
from detbackbones import SpatialTuningAdapter, TimmBackbone
from support import load_tool

tool = load_tool("check_vits")


def test_a_vit_passes_and_others_are_no_vits(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "check_vits", tool)  # its processes find their work in it
    assert tool.is_plain("test_vit") and not tool.is_plain("test_resnet")
    with pytest.raises(SystemExit) as stop:
        tool.main(["--pattern", "test_vit*", "--jobs", "1"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "adapter  ok" in out and "windows  ok" in out
    assert " plain ViTs, 0 failures" in out


def test_what_is_refused_has_its_reason():
    assert tool.windows("beit_base_patch16_224", 1) == tool.windows("beit_large_patch16_224", 1)
    assert tool.windows("beit_base_patch16_224", 1).startswith("refused: needs a plain")


class Halved(TimmBackbone):
    def forward(self, x):
        return {name: level / 2 for name, level in super().forward(x).items()}


def test_windows_that_change_the_maps_are_seen(monkeypatch):
    monkeypatch.setattr(tool, "TimmBackbone", Halved)
    assert "differs from the source model's maps" in tool.windows("test_vit", 10)


class Finer(SpatialTuningAdapter):
    def forward(self, x):
        return {name: level[..., :1] for name, level in super().forward(x).items()}


class Detached(SpatialTuningAdapter):
    def __init__(self, *args):
        super().__init__(*args)
        self.idle = torch.nn.Linear(1, 1)


@pytest.mark.parametrize(
    ("kind", "said"), [(Finer, "res3 has shape"), (Detached, "no gradient: idle.weight")]
)
def test_adapters_that_are_wrong_are_seen(monkeypatch, kind, said):
    monkeypatch.setattr(tool, "SpatialTuningAdapter", kind)
    try:
        found = tool.adapter("test_vit", 10)
    except AssertionError as error:  # a row of its own in the table of the program
        found = str(error)
    assert said in found
