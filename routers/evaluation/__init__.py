"""Evaluation of routers: cross-validation, metrics, cost-quality curves, reports and plots."""
