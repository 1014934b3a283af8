"""Ranks whose rows lie on cards: over torch.distributed, and over what the makers of cards offer."""
