"""OpenAI's API over an engine: the bodies of requests, answers, and the server."""
