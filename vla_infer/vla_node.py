"""The program `vla_node`: `python -m vla_infer.vla_node --ros-args -p policy:=DIRECTORY -p contract:=so101`.

Importing ROS takes half a second and more, so SIGINT and SIGTERM are in hand before that begins.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from .stop_signals import exit_on_signals


def main(args: Sequence[str] | None = None, *, policy_loader: Callable[..., Any] | None = None) -> int:
    """As `vla_infer.node.main`; a signal while that is being imported ends the process with status 0."""
    exit_on_signals()
    from .node import load_policy
    from .node import main as run_node

    return run_node(args, policy_loader=policy_loader or load_policy)


if __name__ == "__main__":
    sys.exit(main())
