"""The command as a user types it: exit codes, one-line errors, JSON on stdout and nothing else."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from assay import cli, config, ledger
from assay.checkpoint import write_json
from assay.swarm import defence

EXAMPLES = Path(__file__).parents[1] / "examples"


def assay(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "assay", *arguments],
        capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment}, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "absent.toml"], "no such file; give the path of an experiment in TOML"),
        (["run", "bad.toml"], "training.round: unknown key; known here: rounds"),
        (["run", "good.toml", "--set", "defence.level=magic"], "defence.level: Input should be"),
        (["run", "good.toml", "--set", "nonsense"], "write key=value"),
        (["run", "good.toml", "--set", "x.y=1"], "x.y: unknown key; tables are model"),
        (["run", "good.toml", "--set", "data.benign=['absent.jsonl']"], "no such file; check data.root"),
        (["run", "good.toml", "--set", "model.name=nonsense"], "known models: smollm2-135m, tiny"),
        (["report", "nowhere"], "no run there"),
        (["ledger", "verify", "nowhere"], "no ledger there"),
        (["probe", "eval", "absent.safetensors"], "no such probe file"),
        (["bench", "federated", "--seeds", "one"], "not a list of whole numbers"),
        (["bench", "federated", "--levels", "magic"], "defence.level: Input should be"),
        (["run", "nowing.toml"], "wing: 'nope' is unknown; known are federated, swarm"),
        (
            ["run", "swarm.toml", "--set", "swarm.plan=horizontal", "--set", "swarm.group=10"],
            "swarm.group = 10 must be a multiple of swarm.nodes = 4",
        ),
        (["run", "swarm.toml", "--set", "defence.screens=['nope']"], "unknown screen 'nope'; known: "),
        (["bench", "swarm", "--suite", "nope"], "--suite: 'nope' is unknown; known are "),
        (["bench", "swarm", "--only", "nope"], "--only 'nope': no experiment of this suite"),
        (["bench", "swarm", "--seeds", "0,-1"], "not a list of whole numbers"),
        (["bench", "federated", "--config", "swarm.toml"], "is an experiment of the swarm wing"),
        (["calibrate", "--config", "good.toml"], "is a federated experiment; calibration is for the swarm"),
        (["calibrate", "--completions", "5"], "5 completions say nothing of a rate"),
        (["calibrate", "--sampling", "float7"], "bfloat16"),
        (["demo", "neither"], "is not one of"),
        (["frobnicate"], "No such command"),
        (["run"], "Missing argument"),
    ],
)
def test_mistakes_end_with_exit_code_2_and_say_what_to_do(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, which spares each case the import of torch; a process of its own is tested below."""
    (tmp_path / "bad.toml").write_text("[training]\nround = 3\n")
    (tmp_path / "good.toml").write_text("[training]\nrounds = 1\n")
    (tmp_path / "swarm.toml").write_text('wing = "swarm"\n')
    (tmp_path / "nowing.toml").write_text('wing = "nope"\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["assay", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    assert says in said.err
    if said.err.startswith("assay:"):
        assert said.err.count("\n") == 1, "our own errors are one line"


def test_a_mistake_ends_the_process_with_code_2_and_one_line(tmp_path: Path) -> None:
    done = assay("run", "absent.toml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "assay: absent.toml: no such file; give the path of an experiment in TOML\n"


def test_version_and_help() -> None:
    assert assay("--version").stdout.strip() == "0.1.0"
    commands = ([], ["run"], ["demo"], ["bench", "federated"], ["bench", "swarm"], ["calibrate"], ["probe", "fit"])
    for command in commands:
        done = assay(*command, "--help")
        assert done.returncode == 0
        assert "Usage" in done.stdout


def test_model_list_is_json_when_asked() -> None:
    names = {row["name"]: row for row in json.loads(assay("model", "list", "--json").stdout)}
    assert names["tiny"]["cached"] is True
    assert set(names) == {"tiny", "tiny-b", "smollm2-135m"}


def test_model_fetch_of_a_shipped_model_prints_where_it_lies() -> None:
    found = json.loads(assay("model", "fetch", "tiny", "--json").stdout)
    assert (Path(found["path"]) / "config.json").exists()
    assert len(found["sha256"]) == 64


def test_ledger_verify_names_the_first_broken_entry(tmp_path: Path) -> None:
    book = ledger.Ledger(tmp_path / "ledger.jsonl")
    for i in range(4):
        book.append("round", {"round": i, "weight": 1.0})
    write_json(tmp_path / "summary.json", {"ledger": {"head": book.head}})
    assert assay("ledger", "verify", str(tmp_path)).returncode == 0
    lines = book.path.read_text().splitlines()
    book.path.write_text("\n".join([*lines[:2], lines[2].replace("1.0", "0.0"), lines[3]]) + "\n")
    done = assay("ledger", "verify", str(tmp_path), "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["first_broken"] == 2
    book.path.write_text("\n".join(lines[:3]) + "\n")  # the tail cut off: only the head in summary.json shows it
    assert assay("ledger", "verify", str(tmp_path)).returncode == 1


def test_run_report_and_probe_on_tiny(tmp_path: Path) -> None:
    """From a TOML file to a report, a probe, and the probe's quality; stdout holds one JSON value each time."""
    file = tmp_path / "t.toml"
    file.write_text(
        'workers = 1\n[model]\nname = "tiny"\ndtype = "float32"\n[clients]\ntotal = 4\nexamples = 24\n[training]\nrounds = 1\n'
        "lr = 3e-3\n[defence.rehearsal]\nrounds = 2\nexamples = 24\n[defence]\nlevel = 'client'\nprobe = 'p.safetensors'\n"
        "[evaluate]\nharmful_prompts = 4\nbenign_prompts = 4\nbenign_rows = 4\n"
    )
    env = {"ASSAY_CACHE": str(tmp_path / "cache")}
    fitted = assay("probe", "fit", "p.safetensors", "--config", str(file), "--benign", "4", "--malicious", "4",
                   "--json", cwd=tmp_path, **env)  # fmt: skip
    assert fitted.returncode == 0, fitted.stderr[-2000:]
    assert json.loads(fitted.stdout)["samples"] == 16
    quality = assay("probe", "eval", "p.safetensors", "--config", str(file), "--json", cwd=tmp_path, **env)
    assert 0 <= json.loads(quality.stdout)["auroc"] <= 1
    run = assay("run", str(file), "--json", cwd=tmp_path, **env)
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout)["setting"]["level"] == "client"
    assert (tmp_path / "runs" / "t" / "report.html").exists()
    again = assay("report", str(tmp_path / "runs"), "--out", str(tmp_path / "all.html"), "--json", cwd=tmp_path)
    assert json.loads(again.stdout)["report"] == str(tmp_path / "all.html")


def test_run_of_a_swarm_from_the_example(tmp_path: Path) -> None:
    """From the shipped file to a summary and a report; called again it only reads what is there."""
    small = ["swarm.iterations=2", "swarm.prompts=4", "swarm.group=4", "evaluate.prompts=4"]
    command = ["run", str(EXAMPLES / "swarm.toml"), "--out", "here"]
    command += [word for setting in small for word in ("--set", setting)]
    done = assay(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for word in ("swarm", "ASR", "rej. malic.", "report: here/report.html"):
        assert word in done.stdout
    page = (tmp_path / "here" / "report.html").read_text()
    assert "1 of 4 nodes was malicious." in page
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "here").rglob("*") if path.is_file()}
    again = assay(*command, "--json", cwd=tmp_path)
    summary = json.loads(again.stdout)
    assert summary == json.loads((tmp_path / "here" / "summary.json").read_text())
    assert summary["setting"]["iterations"] == 2
    assert summary["metrics"]["honest_rejected_rate"] == 0
    changed = {path.name for path, at in files.items() if path.stat().st_mtime_ns != at}
    assert changed <= {"report.html"}, "a finished run is read, not played again"
    assert assay("ledger", "verify", "here", cwd=tmp_path).returncode == 0
    other = assay(*command, "--set", "seed=1", "--json", cwd=tmp_path)
    assert (other.returncode, other.stdout) == (2, ""), "another seed's figures are not this run's"
    assert "holds another experiment" in other.stderr


def test_calibrate_prints_limits_that_an_experiment_takes(tmp_path: Path) -> None:
    arguments = ["calibrate", "--completions", "24", "--set", "sampling.max_tokens=24"]
    done = assay(*arguments, "--out", "limits.toml", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["completions"] == 24
    assert found["identical"] == 1
    assert found["false_positive_rate"] == 0
    assert found["tokens"] <= 24 * 24
    limits = {
        key: found[key] for key in ("max_margin", "mean_margin", "max_flips", "flip_rate", "flip_gap", "boundary")
    }
    assert limits["max_margin"] == 0.01, "equal engines in fp32: nothing but the floor"
    text = (tmp_path / "limits.toml").read_text()
    assert tomllib.loads(text) == {"defence": {"params": {"seeded": limits}}}
    said = tomllib.loads("\n".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")))
    for key in (
        "false_positive_rate",
        "upper_95",
        "slack_bits",
        "completions",
        "command",
        "seed",
        "commit",
        "versions",
    ):
        assert said[key] == found[key]
    assert said["command"].startswith("assay calibrate --completions 24")
    assert said["model"] == {"name": "tiny", "dtype": "float32", "lora_r": 0, "lora_alpha": 32.0}
    (tmp_path / "x.toml").write_text(f'wing = "swarm"\n{text}')
    loaded = config.load(tmp_path / "x.toml")
    assert isinstance(loaded, config.SwarmExperiment)
    assert defence.make(loaded, vocabulary=1024, eos=2).level == "seeded"


def test_progress_is_lines_for_a_log_or_nothing_and_colours_can_be_had_off(tmp_path: Path) -> None:
    """On a real terminal, a pseudo one: there the bar would be drawn."""
    code = (
        "import time\nfrom assay.progress import Bar\nwith Bar() as bar:\n bar.add(2)\n bar.say('first')\n bar.tick(1)\n"
        " bar.say('second')\n bar.tick(1)\n time.sleep(0.3)\n"
    )

    def shown(**environment: str) -> str:
        theirs, ours = pty.openpty()
        done = subprocess.Popen(
            [sys.executable, "-c", code], stderr=ours, env={**os.environ, "TERM": "xterm-256color", **environment}
        )
        os.close(ours)
        text = b""
        try:
            while part := os.read(theirs, 1 << 16):
                text += part
        except OSError:  # how the end of a terminal reads on Linux
            pass
        os.close(theirs)
        assert done.wait() == 0
        return text.decode()

    colour = re.compile(r"\x1b\[[0-9;]*3[0-9][0-9;]*m")
    bar = shown()
    assert "100 %" in bar
    assert colour.search(bar)
    assert not colour.search(shown(NO_COLOR="1"))
    assert shown(ASSAY_PROGRESS="plain").split() == ["first", "second"]
    assert shown(ASSAY_PROGRESS="quiet") == ""


def test_quiet_and_plain_are_options_of_every_command() -> None:
    found = assay("--quiet", "model", "list", "--json")
    assert found.returncode == 0
    assert found.stderr == ""
    assert json.loads(found.stdout)
    assert "--plain" in assay("--help").stdout


def test_commands_show_examples_that_parse() -> None:
    """Every command has one, and every one names a command and options that exist."""
    top = typer.main.get_command(cli.app)
    for command, lines in examples(top):
        assert lines or hasattr(command, "commands"), f"{command.name}: no example"
        for line in lines:
            words = shlex.split(line, comments=True)
            words = words[: next((i for i, word in enumerate(words) if word in (">", "|")), len(words))]
            found: Any = top
            options = [word.partition("=")[0] for word in words if word.startswith("-")]
            known: set[str] = set()
            for word in ["assay", *words[1:]]:
                known |= {name for param in found.params for name in (*param.opts, *param.secondary_opts)}
                if isinstance(found, click.Group) and word in found.commands:
                    found = found.commands[word]
            known |= {name for param in found.params for name in (*param.opts, *param.secondary_opts)}
            assert found is command, line
            assert set(options) <= known, line


def test_help_says_what_a_positional_argument_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Which Typer up to 0.20 loses under click 8.5 (click sets `help` of its own after Typer's)."""
    seen = 0
    for command, _ in examples(typer.main.get_command(cli.app)):
        for argument in command.params:
            if argument.param_type_name == "argument":
                assert argument.help, f"{command.name}: {argument.name}"
                with pytest.raises(SystemExit) as ended:
                    command.main(["--help"], prog_name="assay")
                assert ended.value.code == 0
                assert argument.help.split()[0] in capsys.readouterr().out
                seen += 1
    assert seen


def test_a_soak_is_quiet_when_asked_and_lines_in_a_log(tmp_path: Path) -> None:
    sized = ["bench", "soak", "--clients", "20", "--rounds", "1", "--values", "1000", "--json"]
    quiet = assay("--quiet", *sized, "--out", str(tmp_path / "quiet"))
    plain = assay("--plain", *sized, "--out", str(tmp_path / "plain"))
    assert (quiet.returncode, plain.returncode) == (0, 0), quiet.stderr + plain.stderr
    assert quiet.stderr == ""
    assert re.search(r"^round 1/1: ", plain.stderr, re.MULTILINE)
    assert len(json.loads(quiet.stdout)["rows"]) == 1


def examples(command: Any) -> Iterator[tuple[Any, list[str]]]:
    """Every command with the lines of its help that are a call of `assay`."""
    yield command, [line.strip() for line in (command.help or "").splitlines() if line.strip().startswith("assay ")]
    for under in getattr(command, "commands", {}).values():
        yield from examples(under)
