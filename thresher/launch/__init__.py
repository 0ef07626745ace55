"""WHO runs it: the command line, the processes of a run, and the only reader of the environment."""
