"""Boots services from one file, watches them, and brings back what dies (Weatherlight)."""
