"""`python -m arrowmoe`: the command line."""

from arrowmoe.cli.main import main

main()
