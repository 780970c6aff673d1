"""Knowing what the application does: request ids and health."""
