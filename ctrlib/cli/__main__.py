"""`python -m ctrlib.cli`: the same as `ctrlib`, for torchrun and the like."""

from ctrlib.cli import main

raise SystemExit(main())
