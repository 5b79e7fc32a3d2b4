from __future__ import annotations

import sys

from launcher.runner.main import main

sys.exit(main())
