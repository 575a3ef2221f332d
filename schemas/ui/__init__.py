"""The command line: flags, progress, tables, and what a verb prints at its end."""
