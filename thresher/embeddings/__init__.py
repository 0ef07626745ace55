"""WHAT a row is: how tables are initialised and which optimizers update their rows."""
