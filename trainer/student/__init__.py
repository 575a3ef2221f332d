"""The model that learns: loaded, built from scratch, adapted, and saved."""
