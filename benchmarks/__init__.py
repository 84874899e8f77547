"""Benchmarks against plain PyTorch, run by ``python -m xattn_ops bench``.

timing      interleaved rounds, medians and spread
baselines   the operators as a user would write them
cases       what is timed, at which shapes
device      CPU or CUDA: waiting for results, emptying caches
roofline    what the machine can do at most, measured
runner      correctness gate, timing, ratios or why there are none
sweep       how time grows with the image and the batch, beside the papers' complexity
throughput  images/s of whole models
memory      peak memory of a training step
compare     a run against an earlier one
report      tables and JSON
plots       bars, latency against MACs, roofline, scaling
options     of the command
command     the command
"""
