"""`coe route`: which expert a router chooses, and why."""
