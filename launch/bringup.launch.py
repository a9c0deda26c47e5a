"""Start vla_node: ros2 launch vla_infer bringup.launch.py policy:=DIRECTORY contract:=so101

It is a dry run, with commands on <topic>_dry where nothing listens, unless dry_run:=false is given.
"""

from __future__ import annotations

from pathlib import Path

from launch.actions import DeclareLaunchArgument, LogInfo
from launch.conditions import IfCondition, UnlessCondition
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode
from launch_ros.parameter_descriptions import ParameterValue

from launch import LaunchDescription

# (name, default or None where it has to be given, type as a node parameter, description)
NODE_PARAMETERS = (
    ("policy", None, str, "directory of the policy as LeRobot saves it"),
    ("contract", None, str, "contract of the robot: a YAML file or a shipped name, such as so101"),
    ("device", "cpu", str, "where the policy runs: cpu, cuda or cuda:N"),
    ("precision", "fp32", str, "precision of the weights and products: fp32, bf16, int8 (CPU) or fp8 (CUDA)"),
    (
        "calibrate_first",
        "0",
        int,
        "observations to calibrate fp8 on where the policy has no fp8.json; 0: refuse",
    ),
    ("control_rate", "0.0", float, "rate of the commands in Hz; 0: the contract's"),
    ("use_sim_time", "false", bool, "take the time from /clock"),
    ("autostart", "true", bool, "configure and activate at start"),
    ("dry_run", "true", bool, "publish on <topic>_dry, so that nothing moves; false arms the robot"),
    ("realtime_priority", "0", int, "SCHED_FIFO priority of the control thread; 0: none"),
    ("preflight", "false", bool, "refuse activation while the preflight has a FAIL"),
)
# Launched from share/vla_infer/launch or from a checkout, config/ is beside launch/.
PROFILE = Path(__file__).resolve().parent.parent / "config" / "fastdds.xml"


def generate_launch_description() -> LaunchDescription:
    arguments = [
        DeclareLaunchArgument(
            name, description=text, **({} if default is None else {"default_value": default})
        )
        for name, default, _, text in NODE_PARAMETERS
    ]
    arguments += [
        DeclareLaunchArgument(
            "namespace", default_value="", description="namespace of the node and its topics"
        ),
        DeclareLaunchArgument(
            "respawn", default_value="true", description="start the node again 2 s after it has ended"
        ),
        DeclareLaunchArgument(
            "log_level", default_value="info", description="debug, info, warn, error or fatal"
        ),
        DeclareLaunchArgument(
            "fastdds_profile",
            default_value=str(PROFILE),
            description="Fast DDS profile whose shared-memory segment holds several images; the camera drivers "
            "need it too, for the segment is the sender's",
        ),
    ]
    node = LifecycleNode(
        package="vla_infer",
        executable="vla_node",
        name="vla_node",
        namespace=LaunchConfiguration("namespace"),
        parameters=[
            {
                name: ParameterValue(LaunchConfiguration(name), value_type=kind)
                for name, _, kind, _ in NODE_PARAMETERS
            }
        ],
        ros_arguments=["--log-level", ["vla_node:=", LaunchConfiguration("log_level")]],
        # The name that Fast DDS reads changed with ROS 2 Kilted; each version ignores the other.
        additional_env={
            "FASTRTPS_DEFAULT_PROFILES_FILE": LaunchConfiguration("fastdds_profile"),
            "FASTDDS_DEFAULT_PROFILES_FILE": LaunchConfiguration("fastdds_profile"),
        },
        output="screen",
        # After a lost device or an inference that hangs the process ends, to start anew with a fresh context.
        respawn=LaunchConfiguration("respawn"),
        respawn_delay=2.0,
    )
    dry_run = LaunchConfiguration("dry_run")
    return LaunchDescription(
        [
            *arguments,
            LogInfo(condition=IfCondition(dry_run), msg="vla_infer: dry run, commands go to <topic>_dry"),
            LogInfo(condition=UnlessCondition(dry_run), msg="vla_infer: ARMED, commands reach the robot"),
            node,
        ]
    )
