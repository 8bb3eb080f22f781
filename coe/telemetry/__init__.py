"""Traces and JSON logs of a running service. Both are off by default, and their libraries are then not imported."""
