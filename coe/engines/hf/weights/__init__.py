"""Weights of a resident model that are replaced in place: files, copies in host memory, and the check that they fit."""
