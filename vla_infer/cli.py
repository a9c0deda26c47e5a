"""The command line, `vla-infer`."""

from __future__ import annotations
