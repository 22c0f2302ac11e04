"""`python -m cratelm` is `cratelm`."""

import sys

from cratelm.cli import main

sys.exit(main())
