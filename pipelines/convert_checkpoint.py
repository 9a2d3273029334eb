"""The installed command `pixelrepa-convert` as a script."""

from pixelrepa_diffusers.commands.convert_checkpoint import cli


if __name__ == "__main__":
    cli()
