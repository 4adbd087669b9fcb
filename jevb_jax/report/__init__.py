"""Figures, tables and the HTML report of a run. This folder draws and computes no numbers."""
