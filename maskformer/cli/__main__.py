"""`python -m maskformer.cli`."""

import sys

from maskformer.cli import main

if __name__ == "__main__":
    sys.exit(main())
