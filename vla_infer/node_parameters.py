"""The parameters of vla_node: one table, declared with type, range and description, read as one object."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rcl_interfaces.msg import (
    FloatingPointRange,
    IntegerRange,
    ParameterDescriptor,
    ParameterType,
    SetParametersResult,
)
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException

from .contract_parse import nearest, one_line
from .errors import ContractError, VlaInferError


@dataclass(frozen=True)
class Parameter:
    """One row of the table. low and high are inclusive; `constraint` is shown by `ros2 param describe`."""

    name: str
    default: str | int | float | bool
    description: str
    constraint: str = ""
    low: float | None = None
    high: float | None = None


PARAMETERS = (
    Parameter("policy", "", "Directory of the policy as LeRobot saves it", "a directory with config.json"),
    Parameter("contract", "", "Contract of the robot: a YAML file or a shipped name", "see docs/contract.md"),
    Parameter("device", "cpu", "Where the policy runs", "cpu, cuda or cuda:N"),
    Parameter(
        "precision", "fp32", "Precision of the weights and products", "fp32, bf16, int8 (CPU) or fp8 (CUDA)"
    ),
    Parameter(
        "calibrate_first",
        0,
        "Observations to calibrate precision fp8 on where the policy has no fp8.json, in bf16 until then; 0: refuse",
        low=0,
        high=1024,
    ),
    Parameter(
        "num_steps", 0, "Denoising steps of one inference; 0: as the checkpoint says", low=0, high=1000
    ),
    Parameter("threads", 0, "CPU threads of the engine; 0: its own choice", low=0, high=1024),
    Parameter("control_rate", 0.0, "Rate of the commands in Hz; 0: the contract's", low=0.0, high=1000.0),
    Parameter("instruction", "", "Instruction; empty: the contract's default. Changeable at any time"),
    Parameter(
        "dry_run", default=True, description="Publish on <topic>_dry, so that nothing moves; false arms"
    ),
    Parameter(
        "preflight",
        default=False,
        description="Refuse activation while ~/preflight has a FAIL; drivers have to be up before",
    ),
    Parameter(
        "realtime_priority",
        0,
        "SCHED_FIFO priority of the control thread, before every other process; 0: none. Read at start only",
        "needs an rtprio limit of at least that",
        low=0,
        high=90,
    ),
    Parameter("autostart", default=True, description="Configure and activate at start, with no manager"),
)
_RCLPY_OWN = ("use_sim_time", "start_type_description_service")


@dataclass(frozen=True)
class Settings:
    """The values of PARAMETERS at configuration."""

    policy: str
    contract: str
    device: str
    precision: str
    calibrate_first: int
    num_steps: int
    threads: int
    control_rate: float
    instruction: str
    dry_run: bool
    preflight: bool
    realtime_priority: int
    autostart: bool


class NodeParameters:
    """Declares the table on a node, keeps what was wrong with it, refuses changes that come too late."""

    def __init__(self, node: Any) -> None:
        self._node = node
        self._problems: dict[str, str] = {}
        self.changeable = True  # only before configuration: nothing reads a value later
        # But for these, which take a new value at any time and raise VlaInferError for one that is wrong.
        self.live: dict[str, Callable[[Any], None]] = {}
        for row in PARAMETERS:
            self._declare(row)
        known = [row.name for row in PARAMETERS] + list(_RCLPY_OWN)
        # rclpy drops overrides of parameters that nobody declares without a word; it has no public list.
        for name in getattr(node, "_parameter_overrides", {}):
            if name not in known and not name.startswith("qos_overrides."):
                self._problems[name] = (
                    f"parameter '{name}': there is none of that name; {nearest(name, known)}"
                )
        node.add_on_set_parameters_callback(self._on_set)

    def _declare(self, row: Parameter) -> None:
        descriptor = _descriptor(row)
        try:
            self._node.declare_parameter(row.name, row.default, descriptor)
        except (InvalidParameterTypeException, InvalidParameterValueException):
            given = one_line(self._node._parameter_overrides[row.name].value)
            self._problems[row.name] = f"parameter '{row.name}': expected {_expected(row)}, got {given}"
            self._node.declare_parameter(row.name, row.default, descriptor, ignore_override=True)

    def settings(self) -> Settings:
        """The values now. Raises ContractError, on one line, for the first that is wrong."""
        for problem in self._problems.values():
            raise ContractError(problem)
        values = {row.name: self._node.get_parameter(row.name).value for row in PARAMETERS}
        for name in ("policy", "contract"):
            if not values[name].strip():
                constraint = next(row.constraint for row in PARAMETERS if row.name == name)
                raise ContractError(f"parameter '{name}' is empty; give {constraint}")
        if 0.0 < values["control_rate"] < 1.0:
            raise ContractError(
                f"parameter 'control_rate': expected 0 or 1 to 1000 Hz, got {values['control_rate']:g}"
            )
        return Settings(**values)

    def _on_set(self, parameters: list[Any]) -> SetParametersResult:
        names = {row.name for row in PARAMETERS}
        for parameter in parameters:
            if parameter.name in self.live:
                try:
                    self.live[parameter.name](parameter.value)
                except VlaInferError as error:
                    return SetParametersResult(successful=False, reason=str(error))
            elif parameter.name in names and not self.changeable:
                return SetParametersResult(
                    successful=False,
                    reason=f"'{parameter.name}' is read at configuration; clean the node up before setting it",
                )
        for parameter in parameters:
            self._problems.pop(parameter.name, None)
        return SetParametersResult(successful=True)


def _descriptor(row: Parameter) -> ParameterDescriptor:
    types = {
        str: ParameterType.PARAMETER_STRING,
        bool: ParameterType.PARAMETER_BOOL,
        int: ParameterType.PARAMETER_INTEGER,
        float: ParameterType.PARAMETER_DOUBLE,
    }
    descriptor = ParameterDescriptor(
        name=row.name,
        type=types[type(row.default)],
        description=row.description,
        additional_constraints=row.constraint,
    )
    if row.low is not None and row.high is not None:
        if isinstance(row.default, float):
            descriptor.floating_point_range = [FloatingPointRange(from_value=row.low, to_value=row.high)]
        else:
            descriptor.integer_range = [IntegerRange(from_value=int(row.low), to_value=int(row.high), step=1)]
    return descriptor


def _expected(row: Parameter) -> str:
    kind = {str: "a string", bool: "true or false", int: "an integer", float: "a number such as 50.0"}[
        type(row.default)
    ]
    return kind if row.low is None else f"{kind} in [{row.low:g}, {row.high:g}]"
