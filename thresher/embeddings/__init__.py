"""WHAT a row is: the tables of a model, their initial weights and the optimizers of their rows."""
