"""What the simulated arm can be told to do: kinds of task, colours, and the many ways to say each. No MuJoCo here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

KINDS = ("touch", "push_left", "push_right", "pick")
COLOURS = ("red", "green", "blue", "purple")
SPLITS = ("train", "eval")

# No sentence of `eval` is in `train`, but each of its words is: a policy trained from scratch has no other words.
_TOUCH = {
    "train": (
        "touch the {} cube",
        "touch the {} block",
        "go to the {} cube",
        "move to the {} block",
        "reach for the {} cube",
        "put the gripper on the {} cube",
        "tap the {} block",
    ),
    "eval": ("reach for the {} block", "tap the {} cube", "move the gripper to the {} cube"),
}
_PUSH = {
    "train": (
        "push the {} cube to the {side}",
        "push the {} block to the {side}",
        "push the {} cube {side}",
        "move the {} cube to the {side}",
        "slide the {} block to the {side}",
        "slide the {} cube {side}",
        "shove the {} cube to the {side}",
    ),
    "eval": (
        "slide the {} cube to the {side}",
        "push the {} block {side}",
        "shove the {} block to the {side}",
    ),
}
_PICK = {
    "train": (
        "pick up the {} cube",
        "pick up the {} block",
        "pick the {} cube up",
        "lift the {} cube",
        "lift up the {} block",
        "grasp the {} cube and lift it",
        "take the {} block",
    ),
    "eval": ("lift the {} block", "pick the {} block up", "grasp the {} block and lift it up"),
}
_FORMS = {"touch": _TOUCH, "push_left": _PUSH, "push_right": _PUSH, "pick": _PICK}


@dataclass(frozen=True)
class Task:
    """One thing to do. kind: of KINDS; colour: of COLOURS, the goal's; instruction: the sentence given."""

    kind: str
    colour: str
    instruction: str


def phrases(kind: str, colour: str, split: str = "train") -> tuple[str, ...]:
    """Every sentence of a split for one kind and colour; the first of "train" is the plain one.

    Left and right are the robot's own and those of the top camera's image.

    Raises:
        ValueError: an unknown kind, colour or split.
    """
    for value, known in ((kind, KINDS), (colour, COLOURS), (split, SPLITS)):
        if value not in known:
            raise ValueError(f"'{value}': expected one of {', '.join(known)}")
    side = kind.partition("_")[2]
    return tuple(form.format(colour, side=side) for form in _FORMS[kind][split])


def with_colour(task: Task, other: str) -> Task:
    """The same task for a cube of another colour, in the same words."""
    for split in SPLITS:
        known = phrases(task.kind, task.colour, split)
        if task.instruction in known:
            instruction = phrases(task.kind, other, split)[known.index(task.instruction)]
            return dataclasses.replace(task, colour=other, instruction=instruction)
    return Task(task.kind, other, phrases(task.kind, other)[0])


def parse(instruction: str) -> Task | None:
    """The task that a sentence names, if it is one of `phrases`, whatever its case and the spaces around it."""
    return _BY_PHRASE.get(" ".join(instruction.lower().rstrip(" .!").split()))


_BY_PHRASE = {
    sentence: Task(kind, colour, sentence)
    for kind in KINDS
    for colour in COLOURS
    for split in SPLITS
    for sentence in phrases(kind, colour, split)
}
