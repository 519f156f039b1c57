"""Bundled hosts and data sets, one folder each: `host.py`, `data.py`, `task.py`."""
