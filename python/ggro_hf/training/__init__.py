"""Training code: the recipe of the embedded demo models."""
