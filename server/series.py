"""What the series of front ends and of the hub have in common."""

from prometheus_client import disable_created_metrics

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series of time stamps beside every counter and histogram

STEP_SECONDS = (
    0.0005,
    0.001,
    0.002,
    0.003,
    0.005,
    0.0075,
    0.01,
    0.015,
    0.02,
    0.03,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
)
"""Bounds of buckets for the time of one step, and so for the gap between two tokens. Half a millisecond is the first: a
small model's whole range must not fall in one bucket."""
