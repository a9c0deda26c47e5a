"""Real-time chunking: a new chunk continues the one that is being executed (Black, Galliker, Levine 2025).

While a chunk is computed the robot goes on with the last one, so the new chunk's first actions are already
decided, and those after them should not jump. Each denoising step pulls the actions towards the rest of the last
chunk, with a weight that falls along the horizon. This is the guided form as LeRobot 0.6 has it, with the
Jacobian of the model taken as the identity; `Tape.euler` states the formula.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vla_infer.errors import ObservationError

SCHEDULES = ("LINEAR", "EXP", "ONES", "ZEROS")


@dataclass(frozen=True)
class Rtc:
    """What the next chunk has to continue.

    previous: (n, action_dim) the actions of the last chunk from the stamp of this observation on, whether sent by
        now or not, in robot units, n at most the horizon; with `normalized`, (n, up to max_action_dim) in model
        units.
    inference_delay: control steps until the new chunk takes over; the first as many actions are held fully.
    execution_horizon: from this action on nothing is held; n where that is less.
    schedule: weights w between the two: "LINEAR" falls evenly from 1 to 0, "EXP" is w (e^w - 1) / (e - 1) of that,
        "ONES" holds, "ZEROS" lets go at once.
    max_guidance_weight: bound of the gain, above 0.

    Raises:
        ObservationError: a value is out of these bounds, or previous is not a finite matrix.
    """

    previous: npt.NDArray[np.float32]
    inference_delay: int
    execution_horizon: int
    schedule: str = "LINEAR"
    max_guidance_weight: float = 10.0
    normalized: bool = False

    def __post_init__(self) -> None:
        previous = self.previous
        kind = previous.dtype.kind if isinstance(previous, np.ndarray) else "O"
        if kind not in "fiu" or previous.ndim != 2 or not np.isfinite(previous).all():
            got = previous.shape if isinstance(previous, np.ndarray) else type(previous).__name__
            raise ObservationError(f"rtc: previous: expected a finite matrix (n, actions), got {got}")
        if self.schedule not in SCHEDULES:
            raise ObservationError(
                f"rtc: schedule: expected one of {', '.join(SCHEDULES)}, got {self.schedule!r}"
            )
        for name, least in (("inference_delay", 0), ("execution_horizon", 1)):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)):
                raise ObservationError(f"rtc: {name}: expected an integer, got {value!r}")
            if value < least:
                raise ObservationError(f"rtc: {name}: expected {least} or more, got {value}")
        if not 0 < self.max_guidance_weight < np.inf:
            raise ObservationError(
                f"rtc: max_guidance_weight: expected a number above 0, got {self.max_guidance_weight}"
            )


def weights(rtc: Rtc, horizon: int) -> npt.NDArray[np.float32]:
    """How much each action is held, (horizon, 1): 1 before the delay, 0 from the end of what is executed."""
    end = min(rtc.execution_horizon, len(rtc.previous), horizon)
    start = min(rtc.inference_delay, end)
    linear = np.linspace(1.0, 0.0, end - start + 2)[1:-1]
    falling = {
        "LINEAR": linear,
        "EXP": linear * np.expm1(linear) / np.expm1(1.0),
        "ONES": np.ones(end - start),
        "ZEROS": np.zeros(end - start),
    }[rtc.schedule]
    held = np.concatenate([np.ones(start), falling, np.zeros(horizon - end)])
    return held.astype(np.float32)[:, None]


def gains(steps: int, max_guidance_weight: float) -> npt.NDArray[np.float32]:
    """Guidance gain of each denoising step, (steps, 1): time / tau * (time^2 + tau^2) / time^2 with tau = 1 - time,
    never above the bound, which is what the first step (tau = 0) takes."""
    tau = np.arange(steps) / steps
    time = 1.0 - tau
    with np.errstate(divide="ignore"):
        gain = time / tau * (time**2 + tau**2) / time**2
    return np.minimum(gain, max_guidance_weight).astype(np.float32)[:, None]


def tape_inputs(
    rtc: Rtc, previous: npt.NDArray[np.float32], *, horizon: int, width: int, steps: int
) -> dict[str, npt.NDArray[np.float32]]:
    """The three inputs of `flow.flow_inputs`.

    previous: that of `rtc` in model units, (n, up to `width`); what it lacks to (horizon, width) is 0.

    Raises:
        ObservationError: it is longer than the horizon or wider than the model's actions.
    """
    rows, cols = previous.shape
    if rows > horizon or cols > width:
        raise ObservationError(f"rtc: previous: expected at most ({horizon}, {width}), got ({rows}, {cols})")
    padded = np.zeros((horizon, width), np.float32)
    padded[:rows, :cols] = previous
    return {
        "rtc_previous": padded,
        "rtc_weight": weights(rtc, horizon),
        "rtc_gain": gains(steps, rtc.max_guidance_weight),
    }
