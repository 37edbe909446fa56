"""Hyper-V's names for our commands: one table, nothing ignored."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest

from mullion.base.errors import InvalidError
from mullion.cli.root import root
from mullion.cli.vhd import ENTRIES, vhd
from mullion.cli.vhd.powershell import CMDLETS, Cmdlet, find_cmdlet, translate

pytestmark = pytest.mark.unit


def words(name: str, *arguments: str) -> list[str]:
    cmdlet = find_cmdlet(name)
    assert cmdlet is not None
    return translate(cmdlet, arguments)


@pytest.mark.parametrize("cmdlet", CMDLETS, ids=lambda cmdlet: cmdlet.name)
def test_every_cmdlet_leads_to_a_command_that_has_its_options(cmdlet: Cmdlet) -> None:
    assert cmdlet.command in ENTRIES
    command = vhd.get_command(click.Context(vhd), cmdlet.command)
    assert command is not None
    options = {name for param in command.params for name in param.opts}
    for parameter in cmdlet.parameters.values():
        assert not parameter.words or parameter.words[0] in options, parameter.words


def test_names_are_compared_without_case_and_values_follow_a_space_or_a_colon() -> None:
    expected = ["--size", "1GB", "--type", "fixed", "a b.vhd"]
    assert words("new-vhd", "-path", "a b.vhd", "-SIZEBYTES", "1GB", "-Fixed") == expected
    assert words("New-VHD", "-Path:a b.vhd", "-SizeBytes:1GB", "-Fixed") == expected


def test_arguments_come_in_the_commands_order_whatever_the_order_of_the_parameters() -> None:
    assert words("Convert-VHD", "-DestinationPath", "b", "-VHDType", "Fixed", "-Path", "a") == [
        "--to",
        "fixed",
        "a",
        "b",
    ]
    assert words("Convert-VHD", "a", "b", "--format", "json") == ["a", "b", "--format", "json"]


def test_what_the_command_has_not_is_refused_by_name() -> None:
    with pytest.raises(InvalidError, match="no parameter -Passthru") as caught:
        words("New-VHD", "-Passthru")
    assert "mullion vhd create --help" in caught.value.remedy
    with pytest.raises(InvalidError, match="Differencing is not supported"):
        words("Convert-VHD", "-VHDType", "Differencing")
    with pytest.raises(InvalidError, match="-Path has no value"):
        words("Get-VHD", "-Path")


def test_a_path_that_looks_like_an_option_stays_a_path() -> None:
    assert words("Get-VHD", "-Path", "-x.vhd") == ["./-x.vhd"]


def test_the_real_command_takes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "new disk.vhd")
    with pytest.raises(SystemExit) as ended:
        root.main(["vhd", "New-VHD", "-Path", path, "-SizeBytes", "40MB", "-Dynamic", "--format", "json"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out) == {"path": path, "type": "dynamic", "size_bytes": 40 << 20}
