"""The program, as `python -m blockcopy` runs it."""

from blockcopy.cli.main import main

if __name__ == "__main__":
    main()
