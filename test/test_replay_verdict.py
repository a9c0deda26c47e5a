"""Whether times got worse: the rule on planted series, several runs of each side, and what the command makes of it.

No test reads a clock to decide: the series are drawn, with the spread between runs that one machine showed and more.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cv2", reason="needs opencv-python-headless")
pytest.importorskip("rosbags", reason="needs rosbags")

from golden import ROOT
from replay_support import write_bag

from vla_infer import replay
from vla_infer.errors import ReplayError
from vla_infer.replay import markdown, repeat, report, resources, runs
from vla_infer.replay.compare import Judging, compare
from vla_infer.replay.verdict import LEVEL, TAIL_LEVEL, judge_ratio, judge_share, left_out, shift

QUIET = {"others_percent": 1.0, "steal_percent": 0.0, "runqueue_wait_percent": 0.5, "yardstick_ms": 0.574}
PERCENTILES = ("count", "mean", "std", "min", "p50", "p90", "p95", "p99", "p99.9", "max")


# ------------------------------------------------------------------- the rule
@pytest.mark.parametrize("sizes", [(4, 4), (5, 5), (5, 7), (6, 4)])
@pytest.mark.parametrize("level", [LEVEL, TAIL_LEVEL])
def test_interval_is_that_of_every_ordering(sizes: tuple[int, int], level: float) -> None:
    """What lies outside, counted over every way in which the runs of two equal sides can be ordered."""
    old, new = sizes
    statistics = []
    for places in combinations(range(old + new), new):
        others = [k for k in range(old + new) if k not in places]
        statistics.append(sum(a < b for a in places for b in others))
    counts = Counter(statistics)
    tails = np.cumsum([counts[k] for k in range(old * new + 1)]) / len(statistics)
    expected = int((tails <= (1 - level) / 2).sum()) - 1
    assert left_out(old, new, level) == (expected if expected >= 0 else None)


def test_slow_run_of_each_side_moves_neither_estimate_nor_interval_much() -> None:
    old = np.array([4.0, 4.02, 4.04, 4.06, 4.08, 4.1, 40.0])
    new = np.array([4.01, 4.03, 4.05, 4.07, 4.09, 4.11, 60.0])
    value, low, high = shift(new[None, :] / old[:, None])
    assert value == pytest.approx(1.0, abs=0.01)
    assert low is not None
    assert high is not None
    assert 0.97 < low < 1.0 < high < 1.03


def drawn(
    random: np.random.Generator, number: int, *, middle: float, spread: float, odd: float = 0.0
) -> np.ndarray:
    """A time of so many runs (ms): heavy-tailed between runs, and some of them up to half as long again."""
    noise = random.standard_t(5, number) / math.sqrt(5 / 3)
    return (
        middle
        * np.exp(spread * noise)
        * np.where(random.random(number) < odd, 1 + random.random(number) / 2, 1)
    )


def decided(random: np.random.Generator, *, factor: float, spread: float, odd: float) -> str:
    """One comparison of 7 and 7 runs of 4.2 ms, with what is measured again where it leaves doubt."""
    old = drawn(random, 7, middle=4.2, spread=spread, odd=odd)
    new = drawn(random, 7, middle=4.2 * factor, spread=spread, odd=odd)
    rule = {"tolerance": 0.10, "whole": 4.2}
    found = judge_ratio("x", list(old), list(new), **rule)
    if found.verdict == "unsure" or (found.verdict == "worse" and not found.clear):
        again = drawn(random, 7, middle=4.2 * factor, spread=spread, odd=odd)
        both = judge_ratio("x", list(old), [*new, *again], **rule).verdict
        alone = judge_ratio("x", list(old), list(again), **rule).verdict
        return "unsure" if both == "worse" != alone else both
    return found.verdict


@pytest.mark.parametrize(
    ("spread", "odd", "alarms", "missed", "unsure"),
    [
        (0.02, 0.0, 0, 0, 0.0),  # what a quiet machine shows
        (0.03, 0.02, 0, 2, 0.02),
        (0.05, 0.05, 2, 8, 0.10),  # far beyond it
    ],
)
def test_false_alarms_and_power(spread: float, odd: float, alarms: int, missed: int, unsure: float) -> None:
    """Of 500 pairs each: none or hardly any alarm without a change, a slowdown of 18 % (of an engine that is slower by
    20 %) said to be the same hardly ever."""
    random = np.random.default_rng(3)
    same = Counter(decided(random, factor=1.0, spread=spread, odd=odd) for _ in range(500))
    slower = Counter(decided(random, factor=1.18, spread=spread, odd=odd) for _ in range(500))
    assert same["worse"] <= alarms
    assert same["unsure"] <= unsure * 500
    assert slower["same"] + slower["better"] <= missed
    assert slower["worse"] >= 500 * (1 - unsure) - missed


def test_one_run_that_holds_much_noise_is_no_alarm() -> None:
    """Tails: p95 of 7 runs with a spread of 10 % between them."""
    random = np.random.default_rng(5)
    found = Counter(
        judge_ratio(
            "p95", list(drawn(random, 7, middle=5.0, spread=0.1)), list(drawn(random, 7, middle=5.0, spread=0.1)),
            tolerance=0.1, whole=4.2, level=TAIL_LEVEL,
        ).verdict
        for _ in range(500)
    )  # fmt: skip
    assert found["worse"] <= 4


@pytest.mark.parametrize(
    ("old", "new", "whole", "expected"),
    [
        (0.30, 0.37, 4.2, "same"),  # 0.07 ms are less than a quarter of the tolerance of 4.2 ms
        (0.30, 0.42, 4.2, "worse"),  # 0.12 ms are more
        (0.30, 0.37, 1.0, "worse"),  # and so are 0.07 of 1 ms
        (0.10, 0.14, 0.2, "same"),  # nobody can tell 0.04 ms
        (4.20, 4.58, 4.2, "same"),  # within the tolerance
        (4.20, 4.70, 4.2, "worse"),
        (4.70, 4.20, 4.7, "better"),
    ],
)
def test_what_counts(old: float, new: float, whole: float, expected: str) -> None:
    spread = 1 + np.linspace(-0.004, 0.004, 7)
    found = judge_ratio("x", list(old * spread), list(new * spread[::-1]), tolerance=0.1, whole=whole)
    assert found.verdict == expected


def test_interval_too_wide_to_tell_is_unsure_and_too_few_runs_are_not_judged() -> None:
    wide = np.array([3.4, 3.6, 3.9, 4.2, 4.6, 5.0, 5.4])
    assert judge_ratio("x", list(wide), list(1.05 * wide), tolerance=0.1, whole=4.2).verdict == "unsure"
    assert judge_ratio("x", list(wide), list(1.15 * wide), tolerance=0.1, whole=4.2).verdict == "unsure"
    assert judge_ratio("x", [4.0] * 3, [8.0] * 3, tolerance=0.1, whole=4.2).verdict == "not judged"


def test_shares_by_their_difference() -> None:
    none = [0.0] * 5
    assert judge_share("dropped", none, [0.10, 0.12, 0.11, 0.09, 0.1], tolerance=0.02).verdict == "worse"
    assert judge_share("dropped", [0.10, 0.12, 0.11, 0.09, 0.1], none, tolerance=0.02).verdict == "better"
    assert judge_share("dropped", none, [0.01] * 5, tolerance=0.02).verdict == "same"
    assert (
        judge_share("dropped", [0.0, 0.1, 0.0, 0.1, 0.0], [0.1, 0.0, 0.2, 0.1, 0.1], tolerance=0.02).verdict
        == "unsure"
    )


# ---------------------------------------------------------------- whole reports
@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A report of one run of the real engine, in this process; its times are replaced by the tests."""
    pytest.importorskip("vla_infer._engine", reason="needs the built engine")
    folder = tmp_path_factory.mktemp("one")
    bag = write_bag(folder / "bag", seconds=1.0)
    assert command(bag, "--json", str(folder / "one.json")) == 0
    return report.read(folder / "one.json")


