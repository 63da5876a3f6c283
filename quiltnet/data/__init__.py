"""Image-caption pairs: packed into tar shards, read back in a defined order."""
