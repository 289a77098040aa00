"""The command line: one thin file per command group, parse, call, show."""
