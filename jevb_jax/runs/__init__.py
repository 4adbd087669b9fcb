"""What a run directory is: checkpoints, config, results and logs."""
