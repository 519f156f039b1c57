"""Policies that were learned: what they see, what they may do, and how they are kept."""
