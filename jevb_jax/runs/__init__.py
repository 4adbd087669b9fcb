"""The contents of a run directory: checkpoints, config, results and logs."""
