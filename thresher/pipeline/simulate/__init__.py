"""How long a schedule takes and how much memory: pure functions over the same lists that the runtime executes."""