def command(bag: Path, *words: str) -> int:
    parser = argparse.ArgumentParser()
    replay.add_arguments(parser)
    fixed = [
        str(bag),
        "--policy",
        str(ROOT / "smolvla"),
        "--contract",
        "so101",
        "--threads",
        "1",
        "--patience",
        "0",
    ]
    return replay.main(parser.parse_args([*fixed, "--every-frame", "--quiet", *words]))


def planted(
    one: dict[str, Any], random: np.random.Generator, *, factor: float = 1.0, **measured: float
) -> dict[str, Any]:
    """A run with times drawn anew: 3.8 ms of the engine, `factor` times that where it is slower."""
    made = copy.deepcopy(one)
    common = math.exp(0.02 * random.standard_normal())
    engine, preprocess = 3.8 * factor * common, 0.30 * common * math.exp(0.05 * random.standard_normal())
    for name, middle in (
        ("engine", engine),
        ("preprocess", preprocess),
        ("inference", engine + preprocess + 0.15),
    ):
        tail = middle * (1.08 + 0.05 * random.random())
        values = dict.fromkeys(PERCENTILES, tail) | {
            "count": 237.0,
            "p50": middle,
            "mean": middle,
            "min": 0.9 * middle,
        }
        made["latency_ms"][name] = values
    made["resources"] |= QUIET | measured
    return made


