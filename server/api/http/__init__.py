"""HTTP itself: connections, errors, keys, limits, bodies, events; knows no models."""
