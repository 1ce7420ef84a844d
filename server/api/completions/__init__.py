"""Completions and chat: from a request to the text of its answer."""
