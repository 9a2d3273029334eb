"""Reference statistics of a set of images, which FID, FD-DINOv2, precision and recall are measured against.

Installed as `pixelrepa-prepare-reference`; `--help` lists the flags.
"""

from pixelrepa_diffusers.commands.prepare_reference import cli


if __name__ == "__main__":
    cli()
