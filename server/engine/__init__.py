"""The engine process: continuous batching over a pool of state slots. Knows no HTTP."""
