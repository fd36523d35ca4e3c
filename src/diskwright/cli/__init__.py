"""The command line: its subcommands are in ``commands``; here is what they share."""
