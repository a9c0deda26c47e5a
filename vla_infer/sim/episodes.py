"""One episode after another in a world: what is asked, whether it was done, and how often. No ROS in here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vla_infer.sim.tasks import KINDS, Task, parse
from vla_infer.sim.world import FloatArray, World

#: Phases of an episode. WAITING: nobody commands yet. PAUSE: a new scene, and commands are not obeyed, so that what
#: was planned for the last one does not reach into it. ASKED: waiting for a person to say what to do. ENDED: the
#: outcome is there to be seen.
WAITING, PAUSE, ASKED, RUNNING, ENDED = "waiting", "pause", "asked", "running", "ended"


@dataclass(frozen=True)
class Rules:
    """How episodes are made. Times in simulated seconds.

    auto: the scenes say what to do and follow one another; else a scene stays, and persons say what to do.
    """

    seed: int = 0  # of the first; each next one has the next number
    split: str = "eval"
    kinds: Sequence[str] = KINDS
    auto: bool = True
    time_limit: float = 12.0
    pause: float = 0.8
    linger: float = 0.7


class Episodes:
    """Steps a world through its episodes. `announce` has the instruction to publish, once each."""

    def __init__(self, world: World, rules: Rules) -> None:
        self.world, self.rules = world, rules
        self.number = 0  # of this episode, from 1
        self.finished = self.successes = 0
        self.phase = WAITING
        self.outcome = ""  # of the last that ended: success, failed or time is over
        self.task: Task | None = None
        self.instruction = ""
        self._announce: str | None = None
        self._since = 0.0
        self._next_scene()

    @property
    def obeys(self) -> bool:
        """Whether commands move the arm now."""
        return self.phase in (ASKED, RUNNING, ENDED)

    @property
    def seconds(self) -> float:
        """How long this phase has lasted."""
        return self.world.time - self._since

    def announce(self) -> str | None:
        """The instruction that has to be published now, if there is a new one."""
        text, self._announce = self._announce, None
        return text

    def command(self, positions: FloatArray) -> None:
        """Somebody commands (6,) rad: the first episode may begin. Obeyed where `obeys` says so.

        Raises:
            ValueError: not six finite numbers.
        """
        if self.obeys:
            self.world.command(positions)
        elif self.phase == WAITING:
            self._begin()

    def reset(self) -> None:
        """Leave this episode uncounted and begin the next."""
        self._next_scene()
        self._begin()

    def instruct(self, text: str) -> None:
        """A person gave an instruction. A sentence of the tasks is judged from now on; any other cannot be."""
        if text == self.instruction and self.phase != ENDED:
            return
        self.instruction = text
        self.task = parse(text)
        if self.task is not None and self.world.scene and self.task.colour not in self.world.scene.cubes:
            self.task = None
        self.world.mark()
        if self.phase in (ASKED, ENDED, RUNNING):
            self._enter(RUNNING)

    def step(self) -> None:
        """To be called after each advance of the world."""
        rules = self.rules
        if self.phase == PAUSE and self.seconds >= rules.pause:
            self.world.mark()
            self._enter(RUNNING if rules.auto or self.instruction else ASKED)
        elif self.phase == RUNNING:
            if self.task is not None and self.world.succeeded(self.task):
                self._end("success")
            elif self.task is not None and self.world.failed(self.task):
                self._end("failed")
            elif self.seconds >= rules.time_limit and (rules.auto or self.task is not None):
                self._end("time is over")
        elif self.phase == ENDED and rules.auto and self.seconds >= rules.linger:
            self._next_scene()
            self._begin()

    def _end(self, outcome: str) -> None:
        self.outcome = outcome
        if self.task is not None:
            self.finished += 1
            self.successes += outcome == "success"
        self._enter(ENDED)

    def _begin(self) -> None:
        self._enter(PAUSE)
        if self.rules.auto and self.task is not None:
            self._announce = self.task.instruction

    def _next_scene(self) -> None:
        self.number += 1
        seed = self.rules.seed + self.number - 1
        task = self.world.reset(seed, split=self.rules.split, kinds=self.rules.kinds)
        self.task = task if self.rules.auto else None
        self.instruction = task.instruction if self.rules.auto else ""
        self._since = 0.0

    def _enter(self, phase: str) -> None:
        self.phase = phase
        self._since = self.world.time

    def describe(self) -> tuple[str, dict[str, str]]:
        """One line for people, and figures by name: what /simulation/status carries."""
        task = self.task
        values = {
            "phase": self.phase,
            "episode": str(self.number),
            "episodes": str(self.finished),
            "successes": str(self.successes),
            "success": str(self.phase == ENDED and self.outcome == "success").lower(),
            "outcome": self.outcome,
            "kind": task.kind if task else "",
            "colour": task.colour if task else "",
            "instruction": self.instruction,
            "cubes": " ".join(self.world.scene.cubes) if self.world.scene else "",
            "seconds": f"{self.seconds:.1f}",
            "seed": str(self.rules.seed + self.number - 1),
        }
        line = {
            WAITING: "waiting for commands",
            PAUSE: f"episode {self.number}: new scene",
            ASKED: "waiting for an instruction",
            RUNNING: f"episode {self.number}: {self.instruction}"
            + ("" if task else " (not one of the sentences that are judged)"),
            ENDED: f"episode {self.number}: {self.outcome}",
        }[self.phase]
        return line, values
