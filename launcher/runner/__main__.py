from __future__ import annotations

from launcher.runner import main

main()
