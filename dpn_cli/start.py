"""The `dpn` command, which Ctrl-C ends without a traceback from its first moment on."""

import signal


def run() -> None:
    """Import and run the command line; it has handlers of its own."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from dpn_cli.cli import run as run_cli

    run_cli()
