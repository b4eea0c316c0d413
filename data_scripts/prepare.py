"""`python data_scripts/prepare.py NAME` is `engm prepare NAME`."""

import sys

from engm.cli import main

if __name__ == "__main__":
    main(["prepare", *sys.argv[1:]], prog_name="engm")
