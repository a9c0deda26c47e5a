"""Make demonstrations, and train a policy on them.

    python -m vla_infer.training demonstrate DATA --episodes 6000
    python -m vla_infer.training train DATA POLICY --minutes 12
    python -m vla_infer.training card POLICY RESULTS.json

The first two stop by themselves after --call-minutes and go on where they were when they are called again.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vla_infer.errors import VlaInferError
from vla_infer.sim.tasks import COLOURS, KINDS, phrases

from .presets import PRESETS
from .shards import Demonstrations, Recipe, load_demonstrations

CAMERAS = ("observation.images.top", "observation.images.wrist")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0 when all is done, 3 when a further call has to go on."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except VlaInferError as error:
        print(f"training: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m vla_infer.training", description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(required=True)
    demonstrate = verbs.add_parser("demonstrate", help="let the expert make demonstrations")
    demonstrate.set_defaults(run=_demonstrate)
    demonstrate.add_argument("data", type=Path, help="folder of the demonstrations")
    demonstrate.add_argument("--episodes", type=int, default=6000)
    demonstrate.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=["touch", "push_left", "push_right"]
    )
    demonstrate.add_argument(
        "--preset", choices=PRESETS, default="small", help="gives image size and horizon"
    )
    demonstrate.add_argument("--seed", type=int, default=0, help="of the first scene (default: 0)")
    demonstrate.add_argument("--stride", type=int, default=2, help="policy steps between observations")
    demonstrate.add_argument("--workers", type=int, help="processes (default: one a processor)")
    demonstrate.add_argument(
        "--share",
        type=_share,
        default=(0, 1),
        metavar="I/N",
        help="make the I-th of N parts, from 0: several calls at once then fill one folder (default: 0/1)",
    )
    train = verbs.add_parser("train", help="train a policy on demonstrations")
    train.set_defaults(run=_train)
    train.add_argument("data", type=Path, help="folder of the demonstrations")
    train.add_argument("policy", type=Path, help="directory of the policy; the state is kept beside it")
    train.add_argument("--preset", choices=PRESETS, default="small")
    train.add_argument("--steps", type=int, default=20_000, help="at most (default: 20000)")
    train.add_argument(
        "--minutes", type=float, default=math.inf, help="of training, all calls together, at most"
    )
    train.add_argument("--batch", type=int, default=256)
    train.add_argument("--draws", type=int, default=4, help="times and noises for each observation")
    train.add_argument("--rate", type=float, default=1e-3, help="highest learning rate (default: 0.001)")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--device", default="cpu", help="as torch names it: cpu, cuda (default: cpu)")
    train.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    train.add_argument(
        "--save-minutes",
        type=float,
        default=math.inf,
        help="save state and policy this often (default: at the end)",
    )
    card = verbs.add_parser("card", help="print a model card")
    card.set_defaults(run=_card)
    card.add_argument("policy", type=Path)
    card.add_argument("evaluations", nargs="*", type=Path, help="what vla-infer evaluate --json wrote")
    for verb in (demonstrate, train):
        verb.add_argument("--call-minutes", type=float, default=math.inf, help="of this call, at most")
    return parser


def _share(text: str) -> tuple[int, int]:
    """I/N of the command line."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"'{text}': expected I/N with 0 <= I < N, such as 0/2")
    return int(part), int(parts)


def _demonstrate(options: argparse.Namespace) -> int:
    from .demonstrate import Progress, default_workers, make_demonstrations

    sizes = PRESETS[options.preset].sizes
    recipe = Recipe(
        sizes.vision.image, sizes.horizon, tuple(options.kinds), CAMERAS, options.seed, options.stride
    )
    started = time.monotonic()

    def report(p: Progress) -> None:
        spent = time.monotonic() - started
        print(
            f"shard {p.done}/{p.shards}: {p.successes} of {p.episodes} episodes succeeded, {p.observations} "
            f"observations, {p.episodes / spent:.1f} episodes/s",
            flush=True,
        )

    total = make_demonstrations(
        options.data,
        recipe,
        episodes=options.episodes,
        workers=options.workers or default_workers(),
        share=options.share,
        seconds=60 * options.call_minutes,
        report=report,
    )
    return 0 if total.done >= total.shards else 3


