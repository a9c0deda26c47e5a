"""`vla-infer verify` passes a sound policy and says which stage of a damaged one is off first."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from golden import ROOT

from vla_infer.checkpoint import read_checkpoint
from vla_infer.cli import main
from vla_infer.errors import CheckpointError
from vla_infer.verify import verify


def test_golden_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(ROOT / "smolvla")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11
    assert all(line.startswith("PASS") for line in lines[1:])


def test_int8_within_its_bound(capsys: pytest.CaptureFixture[str]) -> None:
    """Inside the bound that leaves a cosine of 0.995, and far outside float32's: it was int8 that ran."""
    assert main(["verify", str(ROOT / "smolvla"), "--precision", "int8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    errors = {line[6:22].strip(): float(line[22:].split()[0]) for line in lines[1:]}
    assert errors["actions"] > 5e-3


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "smolvla", tmp_path / "policy")
    return tmp_path / "policy"


def test_damaged_weight_is_found(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scaling the action expert's last projection leaves the picture's stages as they are."""
    ckpt = read_checkpoint(copy)
    info = ckpt.info("model.action_out_proj.weight")
    file = copy / "model.safetensors"
    data = bytearray(file.read_bytes())
    for i in range(info.offset + 1, info.offset + info.nbytes, 2):
        data[i] ^= 0x80  # the sign of every bfloat16
    file.write_bytes(data)
    assert main(["verify", str(copy)]) == 1
    verdicts = {line[6:22].strip(): line[:4] for line in capsys.readouterr().out.splitlines()[1:]}
    assert verdicts["image tokens"] == "PASS"
    assert verdicts["first velocity"] == "FAIL"
    assert verdicts["robot actions"] == "FAIL"


def test_bfloat16_is_bounded_whatever_pytorch_does() -> None:
    """π0.5's golden noise is not what its actions came from: an error of order one must not pass."""
    path = ROOT / "pi05"
    lines = {line.stage: line for line in verify(
        read_checkpoint(path), path / "golden.safetensors", device="cpu", precision="bf16"
    )}  # fmt: skip
    assert lines["image tokens"].passed
    assert not lines["actions"].passed


def test_nothing_to_compare_with(copy: Path) -> None:
    (copy / "golden.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"golden\.safetensors"):
        verify(read_checkpoint(copy), copy / "golden.safetensors", device="cpu", precision="fp32")
