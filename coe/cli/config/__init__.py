"""`coe config`: is a configuration right, and what may it hold."""
