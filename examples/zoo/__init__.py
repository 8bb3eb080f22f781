"""A zoo of real experts: two small bases, an adapter a task family, and the script that trains each."""
