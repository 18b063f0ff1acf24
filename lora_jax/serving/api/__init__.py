"""OpenAI's API over an engine: forms, answers, and the server that carries them."""
