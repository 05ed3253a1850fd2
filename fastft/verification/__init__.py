"""Is it right: exported files against the trained model, and the machine itself."""
