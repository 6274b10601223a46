"""The training program: `python -m ocsfast.train`. Needs `pip install ocsfast[train]`."""
