"""How far int8 turns the actions of the golden policies: cosines against float32 over random observations.

    PYTHONPATH=. python test/int8_cosine.py --observations 64

An observation is two random pictures, a random state and random noise. Compared are the actions and, stricter, what
the policy adds to the noise it started from.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from golden import ROOT

from vla_infer.policy import Policy, load_policy

FAMILIES = ("smolvla", "pi0", "pi05")
TASK = "pick up the cube"


@dataclass(frozen=True)
class Cosine:
    """The lowest cosines of one policy: of actions (model units), and of actions less noise."""

    actions: float
    added: float


def cosine(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def worst(
    family: str, observations: int, *, device: str = "cpu", precision: str = "int8", seed: int = 0
) -> Cosine:
    """The worst of `observations` random observations of a golden policy."""
    exact = load_policy(ROOT / family)
    quick = load_policy(ROOT / family, device=device, precision=precision)
    random = np.random.default_rng(seed)
    shape = exact._programs[0][1].inputs["actions"].shape
    low = Cosine(1.0, 1.0)
    for _ in range(observations):
        images = {name: random.integers(0, 256, (48, 64, 3), dtype=np.uint8) for name in exact.info.cameras}
        state = random.standard_normal(exact.info.state_dim)
        noise = random.standard_normal(shape).astype(np.float32)

        def actions(policy: Policy) -> npt.NDArray[np.float32]:
            policy.predict(images, state, TASK, noise=noise)  # noqa: B023
            tokens = len(policy._processors.encode(state.astype(np.float32), TASK).tokens)  # noqa: B023
            return policy._program(tokens).result("actions")

        want, got = actions(exact), actions(quick)
        low = Cosine(min(low.actions, cosine(got, want)), min(low.added, cosine(got - noise, want - noise)))
    return low


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--observations", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    print(f"lowest cosine over {args.observations} observations, {args.device}: actions, actions less noise")
    for family in FAMILIES:
        low = worst(family, args.observations, device=args.device)
        print(f"{family:8} {low.actions:.5f} {low.added:.5f}", flush=True)


if __name__ == "__main__":
    main()
