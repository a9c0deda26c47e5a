"""An SO-101 arm in MuJoCo, a table with coloured cubes, tasks in words, and an expert that does them."""
