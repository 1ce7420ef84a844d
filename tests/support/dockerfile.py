"""The project's Dockerfiles, taken apart."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"


def instructions(file):
    """(instruction, arguments) of a Dockerfile, lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (DOCKER / file).read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def arguments(file, instruction):
    return [rest for name, rest in instructions(file) if name == instruction]


def environment(file):
    return dict(re.findall(r"(\w+)=(\S+)", " ".join(arguments(file, "ENV"))))
