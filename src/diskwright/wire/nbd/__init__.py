"""The NBD protocol, sans-I/O: bytes in, events and bytes out. No sockets here."""
