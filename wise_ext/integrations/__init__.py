"""Engines that wise-ext plugs into, one module each, imported when asked for alone."""
