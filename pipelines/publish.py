"""The installed command `pixelrepa-publish` as a script."""

from pixelrepa_diffusers.commands.publish import cli


if __name__ == "__main__":
    cli()
