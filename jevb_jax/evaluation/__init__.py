"""Evaluation: what features, scores and uncertainty are worth."""
