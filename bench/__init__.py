"""Benchmarks. Each checks the answer first, then times; ratios come from one run on one machine."""
