"""python -m farflung"""

from farflung.cli import main

main()
