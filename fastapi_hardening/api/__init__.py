"""The interface itself: errors, tenants; versions and more to come."""