def side(
    one: dict[str, Any], random: np.random.Generator, number: int = 7, **changes: float
) -> dict[str, Any]:
    return runs.merge([planted(one, random, **changes) for _ in range(number)])


def test_slowdown_is_caught_and_noise_is_not_20_of_20(one: dict[str, Any]) -> None:
    random = np.random.default_rng(7)
    for _ in range(20):
        base = side(one, random)
        again = compare(base, side(one, random), Judging())
        assert (again.status, again.doubtful) == (0, False), again.summary
        slower = compare(base, side(one, random, factor=1.2), Judging())
        assert (slower.status, slower.doubtful) == (1, False)  # clear at once
        assert "inference p50" in slower.summary
        assert "engine p50" in slower.summary
        assert "preprocess" not in slower.summary
        faster = compare(base, side(one, random, factor=0.8), Judging())
        assert faster.status == 0
        assert any(f.verdict == "better" for f in faster.findings)


def test_what_is_worse_has_to_be_worse_again(one: dict[str, Any]) -> None:
    random = np.random.default_rng(1)
    base = side(one, random)
    first = [planted(one, random, factor=1.2) for _ in range(7)]
    good, bad = ([planted(one, random, factor=f) for _ in range(7)] for f in (1.0, 1.2))
    held = compare(base, runs.merge(first + bad), Judging(), further=runs.merge(bad))
    assert held.status == 1
    gone = compare(base, runs.merge(first + first + good), Judging(), further=runs.merge(good))
    assert not gone.worse
    assert gone.status == 3  # some of its runs were slower, and nobody knows why
    assert "inference p50 ms changed by" in gone.summary


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        ({"others_percent": 34.0}, "other programs used 34 % of the processors"),
        ({"runqueue_wait_percent": 20.0}, "its threads waited for a processor for 20 % of the time"),
        ({"steal_percent": 6.0}, "the host of this virtual machine kept 6 % of the processors"),
    ],
)
@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_disturbed_runs_are_no_verdict(
    one: dict[str, Any], measured: dict[str, float], said: str, factor: float
) -> None:
    """Neither that it got worse nor that it did not; what it does is judged all the same."""
    random = np.random.default_rng(2)
    base, good = side(one, random), [planted(one, random) for _ in range(4)]
    bad = [planted(one, random, factor=factor, **measured) for _ in range(3)]
    found = compare(base, runs.merge(good + bad), Judging())
    assert (found.status, found.worse, found.doubtful) == (3, False, False)
    assert "no verdict on times: disturbed: 4 of 7 runs of this report were not" in found.summary
    assert any(said in note for note in found.notes)
    assert {f.verdict for f in found.findings if f.name.startswith("inference")} == {"not judged"}
    assert compare(runs.merge(good + bad), base, Judging()).status == 3
    spoilt = runs.merge(good + bad)
    spoilt["actions"] = copy.deepcopy(spoilt["actions"])
    values = np.stack(list(report.load_actions(spoilt).values())) * 1.01
    spoilt["actions"]["data"] = report.base64.b64encode(values.astype("<f4").tobytes()).decode()
    assert compare(base, spoilt, Judging()).status == 1
    # One more undisturbed run of five is enough, and the disturbed ones do not count.
    enough = compare(base, runs.merge([*good, planted(one, random), *bad]), Judging())
    assert enough.status == 0, enough.summary


