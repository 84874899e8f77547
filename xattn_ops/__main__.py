"""``python -m xattn_ops``."""

import sys

from xattn_ops.cli import main

if __name__ == "__main__":
    sys.exit(main())
