"""Training of the testbed; the command is `python -m dyvte.testbed.train`."""
