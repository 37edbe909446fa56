"""`mullion image`: disk images built on this host, that partitions start from."""

from __future__ import annotations

import click

from mullion.base.units import format_size
from mullion.cli import complete
from mullion.cli.face import Face, pass_face
from mullion.cli.lazy import Group
from mullion.cli.progress import conclude, wait_option


@click.group(cls=Group, short_help="Build and list disk images that partitions start from.")
def image() -> None:
    """Build and list disk images that partitions start from.

    A new disk starts from an image with: mullion disk create NAME --parent image:IMAGE
    """


@image.command("list")
@pass_face
def list_images(face: Face) -> None:
    """List the images that are built."""
    views = face.client.images()
    if face.is_json:
        face.emit_json(views)
        return
    from mullion.cli.tables import table

    if not views:
        face.note(f"No images. Build the first: {face.command('image', 'build', 'demo')}")
        return
    rows = [(v.name, format_size(v.size_bytes), format_size(v.file_bytes), v.built_at, v.path) for v in views]
    face.say(table(("NAME", "SIZE", "FILE", "BUILT", "PATH"), rows, right=(1, 2)))


@image.command("build")
@click.argument("name", shell_complete=complete.images)
@wait_option
@pass_face
def build_image(face: Face, name: str, wait: bool) -> None:
    """Build an image from the distribution's packages (`demo`: a small guest that boots in seconds)."""
    begun = face.client.build_image(name)
    conclude(face, begun, wait=wait, sentence=lambda _: f"{name}: built")
