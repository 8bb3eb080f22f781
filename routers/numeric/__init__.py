"""Numerical methods that routers share: fits, distances, calibration, conformal bounds. Arrays in, arrays out."""
