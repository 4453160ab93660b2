"""``python -m fastcl`` is the command line."""

from fastcl.cli import main

if __name__ == "__main__":
    main()
