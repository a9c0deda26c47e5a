"""Trains a small SmolVLA from scratch on the simulated arm: demonstrations, vocabulary, loss, loop, saving."""
