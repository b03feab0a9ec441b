"""Edits in, side memory out."""
