"""The interface itself: errors, versions, tenants."""
