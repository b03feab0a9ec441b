"""``python -m wise_ext`` is the command ``wise-ext``; alone, it is ``wise-ext info``."""

import sys

from wise_ext.cli import main

if __name__ == "__main__":
    main(sys.argv[1:] or ["info"])
