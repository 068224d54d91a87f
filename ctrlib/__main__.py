"""`python -m ctrlib`: the same as `ctrlib`, for torchrun and where the command is not on the path."""

from ctrlib.cli import main

raise SystemExit(main())
