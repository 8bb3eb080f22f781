"""Engine processes of experts that are watched, and started again when they die."""
