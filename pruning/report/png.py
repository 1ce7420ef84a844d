"""Figures as pictures, drawn by a headless Chromium from the same script as the page."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from lowkey.files import Found
from lowkey.page import render
from lowkey.publishing import new_file
from pruning.errors import PruningError
from pruning.report.style import MARGIN, Figure

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTH = 1000
SECONDS = 300


def browser() -> str:
    """The first Chromium on PATH. Raises PruningError if there is none."""
    for name in BROWSERS:
        found = shutil.which(name)
        if found is not None:
            return found
    raise PruningError(
        f"--png needs a Chromium browser on PATH ({', '.join(BROWSERS)}); apt install chromium, or leave it out"
    )


def write_png(figure: Figure, file: Path, *, width: int = WIDTH, replaces: Found | None = None) -> None:
    """One figure on white, `width` CSS pixels wide, two pixels each.

    Args:
        replaces: what the file may replace, as `check_new_file` found it.

    Raises:
        PruningError: there is no browser, or it drew nothing.
        OutputTakenError: something else is there; the picture is beside it.
        OutputError: the file can't be written.
    """
    height = int(figure.figure.layout.height)
    drawing = {figure.name: figure.figure}
    with tempfile.TemporaryDirectory() as scratch:
        html, drawn = Path(scratch) / "figure.html", Path(scratch) / "figure.png"
        html.write_text(
            render("pruning.report", "picture.html", drawing, margin=MARGIN, figure=figure), encoding="utf-8"
        )
        screenshot(html, drawn, width, height, scale=2)
        with new_file(file, replaces=replaces) as temporary_file:
            shutil.copyfile(drawn, temporary_file)


def screenshot(
    html: Path, picture: Path, width: int, height: int, *, scale: int = 1, dark: bool = False
) -> str:
    """Write what a browser window of that size shows, and return what it said.

    Raises:
        PruningError: there is no browser, it takes too long, or it wrote nothing.
    """
    profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    options = [
        "--headless=new",
        "--hide-scrollbars",
        "--disable-gpu",
        "--no-first-run",
        "--enable-logging=stderr",
        "--virtual-time-budget=10000",
        f"--user-data-dir={profile.name}",
        f"--window-size={width},{height}",
        f"--force-device-scale-factor={scale}",
        f"--screenshot={picture}",
        *(["--blink-settings=preferredColorScheme=0"] if dark else []),
        # Chromium's sandbox does not start as root; the page is our own.
        *(["--no-sandbox"] if os.geteuid() == 0 else []),
    ]
    try:
        with profile:
            done = subprocess.run(
                [browser(), *options, html.as_uri()], capture_output=True, text=True, timeout=SECONDS
            )
    except subprocess.TimeoutExpired as e:
        raise PruningError(f"the browser took more than {SECONDS} s to draw {picture.name}") from e
    if not picture.exists():
        raise PruningError(f"the browser drew no {picture.name}: {done.stderr[-500:]}")
    return done.stderr
