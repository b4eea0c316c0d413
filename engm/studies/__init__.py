"""What the notebooks measure to test the claims, and how they come to a verdict."""
