"""`python -m ocsfast.train`."""

from ocsfast.train.cli import main

if __name__ == "__main__":  # data loader workers import this module again
    raise SystemExit(main())
