from __future__ import annotations

import subprocess
import sys


def test_a_number_needs_no_plot_library():
    code = (
        "import sys, fusion.spectrum;"
        "print([name for name in ('matplotlib', 'pandas', 'lightning') if name in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"
