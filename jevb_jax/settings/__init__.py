"""Settings: their allowed values, whether they fit each other, and their typed form."""
