"""Protocols as pure functions of bytes: no sockets, no threads."""
