"""What the rows of a data set are, how they are stored, and in which order they come."""
