"""The command line, `python -m hotload`: arguments, commands, what is told and how."""
