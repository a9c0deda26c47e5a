"""Where the tests run: against the installed package, and apart from any robot.

colcon puts the installed package on PYTHONPATH and then starts pytest in the source tree, which would be
imported first.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

_SOURCE = Path(__file__).resolve().parents[1]
_installed = [
    path
    for path in os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if (Path(path) / "vla_infer" / "__init__.py").exists()
    and not (Path(path) / "vla_infer").samefile(_SOURCE / "vla_infer")
]
if _installed:
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != _SOURCE]

os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
_domains = itertools.count(os.getpid())


@pytest.fixture(autouse=True)
def ros_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ROS domain for each test: nodes of the last one, or of another checkout's run, are not heard."""
    monkeypatch.setenv("ROS_DOMAIN_ID", str(1 + next(_domains) % 100))


def pytest_configure(config: pytest.Config) -> None:
    """A run that dies, as by the time-out of a test, must not leave nodes behind: an armed one least of all."""
    guard = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("orphans.py")), str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def end() -> None:
        guard.kill()
        guard.wait()

    config.add_cleanup(end)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fault-trials",
        type=int,
        default=4,
        help="how often test/faults tries what takes seconds (default: 4)",
    )
