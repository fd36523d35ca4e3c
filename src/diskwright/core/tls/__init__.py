"""TLS for exports and network storages: credentials as QEMU's objects describe them, and sockets that speak it.

Nothing here is loaded until somebody asks for TLS.
"""
