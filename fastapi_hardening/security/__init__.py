"""Keeping attackers out: security headers now; limits, authentication and more to come."""
