"""The cases of test/fuzz.py, chosen by what they cover: needs atheris (`pip install atheris`, libFuzzer for Python).

    python test/fuzz_coverage.py checkpoint -runs=200000 -seed=1
    python test/fuzz_coverage.py message crash-0123abcd          one case again, from the file that libFuzzer left

What follows the target's name are libFuzzer's own options. Every choice that a case makes is drawn from
libFuzzer's bytes, and the package's branches are what it is guided by. Ends at the first error that is not one of
the package's own, with a status other than 0.
"""

from __future__ import annotations

import os
import random
import sys

try:
    import atheris
except ImportError:
    sys.exit("fuzz_coverage: atheris is missing; install it with `pip install atheris`")

with atheris.instrument_imports(include=["vla_infer"]):
    import fuzz

    from vla_infer.errors import VlaInferError


class Drawn(random.Random):
    """Random numbers that are the bytes of `data` in turn, and zeros after them."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._data, self._at = data, 0

    def getrandbits(self, k: int) -> int:
        size = (k + 7) // 8
        part = self._data[self._at : self._at + size]
        self._at += size
        return int.from_bytes(part, "little") & ((1 << k) - 1)

    def random(self) -> float:
        return self.getrandbits(16) / 65536.0


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in fuzz.TARGETS:
        sys.exit(f"fuzz_coverage: expected one of {', '.join(fuzz.TARGETS)} and libFuzzer's options")
    name = sys.argv.pop(1)
    target = fuzz.TARGETS[name]()

    def one(data: bytes) -> None:
        try:
            target(Drawn(data))
        except VlaInferError as error:
            fuzz.check_text(str(error), "this case")

    os.environ["OPENCV_LOG_LEVEL"] = "SILENT"
    atheris.Setup([*sys.argv, "-max_len=1024", "-len_control=0"], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
