"""Benchmarks against plain PyTorch, run by ``python -m xattn_ops bench``.

timing      interleaved rounds, medians and spread
baselines   the operators as a user would write them
cases       what is timed, at which shapes
roofline    what the machine can do at most, measured
runner      correctness gate, timing, ratios or why there are none
memory      peak memory of a training step
report      table, JSON and plot
"""
