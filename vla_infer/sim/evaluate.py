"""Many seeded episodes with one policy, and what they come to: success with its interval, time, jerk, guard."""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from vla_infer.checkpoint import read_checkpoint
from vla_infer.contract import load_contract
from vla_infer.errors import UnsupportedError
from vla_infer.policy import Policy, load_policy
from vla_infer.sim.rollout import Episode, Outcome, run_expert, run_policy, total, with_mode
from vla_infer.sim.tasks import KINDS
from vla_infer.sim.world import World

_Z = 1.959963984540054  # two-sided 95 %
_EXPERT_IMAGE = (64, 64)  # of a world whose images nobody asks for
_ROUNDED_TO = 0.010  # s: a measured inference time counts as the next multiple, the same from run to run


@dataclass(frozen=True)
class Options:
    """What is evaluated. policy: directory, or None for the expert; inference: s that an inference takes in the
    simulation, None to measure it; latency: s on top of it."""

    policy: str | None
    episodes: int
    seed: int = 0
    kinds: tuple[str, ...] = KINDS
    device: str = "cpu"
    precision: str = "fp32"
    num_steps: int | None = None
    threads: int | None = None
    contract: str = "so101"
    scheduler: str | None = None
    inference: float | None = None
    latency: float = 0.0
    wrong_instruction: bool = False
    split: str = "eval"
    time_limit: float = 10.0


def options_of(args: argparse.Namespace) -> Options:
    """What a command line gives, its milliseconds as seconds; what it has no argument for keeps its default."""
    given = {f.name: getattr(args, f.name) for f in fields(Options) if hasattr(args, f.name)}
    inference = None if args.inference_ms is None else max(0.0, args.inference_ms / 1e3)
    return Options(**given | {"kinds": tuple(args.kinds), "inference": inference})


@dataclass(frozen=True)
class Evaluation:
    """options: as they were carried out; outcomes: in the order of the seeds; device: as the engine names it."""

    options: Options
    device: str
    fingerprint: str
    outcomes: tuple[Outcome, ...]
    wall: float


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a success rate (Wilson 1927); (0, 1) without a trial."""
    if trials == 0:
        return 0.0, 1.0
    rate, z2 = successes / trials, _Z**2
    middle = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z * math.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    return max(0.0, middle - half), min(1.0, middle + half)


class Evaluator:
    """A world and a policy, for one episode after another."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.contract = with_mode(load_contract(options.contract), options.scheduler)
        self.policy: Policy | None = None
        self.device, self.fingerprint = "", ""
        size = _EXPERT_IMAGE
        cameras: tuple[str, ...] = ()
        if options.policy is not None:
            ckpt = read_checkpoint(options.policy)
            sizes = set(ckpt.camera_sizes.values())
            if len(sizes) != 1:
                raise UnsupportedError(
                    f"{ckpt.path}: cameras of different sizes {sorted(sizes)}: one is drawn"
                )
            size, cameras = sizes.pop(), ckpt.cameras
            self.policy = load_policy(
                options.policy,
                device=options.device,
                precision=options.precision,
                num_steps=options.num_steps,
                threads=options.threads,
                max_image=size,
            )
            self.contract.check_policy(self.policy.info)
            self.device, self.fingerprint = self.policy.info.device, self.policy.info.fingerprint
        self.world = World(image_size=size, cameras=cameras)

    def measure(self) -> float:
        """Seconds that an inference takes here: the median of a few, rounded up to whole steps."""
        if self.policy is None:
            return 0.0
        self.world.reset(0)
        images, state = self.world.images(), np.zeros(self.policy.info.state_dim, np.float32)
        times = []
        for _ in range(7):
            began = time.perf_counter()
            self.policy.predict(images, state, "touch the red cube")
            times.append(time.perf_counter() - began)
        return math.ceil(statistics.median(times) / _ROUNDED_TO) * _ROUNDED_TO

    def run(self, index: int, inference: float) -> Outcome:
        """The episode of the seed after `index` others."""
        o = self.options
        episode = Episode(
            o.seed + index, o.kinds, inference + o.latency, o.wrong_instruction, o.time_limit, o.split
        )
        if self.policy is None:
            return run_expert(self.world, episode)
        return run_policy(self.world, self.policy, self.contract, episode)

    def close(self) -> None:
        self.world.close()
        if self.policy is not None:
            self.policy.close()


def evaluate(
    options: Options, *, workers: int = 1, progress: Callable[[Outcome], None] = lambda _: None
) -> Evaluation:
    """Run every episode. The same options give the same outcomes on the same device, by however many workers.

    Raises:
        VlaInferError: the policy, the contract or the simulation cannot be loaded, or do not fit each other.
    """
    began = time.monotonic()
    evaluator = Evaluator(options)
    try:
        inference = evaluator.measure() if options.inference is None else options.inference
        device, fingerprint = evaluator.device, evaluator.fingerprint
        outcomes = []
        done = _alone(evaluator, inference) if workers == 1 else _together(options, inference, workers)
        for outcome in done:
            outcomes.append(outcome)
            progress(outcome)
    finally:
        evaluator.close()
    carried_out = Options(**asdict(options) | {"inference": inference, "kinds": tuple(options.kinds)})
    return Evaluation(carried_out, device, fingerprint, tuple(outcomes), time.monotonic() - began)


