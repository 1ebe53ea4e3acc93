"""``python -m raysal``."""

from raysal.cli import main

main()
