"""`python -m dpn_cli`, as launchers start it: the same as `dpn`."""

import sys

if not sys.flags.safe_path:
    del sys.path[0]  # the current folder, which may be a stranger's: no code of it is imported

from dpn_cli.start import run

run()
