"""Start the simulated SO-101: ros2 launch vla_infer simulation.launch.py

It takes the place of the robot's drivers. What is to drive it: ros2 launch vla_infer bringup.launch.py
contract:=so101 dry_run:=false use_sim_time:=true policy:=DIRECTORY
"""

from __future__ import annotations

from pathlib import Path

from launch.actions import DeclareLaunchArgument
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from launch import LaunchDescription

# (name, default, type as a node parameter, description)
NODE_PARAMETERS = (
    ("contract", "so101", str, "contract that names the topics: a YAML file or a shipped name"),
    ("episodes", "auto", str, "auto: each scene says what to do; manual: a person does"),
    ("seed", "0", int, "of the first scene; each next one has the next number"),
    ("split", "eval", str, "whose sentences: train or eval"),
    ("time_limit", "12.0", float, "seconds that an episode may take"),
    ("camera_rate", "30.0", float, "images a second of each camera"),
    ("image_height", "128", int, "pixels"),
    ("image_width", "128", int, "pixels"),
)
# Launched from share/vla_infer/launch or from a checkout, config/ is beside launch/.
PROFILE = Path(__file__).resolve().parent.parent / "config" / "fastdds.xml"


def generate_launch_description() -> LaunchDescription:
    arguments = [
        DeclareLaunchArgument(name, default_value=default, description=text)
        for name, default, _, text in NODE_PARAMETERS
    ]
    arguments += [
        DeclareLaunchArgument(
            "namespace", default_value="", description="namespace of the node and its topics"
        ),
        DeclareLaunchArgument(
            "fastdds_profile",
            default_value=str(PROFILE),
            description="Fast DDS profile whose shared-memory segment holds several images",
        ),
    ]
    node = Node(
        package="vla_infer",
        executable="simulation",
        name="simulation",
        namespace=LaunchConfiguration("namespace"),
        parameters=[
            {
                name: ParameterValue(LaunchConfiguration(name), value_type=kind)
                for name, _, kind, _ in NODE_PARAMETERS
            }
        ],
        # The name that Fast DDS reads changed with ROS 2 Kilted; each version ignores the other.
        additional_env={
            "FASTRTPS_DEFAULT_PROFILES_FILE": LaunchConfiguration("fastdds_profile"),
            "FASTDDS_DEFAULT_PROFILES_FILE": LaunchConfiguration("fastdds_profile"),
        },
        output="screen",
    )
    return LaunchDescription([*arguments, node])
