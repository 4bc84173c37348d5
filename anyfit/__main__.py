"""`anyfit`, and `python -m anyfit`."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line. Ctrl-C has its one line and its status from the first import on."""
    _share_processors()
    try:
        from anyfit.cli import run

        run(sys.argv[1:])
    except KeyboardInterrupt:
        print("\nStopped. Nothing was written.", file=sys.stderr)
        if "--json" in sys.argv:
            print('{"error": "interrupted", "remedy": "Nothing was written."}')
        sys.exit(130)


def _share_processors() -> None:
    """Among the processes that torchrun has started here. It does so for torch itself; compiled loops are told before their import."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes > 1:
        os.environ.setdefault("NUMBA_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))


if __name__ == "__main__":
    main()
