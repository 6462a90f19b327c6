"""The workflow cannot run here, but each of its steps can: they are make targets, all of them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_every_step_is_a_make_target():
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    steps = re.findall(r"run: (.+)$", workflow, re.MULTILINE)
    assert len(steps) >= 6
    for step in steps:
        command, _, target = step.partition(" ")
        assert command == "make" and target in targets, step


def test_linux_runs_what_the_project_runs_everywhere():
    runs = (ROOT / ".ci/run").read_text()
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    for line in re.findall(r"^make .+$", runs, re.MULTILINE):
        assert f"run: {line}" in workflow
