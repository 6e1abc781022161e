"""`python -m regard`, and `torchrun -m regard`, which starts several processes of one command."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="regard")
