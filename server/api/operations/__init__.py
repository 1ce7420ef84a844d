"""For who runs the server and who tries it: probes, metrics, models, the compare page."""
