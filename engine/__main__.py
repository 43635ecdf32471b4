"""`python -m engine`, the same as the `engine` command."""

from engine.cli.app import main

main()
