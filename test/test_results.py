"""The reports under benchmarks/results/: valid, in agreement with their tables and with themselves."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cv2", reason="needs opencv-python-headless")
pytest.importorskip("rosbags", reason="needs rosbags")

from vla_infer.replay import age, report
from vla_infer.replay.markdown import markdown

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
REPORTS = sorted(RESULTS.glob("*-replay-*.json"))
OF_A_MACHINE = re.compile(r"/(home|root|tmp|work|opt|usr|mnt|var|srv|data)/|://|@")


def test_there_are_reports() -> None:
    assert REPORTS


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_report_is_what_its_tables_say(path: Path) -> None:
    document = report.read(path)
    report.load_actions(document)
    assert path.with_suffix(".md").read_text(encoding="utf-8") == markdown(document)


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_ages_are_found_again_in_the_trace(path: Path) -> None:
    document = report.read(path)
    found, said = age.parts(document).sum(axis=1), document["latency_ms"]["capture_to_command"]
    assert len(found) == said["count"] == document["control"]["commands_played"]
    for name in ("p50", "p90", "p95", "p99", "p99.9", "max"):
        percent = 100.0 if name == "max" else float(name[1:])
        assert np.percentile(found, percent) == pytest.approx(said[name], abs=2e-3)  # ages are kept to 1 µs
    assert (found > document["control"]["deadline_ms"]).sum() == document["control"]["deadline_misses"]


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_report_names_the_commit_and_no_place_of_a_machine(path: Path) -> None:
    document = report.read(path)
    assert document["software"]["commit"]
    document["actions"]["data"] = ""  # base64 has slashes
    assert not OF_A_MACHINE.search(str(document))
