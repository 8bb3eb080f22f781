"""On Ray Serve: gateways that route and compose, and hosts that hold weights, behind one OpenAI-compatible endpoint."""
