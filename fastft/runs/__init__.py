"""A run on disk: its folder, checkpoints, mirror, fingerprints and report."""
