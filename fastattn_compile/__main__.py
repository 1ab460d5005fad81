"""``python -m fastattn_compile`` is ``fastattn``."""

from fastattn_compile.cli.app import main

if __name__ == "__main__":
    main()
