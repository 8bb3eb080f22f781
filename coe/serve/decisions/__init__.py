"""The decision log, and its replay."""
