"""Format drivers, one module or package each: maps from guest bytes to bytes of a file."""
