"""Sizes of the policies that are trained here, in the names and shapes of SmolVLA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vla_infer.random_weights import Decoder, Sizes, Vision


@dataclass(frozen=True)
class Preset:
    """A policy to train. denoising: Euler steps that config.json asks for; vocabulary counts are in `sizes`."""

    name: str
    sizes: Sizes
    denoising: int


def _preset(name: str, vision: Vision, text: Decoder, expert: Decoder, horizon: int) -> Preset:
    return Preset(name, Sizes(vision, text, expert, 512, horizon, scale_factor=2), denoising=5)


#: `small` is the demonstration policy; `tiny` learns one task on a processor, to show that training works.
#: Heads are 64 wide as SmolVLM2's are, so that no file beside LeRobot's has to say so.
PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        _preset(
            "small",
            Vision(hidden=192, layers=6, heads=3, mlp=768, patch=8, image=96),
            Decoder(width=256, depth=4, mlp=768, heads=4, kv_heads=2, head_dim=64),
            Decoder(width=192, depth=4, mlp=512, heads=4, kv_heads=2, head_dim=64),
            horizon=30,
        ),
        _preset(
            "tiny",
            Vision(hidden=64, layers=2, heads=1, mlp=128, patch=8, image=64),
            Decoder(width=64, depth=4, mlp=128, heads=2, kv_heads=2, head_dim=64),
            Decoder(width=64, depth=4, mlp=128, heads=2, kv_heads=2, head_dim=64),
            horizon=20,
        ),
    )
}
