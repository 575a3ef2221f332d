"""How a capture gets on: the terminal, status.json, the event log, and the verb status."""
