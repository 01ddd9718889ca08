"""What is learned and how one samples from it: one file per method."""
