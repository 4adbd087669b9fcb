"""Configs of the published runs; each differs from `default` by what it names."""
