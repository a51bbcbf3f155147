# SPDX-License-Identifier: Apache-2.0
"""The command line: what is taken for what, and that what makes no sense is said in a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tracer import arguments


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("", "live"),
        ("-n sre", "live"),
        ("path", "path"),
        ("continuous", "continuous"),
        ("--continuous --record /x", "continuous"),
        ("report /x", "report"),
        ("--report --duration 5s", "report"),
        ("doctor", "doctor"),
    ],
)
def test_commands_and_their_other_spellings(line: str, command: str) -> None:
    assert arguments.parse(line.split()).command == command


def test_continuous_mode_has_values_to_begin_with() -> None:
    args = arguments.parse(["continuous"])
    assert args.metrics == ("127.0.0.1", 9353)
    assert (args.slower, args.sample, args.cpu_budget) == (100_000_000, 100, 0.01)
    assert (args.rotate, args.keep_size, args.keep_age) == (300 * 10**9, 1 << 30, 7 * 86400)
    assert args.record is None


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("metrics", "off", None),
        ("metrics", "[::1]:0", ("::1", 0)),
        ("metrics", "0.0.0.0:9353", ("0.0.0.0", 9353)),  # noqa: S104 - what a user may want
        ("sample", "1/1", 1),
        ("sample", "0", 0),
        ("slower", "1.5s", 1_500_000_000),
        ("cpu_budget", "0.5%", 0.005),
        ("keep_size", "10MiB", 10 << 20),
        ("keep_age", "36h", 36 * 3600),
        ("rotate", "30s", 30 * 10**9),
        ("metrics_names", "20", 20),
        ("record", "/var/lib/dnstrace", Path("/var/lib/dnstrace")),
    ],
)
def test_values_are_read(option: str, text: str, value: object) -> None:
    args = arguments.parse(["continuous", f"--{option.replace('_', '-')}", text])
    assert getattr(args, option) == value


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("metrics", "localhost:9353"),
        ("metrics", "127.0.0.1"),
        ("metrics", "127.0.0.1:65536"),
        ("metrics", ":9353"),
        ("sample", "100"),
        ("sample", "1/0"),
        ("sample", "2/3"),
        ("sample", "1/x"),
        ("slower", "5"),
        ("slower", "0s"),
        ("cpu-budget", "1"),
        ("cpu-budget", "0%"),
        ("cpu-budget", "nan%"),
        ("cpu-budget", "x%"),
        ("keep-size", "1GB"),
        ("keep-age", "7"),
        ("keep-age", "-1d"),
        ("rotate", "soon"),
        ("interval", "0s"),
        ("metrics-names", "1001"),
        ("metrics-names", "-1"),
        ("metrics-names", "²"),
        ("name", "x"),  # what only single transactions have
    ],
)
def test_what_makes_no_sense_is_said(
    option: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        arguments.parse(["continuous", f"--{option}", text])
    assert ended.value.code == 2
    (last,) = capsys.readouterr().err.splitlines()
    assert last.startswith("dnstrace continuous: error: ")
    assert f"--{option}" in last


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["continous"], "there is no command 'continous'; did you mean 'continuous'?"),
        (["xyz"], "there is no command 'xyz' (there are: path, continuous, report, doctor, lab)"),
        (["continuous", "--name", "x"], "here the kernel counts them"),
        (["report", "--nmespace", "x"], "unrecognized arguments: --nmespace"),
        (["continuous", "--metrics-names", "5", "--metrics", "off"], "nobody would see them"),
        (["continuous", "--metrics-names", "5", "--sample", "0"], "only slow and failed ones"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        arguments.parse(argv)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
