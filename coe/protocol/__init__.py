"""OpenAI's shapes: requests, answers and errors, as JSON in and out. No server, no engine."""
