"""The command line: verbs, errors, doctor, and the arguments of run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from vla_infer import cli, doctor, run
from vla_infer.doctor import FAIL, PASS, WARN

GOLDEN = Path(__file__).parent / "golden" / "smolvla"
SHIPPED = Path(__file__).parents[1] / "config"


def parse(module: object, *words: str) -> object:
    import argparse

    parser = argparse.ArgumentParser()
    module.add_arguments(parser)  # type: ignore[attr-defined]
    return parser.parse_args(words)


class TestVerbs:
    @pytest.mark.parametrize("verb", cli.VERBS)
    def test_every_verb_can_be_asked_for_help(self, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stop:
            cli.main([verb, "--help"])
        assert stop.value.code == 0
        assert f"usage: vla-infer {verb}" in capsys.readouterr().out

    def test_no_verb_lists_them(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([]) == 2
        output = capsys.readouterr().out
        assert all(verb in output for verb in cli.VERBS)

    def test_misspelled_verb_names_the_nearest(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["docter"]) == 2
        assert capsys.readouterr().err == "vla-infer: there is no verb 'docter'; did you mean doctor?\n"

    def test_missing_module_is_one_line_with_the_mend(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "rclpy", None)
        monkeypatch.delitem(sys.modules, "vla_infer.node", raising=False)
        assert cli.main(["run", "policy", "so101"]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "rclpy" in error
        assert "setup.bash" in error

    def test_typed_error_is_one_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["bench", "--policy", str(tmp_path)]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert str(tmp_path) in error


class TestRun:
    def test_dry_run_unless_armed(self) -> None:
        assert "dry_run:=true" in run.ros_arguments(parse(run, "p", "so101"))  # type: ignore[arg-type]
        assert "dry_run:=false" in run.ros_arguments(parse(run, "p", "so101", "--arm"))  # type: ignore[arg-type]

    def test_values_keep_their_types(self) -> None:
        words = run.ros_arguments(
            parse(
                run,
                "1e3",
                "so101",
                "--control-rate",
                "100",
                "--instruction",
                'say "on": now',
                "--namespace",
                "/left",
            )
        )  # type: ignore[arg-type]
        assert 'policy:="1e3"' in words
        assert "control_rate:=100.0" in words
        assert 'instruction:="say \\"on\\": now"' in words
        assert "__ns:=/left" in words
        assert not any(word.startswith(("threads", "calibrate_first")) for word in words)
        words = run.ros_arguments(parse(run, "p", "so101", "--calibrate-first", "32"))  # type: ignore[arg-type]
        assert "calibrate_first:=32" in words

    def test_node_starts_and_ends_on_sigint(self) -> None:
        pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")
        process = subprocess.Popen(
            [sys.executable, "-m", "vla_infer.cli", "run", str(GOLDEN), "so101", "--instruction", "yes: no"],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert process.stderr is not None
        seen = ""
        for line in process.stderr:
            seen += line
            if "waiting:" in line:
                break
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=20)[1]
        assert process.returncode == 0, seen + rest
        assert "dry run: commands go to forward_position_controller/commands_dry" in seen


class TestDoctor:
    def engine(self, **changes: object) -> SimpleNamespace:
        import vla_infer

        values = {
            "version": lambda: vla_infer.__version__,
            "cpu_instruction_sets": lambda: ["avx2", "generic"],
            "built_with_cuda": lambda: True,
            "__file__": "_engine.so",
        }
        return SimpleNamespace(**{**values, **changes})

    def test_golden_policy_and_shipped_contract_pass(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["doctor", "--policy", str(GOLDEN), "--contract", "so101"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert any(line.startswith("PASS  engine") for line in lines)
        assert any(line.startswith("PASS  policy      smolvla") for line in lines)
        assert any(line.startswith("PASS  contract") and "fits the policy" in line for line in lines)

    @pytest.mark.parametrize(
        ("words", "text"),
        [
            (["--policy", "/nowhere"], "/nowhere"),
            (["--contract", "so11"], "did you mean 'so101'"),
            (["--policy", str(GOLDEN), "--contract", "aloha"], "aloha.yaml: "),
            (["--topics"], "give one with --contract"),
        ],
    )
    def test_what_is_wrong_fails_with_its_line(
        self, words: list[str], text: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["doctor", *words]) == 1
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL"))
        assert text in line

    def test_engine(self) -> None:
        assert doctor.engine_finding(self.engine()).level == PASS
        assert doctor.engine_finding(self.engine(version=lambda: "0.0.1")).level == FAIL
        assert doctor.engine_finding(self.engine(cpu_instruction_sets=lambda: ["generic"])).level == WARN
        broken = doctor.engine_finding(ImportError("libvla_engine.so: cannot open"))
        assert broken.level == FAIL
        assert "pip install ." in broken.mend

    @pytest.mark.parametrize(
        ("output", "status", "cuda", "wanted", "level"),
        [
            ("NVIDIA H100, 9.0, 81559 MiB, 580.1", 0, True, True, PASS),
            ("NVIDIA H100, 9.0, 81559 MiB, 580.1", 0, False, True, FAIL),
            ("NVIDIA H100, 9.0, 81559 MiB, 580.1", 0, False, False, WARN),
            ("Tesla T4, 7.5, 15360 MiB, 580.1", 0, True, True, FAIL),
            ("NVIDIA-SMI has failed", 9, True, True, FAIL),
            ("", 0, True, False, WARN),
        ],
    )
    def test_gpu(
        self,
        output: str,
        status: int,
        cuda: bool,  # noqa: FBT001
        wanted: bool,  # noqa: FBT001
        level: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\necho '{output}'\nexit {status}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        finding = doctor.gpu_finding(wanted=wanted, engine=self.engine(built_with_cuda=lambda: cuda))
        assert finding.level == level
        assert bool(finding.mend) == (level != PASS)

    def test_no_driver_matters_only_where_cuda_is_wanted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        assert doctor.gpu_finding(wanted=True, engine=self.engine()).level == FAIL
        assert doctor.gpu_finding(wanted=False, engine=self.engine()).level == WARN

    def test_profile(self, tmp_path: Path) -> None:
        small = tmp_path / "small.xml"
        small.write_text("<dds><segment_size>524288</segment_size></dds>")
        broken = tmp_path / "broken.xml"
        broken.write_text("<dds>")
        name = "FASTRTPS_DEFAULT_PROFILES_FILE"
        shipped = doctor.shipped_profile()
        assert Path(shipped).exists()
        for path, level in (
            (shipped, PASS),
            (small, WARN),
            (broken, FAIL),
            (tmp_path / "none.xml", FAIL),
        ):
            finding = doctor.profile_finding({name: str(path)})
            assert finding.level == level, finding
            assert (shipped in finding.mend) == (level != PASS)
        unset = doctor.profile_finding({})
        assert (unset.level, unset.mend) == (WARN, f"export {name}={shipped}")

    def test_shared_memory_that_is_not_there(self, tmp_path: Path) -> None:
        first, *_ = doctor.dds_findings({}, tmp_path / "none")
        assert first.level == WARN
        assert "mount a tmpfs" in first.mend

    def test_other_middleware_is_named(self) -> None:
        *_, last = doctor.dds_findings({"RMW_IMPLEMENTATION": "rmw_cyclonedds_cpp"})
        assert last.level == WARN
        assert "rmw_cyclonedds_cpp" in last.found

    def test_works_without_ros(self) -> None:
        code = (
            "import sys; sys.modules['rclpy'] = None\n"
            "from vla_infer.cli import main\n"
            f"sys.exit(main(['doctor', '--policy', {str(GOLDEN)!r}]))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "WARN  ros         not found" in done.stdout


class TestTopics:
    """doctor --topics against publishers of every kind, by the name of the topic in a contract of its own."""

    CONTRACT = """
