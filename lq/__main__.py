"""Run ``python -m lq``, the same program as the ``lq`` command."""

from lq.cli import main

if __name__ == "__main__":
    main()
