"""Shows a running vla_node on a page of this machine's browser.

    ros2 run vla_infer page --ros-args -p contract:=so101
    python -m vla_infer.page --no-page --ros-args -p contract:=so101

It is a process of its own at low priority: whatever happens to it, the node goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..contract import Contract, load_contract
from ..errors import ContractError, VlaInferError
from ..heap import keep_heap
from .feed import Feed

NICE = 10


@dataclass(frozen=True)
class Parameters:
    """The node's parameters, docs/demo.md."""

    contract: str
    port: int
    node: str
    image_rate: float
    image_width: int


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 after SIGINT or SIGTERM, 1 when ROS failed, 2 when it could not start."""
    given = list(sys.argv if argv is None else ["page", *argv])
    parser = argparse.ArgumentParser(prog="page", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--no-page", action="store_true", help="a view in this terminal instead")
    try:
        from rclpy.utilities import remove_ros_args

        args = parser.parse_args(remove_ros_args(given)[1:])
        os.nice(NICE)
        keep_heap()
        return asyncio.run(_run(given, terminal=args.no_page))
    except (VlaInferError, ValueError) as error:
        print(f"page: {error}", file=sys.stderr)
    except ImportError as error:
        print(
            f"page: {error.name} is missing; source ROS 2, and pip install aiohttp opencv-python-headless",
            file=sys.stderr,
        )
    except OSError as error:
        print(f"page: {error.strerror}; choose another port, or 0 for any that is free", file=sys.stderr)
    return 2


async def _run(arguments: list[str], *, terminal: bool) -> int:
    import rclpy

    from .ros import JOINT_RATE, Look, RosSide, start_ros

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    context, node = start_ros(arguments)
    side: RosSide | None = None
    try:
        parameters = read_parameters(node)
        contract = load_contract(parameters.contract)
        feed = Feed(len(contract.cameras), JOINT_RATE)
        look = Look(parameters.image_rate, parameters.image_width)
        side = RosSide(context, node, contract=contract, target=parameters.node, look=look, feed=feed)
        side.ended = partial(asyncio.get_running_loop().call_soon_threadsafe, stop.set)
        if terminal:
            await _show_in_terminal(side, contract, feed, stop)
        else:
            await _serve(side, contract, parameters, feed, stop)
        if side.failed:
            print(f"page: {side.failed}", file=sys.stderr)
        return 1 if side.failed else 0
    finally:
        if side is not None:
            side.close()
        node.destroy_node()
        rclpy.shutdown(context=context)


async def _show_in_terminal(side: Any, contract: Contract, feed: Feed, stop: asyncio.Event) -> None:
    from .terminal import show

    side.start()
    await show(feed, [channel.name for channel in side.channels.all], contract.robot, stop)


async def _serve(
    side: Any, contract: Contract, parameters: Parameters, feed: Feed, stop: asyncio.Event
) -> None:
    from .server import ADDRESS, Server, hello

    server = Server(feed, side, hello(contract, side.channels.all, parameters.node))
    try:
        port = await server.start(parameters.port)
        side.start()
        print(f"page: http://{ADDRESS}:{port}/", flush=True)
        await stop.wait()
    finally:
        await server.close()


def read_parameters(node: Any) -> Parameters:
    """Declared and read. Raises ContractError for one that is wrong."""
    from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
    from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException

    ports, widths = (0, 65535), (64, 4096)
    rates = (1.0, 30.0)
    table: tuple[tuple[str, Any, str, dict[str, Any]], ...] = (
        ("contract", "", "Contract of the robot: a YAML file or a shipped name", {}),
        (
            "port",
            8600,
            "Port on 127.0.0.1; 0: any that is free",
            {"integer_range": [_range(IntegerRange, ports)]},
        ),
        ("node", "vla_node", "Name of the node that is shown and steered", {}),
        (
            "image_rate",
            12.0,
            "Pictures of each camera a second",
            {"floating_point_range": [_range(FloatingPointRange, rates)]},
        ),
        (
            "image_width",
            640,
            "Width of a picture in pixels, at most about",
            {"integer_range": [_range(IntegerRange, widths)]},
        ),
    )
    values = {}
    for name, default, text, limits in table:
        try:
            node.declare_parameter(name, default, ParameterDescriptor(description=text, **limits))
        except (InvalidParameterTypeException, InvalidParameterValueException) as error:
            raise ContractError(f"parameter '{name}': {text[0].lower()}{text[1:]}; {error}") from error
        values[name] = node.get_parameter(name).value
    if not values["contract"].strip():
        raise ContractError(
            "parameter 'contract' is empty; give a YAML file or a shipped name, such as so101"
        )
    return Parameters(**values)


def _range(kind: Any, limits: tuple[Any, Any]) -> Any:
    return kind(from_value=limits[0], to_value=limits[1])


if __name__ == "__main__":
    sys.exit(main())
