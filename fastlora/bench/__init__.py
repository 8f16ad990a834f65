"""Measurements: correctness first, every variant interleaved in one run, losses shown as well as wins."""
