"""The program, as `python -m blockcopy` and the installed script run it."""

import signal


def main() -> None:
    """Run the command of the command line, and exit with its status.

    While modules are loaded, SIGINT ends the process without a traceback. `cli.program` handles it from then on.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from blockcopy.cli import main as cli

    cli.main()


if __name__ == "__main__":
    main()
