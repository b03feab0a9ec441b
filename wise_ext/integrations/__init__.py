"""Engines that people already run, with an edited memory in them; each is imported on demand."""