robot: bench
cameras:
  observation.images.top: {topic: good/image_raw}
  observation.images.wrist: {topic: silent/image_raw}
state: {topic: wrong_type, joints: [a], units: rad}
instruction: {topic: instruction, default: go}
command: {topic: commands, type: Float64MultiArray, joints: [a], units: rad, limits: {a: {position: [-1, 1]}}}
policy_rate: 30
"""

    def test_each_fault_has_its_line(self, tmp_path: Path) -> None:
        rclpy = pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")
        from rclpy.qos import qos_profile_sensor_data
        from sensor_msgs.msg import Image
        from std_msgs.msg import Float64MultiArray, String

        from vla_infer.contract import load_contract
        from vla_infer.doctor_topics import topic_findings

        path = tmp_path / "bench.yaml"
        path.write_text(self.CONTRACT)
        contract = load_contract(path)
        context = rclpy.Context()
        rclpy.init(context=context)
        node = rclpy.create_node("faults", context=context)
        good = node.create_publisher(Image, "good/image_raw", qos_profile_sensor_data)
        node.create_publisher(String, "wrong_type", 10)
        node.create_subscription(Float64MultiArray, "commands", lambda _: None, 10)

        def publish() -> None:
            message = Image(height=1, width=1, encoding="mono8", step=1, data=b"0")
            message.header.stamp.sec, message.header.stamp.nanosec = divmod(time.time_ns(), 1_000_000_000)
            good.publish(message)

        node.create_timer(0.02, publish)
        executor = rclpy.executors.SingleThreadedExecutor(context=context)
        executor.add_node(node)
        import threading

        stop = threading.Event()

        def spin() -> None:
            while not stop.is_set():
                executor.spin_once(timeout_sec=0.05)

        thread = threading.Thread(target=spin)
        thread.start()
        try:
            found = {f.found.split(":")[0]: f for f in topic_findings(contract, seconds=2.0)}
        finally:
            stop.set()
            thread.join()
            node.destroy_node()
            rclpy.shutdown(context=context)
        assert found["/good/image_raw"].level == PASS
        assert "Hz, age" in found["/good/image_raw"].found
        assert (found["/silent/image_raw"].level, "nobody publishes" in found["/silent/image_raw"].found) == (
            FAIL,
            True,
        )
        assert "/good/image_raw has that type" in found["/silent/image_raw"].mend
        assert found["/wrong_type"].level == FAIL
        assert "std_msgs/msg/String" in found["/wrong_type"].found
        assert found["/commands"].level == PASS
        assert "heard by faults" in found["/commands"].found
