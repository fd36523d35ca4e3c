"""The engine: copying and comparing in bulk. The only code that loops over extents of whole disks."""
