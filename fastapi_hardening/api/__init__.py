"""The interface itself: errors now; versions, tenants and more to come."""
