"""Training of a Mixture of Thoughts: preset `mot`."""
