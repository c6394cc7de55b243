"""Folders of sheared models and adapters: written, read back, read."""
