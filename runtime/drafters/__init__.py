"""Drafters: whoever guesses the next tokens of a sequence, one file each, one interface."""
