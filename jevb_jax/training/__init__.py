"""Training: what a run is, its step, its loop and its health."""
