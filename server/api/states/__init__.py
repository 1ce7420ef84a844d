"""Saved recurrent states."""
