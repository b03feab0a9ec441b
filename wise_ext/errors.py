"""Errors a user can act on: one line saying what is wrong, where, and the cure."""

from __future__ import annotations


class WiseError(Exception):
    """Base of every error wise-ext raises for a user to read. The command line exits with 2."""


class ConfigError(WiseError):
    """A setting is unknown, out of range, or contradicts another."""


class DataError(WiseError):
    """An edit file, or one record of it, cannot be used."""


class ModelError(WiseError):
    """A model cannot be loaded, recognised, patched or unpatched."""


class StorageError(WiseError):
    """A memory directory is missing, damaged, of another version, or of another base model."""


class NativeError(WiseError):
    """The compiled module was asked for by name and cannot be used."""
