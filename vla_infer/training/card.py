"""A model card as Markdown, of what training and evaluations wrote down: it holds no number of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vla_infer.errors import TrainingError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises TrainingError where the file is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path}: cannot be read ({error})") from None
    if not isinstance(document, dict):
        raise TrainingError(f"{path}: expected an object")
    return document


def model_card(policy: Path, evaluations: Sequence[Path]) -> str:
    """The card of a policy directory with `training.json`, and of results that `vla-infer evaluate --json` wrote.

    Raises:
        TrainingError: a file is missing, or is not what it should be.
    """
    training = read_json(policy / "training.json")
    try:
        parts = [_made(policy.name, training), *_measured([read_json(path) for path in evaluations])]
    except (KeyError, TypeError, IndexError) as error:
        raise TrainingError(f"{policy}: training.json or an evaluation lacks {error}") from None
    return "\n".join([*parts, _LIMITS])


def _made(name: str, t: dict[str, Any]) -> str:
    data, plan, sizes = t["demonstrations"], t["plan"], t["preset"]["sizes"]
    vision, text, expert = sizes["vision"], sizes["text"], sizes["expert"]
    last = t["history"][-1]
    kinds, image = ", ".join(data["kinds"]), f"{vision['image']} x {vision['image']}"
    ended = "" if t["finished"] else " (stopped before its plan's end)"
    return f"""# {name}

A SmolVLA trained from scratch on demonstrations of a scripted expert in simulation, for the SO-101 arm of
`vla_infer.sim`. It shows that the package works from camera to command; it is no base to fine-tune from.

| | |
| --- | --- |
| parameters | {t["parameters"] / 1e6:.2f} million, {t["weight_bytes"] / 1e6:.1f} MB in bfloat16 |
| vision | {vision["layers"]} layers of width {vision["hidden"]}, {image} pixels in patches of {vision["patch"]} |
| language | {text["depth"]} layers of width {text["width"]}, {text["heads"]} heads; {sizes["vocabulary"]} tokens |
| action expert | {expert["depth"]} layers of width {expert["width"]} |
| action chunk | {sizes["horizon"]} rows at 30 Hz, {t["preset"]["denoising"]} denoising steps |
| demonstrations | {data["episodes"]} episodes, {data["observations"]} observations, from seed {data["seed"]}; {kinds} |
| training | {t["steps"]} steps of {plan["batch"]} x {plan["draws"]} draws{ended}, seed {plan["seed"]} |
| rate | {plan["rate"]:g}, cosine after {plan["warmup"]} steps; AdamW, averaged weights |
| where | {t["device"]}, PyTorch {t["torch"]}, {t["precision"]}, {t["seconds"] / 60:.1f} minutes |
| last losses | velocity {last["flow"]:.4f}, the cube's place {last["goal"]:.4f} dm², pointing {last["pointing"]:.3f} |
"""


def _measured(results: list[dict[str, Any]]) -> list[str]:
    if not results:
        return ["## Evaluation\n\nNot evaluated yet.\n"]
    lines = [
        "## Evaluation",
        "",
        "Unseen scenes and sentences; 95 % intervals. In the control the instruction names another cube of the scene, "
        "and what counts is still the first.",
        "",
        "| who | device | instruction | scheduler | latency | task | success | interval | of |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        o = result["options"]
        latency = 1e3 * ((o["inference"] or 0.0) + o["latency"])
        said = "another cube's" if o["wrong_instruction"] else "right"
        device = f"{o['device']} {o['precision']}" if o["policy"] else "-"
        head = (
            f"| {'policy' if o['policy'] else 'expert'} | {device} | {said} | {o['scheduler'] or 'contract'} "
        )
        head += f"| {latency:.0f} ms "
        kinds = result["by_kind"]
        rows = kinds | ({"all": result["success"]} if len(kinds) > 1 else {})
        lines += [
            f"{head}| {kind} | {100 * r['rate']:.1f} % | {100 * r['low']:.1f} to {100 * r['high']:.1f} % | {r['of']} |"
            for kind, r in rows.items()
        ]
    return ["\n".join(lines) + "\n"]


_LIMITS = """## What it can and cannot do

It knows the sentences of `vla_infer/sim/tasks.py` for the kinds of task above and the four colours there, cubes of one
size on a bare table, the two simulated cameras and their small variations. Other words become tokens that it has
not learnt from: it then moves, but what it does means nothing. It has not seen a real camera or a real arm.
"""
