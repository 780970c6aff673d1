"""What every concern stands on. Nothing in here knows a concern; imports go down only."""
