"""A small web shop that shows what one `harden(app)` line does for a real application."""
