"""The built package: engine library, module, and what a plain import may need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import vla_infer
from vla_infer import _engine


def test_engine_is_of_this_version() -> None:
    assert _engine.version() == vla_infer.__version__


def test_library_without_python_lies_beside_the_module() -> None:
    library = Path(_engine.__file__).with_name("libvla_engine.so")
    symbols = library.read_bytes()
    assert b"PyErr_SetString" not in symbols


def test_import_needs_neither_ros_nor_torch() -> None:
    code = "import sys, vla_infer, vla_infer.cli; print(sorted({'rclpy', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
