"""The benchmark of ViTs: what it counts as memory, and its table."""

import sys

import pytest
import torch
from support import load_tool

tool = load_tool("benchmark/vits")


def test_the_most_that_is_allocated_at_a_time_is_counted():
    def step():
        first = torch.zeros(5 * tool.MIB)  # 20 MiB
        second = first + 1
        del first
        return second.clone()

    assert tool._most_allocated(step) == pytest.approx(40, abs=0.1)


def test_the_table(monkeypatch, capsys):
    words = ["--model", "test_vit", "--sizes", "64x96", "--rounds", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["vits.py", *words])
    tool.main()
    lines = capsys.readouterr().out.splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    learns = {row[3]: float(row[4]) for row in rows}
    assert len(rows) == len(tool.CASES)
    assert learns["all"] > learns["LoRA of attention"] > learns["the pyramid alone"] == 0
