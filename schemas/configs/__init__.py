"""The configuration of every verb: its fields are the flags."""
