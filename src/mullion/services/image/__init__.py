"""Guest images: disks built here that serve as read-only parents. So far one, `demo`, made of Debian packages."""

from mullion.services.image.build import BuiltImage, build_demo_image
from mullion.services.image.controller import ImageController
from mullion.services.image.disk import KERNEL_LINE

__all__ = ["KERNEL_LINE", "BuiltImage", "ImageController", "build_demo_image"]
