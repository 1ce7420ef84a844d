"""Tokenising and detokenising for clients."""
