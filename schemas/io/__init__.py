"""Files and URLs: opening, caching, and what untrusted files may ask for."""
