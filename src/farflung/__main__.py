"""`python -m farflung`, the same as the command `farflung`."""

from farflung.cli import main

main()
