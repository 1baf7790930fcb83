"""Benchmarks: the sidecar on one core, everything that drives or receives on the others (see README.md)."""