def _train(options: argparse.Namespace) -> int:
    import torch

    from vla_infer.models import smolvla

    from .batches import Batches
    from .loop import Plan, Report, Trainer
    from .objective import Objective, initial_parameters
    from .policy_directory import write_small_files

    began = time.monotonic()
    torch.set_float32_matmul_precision("high")  # TF32 where the device has it
    preset = PRESETS[options.preset]
    demonstrations = load_demonstrations(options.data)
    _check(preset.sizes.vision.image, preset.sizes.horizon, demonstrations.recipe)
    said = [
        text for kind in demonstrations.recipe.kinds for colour in COLOURS for text in phrases(kind, colour)
    ]
    ckpt, processors = write_small_files(options.policy, preset, demonstrations, said)
    sizes = smolvla.sizes(ckpt)
    shapes = {name: info.shape for name, info in ckpt.tensors.items()}
    parameters = initial_parameters(shapes, sizes, ckpt.action_dim, options.seed)
    objective = Objective(sizes, parameters, device=options.device, precision=options.precision)
    plan = Plan(
        steps=options.steps,
        batch=options.batch,
        draws=options.draws,
        rate=options.rate,
        seconds=60 * options.minutes,
        seed=options.seed,
    )
    trainer = Trainer(plan, objective, parameters)
    batches = Batches(demonstrations, processors, sizes, device=options.device, seed=options.seed)
    state = options.policy.with_name(options.policy.name + ".state")
    if state.exists():
        trainer.load(state, batches)
        print(f"going on from step {trainer.step}", flush=True)

    def report(r: Report) -> None:
        print(
            f"step {r.step}: flow {r.flow:.4f} goal {r.goal:.4f} pointing {r.pointing:.3f} "
            f"rate {r.rate:.1e} {r.seconds:.0f} s {r.samples_per_second:.0f} samples/s",
            flush=True,
        )

    until = began + 60 * options.call_minutes
    while True:
        left = min(until - time.monotonic(), 60 * options.save_minutes)
        trainer.run(batches, seconds=left, every=50 if options.device == "cpu" else 100, report=report)
        trainer.save(state, batches)
        size = _save(options.policy, trainer, demonstrations, options)
        print(f"{options.policy}: {size / 1e6:.1f} MB after {trainer.step} steps", flush=True)
        if trainer.done or time.monotonic() >= until:
            return 0 if trainer.done else 3


def _card(options: argparse.Namespace) -> int:
    from .card import model_card

    print(model_card(options.policy, options.evaluations), end="")
    return 0


def _check(image: int, horizon: int, recipe: Recipe) -> None:
    from vla_infer.errors import TrainingError

    if (recipe.image, recipe.horizon) != (image, horizon):
        raise TrainingError(
            f"the demonstrations have pictures of {recipe.image} and chunks of {recipe.horizon}, the preset "
            f"expects {image} and {horizon}: make them with the same --preset"
        )


def _save(policy: Path, trainer: Any, demonstrations: Demonstrations, options: argparse.Namespace) -> int:
    """Weights, and `training.json`: everything a model card states of how they came about."""
    import torch

    from .objective import GOAL
    from .policy_directory import write_weights

    size = write_weights(policy, trainer.average)
    cuda = options.device.startswith("cuda")
    rows = demonstrations.rows
    card = {
        "preset": asdict(PRESETS[options.preset]),
        "parameters": sum(v.numel() for k, v in trainer.average.items() if not k.startswith(GOAL)),
        "weight_bytes": size,
        "demonstrations": {
            **demonstrations.recipe.document(),
            "episodes": len(set(rows["episode"].tolist())),
            "observations": len(demonstrations),
        },
        "plan": {k: v for k, v in asdict(trainer.plan).items() if v != math.inf},
        "precision": options.precision,
        "steps": trainer.step,
        "finished": trainer.done,
        "seconds": round(trainer.seconds, 1),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "history": trainer.history,
    }
    part = policy / "training.json.part"
    part.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    part.replace(policy / "training.json")  # whoever copies the policy meanwhile gets a whole one
    return size


if __name__ == "__main__":
    sys.exit(main())
