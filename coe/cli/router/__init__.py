"""`coe router`: train, cross-validate, evaluate, compare and update routers."""
