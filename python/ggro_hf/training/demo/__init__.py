"""The recipe of the embedded demo models."""
