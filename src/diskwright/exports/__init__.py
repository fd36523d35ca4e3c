"""Exports: disks served to others."""
