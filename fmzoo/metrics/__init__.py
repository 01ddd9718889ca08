"""Images to numbers, and how the numbers came about."""
