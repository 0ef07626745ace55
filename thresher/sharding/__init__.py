"""WHERE a row lives: sharders, topology, planner, plans, and the model they turn into a sharded one."""
