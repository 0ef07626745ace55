"""Which rank does what in which order. Pure data and pure functions: nothing here computes or communicates."""
