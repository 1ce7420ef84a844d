"""Pruning tables, evaluations, statistics and checkpoints -> one HTML file that needs no network."""
