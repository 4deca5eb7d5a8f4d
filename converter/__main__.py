"""``wconv``, and ``python -m converter``. Little is imported here, so that Ctrl-C is in good hands from the start."""

import os
import signal
import sys


def main() -> int:
    """Run the command line; while its modules load, Ctrl-C ends the process as it ends any other, without a word."""
    listens = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not in the background of a shell
    if listens:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # numpy's library for matrices, which has no work here, takes memory for each thread.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from converter.cli import EXIT_INTERRUPTED
    from converter.cli import main as run

    try:
        if listens:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return run()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    finally:
        if listens:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    # ``-m`` lets the current folder go before all others: a model's, which may come with a click.py.
    if sys.path[0] == os.getcwd() != os.path.dirname(os.path.dirname(__file__)):  # noqa: PTH109, PTH120
        del sys.path[0]
    sys.exit(main())
