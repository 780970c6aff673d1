"""Concerns that make an application faster."""
