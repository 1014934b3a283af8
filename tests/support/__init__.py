"""What several tests share: models, checkpoint files, oracles."""
