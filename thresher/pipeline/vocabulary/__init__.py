"""Input embedding and output layer, cut by rows of the vocabulary over the ranks of a pipeline."""
