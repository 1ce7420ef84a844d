"""Continuous batching over a slot pool. No HTTP in here; `messages` and `client` import no torch either."""
