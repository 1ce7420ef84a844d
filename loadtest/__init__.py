"""Load against a running server, over HTTP only."""
