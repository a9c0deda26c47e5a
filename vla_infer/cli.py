"""The command line, `vla-infer`. Each verb is a module with `add_arguments(parser)` and `main(args)`."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

import vla_infer
from vla_infer.errors import VlaInferError

VERBS = {
    "run": "start the node for a policy and a contract",
    "doctor": "check this machine, a policy, a contract and its topics; says what to do",
    "verify": "compare the engine with a policy's golden values, stage by stage",
    "calibrate": "find the scales of precision fp8, and measure what it costs",
    "bench": "time inference on this machine",
    "replay": "run a recording through a policy: how late, how right, and whether it got worse",
    "evaluate": "how often a policy does what it is told, on the simulated arm",
    "import-lerobot": "make a recording of a LeRobot dataset, to replay it",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit status: 0, 1 for a failure, 2 for wrong usage."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"vla-infer {vla_infer.__version__}")
        return 0
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(VERBS)}"
        print(f"vla-infer: there is no verb '{verb}'; {hint}", file=sys.stderr)
        return 2
    try:
        # Loaded when asked for: help and doctor work where ROS, torch or the engine are missing.
        module = import_module(f"vla_infer.{verb.replace('-', '_')}")
        parser = argparse.ArgumentParser(prog=f"vla-infer {verb}", description=VERBS[verb])
        module.add_arguments(parser)
        return int(module.main(parser.parse_args(rest)))
    except ModuleNotFoundError as error:
        print(f"vla-infer {verb}: {_missing(error.name or str(error))}", file=sys.stderr)
    except VlaInferError as error:
        print(f"vla-infer {verb}: {error}", file=sys.stderr)
    except BrokenPipeError:
        sys.stderr.close()  # the reader, such as `head`, has enough
    except KeyboardInterrupt:
        return 130
    return 1


def _usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items())
    return f"usage: vla-infer VERB [options]\n\n{verbs}\n\n`vla-infer VERB --help` lists its options."


def _missing(module: str) -> str:
    if module in ("rclpy", "rcl_interfaces") or module.endswith("_msgs"):
        mend = "source ROS 2 (/opt/ros/<distribution>/setup.bash) or pip install -r requirements/ros.txt"
    elif module == "vla_infer._engine":
        mend = "build the engine: `pip install .` or `colcon build`"
    elif module.startswith("vla_infer."):
        mend = "this installation is not whole: install the package again"
    else:
        mend = f"pip install {module.partition('.')[0]}"
    return f"needs the Python module '{module}', which is not installed; {mend}"


if __name__ == "__main__":
    sys.exit(main())
