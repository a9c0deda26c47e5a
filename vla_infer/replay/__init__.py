"""Replays a recording through a policy and measures what comes out, how late, and whether it got worse.

The modules: `bag` and `observe` read a rosbag2 recording into observations; `direct` and `live` are the
modes; each writes a `trace`, from which `metrics` and `agreement` make figures; `report`, `markdown` and
`page` present them; `compare` sets two reports against each other.
"""

from __future__ import annotations

from .command import add_arguments, main

__all__ = ["add_arguments", "main"]
