"""The report of a replay, its page, and the comparison of two."""

from __future__ import annotations

import argparse
import copy
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cv2", reason="needs opencv-python-headless")
pytest.importorskip("rosbags", reason="needs rosbags")

from golden import ROOT
from replay_support import KnownPolicy, write_bag

from vla_infer import replay
from vla_infer.contract import load_contract
from vla_infer.contract_parse import find_contract
from vla_infer.errors import ReplayError
from vla_infer.replay import age, compare, markdown, report, runs
from vla_infer.replay.agreement import read_recorded
from vla_infer.replay.bag import Bag
from vla_infer.replay.direct import DirectOptions, replay_direct
from vla_infer.replay.observe import map_topics
from vla_infer.replay.page import page
from vla_infer.replay.page_frames import PageInputs, Snapshots
from vla_infer.replay.schema import schema

JUDGING = compare.Judging()


@pytest.fixture(scope="module")
def bag_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bag(tmp_path_factory.mktemp("bags") / "bag", seconds=3.0)


def run(path: Path, *, every_frame: bool = False, instruction: str = "") -> tuple[dict[str, Any], PageInputs]:
    contract, bag = load_contract("so101"), Bag(path)
    topics, policy = map_topics(bag, contract, {}), KnownPolicy(engine=0.02)
    snapshots = Snapshots(bag.duration * 1e-9)
    options = DirectOptions(
        clock=policy.clock, frames=snapshots.add, every_frame=every_frame, instruction=instruction
    )
    trace = replay_direct(policy, contract, bag, topics, options)
    recorded = read_recorded(bag, contract, topics)
    subject = report.Subject(bag, topics, contract, find_contract("so101"), policy.info)
    outcome = report.Outcome(trace, recorded, {"cpu_percent": 12.5}, {"every_frame": every_frame}, {}, 0.5)
    return report.build(subject, outcome, deadline=0.2, warmup=3), PageInputs(trace, recorded, snapshots)


@pytest.fixture(scope="module")
def made(bag_path: Path) -> tuple[dict[str, Any], PageInputs]:
    return run(bag_path)


