"""Offline state reduction: text -> statistics -> selection -> surgery -> evaluation -> report."""
