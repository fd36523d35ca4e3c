"""The parts of ``qemu-nbd``'s command line, which ``commands.nbd`` puts together."""