def test_another_clock_is_no_verdict_unless_the_sides_ran_in_turn(one: dict[str, Any]) -> None:
    random = np.random.default_rng(4)
    base, other = side(one, random), side(one, random, factor=1.2, yardstick_ms=0.574 * 1.2)
    found = compare(base, other, Judging())
    assert (found.status, found.worse) == (3, False)
    assert "clocked otherwise" in found.summary
    assert compare(base, other, Judging(turns=True)).status == 1
    other["software"] = other["software"] | {"python": "3.99"}
    assert compare(base, other, Judging()).status == 1  # another hash library, perhaps


def test_few_runs_other_machines_and_actions_only(one: dict[str, Any]) -> None:
    random = np.random.default_rng(6)
    base = side(one, random)
    single = compare(planted(one, random), side(one, random, factor=2.0), Judging())
    assert (single.status, single.worse) == (3, False)
    assert "the baseline is of 1 run, 5 are needed; give --repeat 7 for it" in single.summary
    assert "this report is of 4 runs" in compare(base, side(one, random, 4), Judging()).summary
    slower = side(one, random, factor=2.0)
    only = compare(base, slower, Judging(times=False))
    assert (only.status, [f for f in only.findings if "ms" in f.name]) == (0, [])
    slower["host"] = slower["host"] | {"processor": "another"}
    assert compare(base, slower, Judging()).status == 0
    assert any("times are not compared" in note for note in compare(base, slower, Judging()).notes)


def test_report_of_several_runs(one: dict[str, Any], tmp_path: Path) -> None:
    random = np.random.default_rng(8)
    documents = [planted(one, random) for _ in range(6)] + [
        planted(one, random, factor=0.1, others_percent=60.0)
    ]
    merged = runs.merge(documents)
    report.write(merged, tmp_path / "merged.json")
    assert report.read(tmp_path / "merged.json") == merged
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema")
    jsonschema.validate(
        json.loads((tmp_path / "merged.json").read_text()), report.check.__globals__["schema"]()
    )
    assert len(merged["runs"]) == 7
    middles = sorted(d["latency_ms"]["inference"]["p50"] for d in documents[:6])
    assert merged["latency_ms"]["inference"]["p50"] == middles[2]  # of those that nobody disturbed
    assert "The middle one of 7 runs, 6 of them undisturbed" in markdown.markdown(merged)
    assert "The middle one" not in markdown.markdown(one)
    other = copy.deepcopy(documents[0])
    other["policy"]["fingerprint"] = "f" * 64
    with pytest.raises(ReplayError, match="the policy changed between the runs"):
        runs.merge([*documents, other])
    merged["runs"][0]["latency_ms"]["engine"] = "fast"
    report.write(merged, tmp_path / "bad.json")
    with pytest.raises(
        ReplayError, match=r"report.runs\[0\].latency_ms.engine: expected object or null, got str"
    ):
        report.read(tmp_path / "bad.json")


# ---------------------------------------------------------------- running them
def test_sides_run_in_turn_until_each_has_enough(one: dict[str, Any]) -> None:
    order: list[str] = []
    random = np.random.default_rng(0)

    def runner(name: str, disturbed: set[int]) -> Any:
        def run() -> dict[str, Any]:
            order.append(name)
            return planted(one, random, others_percent=50.0 if order.count(name) in disturbed else 0.0)

        return run

    repeat.in_turn([runner("a", set()), runner("b", {2})], 3, lambda: order.append("-"))
    assert "".join(order) == "abab-abab"
    order.clear()
    repeat.in_turn([runner("a", set(range(99)))], 3, lambda: order.append("-"))
    assert "".join(order) == "a-" * 6  # and not for ever


