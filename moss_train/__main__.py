"""`python -m moss_train`."""

import sys

from moss_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
