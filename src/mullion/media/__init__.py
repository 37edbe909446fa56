"""A disk's content as other programs have it: foreign formats, filesystems inside it, mounts and exports.

Everything here needs a program, a library or a kernel interface beside the disk file itself; what needs only the file
is in `mullion.vhd`.
"""
