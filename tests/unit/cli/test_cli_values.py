"""Values of options: disks, sizes, paths."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mullion.base.errors import InvalidError
from mullion.base.units import GIB
from mullion.cli.values import DiskSpec, disk_path, parent_path, parse_disk_spec, repository_place
from mullion.model.definition import Bus

pytestmark = pytest.mark.unit


def test_a_plain_name_is_a_disk_of_the_pool():
    assert parse_disk_spec("web") == DiskSpec(path="web")
    assert not parse_disk_spec("web").may_be_created


def test_everything_that_can_be_said_of_a_disk():
    spec = parse_disk_spec("web,parent=image:demo,size=40G,bus=sata,ro,id=root")
    assert spec == DiskSpec("web", "image:demo", 40 * GIB, Bus.SATA, True, "root")
    assert spec.may_be_created


def test_a_path_is_made_absolute_and_a_name_is_not():
    assert disk_path("./web.vhd") == os.path.join(os.getcwd(), "web.vhd")
    assert disk_path("/a/../b.vhd") == "/b.vhd"
    assert disk_path("web") == "web"
    assert parent_path("image:demo") == "image:demo"
    assert parent_path("x/y") == os.path.join(os.getcwd(), "x/y")


def test_a_repositorys_folder_is_made_absolute_and_an_address_is_not():
    assert repository_place("./backup") == repository_place("backup") == os.path.join(os.getcwd(), "backup")
    for place in ("/srv/backup", "sftp://me@host/folder", "s3://bucket", "file:///srv/backup"):
        assert repository_place(place) == place
    assert repository_place("./a:b") == os.path.join(os.getcwd(), "a:b")


@pytest.mark.parametrize("text", ["", "sftp:/host/folder", "me@host:/folder", "host:folder", "s3:bucket"])
def test_what_looks_like_an_address_becomes_no_folder(text):
    with pytest.raises(InvalidError, match="neither a folder nor an address"):
        repository_place(text)


def test_a_doubled_comma_belongs_to_the_path():
    assert parse_disk_spec("/disks/a,,b.vhd,ro") == DiskSpec("/disks/a,b.vhd", read_only=True)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "names no disk"),
        (",size=1G", "names no disk"),
        ("web,color=red", "'color=red'"),
        ("web,ro=yes", "'ro=yes'"),
        ("web,size", "'size'"),
        ("web,size=", "'size='"),
        ("web,size=40Q", "'40Q' is not a size"),
        ("web,bus=scsi", "no bus 'scsi'"),
        ("web,ro,ro", "ro is given twice"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(text, named):
    with pytest.raises(InvalidError) as caught:
        parse_disk_spec(text)
    assert named in caught.value.message
    assert caught.value.remedy != InvalidError.default_remedy


@given(st.text(alphabet=st.characters(codec="ascii", exclude_characters="\0"), min_size=1, max_size=40))
@settings(max_examples=200)
def test_any_name_of_a_file_can_be_written(name):
    written = "/d/" + name.replace(",", ",,") + ",ro"
    spec = parse_disk_spec(written)
    assert spec == DiskSpec(os.path.abspath("/d/" + name), read_only=True)
