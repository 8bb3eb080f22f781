"""`coe registry compress`: store an expert in fewer bytes, if its quality allows."""
