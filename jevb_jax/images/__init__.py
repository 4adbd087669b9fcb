"""Images: where they come from, which a step sees, and how they are varied."""
