"""Training: SP-PRM, and the recipe of the embedded demo models."""
