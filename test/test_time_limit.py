"""A test that hangs ends the run with its stack, and nothing that it started holds the run's output open."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
HANGS = """
import subprocess, time

def test_hangs():
    child = subprocess.Popen(["sh", "-c", "echo $$; sleep 1000 & wait"])
    time.sleep(10**6)
"""


def test_a_test_that_hangs_ends_with_its_stack_and_its_children(tmp_path: Path) -> None:
    planted = tmp_path / "test_planted.py"
    planted.write_text(HANGS)
    settings = ["-c", str(HERE.parent / "pyproject.toml"), "-p", "conftest", "-p", "no:cacheprovider"]
    paths = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    # colcon's options for pytest come by the environment: the file for results is the outer run's.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"PYTHONPATH": paths}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *settings, "-s", "-o", "timeout=5", str(planted)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,  # without end while a child has it: `-s` gives it to the children
        text=True,
        timeout=60,
    )
    assert run.returncode == 1
    assert "Stack of MainThread" in run.stdout
    assert "time.sleep(10**6)" in run.stdout
