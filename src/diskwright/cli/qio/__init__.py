"""The command language of ``qemu-io``: reading, writing and examining one disk by typed commands."""
