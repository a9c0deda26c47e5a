"""What a contract says about scheduling and safety: frozen options, their ranges and their defaults."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from .contract_parse import Section

MODES = ("latest", "blend", "ensemble", "rtc")
TRIGGERS = ("continuous", "rate", "horizon")


class Response(str, Enum):
    """What the guard does about one kind of violation."""

    CLAMP = "clamp"  # bring it within the limit and count it
    REJECT = "reject"  # refuse the chunk; a single command is not sent, the last one is repeated
    TRIP = "trip"  # hold, deactivate, wait for an operator


@dataclass(frozen=True)
class SchedulerOptions:
    """How chunks become commands. Steps are rows of a chunk; see docs/contract.md."""

    mode: str = "latest"
    linear: bool = True  # interpolate between rows at control rate; False: each row while it is due
    blend_steps: float = 5.0  # rows over which `blend` goes from the old chunk to the new one
    ensemble_decay: float = 0.01  # m of exp(-m i), i = 0 for the oldest chunk (ACT, arXiv 2304.13705)
    ensemble_size: int = 8  # chunks that are averaged at most
    rtc_horizon: int = 0  # rows of the old chunk that guide the new one; 0: all that are left
    trigger: str = "continuous"
    trigger_rate: float = 5.0  # Hz, of inferences with trigger `rate`
    horizon_left: int = 10  # rows left, beyond the estimated delay, at which trigger `horizon` asks
    flush_on_instruction: bool = True  # a new instruction drops what the old one had planned


@dataclass(frozen=True)
class GuardOptions:
    """One response for each kind of violation. A number that is not finite is never clamped."""

    not_finite: Response = Response.REJECT
    position: Response = Response.CLAMP
    velocity: Response = Response.CLAMP
    acceleration: Response = Response.CLAMP
    step: Response = Response.CLAMP


@dataclass(frozen=True)
class FailsafeOptions:
    """Times in seconds."""

    good_frames: int = 3  # in a row before a hold for bad observations ends
    resume_ramp: float = 0.3  # from a hold back to full motion
    hold_ramp: float = 0.2  # velocities and efforts to zero when a hold begins
    engine_tries: int = 3  # failures in a row before the node deactivates
    inference_timeout: float = 0.0  # an inference that takes longer hangs; 0: see InferenceWatchdog


def parse_scheduler(root: Section) -> SchedulerOptions:
    """The contract's `scheduler` block. Raises ContractError."""
    default = SchedulerOptions()
    if not root.has("scheduler"):
        return default
    block = root.section("scheduler")
    options = SchedulerOptions(
        mode=block.choice("mode", MODES, default=default.mode),
        linear=block.choice("interpolation", ("linear", "none"), default="linear") == "linear",
        blend_steps=block.number("blend_steps", 0.0, 1000.0, default=default.blend_steps),
        ensemble_decay=block.number("ensemble_decay", -10.0, 10.0, default=default.ensemble_decay),
        ensemble_size=block.integer("ensemble_size", 1, 64, default=default.ensemble_size),
        rtc_horizon=block.integer("rtc_horizon", 0, 1000, default=default.rtc_horizon),
        trigger=block.choice("trigger", TRIGGERS, default=default.trigger),
        trigger_rate=block.number("trigger_rate", 0.01, 1000.0, default=default.trigger_rate),
        horizon_left=block.integer("horizon_left", 0, 1000, default=default.horizon_left),
        flush_on_instruction=block.choice("on_instruction", ("flush", "keep"), default="flush") == "flush",
    )
    block.done()
    return options


def parse_guard(root: Section) -> GuardOptions:
    """The contract's `guard` block. Raises ContractError."""
    if not root.has("guard"):
        return GuardOptions()
    block = root.section("guard")
    all_three = tuple(response.value for response in Response)

    def response(kind: str, choices: tuple[str, ...], default: Response) -> Response:
        return Response(block.choice(kind, choices, default=default.value))

    default = GuardOptions()
    options = GuardOptions(
        not_finite=response("not_finite", ("reject", "trip"), default.not_finite),
        position=response("position", all_three, default.position),
        velocity=response("velocity", all_three, default.velocity),
        acceleration=response("acceleration", all_three, default.acceleration),
        step=response("step", all_three, default.step),
    )
    block.done()
    return options


def parse_failsafe(root: Section) -> FailsafeOptions:
    """The contract's `failsafe` block. Raises ContractError."""
    if not root.has("failsafe"):
        return FailsafeOptions()
    block = root.section("failsafe")
    default = FailsafeOptions()
    options = FailsafeOptions(
        good_frames=block.integer("good_frames", 1, 1000, default=default.good_frames),
        resume_ramp=block.number("resume_ramp", 0.0, 10.0, default=default.resume_ramp),
        hold_ramp=block.number("hold_ramp", 0.0, 2.0, default=default.hold_ramp),
        engine_tries=block.integer("engine_tries", 1, 100, default=default.engine_tries),
        inference_timeout=block.number("inference_timeout", 0.0, 600.0, default=default.inference_timeout),
    )
    block.done()
    return options
