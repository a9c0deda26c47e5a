"""The denoising loop of flow matching, which the model families share: times, the actions and their Euler step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vla_infer.models.layers import affine, weight
from vla_infer.tape import Loop, Norm, Tape, Tensor, Weight


def flow_times(steps: int) -> npt.NDArray[np.float64]:
    """Times of the Euler steps, (steps,): from 1 (noise) down to 1 / steps."""
    return 1.0 - np.arange(steps) / steps


def time_embedding(
    times: npt.NDArray[np.float64], width: int, min_period: float, max_period: float
) -> npt.NDArray[np.float32]:
    """(steps, width) of [sin | cos] at log-spaced periods. Vaswani et al. 2017; the periods are openpi's."""
    period = min_period * (max_period / min_period) ** np.linspace(0.0, 1.0, width // 2)
    angle = times.astype(np.float32)[:, None] * (2 * math.pi / period)
    return np.concatenate([np.sin(angle), np.cos(angle)], 1).astype(np.float32)


@dataclass(frozen=True)
class Flow:
    """The tensors of the denoising loop: actions (in and out), times, and the inputs of real-time chunking."""

    actions: Tensor
    time: Tensor
    guide: tuple[Tensor, Tensor, Tensor]
    steps: int


def flow_inputs(t: Tape, horizon: int, action_dim: int, steps: int) -> Flow:
    """Inputs: actions (horizon, action_dim), the noise on entry; rtc_previous, rtc_weight, rtc_gain."""
    actions = t.input("actions", (horizon, action_dim), "f32")
    guide = (
        t.input("rtc_previous", (horizon, action_dim), "f32"),
        t.input("rtc_weight", (horizon, 1), "f32"),
        t.input("rtc_gain", (steps, 1), "f32"),
    )
    time = t.constant("time", flow_times(steps).astype(np.float32)[:, None])
    t.output("actions", actions)
    return Flow(actions, time, guide, steps)


def step(t: Tape, x: Tensor, norm: Norm, flow: Flow, loop: Loop) -> None:
    """One Euler step of the actions along the velocity that the expert's last hidden states x project to."""
    actions, name = flow.actions, "model.action_out_proj"
    previous, weights, gain = flow.guide
    t.euler(
        x,
        weight(name, actions.cols, x.cols),
        actions,
        norm=norm,
        bias=t.param(f"{name}.bias", (1, actions.cols)),
        dt=-1.0 / loop.steps,
        time=flow.time.at(loop),
        guide=(previous, weights, gain.at(loop)),
    )


def time_table(
    t: Tape, steps: int, width: int, periods: tuple[float, float], *, given: bool = False
) -> Tensor:
    """The embedding of each step's time, (steps, width) f32; `given`: an input, so that the times are the caller's."""
    if given:
        return t.input("time_embedding", (steps, width), "f32")
    return t.constant("time_embedding", time_embedding(flow_times(steps), width, *periods))


class ActionTimeMlp:
    """mlp_out(silu(mlp_in [in_proj(actions) | time])), of SmolVLA and π0. The time enters through a bias of its
    own for each step, so that mlp_in is half as wide while denoising."""

    def __init__(self, t: Tape, times: Tensor, width: int) -> None:
        name = "model.action_time_mlp_in"
        self.t, self.width = t, width
        self.of_action = Weight(f"{name}.weight", width, width, (0, width), keep=True)
        self.out = Weight("model.action_time_mlp_out.weight", width, width, keep=True)
        of_time = Weight(f"{name}.weight", width, width, (width, 2 * width))
        bias = t.temp("time_bias", (times.rows, width), "f32")
        self.bias = t.linear(times, of_time, bias=t.param(f"{name}.bias", (1, width)), out=bias)

    def __call__(self, actions: Tensor, loop: Loop, out: Tensor | None = None) -> Tensor:
        x = affine(self.t, actions, "model.action_in_proj", self.width)
        x = self.t.linear(x, self.of_action, bias=self.bias.at(loop), act="silu")
        bias = self.t.param("model.action_time_mlp_out.bias", (1, self.width))
        return self.t.linear(x, self.out, bias=bias, out=out)
