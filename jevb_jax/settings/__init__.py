"""Settings: what each may be, whether they fit each other, and the typed form that the rest reads."""