def test_patience_ends_when_the_machine_is_quiet_or_it_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2 processors, 1.2 s (30 %) are used in each of the first three intervals of 2 s, then nothing."""
    clock, used = (
        [0.0],
        [0.0, 1.2, 1.2, 2.4, 2.4, 3.6, 3.6, 3.6, *[3.6 + k for k in range(1, 9) for _ in "ab"]],
    )
    monkeypatch.setattr(repeat, "machine", lambda: (used.pop(0), 0.0))
    monkeypatch.setattr(repeat.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(repeat.time, "sleep", lambda seconds: clock.append(clock[-1] + seconds))
    wait = repeat.Patience(argparse.Namespace(patience=11.0, quiet=True))
    wait()
    assert clock[-1] == 8.0
    used[:] = [2.0 * k for k in range(20)]  # busy from now on
    wait()
    assert clock[-1] == 12.0
    wait()
    assert clock[-1] == 12.0


def test_every_option_of_a_run_reaches_it() -> None:
    parser = argparse.ArgumentParser()
    replay.add_arguments(parser)
    words = [
        "bag", "--policy=p", "--contract=c", "--mode=loop", "--device=cpu:avx2", "--precision=bf16", "--steps=4",
        "--threads=3", "--instruction=-x y", "--remap=a:=b", "--remap=c:=d", "--seconds=2.5", "--every-frame",
        "--rate=12.0", "--domain=7", "--deadline=80.0", "--warmup=5", "--buffer=64",
    ]  # fmt: skip
    plain = vars(parser.parse_args(["bag", "--policy=x", "--contract=y"]))
    asked = parser.parse_args(words)
    of_all = set(repeat._OF_ALL)
    assert {
        name for name, value in vars(asked).items() if value == plain[name]
    } == of_all  # a new option is in either
    assert vars(parser.parse_args(repeat.words(asked))) == vars(asked)
    everything = parser.parse_args(
        [*words, "--repeat=3", "--json=x", "--html=y", "--against=z", "--tolerance=0.5"]
    )
    assert repeat.words(everything) == repeat.words(asked)


def test_number_of_runs(one: dict[str, Any]) -> None:
    def number(baseline: dict[str, Any] | None, *words: str) -> int:
        parser = argparse.ArgumentParser()
        replay.add_arguments(parser)
        return repeat.default_number(
            parser.parse_args(["bag", "--policy=x", "--contract=y", *words]), baseline
        )

    base = side(one, np.random.default_rng(0), 9)
    base["settings"] = base["settings"] | {"repeat": 6}
    assert number(None) == 1
    assert number(None, "--against-python=python3") == repeat.IN_TURN
    assert number(base) == 6
    assert number(base, "--actions-only") == 1
    assert number(one) == 1
    assert number(side(one, np.random.default_rng(0), others_percent=80.0)) == 1  # no verdict can come of it


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--repeat", "0"), "--repeat: expected 1 or more, got 0"),
        (("--repeat", "2", "--record", "x", "--mode", "loop"), "--record: one run is recorded"),
        (("--against", "x.json", "--against-python", "y"), "one baseline at a time"),
        (("--against-python", "y", "--mode", "loop"), "--against-python: only --mode direct"),
        (("--patience", "-1"), "--patience: expected 0 or more"),
    ],
)
def test_wrong_usage_is_one_line(words: tuple[str, ...], complaint: str) -> None:
    parser = argparse.ArgumentParser()
    replay.add_arguments(parser)
    with pytest.raises(ReplayError, match=complaint):
        replay.main(parser.parse_args(["nowhere", "--policy=x", "--contract=y", *words]))


def test_run_that_fails_is_said(tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match=r"run 1 ended with status 1: .*nowhere"):
        command(tmp_path / "nowhere", "--repeat", "2")
    with pytest.raises(ReplayError, match=r"--against-python .*/no-python: No such file"):
        command(tmp_path / "nowhere", "--against-python", str(tmp_path / "no-python"))


def test_command_repeats_compares_and_exits(
    tmp_path: Path, one: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two real runs in processes of their own: too few for times, enough for actions."""
    bag, base, page = write_bag(tmp_path / "bag", seconds=1.0), tmp_path / "base.json", tmp_path / "page.html"
    assert command(bag, "--repeat", "2", "--json", str(base), "--html", str(page)) == 0
    document = report.read(base)
    assert 2 <= len(document["runs"]) <= 4  # a disturbed one is made again
    assert document["settings"]["repeat"] == 2
    assert page.stat().st_size > 10_000
    for run in document["runs"]:
        assert run["resources"]["yardstick_ms"] > 0
        assert run["resources"]["others_percent"] is not None
    capsys.readouterr()
    assert command(bag, "--against", str(base)) == 3
    assert "no verdict on times: the baseline is of" in capsys.readouterr().out
    assert command(bag, "--against", str(base), "--actions-only") == 0
    assert capsys.readouterr().out == "no regression\n"


