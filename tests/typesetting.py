"""pdflatex on what a test has written."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

LATEX = pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")

DOCUMENT = r"""\documentclass[10pt%s]{article}
\usepackage{booktabs}%s
\begin{document}
%s
\end{document}
"""
"""A document that lacks the options of its class, its further packages, and what is in it."""


def compiled(document: Path) -> str:
    """What pdflatex says of a document that it must accept."""
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", document.name]
    done = subprocess.run(command, cwd=document.parent, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    return done.stdout
