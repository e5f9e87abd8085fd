"""Training of the small demo models: their problems, their runs."""
