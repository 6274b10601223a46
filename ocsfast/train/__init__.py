"""The training program, `python -m ocsfast.train`. It needs `pip install ocsfast[train]`."""