def _alone(evaluator: Evaluator, inference: float) -> Iterator[Outcome]:
    for index in range(evaluator.options.episodes):
        yield evaluator.run(index, inference)


def _together(options: Options, inference: float, workers: int) -> Iterator[Outcome]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(options,)
    ) as pool:
        count = options.episodes
        yield from pool.map(_run_in_worker, range(count), [inference] * count)


_worker: list[Evaluator] = []  # of this process


def _start_worker(options: Options) -> None:
    _worker.append(Evaluator(options))


def _run_in_worker(index: int, inference: float) -> Outcome:
    return _worker[0].run(index, inference)


# ------------------------------------------------------------------ results
def rate(outcomes: list[Outcome] | tuple[Outcome, ...], what: str = "success") -> dict[str, Any]:
    """Rate of outcomes whose field `what` is true, with its interval and the counts."""
    count = sum(bool(getattr(outcome, what)) for outcome in outcomes)
    low, high = wilson(count, len(outcomes))
    return {
        "count": count,
        "of": len(outcomes),
        "rate": count / max(1, len(outcomes)),
        "low": low,
        "high": high,
    }


def summary(evaluation: Evaluation) -> dict[str, Any]:
    """Everything that a report states, ready for JSON."""
    outcomes = evaluation.outcomes
    kinds = sorted({outcome.kind for outcome in outcomes}, key=KINDS.index)
    times = [outcome.seconds for outcome in outcomes if outcome.success]
    ticks = sum(outcome.ticks for outcome in outcomes)
    return {
        "options": asdict(evaluation.options),
        "device": evaluation.device,
        "fingerprint": evaluation.fingerprint,
        "success": rate(outcomes),
        "obeyed": rate(outcomes, "obeyed"),
        "by_kind": {kind: rate([o for o in outcomes if o.kind == kind]) for kind in kinds},
        "seconds_to_success": statistics.median(times) if times else None,
        "mean_squared_jerk": statistics.fmean(o.squared_jerk for o in outcomes) if outcomes else None,
        "inferences": sum(o.inferences for o in outcomes),
        "failed_inferences": sum(o.failures for o in outcomes),
        "ticks": ticks,
        "held_ticks": sum(o.held_ticks for o in outcomes),
        "guard": total([o.guard for o in outcomes]),
        "wall_seconds": round(evaluation.wall, 1),
        "episodes": [{**vars(outcome), "guard": dict(outcome.guard)} for outcome in outcomes],
    }


def markdown(document: dict[str, Any]) -> str:
    """A report for people, of what `summary` gives."""
    options = document["options"]
    who = options["policy"] or "the scripted expert"
    lines = [f"# {who}: {document['success']['of']} episodes from seed {options['seed']}", ""]
    swapped = " The instruction names another cube than the task's." if options["wrong_instruction"] else ""
    how = f"{document['device']}, {options['precision']}, " if options["policy"] else ""
    taken = options["inference"]
    takes = "what it takes" if taken is None else f"{1e3 * taken:.0f} ms"
    lines += [
        f"{how}scheduler {options['scheduler'] or 'of the contract'}, an inference takes "
        f"{takes} and {1e3 * options['latency']:.0f} ms are added, "
        f"split {options['split']}.{swapped}",
        "",
        "| task | success | 95 % interval | episodes |",
        "| --- | --- | --- | --- |",
    ]
    rows = [*document["by_kind"].items(), ("all", document["success"])]
    if options["wrong_instruction"]:
        rows.append(("what was said instead", document["obeyed"]))
    lines += [
        f"| {name} | {_percent(r['rate'])} | {_percent(r['low'])} to {_percent(r['high'])} | {r['of']} |"
        for name, r in rows
    ]
    seconds, jerk = document["seconds_to_success"], document["mean_squared_jerk"]
    guard = ", ".join(f"{kind} {count}" for kind, count in document["guard"].items()) or "none"
    held, ticks = document["held_ticks"], document["ticks"]
    lines += [
        "",
        f"- time to success, median: {'-' if seconds is None else f'{seconds:.2f} s'}",
        f"- mean squared jerk of the joints: {'-' if jerk is None else f'{jerk:.3g} rad²/s⁶'}",
    ]
    if ticks:  # what is counted only where scheduler and guard run in this process
        lines += [
            f"- guard: {guard}, in {ticks} commands",
            f"- commands that held the last position for want of a plan: {held}",
            f"- inferences: {document['inferences']}, refused observations: {document['failed_inferences']}",
        ]
    return "\n".join(lines) + "\n"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
