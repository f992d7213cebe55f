"""Corpora, and the tokens of their texts."""
