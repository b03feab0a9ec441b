"""``python -m wise_ext`` is the command ``wise-ext``."""

from wise_ext.cli import main

if __name__ == "__main__":
    main()
