"""Fetches data sets or takes what is there, checks it, and writes the caches of the kit."""
