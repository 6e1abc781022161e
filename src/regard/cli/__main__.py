"""`python -m regard.cli`."""

from . import main

main(prog_name="regard")
