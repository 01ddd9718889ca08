"""Recipes: one file each, plain ml_collections."""
