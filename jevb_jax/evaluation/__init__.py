"""Evaluation of features, scores and uncertainty."""
