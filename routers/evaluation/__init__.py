"""What a router is worth: cross-validation, metrics, cost-quality curves, reports and plots."""
