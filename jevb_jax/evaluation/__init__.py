"""Evaluation of frozen features: protocols whose every choice is made on a validation split."""
