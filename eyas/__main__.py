"""`python -m eyas` is `eyas`."""

import sys

from eyas import launched

if __name__ == "__main__":
    launched.end_at_once()  # before anything that takes time
    from eyas.cli import main

    sys.exit(main())
