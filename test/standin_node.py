"""vla_node with a stand-in for its policy: `python standin_node.py --ros-args -p policy:=slow -p contract:=so101`."""

from __future__ import annotations

import sys
from typing import Any

from vla_infer.vla_node import main


def load(path: str, **options: Any) -> Any:
    from standin import load  # as late as the policy of the program itself

    return load(path, **options)


if __name__ == "__main__":
    sys.exit(main(policy_loader=load))
