"""The training loop: AdamW, warm-up and cosine, averaged weights, and a state to go on from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vla_infer.errors import TrainingError

from .batches import Batches
from .objective import Objective, rate_of

_BETAS = (0.9, 0.95)
_WEIGHT_DECAY = 0.02
_MOST_GRADIENT = 1.0
_AVERAGED = 0.999  # of the averaged weights' memory, a step
_LAST_RATE = 0.02  # of the highest, at the end


@dataclass(frozen=True)
class Plan:
    """How to train. draws: times and noises for each observation, whose prefix is computed once.

    The end is at `steps` or after `seconds` of training (calls added up), whichever comes first; the learning
    rate falls towards whichever is nearer.
    """

    steps: int
    batch: int
    draws: int = 4
    rate: float = 1e-3
    warmup: int = 200
    goal_weight: float = 1.0
    seconds: float = math.inf
    seed: int = 0


@dataclass(frozen=True)
class Report:
    """What a step came to; losses are means since the last report. seconds: of training so far."""

    step: int
    flow: float
    goal: float
    pointing: float
    rate: float
    seconds: float
    samples_per_second: float


class Trainer:
    """Parameters under training, their optimiser and their average."""

    def __init__(self, plan: Plan, objective: Objective, parameters: dict[str, Tensor]) -> None:
        self.plan, self._objective = plan, objective
        device = objective.device
        self.parameters = {
            name: value.to(device).clone().requires_grad_() for name, value in parameters.items()
        }
        self.average = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.step, self.seconds = 0, 0.0
        self.history: list[dict[str, float]] = []
        width = objective.sizes.text.width
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, value in self.parameters.items():
            decay = _WEIGHT_DECAY if value.dim() > 1 and "embed" not in name else 0.0
            groups.setdefault((rate_of(name, width), decay), []).append(value)
        self._relative = [relative for relative, _ in groups]
        self._optimiser = torch.optim.AdamW(
            [{"params": values, "weight_decay": decay} for (_, decay), values in groups.items()],
            lr=plan.rate,
            betas=_BETAS,
        )

    @property
    def done(self) -> bool:
        return self.step >= self.plan.steps or self.seconds >= self.plan.seconds

    def run(
        self,
        batches: Batches,
        *,
        seconds: float = math.inf,
        every: int = 100,
        report: Callable[[Report], None] = lambda _: None,
    ) -> None:
        """Train until the plan's end, or for `seconds` of this call but a step at least; `report` is called every
        so many steps."""
        started, before = time.monotonic(), self.seconds
        told, sums = (time.monotonic(), self.step), torch.zeros(3, device=self._objective.device)
        begun_at = self.step
        while not self.done and (self.step == begun_at or time.monotonic() - started < seconds):
            sums += self.advance(batches)
            self.seconds = before + time.monotonic() - started
            if self.step % every == 0 or self.done:
                count, now = self.step - told[1], time.monotonic()
                flow, goal, pointing = (
                    sums / count
                ).tolist()  # waits for the device, so that the time is right
                now = time.monotonic()
                self.seconds = before + now - started
                if not math.isfinite(flow):
                    raise TrainingError(f"step {self.step}: the loss is not finite; lower the learning rate")
                speed = count * self.plan.batch / (now - told[0])
                told, sums = (now, self.step), torch.zeros_like(sums)
                latest = Report(self.step, flow, goal, pointing, self._rate(), self.seconds, speed)
                self.history.append(asdict(latest))
                report(latest)

    def advance(self, batches: Batches) -> Tensor:
        """One step; returns its losses (3,): flow, goal and pointing."""
        batch = batches.draw(self.plan.batch)
        noise, times = self._objective.draw(batch, self.plan.draws, batches.generator)
        for group, relative in zip(self._optimiser.param_groups, self._relative, strict=True):
            group["lr"] = self._rate() * relative
        losses = self._objective.losses(
            self.parameters, batch, noise, times, goal_weight=self.plan.goal_weight
        )
        self._optimiser.zero_grad(set_to_none=True)
        losses.total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), _MOST_GRADIENT)
        self._optimiser.step()
        self.step += 1
        keep = min(_AVERAGED, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - keep)
        return torch.stack([losses.flow, losses.goal, losses.pointing])

    def _rate(self) -> float:
        plan = self.plan
        part = min(1.0, max(self.step / plan.steps, self.seconds / plan.seconds))
        cosine = _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * part))
        return plan.rate * min(1.0, (self.step + 1) / plan.warmup) * cosine

    # ------------------------------------------------------------------ state
    def save(self, path: Path, batches: Batches) -> None:
        """Everything that `load` needs to go on as if nothing had happened."""
        state = {
            "plan": {**asdict(self.plan), "observations": len(batches)},
            "parameters": {name: value.detach() for name, value in self.parameters.items()},
            "average": self.average,
            "optimiser": self._optimiser.state_dict(),
            "generator": batches.generator.get_state(),
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        part.replace(path)

    def load(self, path: Path, batches: Batches) -> None:
        """Go on from a saved state. Raises TrainingError where it is of another plan or other sizes."""
        try:
            # To the host first: the optimiser counts its steps there, and moves the rest where it belongs.
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise TrainingError(f"{path}: not a training state ({error}); delete it to begin anew") from None
        fits = {name: tuple(value.shape) for name, value in state["parameters"].items()} == {
            name: tuple(value.shape) for name, value in self.parameters.items()
        }
        plan = {**asdict(self.plan), "observations": len(batches)}
        if state["plan"] != plan or not fits:
            raise TrainingError(f"{path}: of another plan: {state['plan']}; give that one, or another folder")
        with torch.no_grad():
            for name, value in self.parameters.items():
                value.copy_(state["parameters"][name])
                self.average[name].copy_(state["average"][name])
        self._optimiser.load_state_dict(state["optimiser"])
        batches.generator.set_state(state["generator"])
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
