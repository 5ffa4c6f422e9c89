"""A bar on a terminal, lines elsewhere, nothing where nothing is wanted."""

import os
import pty

from fastvlp_tests.terminals import written_to

from fastvlp.commands.progress import progress


def count(shown=True):
    with progress("photos", 3, "images", shown) as advance:
        for number in range(3):
            advance(1, f"{number} unreadable")


def test_a_terminal_has_a_bar(monkeypatch):
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr("sys.stdout", terminal)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "80")
        count()
    shown = written_to(master)
    os.close(master)
    assert "\x1b[" in shown and "3/3 images" in shown and "2 unreadable" in shown
    assert "3 of 3" not in shown


def test_lines_elsewhere_end_with_what_was_done(capsys):
    count()
    assert capsys.readouterr().out == "photos: 3 of 3 images, 2 unreadable\n"
    count(shown=False)
    assert capsys.readouterr().out == ""
