"""Pages that need nothing but a browser: their common frame, and one sample drawn with its tokens and targets."""
