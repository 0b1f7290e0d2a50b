"""Traces -> one page to look at: what the exits save, what they cost, and what happens to every single sample."""
