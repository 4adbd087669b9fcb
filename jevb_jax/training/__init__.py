"""Training: what a run is, its methods, its step and its loop."""
