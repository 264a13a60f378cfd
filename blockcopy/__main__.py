"""`python -m blockcopy`."""

from blockcopy.cli.main import main

if __name__ == "__main__":
    main()
