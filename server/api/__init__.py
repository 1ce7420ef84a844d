"""The HTTP side: OpenAI-compatible routes. Imports no torch."""
