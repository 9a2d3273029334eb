"""Convert a published PixelREPA or JiT checkpoint into a diffusers pipeline, and back.

Same as the installed command `pixelrepa-convert`.
"""

from pixelrepa_diffusers.commands.convert_checkpoint import cli


if __name__ == "__main__":
    cli()