@pytest.fixture(scope="module")
def engine_report(bag_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A report of the real CPU engine, through the command line."""
    pytest.importorskip("vla_infer._engine", reason="needs the built engine")
    path = tmp_path_factory.mktemp("reports") / "engine.json"
    assert command(bag_path, "--every-frame", "--quiet", "--json", str(path)) == 0
    return report.read(path)


def command(bag: Path, *words: str) -> int:
    parser = argparse.ArgumentParser()
    replay.add_arguments(parser)
    fixed = [str(bag), "--policy", str(ROOT / "smolvla"), "--contract", "so101", "--threads", "2"]
    return replay.main(parser.parse_args([*fixed, *words]))


# --------------------------------------------------------------------- schema
def test_report_is_valid_by_jsonschema_too(made: tuple[dict[str, Any], PageInputs]) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(json.loads(json.dumps(made[0])), schema())


@pytest.mark.parametrize(
    ("place", "value", "complaint"),
    [
        (("format",), "vla_infer/replay/9", "report.format: expected 'vla_infer/replay/1'"),
        (("mode",), "sideways", "report.mode: expected one of"),
        (("frames", "inferences"), 0, "report.frames.inferences: expected at least 1, got 0"),
        (("latency_ms", "engine", "p50"), "fast", "report.latency_ms.engine.p50: expected number, got str"),
        (("bag", "messages"), True, "report.bag.messages: expected integer, got bool"),
        (("frames", "extra"), 1, "report.frames: extra is not known"),
        (("samples", "engine"), [1.0, None], r"report.samples.engine\[1\]: expected number, got NoneType"),
    ],
)
def test_schema_names_what_is_wrong(
    made: tuple[dict[str, Any], PageInputs],
    tmp_path: Path,
    place: tuple[str, ...],
    value: object,
    complaint: str,
) -> None:
    document = copy.deepcopy(made[0])
    target = document
    for name in place[:-1]:
        target = target[name]
    target[place[-1]] = value
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ReplayError, match=complaint):
        report.read(path)
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema())


def test_what_is_no_report_is_one_line(tmp_path: Path, made: tuple[dict[str, Any], PageInputs]) -> None:
    for text in ("", "[]", "{", "{}"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ReplayError, match=r"x\.json"):
            report.read(tmp_path / "x.json")
    cut = copy.deepcopy(made[0])
    cut["actions"]["data"] = cut["actions"]["data"][:-8]
    with pytest.raises(ReplayError, match="actions: the data are not float32"):
        report.load_actions(cut)


def test_written_report_is_read_back(made: tuple[dict[str, Any], PageInputs], tmp_path: Path) -> None:
    report.write(made[0], tmp_path / "deep" / "a.json")
    assert report.read(tmp_path / "deep" / "a.json") == made[0]
    chunks = report.load_actions(made[0])
    by_key = {one.key: one.actions for one in made[1].trace.inferences}
    assert chunks
    for key, actions in chunks.items():
        np.testing.assert_array_equal(actions, by_key[key])


def test_middleware_is_asked_of_ros(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rclpy", reason="needs rclpy")
    monkeypatch.delenv("RMW_IMPLEMENTATION", raising=False)  # as with ROS from wheels
    assert str(report.software()["rmw"]).startswith("rmw_")


def test_parts_of_the_age_add_up(made: tuple[dict[str, Any], PageInputs]) -> None:
    """Of 240 commands each chunk plays two, the first 5 ms after it is ready; received 1 ms, a few 31 ms later."""
    document = copy.deepcopy(made[0])
    count, k = 240, np.arange(240)
    stamp = (k // 2) * 0.04
    time = stamp + 0.019 + 0.02 * (k % 2)
    delay = np.where(k % 60 == 59, 31.0, 1.0)
    late_age = (time - stamp) * 1e3 + delay
    document["trace"]["inferences"] = {
        "sequence": list(range(1, 121)), "stamp": list(stamp[::2]), "bag_time": list(stamp[::2]),
        "taken": list(stamp[::2] + 0.004), "ready": list(stamp[::2] + 0.014), "engine_ms": [9.0] * 120,
    }  # fmt: skip
    document["trace"]["ticks"] = {
        "time": [0.0, *time, 9.0], "age_ms": [None, *late_age, 5.0], "chunk": [None, *(k // 2 + 1), 999],
        "state": ["waiting", *["played"] * count, "held"],
    }  # fmt: skip
    expected = np.stack(
        [np.full(count, 4.0), np.full(count, 10.0), np.full(count, 5.0), 20.0 * (k % 2), delay], 1
    )
    np.testing.assert_allclose(age.parts(document), expected, atol=1e-6)
    assert age.split(document) is None  # in direct mode
    assert "What the age consists of" not in markdown.markdown(document)
    document["mode"] = "timeline"
    means = age.split(document)
    assert means is not None
    np.testing.assert_allclose(means[0], [4.0, 10.0, 5.0, 10.0, 1.5], atol=1e-6)
    np.testing.assert_allclose(means[1], [4.0, 10.0, 5.0, 20.0, 31.0], atol=1e-6)
    text = markdown.markdown(document)
    assert f"| {age.PARTS[3]} | 10.00 | 20.00 |" in text
    assert "| capture → command | 30.50 | 70.00 |" in text
    for column in document["trace"]["ticks"].values():
        del column[150:]
    assert age.split(document) is None  # too few


def test_markdown_has_the_figures(made: tuple[dict[str, Any], PageInputs]) -> None:
    text = markdown.markdown(made[0])
    age = made[0]["latency_ms"]["capture_to_command"]
    assert f"| {age['p50']:.2f} | {age['p90']:.2f} |" in text
    assert "NUM_MISSED_FRAMES" in text
    assert "recorded commands" in text


# -------------------------------------------------------------------- compare
def spoil(document: dict[str, Any], change: np.ndarray) -> dict[str, Any]:
    made = copy.deepcopy(document)
    chunks = report.load_actions(document)
    values = np.stack(list(chunks.values())) * change
    made["actions"]["data"] = report.base64.b64encode(values.astype("<f4").tobytes()).decode()
    return made


def test_run_against_itself_and_action_errors(engine_report: dict[str, Any]) -> None:
    width = engine_report["actions"]["shape"][2]
    assert not compare.compare(engine_report, engine_report, JUDGING).worse
    everywhere = compare.compare(engine_report, spoil(engine_report, np.full(width, 1.01)), JUDGING)
    assert "actions, relative error" in everywhere.summary
    for joint in range(width):
        one = np.ones(width)
        one[joint] = 1.01
        found = compare.compare(engine_report, spoil(engine_report, one), JUDGING)
        name = engine_report["contract"]["joints"][joint]
        assert f"actions of {name}" in found.summary
        value = next(f.value for f in found.findings if f.name.startswith(f"actions of {name}"))
        assert value == pytest.approx(0.01, rel=1e-2)
    rounding = compare.compare(engine_report, spoil(engine_report, np.full(width, 1.0001)), JUDGING)
    assert not rounding.worse
    lost = compare.compare(engine_report, spoil(engine_report, np.full(width, np.nan)), JUDGING)
    assert "not finite" in lost.summary


def test_command_fails_with_exit_1(engine_report: dict[str, Any], bag_path: Path, tmp_path: Path) -> None:
    """The same bag through the engine again: its actions are equal, so only the baseline's are planted."""
    report.write(spoil(engine_report, np.full(6, 1.01)), tmp_path / "bad.json")
    words = ("--every-frame", "--quiet", "--actions-only", "--against", str(tmp_path / "bad.json"))
    assert command(bag_path, *words) == 1
    good = copy.deepcopy(engine_report)
    good["host"]["processor"] = "another"
    report.write(good, tmp_path / "good.json")
    text = tmp_path / "out.md"
    words = ("--every-frame", "--quiet", "--against", str(tmp_path / "good.json"), "--markdown", str(text))
    assert command(bag_path, *words) == 0
    assert "times are not compared" in text.read_text()
    assert "no regression" in text.read_text()


def test_engine_does_what_it_did_when_the_baseline_was_made(tmp_path: Path) -> None:
    """The project's own use of --against: the CPU engine's actions, on whatever instruction set this is."""
    pytest.importorskip("vla_infer._engine", reason="needs the built engine")
    bag = write_bag(tmp_path / "bag", seconds=1.0)
    text = tmp_path / "out.md"
    baseline = Path(__file__).parent / "replay_baseline.json"
    words = (
        "--every-frame",
        "--quiet",
        "--actions-only",
        "--against",
        str(baseline),
        "--markdown",
        str(text),
    )
    assert command(bag, *words) == 0, text.read_text()
    assert "| actions, relative error | 0 |" in text.read_text()  # observations of both runs were found


def test_shares_are_compared(made: tuple[dict[str, Any], PageInputs]) -> None:
    worse = copy.deepcopy(made[0])
    worse["control"]["deadline_misses"] = worse["control"]["commands_played"] // 5
    before, after = runs.merge([made[0]] * 5), runs.merge([worse] * 5)
    found = compare.compare(before, after, JUDGING)
    assert "deadline misses (+19.86 %)" in found.summary
    assert found.status == 1
    assert compare.compare(after, before, JUDGING).status == 0


def test_only_like_is_compared(made: tuple[dict[str, Any], PageInputs]) -> None:
    other = copy.deepcopy(made[0])
    other["bag"]["sha256"] = "f" * 64
    with pytest.raises(ReplayError, match="the baseline is of another bag"):
        compare.compare(other, made[0], JUDGING)
    other = copy.deepcopy(made[0])
    other["contract"]["sha256"] = "f" * 64
    found = compare.compare(other, made[0], JUDGING)
    assert {f.name.split()[0].strip(",") for f in found.findings} == {"actions", "open-loop"}


def test_bootstrap_interval_covers() -> None:
    """The 95 % interval of a median holds the true median about that often, for correlated samples too."""
    random = np.random.default_rng(1)
    hits = 0
    for _ in range(100):
        noise = random.standard_normal(400)
        values = np.convolve(noise, np.ones(5) / 5, mode="same")
        low, high = compare.interval(np.percentile(compare.resampled(values, random, rounds=300), 50, axis=1))
        hits += low <= 0.0 <= high
    assert hits >= 85


# ----------------------------------------------------------------------- page
def test_page_is_self_contained(made: tuple[dict[str, Any], PageInputs]) -> None:
    text = page(*made)
    without_data = text.replace("http://www.w3.org/2000/svg", "")
    assert "http://" not in without_data
    assert "https://" not in without_data
    assert text.count("data:image/jpeg;base64,") >= 40
    assert len(text) < 3_000_000


def test_instruction_cannot_break_out_of_the_page(bag_path: Path) -> None:
    document, inputs = run(bag_path)
    document["settings"]["instruction"] = "</script><script>document.title='taken'</script>"
    document["bag"]["name"] = "<img src=x onerror=alert(1)>"
    text = page(document, inputs)
    assert text.count("</script>") == 2
    assert "<img" not in text


@pytest.mark.parametrize("every_frame", [False, True])
def test_page_draws_in_a_browser(bag_path: Path, tmp_path: Path, *, every_frame: bool) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium")
    document, inputs = run(bag_path, every_frame=every_frame)
    ran = document["trace"][
        "inferences"
    ]  # one so slow that it lies above the axis, in both series of "Latency"
    ran["ready"][5], ran["engine_ms"][5] = ran["taken"][5] + 0.910, 900.0
    (tmp_path / "page.html").write_text(page(document, inputs), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    flags += " --disable-background-networking --disable-component-update --enable-logging=stderr"
    done = subprocess.run(
        [browser, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000",
         "--dump-dom", (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr  # where the page's errors would be
    assert "Everything else" in done.stdout  # the last section: the script came to its end
    titles = ["Latency", "Predicted and recorded actions", "Open-loop error", "What happened when"]
    titles += [] if every_frame else ["Age at actuation"]
    for title in titles:
        assert f"<h2>{title}</h2>" in done.stdout
    assert "NaN" not in done.stdout.split('id="data"')[0]
    latency = done.stdout.split("<h2>Latency</h2>")[1].split("</section>")[0]
    assert re.findall("▲ [^<]*", latency) == ["▲ 2 above, up to 910"]  # not one note upon another