def test_other_python_is_run_with_its_own_package(tmp_path: Path, one: dict[str, Any]) -> None:
    """A stand-in for another environment: a package of the same name, elsewhere, whose replay answers with a report."""
    package = tmp_path / "site" / "vla_infer"
    package.mkdir(parents=True)
    answer = copy.deepcopy(one)
    answer["software"]["commit"] = "the other"
    report.write(answer, tmp_path / "answer.json")
    (package / "__init__.py").write_text("")
    (package / "cli.py").write_text(
        "import shutil\n"
        "def main(words):\n"
        "    at = next(w.removeprefix('--json=') for w in words if w.startswith('--json='))\n"
        f"    shutil.copyfile({str(tmp_path / 'answer.json')!r}, at)\n"
        "    return 0\n"
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{tmp_path / "site"}" exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    bag, args = write_bag(tmp_path / "bag", seconds=1.0), argparse.ArgumentParser()
    replay.add_arguments(args)
    asked = args.parse_args(
        [str(bag), "--policy", str(ROOT / "smolvla"), "--contract", "so101", "--threads", "1"]
    )
    theirs, ours = repeat._Side(asked, 1, tmp_path, other=str(python)), repeat._Side(asked, 1, tmp_path)
    assert theirs.run()["software"]["commit"] == "the other"
    assert ours.run()["software"]["commit"] != "the other"


# --------------------------------------------------------------- what is measured
def test_others_are_what_is_neither_idle_nor_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.5 s of 2 processors: 0.6 s busy, 0.3 s of it ours; 0.05 s stolen."""
    monkeypatch.setattr(resources.os, "sched_getaffinity", lambda _: {0, 1})
    sampler = resources.Sampler(1)
    sampler._machine = [(10.0, 1.0, 5.0), (10.6, 1.05, 5.3)]
    assert sampler._others(0.5) == {"others_percent": 30.0, "steal_percent": 5.0}
    sampler._machine = [(10.0, 1.0, 5.0), (10.2, 1.0, 5.3)]
    assert sampler._others(0.5)["others_percent"] == 0.0  # accounting is in ticks of 10 ms
    sampler._machine = []
    assert sampler._others(0.5)["others_percent"] is None  # no /proc/stat: not known


def test_machine_counts_the_usable_processors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = "cpu 9 9 9 9 9 9 9 9 0 0\ncpu0 100 20 3 500 0 7 8 40 0 0\ncpu1 1 1 1 1 1 1 1 1 0 0\nintr 1 2\n"
    (tmp_path / "stat").write_text(text)
    monkeypatch.setattr(resources.os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(resources, "Path", lambda _: tmp_path / "stat")
    monkeypatch.setattr(resources, "_TICKS", 100)
    assert resources.machine() == (1.23, 0.4)


def test_report_of_before_is_judged_by_its_load(one: dict[str, Any]) -> None:
    old = runs.figures(one)
    old["resources"] = {"cpu_percent": 90.0}
    for load, expected in ((0.5, None), (7.0, "the load before it was 7.0 on 2 processors")):
        old["load"] = load
        assert runs.disturbance(old, 2) == expected
