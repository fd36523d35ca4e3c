"""``python -m diskwright``."""

import sys

from diskwright.cli.main import main

sys.exit(main())
