"""F-Permutation: which fields earn their place."""
