"""`python -m esper` is the `esper` command."""

from esper.cli.app import main

main()
