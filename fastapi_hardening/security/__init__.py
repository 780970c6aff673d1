"""Keeping attackers out: header fields, limits, authentication; inspection of content to come."""
