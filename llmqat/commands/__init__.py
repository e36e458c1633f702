"""The subcommands: each module has ``ARGUMENTS`` (dataclasses) and ``run(*instances)``."""
