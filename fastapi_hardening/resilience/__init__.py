"""Staying up: draining now; breakers, retries and more to come."""
