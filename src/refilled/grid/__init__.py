"""Grids of many runs, executed in processes or on a cluster."""
