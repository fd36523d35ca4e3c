"""One module a subcommand; what each must have is told in ``diskwright.cli.main``."""
