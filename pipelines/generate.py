"""Generate images with a PixelREPA or JiT pipeline.

Same as the installed command `pixelrepa-generate`; for `accelerate launch`, which takes a script.
"""

from pixelrepa_diffusers.commands.generate import cli


if __name__ == "__main__":
    cli()
