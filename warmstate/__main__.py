"""`python -m warmstate`: the console script, where it is not on the PATH."""

import sys

from warmstate.command import main

sys.exit(main())
