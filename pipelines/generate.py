"""Images from a PixelREPA or JiT pipeline: one PNG for every class and seed, and a labelled grid of them.

Installed as `pixelrepa-generate`; `--help` lists the flags.
"""

from pixelrepa_diffusers.commands.generate import cli


if __name__ == "__main__":
    cli()
