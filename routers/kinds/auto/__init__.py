"""`auto`: tries router kinds, settings and encoders by cross-validation, and keeps the best or a stack."""
