"""`anyfit`, and `python -m anyfit`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line. Ctrl-C has its one line and its status from the first import on."""
    try:
        from anyfit.cli import run

        run(sys.argv[1:])
    except KeyboardInterrupt:
        print("\nStopped. Nothing was written.", file=sys.stderr)
        if "--json" in sys.argv:
            print('{"error": "interrupted", "remedy": "Nothing was written."}')
        sys.exit(130)


if __name__ == "__main__":
    main()
