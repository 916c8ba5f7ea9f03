"""Estimates of time and memory, before any work starts."""
