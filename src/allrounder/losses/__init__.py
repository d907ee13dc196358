"""Losses: classification, contrastive, preference; each usable in anybody's loop."""
