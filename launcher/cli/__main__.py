from __future__ import annotations

import sys

from launcher.cli.app import main

sys.exit(main())
