"""Names and layouts of official weights, both directions."""
