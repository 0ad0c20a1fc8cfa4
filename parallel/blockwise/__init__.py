"""Attention by blocks: exact, in memory that grows with the sequence and not with its square."""
