"""A published PixelREPA or JiT checkpoint into a diffusers pipeline, and back.

Installed as `pixelrepa-convert`; `--help` lists the flags.
"""

from pixelrepa_diffusers.commands.convert_checkpoint import cli


if __name__ == "__main__":
    cli()
