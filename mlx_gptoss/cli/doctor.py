"""`mlx-gptoss doctor`: what this machine is, and what to do about what is missing."""

import json

import click

from mlx_gptoss.cli.console import show_log

MARKS = {"ok": ("ok", "green"), "note": ("note", "yellow"), "problem": ("PROBLEM", "red")}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def doctor(*, as_json: bool) -> None:
    """Describe this machine, and say what to do where something is amiss.

    Exit 1 if a model cannot run well here before a problem is solved.
    """
    from dataclasses import asdict

    from mlx_gptoss.doctor import Status, diagnose
    from mlx_gptoss.machine import read_machine

    show_log(quiet=as_json)
    machine = read_machine()
    findings = diagnose(machine)
    if as_json:
        facts = {"machine": asdict(machine), "findings": [asdict(f) for f in findings]}
        click.echo(json.dumps(facts, indent=2))
    else:
        for finding in findings:
            mark, color = MARKS[finding.status]
            click.echo(f"{click.style(f'{mark:<8}', fg=color)}{finding.name:<14}{finding.value}")
            if finding.advice:
                click.echo(f"{'':<22}{finding.advice}")
    if any(finding.status is Status.PROBLEM for finding in findings):
        raise SystemExit(1)
