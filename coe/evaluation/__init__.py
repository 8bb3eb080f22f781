"""Measuring experts: tasks with right answers, graders, and a runner that writes what was measured as outcomes."""
