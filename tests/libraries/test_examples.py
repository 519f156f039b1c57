"""The example scripts run, shortened."""

import runpy
import sys
from pathlib import Path

import pytest

from timm_models import import_timm

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_the_decoder_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("transformers", reason="needs esper-lite[hf]")
    run("huggingface_decoder.py", monkeypatch, "--steps", "100")
    output = capsys.readouterr().out
    assert "transformer.h.0:BLENDING" in output
    assert "same output: True" in output


def test_the_vit_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    import_timm()
    run("timm_vit.py", monkeypatch, "--epochs", "3")
    output = capsys.readouterr().out
    assert "blocks.1:BLENDING" in output
    assert "plain module: True" in output
