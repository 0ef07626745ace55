"""Parts that models are built from. They know tensors and the schema, never a rank, a device name or a group."""
