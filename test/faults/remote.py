"""Both ends of a cut network, each a process in a network namespace of its own.

remote.py cameras              feeds the node, from the far side of the link
remote.py listen TOPIC FILE    writes "steady time, values" of every command to FILE, on the node's side
"""

from __future__ import annotations

import sys
import time

from robot import Robot


def main() -> None:
    if sys.argv[1] == "cameras":
        robot = Robot({})
        robot.feed()
        while True:
            time.sleep(1.0)
    topic, path = sys.argv[2:]
    robot = Robot({topic: "std_msgs/msg/Float64MultiArray"})
    with open(path, "w") as file:
        print("listening", file=file, flush=True)
        done = 0
        while True:
            time.sleep(0.02)
            heard = robot.commands[topic]
            for at, message in heard[done:]:
                print(at, *message.data, file=file, flush=True)
            done = len(heard)


if __name__ == "__main__":
    main()
