"""One module for each command, with a function `run(options)`; cli.py imports the module of the command that was given."""
