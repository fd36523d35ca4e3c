"""Storages: bytes at offsets, on something outside this process or in its memory."""
