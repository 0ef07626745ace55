"""HOW checkpoints travel to and from other formats. Nothing lives here yet."""
