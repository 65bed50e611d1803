"""A stored traceback, taken apart: the frames of the project's own code, and the whole."""

from __future__ import annotations

import re
from dataclasses import dataclass

from django_saga.causes import _is_the_projects

MOST = 4  # own frames that are shown, the innermost


@dataclass(frozen=True)
class Frame:
    """One frame: where, in what, and the line of code if it was stored."""

    file: str
    line: str
    function: str
    code: str

    @property
    def is_the_projects(self) -> bool:
        """Whether it is neither a library's, nor Python's, nor ours."""
        return _is_the_projects(self.file)


def frames_of(traceback: str) -> list[Frame]:
    """Every frame that a traceback tells, as it was printed: outermost first."""
    lines = traceback.splitlines()
    frames = []
    for number, line in enumerate(lines):
        if match := _FRAME.match(line):
            code = lines[number + 1].strip(" |") if number + 1 < len(lines) else ""
            if _FRAME.match(code) or not lines[number + 1 : number + 2]:
                code = ""
            frames.append(Frame(match["file"], match["line"], match["function"] or "", code))
    return frames


_FRAME = re.compile(r'[ |]*File "(?P<file>[^"\n]+)", line (?P<line>\d+)(?:, in (?P<function>.+))?$')


def own_frames(traceback: str) -> list[Frame]:
    """The project's own frames of the last error that it tells of; of an earlier one, if none."""
    for part in reversed(_HEAD.split(traceback)):
        if own := [frame for frame in frames_of(part) if frame.is_the_projects]:
            return own[-MOST:]
    return []


_HEAD = re.compile(r"^[ |+]*(?:Exception Group )?Traceback \(most recent call last\):$", re.M)
