"""Configs of runs. Each starts from `default` and changes some settings."""
