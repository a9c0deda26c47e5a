"""The page: a small web server and ROS 2 node that show a running vla_node and let an operator steer it."""
