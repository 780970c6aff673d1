"""Identity: who calls, how it is proven, and what the caller may do."""
