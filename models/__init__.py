"""Recipes: one TOML file per named model (see README.md)."""
