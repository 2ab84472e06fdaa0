"""Merging rules, one per file."""
