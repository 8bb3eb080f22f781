"""Worked examples on real models."""
