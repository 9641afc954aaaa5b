"""One module a command, with a `run(options)`; cli.py imports the one that was asked for."""
